# SPDX-License-Identifier: Apache-2.0
"""Labels from users' files are drawn as they are, and nothing in them is interpreted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mirrortune.reports.drawing import Drawing, by_decades, write_figure


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
        by_decades(right)
        figure.suptitle(label)

    return Drawing(name="figure", caption=label, size=(6, 3), draw=draw)


@pytest.mark.parametrize("label", [r"$\foo$", "$", "$x$ and $y$", "5$ to 6$", r"\$", "中文", "a\x00b\x1bc", "x_1^2"])
def test_labels_are_drawn_as_they_are(tmp_path: Path, label: str) -> None:
    for kind in ("png", "svg"):
        write_figure(drawing(label), tmp_path / f"figure.{kind}")
    shown = re.sub("[\x00-\x08\x0b-\x1f]", "", label)
    text = (tmp_path / "figure.svg").read_text()
    assert text.count(f">{shown}</text>") >= 12
    assert "mathdefault" not in text


def test_powers_are_written_without_formulas(tmp_path: Path) -> None:
    write_figure(drawing("x"), tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text()
    assert ">10³</text>" in text
    assert ">10⁻²</text>" in text
