# SPDX-License-Identifier: Apache-2.0
"""Reads one tabular file (csv, tsv, json, jsonl, parquet, arrow, txt; compressed by gzip or not) into an Arrow table,
with the line of whatever is wrong with it.

csv and json go through the standard library rather than Arrow's readers because these name neither the line nor the
cell, and guess types (a column of dates, of "1", of "NA") that a text column must not have. Files are read part by
part.
"""

from __future__ import annotations

import csv
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mirrortune.arrow_arrays import text_array
from mirrortune.errors import DataError
from mirrortune.json_rows import JSONArrayError, array_elements
from mirrortune.locations import TABLE_SUFFIXES, table_suffix
from mirrortune.table_parts import join_parts, on_disk
from mirrortune.text_files import blocks_of, first_line, is_packed, lines_of, open_bytes, unpacking

# Cells of the csv module are limited to 128 KiB by default; documents are longer.
_CELL_LIMIT = 1 << 30
# What is read at a time: rows, and characters.
_PART_ROWS, _PART_SIZE = 65_536, 1 << 24


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
        siblings = sorted(p.name for p in path.parent.glob("[!.]*")) if path.parent.is_dir() else []
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
    try:
        table = join_parts(reader(path, encoding))
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(
            str(path), f"rows far apart have different types ({first_line(error)})", fix="Give every row the same type"
        ) from error
    if table.num_rows == 0:
        raise DataError(str(path), "the file has no rows", fix="Give it at least one row below the header")
    return table


