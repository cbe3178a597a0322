# SPDX-License-Identifier: Apache-2.0
"""Choose the cheapest way to compute an adapted layer by counting products.

Shapes: N rows in a step, O out_features, I in_features, D = min(O, I), R rank.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from mirrortune.adapters.kinds import Kind, Linear, TransposedLinear

Strategy = Literal["branch", "factored", "dense"]

_LINEAR = Linear()
# The cost of everything other than matrix products, in multiplications: of passes over W' (adding, casting, its
# gradient) per entry, and of passes over a core's input per element of N R. Fitted to timings on a CPU (python -m
# tests.bench.strategies), where the resulting choice takes 1.02 times as long as the best on average, and at most 1.53.
_PASSES, _MIXING = 256, 600
# Products of the layer itself, N O I, above which the number of rows is considered: below, a step takes a millisecond
# or two with any strategy.
SMALLEST_WORK = 1 << 26
# Dense must be cheaper by this factor, because it holds W and W' in addition to the factors.
_GAIN = 1.1


def candidates(
    out_features: int, in_features: int, rank: int, dtype: torch.dtype, kind: Kind = _LINEAR
) -> tuple[Strategy, ...]:
    """Return the strategies that reproduce the base layer for an untrained core, the simplest first.

    In 16 bits only ``branch`` is left: ``factored`` would round the weight once more, and ``dense`` would round away
    small changes. The same holds for quantised weights, which must stay small, and for embeddings, whose forward pass
    costs nothing. For convolutions and other kinds, ``dense`` is used only on request, because their number of rows per
    step is not known in advance.
    """
    if dtype not in (torch.float32, torch.float64) or kind.is_quantised or kind.name == "embedding":
        return ("branch",)
    found: list[Strategy] = ["branch"]
    if rank >= min(out_features, in_features):
        found.append("factored")
    if isinstance(kind, Linear | TransposedLinear):
        found.append("dense")
    return tuple(found)


def cost(strategy: Strategy, out_features: int, in_features: int, rank: int, rows: int | None) -> float:
    """Return the cost of a step, forward and backward, in units of one product with the weight, N O I multiplications.

    ``branch`` costs 2 + 2 R (O + I) / (O I) and ``factored`` 2 R (O + I) / (O I), both plus the mixing. ``dense`` costs
    3 (two products and the weight's gradient), plus R / N to compute W', plus R / N to propagate its gradient to the
    core. If ``rows`` is unknown or small, the cost of ``dense`` is infinite.
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
    """Return the cheapest of the :func:`candidates`; ``dense`` only if it saves a tenth.

    Args:
        out_features: O.
        in_features: I.
        rank: R.
        dtype: of the base weight.
        kind: of the layer.
        rows: N, if known.
    """

    def weighted(strategy: Strategy) -> float:
        found = cost(strategy, out_features, in_features, rank, rows)
        return found * _GAIN if strategy == "dense" else found

    return min(candidates(out_features, in_features, rank, dtype, kind), key=weighted)


def loaded_strategy(asked: Strategy | None, rounded_to: torch.dtype, held_in: torch.dtype) -> Strategy | None:
    """Return the strategy for a loaded layer whose factors were rounded to another dtype than that which holds them:
    ``branch`` in place of ``factored``, because rounded factors do not reproduce a weight that is held more exactly.

    Args:
        asked: strategy of the adapter; None for the cheapest.
        rounded_to: dtype that the factors were rounded to in training.
        held_in: dtype of the layer.
    """
    return asked if asked == "dense" or rounded_to == held_in else "branch"
