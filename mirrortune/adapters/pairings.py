# SPDX-License-Identifier: Apache-2.0
"""Which singular directions turn together: functions from a rank to disjoint pairs.

A pairing is one function ``(rank, generator) -> pairs`` with pairs of shape (P, 2), int64, i < j in every row, each
index at most once, P <= rank // 2. Directions are numbered by descending singular value, from 0. The generator is
seeded from the run's seed and the layer's name; a pairing that ignores it is a function of the rank alone and needs no
place in the adapter file.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from mirrortune.adapters.matching import match
from mirrortune.registry import Registry

Pairing = Callable[..., Tensor]

PAIRINGS: Registry[Pairing] = Registry("pairing")


@PAIRINGS.register("mirror")
def mirror(rank: int, generator: Generator) -> Tensor:
    """Pair k with rank-1-k, the strongest direction with the weakest kept; the middle one of an odd rank stays.

    Reference: mirror-paired rotation of the output-side singular subspace (Kim & Baik), pairs (k, D-k+1) in 1-based
    numbers.
    """
    lower = torch.arange(rank // 2)
    return torch.stack([lower, rank - 1 - lower], dim=1)


@PAIRINGS.register("neighbor")
def neighbor(rank: int, generator: Generator) -> Tensor:
    """Pair 2k with 2k+1, directions of nearly the same strength; the last one of an odd rank stays."""
    return torch.arange(rank - rank % 2).reshape(-1, 2)


@PAIRINGS.register("random")
def random(rank: int, generator: Generator) -> Tensor:
    """Pair at random without replacement; one direction of an odd rank stays."""
    order = torch.randperm(rank, generator=generator)[: rank - rank % 2]
    pairs = order.reshape(-1, 2).sort(dim=1).values
    return pairs[pairs[:, 0].argsort()]


@PAIRINGS.register("adaptive")
def adaptive(rank: int, generator: Generator, saliency: Tensor) -> Tensor:
    """Pair by a maximum-weight matching of |dL/dtheta| at theta = 0, measured on the task (``calibration.py``).

    Ours: the mirror method's authors name task-adaptive pairing as future work.
    """
    return match(saliency.abs())
