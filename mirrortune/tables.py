# SPDX-License-Identifier: Apache-2.0
"""Reads one tabular file (csv, tsv, json, jsonl, parquet, arrow, txt; compressed by gzip or not) into an Arrow table,
with the line of whatever is wrong with it.

csv and json go through the standard library rather than Arrow's readers because these name neither the line nor the
cell, and guess types (a column of dates, of "1", of "NA") that a text column must not have.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mirrortune.errors import DataError
from mirrortune.locations import TABLE_SUFFIXES, table_suffix

# Cells of the csv module are limited to 128 KiB by default; documents are longer.
_CELL_LIMIT = 1 << 30


def read_table(path: Path, encoding: str = "utf-8") -> pa.Table:
    """The rows of one file.

    Args:
        path: a .csv, .tsv, .json, .jsonl, .parquet, .arrow or .txt (a row each line) file, or one of them with .gz.
        encoding: of the text formats; a byte order mark is dropped.

    Returns:
        A table; all cells of csv and tsv are strings, empty cells are null.

    Raises:
        DataError: if the file is missing, empty, undecodable, truncated or malformed; with its line where there is one.
    """
    if not path.is_file():
        siblings = sorted(p.name for p in path.parent.glob("*")) if path.parent.is_dir() else []
        raise DataError(
            str(path),
            "no such file",
            allowed=f"files beside it: {', '.join(siblings[:12])}" if siblings else None,
            fix="Check the path given to --data",
        )
    reader = READERS.get(table_suffix(path) or "")
    if reader is None:
        raise DataError(str(path), f"unknown file type '{path.suffix}'", allowed=", ".join(READERS))
    if path.stat().st_size == 0:
        raise DataError(str(path), "the file is empty", fix="Give it a header and rows")
    table = reader(path, encoding)
    if table.num_rows == 0:
        raise DataError(str(path), "the file has no rows", fix="Give it at least one row below the header")
    return table


def _read_parquet(path: Path, encoding: str) -> pa.Table:
    try:
        return pq.read_table(_bytes(path)) if path.suffix.lower() == ".gz" else pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            str(path), f"not a whole parquet file ({_first_line(error)})", fix="Copy or download it again"
        ) from error


def _read_arrow(path: Path, encoding: str) -> pa.Table:
    data = _bytes(path)
    try:
        opened = pa.ipc.open_file(data) if data[:6] == b"ARROW1" else pa.ipc.open_stream(data)
        return opened.read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            str(path), f"not a whole arrow file ({_first_line(error)})", fix="Copy or download it again"
        ) from error


def _read_text(path: Path, encoding: str) -> pa.Table:
    lines = [line for line in _decode(path, encoding).split("\n") if line.strip()]
    return pa.table({"text": pa.array(lines, pa.string())})


def _read_delimited(path: Path, encoding: str) -> pa.Table:
    text = _decode(path, encoding)
    delimiter = _delimiter(path, text.split("\n", 1)[0])
    rows = _parse_rows(path, text, delimiter)
    try:
        _, header = next(rows)
    except StopIteration:
        raise DataError(str(path), "the file has no header line") from None
    names = [name.strip() for name in header]
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated:
        raise DataError(f"{path}:1", f"column name {repeated[0]!r} stands twice in the header", fix="Rename one")
    columns: list[list[str | None]] = [[] for _ in names]
    for line, cells in rows:
        if not cells:
            continue  # a blank line
        if len(cells) != len(names):
            raise DataError(
                f"{path}:{line}",
                f"{len(cells)} cells in a row of a table with {len(names)} columns",
                fix="Quote cells that contain the delimiter, or correct the row",
            )
        for column, cell in zip(columns, cells, strict=True):
            column.append(cell if cell != "" else None)
    return pa.table({n: pa.array(c, pa.string()) for n, c in zip(names, columns, strict=True)})


def _delimiter(path: Path, header_line: str) -> str:
    # Semicolons and tabs are common in files called .csv; the header has no prose to mislead the count.
    return "\t" if table_suffix(path) == ".tsv" else max(",;\t|", key=header_line.count)


def delimiter_of(path: Path, encoding: str) -> tuple[list[str], str]:
    """Column names and delimiter of a csv or tsv file, of which the first line is read; DataError if there is none."""
    known = "utf-8-sig" if encoding.lower().replace("_", "-") == "utf-8" else encoding
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    with opened(path, "rt", encoding=known) as file:
        line = file.readline().rstrip("\r\n")
    if not line:
        raise DataError(str(path), "the file has no header line")
    delimiter = _delimiter(path, line)
    return next(csv.reader([line], delimiter=delimiter)), delimiter


def _parse_rows(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(_CELL_LIMIT)
    # Not str.splitlines, which also breaks at characters that occur in prose (U+2028, U+0085, form feed).
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        start = reader.line_num + 1  # where a quote that is never closed was opened
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{path}:{start}",
                f"malformed row ({error})",
                fix='Close the quote, or double quotes in cells ("")',
            ) from error
        yield reader.line_num, cells


def _read_json(path: Path, encoding: str) -> pa.Table:
    text = _decode(path, encoding)
    if not text.lstrip().startswith("["):
        return _read_json_lines(path, encoding)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}", f"not valid JSON ({error.msg})", fix="Correct the line") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise DataError(str(path), f"not data ({_first_line(error)})", fix="Correct the file") from error
    return _from_objects(path, rows)


def _read_json_lines(path: Path, encoding: str) -> pa.Table:
    rows = []
    for number, line in enumerate(_decode(path, encoding).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", None) or _first_line(error)
            raise DataError(
                f"{path}:{number}", f"not valid JSON ({reason})", allowed="one JSON object a line"
            ) from error
    return _from_objects(path, rows)


def _from_objects(path: Path, rows: list[Any]) -> pa.Table:
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(
                f"{path} row {number}", f"got {type(row).__name__}", allowed="JSON objects, column -> value"
            )
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    arrays = {}
    for name, values in columns.items():
        try:
            arrays[name] = pa.array(values)
        except UnicodeEncodeError as error:
            raise DataError(str(path), f"column '{name}' holds half a character ({_first_line(error)})") from error
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise DataError(
                str(path), f"column '{name}' mixes types ({_first_line(error)})", fix="Give every row the same type"
            ) from error
    return pa.table(arrays)


def _bytes(path: Path) -> bytes:
    """What a file holds, unpacked."""
    data = path.read_bytes()
    if path.suffix.lower() != ".gz":
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            str(path), f"not a whole gzip file ({_first_line(error)})", fix="Copy or download it again"
        ) from error


def _decode(path: Path, encoding: str) -> str:
    data = _bytes(path)
    try:
        text = data.decode("utf-8-sig" if encoding.lower().replace("_", "-") == "utf-8" else encoding)
    except LookupError as error:
        raise DataError(
            "data.encoding", f"unknown encoding '{encoding}'", allowed="a Python codec such as latin-1"
        ) from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}",
            f"byte 0x{data[error.start]:02x} at offset {error.start} is not {encoding}",
            fix="Save the file as UTF-8, or name its encoding with data.encoding=latin-1",
        ) from error
    return text.replace("\r\n", "\n")


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:160] if str(error) else type(error).__name__


READERS: dict[str, Callable[[Path, str], pa.Table]] = {
    ".csv": _read_delimited,
    ".tsv": _read_delimited,
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".txt": _read_text,
}
assert tuple(READERS) == TABLE_SUFFIXES
