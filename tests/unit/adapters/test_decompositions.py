# SPDX-License-Identifier: Apache-2.0
"""Decompositions: the leading triplets are LAPACK's, axis by axis, and what LAPACK refuses is found another way."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch
from torch import Tensor

from mirrortune.adapters import svd
from mirrortune.adapters.svd import RESIDUAL, decompose, decompose_on, full, is_exact, leading
from mirrortune.errors import DataError

SPECTRA = {
    "flat": torch.linspace(1, 0.5, 60),
    "power law": torch.arange(1, 61) ** -0.5,
    "exponential": torch.exp(-torch.arange(60) / 6),
    "two outliers": torch.cat([torch.tensor([50.0, 20.0]), torch.linspace(1, 0.2, 58)]),
    "equal at the top": torch.cat([torch.ones(5), torch.linspace(0.9, 0.1, 55)]),
    "equal across the cut": torch.cat([torch.linspace(2, 1.1, 5), torch.ones(6), torch.linspace(0.9, 0.1, 49)]),
    "rank 20": torch.cat([torch.linspace(1, 0.5, 20), torch.zeros(40)]),
    "zero": torch.zeros(60),
    "tiny": torch.linspace(1, 0.5, 60) * 1e-30,
}


def matrix_of(spectrum: Tensor, *, is_wide: bool) -> Tensor:
    """A 60 x 80 or 80 x 60 matrix with these singular values."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 60, generator=generator, dtype=torch.float64))[0] for n in (80, 60))
    matrix = left * spectrum.double() @ right.T
    return matrix.T.contiguous() if is_wide else matrix


@pytest.mark.parametrize("is_wide", [False, True])
@pytest.mark.parametrize("rank", [1, 7])
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=list(SPECTRA))
def test_every_leading_axis_is_a_singular_vector(spectrum: Tensor, rank: int, is_wide: bool) -> None:
    matrix = matrix_of(spectrum, is_wide=is_wide)
    found = leading(matrix, rank)
    assert found is not None
    U, S, Vh = found
    assert U.shape == (matrix.shape[0], rank)
    assert Vh.shape == (rank, matrix.shape[1])
    strongest = float(S[0])
    assert float((S - spectrum.double().sort(descending=True).values[:rank]).abs().max()) <= 1e-12 * strongest
    for axis in range(rank):
        assert float((matrix @ Vh[axis] - S[axis] * U[:, axis]).norm()) <= 2 * RESIDUAL * strongest
        assert float((U[:, axis] @ matrix - S[axis] * Vh[axis]).norm()) <= 2 * RESIDUAL * strongest
    identity = torch.eye(rank, dtype=torch.float64)
    assert float((U.T @ U - identity).abs().max()) < 1e-12
    assert float((Vh @ Vh.T - identity).abs().max()) < 1e-12


def test_the_same_weight_has_the_same_factors() -> None:
    matrix = matrix_of(SPECTRA["power law"], is_wide=False)
    torch.manual_seed(1)
    first = leading(matrix, 5)
    torch.manual_seed(2)
    second = leading(matrix, 5)
    assert first is not None
    assert second is not None
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_axes_that_do_not_get_there_are_left_to_lapack(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = matrix_of(SPECTRA["flat"], is_wide=False)
    monkeypatch.setattr(svd, "_ROUNDS", 1)
    assert leading(matrix, 7) is None
    monkeypatch.setattr(svd, "_SMALLEST_SIDE", 8)
    monkeypatch.setattr(svd, "_LARGEST_SHARE", 1.0)
    expected = full(matrix, "layer")
    for found, exact in zip(
        decompose(matrix, 7, "layer"), (expected[0][:, :7], expected[1][:7], expected[2][:7]), strict=True
    ):
        assert torch.equal(found, exact)


def diverge(*_: object, **__: object) -> None:
    """Stands for a LAPACK routine that gives up."""
    raise torch.linalg.LinAlgError("did not converge")


@pytest.mark.parametrize("is_wide", [False, True])
def test_what_diverges_is_found_another_way_and_said(monkeypatch: pytest.MonkeyPatch, is_wide: bool) -> None:
    matrix = matrix_of(SPECTRA["flat"], is_wide=is_wide)
    _, expected, _ = full(matrix, "layer")
    monkeypatch.setattr(torch.linalg, "svd", diverge)
    with pytest.warns(RuntimeWarning, match=r"^layer\.3: LAPACK's gesdd did not converge on this weight, gesvd did"):
        check(matrix, full(matrix, "layer.3"), expected, 1e-13)

    def diverge_too(*_: object, **__: object) -> None:
        raise scipy.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(scipy.linalg, "svd", diverge_too)
    with pytest.warns(RuntimeWarning, match="gesdd and gesvd did not converge on this weight, eigenvectors did"):
        check(matrix, full(matrix, "layer.3"), expected, 1e-11)


def check(matrix: Tensor, found: tuple[Tensor, Tensor, Tensor], expected: Tensor, tolerance: float) -> None:
    """The triplets make up the matrix, and their singular values are the expected ones."""
    U, S, Vh = found
    assert float((S - expected).abs().max()) < tolerance
    assert float((U * S @ Vh - matrix).norm()) < tolerance * float(matrix.norm())
    assert float((U.T @ U - torch.eye(len(S), dtype=torch.float64)).abs().max()) < tolerance


def test_what_nothing_decomposes_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.linalg, "svd", diverge)
    matrix = torch.full((4, 4), 1e200, dtype=torch.float64)  # whose Gram matrix overflows
    monkeypatch.setattr(scipy.linalg, "svd", lambda *_, **__: (_ for _ in ()).throw(scipy.linalg.LinAlgError()))
    with pytest.raises(DataError, match=r"^layer\.3: no algorithm finds the singular values of this weight"):
        full(matrix, "layer.3")


@pytest.mark.parametrize("rank", [60, 7])
def test_another_device_gives_the_same_or_nothing(rank: int) -> None:
    matrix = matrix_of(SPECTRA["exponential"], is_wide=True)
    expected = decompose(matrix, rank, "w")
    found = decompose_on(torch.device("cpu"), matrix, rank, "w")
    assert found is not None
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert decompose_on(torch.device("meta"), matrix, rank, "w") is None  # which computes nothing


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=list(SPECTRA))
def test_what_is_less_exact_than_lapack_is_not_taken(spectrum: Tensor) -> None:
    matrix = matrix_of(spectrum, is_wide=False)
    U, S, Vh = full(matrix, "w")
    assert is_exact(matrix, (U, S, Vh))
    found = leading(matrix, 7)
    assert found is not None
    assert is_exact(matrix, found)
    assert not is_exact(matrix, (U * (1 + 1e-7), S, Vh)), "no unit vectors"
    if spectrum.any():
        assert not is_exact(matrix, (U, S * (1 + 1e-10), Vh))
        single = [t.double() for t in torch.linalg.svd(matrix.float(), full_matrices=False)]
        assert not is_exact(matrix, (single[0], single[1], single[2]))
