# SPDX-License-Identifier: Apache-2.0
"""From a recipe to the parts of a run: model source, task, encoded splits, plan. The one place that unpacks a
Recipe.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from mirrortune.adapters.presets import preset
from mirrortune.adapters.spec import AdapterSpec, check_spec
from mirrortune.compiling import check_compiler
from mirrortune.data import DataSet, Split, load_data, rows_in_both, set_aside, take_subset
from mirrortune.errors import ConfigError, DataError, all_of, unknown_name
from mirrortune.examples import Examples
from mirrortune.forward_modes import check_attention, checkpoint_activations
from mirrortune.hardware import default_device, is_set, resolve_precision
from mirrortune.locations import is_local
from mirrortune.loop import LoopSettings
from mirrortune.metrics import METRICS, Scores
from mirrortune.model import ModelSource, empty_model, find_model, resolve_dtype
from mirrortune.peft_configs import check_options
from mirrortune.planning import Plan, make_plan
from mirrortune.preflight import Stage, Step, check_disk, check_memory, describe, disk_needs, packed
from mirrortune.recipe import task_kinds
from mirrortune.rehearsal import Footprint
from mirrortune.report import Reporter
from mirrortune.schema import Recipe
from mirrortune.stream_feeding import StreamedExamples
from mirrortune.streaming import stream_data, stream_problems
from mirrortune.tasks import Task, check_columns, settings_of, task_class
from mirrortune.token_cache import uncached
from mirrortune.tokens import Reading
from mirrortune.tracking import check_tracker

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
        duplicated_rows: validation rows whose texts are also in the training rows.
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
    data_origin: dict[str, Any]
    plan: Plan
    footprint: Footprint
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
    model = empty_model(source, task.auto_class, task.config_fields())
    if recipe.train.gradient_checkpointing:
        checkpoint_activations(model)
    plan, (processor, max_length), _ = all_of(
        lambda: make_plan(model, spec, dtype=dtype),
        lambda: _processor(recipe, task, source),
        lambda: _check_splits(rows),
    )
    scored = Reading(max_length=max_length, seed=recipe.train.seed, tell=lambda text: reporter.detail(f"  {text}"))
    learned = replace(scored, for_training=True, drop_blank=recipe.data.blank_text == "drop")
    train = task.encode(rows.train, processor, learned)
    validation = task.encode(rows.validation, processor, scored)
    reported = {name: task.encode(split, processor, scored) for name, split in rows.reported.items()}
    for name, examples in {"train": train, "validation": validation, **reported}.items():
        reporter.note(f"  {name}: {examples.describe()}")
    twice = rows_in_both(rows.train.table, rows.validation.table, [c for role, c in task.columns() if role != "label"])
    if twice:
        reporter.note(f"  {twice:,} validation rows are also among the training rows")
    stage = Stage(
        model=model, config=source.config.to_dict(), task=task, train=train, has_length=max_length is not None,
        smallest_rank=min((min(t.shape) for t in plan.targets.layers.values()), default=0),
        device="cuda" if torch.cuda.is_available() else "cpu",
    )  # fmt: skip
    return Job(
        recipe=recipe, spec=spec, source=source, dtype=dtype, processor=processor, task=task, max_length=max_length,
        train=train, stream=_streamed(recipe, rows.train, task, processor, learned), validation=validation,
        reported=reported, data_origin=rows.origin, plan=plan,
        footprint=_check_fits(recipe, spec, dtype, stage, source, plan, reporter), duplicated_rows=twice,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """The splits of a run, and the task that was read from them."""

    task: Task
    train: Split
    validation: Split
    reported: dict[str, Split]
    origin: dict[str, Any]


def _read_rows(recipe: Recipe, data: DataSet, reporter: Reporter) -> _Rows:
    train = data.require(recipe.data.train_split, "data.train_split")
    task, notes = make_task(recipe, train)
    count = f"{train.table.num_rows:,} rows"
    reporter.note(f"data: {train.source}, {count if train.stream is None else f'streamed; of its first {count}:'}")
    for text in notes:
        reporter.note(f"  {text}")
    train, validation = _validation(recipe, data, train, task, reporter)
    validation, reported = _reported(recipe, data, validation, task)
    train = take_subset(train, recipe.data.max_train_rows, recipe.train.seed)
    return _Rows(task=task, train=train, validation=validation, reported=reported, origin=data.origin)


def _streamed(recipe: Recipe, rows: Split, task: Task, processor: Any, reading: Reading) -> StreamedExamples | None:
    """All rows of a streamed split; they are made into examples in a thread of their own, with its own processor."""
    if rows.stream is None:
        return None
    own = copy.deepcopy(processor)

    def encode(table: pa.Table, seed: int) -> Examples:
        block = replace(rows, table=table, stream=None)
        with uncached():
            return task.encode(block, own, replace(reading, seed=seed))

    return StreamedExamples(stream=rows.stream, encode=encode, block_rows=recipe.data.shuffle_buffer)


def _check_splits(rows: _Rows) -> None:
    for split in (rows.train, rows.validation, *rows.reported.values()):
        check_columns(split, rows.task)


def _find(recipe: Recipe) -> ModelSource:
    section = recipe.model
    assert section.name is not None
    remote = section.trust_remote_code
    found = find_model(section.name, revision=section.revision, trust_remote_code=remote, load_in=section.load_in)
    return replace(found, attention=section.attention)


def _processor(recipe: Recipe, task: Task, source: ModelSource) -> tuple[Any, int | None]:
    processor = task.load_processor(source)
    return processor, task.resolve_length(recipe.data.max_length, processor, source.config)


def _check_fits(
    recipe: Recipe, spec: AdapterSpec, dtype: torch.dtype, stage: Stage, source: ModelSource, plan: Plan,
    reporter: Reporter,
) -> Footprint:  # fmt: skip
    for line in plan.lines():
        reporter.note(line)
    if as_lora := plan.as_lora():
        reporter.detail(as_lora)
    section = recipe.train
    step = Step(
        spec=spec, dtype=dtype, rows=min(section.batch_size, len(stage.train)),
        accumulation=section.gradient_accumulation_steps,
        is_16bit_compute=resolve_precision(section.precision) == "bf16",
    )  # fmt: skip
    found = packed(stage.footprint(step), source.load_in, plan, dtype)
    reporter.note(describe(found, step, stage, plan))
    output_dir = Path(recipe.output_dir or "runs")
    needs = disk_needs(source, plan, output_dir=output_dir, keep=recipe.train.keep)
    # FSDP cuts the weights into shares, by how many the processes know only when they have met.
    checks = [] if is_set("ACCELERATE_USE_FSDP") else [lambda: check_memory(found, step, stage)]
    all_of(*checks, lambda: check_disk(needs))
    return found


def check_recipe(recipe: Recipe, spec: AdapterSpec) -> None:
    """What the recipe's types cannot say: required settings and names in registries; all problems at once."""
    errors = []
    required = {
        "model.name": (recipe.model.name, "Give --model"),
        "task.kind": (recipe.task.kind, "Give --task"),
        "data.path": (recipe.data.path, "Give --data"),
    }
    for key, (value, fix) in required.items():
        if value is None:
            errors.append(ConfigError(key, "it is not set", fix=fix))
    errors += stream_problems(
        is_streamed=recipe.data.streaming, max_steps=recipe.train.max_steps,
        max_train_rows=recipe.data.max_train_rows, max_eval_rows=recipe.data.max_eval_rows,
    )  # fmt: skip
    kind = recipe.task.kind
    checks: list[Callable[[], object]] = [
        lambda: check_spec(spec),
        lambda: check_options(spec),
        lambda: check_tracker(recipe.train.track),
        lambda: check_compiler(default_device()) if recipe.train.compile else None,
        lambda: check_attention(recipe.model.attention, default_device()),
        lambda: kind and task_class(kind),
    ]
    for check in checks:
        try:
            check()
        except ConfigError as error:
            errors.append(error)
    if kind in task_kinds():
        errors += _unused_settings(recipe)
    metrics = recipe.task.metrics
    errors += [unknown_name("task.metrics", "metric", n, METRICS) for n in metrics or () if n not in METRICS]
    if recipe.model.revision is not None and recipe.model.name is not None and is_local(recipe.model.name):
        errors.append(ConfigError("model.revision", f"{recipe.model.name} is local and has none", fix="Remove it"))
    if metrics is not None and recipe.task.selection_metric not in (None, *metrics):
        errors.append(
            ConfigError(
                "task.selection_metric", f"'{recipe.task.selection_metric}' is not computed", allowed=", ".join(metrics)
            )
        )
    if errors:
        raise ConfigError.several(errors)


