# SPDX-License-Identifier: Apache-2.0
"""prepare: everything that train needs, checked, shown and cached."""

from __future__ import annotations

from dataclasses import dataclass

from mirrortune.adapters.factor_cache import FactorCache
from mirrortune.config.recipe import Resolved
from mirrortune.runs.job import assemble
from mirrortune.runs.load import factorise
from mirrortune.runs.preview import show_rows, split_summary
from mirrortune.system.console import Reporter
from mirrortune.system.devices import default_device, factorising_device


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareResult:
    """See DESIGN: the ``--json`` object of prepare. Sizes in bytes, times in seconds."""

    targets: int
    trainable_parameters: int
    head_parameters: int
    svd_seconds: float
    svd_cache: dict[str, int]
    rows: dict[str, int]
    truncated_rows: dict[str, int]
    duplicated_rows: int
    estimated_memory_bytes: int
    memory: dict[str, int]


def prepare(resolved: Resolved, reporter: Reporter, *, dry_run: bool = False, show: int = 0) -> PrepareResult:
    """Check everything, download, tokenise and factorise; a later train starts from the caches.

    Args:
        resolved: the recipe.
        reporter: is told.
        dry_run: stop before the weights: nothing but configuration files and data is fetched.
        show: this many training rows are shown as the model will see them.
    """
    job = assemble(resolved.recipe, reporter)
    for name, examples in {"train": job.train, "validation": job.validation}.items():
        for line in split_summary(examples, job.task):
            reporter.note(f"{name} {line}")
    for line in show_rows(job.train, job.task, job.processor, show):
        reporter.note(line)
    counted = {"validation": job.validation} if job.stream else {"train": job.train, "validation": job.validation}
    rows = {name: len(examples) for name, examples in {**counted, **job.reported}.items()}
    if job.test_rows is not None:
        rows["test"] = job.test_rows
    cache = FactorCache(on_remark=reporter.note, device=factorising_device(default_device()))
    if not dry_run:
        factorise(job, cache, reporter.bar)
    return PrepareResult(
        targets=len(job.plan.targets.layers),
        trainable_parameters=job.plan.trainable_parameters,
        head_parameters=job.plan.head_parameters,
        svd_seconds=round(cache.seconds, 3),
        svd_cache={"hits": cache.hits, "misses": cache.misses},
        rows=rows,
        truncated_rows={name: examples.num_truncated for name, examples in counted.items()},
        duplicated_rows=job.duplicated_rows,
        estimated_memory_bytes=job.footprint.total,
        memory=job.footprint.parts(),
    )
