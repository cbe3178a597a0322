# SPDX-License-Identifier: Apache-2.0
"""Open the target of ``eval`` or ``predict``, an adapter or a plain model, with its task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import nn

from mirrortune.adapters.factor_cache import FactorCache
from mirrortune.adapters.files.adapter_file import AdapterFile, read_adapter
from mirrortune.adapters.files.find import adapter_to_score
from mirrortune.data.dataset import DataSet, Split
from mirrortune.data.examples import Examples
from mirrortune.data.labels import in_order
from mirrortune.errors import ConfigError, DataError
from mirrortune.merging.bases import as_computed_here, load_adapted, load_unadapted
from mirrortune.models.load import ModelSource, describe_widening, find_model, load_model, pad_token_id, resolve_dtype
from mirrortune.runs.adapted_base import trimmed
from mirrortune.runs.checks import EvalSettings, EvaluationSettings, ModelRequest, TaskRequest
from mirrortune.runs.index_checks import check_end_tokens, check_rows
from mirrortune.runs.rows import any_split
from mirrortune.runs.size import default_eval_batch
from mirrortune.system.console import Reporter
from mirrortune.system.devices import default_device
from mirrortune.system.paths import hub_place
from mirrortune.tasks.base import (
    Answers,
    ComparesRows,
    HasLabels,
    Task,
    labels_of,
    settings_of,
    task_class,
    task_from_dict,
    with_columns,
)
from mirrortune.tasks.classes import OneOfClasses, output_names, with_outputs
from mirrortune.tasks.metrics import KINDS_OWN


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluable:
    """A model with its task, and notes for the user."""

    model: nn.Module
    task: Task
    processor: Any
    max_length: int | None
    notes: tuple[str, ...] = ()


def find_target(target: str, settings: EvaluationSettings, *, force_base: bool, needs_data: bool = True) -> Path | None:
    """Return the adapter folder of a target, or None for a plain model.

    Raises:
        ConfigError: a required setting is missing, or ``force_base`` was given for a target without a base.
    """
    adapter_folder = adapter_to_score(target)
    if force_base and adapter_folder is None:
        raise ConfigError("--force-base", f"'{target}' holds no adapter that could have another base", fix="Remove it")
    needed = {"--data": settings.data.place if needs_data else "", "--task": settings.task.kind or adapter_folder}
    if missing := " and ".join(flag for flag, value in needed.items() if value is None):
        raise ConfigError(target, f"it is not a run, and {missing} not given", fix=f"Check the path, or give {missing}")
    return adapter_folder


def load_target(
    target: str,
    adapter_folder: Path | None,
    settings: EvaluationSettings,
    data: DataSet,
    reporter: Reporter,
    *,
    force_base: bool,
    is_labelled: bool = True,
) -> Evaluable:
    """Load a target with its task, and print notes on it.

    Args:
        target: folder or Hub id.
        adapter_folder: result of :func:`find_target`.
        settings: settings of base, task and data.
        data: data set from which columns and labels are read for a plain model.
        reporter: prints notes.
        force_base: accept a base with different weights.
        is_labelled: the rows have targets, from which the labels of a plain model are read.
    """
    remarks: list[str] | None = [] if force_base else None
    found = load_evaluable(target, adapter_folder, settings, data, remarks=remarks, is_labelled=is_labelled)
    by_force = (f"by force: {remark}" for remark in remarks or ())
    for note in (*by_force, *found.notes):
        reporter.note(note)
    return found


def load_evaluable(
    target: str,
    adapter_folder: Path | None,
    settings: EvaluationSettings,
    data: DataSet,
    *,
    remarks: list[str] | None = None,
    is_labelled: bool = True,
) -> Evaluable:
    """Load the target of ``eval`` or ``predict`` with its task.

    Args:
        target: folder or Hub id of a plain model; ignored if there is an adapter.
        adapter_folder: adapter folder from :func:`adapter_to_score`, or None for a plain model.
        settings: settings of the base, if the user named one, and of the task of a plain model.
        data: data set from which columns and labels are read for a plain model.
        remarks: list to which mismatches between adapter and base are appended; None to raise for them.
        is_labelled: the rows have targets. If not, the labels of a plain model are those of its configuration.
    """
    if adapter_folder is not None:
        return _load_run(adapter_folder, settings, remarks, to_predict=not is_labelled)
    request = settings.model
    source = find_named(target, request)
    make_task = _plain_task if is_labelled else _unlabelled_task
    made, notes = make_task(settings, data, source.config)
    task, _ = made.for_model(source)
    processor = task.load_processor(source)
    dtype = resolve_dtype(request.dtype, source.config, default_device())
    loaded = load_model(source, task.auto_class, {}, dtype, pad_token_id(processor))
    model, new = trimmed(task, loaded)
    if new:
        raise ConfigError(
            target,
            f"it has no trained head for this task ({', '.join(new[:3])} are missing)",
            fix="Evaluate a run directory, a merged folder or a fine-tuned model",
        )
    max_length = task.resolve_length(settings.data.max_length, processor, source.config)
    notes += filter(None, [describe_widening(request.dtype, source.config, default_device())])
    return Evaluable(model=model.eval(), task=task, processor=processor, max_length=max_length, notes=tuple(notes))


def _load_run(
    adapter_folder: Path, settings: EvaluationSettings, remarks: list[str] | None, *, to_predict: bool
) -> Evaluable:
    adapter = read_adapter(adapter_folder)
    if adapter.task is None:
        raise ConfigError(
            str(adapter_folder), "the adapter was saved outside a task", fix="Merge it and evaluate the merged model"
        )
    task = task_of_run(adapter.task, settings.task, to_predict=to_predict)
    name = settings.model.name or adapter.base.get("name")
    if name is None:
        raise ConfigError(str(adapter_folder), "the adapter does not say what its base is", fix="Name it with --model")
    is_named = name == adapter.base.get("name")  # the recorded commit is not valid for another source of the base
    source = find_model(
        name,
        revision=adapter.base.get("commit") or adapter.base.get("revision") if is_named else settings.model.revision,
        trust_remote_code=settings.model.trust_remote_code,
        load_in=adapter.base.get("load_in"),
        new_tokens=adapter.base.get("new_tokens", ()),
    )
    load = partial(load_adapted, factor_source=FactorCache(), remarks=remarks)
    return _of_adapter(adapter, source, task, settings, load)


def _of_adapter(
    adapter: AdapterFile, source: ModelSource, task: Task, settings: EvaluationSettings, load: Callable[..., nn.Module]
) -> Evaluable:
    """Load the base of an adapter, with or without it, and widen it to float32 if 16 bits are slow here."""
    processor = task.load_processor(source)
    model, notes = as_computed_here(load(adapter, source, task, pad_token_id(processor)), adapter, source)
    asked = settings.data.max_length or adapter.extra.get("max_length")
    max_length = task.resolve_length(asked, processor, source.config)
    return Evaluable(model=model.eval(), task=task, processor=processor, max_length=max_length, notes=notes)


def find_named(target: str, request: ModelRequest, load_in: str | None = None) -> ModelSource:
    """Find a plain model by its folder or Hub id, in which a revision precedes that of the settings."""
    place = hub_place(target)
    return find_model(
        place.repository, revision=place.revision or request.revision, trust_remote_code=request.trust_remote_code,
        load_in=load_in,
    )  # fmt: skip


def load_base_of(adapter: AdapterFile, target: str, settings: EvaluationSettings) -> Evaluable:
    """Load the model ``target`` as the base of an adapter, without attaching it, with the adapter's task.

    Args:
        adapter: adapter that determines dtype, model class and task.
        target: folder or Hub id of the base.
        settings: settings that override columns and maximum length.

    Raises:
        ConfigError: the adapter was saved without a task.
    """
    if adapter.task is None:
        raise ConfigError(str(adapter.folder), "the adapter was saved outside a task", fix="Use it in Python")
    task = task_of_run(adapter.task, settings.task)
    source = find_named(target, settings.model, adapter.base.get("load_in"))
    return _of_adapter(adapter, source, task, settings, load_unadapted)


def task_of_run(stored: dict[str, Any], request: TaskRequest, *, to_predict: bool = False) -> Task:
    """Return the task that an adapter was trained for, with columns replaced by those in ``request``; see
    :func:`~mirrortune.tasks.base.with_columns`.
    """
    if request.kind not in (None, stored["kind"]):
        raise ConfigError("--task", f"the run was trained for {stored['kind']}, got {request.kind}")
    return with_columns(task_from_dict(stored), request.columns, to_predict=to_predict)


def _plain_task(settings: EvaluationSettings, data: DataSet, config: Any) -> tuple[Task, list[str]]:
    """Create the task of a plain model, with classes in the order of the model's outputs; return it with notes."""
    task = data.task or _of_few_classes(settings.task, any_split(settings.data, data), output_names(config))
    task, notes = with_outputs(task, config, is_given=settings.task.labels is not None)
    outputs, wanted = getattr(config, "num_labels", None), task.config_fields().get("num_labels")
    if wanted is not None and outputs != wanted:
        raise ConfigError(
            "task",
            f"the model has {outputs} outputs, the task has {wanted}",
            fix="Use the data it was trained for, or set task.labels",
        )
    return task, notes


