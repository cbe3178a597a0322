# SPDX-License-Identifier: Apache-2.0
"""Recognise JSON files that hold all rows in one object: read those of columns, and say how to convert others."""

from __future__ import annotations

import contextlib
import itertools
import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mirrortune.data.files.splits import SPLIT_NAMES
from mirrortune.data.files.text_files import is_gzipped
from mirrortune.errors import DataError
from mirrortune.system.paths import table_suffix

# Keys under which a file may hold its rows: those of its splits, and common ones.
_KEYS = {*itertools.chain(*SPLIT_NAMES.values()), "data", "rows", "records", "examples", "items", "instances"}
_MOST_BLOCKS = 256
_OF_A_SENTENCE = {"tokens", "words"}  # columns whose cells are lists of texts


def only_object(lines: Iterable[str], blocks: Iterable[str]) -> dict[str, Any] | None:
    """Return the object of a JSON file that is its only one; None for one object a line, and for damaged files.

    Args:
        lines: lines of the file, of which two are read.
        blocks: text of the file, which is read if the object has several lines.
    """
    begin = list(itertools.islice((line for line in lines if line.strip()), 2))
    found, is_one = _parsed(begin[0]) if begin else None, len(begin) == 1
    if found is None:
        found, is_one = _parsed("".join(itertools.islice(blocks, _MOST_BLOCKS))), True
    return found if isinstance(found, dict) and is_one else None


def rows_of_columns(path: Path, held: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return the rows of an object that holds a list for each column, as pandas' ``to_dict(orient="list")`` does.

    An object of lists may also be a row: a sentence with its tags, or a conversation with its tools.

    Returns:
        The rows, or None if the object is a row.

    Raises:
        DataError: the lists have different lengths.
    """
    columns = list(held.values())
    if _is_frame(held) or not columns or not all(isinstance(cells, list) and cells for cells in columns):
        return None
    is_flat = not any(isinstance(cell, list | dict) for cells in columns for cell in cells)
    is_sentence = is_flat and any(name.lower() in _OF_A_SENTENCE for name in held)
    if is_sentence or any(_are_rows(cells) for cells in columns) or max(map(len, columns)) < 2:
        return None
    if len(set(map(len, columns))) > 1:
        lengths = ", ".join(f"'{name}' {len(cells):,}" for name, cells in held.items())
        raise DataError(
            str(path), f"one object of columns that have different numbers of cells: {lengths}",
            allowed="a list for each column, all of one length; or a JSON object a row", fix="Correct the columns",
        )  # fmt: skip
    return [dict(zip(held, cells, strict=True)) for cells in zip(*columns, strict=True)]


def is_json_object(line: str) -> bool:
    """Return whether a line is a JSON object that is not empty."""
    return line.lstrip().startswith("{") and bool(_parsed(line))


def refuse_frame(path: Path, row: Any) -> None:
    """Raise a DataError for an object that holds a whole table in one of pandas' layouts."""
    if _is_frame(row):
        raise DataError(
            str(path), "one object for all rows, as to_json of pandas writes it", allowed="one JSON object a row",
            fix="Write it with to_json(..., orient='records', lines=True)",
        )  # fmt: skip


def refuse_annotations(where: str, row: dict[str, Any]) -> None:
    """Raise a DataError for a row of Label Studio's full export, whose labels are deep inside its annotations."""
    found = row.get("annotations")
    if isinstance(row.get("data"), dict) and _are_rows(found) and all("result" in each for each in found or ()):
        raise DataError(
            where, "it is from Label Studio's full JSON export, with the labels inside of lists of annotations",
            allowed="a column of labels beside one of texts",
            fix="Export JSON-MIN or CSV; for spans of text, CONLL2003",
        )  # fmt: skip


def refuse_wrapped_rows(path: Path, row: Any) -> None:
    """Raise a DataError for the only object of a file if it holds lists of rows, such as ``{"data": [...]}``.

    In a file of a row a line, an object that holds a text beside such a list is a row. In other JSON files the text may
    be the version of the data, as in SQuAD's.
    """
    if not isinstance(row, dict) or (
        table_suffix(path) != ".json" and any(isinstance(value, str) for value in row.values())
    ):
        return
    keys = [key for key, value in row.items() if key.lower() in _KEYS and _are_rows(value)]
    if not keys:
        return
    name, is_one = shlex.quote(path.name), len(keys) == 1
    begin, source = (f"gzip -dc {name} | ", "") if is_gzipped(path) else ("", f" {name}")
    commands = [f"{begin}jq -c '.{key}[]'{source} > {'rows' if is_one else f'rows/{key}'}.jsonl" for key in keys]
    raise DataError(
        str(path), f"one object with all rows in {', '.join(map(repr, keys))}",
        allowed="a JSON object a line, or an array of objects",
        fix=f"Take them out: {'; '.join(commands if is_one else ['mkdir rows', *commands])}",
    )  # fmt: skip


def refuse_indented_rows(path: Path, blocks: Iterable[str]) -> None:
    """Raise a DataError for a text in ``blocks`` that is an object of one of these layouts in several lines."""
    row = _parsed("".join(itertools.islice(blocks, _MOST_BLOCKS)))
    refuse_frame(path, row)
    refuse_wrapped_rows(path, row)


def _parsed(text: str) -> Any:
    """Return the content of a JSON text, or None if it is not valid."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    return None


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _is_frame(row: Any) -> bool:
    """Return whether an object holds a whole table in one of pandas' layouts: by columns, by rows, or in parts."""
    if not isinstance(row, dict):
        return False
    if row.keys() == {"columns", "index", "data"}:
        return True
    if not row or not all(isinstance(cells, dict) and cells for cells in row.values()):
        return False
    return any(all(key.isdecimal() for key in keys) for keys in (row, set[str]().union(*row.values())))
