# SPDX-License-Identifier: Apache-2.0
"""From a recipe to the parts of a run: model source, task, encoded splits, plan."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import nn

from mirrortune.adapters.spec import AdapterSpec
from mirrortune.config.schema import Recipe
from mirrortune.data.dataset import DataSet, Split, set_aside, take_subset
from mirrortune.data.duplicates import rows_in_both
from mirrortune.data.examples import Examples
from mirrortune.data.files.media import remarks_on
from mirrortune.data.loader import StreamedExamples
from mirrortune.data.token_cache import uncached
from mirrortune.data.tokenize import Reading
from mirrortune.errors import ConfigError, DataError, all_of, counted, did_you_mean
from mirrortune.models.load import (
    ModelSource,
    checkpoint_activations,
    describe_widening,
    empty_model,
    find_model,
    resolve_dtype,
)
from mirrortune.runs.checks import adapter_spec, check_recipe, make_task, read_data
from mirrortune.runs.fit import Stage, Step, check_memory, describe, disk_needs, packed
from mirrortune.runs.index_checks import Lengths, check_rows, longest
from mirrortune.runs.memory import Footprint
from mirrortune.runs.size import Plan, make_plan
from mirrortune.system.cache import check_disk
from mirrortune.system.console import Reporter
from mirrortune.system.devices import default_device, is_set, resolve_precision
from mirrortune.tasks.base import TARGET_ROLES, Task, check_columns, unused_columns, with_label_columns

HELD_OUT = "held-out half"
"""What protocol split-dev calls the half of the validation rows that chooses nothing."""
# The halves of a data set must be the same for every run on it, whatever its seed.
_HALVES_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that is known before the weights are loaded.

    Attributes (of those that do not speak for themselves):
        train: rows to learn from; the first ones of a stream.
        stream: all of them, where they are streamed.
        validation: rows that choose the checkpoint.
        reported: rows that score the kept checkpoint and choose nothing, by name: :data:`HELD_OUT`, or a split.
        test_rows: rows of the test split, if there is one; they are checked, and serve nothing in training.
        eval_batch_size, eval_max_positions: rows and positions of a batch that is scored, at most.
        duplicated_rows: validation rows whose texts or files are also in the training rows.
    """

    recipe: Recipe
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


def assemble(recipe: Recipe, reporter: Reporter) -> Job:
    """Check a recipe against its data and model, tokenise, and plan.

    The weights are not touched at all. What can be wrong with the data and with the model is found before rows are
    tokenised, and all of it is said at once.

    Raises:
        ConfigError, DataError, HubError, ResourceError: see the parts.
    """
    check_recipe(recipe, adapter_spec(recipe))
    return _assemble(recipe, lambda: read_data(recipe), reporter)


def assemble_on(recipe: Recipe, data: DataSet, reporter: Reporter) -> Job:
    """:func:`assemble` on data that has been read."""
    return _assemble(recipe, lambda: data, reporter)