def adapter_spec(recipe: Recipe) -> AdapterSpec:
    """The recipe's adapter section as plain values."""
    section = recipe.adapter
    return AdapterSpec(
        method=section.method,
        rank=section.rank,
        pairing=section.pairing,
        target_modules=section.target_modules,
        seed=recipe.train.seed,
        strategy=None if section.strategy == "auto" else section.strategy,
        options=dict(section.options),
        split=section.model_dump(mode="json")["split"],
    )


def read_data(recipe: Recipe) -> DataSet:
    """The recipe's data set."""
    section = recipe.data
    assert section.path is not None
    if section.streaming:
        return stream_data(
            section.path, config=section.config, revision=section.revision, encoding=section.encoding,
            train_split=section.train_split, max_eval_rows=section.max_eval_rows,
        )  # fmt: skip
    return load_data(section.path, config=section.config, revision=section.revision, encoding=section.encoding)


def make_task(recipe: Recipe, rows: Split) -> tuple[Task, list[str]]:
    """The task with its columns and labels, and notes on what was detected."""
    assert recipe.task.kind is not None
    scores = Scores(metrics=recipe.task.metrics, selection_metric=recipe.task.selection_metric)
    return task_class(recipe.task.kind).from_rows(rows.table, rows.source, scores, **task_settings(recipe))


def task_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings of the recipe that its kind of task takes, None where they are not set."""
    assert recipe.task.kind is not None
    given = {**dict(recipe.data), **dict(recipe.task)}
    return {name: given[name] for name in settings_of(recipe.task.kind)}


def _unused_settings(recipe: Recipe) -> list[ConfigError]:
    """Errors for settings of other kinds of task, which would change nothing."""
    assert recipe.task.kind is not None
    of_kinds = {name for kind in task_kinds() for name in settings_of(kind)}
    taken = set(settings_of(recipe.task.kind))
    return [
        ConfigError(f"{section}.{name}", f"{recipe.task.kind} has none, got {value!r}", fix="Remove it")
        for section, values in (("data", recipe.data), ("task", recipe.task))
        for name, value in values
        if name in of_kinds - taken and value is not None
    ]


def loop_settings(recipe: Recipe) -> LoopSettings:
    """The recipe's train and eval sections as plain values, the method's learning rate filled in."""
    section, own = recipe.train, {field.name for field in fields(LoopSettings)}
    given = {name: value for name, value in section if name in own}
    lr = preset(recipe.adapter.method).lr if section.lr is None else section.lr
    return LoopSettings(**{**given, "lr": lr, "eval_batch_size": recipe.eval.batch_size})


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
    reporter.note(
        f"  no split '{recipe.data.validation_split}': {validation.table.num_rows:,} rows set aside for validation "
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
