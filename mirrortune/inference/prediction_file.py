# SPDX-License-Identifier: Apache-2.0
"""Write tables of predictions as csv, tsv, jsonl or parquet, part by part, and join the parts at the end.

While ``answers.csv`` is being written, its rows are kept in the folder ``.answers.csv.parts`` beside it, one file per
block of rows, so that a process that is killed loses at most one block. The folder holds a marker, and the parts are in
Arrow's format whatever the format of the output.
"""

from __future__ import annotations

import csv
import datetime
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mirrortune.data.files.arrow import is_string, python_values, text_array
from mirrortune.errors import ConfigError, DataError, MirrortuneError, first_line
from mirrortune.system.atomic import clear_leftovers, discard, write_atomically, write_files_atomically
from mirrortune.system.outputs import PARTS, Marker, holds_nothing, read_marker, write_marker
from mirrortune.system.paths import json_object_or_none, sha256_of

FORMATS = ("csv", "tsv", "jsonl", "parquet")
PREDICTION = "prediction"
"""Name of the first column that is added."""
_STATE = "state.json"
_NAME = re.compile(r"rows-(\d+)-(\d+)\.arrow")
_PARSED = 1000  # rows converted to Python objects at a time
_HEAD = 1 << 20  # bytes in which the first row of a file must end
_BLOCK = 1 << 20  # bytes
_RESERVED = Marker(PARTS.name, frozenset())


def format_of(path: Path) -> str:
    """Return the format of an output by its suffix; raise ConfigError for an unknown one."""
    found = path.suffix.lower().removeprefix(".")
    if found not in FORMATS:
        raise ConfigError("-o", f"got '{path.name}'", allowed=f"a name that ends in .{', .'.join(FORMATS)}")
    return found


def holds_predictions(path: Path, kind: str) -> bool:
    """Return whether a file is a table in the format ``kind`` with a column ``prediction``."""
    try:
        if kind == "parquet":
            return PREDICTION in pq.read_schema(path).names
        with path.open(encoding="utf-8", newline="") as file:
            head = io.StringIO(file.read(_HEAD), newline="")
        if kind == "jsonl":
            return PREDICTION in json.loads(head.readline())
        return PREDICTION in next(csv.reader(head, delimiter=_delimiter(kind)), [])
    except (OSError, ValueError, TypeError, RecursionError, csv.Error, pa.ArrowException):
        return False


def refuse_replacing(path: Path, kind: str, *, overwrite: bool) -> None:
    """Raise ConfigError if a file exists, unless it holds predictions and ``overwrite`` is set."""
    if not path.exists():
        return
    if not overwrite:
        fix = "Choose another name, or replace it with --overwrite"
        raise ConfigError("-o", f"{path} already exists", fix=fix)
    if not holds_predictions(path, kind):
        problem = f"{path} has no column '{PREDICTION}', so predict did not write it, and it is left alone"
        raise ConfigError("--overwrite", problem, fix="Choose another name")


