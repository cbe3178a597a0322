# SPDX-License-Identifier: Apache-2.0
"""Read rows to predict that do not form a data set: standard input, and folders of images or audio without classes."""

from __future__ import annotations

import hashlib
import io
import itertools
import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from mirrortune.data.dataset import DataSet, Split, flat, names_and_sizes_sha256
from mirrortune.data.files.arrow import rename_problems, text_array
from mirrortune.data.files.class_folders import AUDIO_SUFFIXES, IMAGE_FORMATS, refuse_lost_links
from mirrortune.data.files.readers import read_rows
from mirrortune.data.files.row_places import FileRows
from mirrortune.data.files.splits import files_by_split
from mirrortune.data.files.tables import join_parts
from mirrortune.data.files.text_files import lines_of
from mirrortune.errors import DataError, counted
from mirrortune.system.atomic import PARTIAL, cannot_write
from mirrortune.system.disk import leave_room
from mirrortune.system.paths import DataPlace, cache_folder, is_system

STDIN = "-"
"""The path of standard input."""
_STDIN_NAME = "standard input"
_PIECE = 1 << 20  # bytes
_LINES = 65_536


def read_loose_files(place: DataPlace) -> DataSet | None:
    """Read a folder of images or recordings that lie in no folders of classes; None for any other data.

    Raises:
        DataError: the place is a single image or recording, or a link leads to no file.
    """
    if not place.is_local or place.kind == "pattern":
        return None
    if place.path().is_file() and place.path().suffix.lower() in (*IMAGE_FORMATS, *AUDIO_SUFFIXES):
        fix = f"Give it as --image {shlex.quote(place.name)}"
        raise DataError(place.name, "it is a single image or recording, not a table", fix=fix)
    if not place.path().is_dir() or files_by_split(place.path()):
        return None
    folder = place.path()
    there = sorted(path for path in folder.iterdir() if not is_system(path.name))
    files, num_folders = [path for path in there if path.is_file()], sum(path.is_dir() for path in there)
    for column, suffixes in (("image", tuple(IMAGE_FORMATS)), ("audio", AUDIO_SUFFIXES)):
        found = [file for file in files if file.suffix.lower() in suffixes]
        refuse_lost_links(folder, (path for path in there if path.suffix.lower() in suffixes))
        if found:
            names, others = [file.name for file in found], len(files) - len(found)
            remarks = [f"{counted(others, 'file')} left out: no {column}"] if others else []
            if num_folders:
                remarks.append(f"{counted(num_folders, 'folder')} left out; predict each by itself")
            table = pa.table({column: text_array(names)})
            split = Split(table=table, source=str(folder), folder=folder, remarks=tuple(remarks))
            digest = names_and_sizes_sha256(found, names)
            return DataSet(splits={"test": split}, origin={"path": str(folder), "sha256": digest})
    return None


def read_stdin(encoding: str) -> tuple[DataSet, bool]:
    """Read standard input: a text on every line, or JSON lines if it begins with ``{``.

    The input is copied to a file first, so that it is read and its errors are reported as for any other file.

    Args:
        encoding: of its text.

    Returns:
        The rows, and whether they are lines of text, whose column has no name of its own.

    Raises:
        DataError: it is empty, or cannot be read.
        ResourceError: the cache folder cannot be written.
    """
    folder, digest = cache_folder(), hashlib.sha256()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(PARTIAL, ".stdin.mt-", folder) as place:
            path = Path(place) / "rows.jsonl"
            given = io.BytesIO() if sys.stdin is None else sys.stdin.buffer  # None if it is closed
            with path.open("wb") as file:
                while piece := given.read(_PIECE):
                    if file.tell():
                        leave_room(folder, _STDIN_NAME)
                    file.write(piece)
                    digest.update(piece)
            split, is_bare = _lines(path, encoding)
    except DataError as error:
        where, problem = (text.replace(str(path), _STDIN_NAME) for text in (error.where, error.problem))
        raise DataError(where, problem, allowed=error.allowed, fix=error.fix) from error
    except OSError as error:
        raise cannot_write(folder, error) from error
    return DataSet(splits={"test": split}, origin={"path": STDIN, "sha256": digest.hexdigest()}), is_bare


def _lines(path: Path, encoding: str) -> tuple[Split, bool]:
    """Return the rows of a copy of standard input, and whether they are lines of text."""
    if next(lines_of(path, encoding, "\n"), None) is None:  # not a byte, or a byte order mark alone
        raise DataError(_STDIN_NAME, "it is empty", allowed="a text on every line, or JSON lines")
    start = next((line.strip() for line in lines_of(path, encoding, "\n") if line.strip()), "")
    if start.startswith("{"):
        table, rows = read_rows(path, encoding)
        table = rename_problems(table, str(path), _STDIN_NAME)
        return Split(table=flat(table), source=_STDIN_NAME, files=(replace(rows, name=_STDIN_NAME),)), False
    # Every line is a row, including blank ones, so that answers can be matched with the lines.
    lines = (line.removesuffix("\n") for line in lines_of(path, encoding, "\n"))
    parts = iter(lambda: list(itertools.islice(lines, _LINES)), [])
    table = join_parts((pa.table({"text": text_array(part)}) for part in parts), source=_STDIN_NAME)
    rows = FileRows(name=_STDIN_NAME, count=table.num_rows, lines=np.arange(1, table.num_rows + 1))
    return Split(table=table, source=_STDIN_NAME, files=(rows,)), True