def _of_few_classes(request: TaskRequest, rows: Split, names: tuple[str, ...]) -> Task:
    """Create the task from rows that may all be of one class, if the model names its classes."""
    try:
        return request.make(rows)[0]
    except DataError:
        if request.labels is not None or not names:
            raise
        return request.make(rows, labels=tuple(in_order(set(names))))[0]


def detect_columns(task: Task, rows: Split) -> tuple[Task, list[str]]:
    """Detect the columns of the task in ``rows``; return the task with these columns and a note for each.

    Rows may lack targets.

    Raises:
        DataError: no column of ``rows`` matches a column of the task, or several do.
    """
    request = TaskRequest(
        kind=task.kind, labels=labels_of(task) or None, scores=KINDS_OWN, given=dict.fromkeys(settings_of(task.kind))
    )
    found, notes = _make_unlabelled(request, rows, has_several=getattr(task, "multi_label", False))
    named = {
        name: getattr(found, name)
        for name in settings_of(task.kind)
        if name.endswith(("_column", "_columns")) and name != "label_column"
    }
    # Nothing is trained here, so what the loss would be computed on is no news.
    return with_columns(task, named, to_predict=True), [note for note in notes if not note.startswith("the loss is on")]


def _unlabelled_task(settings: EvaluationSettings, data: DataSet, config: Any) -> tuple[Task, list[str]]:
    """Create the task of a plain model for rows without targets, with the classes of its configuration; no notes."""
    id2label = getattr(config, "id2label", None) or {}
    labels = settings.task.labels or tuple(str(id2label[i]) for i in sorted(id2label))
    has_several = getattr(config, "problem_type", None) == "multi_label_classification"
    request = replace(settings.task, labels=labels)
    return _make_unlabelled(request, any_split(settings.data, data), has_several=has_several)[0], []


