# SPDX-License-Identifier: Apache-2.0
"""How long each way of computing an adapted linear layer takes, measured on made-up numbers."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from mirrortune.adapters.cores import Core
from mirrortune.adapters.layers import SpectralLinear, SpectralWeight, replace_weight
from mirrortune.adapters.layout import Layout
from mirrortune.adapters.strategies import Strategy
from mirrortune.adapters.svd import Factors

_TURNS, _HOPELESS = 3, 1.3


def time_strategies(
    shape: tuple[int, int],
    core: Core,
    strategies: Sequence[Strategy],
    *,
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    autocast: torch.dtype | None = None,
) -> dict[Strategy, float]:
    """Seconds of a forward and a backward pass through a layer of ``shape`` (O, I), by strategy.

    All strategies take turns, after one pass each that does not count; the median of each is taken. What is 1.3 times
    as slow as another in its first turn takes no second one.

    Args:
        shape: (O, I).
        core: untrained, of the rank to measure; copied.
        strategies: to measure.
        rows: N, of the input.
        dtype: of weight and input.
        device: where.
        autocast: dtype to compute in, if that is another.
    """
    layers = {s: _layer(shape, core, s, dtype, device) for s in strategies}
    x = torch.randn(rows, shape[1], dtype=dtype, device=device).requires_grad_()
    times: dict[Strategy, list[float]] = {s: [] for s in strategies}
    running = list(strategies)
    for turn in range(1 + _TURNS):
        for strategy in running:
            seconds = _pass(layers[strategy], x, autocast)
            if turn:
                times[strategy].append(seconds)
        if turn == 1:
            running = [s for s in running if times[s][0] <= _HOPELESS * min(t[0] for t in times.values())]
    return {s: statistics.median(t) for s, t in times.items()}


def _layer(
    shape: tuple[int, int], core: Core, strategy: Strategy, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    out_features, in_features = shape
    rank = core.get_buffer("S").shape[-1]
    base = nn.Linear(in_features, out_features, dtype=dtype, device=device).requires_grad_(requires_grad=False)
    U = torch.randn(out_features, rank, device=device) / out_features**0.5
    Vh = torch.randn(rank, in_features, device=device) / in_features**0.5
    own = copy.deepcopy(core)
    factors = Factors(U=U, S=own.get_buffer("S"), Vh=Vh)
    if strategy == "dense":
        layout = Layout(shape=shape, out_features=out_features)
        replace_weight([(base, "weight")], SpectralWeight(base.weight, layout, factors, own))
        return base.to(device)
    return SpectralLinear(base, factors, own, strategy).to(device)


def _pass(layer: nn.Module, x: Tensor, autocast: torch.dtype | None) -> float:
    """Seconds of one forward and backward pass."""
    kind = x.device.type
    compute: AbstractContextManager[object] = torch.autocast(kind, autocast) if autocast else nullcontext()
    _wait(x.device)
    started = time.perf_counter()
    with compute:
        y = layer(x)
    y.backward(y.detach())
    _wait(x.device)
    seconds = time.perf_counter() - started
    x.grad = None
    layer.zero_grad()
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
