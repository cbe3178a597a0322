# SPDX-License-Identifier: Apache-2.0
"""Choose the rows of a data set that train the model, select the checkpoint, and score it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mirrortune.data.dataset import DataSet, Split, load_data, set_aside, take_subset
from mirrortune.data.files.media import remarks_on
from mirrortune.data.labels import as_name, without_labels
from mirrortune.data.stream import stream_data
from mirrortune.errors import DataError, counted, did_you_mean
from mirrortune.runs.checks import DataSettings, EvalSettings, RunSettings
from mirrortune.system.console import Reporter
from mirrortune.tasks.base import TARGET_ROLES, Task, check_columns, unused_columns, with_label_columns

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


def read_data(settings: DataSettings) -> DataSet:
    """Read the data set and replace the value for missing labels (``data.missing_label``) by null."""
    found = _read(settings)
    if settings.contained:
        found = replace(found, splits={n: replace(split, is_contained=True) for n, split in found.splits.items()})
    missing = None if settings.missing_label is None else as_name(settings.missing_label)
    if missing is None or settings.label_column is None:
        return found
    column = settings.label_column

    def cleared(split: Split) -> Split:
        stream = split.stream
        if stream is not None:
            flatten = stream.flatten
            stream = replace(stream, flatten=lambda table: without_labels(flatten(table), column, missing))
        return replace(split, table=without_labels(split.table, column, missing), stream=stream)

    return replace(found, splits={name: cleared(split) for name, split in found.splits.items()})


def _read(settings: DataSettings) -> DataSet:
    found = _read_place(settings)
    if settings.validation_place is None:
        return found
    return with_validation(found, load_data(settings.validation_place, encoding=settings.encoding), settings)


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
                allowed=", ".join(rows.table.column_names), fix="Correct data.validation_column_names",
            )  # fmt: skip
        table = table.drop_columns([name]) if name in table.column_names else table
        table = table.append_column(rows.table.schema.field(theirs).with_name(name), rows.table.column(theirs))
    return DataSet(
        splits={**data.splits, settings.validation_split: replace(rows, table=table)},
        origin={**data.origin, "validation": other.origin},
    )


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
    task, notes = settings.task.make(train)
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
    return RunRows(task=task, train=train, validation=validation, reported=reported, test=test, origin=data.origin)


def _validation(
    settings: DataSettings, data: DataSet, train_rows: Split, task: Task, reporter: Reporter
) -> tuple[Split, Split]:
    found = data.find(settings.validation_split)
    if found is not None and found is not train_rows:
        return train_rows, found
    if train_rows.stream is not None:
        raise DataError(
            train_rows.source, f"there is no split '{settings.validation_split}', and a stream sets no rows aside",
            fix="Put validation rows into a file or split of their own, beside the training rows",
        )  # fmt: skip
    strata = task.strata(train_rows)
    train, validation = set_aside(train_rows, settings.validation_fraction, settings.seed, strata)
    count = counted(validation.table.num_rows, "row")
    reporter.note(
        f"  no split '{settings.validation_split}': {count} set aside for validation "
        f"(seed {settings.seed}{', stratified' if strata is not None else ''})"
    )
    return train, validation


def _reported(settings: EvalSettings, data: DataSet, validation: Split, task: Task) -> tuple[Split, dict[str, Split]]:
    """Return the rows by which the checkpoint is selected, and those on which it is only scored."""
    reported: dict[str, Split] = {}
    if settings.protocol == "split-dev":
        validation, reported[HELD_OUT] = set_aside(validation, 0.5, _HALVES_SEED, task.strata(validation))
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
    if is_own_data and not has_validation and split in ("train", "validation"):
        rows = data.require(settings.train_split, "--split")
        check_columns(rows, task)
        parts = set_aside(rows, settings.validation_fraction, settings.seed, task.strata(rows))
        return parts[0] if split == "train" else parts[1], split
    named = names.get(split, split)
    # Other data may have other split names: GLUE's diagnostic set has only a test split, MNLI two validation splits.
    return data.require(named if data.find(named) else split, "--split"), split


def any_split(settings: DataSettings, data: DataSet) -> Split:
    """Return a split to read columns and classes from: the first existing one of training, validation and test."""
    for name in (settings.train_split, settings.validation_split, settings.test_split):
        found = data.find(name)
        if found is not None:
            return found
    return next(iter(data.splits.values()))
