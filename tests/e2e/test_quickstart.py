# SPDX-License-Identifier: Apache-2.0
"""The quickstart on real weights and sentences: shortened by default, whole and held to its promises when slow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mirrortune.system.paths import shipped_folder
from tests.cli.console import mirrortune

ANGLE_BYTES_ALLOWED = 72_000
SHORT = ("--max-steps", 4, "train.eval_every_steps=4")


def few_rows(folder: Path) -> Path:
    """The first 64 rows of each split of the quickstart's data."""
    folder.mkdir()
    for path in (shipped_folder() / "data" / "movie-sentences").glob("*.tsv"):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / path.name).write_text("".join(lines[:65]), encoding="utf-8")
    return folder


def train(folder: Path, cache: Path, *words: object) -> dict[str, Any]:
    """The result of a quickstart run in ``folder``."""
    return mirrortune("train", "quickstart", "-o", folder, "--json", *words, cache=cache).data


def check_merge(run: Path, metrics: dict[str, float], merged: Path, cache: Path) -> None:
    """Merge a run; its verification passes, and the merged model scores what the run scored."""
    report = mirrortune("merge", run, "-o", merged, "--json", cache=cache).data
    assert report["verification"]["passed"]
    plain = mirrortune("eval", merged, "--json", cache=cache).data["metrics"]
    assert plain == pytest.approx(metrics, abs=1e-4)


@pytest.mark.slow
def test_a_shortened_quickstart_goes_the_whole_way(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = mirrortune("prepare", "quickstart", "--json", cache=cache).data
    assert first["svd_cache"] == {"hits": 0, "misses": 37}
    assert first["rows"] == {"train": 6400, "validation": 1056, "test": 1056}
    few = few_rows(tmp_path / "few")
    second = mirrortune("prepare", "quickstart", "-d", few, "--json", cache=cache).data
    assert second["svd_cache"] == {"hits": 37, "misses": 0}
    result = train(tmp_path / "run", cache, "-d", few, *SHORT)
    assert 4 * result["trainable_parameters"] <= ANGLE_BYTES_ALLOWED
    assert result["trainable_parameters"] == 37 * 384 // 2
    check_merge(tmp_path / "run", result["metrics"], tmp_path / "merged", cache)


@pytest.mark.slow
def test_the_quickstart_beats_its_head_alone(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    mirror = train(tmp_path / "mirror", cache)
    # The head alone wants a far larger learning rate, and twice the passes.
    alone = train(tmp_path / "none", cache, "--method", "none", "--head-lr", 1e-1, "--epochs", 2)
    assert mirror["metrics"]["accuracy"] >= alone["metrics"]["accuracy"] + 0.03
    check_merge(tmp_path / "mirror", mirror["metrics"], tmp_path / "merged", cache)
