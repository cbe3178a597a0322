# SPDX-License-Identifier: Apache-2.0
"""Encode pairs in half the space for an adapter's file.

The first direction of a pair is always the lowest remaining one of its round, so only its partner is stored.

Shapes: R directions, T pairs in all rounds.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split_rounds(pairs: Tensor) -> list[Tensor]:
    """Split pairs (T, 2) into as few consecutive rounds of disjoint pairs as possible; one empty round for no pairs.

    The rotations do not depend on how pairs are divided into rounds, because rotations of disjoint planes commute.
    """
    cuts: list[int] = []
    used: set[int] = set()
    for index, pair in enumerate(pairs.tolist()):
        if not used.isdisjoint(pair):
            cuts.append(index)
            used.clear()
        used.update(pair)
    return list(pairs.tensor_split(cuts))


def partners_of(pairs: Tensor, rank: int) -> Tensor | None:
    """Encode ``pairs`` (T, 2) as the partners of directions.

    For each round, the partner of every direction that is not a partner itself is stored, in order; a direction without
    a pair is its own partner.

    Returns:
        The partners as int64, or None if the pairs are in another order or take less space unencoded.
    """
    found: list[int] = []
    for own in split_rounds(pairs):
        partner = dict(own.tolist())
        seconds = set(partner.values())
        found += [partner.get(i, i) for i in range(rank) if i not in seconds]
    partners = torch.tensor(found, dtype=torch.int64)
    is_shorter = len(partners) < pairs.numel()
    return partners if is_shorter and torch.equal(pairs_of(partners, rank), pairs.cpu().long()) else None


def pairs_of(partners: Tensor, rank: int) -> Tensor:
    """Decode partners from :func:`partners_of` to pairs (T, 2), int64; raise ValueError if they are not valid."""
    pairs: list[tuple[int, int]] = []
    taken: set[int] = set()
    first = 0
    for partner in partners.tolist():
        if not first <= partner < rank or partner in taken:
            raise ValueError(f"direction {first} has the partner {partner}")
        if partner > first:
            pairs.append((first, partner))
            taken.add(partner)
        first += 1
        while first in taken:
            first += 1
        if first >= rank:  # the round is over
            first = 0
            taken.clear()
    if first:
        raise ValueError("the partners end within a round")
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
