# SPDX-License-Identifier: Apache-2.0
"""Choose the rows of a data set that train the model, select the checkpoint, and score it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from mirrortune.data.dataset import DataSet, Split, load_data, set_aside, take_subset
from mirrortune.data.duplicates import rows_in_both
from mirrortune.data.files.arrow import is_string
from mirrortune.data.files.media import FILE_ROLES, named_files, remarks_on
from mirrortune.data.labels import as_name, without_labels
from mirrortune.data.mixture import (
    Adjustment,
    DataSource,
    LabelValues,
    check_labels_match,
    joined_data,
    joined_splits,
    label_notes,
    refuse_outside,
    root_folder,
    rows_of_sources,
    source_numbers,
    strata_of_sources,
    united_names,
)
from mirrortune.data.stream import stream_data
from mirrortune.errors import ConfigError, DataError, counted, did_you_mean, first_of
from mirrortune.runs.checks import DataSettings, EvalSettings, RunSettings, TaskRequest
from mirrortune.system.console import Reporter
from mirrortune.tasks.base import (
    TARGET_ROLES,
    Task,
    check_alike,
    check_columns,
    settings_of,
    unused_columns,
    with_label_columns,
)

_LABEL_ROLES = ("label", "tag")
# Stand for the classes of a source while its columns are found: it may have some of them only.
_ANY_LABELS = ("mirrortune.one", "mirrortune.other")
HELD_OUT = "held-out half"
"""Name of the half of the validation rows that is only scored, under the protocol ``split-dev``."""
# The halves of a data set must be the same for every run, regardless of its seed.
_HALVES_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRows:
    """The splits of a run, and the task that was derived from them.

    Attributes:
        task: task with its columns and labels.
        train: training rows.
        validation: rows by which the checkpoint is selected.
        reported: rows on which the kept checkpoint is only scored, by name.
        test: rows of the test split, or None if there is none or it is used otherwise.
        origin: origin of the data, for ``environment.json``.
    """

    task: Task
    train: Split
    validation: Split
    reported: dict[str, Split]
    test: Split | None
    origin: dict[str, Any]


def read_data(settings: DataSettings, request: TaskRequest) -> DataSet:
    """Read the data set, or join several; labels that stand for a missing one become null.

    Args:
        settings: of the data.
        request: the kind of task, by which the columns of several data sets are found.
    """
    found = _read(settings, request)
    if settings.contained:
        found = replace(found, splits={n: replace(split, is_contained=True) for n, split in found.splits.items()})
    missing = None if settings.missing_label is None else as_name(settings.missing_label)
    if missing is None or settings.label_column is None:
        return found
    cleared = partial(without_labels, column=settings.label_column, missing=missing)
    return replace(found, splits={name: split.changed(cleared) for name, split in found.splits.items()})


def _read(settings: DataSettings, request: TaskRequest) -> DataSet:
    found = _mixed(settings, request) if settings.is_mixture else _read_place(settings)
    if settings.validation_place is None:
        return found
    other = load_data(settings.validation_place, encoding=settings.encoding, least_rows=1)
    return with_validation(found, other, settings)


def with_validation(data: DataSet, other: DataSet, settings: DataSettings) -> DataSet:
    """Return a data set with the validation rows of another, whose columns are renamed to those of the training rows.

    Raises:
        DataError: the other data set has several splits but none for validation, or it lacks a column.
    """
    only = list(other.splits.values())
    rows = only[0] if len(only) == 1 else other.require(settings.validation_split, "data.validation_split")
    table = rows.table
    for name, theirs in settings.validation_column_names.items():
        if theirs not in rows.table.column_names:
            raise DataError(
                rows.source, f"it has no column '{theirs}'.{did_you_mean(theirs, rows.table.column_names)}",
                allowed=first_of(rows.table.column_names), fix="Correct data.validation_column_names",
            )  # fmt: skip
        table = table.drop_columns([name]) if name in table.column_names else table
        table = table.append_column(rows.table.schema.field(theirs).with_name(name), rows.table.column(theirs))
    return replace(
        data,
        splits={**data.splits, settings.validation_split: replace(rows, table=table)},
        origin={**data.origin, "validation": other.origin},
    )


def _mixed(settings: DataSettings, request: TaskRequest) -> DataSet:
    """Read several data sets, find the columns of each, and join them.

    The columns of all get the names of the first one's, unless the task reads each source by its own columns.
    """
    if request.kind is None:
        raise ConfigError("--task", "it is not set, and finds the columns of several data sets", fix="Give it")
    names = [source.name for source in settings.sources]
    parts = [_read_source(settings, source, request) for source in settings.sources]
    rows = [any_split(settings, part) for part in parts]
    has_labels = "labels" in settings_of(request.kind)
    labelled = {"labels": _ANY_LABELS} if has_labels and not request.given["labels"] else {}
    made = [
        request.make(own, **{**source.columns, **labelled}) for own, source in zip(rows, settings.sources, strict=True)
    ]
    tasks = [task for task, _ in made]
    notes = [f"{name}: {note}" for name, (_, found) in zip(names, made, strict=True) for note in found]
    united, found = tasks[0].united(tasks[1:]), {}
    if united is None:
        check_alike(tasks, names)
        labels = _labels(tasks, rows, names, are_classes=bool(labelled))
        if has_labels or request.kind == "regression":
            check_labels_match([] if request.given.get("labels") else labels)
            notes += label_notes(labels) if labelled else []
        found = _named(tasks[0], request) | ({"labels": united_names(labels)} if labelled else {})
        changes = _renaming(tasks, rows, labels)
    else:
        read = [{column for _, column in task.columns()} for task in tasks]
        changes = [Adjustment(number=i, dropped=frozenset(set().union(*read) - own)) for i, own in enumerate(read)]
    adjust = [partial(_adjusted, change, task) for change, task in zip(changes, tasks, strict=True)]
    joined = joined_data(parts, adjust, [source.weight for source in settings.sources], united)
    if united is None:
        united, more = request.make(any_split(settings, joined), **found)
        notes += more
    return replace(joined, task=united, notes=tuple(notes))


def _read_source(settings: DataSettings, source: DataSource, request: TaskRequest) -> DataSet:
    column = source.columns.get("label_column", settings.label_column)
    own = replace(
        settings, sources=(replace(source, is_item=False),), revision=source.revision, validation_place=None,
        label_column=column,
    )  # fmt: skip
    return read_data(own, request)


def _named(task: Task, request: TaskRequest) -> dict[str, Any]:
    """Return the columns of a task by their settings; without the label's where there is a column for each label."""
    found = {name: getattr(task, name) for name in request.columns if hasattr(task, name)}
    if found.get("label_column") in (request.given.get("labels") or ()):
        del found["label_column"]
    return found


