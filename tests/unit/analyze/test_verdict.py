# SPDX-License-Identifier: Apache-2.0
"""What analyze says of published claims: rounding is not taken for a change of what a method leaves as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mirrortune.adapters.svd import factorize
from mirrortune.analyze.spectra.spectra import MatrixComparison, compare_matrices
from mirrortune.analyze.spectra.verdict import claims


def found(change: str, dtype: torch.dtype) -> list[MatrixComparison]:
    """Comparisons of 16 weights that are rotated, or scaled at random, and stored in ``dtype``."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    compared = []
    for _ in range(16):
        weight = draw(32, 24).to(dtype)
        f = factorize(weight.double())
        if change == "rotated":
            skew = 0.02 * draw(32, 32)
            tuned = torch.linalg.matrix_exp(skew - skew.T) @ weight.double()
        else:
            tuned = (f.U * (f.S * (1 + 1e-3 * draw(24)))) @ f.Vh
        compared.append(compare_matrices(weight, tuned.to(dtype)))
    return [c for c in compared if c is not None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("change", "claim", "holds"),
    [
        ("rotated", "the top singular values are amplified", False),
        ("rotated", "the other singular values are nearly unchanged", True),
        ("scaled", "the dominant singular vectors are re-oriented", False),
        ("scaled", "the non-dominant subspace is stable", True),
    ],
)
def test_rounding_is_no_change(change: str, claim: str, holds: bool, dtype: torch.dtype) -> None:
    said = next(c for c in claims(found(change, dtype)) if c.text == claim)
    assert said.agreeing == float(holds)
    assert said.holds is holds
