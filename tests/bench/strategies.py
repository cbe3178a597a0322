# SPDX-License-Identifier: Apache-2.0
"""How long each way of computing an adapted layer takes, and what it costs to take the one that is counted as cheapest.

    python -m tests.bench.strategies -o tests/bench/results/strategies-cpu [--clock cpu] [--method mirror]

For each shape, rank and number of rows every strategy is timed in turns . ``counted`` is the
choice of ``adapters/strategies.py``, by shape alone and with the number of rows; behind it stands how many times the
fastest's time it takes.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mirrortune.adapters.cores import Core
from mirrortune.adapters.layers import SpectralLinear, SpectralWeight, replace_weight
from mirrortune.adapters.layout import Layout
from mirrortune.adapters.spec import AdapterSpec, build_core
from mirrortune.adapters.strategies import Strategy, candidates, cheapest_strategy
from mirrortune.adapters.svd import Factors
from tests.bench.contestants import hardware, versions
from tests.bench.output import command_line, write_and_print

SHAPES = {
    "cpu": [(384, 384), (1536, 384), (768, 768), (3072, 768), (768, 3072)],
    "cuda": [(768, 768), (3072, 768), (2048, 2048), (8192, 2048), (4096, 4096), (14336, 4096)],
}
ROWS = {"cpu": (512, 1024, 2048, 4096), "cuda": (1024, 4096, 16384)}
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


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of the table for each case."""
    if options.clock == "cpu":
        time.perf_counter = time.process_time
    found, device = [], torch.device(options.device)
    for shape in SHAPES[options.device]:
        for rank in (min(shape), min(shape) // 2, 64):
            core = build_core(AdapterSpec(method=options.method, rank=rank), torch.linspace(2, 1, rank), "w", shape)
            for rows in options.rows or ROWS[options.device]:
                allowed = candidates(*shape, rank, torch.float32)
                started = time.perf_counter()
                seconds = time_strategies(
                    shape, core, allowed, rows=rows, dtype=torch.float32, device=device, autocast=options.autocast
                )
                cost = time.perf_counter() - started
                picks = {"shape": cheapest_strategy(*shape, rank, torch.float32),
                         "rows": cheapest_strategy(*shape, rank, torch.float32, rows=rows)}  # fmt: skip
                best = min(seconds.values())
                found.append({
                    "shape": shape, "rank": rank, "rows": rows, "seconds": seconds, "cost": cost, "counted": picks,
                    "regret": {name: seconds[pick] / best for name, pick in picks.items()},
                })  # fmt: skip
    return found


def table(found: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = ["| layer | rank | rows | branch | factored | dense | counted by shape | with rows |", "|" + "---|" * 8]
    for case in found["cases"]:
        times = [
            f"{1000 * case['seconds'][s]:.1f} ms" if s in case["seconds"] else ""
            for s in ("branch", "factored", "dense")
        ]
        picks = [f"{pick} {case['regret'][name]:.2f}" for name, pick in case["counted"].items()]
        size = f"{case['shape'][0]} x {case['shape'][1]}"
        lines.append(f"| {' | '.join([size, str(case['rank']), str(case['rows']), *times, *picks])} |")
    regrets = {name: [case["regret"][name] for case in found["cases"]] for name in ("shape", "rows")}
    said = {name: f"{statistics.mean(r):.3f} in the mean, {max(r):.2f} at the most" for name, r in regrets.items()}
    lines += ["", f"Counted choices in units of the fastest: by shape {said['shape']}; with rows {said['rows']}.",
              f"Timing took {statistics.mean(c['cost'] for c in found['cases']):.1f} s a case. {found['hardware']}; "
              f"{', '.join(f'{k} {v}' for k, v in found['versions'].items())}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--device", choices=SHAPES, default="cpu")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--method", default="mirror")
    parser.add_argument("--rows", nargs="*", type=int)
    parser.add_argument("--autocast", type=lambda name: getattr(torch, name))
    return parser.parse_args(words)


def main() -> None:
    """Measure, write, print."""
    options = parse()
    found = {"cases": measure(options), "hardware": hardware(options.device), "versions": versions()}
    write_and_print(options.output, found, table(found))


if __name__ == "__main__":
    main()
