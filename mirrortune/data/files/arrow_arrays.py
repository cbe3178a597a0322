# SPDX-License-Identifier: Apache-2.0
"""Arrow arrays of text, of flags and of JSON values, and the Python values that they hold.

Text and flags are made without ``pa.array``, which imports pandas to ask whether what it is given is one of its own: a
third of a second at the start of every command that reads a table.

Nested values are stored as their JSON text (Arrow's own type ``arrow.json``), not as structs: all structs of a column
have the same keys, with nulls where a row lacks one, and every key has one type.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

_MOST = 2**31 - 1  # bytes of an array of type string


def text_array(cells: Sequence[str | None]) -> pa.Array:
    """``cells``, whose None are nulls, as an array of type string; of large_string if they hold 2 GiB or more.

    Raises:
        UnicodeEncodeError: a cell holds half a surrogate pair.
    """
    joined, ends = bytearray(), [0]  # grows in place: a list of encoded cells would hold all of them once more
    for cell in cells:
        if cell is not None:
            joined += cell.encode()
        ends.append(len(joined))
    offsets = np.array(ends, np.int64)
    is_large = offsets[-1] > _MOST
    known = np.fromiter((cell is not None for cell in cells), np.bool_, len(cells))
    mask = None if known.all() else _bits(known)
    data = [pa.py_buffer(offsets if is_large else offsets.astype(np.int32)), pa.py_buffer(joined)]
    return pa.Array.from_buffers(pa.large_string() if is_large else pa.string(), len(cells), [mask, *data])


def flag_array(flags: npt.NDArray[np.bool_]) -> pa.BooleanArray:
    """``flags``, shape (N,), as an array."""
    return pa.Array.from_buffers(pa.bool_(), len(flags), [None, _bits(flags)])


def json_array(values: Sequence[Any]) -> pa.Array:
    """JSON data as an array of type ``arrow.json``; None is null.

    Raises:
        UnicodeEncodeError: a text in a value holds half a surrogate pair.
    """
    texts = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    stored = text_array(texts)
    return pa.ExtensionArray.from_storage(pa.json_(stored.type), stored)


def is_json(kind: pa.DataType) -> bool:
    """Whether a column of this type holds JSON values."""
    return isinstance(kind, pa.JsonType)


def holds_objects(value: Any) -> bool:
    """Whether a JSON value is or contains an object (a dict)."""
    return isinstance(value, dict) or (isinstance(value, list) and any(map(holds_objects, value)))


def python_values(array: pa.Array | pa.ChunkedArray) -> list[Any]:
    """The values of an array as Python's own: JSON decoded, structs as dicts.

    A null in a struct means that the row has no such key, since Arrow has no other way to say it: the dict lacks it.
    """
    decode = _decoder(array.type)
    values: list[Any] = array.to_pylist()
    return values if decode is None else [None if value is None else decode(value) for value in values]


def aligned(tables: Sequence[pa.Table]) -> list[pa.Table]:
    """The same tables; a column that holds JSON values in one of them and other values elsewhere holds JSON in all."""
    as_json = {field.name for table in tables for field in table.schema if is_json(field.type)}
    return [_with_json(table, as_json) for table in tables] if as_json else list(tables)


def _with_json(table: pa.Table, names: set[str]) -> pa.Table:
    for place, field in enumerate(table.schema):
        if field.name in names and not is_json(field.type) and not pa.types.is_null(field.type):
            values = json_array(python_values(table.column(place)))
            table = table.set_column(place, pa.field(field.name, values.type), values)
    return table


def _decoder(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """What turns a value of ``to_pylist`` that is not None into the value meant; None where they are the same."""
    if is_json(kind):
        return json.loads
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = _decoder(kind.value_type)
        return inner and (lambda value: [None if part is None else inner(part) for part in value])
    if pa.types.is_struct(kind):
        known = {field.name: _decoder(field.type) for field in kind}
        return lambda value: {
            key: decode(part) if (decode := known[key]) else part for key, part in value.items() if part is not None
        }
    return None


def _bits(flags: npt.NDArray[np.bool_]) -> pa.Buffer:
    return pa.py_buffer(np.packbits(flags, bitorder="little"))
