# SPDX-License-Identifier: Apache-2.0
"""Read tabular files (csv, tsv, json, jsonl, parquet, arrow, txt, conll, conllu; gzipped or not) into Arrow tables.

csv is parsed by the standard library instead of Arrow: ``pyarrow.csv`` gives no line numbers of rows, accepts quotes
that are never closed, and cannot drop the empty cells that spreadsheets append. Files are read part by part, except for
JSON arrays.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mirrortune.data.files.arrow import problem_field, text_array
from mirrortune.data.files.conll import read_tagged_words, read_treebank
from mirrortune.data.files.json_files import read_json_file, read_json_lines
from mirrortune.data.files.json_layouts import is_json_object
from mirrortune.data.files.row_places import FileRows, IntArray
from mirrortune.data.files.tables import PART_ROWS, PART_SIZE, Part, join_parts, line_numbers, on_disk, parts_of
from mirrortune.data.files.text_files import (
    is_gzipped,
    lines_of,
    not_permitted,
    open_bytes,
    reading_errors,
)
from mirrortune.errors import DataError, first_line
from mirrortune.system.disk import leave_room
from mirrortune.system.paths import TABLE_SUFFIXES, TAGGED_SUFFIXES, cache_folder, is_system, table_suffix

# The csv module limits cells to 128 KiB by default; documents are longer.
_CELL_LIMIT = 1 << 28
_SEPARATOR = re.compile(r'"?sep=(.)"?', re.IGNORECASE)  # first line of some Excel exports
_BLOCK = 1 << 24  # bytes decompressed at a time
_LOOKED_AT = 100  # lines of a .txt file that may be a table
_HEADERS = frozenset(("text", "sentence", "review", "label", "labels", "class", "category", "target", "sentiment"))


def read_table(path: Path, encoding: str = "utf-8") -> pa.Table:
    """Read the rows of one file; see :func:`read_rows`."""
    return read_rows(path, encoding)[0]


def read_rows(path: Path, encoding: str = "utf-8") -> tuple[pa.Table, FileRows]:
    """Read the rows of one file and their line numbers.

    Args:
        path: a .csv, .tsv, .json, .jsonl, .parquet, .arrow or .txt (a row per line) file, one of tagged words (.conll,
            .bio, .iob, .conllu), or one of them with .gz.
        encoding: of the text formats; a byte order mark is dropped.

    Returns:
        A table; all cells of csv and tsv are strings, empty cells are null. A column that cannot be read, such as one
        of mixed types, is marked by :func:`mirrortune.data.files.arrow.problem_field`.

    Raises:
        DataError: if the file is missing, empty, undecodable, truncated or malformed; names the line if there is one.
    """
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "not a regular file"
        raise DataError(str(path), f"it is {what}, and a table is a file", fix="Check the path given to --data")
    if not path.is_file():
        siblings = (
            sorted(p.name for p in path.parent.glob("*") if not is_system(p.name)) if path.parent.is_dir() else []
        )
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
    lines: list[IntArray | None] = []

    def parts() -> Iterator[pa.Table]:
        for part, begins in reader(path, encoding):
            lines.append(begins)
            yield part

    table = join_parts(parts(), source=str(path))
    if table.num_rows == 0:
        raise DataError(str(path), "the file has no rows", fix="Give it at least one row below the header")
    known = [part for part in lines if part is not None]
    return table, FileRows(name=str(path), count=table.num_rows, lines=np.concatenate(known) if known else None)


def _read_parquet(path: Path, encoding: str) -> Iterator[Part]:
    with _arrow_errors(path, "parquet"), pq.ParquetFile(pa.BufferReader(_mapped(path))) as file:
        schema, facts = file.schema_arrow, file.metadata
        yield _decoded(_unrepeated(path, schema.empty_table())), None
        size = sum(facts.row_group(i).total_byte_size for i in range(facts.num_row_groups))
        rows = max(1, min(PART_ROWS, PART_SIZE * facts.num_rows // max(1, size)))  # a few, if they are images
        for batch in file.iter_batches(batch_size=rows):
            part = pa.Table.from_batches([batch]).replace_schema_metadata(schema.metadata)
            yield _decoded(_unrepeated(path, part)), None


def _read_arrow(path: Path, encoding: str) -> Iterator[Part]:
    with _arrow_errors(path, "arrow"):
        data = _mapped(path)
        opened = pa.ipc.open_file(data) if data[:6].to_pybytes() == b"ARROW1" else pa.ipc.open_stream(data)
        found = _unrepeated(path, opened.read_all())
        yield _decoded(found.select(found.column_names)), None


def _unrepeated(path: Path, table: pa.Table) -> pa.Table:
    """Return the table with one unreadable column in place of columns that have the same name."""
    names = table.column_names
    if len({*names}) == len(names):
        return table
    arrays, fields = [], []
    for name in dict.fromkeys(names):
        is_broken = names.count(name) > 1
        arrays.append(pa.nulls(table.num_rows) if is_broken else table.column(name))
        fields.append(_repeated(str(path), name) if is_broken else table.schema.field(name))
    return pa.table(arrays, schema=pa.schema(fields, metadata=table.schema.metadata))


def _decoded(table: pa.Table) -> pa.Table:
    """Return the table with plain columns in place of dictionary-encoded ones, such as those of pandas' categories."""
    for place, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            plain = field.with_type(field.type.value_type)
            table = table.set_column(place, plain, table.column(place).cast(plain.type))
    return table