class Parts:
    """The finished blocks of an incomplete output.

    Args:
        output: file to which the blocks will be joined; the caller holds a claim on it.
    """

    def __init__(self, output: Path) -> None:
        self.output, self.folder = output, output.with_name(f".{output.name}.parts")

    def begin(self, facts: dict[str, Any], *, overwrite: bool) -> None:
        """Create the folder; with ``overwrite``, discard the unfinished predictions of an earlier command.

        Args:
            facts: everything that the predictions depend on, as JSON data.
            overwrite: discard unfinished predictions.

        Raises:
            ConfigError: the path holds something else, or unfinished predictions and ``overwrite`` is not set.
            ResourceError: the folder cannot be written.
        """
        self._check_ours()
        if self.folder.is_dir():
            rows = self.rows()
            if rows and not overwrite:
                raise ConfigError(
                    "-o", f"{self.folder} holds {rows:,} predicted rows of {self.output.name}, which was not finished",
                    fix="Continue with --resume, start over with --overwrite, or choose another name",
                )  # fmt: skip
            self.discard()
        try:
            write_marker(self.folder, _RESERVED)
            self._write_state({"facts": facts, "overwrite": overwrite})
        except MirrortuneError:
            self.discard()
            raise

    def resume(self, facts: dict[str, Any]) -> int:
        """Continue unfinished predictions and return the number of finished rows.

        Raises:
            ConfigError: there is nothing to continue, or it depends on other facts; the error names the differences.
        """
        self._check_ours()
        state, facts = self.state(), _as_stored(facts)
        if state is None and self._found():
            raise ConfigError(
                "--resume", f"the record of what the rows in {self.folder} were predicted with is damaged",
                fix="Start over with --overwrite",
            )  # fmt: skip
        if state is None:
            fix = "Start it without --resume"
            raise ConfigError("--resume", f"there are no unfinished predictions of {self.output}", fix=fix)
        before = state["facts"]
        changed = [name for name in {**before, **facts} if before.get(name) != facts.get(name)]
        if changed:
            told = "; ".join(_difference(name, before.get(name), facts.get(name)) for name in changed)
            first = "Continue with that version" if _VERSION in told else "Give what the first command was given"
            raise ConfigError(
                "--resume", f"the finished rows of {self.output} were made otherwise: {told}",
                fix=f"{first}, or start over with --overwrite",
            )  # fmt: skip
        for _, _, path in self._found():  # all of them now, not after hours of predicting
            if not _is_readable(path):
                path.unlink()  # its rows are predicted again
        return self.rows()

    def state(self) -> dict[str, Any] | None:
        """Return the recorded state of the folder, or None if it is missing or damaged."""
        found = json_object_or_none(self.folder / _STATE)
        return found if found is not None and isinstance(found.get("facts"), dict) else None

    @property
    def replaces(self) -> bool:
        """Whether the command that started the parts had ``--overwrite``."""
        return bool((self.state() or {}).get("overwrite"))

    def is_joined(self) -> bool:
        """Return whether the parts were joined to ``output`` already, by a process that was killed just afterwards."""
        digest = (self.state() or {}).get("joined")
        return digest is not None and self.output.is_file() and digest == sha256_of(self.output)

    def add(self, first: int, table: pa.Table) -> None:
        """Write a block whose first row has the index ``first``."""

        def write(file: Path) -> None:
            with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)

        self._write(self.folder / f"rows-{first:012}-{table.num_rows:06}.arrow", write)

    def rows(self) -> int:
        """Return the number of finished rows."""
        return sum(count for _, count, _ in self._found())

    def join(self, *, own: Sequence[str], last: str) -> int:
        """Write all rows to the output and remove the folder.

        Args:
            own: names of the rows' columns, which come first.
            last: name of the column of errors, which comes last.

        Returns:
            The number of rows with an error.
        """
        paths, errors, kind = [path for _, _, path in self._found()], 0, format_of(self.output)
        schema = _united([_schema(path) for path in paths], own, last, kind)

        def write(file: Path) -> None:
            nonlocal errors
            with _writer(file, kind, schema) as add:
                for path in paths:
                    table = _table(path)
                    errors += table.num_rows - table.column(last).null_count if last in table.column_names else 0
                    add(table)
            self._write_state({**(self.state() or {}), "joined": sha256_of(file)})

        if not self.is_joined():  # check again, since predicting may have taken hours
            refuse_replacing(self.output, kind, overwrite=self.replaces)
        clear_leftovers(self.output.parent, {self.output.name}.__contains__)  # of a join that was killed
        self._write(self.output, write)
        self.discard()
        return errors

    def discard(self) -> None:
        """Delete mirrortune's files in the folder, and the folder if it is then empty."""
        discard(self.folder, is_ours=_RESERVED.owns)

    def _check_ours(self) -> None:
        marker = None if self.folder.is_symlink() else read_marker(self.folder)
        is_broken = self.folder.is_symlink() and not self.folder.exists()
        is_free = holds_nothing(self.folder, PARTS) and not is_broken
        if not is_free and (marker is None or marker.kind != PARTS.name):
            raise ConfigError("-o", f"{self.folder} is in the way", fix="Move it elsewhere, or choose another name")

    def _found(self) -> list[tuple[int, int, Path]]:
        """Return the first row, number of rows and file of each part, up to the first gap."""
        named = sorted((int(m[1]), int(m[2]), p) for p in self.folder.glob("rows-*") if (m := _NAME.fullmatch(p.name)))
        found, done = [], 0
        for first, count, path in named:
            if first != done:
                break
            found.append((first, count, path))
            done += count
        return found

    def _write_state(self, state: dict[str, Any]) -> None:
        write_files_atomically(self.folder, {_STATE: (json.dumps(state, indent=1) + "\n").encode()})

    def _write(self, path: Path, write: Callable[[Path], None]) -> None:
        try:
            write_atomically(path, write)
        except DataError:
            raise  # the values do not fit the format
        except MirrortuneError as error:
            fix = "Free space or permit writing, then continue with --resume"
            raise type(error)(str(self.output), error.problem, fix=fix) from error


