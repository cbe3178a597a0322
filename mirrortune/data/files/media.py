# SPDX-License-Identifier: Apache-2.0
"""Access the files (images, audio) in a column, whose cells hold their content or their paths."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from mirrortune.data.dataset import DataSet, Split
from mirrortune.data.files.row_places import RowPlaces
from mirrortune.errors import DataError, MirrortuneError, first_line
from mirrortune.system.paths import shown_path

FILE_ROLES = ("image", "audio")
"""Roles (in ``Task.columns``) of columns whose cells are files."""
_SHOWN = 200  # characters of a path in a message
_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileCells:
    """The files in a column, one per row.

    Attributes:
        cells: bytes, paths, or the datasets library's structs of ``bytes`` and ``path``.
        folder: base folder of relative paths.
        places: locations of the rows, for messages.
        role: kind of file, for messages.
        readable: formats that can be read, for messages.
        is_contained: whether files outside ``folder`` are refused.
    """

    cells: pa.ChunkedArray
    folder: Path | None
    places: RowPlaces
    role: str
    readable: str
    is_contained: bool = False

    @classmethod
    def of(cls, split: Split, column: str, *, role: str, readable: str) -> FileCells:
        """Return the files of one column of ``split``."""
        return cls(
            cells=split.table.column(column), folder=split.folder, places=split.places, role=role, readable=readable,
            is_contained=split.is_contained,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.cells)

    def open(self, row: int) -> io.BytesIO | str:
        """Return the content or the path of the file of one row, for a decoder.

        Raises:
            ValueError: if there is none, or it is not a regular file (a pipe would never end).
            DataError: if it is outside the folder, and ``is_contained``.
        """
        found = self._found(row)
        if found is None:
            raise ValueError(f"no {self.role}")
        if isinstance(found, bytes):
            return io.BytesIO(found)
        if self.is_contained and self._leads_out(found, {}):
            raise DataError(
                self.places.where(row), f"its {self.role} '{shown_path(str(found))}' lies outside the folder of"
                " the data, which data.contained forbids",
                fix="Copy the file into the folder, remove the row, or set data.contained=false",
            )  # fmt: skip
        if found.exists() and not found.is_file():
            raise ValueError("it is not a regular file")
        return str(found)

    def size(self, row: int) -> int | None:
        """Return the size of the file of one row in bytes; None if there is none."""
        found = self._found(row)
        if found is None or isinstance(found, bytes):
            return None if found is None else len(found)
        return _size(found)

    def outside(self) -> list[int]:
        """Return the rows whose files are outside the folder, by their paths or through links."""
        real: dict[Path, Path] = {}
        found = ((row, self._found(row)) for row in range(len(self)))
        return [row for row, place in found if isinstance(place, Path) and self._leads_out(place, real)]

    def named(self) -> list[str]:
        """Return the name and the size of the file of each row whose cell holds a path."""
        found = (self._found(row) for row in range(len(self)))
        places = (place for place in found if isinstance(place, Path))
        return [f"{place.name} {_size(place)}" for place in places]

    def unreadable(self, row: int, error: Exception | str) -> MirrortuneError:
        """Return the error for a file that could not be decoded, because of an exception or for the reason given."""
        if isinstance(error, MirrortuneError):
            return error
        value: Any = self.cells[row].as_py()
        path = value.get("path") or value.get("bytes") if isinstance(value, dict) else value
        name = f" '{path[:_SHOWN]}{'...' * (len(path) > _SHOWN)}'" if isinstance(path, str) else ""
        reason = error if isinstance(error, str) else f"{type(error).__name__}: {first_line(error)}"
        reason = "it is missing" if value is None else reason
        if isinstance(path, str) and isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ENAMETOOLONG):
            if _URL.match(path):
                reason = "it is a url; download the file and name that"
            elif len(path) > _SHOWN:
                reason = "no file has this name; content belongs into a column of bytes, in parquet, not of base64"
        if self.places.source.startswith("--"):  # a flag, whose value is the only file
            problem = f"{path} cannot be read ({reason})"
            return DataError(self.places.source, problem, allowed=self.readable, fix="Give another file")
        return DataError(
            self.places.where(row), f"its {self.role}{name} cannot be read ({reason})",
            allowed=f"{self.readable}; paths are relative to the table's folder", fix="Replace or remove the row",
        )  # fmt: skip

    def path(self, row: int) -> str:
        """Return the location of the file of one row, for messages."""
        found = self._found(row)
        return shown_path(str(found)) if isinstance(found, Path) else "in the table"

    def _found(self, row: int) -> bytes | Path | None:
        """Return the content or the path of the file in the cell of a row."""
        value = self.cells[row].as_py()
        if isinstance(value, dict):
            value = value["path"] if value.get("bytes") is None else value["bytes"]
        if value is None or isinstance(value, bytes):
            return value
        path = Path(value)
        with suppress(RuntimeError):  # ~ of an unknown user: there is no such file
            path = path.expanduser()
        return path if path.is_absolute() or self.folder is None else self.folder / path

    def _leads_out(self, path: Path, real: dict[Path, Path]) -> bool:
        """Return whether a path leads out of the folder; ``real`` caches resolved folders."""
        inside = _real(self.folder, real) if self.folder is not None else _downloaded()
        with suppress(OSError, ValueError):  # no file can have such a name
            where = _real(path.parent, real) / path.name
            return not Path(os.path.realpath(where) if where.is_symlink() else where).is_relative_to(inside)
        return False


def remarks_on(data: DataSet, columns: Sequence[tuple[str, str]]) -> list[str]:
    """Return remarks on files of a data set that were left out or are outside its folder.

    Args:
        data: the data set.
        columns: (role, column), as of ``Task.columns``.
    """
    lines = list(dict.fromkeys(remark for split in data.splits.values() for remark in split.remarks))
    outside = [
        (split, cells, row)
        for split in data.splits.values()
        for role, column in columns
        if role in FILE_ROLES and column in split.table.column_names and not split.is_contained
        for cells in [FileCells.of(split, column, role=role, readable="")]
        for row in cells.outside()
    ]
    if outside:
        split, cells, row = outside[0]
        count = "a file lies" if len(outside) == 1 else f"{len(outside):,} files lie"
        first = f"{split.places.where(row)}: {cells.path(row)}"
        lines.append(f"{count} outside the folder of the data ({first}); data.contained=true refuses them")
    return lines


def named_files(data: DataSet, columns: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return a hash of the names and sizes of the files that the rows of each split name; empty without such files.

    Rows of a stream are left out, since most of them have not been read yet.

    Args:
        data: the data set.
        columns: (role, column), as of ``Task.columns``.
    """
    found = {}
    for name, split in data.splits.items():
        own = [FileCells.of(split, column, role=role, readable="") for role, column in columns
               if role in FILE_ROLES and column in split.table.column_names and split.stream is None]  # fmt: skip
        lines = [line for cells in own for line in cells.named()]
        if lines:
            found[name] = hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()
    return found


def _size(path: Path) -> int | None:
    """Return the size of a file in bytes; None if there is none, or no file can have such a name."""
    with suppress(OSError, ValueError):
        return path.stat().st_size if path.is_file() else None
    return None


def _real(folder: Path, known: dict[Path, Path]) -> Path:
    if folder not in known:
        known[folder] = Path(os.path.realpath(folder))
    return known[folder]


def _downloaded() -> Path:
    """Return the folder of files from the Hub."""
    from huggingface_hub import constants  # noqa: PLC0415

    return Path(os.path.realpath(constants.HF_HOME))