def _make_unlabelled(request: TaskRequest, rows: Split, *, has_several: bool) -> tuple[Task, list[str]]:
    """Create a task from rows whose targets are not read; return it with notes on what was detected."""
    assert request.kind is not None
    kind = task_class(request.kind)
    if issubclass(kind, Answers):  # rows need no answer
        return request.make(rows)
    if issubclass(kind, ComparesRows):
        return kind.to_predict(rows.table, rows.source, request.given.get("text_columns"))
    column = request.given.get("label_column") or "label"
    has_tags = issubclass(kind, HasLabels) and not issubclass(kind, OneOfClasses)
    empty = pa.nulls(rows.table.num_rows, pa.list_(pa.string()) if has_tags or has_several else pa.string())
    table = rows.table.select([name for name in rows.table.column_names if name != column])
    given = {**request.given, "label_column": column, "labels": request.labels}
    return replace(request, given=given).make(replace(rows, table=table.append_column(column, empty)))


def eval_batch(found: Evaluable, settings: EvalSettings) -> dict[str, Any]:
    """Return the batch-size arguments of :func:`evaluate_split` for a model that is not being trained."""
    if settings.batch_size is not None:
        return {"batch_size": settings.batch_size}
    size = getattr(getattr(found.model, "config", None), "vocab_size", None)
    rows, positions = default_eval_batch(found.task, settings.train_rows, found.max_length, size)
    return {"batch_size": rows, "max_positions": positions}


def check_indices(found: Evaluable, examples: Examples, target: str, source: str) -> None:
    """Check the indices of encoded rows against a model's embedding tables; ``source`` names the rows in errors."""
    where, is_text = f"model '{target}'", found.max_length is not None
    check_rows(found.model, examples, found.processor, where=where, source=source, is_text=is_text)


def check_ends(found: Evaluable, examples: Examples, target: str, source: str) -> None:
    """Check the end tokens of encoded rows, a part of :func:`check_indices` that is quick enough for every block."""
    check_end_tokens(found.model, examples, found.processor, where=f"model '{target}'", source=source)
