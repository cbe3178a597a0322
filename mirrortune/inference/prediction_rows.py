# SPDX-License-Identifier: Apache-2.0
"""Read the rows that ``predict`` answers, in order: a data set, standard input, or one row from the command line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from mirrortune.data.columns import refuse_written_lists
from mirrortune.data.dataset import DataSet, Split
from mirrortune.data.examples import OPTIONAL_ROLE
from mirrortune.data.files.arrow import is_string, json_array, refuse_unreadable, text_array
from mirrortune.data.files.media import FILE_ROLES, remarks_on
from mirrortune.data.loose import STDIN, read_loose_files, read_stdin
from mirrortune.errors import ConfigError, DataError, counted, did_you_mean
from mirrortune.runs.checks import DataSettings, TaskRequest
from mirrortune.runs.rows import evaluation_rows, read_data
from mirrortune.runs.target import detect_columns
from mirrortune.system.console import Reporter
from mirrortune.system.paths import local_path
from mirrortune.tasks.base import TARGET_ROLES, Generates, Task, with_columns

_WORDS = "word"  # role of a column that holds lists of words


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRequest:
    """One row from the command line, instead of a data set.

    Attributes:
        texts: texts of the row, in the order in which the task reads them.
        image: path of an image or a recording.
    """

    texts: tuple[str, ...] = ()
    image: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionRows:
    """Rows to predict.

    Attributes:
        data: data set, whose splits are all predicted, one after the other.
        is_bare: the columns have no names, as in lines of text or a row from the command line.
        name: name of the data set if there are several, else empty.
        columns: settings that name columns of this data set alone.
    """

    data: DataSet
    is_bare: bool = False
    name: str = ""
    columns: dict[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int | None:
        """Number of rows, or None if they are streamed."""
        splits = self.data.splits.values()
        return None if any(split.stream for split in splits) else sum(split.table.num_rows for split in splits)

    def fitted(self, task: Task, reporter: Reporter, *, are_named: bool) -> tuple[PredictionRows, Task]:
        """Return the rows and the task with matching columns.

        The columns are those of the task's training or, if the rows lack them, similar ones, which are noted. Columns
        without names get the names that the task reads.

        Args:
            task: task of the model.
            reporter: prints notes.
            are_named: the user has named columns, so that no others are detected.

        Raises:
            ConfigError: the number of columns without names is not the number that the task reads.
            DataError: a split lacks a column, or the column cannot be read.
        """
        task, about = with_columns(task, self.columns, to_predict=True), f"{self.name}: " if self.name else ""
        known, given = [column for _, column in needed_columns(task)], next(iter(self.data.splits.values())).table
        task = task.narrowed(known[: given.num_columns] if self.is_bare else given.column_names)
        rows = self._renamed(task) if self.is_bare else self
        for note in () if self.is_bare else remarks_on(self.data, task.columns()):
            reporter.note(f"{about}{note}")
        split = next(iter(rows.data.splits.values()))
        if not (are_named or self.columns) and (absent := _absent(split, task)):
            with suppress(DataError, ConfigError):
                task, notes = detect_columns(task, _with_lists(split, task))
                for note in (f"the data has no column '{absent[0][1]}'", *notes):
                    reporter.note(f"{about}{note}")
        for split in rows.data.splits.values():
            for role, column in _absent(split, task):
                names = split.table.column_names
                flag = f", or name it with --{_FLAGS[role]}" if role in _FLAGS else ""
                raise DataError(
                    split.source, f"it has no {role} column '{column}'.{did_you_mean(column, names)}",
                    allowed=", ".join(names), fix=f"Rename a column{flag}",
                )  # fmt: skip
            refuse_unreadable(split.table, [column for _, column in needed_columns(task)])
        return rows, task

    def _renamed(self, task: Task) -> PredictionRows:
        (name, split), *_ = self.data.splits.items()
        needed = needed_columns(task)
        are_files = [role in FILE_ROLES for role, _ in needed]
        if are_files != [split.source == _IMAGE] * len(are_files):
            listed = ", ".join(role for role, _ in needed)
            raise ConfigError(split.source, f"the task {task.kind} reads {listed}", fix=_HOW_TO_GIVE[any(are_files)])
        given, layout = split.table.num_columns, getattr(task, "layout", None)
        if given != len(needed) and not (layout == "alpaca" and given < len(needed)):  # Alpaca's input is optional
            listed = ", ".join(f"{role} '{column}'" for role, column in needed)
            raise ConfigError(
                split.source, f"{counted(split.table.num_columns, 'value')} a row, and the task reads {listed}",
                fix="Give --text as often as the task reads texts; rows of several columns as a table or JSON lines",
            )  # fmt: skip
        table = split.table.rename_columns([column for _, column in needed[:given]])
        for _, column in needed[given:]:
            table = table.append_column(column, pa.nulls(table.num_rows, pa.string()))
        if layout in ("messages", "turns"):
            said = [[{"role": "user", "content": text or ""}] for text in table.column(0).to_pylist()]
            table = table.set_column(0, table.column_names[0], json_array(said))
        return replace(self, data=replace(self.data, splits={name: replace(split, table=table)}))

    def of_split(self, split: str | None, settings: DataSettings, task: Task, *, is_own_data: bool) -> PredictionRows:
        """Return the rows of one split, chosen as by ``eval``, or all rows for None.

        Args:
            split: name of the split, or None.
            settings: data settings.
            task: task with columns that the data has.
            is_own_data: the model was trained on this data, from which validation rows may have been set aside.
        """
        if split is None or self.count is None:
            return self
        chosen, _ = evaluation_rows(settings, self.data, split, task, is_own_data=is_own_data)
        return replace(self, data=replace(self.data, splits={split: chosen}))

    def blocks(self, size: int) -> Iterator[tuple[str, Split]]:
        """Yield all rows in order, at most ``size`` at a time, with the name of their split."""
        for name, split in self.data.splits.items():
            if split.stream is None:
                for first in range(0, split.table.num_rows, size):
                    yield name, part_of(split, first, size)
                continue
            first = 0
            for table in split.stream.in_order(size):
                numbers = np.arange(first, first + table.num_rows)
                yield name, replace(split, table=table, stream=None, files=(), kept=numbers)
                first += table.num_rows


def all_fitted(
    sources: Sequence[PredictionRows], task: Task, reporter: Reporter, *, are_named: bool
) -> list[tuple[PredictionRows, Task]]:
    """Return the rows of each data set with the task that reads them; see :meth:`PredictionRows.fitted`.

    Raises:
        DataError: answers to two data sets would have other columns, as those to one text and to two.
    """
    found = [rows.fitted(task, reporter, are_named=are_named) for rows in sources]
    read = [", ".join(role for role, _ in needed_columns(own)) for _, own in found]
    for (rows, own), roles in zip(found, read, strict=True):
        if roles != read[0] and not isinstance(own, Generates):
            raise DataError(
                f"{sources[0].name} and {rows.name}", f"the task reads {read[0]} of a row in one, {roles} in the other",
                fix="Predict one after the other",
            )  # fmt: skip
    return found


_IMAGE = "--image"
_HOW_TO_GIVE = {True: "Give the file to --image, or a folder of files to --data", False: "Use --text, or --data"}
_FLAGS = {"text": "text-column", "word": "text-column", "image": "image-column", "audio": "audio-column"}


def needed_columns(task: Task) -> list[tuple[str, str]]:
    """Return (role, column) of each column that is required to predict a row."""
    target = getattr(task, "label_column", None)
    return [(role, c) for role, c in task.columns() if role not in (*TARGET_ROLES, OPTIONAL_ROLE) and c != target]


def _absent(split: Split, task: Task) -> list[tuple[str, str]]:
    return [(role, column) for role, column in needed_columns(task) if column not in split.table.column_names]


def _with_lists(split: Split, task: Task) -> Split:
    """Return the split with columns of text as lists of words, for detection, if the task reads such lists.

    The lists are null: columns of words are detected by their names and types.
    """
    if _WORDS not in (role for role, _ in task.columns()):
        return split
    table = split.table
    for place, column in enumerate(table.schema):
        if is_string(column.type):
            refuse_written_lists(table, column.name, split.source)
            words = pa.nulls(table.num_rows, pa.list_(pa.string()))
            table = table.set_column(place, column.name, words)
    return replace(split, table=table)


def with_words(split: Split, task: Task) -> Split:
    """Split texts into words at white space if the task reads lists of words."""
    table = split.table
    for role, column in task.columns():
        if role == _WORDS and column in table.column_names and is_string(table.schema.field(column).type):
            words = [None if text is None else text.split() for text in table.column(column).to_pylist()]
            place = table.column_names.index(column)
            table = table.set_column(place, column, pa.array(words, pa.list_(pa.string())))
    return replace(split, table=table)


def rows_of_request(request: RowRequest) -> PredictionRows:
    """Return the row that was given on the command line as a data set."""
    cells = [request.image] if request.image is not None else list(request.texts)
    source = _IMAGE if request.image is not None else "--text"
    names = ["image"] if request.image is not None else _bare_names(len(cells))
    table = pa.table([text_array([cell]) for cell in cells], names=names)
    origin: dict[str, Any] = {"given": cells}
    if request.image is not None:
        path = local_path(request.image)
        if path.is_file():
            origin |= {"size": path.stat().st_size}
    return PredictionRows(data=DataSet(splits={"test": Split(table=table, source=source)}, origin=origin), is_bare=True)


def _bare_names(count: int) -> list[str]:
    """Return provisional column names, under which text columns are detected until the task is known."""
    return ["text"] if count == 1 else [f"text{place}" for place in range(1, count + 1)]


def rows_of_data(settings: DataSettings, request: TaskRequest, split: str | None) -> list[PredictionRows]:
    """Open the data sets of a recipe: each by itself if all rows are predicted, else joined to one.

    Args:
        settings: data settings.
        request: the kind of task, by which several data sets are joined.
        split: name of a split, or of the part of one that :meth:`PredictionRows.of_split` sets aside; None for all.

    Raises:
        DataError: one cannot be read.
    """
    if split is not None or not settings.is_mixture:
        return [_rows_of_one(settings, request, split)]
    found, are_several = [], len(settings.sources) > 1
    for source in settings.sources:
        own = replace(settings, sources=(replace(source, is_item=False),), revision=source.revision)
        columns = {key: value for key, value in source.columns.items() if key != "label_column"}
        rows = _rows_of_one(own, request, None)
        found.append(replace(rows, name=source.name if are_several else "", columns=columns))
    return found


def _rows_of_one(settings: DataSettings, request: TaskRequest, split: str | None) -> PredictionRows:
    place = settings.place
    assert place is not None
    if place.name == STDIN and not settings.is_mixture:
        if split is not None:
            raise ConfigError("--split", "standard input has no splits", fix="Remove it")
        given, is_bare = read_stdin(settings.encoding)
        return PredictionRows(data=given, is_bare=is_bare)
    settings = replace(settings, missing_label=None)  # labels are not read
    loose = None if settings.streaming or settings.is_mixture else read_loose_files(place)
    data = loose or read_data(settings, request)
    if settings.streaming:  # a data set streams one split only, and reads just the first rows of the others
        names = data.splits if split is None else [data.name_of(data.require(split, "--split"))]
        opened = {n: read_data(replace(settings, train_split=n, test_split=n), request).splits[n] for n in names}
        data = replace(data, splits=opened)
    return PredictionRows(data=replace(data, origin={**data.origin, "split": split}))


def part_of(split: Split, first: int, size: int) -> Split:
    """Return ``size`` rows of a split that is not streamed, from ``first`` on."""
    kept = np.arange(split.table.num_rows) if split.kept is None else split.kept
    return replace(split, table=split.table.slice(first, size), kept=kept[first : first + size])
