# SPDX-License-Identifier: Apache-2.0
"""Define pairings: functions from a rank to disjoint pairs of singular directions.

A pairing is a function ``(rank, generator) -> pairs`` that returns pairs of shape (P, 2), int64, with i < j in every
row, each index at most once, and P <= rank // 2. Directions are numbered from 0 by descending singular value. The
generator is seeded with the run's seed and the layer's name. Pairs that do not depend on it follow from the rank and
are not stored in the adapter file.

Further arguments are passed by name to pairings that declare them: ``rounds``, the number of rounds of pairs to return
one after the other (without it, a pairing has one round); ``saliency``, gradients measured on the task; and ``listed``,
the user's pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from mirrortune.adapters.pairings.listed import PairList, as_tensor
from mirrortune.adapters.pairings.matching import match
from mirrortune.registry import Registry

Pairing = Callable[..., Tensor]

PAIRINGS: Registry[Pairing] = Registry("pairing")


@PAIRINGS.register("mirror")
def mirror(rank: int, generator: Generator, rounds: int = 1) -> Tensor:
    """Pair k with rank-1-k, so the strongest direction with the weakest; the middle one of an odd rank stays unpaired.

    Each later round rotates the order by one place first, keeping the strongest direction of an even rank in place.
    This is the circle method of round-robin tournaments: every pair occurs once in rank-1 rounds (rank rounds for an
    odd rank) before pairs repeat.

    Reference: mirror-paired rotation of the output-side singular subspace (Kim & Baik): one round of pairs (k, D-k+1),
    numbered from 1. Later rounds are an addition of mirrortune.
    """
    held = 1 - rank % 2
    directions = torch.arange(rank)
    orders = [torch.cat([directions[:held], directions[held:].roll(places)]) for places in range(rounds)]
    return torch.cat([_sorted(torch.stack([order, order.flip(0)], dim=1)[: rank // 2]) for order in orders])


@PAIRINGS.register("neighbor")
def neighbor(rank: int, generator: Generator, rounds: int = 1) -> Tensor:
    """Pair 2k with 2k+1, directions of nearly equal strength; the last one of an odd rank stays unpaired.

    Every other round pairs 2k+1 with 2k+2. In this brick-wall layout, ``rank`` rounds reach any rotation (Clements et
    al. 2016, doi:10.1364/OPTICA.3.001460).
    """
    starts = [index % 2 for index in range(rounds)]
    return torch.cat([torch.arange(start, rank - (rank - start) % 2).reshape(-1, 2) for start in starts])


@PAIRINGS.register("random")
def random(rank: int, generator: Generator, rounds: int = 1) -> Tensor:
    """Pair directions at random, with a new permutation in each round; one direction of an odd rank stays unpaired."""
    orders = [torch.randperm(rank, generator=generator)[: rank - rank % 2] for _ in range(rounds)]
    return torch.cat([_sorted(order.reshape(-1, 2)) for order in orders])


@PAIRINGS.register("adaptive")
def adaptive(rank: int, generator: Generator, saliency: Tensor, rounds: int = 1) -> Tensor:
    """Pair by a maximum-weight matching of |dL/dtheta| at theta = 0, measured on the task (``calibration.py``).

    Each later round matches the remaining pairs; a pair is used again only if no other is left.

    An addition of mirrortune; the mirror method's authors name task-adaptive pairing as future work.
    """
    weights = saliency.abs()
    taken = float(weights.sum()) or 1.0  # penalty, larger than the weight of any matching
    found = []
    for _ in range(rounds):
        pairs = match(weights)
        found.append(pairs)
        for i, j in (pairs.T, pairs.T.flip(0)):
            weights[i, j] -= taken
    return torch.cat(found)


@PAIRINGS.register("explicit")
def explicit(rank: int, generator: Generator, listed: PairList, rounds: int = 1) -> Tensor:
    """Return the pairs listed by the user, one list per round; directions that are not listed stay unpaired."""
    return as_tensor(listed)


def _sorted(pairs: Tensor) -> Tensor:
    """Sort the pairs (P, 2) of a round, so that i < j in every row and rows are in ascending order of i."""
    pairs = pairs.sort(dim=1).values
    return pairs[pairs[:, 0].argsort()]
