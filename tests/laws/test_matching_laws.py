# SPDX-License-Identifier: Apache-2.0
"""Matchings against brute force, and the gradient of an angle against autograd through the adapted layer."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mirrortune.adapters.cores.givens import Givens
from mirrortune.adapters.pairings.matching import match, rotation_gradient
from mirrortune.adapters.svd import factorize
from tests.spectral import Problem, problems

SEEDS = st.integers(0, 2**16)


def weights_of(rank: int, seed: int) -> Tensor:
    """A symmetric, non-negative weight with ties now and then."""
    found = torch.randint(0, 50, (rank, rank), generator=torch.Generator().manual_seed(seed)).double()
    return found + found.T


def total(weights: Tensor, pairs: Tensor) -> float:
    return float(weights[pairs[:, 0], pairs[:, 1]].sum())


def best_by_brute_force(weights: Tensor) -> float:
    """The largest total of any matching, by trying them all."""
    rank = len(weights)

    def best(free: tuple[int, ...]) -> float:
        if len(free) < 2:
            return 0.0
        first, rest = free[0], free[1:]
        paired = [float(weights[first, j]) + best(tuple(k for k in rest if k != j)) for j in rest]
        return max([best(rest), *paired])

    return best(tuple(range(rank)))


@settings(max_examples=60)
@given(rank=st.integers(1, 7), seed=SEEDS)
def test_the_exact_matching_is_the_best_there_is(rank: int, seed: int) -> None:
    weights = weights_of(rank, seed)
    assert total(weights, match(weights)) == best_by_brute_force(weights)


@settings(max_examples=60)
@given(rank=st.integers(1, 7), seed=SEEDS)
def test_the_greedy_matching_reaches_half_of_the_best(rank: int, seed: int) -> None:
    weights = weights_of(rank, seed)
    greedy = match(weights, exact_limit=0)
    assert len(greedy) == rank // 2
    assert len(set(greedy.flatten().tolist())) == 2 * (rank // 2)
    assert 2 * total(weights, greedy) >= best_by_brute_force(weights)


def test_greedy_and_exact_differ_where_greed_is_wrong() -> None:
    weights = torch.zeros(4, 4)
    for i, j, w in ((0, 1, 10.0), (1, 2, 11.0), (2, 3, 10.0)):
        weights[i, j] = weights[j, i] = w
    assert match(weights).tolist() == [[0, 1], [2, 3]]
    assert match(weights, exact_limit=0).tolist() == [[0, 3], [1, 2]]


@pytest.mark.parametrize("side", ["output", "input"])
@given(problem=problems(largest=7), seed=SEEDS)
def test_the_gradient_of_every_angle_is_autograds(side: str, problem: Problem, seed: int) -> None:
    factors = factorize(problem.weight(), problem.rank)
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(problem.out_features, problem.in_features, generator=generator, dtype=torch.float64)
    found = rotation_gradient(gradient, factors.U, factors.S, factors.Vh, side)
    assert torch.equal(found, -found.T)
    for i, j in itertools.combinations(range(problem.rank), 2):
        core = Givens(factors.S, torch.tensor([[i, j]]), side=side, unit="angle")
        eye = torch.eye(problem.rank, dtype=torch.float64)
        delta = factors.U @ core.mix(eye, *core.coefficients(delta=True)).T @ factors.Vh
        (expected,) = torch.autograd.grad((delta * gradient).sum(), core.theta)
        torch.testing.assert_close(found[i, j], expected[0], rtol=1e-10, atol=1e-12)
