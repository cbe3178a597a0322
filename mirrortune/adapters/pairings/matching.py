# SPDX-License-Identifier: Apache-2.0
"""Maximum-weight matching of singular directions.

Shapes: R directions, P = floor(R / 2) pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Edmonds' algorithm is cubic and implemented in Python; for this many directions it takes about a second.
EXACT_LIMIT = 64
_BLOCK = 1 << 16


def match(weights: Tensor, *, exact_limit: int = EXACT_LIMIT) -> Tensor:
    """Match directions into disjoint pairs of large total weight, leaving out at most one direction.

    The matching is exact (Edmonds' blossom algorithm) for up to ``exact_limit`` directions. Above, it is greedy: it
    repeatedly takes the heaviest remaining pair, which gives at least half of the maximum for weights >= 0.

    Args:
        weights: shape (R, R), symmetric, finite; its diagonal is ignored.
        exact_limit: largest R to match exactly.

    Returns:
        Pairs (P, 2), int64, i < j in each row, rows in ascending order of i; deterministic.
    """
    host = weights.detach().cpu().double()
    chosen = _exact(host) if len(host) <= exact_limit else _greedy(host)
    return torch.tensor(sorted(chosen), dtype=torch.int64).reshape(-1, 2)


def _exact(weights: Tensor) -> list[tuple[int, int]]:
    import networkx as nx  # noqa: PLC0415  (slow to import, and only adaptive pairs need it)

    graph = nx.Graph()
    rows = weights.tolist()
    # maxcardinality also pairs directions of weight zero, so that there are always floor(R / 2) pairs.
    graph.add_weighted_edges_from((i, j, rows[i][j]) for i in range(len(rows)) for j in range(i + 1, len(rows)))
    return [(min(pair), max(pair)) for pair in nx.max_weight_matching(graph, maxcardinality=True)]


def _greedy(weights: Tensor) -> list[tuple[int, int]]:
    """Repeatedly take the heaviest remaining pair; of equal pairs, the one with lower indices.

    This walks over the sorted pairs, in blocks, because all pairs of 4,096 directions as Python integers fill a
    gigabyte. Taking all mutually heaviest pairs at once would be fast only for random weights: weights from singular
    values make every direction heaviest with the strongest one, which costs a pass over the matrix per pair.
    """
    rank = len(weights)
    upper = torch.triu_indices(rank, rank, offset=1)
    # Stable, so that ties go to the pair with lower indices.
    order = torch.argsort(weights[upper[0], upper[1]], descending=True, stable=True)
    is_free = [True] * rank
    chosen: list[tuple[int, int]] = []
    for start in range(0, len(order), _BLOCK):
        rows, columns = upper[:, order[start : start + _BLOCK]]
        free = torch.tensor(is_free)
        both = free[rows] & free[columns]
        for i, j in zip(rows[both].tolist(), columns[both].tolist(), strict=True):
            if is_free[i] and is_free[j]:
                is_free[i] = is_free[j] = False
                chosen.append((i, j))
        if len(chosen) == rank // 2:
            break
    return chosen


def rotation_gradient(gradient: Tensor, U: Tensor, S: Tensor, Vh: Tensor, side: str) -> Tensor:
    """Compute dL/dtheta_ij at theta = 0 for every pair of directions.

    It is S_i u_j' G v_i - S_j u_i' G v_j on the output side and S_j u_j' G v_i - S_i u_i' G v_j on the input side.

    Args:
        gradient: G = dL/dW, shape (O, I). All tensors of a stack have a further leading dimension.
        U: left singular vectors, shape (O, R).
        S: singular values, shape (R,).
        Vh: right singular vectors, shape (R, I).
        side: ``output`` or ``input``.

    Returns:
        Shape (R, R), antisymmetric.
    """
    moved = U.mT @ gradient @ Vh.mT  # (R, R): entry ji is u_j' G v_i
    weighted = moved * S[..., None, :] if side == "output" else S[..., :, None] * moved
    return weighted.mT - weighted
