# SPDX-License-Identifier: Apache-2.0
"""From the settings of a run to its parts: model source, task, encoded splits, size and memory."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import nn

from mirrortune.adapters.spec import AdapterSpec
from mirrortune.data.dataset import DataSet, Split
from mirrortune.data.duplicates import rows_in_both
from mirrortune.data.examples import Examples
from mirrortune.data.loader import StreamedExamples
from mirrortune.data.token_cache import uncached
from mirrortune.data.tokenize import Reading
from mirrortune.errors import ConfigError, all_of, counted
from mirrortune.models.load import (
    ModelSource,
    checkpoint_activations,
    describe_widening,
    empty_model,
    resolve_dtype,
)
from mirrortune.runs.checks import RunSettings
from mirrortune.runs.fit import Stage, Step, check_memory, describe_memory, disk_needs, quantised, with_moments
from mirrortune.runs.index_checks import Lengths, check_rows, longest
from mirrortune.runs.memory import Footprint
from mirrortune.runs.rows import RunRows, choose_rows, read_data
from mirrortune.runs.samples import Samples, choose_samples
from mirrortune.runs.size import Plan, attach_empty, make_plan
from mirrortune.system.cache import check_disk
from mirrortune.system.console import Reporter
from mirrortune.system.devices import default_device, is_set, resolve_precision
from mirrortune.tasks.base import TARGET_ROLES, Generates, Task, check_columns
from mirrortune.tasks.objective import Objective, make_objective
from mirrortune.training.optim import check_matrices, moments_per_number


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that is known of a run before its weights are loaded.

    Attributes:
        settings: of the run; ``spec`` is its adapter, completed by what the base allows.
        source, dtype, processor: the base model, the precision of its weights, its tokenizer or feature extractor.
        task: with its columns and labels.
        max_length: longest row in tokens; None for rows that are not text.
        train: training rows; the first ones of a stream.
        stream: all of them, where they are streamed.
        validation: rows that choose the checkpoint.
        reported: rows that score the kept checkpoint and choose nothing, by name: :data:`HELD_OUT`, or a split.
        test_rows: number of rows of the test split, or None; they are checked, and not used in training.
        data_origin: where the data came from.
        plan: layers and numbers of parameters.
        footprint: memory.
        eval_batch_size, eval_max_positions: largest number of rows and positions of a batch in an evaluation.
        duplicated_rows: validation rows whose texts or files are also in the training rows.
        objective: training loss.
        samples: prompts that are answered at each evaluation.
    """

    settings: RunSettings
    spec: AdapterSpec
    source: ModelSource
    dtype: torch.dtype
    processor: Any
    task: Task
    max_length: int | None
    train: Examples
    stream: StreamedExamples | None
    validation: Examples
    reported: dict[str, Examples]
    test_rows: int | None
    data_origin: dict[str, Any]
    plan: Plan
    footprint: Footprint
    eval_batch_size: int
    eval_max_positions: int | None
    duplicated_rows: int
    objective: Objective
    samples: Samples | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Base:
    """The base model without weights, and what reads rows for it."""

    source: ModelSource
    dtype: torch.dtype
    spec: AdapterSpec
    model: nn.Module
    plan: Plan
    processor: Any
    max_length: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Encoded:
    """The splits of a run as the model takes them."""

    train: Examples
    stream: StreamedExamples | None
    validation: Examples
    reported: dict[str, Examples]

    @property
    def by_name(self) -> dict[str, Examples]:
        """All splits that training and evaluation use."""
        return {"train": self.train, "validation": self.validation, **self.reported}


def assemble(settings: RunSettings, reporter: Reporter, data: DataSet | None = None) -> Job:
    """Check the settings of a run against its data and model, tokenise, and estimate its size.

    No weights are read. All problems of the data and of the model are found before rows are tokenised, and raised
    together.

    Args:
        settings: from :func:`mirrortune.runs.checks.unpack`.
        reporter: prints notes.
        data: the data set; read from ``settings.data`` by default.

    Raises:
        ConfigError, DataError, HubError, ResourceError: see the parts.
    """
    rows, source = all_of(
        lambda: choose_rows(settings, data or read_data(settings.data), reporter), settings.model.find
    )
    task, notes = rows.task.for_model(source)
    for text in notes:
        reporter.note(text)
    rows = replace(rows, task=task)
    base = _size(settings, rows, source, reporter)
    encoded = _encode(settings, rows, base, reporter)
    objective = make_objective(rows.task, settings.classes, encoded.train)
    for text in objective.notes():
        reporter.note(text)
    duplicated = _count_duplicates(rows, reporter)
    samples = choose_samples(
        rows.task, rows.validation, base.processor, Reading(max_length=base.max_length), settings.eval.samples
    )  # fmt: skip
    footprint, eval_batch_size, eval_max_positions = _fit(settings, rows.task, encoded, base, reporter)
    return Job(
        settings=settings, spec=base.spec, source=source, dtype=base.dtype, processor=base.processor, task=rows.task,
        max_length=base.max_length, train=encoded.train, stream=encoded.stream, validation=encoded.validation,
        reported=encoded.reported, test_rows=None if rows.test is None else rows.test.table.num_rows,
        data_origin=rows.origin, plan=base.plan, footprint=footprint, eval_batch_size=eval_batch_size,
        eval_max_positions=eval_max_positions, duplicated_rows=duplicated, objective=objective,
        samples=samples,
    )  # fmt: skip


