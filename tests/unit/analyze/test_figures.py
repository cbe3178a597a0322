# SPDX-License-Identifier: Apache-2.0
"""Figures of an analysis: axes that can be read."""

from __future__ import annotations

import pytest
import torch

from mirrortune.analyze.analyze import Analysis
from mirrortune.analyze.figures import drawings
from mirrortune.analyze.spectra.spectra import compare_matrices
from mirrortune.analyze.spectra.summary import Analysed, summarise


@pytest.mark.figures
def test_shares_within_a_decade_have_labels() -> None:
    from matplotlib.figure import Figure

    base = torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(base)
    larger = torch.tensor([0.3, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64)
    compared = compare_matrices(base, (U * (S + larger)) @ Vh)  # shares of 41% and 82%, by chance 12.5% and 50%
    matrices = [Analysed(name="up.weight", kind="up", depth=None, shape=(8, 8), comparison=compared)]
    analysis = Analysis(
        base="", tuned="", matrices=matrices, overall=summarise(matrices, {"up.weight": float(base.square().sum())}),
        by_kind={}, by_depth={}, curves={}, claims=[], verdict=[], num_weights=64, base_only=[], tuned_only=[],
        resized=[], seconds=0.0, matrix_seconds={}, threads=1, top_k=2,
    )  # fmt: skip
    figure = Figure(figsize=(9, 3.4))
    next(drawing for drawing in drawings(analysis) if drawing.name == "leading_subspaces").draw(figure)
    figure.draw_without_rendering()
    shares, angles = figure.axes
    low, high = shares.get_ylim()
    assert 10 < low < high < 100
    assert [label.get_text() for label in shares.get_yticklabels(minor=True) if low < label.get_position()[1] < high]
    for axes in (shares, angles):
        assert [label.get_text() for label in axes.get_xticklabels(which="both")] == ["1", "4"]
