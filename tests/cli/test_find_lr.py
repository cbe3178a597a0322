# SPDX-License-Identifier: Apache-2.0
"""train --find-lr: what it shows and writes, and that it touches no run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.console import mirrortune

pytestmark = pytest.mark.figures


def words(model: Path, *more: object) -> list[object]:
    """A command line that sweeps."""
    return ["train", "-m", model, "-t", "text-classification", "-d", "reviews.csv", "-o", "run", "--find-lr", *more]


def test_it_proposes_a_rate_and_writes_a_page_beside_the_run(desk: Path, tiny_model_dir: Path) -> None:
    (desk / "run").mkdir()
    (desk / "run" / "mine.txt").write_text("kept")

    done = mirrortune(*words(tiny_model_dir))

    assert done.exit_code == 0, done.stderr
    assert done.is_plain
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["lr", "loss"]
    assert any("<- proposed" in line for line in lines)
    assert any(line.startswith("proposed: --lr ") and "sure" in line for line in lines)
    assert lines[-1] == "page: run-lr.html"
    assert "learning rate of the adapter" in (desk / "run-lr.html").read_text()
    assert [path.name for path in (desk / "run").iterdir()] == ["mine.txt"]


def test_what_it_cannot_do_is_refused_before_anything_is_read(desk: Path, tiny_model_dir: Path) -> None:
    both = mirrortune(*words(tiny_model_dir, "--resume", "--dry-run"))
    (desk / "run-lr.html").write_text("of somebody else")
    foreign = mirrortune(*words(tiny_model_dir))

    assert both.exit_code == foreign.exit_code == 2
    assert "--find-lr: it trains nothing and excludes --resume, --dry-run" in both.stderr
    assert "run-lr.html was not written by mirrortune and is left alone" in foreign.stderr
    assert "data:" not in foreign.stderr
    assert (desk / "run-lr.html").read_text() == "of somebody else"
    (desk / "run-lr.html").unlink()
    (desk / "run-lr.html").mkdir()
    folder = mirrortune(*words(tiny_model_dir))
    assert folder.exit_code == 2
    assert "its page would be run-lr.html, which is a folder. Choose another with -o." in folder.said


def test_a_sweep_needs_a_rate_and_something_to_adapt(desk: Path, tiny_model_dir: Path) -> None:
    for more, says in (
        (("--lr", 0), "train.lr: got 0. Allowed: a rate above 0"),
        (("--method", "none"), "--find-lr: method 'none' trains only the head"),
    ):
        done = mirrortune(*words(tiny_model_dir, *more))
        assert (done.exit_code, says in done.said) == (2, True), done.stderr
        assert not (desk / "run-lr.html").exists()