def _size(settings: RunSettings, rows: RunRows, source: ModelSource, reporter: Reporter) -> _Base:
    """Make the model on the meta device, count what is trained, and load the processor."""
    task, spec = rows.task, settings.adapter
    if source.is_quantised and spec.preset.core is not None and spec.strategy is None:
        spec = replace(spec, strategy="branch")  # the only one that leaves packed weights as they are
    dtype = resolve_dtype(settings.model.dtype, source.config, default_device())
    if said := describe_widening(settings.model.dtype, source.config, default_device()):
        reporter.note(said)
    model = task.trim(empty_model(source, task.auto_class, task.config_fields()))
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    asked = settings.data.max_length
    plan, (processor, max_length), _ = all_of(
        lambda: make_plan(model, spec, dtype=dtype),
        lambda: _processor(task, source, asked),
        lambda: _check_splits(rows),
    )
    if settings.loop.optimizer == "muon":
        adapted = copy.deepcopy(model)
        attach_empty(adapted, spec, plan.targets, dtype=dtype)
        check_matrices(adapted, settings.loop.optimizer)
    max_length = _fitting_length(asked, task, model, processor, source, max_length, reporter)
    return _Base(
        source=source, dtype=dtype, spec=spec, model=model, plan=plan, processor=processor, max_length=max_length
    )


def _processor(task: Task, source: ModelSource, asked: int | None) -> tuple[Any, int | None]:
    processor = task.load_processor(source)
    return processor, task.resolve_length(asked, processor, source.config)


def _check_splits(rows: RunRows) -> None:
    splits = [rows.train, rows.validation, *rows.reported.values(), *([] if rows.test is None else [rows.test])]
    all_of(*(partial(check_columns, split, rows.task) for split in splits))


def _fitting_length(
    asked: int | None, task: Task, model: nn.Module, processor: Any, source: ModelSource, max_length: int | None,
    reporter: Reporter,
) -> int | None:  # fmt: skip
    """``max_length``, or the number of positions that the model has if that is less and ``asked`` is None.

    Raises:
        ConfigError: rows or target texts were asked for that are longer than the model's tables of positions.
    """
    if max_length is None:
        return None
    targets = task.max_target_length if isinstance(task, Generates) else None
    found = longest(model, task.probe(processor, source.config), Lengths(tokens=max_length, targets=targets))
    if targets is not None and found.targets is not None and found.targets < targets:
        raise ConfigError("task.max_target_length", f"got {targets}, the model takes at most {found.targets} tokens",
                          allowed=f"1 to {found.targets}")  # fmt: skip
    if found.tokens < max_length:
        if asked is not None:
            raise ConfigError("data.max_length", f"got {max_length}, the model takes at most {found.tokens} tokens",
                              allowed=f"4 to {found.tokens}")  # fmt: skip
        reporter.note(f"  the model has positions for {found.tokens} tokens: longer rows are cut")
    return found.tokens


def _encode(settings: RunSettings, rows: RunRows, base: _Base, reporter: Reporter) -> _Encoded:
    """Encode all splits, and check their indices against the tables of the model."""
    task, processor = rows.task, base.processor
    scored = Reading(
        max_length=base.max_length, seed=settings.data.seed, tell=lambda text: reporter.detail(f"  {text}")
    )
    learned = replace(scored, for_training=True, drop_blank=settings.data.blank_text == "drop")
    encoded = _Encoded(
        train=task.encode(rows.train, processor, learned),
        validation=task.encode(rows.validation, processor, scored),
        reported={name: task.encode(split, processor, scored) for name, split in rows.reported.items()},
        stream=_streamed(settings.data.shuffle_buffer, rows.train, task, processor, learned),
    )
    for name, examples in encoded.by_name.items():
        reporter.note(f"  {name}: {examples.describe()}")
    if rows.test is not None:
        _check_test(rows.test, task, processor, scored, reporter)
    tokenizer = getattr(processor, "tokenizer", processor)
    check = partial(
        check_rows, base.model, tokenizer=tokenizer, where=f"model '{base.source.name}'",
        is_text=base.max_length is not None,
    )  # fmt: skip
    all_of(*(partial(check, examples, source=f"the {name} rows") for name, examples in encoded.by_name.items()))
    return encoded


