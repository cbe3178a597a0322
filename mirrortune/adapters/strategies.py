# SPDX-License-Identifier: Apache-2.0
"""Which way of computing an adapted layer is cheapest, by counting products.

Shapes: N rows in a step, O out_features, I in_features, D = min(O, I), R rank.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from mirrortune.adapters.kinds import Kind, Linear, TransposedLinear

Strategy = Literal["branch", "factored", "dense"]

_LINEAR = Linear()
# What is no product, in products: passes over W' (adding, casting, its gradient) for each of its entries, and passes
# over what a core mixes for each of its N R numbers. Fitted to timings on one core of a CPU (python -m
# tests.bench.strategies), where the choice that they lead to takes 1.02 times as long as the best in the mean, and 1.23
# at the most.
_PASSES, _MIXING = 256, 600
# Products of the layer's own, N O I, from which on the number of rows has a say: below, a step takes a millisecond or
# two whatever is chosen.
SMALLEST_WORK = 1 << 26
# How much cheaper dense has to be: it holds W and W' beside the factors.
_GAIN = 1.1


def candidates(
    out_features: int, in_features: int, rank: int, dtype: torch.dtype, kind: Kind = _LINEAR
) -> tuple[Strategy, ...]:
    """The strategies that compute the same as the base layer where the core is untrained, the plainest first.

    In 16 bits factored would put one more rounding of the whole weight into the model, and dense would round away small
    changes of it, so branch alone is left there; so it is for packed weights, which were packed to be small, and for
    embeddings, whose own forward costs nothing. Convolutions and others are never made dense unasked: how many rows
    they have in a step is not known beforehand.
    """
    if dtype not in (torch.float32, torch.float64) or kind.is_packed or kind.name == "embedding":
        return ("branch",)
    found: list[Strategy] = ["branch"]
    if rank >= min(out_features, in_features):
        found.append("factored")
    if isinstance(kind, Linear | TransposedLinear):
        found.append("dense")
    return tuple(found)


def cost(strategy: Strategy, out_features: int, in_features: int, rank: int, rows: int | None) -> float:
    """Products of a step, forward and backward, in units of one product of the layer's own, N O I.

    branch costs 2 + 2 R (O + I) / (O I), factored 2 R (O + I) / (O I), and both a little for the mixing. dense costs 3
    (the third is the weight's gradient) and R / N more to make W' and as much again to take its gradient back to the
    core; without ``rows``, or with few, it counts as infinitely dear.
    """
    mixed = rank * (2 * (out_features + in_features) + _MIXING) / (out_features * in_features)
    if strategy == "factored":
        return mixed
    if strategy == "branch":
        return 2 + mixed
    if rows is None or rows * out_features * in_features < SMALLEST_WORK:
        return math.inf
    return 3 + (2 * rank + _PASSES) / rows


def cheapest_strategy(
    out_features: int,
    in_features: int,
    rank: int,
    dtype: torch.dtype,
    kind: Kind = _LINEAR,
    rows: int | None = None,
) -> Strategy:
    """The cheapest of the :func:`candidates`; dense only where it saves a tenth.

    Args:
        out_features: O.
        in_features: I.
        rank: R.
        dtype: of the base weight.
        kind: of the layer.
        rows: N, if it is known.
    """

    def dearness(strategy: Strategy) -> float:
        found = cost(strategy, out_features, in_features, rank, rows)
        return found * _GAIN if strategy == "dense" else found

    return min(candidates(out_features, in_features, rank, dtype, kind), key=dearness)