@contextmanager
def _arrow_errors(path: Path, kind: str) -> Iterator[None]:
    """Raise the errors of a damaged file as a DataError."""
    try:
        yield
    except PermissionError as error:
        raise not_permitted(path) from error
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a column name that is not UTF-8
        raise DataError(
            str(path), f"not a whole {kind} file ({first_line(error)})", fix="Copy or download it again"
        ) from error


def _read_text(path: Path, encoding: str) -> Iterator[Part]:
    refuse_cells(path, encoding)
    lines = ((number, line.removesuffix("\n")) for number, line in enumerate(lines_of(path, encoding, "\n"), start=1))
    for part in parts_of(((number, line), len(line)) for number, line in lines if line.strip()):
        yield pa.table({"text": text_array([line for _, line in part])}), line_numbers(part)


def refuse_cells(path: Path, encoding: str) -> None:
    """Raise a DataError for a table that is called .txt, as Excel's export of Unicode text is.

    Each of its lines would be a text. Lines of prose have the same number of commas only by chance, so a table with
    another sign than tabs is known by its header too.
    """
    begin, size = [], 0
    for line in itertools.islice(lines_of(path, encoding, "\n"), _LOOKED_AT):
        begin.append(line)
        size += len(line)
        if size > _BLOCK:
            break
    for sign, what, suffix in (("\t", "tabs", ".tsv"), (",", "commas", ".csv"), (";", "semicolons", ".csv")):
        try:
            rows = [cells for cells in csv.reader(begin, delimiter=sign) if cells]
        except csv.Error:  # a cell is too long
            continue
        rows = rows[:-1] if len(begin) == _LOOKED_AT else rows  # the last one may go on
        header, widths = rows[0] if rows else [], {len(cells) for cells in rows}
        is_headed = sign == "\t" or not _HEADERS.isdisjoint(name.strip().lower() for name in header)
        if len(rows) > 2 and widths == {len(header)} and len(header) > 1 and all(header) and is_headed:
            raise DataError(
                str(path), f"its lines are not texts but {len(header)} cells separated by {what}, as in "
                f"{begin[0].strip()[:60]!r}", allowed="a text per line in a .txt file",
                fix=f"Name it {suffix}, with names of columns in the first line; texts with {what} go into jsonl",
            )  # fmt: skip


def _read_delimited(path: Path, encoding: str) -> Iterator[Part]:
    lines = lines_of(path, encoding, "")
    delimiter, begin = _delimiter(path, lines)
    rows = _parse_rows(path, itertools.chain(begin, lines), delimiter)
    try:
        _, header = next(row for row in rows if row[1] and not _SEPARATOR.fullmatch(delimiter.join(row[1])))
    except StopIteration:
        raise DataError(str(path), "the file has no header line") from None
    names, width = _column_names(header), len(header)
    fields = {n: _repeated(f"{path}:1", n) for n in names if names.count(n) > 1}
    unnamed = {place for place, name in enumerate(header) if not name.strip()}
    for part in parts_of(_whole_rows(path, rows, width)):
        columns = list(zip(*(cells for _, cells in part), strict=True)) if part else [()] * width
        arrays, schema = {}, []
        for place, name in enumerate(names):
            if (place in unnamed and not any(columns[place])) or name in arrays:
                continue  # Excel writes empty columns; a column whose name is not unique is not read
            is_broken = name in fields
            arrays[name] = pa.nulls(len(part)) if is_broken else text_array([c or None for c in columns[place]])
            schema.append(fields[name] if is_broken else pa.field(name, arrays[name].type))
        yield pa.table(list(arrays.values()), schema=pa.schema(schema)), line_numbers(part)


def _column_names(header: list[str]) -> list[str]:
    """Return the column names of a header line; an empty one is called by its position, such as ``column 3``."""
    return [name.strip() or f"column {place}" for place, name in enumerate(header, start=1)]


def _repeated(where: str, name: str) -> pa.Field:
    return problem_field(name, where, f"column name {name!r} appears twice in the header", "Rename one")