def _labels(
    tasks: Sequence[Task], rows: Sequence[Split], names: Sequence[str], *, are_classes: bool
) -> list[LabelValues]:
    """Return the labels of each source; none for kinds without, or with a column for each."""
    columns = [[column for role, column in task.columns() if role in _LABEL_ROLES] for task in tasks]
    if any(len(own) != 1 for own in columns):
        return []
    return [
        LabelValues.of(own.table, column, name, are_classes=are_classes)
        for own, (column,), name in zip(rows, columns, names, strict=True)
    ]


def _renaming(tasks: Sequence[Task], rows: Sequence[Split], labels: Sequence[LabelValues]) -> list[Adjustment]:
    """Return what gives all sources the columns of the first, with labels and files of one type."""
    roles = {column: role for role, column in tasks[0].columns()}
    files = frozenset(column for column, role in roles.items() if role in FILE_ROLES)
    label = next((column for column, role in roles.items() if role in _LABEL_ROLES), "")
    own_names = [dict(zip((c for _, c in task.columns()), roles, strict=True)) for task in tasks]
    types = {column: {own.table.schema.field(name).type for own, names in zip(rows, own_names, strict=True)
                      for name, new in names.items() if new == column} for column in roles}  # fmt: skip
    differ = len({kind for kind in types.get(label, ()) if not pa.types.is_null(kind)}) > 1
    as_text = frozenset([label] if labels and (differ or any(own.features for own in labels)) else ())
    as_structs = any(not is_string(kind) for column in files for kind in types[column])
    return [
        Adjustment(
            number=number, names=names, dropped=frozenset(set(names.values()) - set(names)),
            features={label: found} if labels and (found := labels[number].features) else {}, as_text=as_text,
            files=files, as_structs=as_structs,
        )
        for number, names in enumerate(own_names)
    ]  # fmt: skip


def _adjusted(change: Adjustment, task: Task, split: Split) -> Split:
    """Return the rows of a source as a part of the mixture."""
    columns = [(role, column) for role, column in task.columns() if column in split.table.column_names]
    for role, column in columns:
        if role in FILE_ROLES:
            refuse_outside(split, column, role)
            change = replace(change, folder=split.folder)
    remarks = tuple(remarks_on(DataSet(splits={"": split}), columns))
    return replace(split.changed(change.table), folder=root_folder(split), remarks=remarks)