def _assemble(recipe: Recipe, read: Callable[[], DataSet], reporter: Reporter) -> Job:
    spec = adapter_spec(recipe)
    rows, source = all_of(lambda: _read_rows(recipe, read(), reporter), lambda: _find(recipe))
    task: Task = rows.task
    if source.is_quantised and spec.preset.core is not None and spec.strategy is None:
        spec = replace(spec, strategy="branch")  # the only one that leaves packed weights as they are
    dtype = resolve_dtype(recipe.model.dtype, source.config, default_device())
    if said := describe_widening(recipe.model.dtype, source.config, default_device()):
        reporter.note(said)
    model = empty_model(source, task.auto_class, task.config_fields())
    if recipe.train.gradient_checkpointing:
        checkpoint_activations(model)
    plan, (processor, max_length), _ = all_of(
        lambda: make_plan(model, spec, dtype=dtype),
        lambda: _processor(recipe, task, source),
        lambda: _check_splits(rows),
    )
    max_length = _fitting_length(recipe, task, model, processor, source, max_length, reporter)
    scored = Reading(max_length=max_length, seed=recipe.train.seed, tell=lambda text: reporter.detail(f"  {text}"))
    learned = replace(scored, for_training=True, drop_blank=recipe.data.blank_text == "drop")
    train = task.encode(rows.train, processor, learned)
    validation = task.encode(rows.validation, processor, scored)
    reported = {name: task.encode(split, processor, scored) for name, split in rows.reported.items()}
    for name, examples in {"train": train, "validation": validation, **reported}.items():
        reporter.note(f"  {name}: {examples.describe()}")
    if rows.test is not None:
        _check_test(rows.test, task, processor, scored, reporter)
    _check_indices(model, {"train": train, "validation": validation, **reported}, processor, source, max_length)
    in_both = set(rows.train.table.column_names) & set(rows.validation.table.column_names)
    inputs = [(role, column) for role, column in task.columns() if role not in TARGET_ROLES and column in in_both]
    twice = rows_in_both(rows.train, rows.validation, inputs)
    if twice:
        are = "is" if twice == 1 else "are"
        reporter.note(f"  {counted(twice, 'validation row')} {are} also among the training rows")
    stage = Stage(
        model=model, config=source.config.to_dict(), task=task, train=train,
        scored=(validation, *reported.values()), has_length=max_length is not None,
        smallest_rank=min((min(t.shape) for t in plan.targets.layers.values()), default=0),
        device="cuda" if torch.cuda.is_available() else "cpu",
    )  # fmt: skip
    footprint, eval_batch_size, eval_max_positions = _check_fits(recipe, spec, dtype, stage, source, plan, reporter)
    return Job(
        recipe=recipe, spec=spec, source=source, dtype=dtype, processor=processor, task=task, max_length=max_length,
        train=train, stream=_streamed(recipe, rows.train, task, processor, learned), validation=validation,
        reported=reported, test_rows=None if rows.test is None else rows.test.table.num_rows,
        data_origin=rows.origin, plan=plan,
        footprint=footprint, eval_batch_size=eval_batch_size, eval_max_positions=eval_max_positions,
        duplicated_rows=twice,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """The splits of a run, and the task that was read from them."""

    task: Task
    train: Split
    validation: Split
    reported: dict[str, Split]
    test: Split | None
    origin: dict[str, Any]


def _read_rows(recipe: Recipe, data: DataSet, reporter: Reporter) -> _Rows:
    train = data.require(recipe.data.train_split, "data.train_split")
    task, notes = make_task(recipe, train)
    count = counted(train.table.num_rows, "row")
    reporter.note(f"data: {train.source}, {count if train.stream is None else f'streamed; of its first {count}:'}")
    for text in filter(None, (*notes, unused_columns(train.table, task), *remarks_on(data, task.columns()))):
        reporter.note(f"  {text}")
    whole = train
    train, validation = _validation(recipe, data, train, task, reporter)
    validation, reported = _reported(recipe, data, validation, task)
    train = take_subset(train, recipe.data.max_train_rows, recipe.train.seed)
    used = (whole, data.find(recipe.data.validation_split), *reported.values())
    test = _test_rows(recipe, data, used, task, whole)
    return _Rows(task=task, train=train, validation=validation, reported=reported, test=test, origin=data.origin)


def _streamed(recipe: Recipe, rows: Split, task: Task, processor: Any, reading: Reading) -> StreamedExamples | None:
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

    return StreamedExamples(stream=rows.stream, encode=encode, block_rows=recipe.data.shuffle_buffer)


def _check_splits(rows: _Rows) -> None:
    splits = [rows.train, rows.validation, *rows.reported.values(), *([] if rows.test is None else [rows.test])]
    all_of(*(partial(check_columns, split, rows.task) for split in splits))


def _test_rows(recipe: Recipe, data: DataSet, used: Sequence[Split | None], task: Task, known: Split) -> Split | None:
    """The test split, unless it is among the splits that are ``used``; without labels where it has none.

    Rows to be answered come without a column of labels. A column that is called nearly so, and that the training rows
    ``known`` lack, is a mistake, and left for :func:`check_columns` to refuse.
    """
    test = data.find(recipe.data.test_split)
    if test is None or any(test is split for split in used):
        return None
    strange = set(test.table.column_names) - set(known.table.column_names)
    absent = {column for role, column in task.columns() if role in TARGET_ROLES} - set(test.table.column_names)
    is_mistake = any(did_you_mean(column, strange) for column in absent)
    return test if is_mistake else with_label_columns(test, task)


def _check_test(test: Split, task: Task, processor: Any, reading: Reading, reporter: Reporter) -> None:
    """Read the test rows as ``eval`` will, so that a label which is no class is found before training."""
    examples = task.encode(test, processor, replace(reading, allow_missing=True))
    count = examples.num_unlabelled
    without = f"; {count:,} without a label, which can be answered and not scored" if count else ""
    reporter.note(f"  test: {examples.describe()}{without}")


def _find(recipe: Recipe) -> ModelSource:
    section = recipe.model
    assert section.name is not None
    remote = section.trust_remote_code
    found = find_model(section.name, revision=section.revision, trust_remote_code=remote, load_in=section.load_in)
    return replace(found, attention=section.attention)


def _processor(recipe: Recipe, task: Task, source: ModelSource) -> tuple[Any, int | None]:
    processor = task.load_processor(source)
    return processor, task.resolve_length(recipe.data.max_length, processor, source.config)


def _fitting_length(
    recipe: Recipe, task: Task, model: nn.Module, processor: Any, source: ModelSource, max_length: int | None,
    reporter: Reporter,
) -> int | None:  # fmt: skip
    """``max_length``, or what the model has positions for if that is less and nobody asked for more.

    Raises:
        ConfigError: rows or target texts were asked for that are longer than the model's tables of positions.
    """
    if max_length is None:
        return None
    targets: int | None = getattr(task, "max_target_length", None)
    found = longest(model, task.probe(processor, source.config), Lengths(tokens=max_length, targets=targets))
    if targets is not None and found.targets is not None and found.targets < targets:
        raise ConfigError("task.max_target_length", f"got {targets}, the model takes at most {found.targets} tokens",
                          allowed=f"1 to {found.targets}")  # fmt: skip
    if found.tokens < max_length:
        if recipe.data.max_length is not None:
            raise ConfigError("data.max_length", f"got {max_length}, the model takes at most {found.tokens} tokens",
                              allowed=f"4 to {found.tokens}")  # fmt: skip
        reporter.note(f"  the model has positions for {found.tokens} tokens: longer rows are cut")
    return found.tokens


def _check_indices(
    model: nn.Module, splits: dict[str, Examples], processor: Any, source: ModelSource, max_length: int | None
) -> None:
    tokenizer = getattr(processor, "tokenizer", processor)
    all_of(
        *(
            partial(check_rows, model, examples, tokenizer, where=f"model '{source.name}'", source=f"the {name} rows",
                    is_text=max_length is not None)
            for name, examples in splits.items()
        )
    )  # fmt: skip


def _check_fits(
    recipe: Recipe, spec: AdapterSpec, dtype: torch.dtype, stage: Stage, source: ModelSource, plan: Plan,
    reporter: Reporter,
) -> tuple[Footprint, int, int | None]:  # fmt: skip
    """The memory of the run, and the rows and positions of a batch that is scored; ResourceError if it does not fit."""
    for line in plan.lines():
        reporter.note(line)
    if stored_as := plan.stored_as(recipe.adapter.form, dtype):
        reporter.note(stored_as)
    if as_lora := plan.as_lora():
        reporter.detail(as_lora)
    section = recipe.train
    step = Step(
        spec=spec, dtype=dtype, rows=min(section.batch_size, len(stage.train)),
        accumulation=section.gradient_accumulation_steps,
        is_16bit_compute=resolve_precision(section.precision) == "bf16", scored=recipe.eval.batch_size,
    )  # fmt: skip
    counted, scored_rows, scored_positions = stage.sized(step)
    found = packed(counted, source.load_in, plan, dtype)
    reporter.note(describe(found, step, stage, plan))
    output_dir = Path(recipe.output_dir or "runs")
    needs = disk_needs(source, plan, output_dir=output_dir, keep=recipe.train.keep)
    # FSDP and DeepSpeed cut what they hold into shares, by how many the processes know only when they have met.
    is_cut = is_set("ACCELERATE_USE_FSDP") or is_set("ACCELERATE_USE_DEEPSPEED")
    checks = [] if is_cut else [lambda: check_memory(found, step, stage)]
    all_of(*checks, lambda: check_disk(needs))
    return found, scored_rows, scored_positions


def _validation(
    recipe: Recipe, data: DataSet, train_rows: Split, task: Task, reporter: Reporter
) -> tuple[Split, Split]:
    found = data.find(recipe.data.validation_split)
    if found is not None and found is not train_rows:
        return train_rows, found
    if train_rows.stream is not None:
        raise DataError(
            train_rows.source, f"there is no split '{recipe.data.validation_split}', and a stream sets no rows aside",
            fix="Put validation rows into a file or split of their own, beside the training rows",
        )  # fmt: skip
    strata = task.strata(train_rows)
    train, validation = set_aside(train_rows, recipe.data.validation_fraction, recipe.train.seed, strata)
    count = counted(validation.table.num_rows, "row")
    reporter.note(
        f"  no split '{recipe.data.validation_split}': {count} set aside for validation "
        f"(seed {recipe.train.seed}{', stratified' if strata is not None else ''})"
    )
    return train, validation


def _reported(recipe: Recipe, data: DataSet, validation: Split, task: Task) -> tuple[Split, dict[str, Split]]:
    """The rows that choose the checkpoint, and those that only score it."""
    reported: dict[str, Split] = {}
    if recipe.eval.protocol == "split-dev":
        validation, reported[HELD_OUT] = set_aside(validation, 0.5, _HALVES_SEED, task.strata(validation))
    for name in recipe.eval.report_splits:
        reported[name] = data.require(name, "eval.report_splits")
        check_columns(reported[name], task)
        task.strata(reported[name])  # refuses rows without a label, before anything is trained
    return validation, reported
