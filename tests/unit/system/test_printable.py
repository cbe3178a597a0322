# SPDX-License-Identifier: Apache-2.0
"""Names of others are shown on a terminal and in figures, and nothing in them is obeyed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mirrortune.compare.figures import _by_decades
from mirrortune.errors import ConfigError
from mirrortune.reports.drawing import Drawing, svg_for_page, write_figure
from mirrortune.runs.evaluate import prediction_file
from mirrortune.system.console import Reporter, printable

HOSTILE = "a\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202etxt\x00\udcff[red]"


def test_what_a_terminal_would_obey_is_shown() -> None:
    assert printable("plain\ttext\nof two lines: é 中 🙂") == "plain\ttext\nof two lines: é 中 🙂"
    assert printable(HOSTILE) == r"a\x1b]0;owned\x07\x1b[2J\x9b31m\x0d\u202etxt\x00\xff[red]"


def test_every_way_of_speaking_shows_it(capfd: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter()
    reporter.note(HOSTILE)
    reporter.error(HOSTILE)
    reporter.result({}, [HOSTILE])
    with reporter.bar(HOSTILE, 1) as bar:
        bar.advance()
    with reporter.training() as training:
        training.on_start(1, 0)
        training.on_log({"event": "evaluate", "step": 1, "epoch": 1.0, HOSTILE: 1.0})
        training.on_log({"event": "train", "step": 1, "epoch": 1.0, HOSTILE: 1.0})
    written = "".join(capfd.readouterr())
    assert written.count(printable(HOSTILE)) == 6
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", written)


def drawing(label: str) -> Drawing:
    """A figure with ``label`` wherever text can stand, and logarithmic axes."""

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for axes in (left, right):
            axes.plot([1, 10, 1000], [0.01, 1, 100], label=label)
            axes.set(xscale="log", yscale="log", xlabel=label, ylabel=label, title=label)
            axes.text(1, 1, label)
            axes.legend()
        right.set_yticks([1, 10], [label, label])
        _by_decades(right)
        figure.suptitle(label)

    return Drawing(name="figure", caption=label, size=(6, 3), draw=draw)


@pytest.mark.parametrize("label", [r"$\foo$", "$", "$x$ and $y$", "5$ to 6$", r"\$", "中文", "a\x00b\x1bc", "x_1^2"])
def test_labels_are_drawn_as_they_are(tmp_path: Path, label: str) -> None:
    for kind in ("png", "svg"):
        write_figure(drawing(label), tmp_path / f"figure.{kind}")
    shown = re.sub("[\x00-\x08\x0b-\x1f]", "", label)
    assert (tmp_path / "figure.svg").read_text().count(f">{shown}</text>") >= 12
    assert "mathdefault" not in svg_for_page(drawing(label))


def test_powers_are_written_without_formulas(tmp_path: Path) -> None:
    write_figure(drawing("x"), tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text()
    assert ">10³</text>" in text
    assert ">10⁻²</text>" in text


@pytest.mark.parametrize("place", ["pipe", "/dev/null", "/dev/zero"])
def test_predictions_go_to_no_pipe_and_no_device(tmp_path: Path, place: str) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="is no regular file"):
        prediction_file(tmp_path / place, "test", {})
