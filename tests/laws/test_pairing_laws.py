# SPDX-License-Identifier: Apache-2.0
"""Laws of every registered pairing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mirrortune.adapters.pairings import PAIRINGS
from tests.spectral import draw_pairs

ENOUGH = settings(max_examples=60)
RANKS = st.integers(1, 41)
SEEDS = st.integers(0, 2**32)


@pytest.mark.parametrize("name", PAIRINGS.names())
@ENOUGH
@given(rank=RANKS, seed=SEEDS)
def test_pairs_are_disjoint_ordered_and_in_range(name: str, rank: int, seed: int) -> None:
    pairs = draw_pairs(name, rank, seed)
    assert pairs.dtype == torch.int64
    assert pairs.shape == (rank // 2, 2)
    used = pairs.flatten().tolist()
    assert len(set(used)) == len(used)
    assert all(0 <= i < rank for i in used)
    assert (pairs[:, 0] < pairs[:, 1]).all()


@pytest.mark.parametrize("name", PAIRINGS.names())
@ENOUGH
@given(rank=RANKS, seed=SEEDS)
def test_the_same_seed_gives_the_same_pairs(name: str, rank: int, seed: int) -> None:
    assert torch.equal(draw_pairs(name, rank, seed), draw_pairs(name, rank, seed))


@pytest.mark.parametrize("name", PAIRINGS.names())
@ENOUGH
@given(rank=RANKS, seed=SEEDS)
def test_a_pairing_leaves_the_global_generator_alone(name: str, rank: int, seed: int) -> None:
    before = torch.get_rng_state()
    draw_pairs(name, rank, seed)
    assert torch.equal(torch.get_rng_state(), before)


@ENOUGH
@given(rank=RANKS, seed=SEEDS)
def test_mirror_pairs_the_strongest_with_the_weakest(rank: int, seed: int) -> None:
    assert draw_pairs("mirror", rank, seed).tolist() == [[k, rank - 1 - k] for k in range(rank // 2)]


@ENOUGH
@given(rank=RANKS, seed=SEEDS)
def test_neighbor_pairs_directions_of_like_strength(rank: int, seed: int) -> None:
    assert draw_pairs("neighbor", rank, seed).tolist() == [[2 * k, 2 * k + 1] for k in range(rank // 2)]


@given(seed=SEEDS)
def test_random_leaves_any_direction_of_an_odd_rank_unpaired(seed: int) -> None:
    left_out = {(set(range(5)) - set(draw_pairs("random", 5, seed + k).flatten().tolist())).pop() for k in range(40)}
    assert left_out == set(range(5))
