# SPDX-License-Identifier: Apache-2.0
"""Laws of every registered pairing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mirrortune.adapters.pairings.encoding import pairs_of, partners_of, split_rounds
from mirrortune.adapters.pairings.rules import PAIRINGS
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
    assert pairs.shape[1] == 2
    assert len(pairs) == rank // 2 or name == "explicit"
    used = pairs.flatten().tolist()
    assert len(set(used)) == len(used)
    assert all(0 <= i < rank for i in used)
    assert (pairs[:, 0] < pairs[:, 1]).all()


@pytest.mark.parametrize("name", PAIRINGS.names())
@ENOUGH
@given(rank=st.integers(1, 14), rounds=st.integers(1, 6), seed=SEEDS)
def test_every_round_is_a_pairing(name: str, rank: int, rounds: int, seed: int) -> None:
    pairs = draw_pairs(name, rank, seed, rounds)
    assert len(split_rounds(pairs)) <= rounds
    assert len(pairs) <= rounds * (rank // 2)
    assert ((pairs >= 0) & (pairs < rank)).all()
    assert (pairs[:, 0] < pairs[:, 1]).all()
    if name not in ("explicit", "adaptive"):  # whose first round is chosen in sight of the others, or fits as well
        assert torch.equal(pairs[: rank // 2], draw_pairs(name, rank, seed))


@pytest.mark.parametrize("name", PAIRINGS.names())
@ENOUGH
@given(rank=st.integers(2, 41), rounds=st.integers(1, 4), seed=SEEDS)
def test_partners_tell_the_pairs_in_half_the_room(name: str, rank: int, rounds: int, seed: int) -> None:
    pairs = draw_pairs(name, rank, seed, rounds)
    partners = partners_of(pairs, rank)
    if partners is not None:
        assert len(partners) < pairs.numel()
        assert torch.equal(pairs_of(partners, rank), pairs)
    if name == "random" and rank > 3:
        assert partners is not None
        assert len(partners) == -(-rank // 2) * len(split_rounds(pairs))


def test_pairs_in_no_order_or_too_few_are_not_told_by_partners() -> None:
    assert partners_of(torch.tensor([[2, 3], [0, 1]]), 4) is None
    assert partners_of(torch.tensor([[0, 1]]), 9) is None
    assert pairs_of(torch.tensor([3, 1, 2]), 4).tolist() == [[0, 3]]


@ENOUGH
@given(partners=st.lists(st.integers(-2, 7), max_size=9), rank=st.integers(1, 6))
def test_what_is_read_as_partners_is_pairs_or_refused(partners: list[int], rank: int) -> None:
    try:
        pairs = pairs_of(torch.tensor(partners, dtype=torch.int64), rank)
    except ValueError:
        return
    assert ((pairs[:, 0] < pairs[:, 1]) & (pairs[:, 0] >= 0) & (pairs[:, 1] < rank)).all()
    for own in split_rounds(pairs):
        assert len(own.unique()) == own.numel()


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
    draw_pairs(name, rank, seed, rounds=2)
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


def as_set(pairs: Tensor) -> set[tuple[int, int]]:
    """Pairs without their order."""
    return {(i, j) for i, j in pairs.tolist()}


@given(rank=RANKS.filter(lambda rank: rank > 1))
def test_mirror_rounds_meet_every_pair_once_and_begin_anew(rank: int) -> None:
    cycle = rank - 1 + rank % 2
    pairs = draw_pairs("mirror", rank, 0, rounds=2 * cycle)
    once, again = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
    assert as_set(once) == {(i, j) for j in range(rank) for i in range(j)}
    assert len(once) == rank * (rank - 1) // 2
    assert torch.equal(once, again)
    assert [len(own) for own in split_rounds(once)] == [rank // 2] * cycle


def test_mirror_rounds_turn_the_order_by_one_place() -> None:
    # Six directions on a table of two rows, 0 held: 0 1 2 / 5 4 3, then 0 5 1 / 4 3 2, then 0 4 5 / 3 2 1.
    expected = [[0, 5], [1, 4], [2, 3], [0, 4], [1, 2], [3, 5], [0, 3], [1, 5], [2, 4]]
    assert draw_pairs("mirror", 6, 0, rounds=3).tolist() == expected


@given(rank=RANKS, rounds=st.integers(2, 5))
def test_neighbor_rounds_are_laid_like_bricks(rank: int, rounds: int) -> None:
    expected = [[k, k + 1] for index in range(rounds) for k in range(index % 2, rank - 1, 2)]
    assert draw_pairs("neighbor", rank, 0, rounds).tolist() == expected


@given(rank=st.integers(8, 20), seed=SEEDS)
def test_random_rounds_are_drawn_anew(rank: int, seed: int) -> None:
    rounds = [as_set(own) for own in split_rounds(draw_pairs("random", rank, seed, rounds=8))]
    assert len({frozenset(own) for own in rounds}) > 4  # of 105 or more pairings


@given(rank=st.integers(4, 14), seed=SEEDS)
def test_adaptive_rounds_take_no_pair_twice_while_others_are_left(rank: int, seed: int) -> None:
    first, second = split_rounds(draw_pairs("adaptive", rank, seed, rounds=2))
    assert torch.equal(first, draw_pairs("adaptive", rank, seed))
    assert not as_set(first) & as_set(second)
    assert len(first) == len(second) == rank // 2


def test_adaptive_rounds_take_the_best_of_what_is_left() -> None:
    weights = torch.zeros(4, 4, dtype=torch.float64)
    for (i, j), weight in {(0, 1): 9.0, (2, 3): 1.0, (0, 2): 4.0, (1, 3): 4.0, (0, 3): 0.5, (1, 2): 0.5}.items():
        weights[i, j] = weights[j, i] = weight
    pairs = PAIRINGS.get("adaptive", "test")(4, torch.Generator(), -weights, rounds=4)
    assert pairs.tolist() == [[0, 1], [2, 3], [0, 2], [1, 3], [0, 3], [1, 2], [0, 1], [2, 3]]
    assert float(weights[0, 1]) == 9.0  # and what was measured is left as it was
    nothing = PAIRINGS.get("adaptive", "test")(6, torch.Generator(), torch.zeros(6, 6), rounds=3)
    assert len(as_set(nothing)) == len(nothing) == 9
