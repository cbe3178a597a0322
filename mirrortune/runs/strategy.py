# SPDX-License-Identifier: Apache-2.0
"""How each adapted layer of a run computes: the same on every process and after a resume, which would differ otherwise
by rounding.

Strategies are equal but for rounding, so the choice is one of time. By default it is counted
(``adapters/strategies.py``); ``adapter.strategy=measured`` times the candidates once for each shape and remembers the
times in the cache, by device, threads and versions.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mirrortune.adapters.spec import AdapterSpec, build_core
from mirrortune.adapters.strategies import SMALLEST_WORK, Strategy, candidates
from mirrortune.adapters.targets import Target, Targets
from mirrortune.runs.fit import typical_tokens
from mirrortune.runs.job import Job
from mirrortune.runs.size import planned_pairs, strategies_of
from mirrortune.runs.timing import time_strategies
from mirrortune.system.atomic import write_atomically
from mirrortune.system.console import Reporter
from mirrortune.system.devices import resolve_precision
from mirrortune.system.distributed import sync
from mirrortune.system.distributed.sharding import Sharding
from mirrortune.system.paths import cache_folder
from mirrortune.system.run_directory import RunDirectory

_VERSION = 1
"""Part of the key of a time: raise it when a strategy computes in another way."""
_ENOUGH = 0.95
"""What another strategy has to take, of the time of the one that was counted as cheapest, to be chosen in its place."""


def choose_strategies(
    job: Job, targets: Targets, run: RunDirectory, accelerator: Any, reporter: Reporter, *, resume: bool
) -> dict[str, Strategy]:
    """The strategy of every layer of ``targets`` that has a choice; those of a resumed run are its own.

    Args:
        job: assembled.
        targets: of its loaded model.
        run: the run.
        accelerator: of this process; the main one measures.
        reporter: is told.
        resume: whether the run goes on.
    """
    if resume:
        return sync.from_main(accelerator, lambda: _stored(run))
    is_measured = job.settings.strategy == "measured"
    if job.spec.preset.core is None:
        if is_measured:
            reporter.note(f"adapter.strategy=measured changes nothing: method '{job.spec.method}' has no strategies")
        return {}
    # Weights that are made dense are replaced where they are read, which has not been tried where they are cut up.
    tokens = (
        None if Sharding.of(accelerator).shards_weights else typical_tokens(job.train, job.settings.loop.batch_size)
    )
    counted = strategies_of(targets, job.spec, job.dtype, tokens)
    if not is_measured or tokens is None:
        return counted
    autocast = torch.bfloat16 if resolve_precision(job.settings.model.precision) == "bf16" else None
    bench = Bench(spec=job.spec, dtype=job.dtype, device=accelerator.device, rows=tokens, autocast=autocast)

    def measure() -> dict[str, Strategy]:
        started = time.perf_counter()
        found = {name: bench.fastest(targets.layers[name], name, given) for name, given in counted.items()}
        changed = sum(found[name] != given for name, given in counted.items())
        seconds = time.perf_counter() - started
        reporter.note(f"strategies measured in {seconds:.1f} s: {changed} of {len(found)} layers compute otherwise")
        return found

    return sync.from_main(accelerator, measure)


def by_strategy(strategies: Mapping[str, Strategy]) -> dict[str, list[str]]:
    """Layers by their strategy, as ``environment.json`` keeps them."""
    return {s: [name for name, own in strategies.items() if own == s] for s in sorted({*strategies.values()})}


def _stored(run: RunDirectory) -> dict[str, Strategy]:
    """What the run began with; nothing for a run of before this was kept, whose layers choose by their shapes alone."""
    kept: dict[Strategy, list[str]] = {}
    with contextlib.suppress(OSError, ValueError):
        kept = json.loads((run.path / "environment.json").read_text(encoding="utf-8")).get("strategies", {})
    return {name: strategy for strategy, names in kept.items() for name in names}


class Bench:
    """Times strategies for layers of one run, each shape once.

    Args:
        spec: the adapter.
        dtype: of the base weights.
        device: to train on.
        rows: tokens of a micro-batch.
        autocast: dtype to compute in, if that is another.
    """

    def __init__(
        self, *, spec: AdapterSpec, dtype: torch.dtype, device: torch.device, rows: int, autocast: torch.dtype | None
    ) -> None:
        self.spec, self.dtype, self.device, self.rows, self.autocast = spec, dtype, device, rows, autocast

    def fastest(self, target: Target, name: str, counted: Strategy) -> Strategy:
        """The fastest strategy for a layer; ``counted`` where nothing else is clearly faster, or nothing is timed."""
        allowed = candidates(*target.shape, target.rank, self.dtype, target.kind)
        work = self.rows * target.shape[0] * target.shape[1]
        is_timed = "dense" in allowed and target.count == 1 and self.spec.strategy is None
        if not is_timed or work < SMALLEST_WORK:
            return counted
        times = self._remembered(target, name, allowed)
        best = min(times, key=lambda s: times[s])
        return best if times[best] < _ENOUGH * times[counted] else counted

    def _remembered(self, target: Target, name: str, allowed: tuple[Strategy, ...]) -> dict[Strategy, float]:
        path = self._place(target, allowed)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # absent or damaged
            kept = json.loads(path.read_text(encoding="utf-8"))["seconds"]
            return {s: float(kept[s]) for s in allowed}
        rank = target.rank
        core = build_core(
            self.spec, torch.linspace(2, 1, rank), name, target.shape, planned_pairs(self.spec, rank, name)
        )
        seconds = time_strategies(
            target.shape, core, allowed, rows=self.rows, dtype=self.dtype, device=self.device, autocast=self.autocast
        )
        text = json.dumps({"seconds": seconds}) + "\n"

        def write(file: Path) -> None:
            file.write_text(text, encoding="utf-8")

        write_atomically(path, write, optional=True)
        return seconds

    def _place(self, target: Target, allowed: tuple[Strategy, ...]) -> Path:
        is_gpu = self.device.type == "cuda"
        device = torch.cuda.get_device_name(self.device) if is_gpu else [os.cpu_count(), torch.get_num_threads()]
        known = [
            _VERSION, torch.__version__, self.device.type, device, target.shape, target.rank, allowed, self.rows,
            str(self.dtype), str(self.autocast), self.spec.preset.core, self.spec.settled().options,
        ]  # fmt: skip
        key = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()
        return cache_folder() / "strategies" / key[:2] / f"{key}.json"
