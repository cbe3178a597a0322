# SPDX-License-Identifier: Apache-2.0
"""Pages in a real browser: they show without a complaint in its console and without asking the network for anything."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.cli.console import mirrortune, reviews, write_table
from tests.tiny_models import write_tiny_model

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
# Chromium itself asks its maker for updates and accounts, whatever it is told; these are not the page's.
_MAKER = (".google.com", ".googleapis.com", ".gvt1.com")
_STILL = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run",
          "--disable-extensions", "--disable-default-apps", "--disable-gpu", "--no-sandbox",
          "--disable-features=OptimizationHints,NetworkTimeServiceQuerying,DialMediaRouteProvider")  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")]


def visit(page: Path, folder: Path, scheme: int) -> tuple[Path, str, set[str]]:
    """A screenshot of a page, what the browser complained of, and every address that it asked for.

    Args:
        page: the file.
        folder: for what the browser writes.
        scheme: 0 dark, 1 light.
    """
    shot, log = folder / f"{scheme}.png", folder / f"{scheme}.json"
    done = subprocess.run(
        [CHROMIUM, "--headless=new", *_STILL, f"--user-data-dir={folder / 'profile'}", "--window-size=1200,3000",
         f"--blink-settings=preferredColorScheme={scheme}", "--enable-logging=stderr", f"--log-net-log={log}",
         f"--screenshot={shot}", page.resolve().as_uri()],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    events: list[dict[str, Any]] = json.loads(log.read_text(encoding="utf-8"))["events"]
    asked = {urlsplit(str(e["params"]["url"])) for e in events if "url" in e.get("params", {})}
    hosts = {url.netloc for url in asked if url.scheme in ("http", "https", "ws", "wss", "ftp")}
    return shot, console, {host for host in hosts if not host.endswith(_MAKER)}


def darkness(shot: Path) -> tuple[float, int]:
    """Mean darkness of a picture, 0 to 1, and how many colours it has."""
    from PIL import Image

    with Image.open(shot) as image:
        pixels = image.convert("RGB").resize((300, 750))
        colours = pixels.getcolors(maxcolors=300 * 750) or []
        return 1 - sum(n * sum(c) for n, c in colours) / (300 * 750 * 3 * 255), len(colours)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    model = write_tiny_model(folder / "model")
    other = write_tiny_model(folder / "other", seed=1)
    data = write_table(folder / "reviews.csv", reviews(80))
    words = ["train", "-m", model, "-t", "text-classification", "-d", data, "--epochs", 2, "-o", folder / "run", "-q"]
    assert mirrortune(*words, cache=folder / "cache").exit_code == 0
    assert mirrortune("analyze", model, other, "-o", folder / "analysis.html", "-q").exit_code == 0
    words = [
        "compare",
        "-m",
        model,
        "-t",
        "text-classification",
        "-d",
        data,
        "--methods",
        "mirror,none",
        "--lr-grid",
        "1e-2",
    ]
    assert mirrortune(*words, "--seeds", 1, "-o", folder / "compared", cache=folder / "cache").exit_code == 0
    return {
        "run": folder / "run" / "report.html",
        "analysis": folder / "analysis.html",
        "comparison": folder / "compared" / "report.html",
    }


@pytest.mark.parametrize("name", ["run", "analysis", "comparison"])
def test_a_page_shows_in_light_and_dark_and_asks_for_nothing(pages: dict[str, Path], name: str, tmp_path: Path) -> None:
    assert not any(host in pages[name].read_text(encoding="utf-8") for host in _MAKER)
    dark, console, asked = visit(pages[name], tmp_path, 0)
    assert console == ""
    assert asked == set()
    light, console, asked = visit(pages[name], tmp_path, 1)
    assert console == ""
    assert asked == set()
    (how_dark, dark_colours), (how_light, light_colours) = darkness(dark), darkness(light)
    assert how_dark > 0.7
    assert how_light < 0.3
    assert min(dark_colours, light_colours) > 100, "figures are drawn in both"
