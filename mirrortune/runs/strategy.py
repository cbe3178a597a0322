# SPDX-License-Identifier: Apache-2.0
"""Choose how each adapted layer of a run computes: the same on every process and after a resume.

Strategies give the same output up to rounding, so the choice is one of time; it is made by counting products
(``adapters/strategies.py``).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from mirrortune.adapters.strategies import Strategy
from mirrortune.adapters.targets import Targets
from mirrortune.runs.fit import typical_tokens
from mirrortune.runs.job import Job
from mirrortune.runs.size import strategies_of
from mirrortune.system.distributed import sync
from mirrortune.system.distributed.sharding import Sharding
from mirrortune.system.run_directory import RunDirectory


def choose_strategies(
    job: Job, targets: Targets, run: RunDirectory, accelerator: Any, *, resume: bool
) -> dict[str, Strategy]:
    """Return the strategy of every layer of ``targets``, by name; a resumed run keeps the strategies it began with.

    Args:
        job: assembled.
        targets: of its loaded model.
        run: the run.
        accelerator: of this process.
        resume: whether the run continues.
    """
    if resume:
        return sync.from_main(accelerator, lambda: _stored(run))
    # Weights that are made dense are replaced where they are read, which has not been tried where they are sharded.
    is_sharded = Sharding.of(accelerator).shards_weights
    tokens = None if is_sharded else typical_tokens(job.train, job.settings.loop.batch_size)
    return strategies_of(targets, job.spec, job.dtype, tokens)


def by_strategy(strategies: Mapping[str, Strategy]) -> dict[str, list[str]]:
    """Group layer names by strategy, as ``environment.json`` stores them."""
    return {s: [name for name, own in strategies.items() if own == s] for s in sorted({*strategies.values()})}


def _stored(run: RunDirectory) -> dict[str, Strategy]:
    """The strategies that the run began with; none if ``environment.json`` is missing or damaged."""
    kept: dict[Strategy, list[str]] = {}
    with contextlib.suppress(OSError, ValueError):
        kept = json.loads((run.path / "environment.json").read_text(encoding="utf-8")).get("strategies", {})
    return {name: strategy for strategy, names in kept.items() for name in names}
