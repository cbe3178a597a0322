# SPDX-License-Identifier: Apache-2.0
"""Build columns of Arrow tables from Python values, read them in chunks, and mark columns that could not be read.

- Nested values are stored as JSON text (Arrow's type ``arrow.json``), not as structs, because all structs of an Arrow
  column have the same keys, with nulls for missing ones, and each key has a single type.
- A column that could not be read is stored as nulls, with the problem in the metadata of its field. It is refused only
  if a task uses it, since most tables have columns that training does not need.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mirrortune.errors import DataError

# Maximum rows of a chunk, and maximum bytes in the table; as Python values and tokens, these take many times more.
_ROWS, _SIZE = 1024, 1 << 22
_PROBLEM = b"mirrortune.problem"

Columns = list[list[Any]]
"""The cells of some rows: a list for each column, None where a cell is null."""


def text_array(cells: Sequence[str | None]) -> pa.Array:
    """Return an array of type string; None becomes null.

    ``pa.array`` is not used because it imports pandas, which takes a third of a second at the start of a command, and
    Arrow's builder is not used because its memory pool keeps the memory of a table after the table is freed.

    Raises:
        UnicodeEncodeError: if a cell holds half a surrogate pair.
        OverflowError: if the cells hold 2 GiB or more.
    """
    joined, ends = bytearray(), [0]
    for cell in cells:
        if cell is not None:
            joined += cell.encode()
        ends.append(len(joined))
    known = np.fromiter((cell is not None for cell in cells), np.bool_, len(cells))
    buffers = [pa.py_buffer(np.array(ends, np.int32)), pa.py_buffer(joined)]
    return pa.StringArray.from_buffers(len(cells), *buffers, None if known.all() else _bits(known))


def flag_array(flags: npt.NDArray[np.bool_]) -> pa.BooleanArray:
    """Return ``flags``, shape (N,), as an array."""
    return pa.Array.from_buffers(pa.bool_(), len(flags), [None, _bits(flags)])


def _bits(flags: npt.NDArray[np.bool_]) -> pa.Buffer:
    return pa.py_buffer(np.packbits(flags, bitorder="little"))


def json_array(values: Sequence[Any]) -> pa.Array:
    """Return JSON data as an array of type ``arrow.json``; None becomes null.

    Raises:
        UnicodeEncodeError: if a text in a value holds half a surrogate pair.
    """
    texts = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    return pa.ExtensionArray.from_storage(pa.json_(), text_array(texts))


def is_json(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds JSON values."""
    return isinstance(kind, pa.JsonType)


def is_string(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_list(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def python_values(array: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Return the values of an array as Python objects, with JSON decoded and structs as dicts.

    Null keys of structs are dropped, because in Arrow a null is the only way to express that a row lacks a key.
    """
    decode = _decoder(array.type)
    values: list[Any] = array.to_pylist()
    return values if decode is None else [None if value is None else decode(value) for value in values]


def _decoder(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """Return the function that decodes a non-null value of ``to_pylist``, or None if no decoding is needed."""
    if is_json(kind):
        return json.loads
    if is_list(kind):
        inner = _decoder(kind.value_type)
        return inner and (lambda value: [None if part is None else inner(part) for part in value])
    if pa.types.is_struct(kind):
        known = {field.name: _decoder(field.type) for field in kind}
        return lambda value: {
            key: decode(part) if (decode := known[key]) else part for key, part in value.items() if part is not None
        }
    return None


def with_json_aligned(tables: Sequence[pa.Table]) -> list[pa.Table]:
    """Convert columns to JSON that are JSON in some of the tables and of another type in others."""
    as_json = {field.name for table in tables for field in table.schema if is_json(field.type)}
    return [_with_json(table, as_json) for table in tables] if as_json else list(tables)


def _with_json(table: pa.Table, names: set[str]) -> pa.Table:
    for place, field in enumerate(table.schema):
        if field.name in names and not is_json(field.type) and not pa.types.is_null(field.type):
            values = json_array(python_values(table.column(place)))
            table = table.set_column(place, pa.field(field.name, values.type), values)
    return table


def row_chunks(table: pa.Table, columns: Sequence[str], keep: npt.NDArray[np.bool_] | None = None) -> Iterator[Columns]:
    """Yield the cells of ``columns``, a thousand rows at a time, fewer if they are long.

    Args:
        table: any number of rows; never copied as a whole.
        columns: names.
        keep: which rows, shape (N,); None for all. Chunks without any are skipped.
    """
    chosen, start = table.select(list(columns)), 0
    for stored in chosen.to_batches():
        each = stored.nbytes // max(1, stored.num_rows)
        size = max(1, min(_ROWS, _SIZE // max(1, each)))
        for first in range(0, stored.num_rows, size):
            batch = stored.slice(first, size)
            flags = None if keep is None else keep[start : start + batch.num_rows]
            start += batch.num_rows
            if flags is not None and not flags.all():
                batch = batch.filter(flag_array(flags))
            if batch.num_rows:
                yield [python_values(column) for column in batch.columns]


def rows_of(table: pa.Table, columns: Sequence[str], keep: npt.NDArray[np.bool_] | None = None) -> Iterator[Any]:
    """Yield the cells of each row as a tuple, for the arguments of :func:`row_chunks`."""
    for chunk in row_chunks(table, columns, keep):
        yield from zip(*chunk, strict=True)


def cells(table: pa.Table, column: str, keep: npt.NDArray[np.bool_] | None = None) -> Iterator[Any]:
    """Yield the cells of one column."""
    for (chunk,) in row_chunks(table, [column], keep):
        yield from chunk


def nulls(table: pa.Table, column: str) -> npt.NDArray[np.bool_]:
    """Return which cells of a column are null, shape (N,)."""
    return np.asarray(table.column(column).is_null().to_numpy())


def problem_field(name: str, where: str, problem: str, fix: str) -> pa.Field:
    """Return the field of a column that could not be read; ``where``, ``problem`` and ``fix`` as of an error."""
    return pa.field(name, pa.null(), metadata={_PROBLEM: json.dumps([where, problem, fix])})


def is_unreadable(field: pa.Field) -> bool:
    """Return whether the column could not be read."""
    return _PROBLEM in (field.metadata or {})


def rename_problems(table: pa.Table, old: str, new: str) -> pa.Table:
    """Replace the path ``old`` by ``new`` in the errors of the columns that could not be read."""
    fields = []
    for field in table.schema:
        if is_unreadable(field):
            where, problem, fix = json.loads(field.metadata[_PROBLEM])
            fields.append(problem_field(field.name, where.replace(old, new), problem, fix))
        else:
            fields.append(field)
    return pa.table(table.columns, schema=pa.schema(fields))


def refuse_unreadable(table: pa.Table, columns: Iterable[str]) -> None:
    """Raise the DataError of the first of ``columns`` that could not be read; columns that do not exist are ignored."""
    wanted = set(columns)
    for field in table.schema:
        if field.name in wanted and is_unreadable(field):
            where, problem, fix = json.loads(field.metadata[_PROBLEM])
            raise DataError(where, problem, fix=fix)