def _whole_rows(
    path: Path, rows: Iterable[tuple[int, list[str]]], width: int
) -> Iterator[tuple[tuple[int, list[str]], int]]:
    """Yield rows of ``width`` cells and their sizes, dropping blank rows and empty cells after the last column.

    Spreadsheets append both.
    """
    blank: list[tuple[tuple[int, list[str]], int]] = []
    for line, cells in rows:
        if not cells:  # a blank line
            continue
        if len(cells) > width and not any(cells[width:]):
            cells = cells[:width]  # noqa: PLW2901
        if len(cells) != width:
            raise DataError(
                f"{path}:{line}",
                f"{len(cells)} cell{'s' * (len(cells) != 1)} in a row of a table with {width} columns",
                fix="Quote cells that contain the delimiter, or correct the row",
            )
        row = (line, cells), sum(map(len, cells))
        if width > 1 and not any(cells):
            blank.append(row)
            continue
        yield from blank
        blank = []
        yield row


def _delimiter(path: Path, lines: Iterator[str]) -> tuple[str, list[str]]:
    """Find the delimiter of a table.

    Returns:
        The delimiter, and the lines read to find it: the header, preceded by any blank lines and Excel's ``sep=;``.
    """
    begin: list[str] = []
    named = None
    for line in lines:
        begin.append(line)
        found = _SEPARATOR.fullmatch(line.rstrip("\r\n"))
        if line.strip() and found is None:
            break
        named = found or named
    if begin and is_json_object(begin[-1]):
        raise DataError(str(path), "its lines are JSON objects, not cells", fix="Name it .jsonl")
    if named is not None or table_suffix(path) == ".tsv" or not begin:
        return named[1] if named else "\t", begin

    # Semicolons and tabs are common in files called .csv; a delimiter within quotes does not count.
    def count(sign: str) -> int:
        try:
            return len(next(csv.reader(begin[-1:], delimiter=sign), []))
        except csv.Error:  # a cell is too long: this sign is not the delimiter
            return 0

    return max(",;\t|", key=count), begin


def header_of(path: Path, encoding: str) -> tuple[list[str], list[str], str, int]:
    """Return the cells of the header of a csv or tsv file, the column names they stand for (:func:`read_rows` gives the
    same), the delimiter, and the number of lines before the header.

    Only the first lines are read.

    Raises:
        DataError: there is no header.
    """
    delimiter, begin = _delimiter(path, lines_of(path, encoding, "\n"))
    if not begin or not begin[-1].strip():
        raise DataError(str(path), "the file has no header line")
    header = next(csv.reader([begin[-1].rstrip("\n")], delimiter=delimiter))
    return header, _column_names(header), delimiter, len(begin) - 1


def _parse_rows(path: Path, lines: Iterable[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(_CELL_LIMIT)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        start = reader.line_num + 1  # the line of the opening quote, if it is never closed
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
        if delimiter == "\t" and reader.line_num > start:
            _refuse_swallowed_rows(path, start, cells)
        yield start, cells


def _refuse_swallowed_rows(path: Path, line: int, cells: list[str]) -> None:
    """Raise a DataError if a quoted cell holds whole rows: after its line breaks, it has cells and tabs as rows have.

    Tables with tabs are often written without quoting. A cell that begins with a quotation mark then opens a quote,
    which the next cell that ends with one closes: the rows between would be lost in silence. A quotation mark inside
    the cell was doubled, as only tables with quoting have it.
    """
    wanted = len(cells) - 1
    for place, cell in enumerate(cells):
        first, *others = cell.split("\n")
        tabs = [wanted] * (len(others) - 1) + [place]
        fits = first.count("\t") == wanted - place and [other.count("\t") for other in others] == tabs
        fits = fits and '"' not in cell and all(part.strip() for other in others for part in other.split("\t"))
        if wanted and others and fits:
            raise DataError(
                f"{path}:{line}", f"the quotation mark at the start of cell {place + 1} is closed {len(others)} lines "
                "below, and the lines between look like rows", allowed='cells with quotation marks written "so, with '
                '""two"" for each"', fix="Quote the cell, or remove its quotation mark; or, if it holds these lines, "
                "write jsonl",
            )  # fmt: skip


def _mapped(path: Path) -> pa.Buffer:
    """Return the content of a file as a memory map; a gzipped one is first decompressed to an unnamed file."""
    if not is_gzipped(path):
        return pa.memory_map(str(path)).read_buffer()
    with reading_errors(path), open_bytes(path) as content:
        return on_disk(lambda file: _decompress(path, content, file))


def _decompress(path: Path, content: IO[bytes], file: IO[bytes]) -> None:
    while block := content.read(_BLOCK):
        if file.tell():  # small files always fit
            leave_room(cache_folder(), f"what {path} unpacks to")
        file.write(block)


READERS: dict[str, Callable[[Path, str], Iterator[Part]]] = {
    ".csv": _read_delimited,
    ".tsv": _read_delimited,
    ".json": read_json_file,
    ".jsonl": read_json_lines,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".txt": _read_text,
    **dict.fromkeys(TAGGED_SUFFIXES, read_tagged_words),
    ".conllu": read_treebank,
}
assert tuple(READERS) == TABLE_SUFFIXES
