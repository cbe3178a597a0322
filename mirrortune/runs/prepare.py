# SPDX-License-Identifier: Apache-2.0
"""Check, show and cache everything that ``train`` needs (the ``prepare`` command)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from mirrortune.adapters.factor_cache import FactorCache
from mirrortune.config.recipe import Resolved
from mirrortune.data.examples import IGNORE_INDEX, Examples
from mirrortune.errors import counted, first_of
from mirrortune.reports.tables import sparkline
from mirrortune.runs.adapted_base import factorise
from mirrortune.runs.checks import unpack
from mirrortune.runs.job import assemble
from mirrortune.system.console import Reporter
from mirrortune.system.devices import default_device, factorising_device
from mirrortune.tasks.base import ComparesRows, Task, labels_of
from mirrortune.tasks.classes import OneOfClasses, WeighsClasses
from mirrortune.training.settings import LoopSettings

_NUMBERS, _CLASSES, _BINS = 48, 8, 24
_FEW, _MOST = 10, 0.9
"""Number of examples below which a class is called rare, and share of one class above which accuracy means little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareResult:
    """The ``--json`` object of ``prepare``; sizes are in bytes, times in seconds."""

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
    sources: list[dict[str, Any]] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Return the ``--json`` object; ``sources`` is there for several data sets."""
        return {name: value for name, value in asdict(self).items() if name != "sources" or value}


def prepare(
    resolved: Resolved, reporter: Reporter, *, dry_run: bool = False, show: int = 0, num_processes: int = 1
) -> PrepareResult:
    """Check a run, and fill the caches that ``train`` will use: downloads, tokenised rows and factors.

    Args:
        resolved: recipe with the origins of its values.
        reporter: prints notes and progress.
        dry_run: download only configuration files and data, not weights, and compute no factors.
        show: number of training rows to print as the model receives them.
        num_processes: number of processes that will train, on which the number of steps depends.
    """
    job = assemble(unpack(resolved.recipe), reporter)
    for name, examples in {"train": job.train, "validation": job.validation}.items():
        for line in split_summary(examples, job.task):
            reporter.note(f"{name} {line}")
    for line in class_warnings(job.task, job.train, job.validation):
        reporter.note(f"warning: {line}")
    loop, rows_per_epoch = job.settings.loop, len(job.train) if job.draws is None else job.draws.size
    rows_per_step = loop.batch_size * loop.gradient_accumulation_steps * num_processes
    steps_per_epoch = None if job.stream else math.ceil(rows_per_epoch / rows_per_step)
    for line in remarks_on_steps(loop, *loop.total_steps(steps_per_epoch)):
        reporter.note(line)
    for line in show_rows(job.train, job.task, job.processor, show):
        reporter.note(line, has_lines=True)
    encoded = {"validation": job.validation} if job.stream else {"train": job.train, "validation": job.validation}
    rows = {name: len(examples) for name, examples in {**encoded, **job.reported}.items()}
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
        truncated_rows={name: examples.num_truncated for name, examples in encoded.items()},
        duplicated_rows=job.duplicated_rows,
        estimated_memory_bytes=job.footprint.total,
        memory=job.footprint.parts(),
        sources=job.sources,
    )


def split_summary(examples: Examples, task: Task) -> Iterator[str]:
    """Yield lines that describe the classes and row lengths of a split, if it has any."""
    targets = getattr(examples, "targets", None)
    labels = _shown_classes(task)
    if labels and isinstance(targets, np.ndarray) and targets.ndim == 1 and targets.dtype.kind == "i":
        yield f"classes: {_balance(np.bincount(targets[targets >= 0], minlength=len(labels)), labels)}"
    elif isinstance(task, OneOfClasses) and isinstance(targets, np.ndarray) and targets.ndim == 2:
        yield f"classes, several for a row: {_balance(task.class_counts(examples), labels, len(examples))}"
    lengths = examples.lengths
    if lengths.min() < lengths.max():
        counts, edges = np.histogram(lengths, bins=min(_BINS, int(np.ptp(lengths)) + 1))
        yield f"lengths: {int(edges[0])} {sparkline(counts.tolist())} {int(edges[-1])}"


def class_warnings(task: Task, train: Examples, validation: Examples) -> Iterator[str]:
    """Yield warnings about classes with few training rows and about a class that dominates the validation rows."""
    has_class_of_row = isinstance(task, OneOfClasses)
    if not isinstance(task, WeighsClasses):
        return
    labels, counts = _shown_classes(task), task.class_counts(train)
    rare = np.flatnonzero(counts < _FEW)[np.argsort(counts[counts < _FEW], kind="stable")]
    if len(rare):
        shown = first_of((f"{labels[i]} {counts[i]}" for i in rare), _CLASSES)
        yield f"classes with under {_FEW} examples in the training rows: {shown}"
    scored = task.class_counts(validation)
    first = int(counts.argmax())
    if has_class_of_row and scored.sum() == len(validation) and scored[first] > _MOST * len(validation):
        yield (
            f"always predicting '{labels[first]}' gives an accuracy of {scored[first] / len(validation):.3f} on the "
            "validation rows; score by f1_macro, balanced_accuracy or mcc (task.metrics), and see train.class_weights "
            "and train.balance"
        )


def remarks_on_steps(loop: LoopSettings, steps: int, steps_per_epoch: int) -> Iterator[str]:
    """Yield remarks on settings that ``steps`` optimizer steps are too few for."""
    if loop.eval_every_steps is not None and loop.eval_every_steps > steps:
        yield f"train.eval_every_steps={loop.eval_every_steps} is not reached: only the last step, {steps}, is scored"
    if loop.save_every_steps is not None and loop.save_every_steps > steps:
        yield f"train.save_every_steps={loop.save_every_steps} is not reached: the best and the last step are saved"
    num_evaluations = math.ceil(steps / (loop.eval_every_steps or steps_per_epoch))
    if loop.patience is not None and loop.patience >= num_evaluations - 1:
        few = counted(num_evaluations, "evaluation")
        yield f"warning: train.patience={loop.patience} cannot end a run of {few} early: evaluate more often"
    if loop.max_steps is not None and steps < loop.max_steps:
        yield f"train.max_steps={loop.max_steps} is not reached: train.epochs={loop.epochs:g} ends after step {steps}"
    if loop.warmup_steps is not None and loop.warmup_steps >= steps:
        yield f"warning: the warm-up of {loop.warmup_steps} steps does not end within the {steps} steps of the run"
    if loop.schedule == "cosine-restarts" and loop.num_cycles >= steps:
        yield f"warning: train.num_cycles={loop.num_cycles} is not below the {steps} steps of the run: nothing decays"


def _shown_classes(task: Task) -> tuple[str, ...]:
    """Return the class names of a task, each in one line."""
    return tuple(name.replace("\r", "\\r").replace("\n", "\\n") for name in labels_of(task))


def show_rows(examples: Examples, task: Task, processor: Any, count: int) -> Iterator[str]:
    """Yield lines that show the first ``count`` examples as the model receives them in training."""
    tokenizer = getattr(processor, "tokenizer", processor)
    for row in range(min(count, len(examples))):
        yield f"example {row + 1} of {len(examples):,}"
        for name, values in examples.batch(np.array([row]), 0).items():
            is_digest = name == "targets" and isinstance(task, ComparesRows) and not values.is_floating_point()
            if isinstance(values, Tensor) and not is_digest:
                yield from _shown(name, values[0] if len(values) == 1 else values, tokenizer, task)


def _shown(name: str, values: Tensor, tokenizer: Any, task: Task) -> Iterator[str]:
    """Yield lines that show a tensor of a row, with token ids and token labels as text."""
    labels = _shown_classes(task)
    can_read = hasattr(tokenizer, "decode")
    if values.is_floating_point() and values.ndim > 1:
        size = " x ".join(map(str, values.shape))
        low, high, mean = float(values.min()), float(values.max()), float(values.mean())
        yield f"  {name}: {size}, {low:.3g} to {high:.3g}, mean {mean:.3g}"
    elif name == "targets" and values.ndim > 1 and not values.is_floating_point() and not labels and can_read:
        yield from _shown(name, values[0], tokenizer, task)  # the next row holds token weights
    elif values.ndim > 1:  # one row of tokens for each choice or text
        word = "text" if isinstance(task, ComparesRows) else "choice"
        for number, part in enumerate(values):
            yield from (f"  {line.strip()} ({word} {number + 1})" for line in _shown(name, part, tokenizer, task))
    elif name == "targets" and values.ndim == 0:
        index = values.item()
        is_class = isinstance(index, int) and 0 <= index < len(labels)
        yield f"  label: {index}" + (f" ({labels[int(index)]})" if is_class else "")
    else:
        if name == "input_ids" and can_read:
            yield f"  text: {tokenizer.decode(values)}"
        yield f"  {'labels' if name == 'targets' else name}: {_numbers(values)}"
        learned = values[values != IGNORE_INDEX]
        if name == "targets" and can_read and not labels and not values.is_floating_point() and len(learned) > 2:
            yield f"  learned: {tokenizer.decode(learned)}"


def _numbers(values: Tensor) -> str:
    shown = values[:_NUMBERS].tolist()
    more = f" ... ({len(values)} in all)" if len(values) > _NUMBERS else ""
    return " ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in shown) + more


def _balance(counts: Any, labels: tuple[str, ...], rows: int | None = None) -> str:
    order, whole = np.argsort(-counts, kind="stable"), max(1, counts.sum() if rows is None else rows)
    said = [f"{labels[i]} {counts[i]:,} ({counts[i] / whole:.0%})" for i in order[:_CLASSES]]
    if len(order) > _CLASSES:
        last = order[-1]
        said.append(f"{len(order) - _CLASSES} more, the rarest {labels[last]} with {counts[last]:,}")
    return ", ".join(said)