class TableWriter:
    """Writes a sequence of tables as one text file.

    Args:
        write: function that writes bytes.
        kind: ``csv``, ``tsv`` or ``jsonl``.
        names: names of the columns; a column that a table lacks stays empty.
    """

    def __init__(self, write: Callable[[bytes], object], kind: str, names: Sequence[str]) -> None:
        self._sink, self._kind, self._names = write, kind, list(names)
        if kind != "jsonl":
            self._lines([self._names])

    def write(self, table: pa.Table) -> None:
        """Write the rows of a table."""
        there = [table.column_names.index(name) if name in table.column_names else None for name in self._names]
        for start in range(0, table.num_rows, _PARSED):
            piece = table.slice(start, _PARSED)
            empty = [None] * piece.num_rows
            columns = [empty if place is None else python_values(piece.column(place)) for place in there]
            rows = zip(*columns, strict=True)
            if self._kind == "jsonl":
                found = (_plain(dict(zip(self._names, row, strict=True))) for row in rows)
                self._sink("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in found).encode())
            else:
                self._lines([[_cell(value) for value in row] for row in rows])

    def _lines(self, rows: Iterable[Iterable[Any]]) -> None:
        lines = _Lines()
        csv.writer(lines, delimiter=_delimiter(self._kind), lineterminator="\r\n").writerows(rows)
        self._sink("".join(lines).encode())


class _Lines(list[str]):
    """Collects what :func:`csv.writer` writes, each line ended by a line feed.

    Before Python 3.13 the writer quotes a carriage return only where it is part of the line's end, and readers take an
    unquoted one for the end of a row.
    """

    def write(self, line: str) -> None:
        """Append a line."""
        self.append(line.removesuffix("\r\n") + "\n")


@contextmanager
def _writer(file: Path, kind: str, schema: pa.Schema) -> Iterator[Callable[[pa.Table], object]]:
    """Open a new file, and yield a function that appends a table to it."""
    if kind == "parquet":
        with pq.ParquetWriter(file, schema) as writer:
            yield lambda table: writer.write_table(_conformed(table, schema))
    else:
        with file.open("wb") as sink:
            yield TableWriter(sink.write, kind, schema.names).write


def append_columns(table: pa.Table, columns: dict[str, list[Any]]) -> pa.Table:
    """Return the table with new columns of Python values."""
    for name, values in columns.items():
        table = table.append_column(name, _array(values))
    return table


def new_names(names: Iterable[str], taken: Iterable[str]) -> dict[str, str]:
    """Return a name for each new column that no existing column has, prefixed with ``new_`` as often as necessary."""
    used, found = set(taken), {}
    for name in names:
        free = name
        while free in used:
            free = f"new_{free}"
        found[name] = free
        used.add(free)
    return found


def storable(schema: pa.Schema, kind: str) -> list[str]:
    """Return the columns that a format can store; text formats cannot store encoded images or recordings."""
    return [field.name for field in schema if kind == "parquet" or not _has_bytes(field.type)]


def check_united(schemas: Sequence[tuple[str, pa.Schema]]) -> None:
    """Check that columns of the same name can be one column of a parquet file.

    Args:
        schemas: (data set, schema of the columns that are kept).

    Raises:
        DataError: two data sets have a column with values of different types.
    """
    known: dict[str, tuple[str, pa.DataType]] = {}
    for source, schema in schemas:
        for field in schema:
            first, kind = known.get(field.name, (source, pa.null()))
            if pa.types.is_null(kind):
                known[field.name] = (source, field.type)
            elif source != first and not (pa.types.is_null(field.type) or _are_alike(kind, field.type)):
                raise DataError(
                    f"{first} and {source}", f"column '{field.name}' holds {kind} in one, {field.type} in the other",
                    fix="Write a .csv or .jsonl file, or predict one after the other",
                )  # fmt: skip


def _are_alike(kind: pa.DataType, other: pa.DataType) -> bool:
    return bool(kind == other or (_is_number(kind) and _is_number(other)) or (is_string(kind) and is_string(other)))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _has_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(_has_bytes(field.type) for field in kind)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _has_bytes(kind.value_type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _array(values: list[Any]) -> pa.Array:
    if all(value is None or isinstance(value, str) for value in values) and any(v is not None for v in values):
        return text_array(values)
    return pa.array(values)


def _united(schemas: list[pa.Schema], own: Sequence[str], last: str, kind: str) -> pa.Schema:
    """Return the union of all schemas, with the columns ``own`` first and ``last`` at the end.

    A text format needs their names alone, and its columns may hold values of several types.
    """
    schema: Iterable[pa.Field] = {field.name: field for schema in schemas for field in schema}.values()
    if kind == "parquet":
        schema = pa.unify_schemas(schemas, promote_options="permissive")
    places = {name: place for place, name in enumerate(own)} | {last: len(own) + 1}
    return pa.schema(sorted(schema, key=lambda field: places.get(field.name, len(own))))


def _conformed(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return the table with exactly the columns and types of ``schema``."""
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pa.nulls(table.num_rows, field.type))
            continue
        column = table.column(field.name)
        if column.type != field.type:
            is_empty = pa.types.is_null(column.type)
            try:
                column = pa.nulls(table.num_rows, field.type) if is_empty else column.cast(field.type)
            except pa.ArrowInvalid as error:  # such as integers that a floating-point number cannot hold
                raise DataError(
                    f"column '{field.name}'", f"it cannot be {field.type} in all rows ({first_line(error)})",
                    fix="Write a .csv or .jsonl file",
                ) from error  # fmt: skip
        columns.append(column)
    return pa.table(columns, schema=schema)


def _schema(path: Path) -> pa.Schema:
    with pa.OSFile(str(path), "rb") as source, pa.ipc.open_stream(source) as reader:
        return reader.schema


def _table(path: Path) -> pa.Table:
    with pa.OSFile(str(path), "rb") as source, pa.ipc.open_stream(source) as reader:
        return reader.read_all()


def _is_readable(path: Path) -> bool:
    try:
        _table(path)
    except (OSError, pa.ArrowException):
        return False
    return True


def _delimiter(kind: str) -> str:
    return "\t" if kind == "tsv" else ","


def _cell(value: Any) -> str:
    """Format a value as the text of a cell: empty for null, JSON for lists, objects and booleans."""
    if value is None:
        return ""
    if isinstance(value, bool | list | dict):
        return json.dumps(_plain(value), ensure_ascii=False)
    return str(_plain(value)) if not isinstance(value, float) else repr(value)


def _plain(value: Any) -> Any:
    """Convert a value to JSON data, with dates and decimals as text and non-finite numbers as null."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, Decimal | datetime.timedelta):
        return str(value)
    return value


def _as_stored(facts: dict[str, Any]) -> dict[str, Any]:
    """Return JSON data as it will be when it is read back."""
    found: dict[str, Any] = json.loads(json.dumps(facts))
    return found


_DIGEST = re.compile("[0-9a-f]{64}")  # of SHA-256
_MOST_NAMED = 3  # differences listed for one value
_VERSION = "version of mirrortune"  # name of a fact


def _difference(name: str, before: Any, now: Any) -> str:
    if name == "version" and isinstance(before, int) and isinstance(now, int):  # of a kind of task
        return f"another {_VERSION} read the rows (version {before} of its code before, {now} now)"
    if isinstance(before, str | int | float | None) and isinstance(now, str | int | float | None):
        if all(isinstance(value, str) and _DIGEST.fullmatch(value) for value in (before, now)):
            return f"{name} has changed"
        was, is_now = ("not given" if value is None else value for value in (before, now))
        return f"{name} ({was} before, {is_now} now)"
    if isinstance(before, dict) and isinstance(now, dict):
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        more = ", ..." if len(changed) > _MOST_NAMED else ""
        parts = ", ".join(_difference(key, before.get(key), now.get(key)) for key in changed[:_MOST_NAMED])
        return f"{parts}{more}" if name == "sha256" else f"{name}: {parts}{more}"  # its keys are files
    return name
