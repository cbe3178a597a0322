# SPDX-License-Identifier: Apache-2.0
"""Pairing rules: functions from a rank to disjoint pairs of singular directions.

A pairing is one function ``(rank, generator) -> pairs`` with pairs of shape (P, 2), int64, i < j in every row, each
index at most once, P <= rank // 2. Directions are numbered by descending singular value, from 0. The generator is
seeded from the run's seed and the layer's name; a pairing that ignores it is a function of the rank alone and needs no
place in the adapter file.

Further arguments are passed to a pairing that declares them by name: ``rounds``, the number of rounds of pairs to
return one after the other (a pairing without it has one round); ``saliency``, gradients measured on the task;
``listed``, the user's pairs.
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
    """Pair k with rank-1-k, the strongest direction with the weakest kept; the middle one of an odd rank stays.

    Each later round does the same after rotating the order by one place, with the strongest direction of an even rank
    fixed: the circle method of round-robin tournaments, in which every pair occurs once in rank-1 rounds (rank for an
    odd one) before they repeat.

    Reference: mirror-paired rotation of the output-side singular subspace (Kim & Baik), pairs (k, D-k+1) in 1-based
    numbers; one round. Later rounds are an addition of mirrortune.
    """
    held = 1 - rank % 2
    directions = torch.arange(rank)
    orders = [torch.cat([directions[:held], directions[held:].roll(places)]) for places in range(rounds)]
    return torch.cat([_sorted(torch.stack([order, order.flip(0)], dim=1)[: rank // 2]) for order in orders])


@PAIRINGS.register("neighbor")
def neighbor(rank: int, generator: Generator, rounds: int = 1) -> Tensor:
    """Pair 2k with 2k+1, directions of nearly the same strength; the last one of an odd rank stays.

    Every other round pairs 2k+1 with 2k+2, a brick-wall layout: rank rounds reach any rotation (Clements et al. 2016,
    doi:10.1364/OPTICA.3.001460).
    """
    starts = [index % 2 for index in range(rounds)]
    return torch.cat([torch.arange(start, rank - (rank - start) % 2).reshape(-1, 2) for start in starts])


@PAIRINGS.register("random")
def random(rank: int, generator: Generator, rounds: int = 1) -> Tensor:
    """Pair at random without replacement, each round anew; one direction of an odd rank stays."""
    orders = [torch.randperm(rank, generator=generator)[: rank - rank % 2] for _ in range(rounds)]
    return torch.cat([_sorted(order.reshape(-1, 2)) for order in orders])


@PAIRINGS.register("adaptive")
def adaptive(rank: int, generator: Generator, saliency: Tensor, rounds: int = 1) -> Tensor:
    """Pair by a maximum-weight matching of |dL/dtheta| at theta = 0, measured on the task (``calibration.py``).

    Each later round matches the remaining pairs: one that was taken is taken again only where no other is left.

    An addition of mirrortune; the mirror method's authors name task-adaptive pairing as future work.
    """
    weights = saliency.abs()
    taken = float(weights.sum()) or 1.0  # more than any matching weighs
    found = []
    for _ in range(rounds):
        pairs = match(weights)
        found.append(pairs)
        for i, j in (pairs.T, pairs.T.flip(0)):
            weights[i, j] -= taken
    return torch.cat(found)


@PAIRINGS.register("explicit")
def explicit(rank: int, generator: Generator, listed: PairList, rounds: int = 1) -> Tensor:
    """The pairs that the user lists, a list for each round; directions that no pair names stay."""
    return as_tensor(listed)


def _sorted(pairs: Tensor) -> Tensor:
    """The pairs (P, 2) of a round with i < j in every row, rows in ascending order of i."""
    pairs = pairs.sort(dim=1).values
    return pairs[pairs[:, 0].argsort()]