def _read_place(settings: DataSettings) -> DataSet:
    assert settings.place is not None
    if settings.streaming:
        return stream_data(
            settings.place, config=settings.config, revision=settings.revision, encoding=settings.encoding,
            train_split=settings.train_split, max_eval_rows=settings.max_eval_rows,
        )  # fmt: skip
    return load_data(settings.place, config=settings.config, revision=settings.revision, encoding=settings.encoding)


def choose_rows(settings: RunSettings, data: DataSet, reporter: Reporter) -> RunRows:
    """Choose the rows of a training run and create its task."""
    section = settings.data
    train = data.require(section.train_split, "data.train_split")
    task, notes = settings.task.make(train) if data.task is None else (data.task, list(data.notes))
    _check_sources(section, train)
    count = counted(train.table.num_rows, "row")
    reporter.note(f"data: {train.source}, {count if train.stream is None else f'streamed; of its first {count}:'}")
    for text in filter(None, (*notes, unused_columns(train.table, task), *remarks_on(data, task.columns()))):
        reporter.note(f"  {text}")
    whole = train
    train, validation = _validation(section, data, train, task, reporter)
    if section.validation_place is not None:
        reporter.note(f"  validation rows: {validation.source}, {counted(validation.table.num_rows, 'row')}")
    validation, reported = _reported(settings.eval, data, validation, task)
    train = take_subset(train, section.max_train_rows, section.seed)
    whole_validation = validation.table.num_rows
    validation = take_subset(validation, settings.eval.max_rows, section.seed)
    if validation.table.num_rows < whole_validation:
        reporter.note(f"  validation: {validation.table.num_rows:,} of {whole_validation:,} rows (eval.max_rows)")
    used = (whole, data.find(section.validation_split), *reported.values())
    test = _test_rows(data.find(section.test_split), used, task, whole)
    media = named_files(data, task.columns())
    origin = {**data.origin, **({"media": {"sha256": media}} if media else {})}
    return RunRows(task=task, train=train, validation=validation, reported=reported, test=test, origin=origin)


def _validation(
    settings: DataSettings, data: DataSet, train_rows: Split, task: Task, reporter: Reporter
) -> tuple[Split, Split]:
    found = data.find(settings.validation_split)
    if found is not None and found is not train_rows:
        if not (lacking := _lacks_validation(settings, train_rows, found)):
            return train_rows, found
        train, validation, _ = _set_aside(settings, train_rows, found, task)
        count = counted(validation.table.num_rows - found.table.num_rows, "row")
        names = ", ".join(lacking)
        reporter.note(f"  no split '{settings.validation_split}' in {names}: {count} set aside (seed {settings.seed})")
        return train, validation
    if train_rows.stream is not None:
        raise DataError(
            train_rows.source, f"there is no split '{settings.validation_split}', and a stream sets no rows aside",
            fix="Put validation rows into a file or split of their own, beside the training rows",
        )  # fmt: skip
    train, validation, strata = _set_aside(settings, train_rows, None, task)
    count = counted(validation.table.num_rows, "row")
    reporter.note(
        f"  no split '{settings.validation_split}': {count} set aside for validation "
        f"(seed {settings.seed}{', stratified' if strata is not None else ''})"
    )
    return train, validation


def _check_sources(settings: DataSettings, train: Split) -> None:
    """Raise a DataError for the first source of a mixture that has no training rows."""
    numbers = source_numbers(train.table)
    for number, source in enumerate(settings.sources):
        if numbers is not None and number not in numbers:
            raise DataError(source.name, f"there is no split '{settings.train_split}'", fix="Remove it from data.path")


def _set_aside(settings: DataSettings, train: Split, validation: Split | None, task: Task) -> tuple[Split, Split, Any]:
    """Divide training rows into training and validation rows; those of a mixture, source by source.

    Args:
        settings: share and seed.
        train: training rows.
        validation: validation rows of those sources of a mixture that have some; no others are set aside of these.
        task: gives the classes that keep their proportions.

    Returns:
        Training rows, validation rows, and the groups that kept their proportions, or None.
    """
    strata = task.strata(train)
    if validation is None:
        groups = strata_of_sources(train.table, strata)
        return *set_aside(train, settings.validation_fraction, settings.seed, groups), strata
    numbers = source_numbers(validation.table)
    assert numbers is not None
    known = np.unique(numbers).tolist()
    whole = rows_of_sources(train, known, are_taken=False)
    groups = strata_of_sources(whole.table, task.strata(whole))
    learned, held = set_aside(whole, settings.validation_fraction, settings.seed, groups)
    parts = [
        (rows_of_sources(train, [i]), rows_of_sources(validation, [i]))
        if i in known else (rows_of_sources(learned, [i]), rows_of_sources(held, [i]))
        for i in range(len(settings.sources))
    ]  # fmt: skip
    return joined_splits([own for own, _ in parts]), joined_splits([own for _, own in parts]), strata