def _streamed(
    block_rows: int, rows: Split, task: Task, processor: Any, reading: Reading
) -> StreamedExamples | None:  # fmt: skip
    """All rows of a streamed split; they are made into examples in a thread of their own, with its own processor."""
    if rows.stream is None:
        return None
    own = copy.deepcopy(processor)

    def encode(table: pa.Table, seed: int) -> Examples:
        # Files are read in another order each epoch, so that the rows of a block are numbered within it.
        source = f"{rows.source} (a block of the stream)"
        block = replace(rows, table=table, stream=None, source=source, files=(), kept=None)
        with uncached():
            return task.encode(block, own, replace(reading, seed=seed))

    return StreamedExamples(stream=rows.stream, encode=encode, block_rows=block_rows)


def _check_test(test: Split, task: Task, processor: Any, reading: Reading, reporter: Reporter) -> None:
    """Read the test rows as ``eval`` will, so that a label which is no class is found before training."""
    examples = task.encode(test, processor, replace(reading, allow_missing=True))
    count = examples.num_unlabelled
    without = f"; {count:,} without a label, which can be answered and not scored" if count else ""
    reporter.note(f"  test: {examples.describe()}{without}")


def _count_duplicates(rows: RunRows, reporter: Reporter) -> int:
    """Return how many validation rows are among the training rows; print that, and the same of all scored splits."""
    splits = {"validation": rows.validation, **rows.reported, **({} if rows.test is None else {"test": rows.test})}
    found = {}
    for name, split in splits.items():
        in_both = set(rows.train.table.column_names) & set(split.table.column_names)
        columns = rows.task.columns()
        inputs = [(role, column) for role, column in columns if role not in TARGET_ROLES and column in in_both]
        found[name] = rows_in_both(rows.train, split, inputs)
        if found[name]:
            are = "is" if found[name] == 1 else "are"
            reporter.note(f"  {counted(found[name], f'{name} row')} {are} also among the training rows")
    return found["validation"]


def _fit(
    settings: RunSettings, task: Task, encoded: _Encoded, base: _Base, reporter: Reporter
) -> tuple[Footprint, int, int | None]:
    """Estimate the memory of the run and choose the rows and positions of a batch in an evaluation.

    Raises:
        ResourceError: the run does not fit on the device or on the disks.
    """
    plan, loop = base.plan, settings.loop
    for line in plan.lines():
        reporter.note(line)
    if stored_as := plan.stored_as(settings.form, base.dtype):
        reporter.note(stored_as)
    if as_lora := plan.as_lora():
        reporter.detail(as_lora)
    stage = Stage(
        model=base.model, config=base.source.config.to_dict(), task=task, train=encoded.train,
        scored=(encoded.validation, *encoded.reported.values()), has_length=base.max_length is not None,
        spec=base.spec, targets=plan.targets,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )  # fmt: skip
    step = Step(
        spec=base.spec, dtype=base.dtype, rows=min(loop.batch_size, len(stage.train)),
        accumulation=loop.gradient_accumulation_steps,
        is_16bit_compute=resolve_precision(settings.model.precision) != "fp32", scored=settings.eval.batch_size,
    )  # fmt: skip
    estimate, scored_rows, scored_positions = stage.sized(step)
    moments = moments_per_number(loop.optimizer, is_of_matrices=base.spec.preset.plain == "all")
    found = with_moments(quantised(estimate, base.source.load_in, plan, base.dtype), moments)
    reporter.note(describe_memory(found, step, stage, plan))
    needs = disk_needs(
        base.source, plan, output_dir=Path(settings.output_dir or "runs"), keep=loop.keep, moments=moments
    )
    # FSDP and DeepSpeed cut what they hold into shares, by how many the processes know only when they have met.
    is_cut = is_set("ACCELERATE_USE_FSDP") or is_set("ACCELERATE_USE_DEEPSPEED")
    checks = [] if is_cut else [lambda: check_memory(found, step, stage)]
    all_of(*checks, lambda: check_disk(needs))
    return found, scored_rows, scored_positions