def _read_parquet(path: Path, encoding: str) -> Iterator[pa.Table]:
    try:
        with pq.ParquetFile(pa.BufferReader(_mapped(path))) as file:
            schema, facts = file.schema_arrow, file.metadata
            yield schema.empty_table()
            size = sum(facts.row_group(i).total_byte_size for i in range(facts.num_row_groups))
            rows = max(1, min(_PART_ROWS, _PART_SIZE * facts.num_rows // max(1, size)))  # of images, a few
            for batch in file.iter_batches(batch_size=rows):
                yield pa.Table.from_batches([batch]).replace_schema_metadata(schema.metadata)
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a name that is no text
        raise DataError(
            str(path), f"not a whole parquet file ({first_line(error)})", fix="Copy or download it again"
        ) from error


def _read_arrow(path: Path, encoding: str) -> Iterator[pa.Table]:
    try:
        data = _mapped(path)
        opened = pa.ipc.open_file(data) if data[:6].to_pybytes() == b"ARROW1" else pa.ipc.open_stream(data)
        found = opened.read_all()
        yield found.select(found.column_names)
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a name that is no text
        raise DataError(
            str(path), f"not a whole arrow file ({first_line(error)})", fix="Copy or download it again"
        ) from error


def _read_text(path: Path, encoding: str) -> Iterator[pa.Table]:
    lines = (line.removesuffix("\n") for line in lines_of(path, encoding, "\n"))
    for part in _parts((line, len(line)) for line in lines if line.strip()):
        yield pa.table({"text": text_array(part)})


def _read_delimited(path: Path, encoding: str) -> Iterator[pa.Table]:
    lines = lines_of(path, encoding, "")
    header_line = next(lines, "")
    delimiter = _delimiter(path, header_line)
    rows = _parse_rows(path, itertools.chain([header_line] if header_line else [], lines), delimiter)
    try:
        _, header = next(rows)
    except StopIteration:
        raise DataError(str(path), "the file has no header line") from None
    names = [name.strip() for name in header]
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated:
        raise DataError(f"{path}:1", f"column name {repeated[0]!r} stands twice in the header", fix="Rename one")

    def cells_of_rows() -> Iterator[tuple[list[str], int]]:
        for line, cells in rows:
            if cells and len(cells) != len(names):  # no cells: a blank line
                raise DataError(
                    f"{path}:{line}",
                    f"{len(cells)} cells in a row of a table with {len(names)} columns",
                    fix="Quote cells that contain the delimiter, or correct the row",
                )
            if cells:
                yield cells, sum(map(len, cells))

    for part in _parts(cells_of_rows()):
        columns = zip(*part, strict=True) if part else ((),) * len(names)
        yield pa.table({n: text_array([c or None for c in column]) for n, column in zip(names, columns, strict=True)})


def _parts(rows: Iterable[tuple[Any, int]]) -> Iterator[list[Any]]:
    """Rows, which come with their sizes, in parts of a size that memory can hold; the first one may be empty."""
    part: list[Any] = []
    size, is_first = 0, True
    for row, more in rows:
        part.append(row)
        size += more
        if size >= _PART_SIZE or len(part) >= _PART_ROWS:
            yield part
            part, size, is_first = [], 0, False
    if part or is_first:
        yield part


def _delimiter(path: Path, header_line: str) -> str:
    # Semicolons and tabs are common in files called .csv; the header has no prose to mislead the count.
    return "\t" if table_suffix(path) == ".tsv" else max(",;\t|", key=header_line.count)


def delimiter_of(path: Path, encoding: str) -> tuple[list[str], str]:
    """Column names and delimiter of a csv or tsv file, of which the first line is read; DataError if there is none."""
    line = next(lines_of(path, encoding, "\n"), "").rstrip("\n")
    if not line:
        raise DataError(str(path), "the file has no header line")
    delimiter = _delimiter(path, line)
    return next(csv.reader([line], delimiter=delimiter)), delimiter


def _parse_rows(path: Path, lines: Iterable[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(_CELL_LIMIT)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
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


def _read_json(path: Path, encoding: str) -> Iterator[pa.Table]:
    start = next((text for block in blocks_of(path, encoding) if (text := block.lstrip())), "")
    if not start.startswith("["):
        yield from _read_json_lines(path, encoding)
        return
    try:
        yield from _in_parts(path, array_elements(blocks_of(path, encoding)))
    except JSONArrayError as error:
        raise DataError(f"{path}:{error.line}", f"not valid JSON ({error})", fix="Correct the line") from error


def _read_json_lines(path: Path, encoding: str) -> Iterator[pa.Table]:
    return _in_parts(path, _json_rows(path, encoding))


def _in_parts(path: Path, rows: Iterable[tuple[Any, int]]) -> Iterator[pa.Table]:
    """Tables of JSON objects, which come with their sizes."""
    done = 0
    for part in _parts(rows):
        yield _from_objects(path, part, done + 1)
        done += len(part)


def _json_rows(path: Path, encoding: str) -> Iterator[tuple[Any, int]]:
    for number, line in enumerate(lines_of(path, encoding, "\n"), start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line), len(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", None) or first_line(error)
            raise DataError(
                f"{path}:{number}",
                f"not valid JSON ({reason})",
                allowed="one JSON object a line"
                + (", or an array of objects" if table_suffix(path) == ".json" else ""),
            ) from error


def _from_objects(path: Path, rows: list[Any], first: int) -> pa.Table:
    for number, row in enumerate(rows, start=first):
        if not isinstance(row, dict):
            raise DataError(
                f"{path} row {number}", f"got {type(row).__name__}", allowed="JSON objects, column -> value"
            )
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    arrays = {}
    for name, values in columns.items():
        try:
            arrays[name] = text_array(values) if _is_text(values) else pa.array(values)
        except UnicodeEncodeError as error:
            raise DataError(str(path), f"column '{name}' holds half a character ({first_line(error)})") from error
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise DataError(
                str(path), f"column '{name}' mixes types ({first_line(error)})", fix="Give every row the same type"
            ) from error
    return pa.table(arrays)


def _is_text(cells: list[Any]) -> bool:
    return all(cell is None or isinstance(cell, str) for cell in cells) and any(cell is not None for cell in cells)


def _mapped(path: Path) -> pa.Buffer:
    """What a file holds, on disk: mapped, or unpacked into a file without a name first."""
    if not is_packed(path):
        return pa.memory_map(str(path)).read_buffer()
    with unpacking(path), open_bytes(path) as packed:
        return on_disk(lambda file: shutil.copyfileobj(packed, file))


READERS: dict[str, Callable[[Path, str], Iterator[pa.Table]]] = {
    ".csv": _read_delimited,
    ".tsv": _read_delimited,
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".txt": _read_text,
}
assert tuple(READERS) == TABLE_SUFFIXES
