# SPDX-License-Identifier: Apache-2.0
"""factorize is exact, canonical and deterministic; the leading triplets are LAPACK's, and every failure is reported."""

from __future__ import annotations

from typing import Any

import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mirrortune.adapters import svd
from mirrortune.adapters import svd as module
from mirrortune.adapters.svd import (
    RESIDUAL,
    canonical_signs,
    complement,
    decompose,
    decompose_on,
    factorize,
    full,
    is_exact,
    leading,
    resolve_rank,
)
from mirrortune.errors import ConfigError, DataError
from tests.spectral import Problem, problems, relative, tall_problems

# float64 decompositions of matrices of at most 12 x 12 whose singular values are within a factor of 16.
EXACT = 1e-13


@given(problem=problems())
def test_factors_are_the_leading_triplets(problem: Problem) -> None:
    weight = problem.weight()
    factors = factorize(weight, problem.rank)
    assert factors.rank == problem.rank
    assert (factors.U.shape, factors.Vh.shape) == (
        (problem.out_features, problem.rank),
        (problem.rank, problem.in_features),
    )
    assert {factors.U.dtype, factors.S.dtype, factors.Vh.dtype} == {torch.float64}
    eye = torch.eye(problem.rank, dtype=torch.float64)
    assert relative(factors.U.T @ factors.U, eye) <= EXACT
    assert relative(factors.Vh @ factors.Vh.T, eye) <= EXACT
    assert (factors.S.diff() <= 0).all()
    assert relative(factors.S, torch.linalg.svdvals(weight)[: problem.rank]) <= EXACT
    assert relative(weight @ factors.Vh.T, factors.U * factors.S) <= EXACT
    if problem.is_full:
        assert relative(factors.U @ torch.diag(factors.S) @ factors.Vh, weight) <= EXACT


@given(problem=problems())
def test_a_smaller_rank_is_the_head_of_the_full_one(problem: Problem) -> None:
    full, part = factorize(problem.weight()), factorize(problem.weight(), problem.rank)
    assert torch.equal(part.U, full.U[:, : problem.rank])
    assert torch.equal(part.S, full.S[: problem.rank])
    assert torch.equal(part.Vh, full.Vh[: problem.rank])


@given(problem=problems())
def test_signs_are_canonical(problem: Problem) -> None:
    U = factorize(problem.weight(), problem.rank).U
    largest = U.gather(0, U.abs().argmax(dim=0, keepdim=True))
    assert (largest > 0).all()
    assert torch.equal(canonical_signs(-U), -torch.ones(problem.rank, dtype=U.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_dtype_is_factored_in_float64(dtype: torch.dtype) -> None:
    weight = Problem(6, 4, 4, seed=1).weight().to(dtype)
    factors = factorize(weight)
    assert factors.S.dtype == torch.float64
    assert relative(factors.U @ torch.diag(factors.S) @ factors.Vh, weight) <= EXACT
    assert torch.equal(factors.U, factorize(weight.double()).U)


@given(scale=st.sampled_from([0.0, 1e-30, 1e30]))
def test_zero_tiny_and_huge_weights_are_factored(scale: float) -> None:
    weight = Problem(5, 3, 3, seed=2).weight() * scale
    factors = factorize(weight)
    assert relative(factors.U.T @ factors.U, torch.eye(3)) <= EXACT
    assert relative(factors.U @ torch.diag(factors.S) @ factors.Vh, weight) <= EXACT


def test_a_weight_that_asks_for_gradients_is_left_alone() -> None:
    weight = Problem(4, 4, 4, seed=3).weight().requires_grad_()
    before = weight.detach().clone()
    factors = factorize(weight)
    assert not factors.U.requires_grad
    assert torch.equal(weight, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(bad: float) -> None:
    weight = torch.ones(3, 3)
    weight[1, 2] = bad
    with pytest.raises(DataError, match=r"^layer\.7: the weight holds NaN or infinities"):
        factorize(weight, name="layer.7")


@pytest.mark.parametrize(("rank", "expected"), [("full", 3), ("out", 3), (1, 1), (3, 3)])
def test_ranks_that_fit(rank: Any, expected: int) -> None:
    assert resolve_rank(rank, (3, 5), "layer") == expected


def test_all_outputs_may_be_more_than_there_are_singular_values() -> None:
    assert resolve_rank("out", (5, 3), "layer") == 5
    with pytest.raises(ConfigError, match="rank 5 does not fit"):
        resolve_rank(5, (5, 3), "layer")


@given(problem=tall_problems())
def test_all_outputs_are_the_full_factors_and_zeros(problem: Problem) -> None:
    weight = problem.weight()
    full, out = factorize(weight), factorize(weight, "out")
    kept, size = problem.in_features, problem.out_features
    assert (out.U.shape, out.S.shape, out.Vh.shape) == ((size, size), (size,), (size, kept))
    assert torch.equal(out.U[:, :kept], full.U)
    assert torch.equal(out.S[:kept], full.S)
    assert torch.equal(out.Vh[:kept], full.Vh)
    assert not out.S[kept:].any()
    assert not out.Vh[kept:].any()
    assert relative(out.U.T @ out.U, torch.eye(size)) <= EXACT
    assert torch.equal(out.U, factorize(weight, size).U)


@given(problem=problems())
def test_all_outputs_are_the_full_factors_where_there_are_no_more(problem: Problem) -> None:
    weight = problem.weight()
    if problem.out_features <= problem.in_features:
        assert torch.equal(factorize(weight, "out").U, factorize(weight).U)
        assert torch.equal(factorize(weight, "out").Vh, factorize(weight).Vh)


@given(problem=tall_problems(), seed=st.integers(0, 2**16))
def test_the_complement_depends_on_the_space_alone(problem: Problem, seed: int) -> None:
    U = factorize(problem.weight()).U
    noise = torch.randn(U.shape[1], U.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mixed = U @ torch.linalg.qr(noise)[0]  # flipped signs and mixed vectors are rotations like any other
    found = complement(U)
    assert relative(found.T @ U, torch.zeros(1)) <= EXACT
    # The Gaussian vectors' condition number, some hundreds here, multiplies the rounding of U.
    assert relative(complement(mixed), found) <= 1e-11


def test_a_large_complement_is_orthogonal_to_rounding() -> None:
    U = torch.linalg.qr(torch.randn(300, 60, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    basis = torch.cat([U, complement(U)], dim=1)
    assert float((basis.T @ basis - torch.eye(300)).abs().max()) <= 1e-14 * 10
    assert torch.equal(complement(U), complement(U))


@pytest.mark.parametrize("rank", [0, -1, 4])
def test_ranks_that_do_not_fit_are_refused(rank: int) -> None:
    with pytest.raises(ConfigError, match=rf"^layer: rank {rank} does not fit .* 3 x 5\. Allowed: 1 to 3, full or out"):
        resolve_rank(rank, (3, 5), "layer")


def test_a_decomposition_that_does_not_converge_is_made_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = Problem(6, 4, 4, seed=4).weight()
    expected = factorize(weight)

    def diverge(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", diverge)
    with pytest.warns(RuntimeWarning, match="gesvd did"):
        found = module.factorize(weight)
    for name in ("U", "S", "Vh"):
        assert relative(getattr(found, name), getattr(expected, name)) <= EXACT
        assert getattr(found, name).is_contiguous()


def test_factors_move_together() -> None:
    moved = factorize(Problem(3, 4, 2, seed=5).weight(), 2).to(device=torch.device("cpu"), dtype=torch.float32)
    assert {moved.U.dtype, moved.S.dtype, moved.Vh.dtype} == {torch.float32}


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
