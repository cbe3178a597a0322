# SPDX-License-Identifier: Apache-2.0
"""factorize: exact, canonical, deterministic, and honest about what it cannot factor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mirrortune.adapters import svd as module
from mirrortune.adapters.svd import canonical_signs, complement, factorize, resolve_rank
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
