# SPDX-License-Identifier: Apache-2.0
"""Write tables of predictions as csv, tsv, jsonl or parquet."""

from __future__ import annotations

import csv
import datetime
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mirrortune.data.files.arrow import is_string, python_values, text_array
from mirrortune.errors import ConfigError, DataError, first_line

FORMATS = ("csv", "tsv", "jsonl", "parquet")
PREDICTION = "prediction"
"""Name of the first column that is added."""
ERROR = "error"
"""Column with the reason why a row has no prediction."""
_PARSED = 1000  # rows converted to Python objects at a time
_HEAD = 1 << 20  # bytes in which the first row of a file must end


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
def open_writer(file: Path, kind: str, schema: pa.Schema) -> Iterator[Callable[[pa.Table], object]]:
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


def united(schemas: list[pa.Schema], own: Sequence[str], last: str, kind: str) -> pa.Schema:
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
