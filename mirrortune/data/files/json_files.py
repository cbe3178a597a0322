# SPDX-License-Identifier: Apache-2.0
"""Read JSON files, of an object a line, an array of objects, or an object of columns, into Arrow tables.

The standard library parses them: ``pyarrow.json`` guesses types, such as dates in a column of text.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from mirrortune.data.files.arrow import json_array, problem_field, text_array
from mirrortune.data.files.json_layouts import (
    only_object,
    refuse_annotations,
    refuse_frame,
    refuse_indented_rows,
    refuse_wrapped_rows,
    rows_of_columns,
)
from mirrortune.data.files.tables import Part, line_numbers, parts_of
from mirrortune.data.files.text_files import blocks_of, is_gzipped, is_unicode, lines_of
from mirrortune.errors import DataError, first_line
from mirrortune.system.paths import table_suffix

_KINDS = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
_LARGEST_ARRAY = 1 << 30  # characters; an array is parsed as a whole


def read_json_file(path: Path, encoding: str) -> Iterator[Part]:
    """Yield the rows of a file that ends in .json, part by part; an array or columns are parsed as a whole."""
    start = next((text for block in blocks_of(path, encoding) if (text := block.lstrip())), "")
    if not start.startswith("["):
        held = only_object(lines_of(path, encoding, "\n"), blocks_of(path, encoding))
        columns = None if held is None else rows_of_columns(path, held)
        if columns is None:
            yield from read_json_lines(path, encoding)
            return
        for part in parts_of((row, 1) for row in enumerate(columns, start=1)):
            yield _from_objects(path, part, " row "), None
        return
    text = "".join(_limited(path, blocks_of(path, encoding)))
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}", f"not valid JSON ({error.msg})", fix="Correct the line") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, thousands of brackets
        raise DataError(str(path), f"not valid JSON ({first_line(error)})", fix="Correct the file") from error
    size = len(text) // max(1, len(rows))  # of a row, on average
    del text
    for part in parts_of((row, size) for row in enumerate(rows, start=1)):
        yield _from_objects(path, part, " row "), None


def _limited(path: Path, blocks: Iterable[str]) -> Iterator[str]:
    size = 0
    for block in blocks:
        size += len(block)
        if size > _LARGEST_ARRAY:
            name = shlex.quote(path.name)
            command = f"gzip -dc {name} | jq -c '.[]'" if is_gzipped(path) else f"jq -c '.[]' {name}"
            raise DataError(
                str(path), f"a JSON array of more than {_LARGEST_ARRAY:,} characters",
                fix=f"Convert it to JSON lines, which are read row by row: {command} > rows.jsonl",
            )  # fmt: skip
        yield block


def read_json_lines(path: Path, encoding: str) -> Iterator[Part]:
    """Yield the rows of a file of an object a line, part by part."""
    for part in parts_of(_json_rows(path, encoding)):
        yield _from_objects(path, part, ":"), line_numbers(part)


def _json_rows(path: Path, encoding: str) -> Iterator[tuple[Any, int]]:
    count, row = 0, None
    for number, line in enumerate(lines_of(path, encoding, "\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if not count and table_suffix(path) == ".json":
                refuse_indented_rows(path, blocks_of(path, encoding))
            reason = getattr(error, "msg", None) or first_line(error)
            raise DataError(
                f"{path}:{number}",
                f"not valid JSON ({reason})",
                allowed="one JSON object a line"
                + (", or an array of objects" if table_suffix(path) == ".json" else ""),
                fix=None if count or line.lstrip()[0] in "{[" else "If it is a table of cells, name it .csv",
            ) from error
        if number == 1:
            refuse_frame(path, row)
        count += 1
        yield (number, row), len(line)
    if count == 1:
        refuse_wrapped_rows(path, row)


def _from_objects(path: Path, rows: list[tuple[int, Any]], sign: str) -> pa.Table:
    """Return a table of numbered JSON objects; ``sign`` separates file and number in messages."""
    for number, row in rows:
        if not isinstance(row, dict):
            raise DataError(
                f"{path}{sign}{number}", f"got {type(row).__name__}", allowed="JSON objects, column -> value"
            )
        refuse_annotations(f"{path}{sign}{number}", row)
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    for name in names:
        if not is_unicode(name):
            number = next(number for number, row in rows if name in row)
            raise DataError(
                f"{path}{sign}{number}", f"the name of column {name!a} holds half a character",
                fix="Rename it",
            )  # fmt: skip
    arrays, fields = [], []
    for name in names:
        values = [row.get(name) for _, row in rows]
        try:
            array = _column(values)
            field = pa.field(name, array.type)
        except (UnicodeEncodeError, pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            problem, place = _why_unreadable(values, error)
            array = pa.nulls(len(rows))
            where = f"{path}{sign}{rows[place][0]}"
            field = problem_field(name, where, f"column '{name}' {problem}", "Give every row the same type")
        arrays.append(array)
        fields.append(field)
    return pa.table(arrays, schema=pa.schema(fields))


def _why_unreadable(values: list[Any], error: Exception) -> tuple[str, int]:
    """Describe the problem of a column whose cells raised ``error``; return it with the index of the first bad cell."""
    if isinstance(error, UnicodeEncodeError):
        place = next(i for i, v in enumerate(values) if not is_unicode(json.dumps(v, ensure_ascii=False)))
        return f"holds half a character ({first_line(error)})", place
    kinds = [_KINDS.get(type(value)) for value in values]
    known = [kind for kind in kinds if kind is not None]
    other = next((i for i, kind in enumerate(kinds) if kind not in (None, known[0])), None)
    if other is not None:
        return f"mixes types ({kinds[other]} here, {known[0]} in rows before)", other
    numbers = [i for i, value in enumerate(values) if isinstance(value, int) and not -(2**63) <= value < 2**63]
    if numbers:
        return "holds a whole number of more than 64 bits", numbers[0]
    return f"mixes types ({first_line(error)})", 0


def _column(values: list[Any]) -> pa.Array:
    """Return the values of a column as text, numbers, lists, flat objects of text, or else JSON."""
    if _is_text(values):
        return text_array(values)
    if any(map(_holds_objects, values)) and not _are_flat(values):
        return json_array(values)
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        if not all(value is None or isinstance(value, list | dict) for value in values):
            raise
        return json_array(values)  # lists of mixed types


def _holds_objects(value: Any) -> bool:
    """Return whether a JSON value is or contains an object."""
    return isinstance(value, dict) or (isinstance(value, list) and any(map(_holds_objects, value)))


def _are_flat(values: list[Any]) -> bool:
    """Return whether all values are objects of texts, which become columns (``translation: {en, ro}``)."""
    texts = [value.values() if isinstance(value, dict) else (0,) for value in values if value is not None]
    return all(part is None or isinstance(part, str) for parts in texts for part in parts)


def _is_text(cells: list[Any]) -> bool:
    return all(cell is None or isinstance(cell, str) for cell in cells) and any(cell is not None for cell in cells)