def _lacks_validation(settings: DataSettings, train: Split, validation: Split) -> list[str]:
    """Return the sources of a mixture that have training rows and no validation rows, where others have some."""
    numbers, known = (source_numbers(split.table) for split in (train, validation))
    if numbers is None or known is None or train.stream is not None:
        return []
    return [source.name for i, source in enumerate(settings.sources) if i in numbers and i not in known]


def _reported(settings: EvalSettings, data: DataSet, validation: Split, task: Task) -> tuple[Split, dict[str, Split]]:
    """Return the rows by which the checkpoint is selected, and those on which it is only scored."""
    reported: dict[str, Split] = {}
    if settings.protocol == "split-dev":
        groups = strata_of_sources(validation.table, task.strata(validation))
        validation, reported[HELD_OUT] = set_aside(validation, 0.5, _HALVES_SEED, groups)
    for name in settings.report_splits:
        reported[name] = data.require(name, "eval.report_splits")
        check_columns(reported[name], task)
        task.strata(reported[name])  # raises for rows without a label before anything is trained
    return validation, reported


def _test_rows(test: Split | None, used: Sequence[Split | None], task: Task, known: Split) -> Split | None:
    """Return the test split, with null labels if it has none, or None if the split is among those ``used``.

    Rows to be predicted have no label column. However, a column with a similar name that the training rows ``known``
    lack is a mistake, which :func:`check_columns` will report.
    """
    if test is None or any(test is split for split in used):
        return None
    strange = set(test.table.column_names) - set(known.table.column_names)
    absent = {column for role, column in task.columns() if role in TARGET_ROLES} - set(test.table.column_names)
    is_mistake = any(did_you_mean(column, strange) for column in absent)
    return test if is_mistake else with_label_columns(test, task)


def evaluation_rows(
    settings: DataSettings, data: DataSet, split: str | None, task: Task, *, is_own_data: bool
) -> tuple[Split, str]:
    """Choose the rows that ``eval`` scores; return them with the name of their split.

    If the training data has no validation split, training sets validation rows aside; on the same data they are drawn
    again, identically for the same seed. Of other data without a validation split, all rows are scored.
    """
    names = {"train": settings.train_split, "validation": settings.validation_split, "test": settings.test_split}
    validation = data.find(settings.validation_split)
    is_trained_on = is_own_data and validation is data.find(settings.train_split)
    has_validation = validation is not None and not is_trained_on
    if split is None and not has_validation and not is_own_data:
        wanted = settings.train_split if data.find(settings.train_split) else settings.test_split
        return data.require(wanted, "--split"), "all"
    split = split or "validation"
    if is_own_data and split in ("train", "validation"):
        rows = data.find(settings.train_split) if has_validation else data.require(settings.train_split, "--split")
        own = validation if has_validation else None
        if rows is not None and (own is None or _lacks_validation(settings, rows, own)):
            check_columns(rows, task)
            parts = _set_aside(settings, rows, own, task)
            return parts[0] if split == "train" else parts[1], split
    named = names.get(split, split)
    # Other data may have other split names: GLUE's diagnostic set has only a test split, MNLI two validation splits.
    return data.require(named if data.find(named) else split, "--split"), split


def num_trained_on(train: Split, rows: Split, task: Task) -> int:
    """Return how many of ``rows`` have the inputs of a row of ``train``."""
    in_both = set(train.table.column_names) & set(rows.table.column_names)
    inputs = [(role, name) for role, name in task.columns() if role not in TARGET_ROLES and name in in_both]
    return rows_in_both(train, rows, inputs)


def describe_trained_on(count: int, noun: str) -> str:
    """Describe what :func:`num_trained_on` has counted."""
    return f"{counted(count, noun)} {'is' if count == 1 else 'are'} also among the training rows"


def any_split(settings: DataSettings, data: DataSet) -> Split:
    """Return a split to read columns and classes from: the first existing one of training, validation and test."""
    for name in (settings.train_split, settings.validation_split, settings.test_split):
        found = data.find(name)
        if found is not None:
            return found
    return next(iter(data.splits.values()))
