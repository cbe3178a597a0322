# SPDX-License-Identifier: Apache-2.0
"""analyze: its summary, its --json object, its page and figures, and what it makes of bad input."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mirrortune.adapters.svd import factorize
from tests.cli.console import Outcome, mirrortune
from tests.tiny_models import write_tiny_model
from tests.tiny_runs import adapt

pytestmark = pytest.mark.figures
QUERY = "encoder.layer.1.attention.self.query.weight"


class Checkpoints:
    """A tiny model, and one made of it: the top two values of every matrix of the attention scaled by 1.5."""

    def __init__(self, folder: Path) -> None:
        self.base, self.tuned = write_tiny_model(folder / "base"), write_tiny_model(folder / "tuned")
        path = self.tuned / "model.safetensors"
        tensors = load_file(path)
        for name, weight in tensors.items():
            if ".self." in name and name.endswith(".weight"):
                f = factorize(weight)
                S = f.S.clone()
                S[:2] *= 1.5
                tensors[name] = ((f.U * S) @ f.Vh).to(weight.dtype)
        save_file(tensors, path, {"format": "pt"})
        words = ["analyze", self.base, self.tuned, "--top-k", 2]
        self.page, self.figures = folder / "report.html", folder / "figures"
        self.shown = mirrortune(*words, "-o", self.page, "--figures", self.figures)
        self.data = mirrortune(*words, "--json", "--threads", 1).data


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("analyze"))


class Reader(HTMLParser):
    """What a page refers to and shows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("href", "src", "xlink:href", "action") and v]
        self.ids += [v for k, v in attrs if k == "id" and v]
        if tag not in ("meta", "link", "br", "img", "use", "path", "rect", "image"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag


def test_the_summary_says_what_was_done(done: Checkpoints) -> None:
    out = done.shown.stdout
    assert done.shown.exit_code == 0
    assert done.shown.is_plain
    assert "6 of 13 matrices changed" in out
    assert "mostly amplification: 100% amplification, 0% re-orientation, 0% new directions" in out
    assert re.search(r"^query +2/2 .*\+50\.00 ", out, flags=re.MULTILINE)
    assert re.search(r"^pooler.dense +0/1 ", out, flags=re.MULTILINE)
    assert "holds: the top singular values are amplified (100% of matrices)" in out
    # Two of 32 values of six matrices: scale captures it all with two numbers each.
    assert re.search(r"^scale .* 12$", out, flags=re.MULTILINE)
    assert done.shown.stderr.strip() == "matrices compared: 13 done"


def test_json_is_one_object_with_every_matrix(done: Checkpoints) -> None:
    data = done.data
    found = {m["name"]: m for m in data["matrices"]}

    assert len(found) == 13
    comparison = found[QUERY]["comparison"]
    assert comparison["shares"]["amplification"] == pytest.approx(1, abs=1e-4)
    assert comparison["top_change"] == pytest.approx([0.5, 0.5], abs=1e-3)
    assert found["pooler.dense.weight"]["comparison"] is None
    assert (found[QUERY]["kind"], found[QUERY]["depth"]) == ("query", 1)
    assert data["overall"]["changed"] == 6
    assert data["curves"]["scale"]["captured"][1] == pytest.approx(1, abs=1e-4)
    assert data["curves"]["full"] == {"sizes": [32], "parameters": [6 * 32 * 32], "captured": [1.0]}
    assert [claim["holds"] for claim in data["claims"]][:2] == [True, True]
    assert data["report"] is None
    assert data["threads"] == 1
    json.dumps(data, allow_nan=False)


def test_the_page_needs_nothing_from_outside(done: Checkpoints) -> None:
    text = done.page.read_text(encoding="utf-8")
    page = Reader(text)

    assert not page.open
    assert not {"script", "img", "iframe", "object"} & set(page.tags)
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert "url(http" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert page.tags.count("svg") == 7
    assert page.tags.count("figcaption") == 7
    for drawn in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ids = re.findall(r'\bid="([^"]+)"', drawn)
        used = re.findall(r'(?:url\(#|href="#)([^")]+)', drawn)
        assert set(used) <= set(ids), "every reference is to something of the same figure"
        assert "#010203" not in drawn
        assert "var(--ink)" in drawn


def test_every_axis_has_a_label(done: Checkpoints) -> None:
    from mirrortune.analyze.analyze import analyse
    from mirrortune.analyze.checkpoints import open_pair
    from mirrortune.analyze.figures import drawings
    from mirrortune.system.console import Reporter

    base, tuned = open_pair(str(done.base), str(done.tuned), None, None)
    found = analyse(base, tuned, show_bar=Reporter(verbosity=-1).bar)
    for drawing in drawings(found):
        assert_axes_are_labelled(drawing)


def assert_axes_are_labelled(drawing: Any) -> None:
    """Every visible axis says what it shows; one of categories says so by its ticks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=drawing.size)
    drawing.draw(figure)
    for axes in figure.axes:
        if not axes.get_visible() or axes.get_label() == "<colorbar>":
            continue
        for axis in (axes.xaxis, axes.yaxis):
            words = [tick.get_text() for tick in axis.get_ticklabels()]
            assert axis.get_label().get_text() or any(not re.fullmatch(r"[\d.−-]*", word) for word in words)


def test_figures_are_pictures(done: Checkpoints) -> None:
    from mirrortune.analyze.figures import NAMES

    names = {path.stem for path in done.figures.glob("[!.]*")}
    assert names <= {*NAMES}, "they are looked for before the work"
    assert {"shares", "by_layer_and_kind", "spectra", "captured_by_method"} <= names
    for path in done.figures.glob("[!.]*"):
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG\r\n")
        else:
            assert ET.fromstring(path.read_text(encoding="utf-8")).tag.endswith("svg")


def test_a_page_is_replaced_but_no_other_file_is(done: Checkpoints, tmp_path: Path) -> None:
    own, other = tmp_path / "page.html", tmp_path / "thesis.html"
    own.write_bytes(done.page.read_bytes())
    other.write_text("<html>years of work</html>")
    words = ["analyze", done.base, done.tuned, "--target-modules", "layer.0.*query"]

    assert mirrortune(*words, "-o", own).exit_code == 0
    assert own.read_bytes() != done.page.read_bytes()
    refused = mirrortune(*words, "-o", other)
    assert (refused.exit_code, other.read_text()) == (2, "<html>years of work</html>")
    assert "was not written by mirrortune" in refused.said
    assert "is a folder" in mirrortune(*words, "-o", tmp_path).said


def test_nothing_changed_is_an_answer(done: Checkpoints, tmp_path: Path) -> None:
    found = mirrortune("analyze", done.base, done.base, "-o", tmp_path / "page.html", "--figures", tmp_path / "figures")
    assert found.exit_code == 0, found.stderr
    assert "Nothing changed in 13 matrices." in found.stdout
    assert "Nothing changed" in (tmp_path / "page.html").read_text(encoding="utf-8")
    data = mirrortune("analyze", done.base, done.base, "--json").data
    assert data["overall"]["shares"] is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_storing_fewer_bits_is_told_from_a_change(done: Checkpoints, tmp_path: Path, dtype: torch.dtype) -> None:
    said = []
    for name, folder in (("base", done.base), ("tuned", done.tuned)):
        halved = write_tiny_model(tmp_path / name)
        tensors = load_file(folder / "model.safetensors")
        save_file(
            {n: weight.to(dtype) for n, weight in tensors.items()}, halved / "model.safetensors", {"format": "pt"}
        )
        said.append(mirrortune("analyze", done.base, halved, "--json").data)
    same, changed = said
    assert same["verdict"][0] == "Nothing changed in 13 matrices."
    assert same["verdict"][-1].endswith("stores fewer bits than the base: its rounding is 100% of the difference.")
    assert changed["overall"]["changed"] == 6, "the others are only rounded"
    assert mirrortune("analyze", tmp_path / "base", tmp_path / "tuned", "--json").data["matrices"][0]["rounding"] == 0


def test_an_adapter_alone_is_compared_with_its_own_base(done: Checkpoints, tmp_path: Path) -> None:
    from mirrortune.adapters.spec import AdapterSpec
    from tests.tiny_models import tiny_bert

    base = tmp_path / "base"
    tiny_bert().get_submodule("bert").save_pretrained(base)
    adapt(AdapterSpec(method="mirror"), model=tiny_bert()).save(tmp_path / "adapter", name=str(base))
    data = mirrortune("analyze", tmp_path / "adapter", "--json", "-o", tmp_path / "page.html").data

    assert data["overall"]["changed"] == 13
    assert data["curves"]["mirror"]["captured"][-1] == pytest.approx(1, abs=1e-4)
    assert len(data["matrices"][0]["angles"]) == 16
    assert "plane_angles" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_layers_are_listed_by_their_number(tmp_path: Path) -> None:
    """Headers of safetensors files are sorted by name: layer 10 precedes layer 2."""
    paths = [tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"]
    names = [*(f"layers.{i}.up.weight" for i in range(12)), "head.weight"]
    before = {name: torch.randn(6, 4, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(names)}
    after = {name: weight * (1 + 0.01 * i) for i, (name, weight) in enumerate(before.items(), start=1)}
    for path, tensors in zip(paths, (before, after), strict=True):
        save_file(tensors, path, {"format": "pt"})
    done = mirrortune("analyze", *paths)
    data = mirrortune("analyze", *paths, "--json").data

    assert "From layer 0 to 11:" in done.stdout
    assert re.search(r"norm of the change +▁▁?▂.*█ ", done.stdout)
    assert list(data["by_depth"]) == [*map(str, range(12)), "outside"]
    found = [data["by_depth"][str(i)]["relative"] for i in range(12)]
    assert found == pytest.approx([0.01 * i for i in range(1, 13)], rel=1e-4)


def complaint(*words: object) -> Outcome:
    found = mirrortune("analyze", *words)
    assert found.exit_code != 0
    assert found.stdout == ""
    assert "Traceback" not in found.stderr
    return found


def test_bad_input_is_answered_in_words(done: Checkpoints, tmp_path: Path) -> None:
    assert "no such folder" in complaint("./nowhere", done.tuned).said
    assert "no such folder" in complaint(done.base, "./nowhere").said
    assert "Give both: mirrortune analyze BASE TUNED" in complaint(done.base).said
    moved = adapt().save(tmp_path / "adapter", name=str(tmp_path / "moved"))
    assert "if it has moved, give both: mirrortune analyze BASE ADAPTER" in complaint(moved).said
    assert "matches none of the 13" in complaint(done.base, done.tuned, "--target-modules", "q_proj").said
    assert "not a regular expression" in complaint(done.base, done.tuned, "--target-modules", "(").said
    wide = write_tiny_model(tmp_path / "wide", hidden_size=48, intermediate_size=96)
    found = complaint(done.base, wide)
    assert found.exit_code == 2
    assert "differ in shape" in found.said
    assert "Give two checkpoints of one architecture" in found.said
    broken = write_tiny_model(tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors[QUERY][0, 0] = torch.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    found = complaint(done.base, broken)
    assert found.exit_code == 3
    assert QUERY in found.said
    assert "NaN" in found.said
