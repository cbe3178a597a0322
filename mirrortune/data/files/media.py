# SPDX-License-Identifier: Apache-2.0
"""Columns whose cells are files (images, recordings): encoded, or as paths to them."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from mirrortune.data.dataset import DataSet, Split
from mirrortune.data.files.row_places import RowPlaces
from mirrortune.data.files.text_files import first_line
from mirrortune.errors import DataError, MirrortuneError
from mirrortune.system.paths import shown_path

FILE_ROLES = ("image", "audio")
"""Roles (of ``Task.columns``) of columns whose cells are files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileCells:
    """The files of a column, one a row.

    Attributes:
        cells: bytes, paths, or the datasets library's structs of ``bytes`` and ``path``.
        folder: where relative paths begin.
        places: of the rows, for messages.
        role: what a file holds, for messages.
        readable: which files can be read, for messages.
        is_contained: whether paths that lead out of ``folder`` are refused.
    """

    cells: pa.ChunkedArray
    folder: Path | None
    places: RowPlaces
    role: str
    readable: str
    is_contained: bool = False

    @classmethod
    def of(cls, split: Split, column: str, *, role: str, readable: str) -> FileCells:
        """The files of one column of ``split``."""
        return cls(
            cells=split.table.column(column), folder=split.folder, places=split.places, role=role, readable=readable,
            is_contained=split.is_contained,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.cells)

    def open(self, row: int) -> io.BytesIO | str:
        """The file of one row, as what decodes it takes: its content or its path.

        Raises:
            ValueError: there is none, or it is no regular file (a pipe would never end).
            DataError: it lies outside the folder, and must not.
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
            raise ValueError("it is no regular file")
        return str(found)

    def size(self, row: int) -> int | None:
        """Bytes of the file of one row; None if there is none."""
        found = self._found(row)
        if found is None or isinstance(found, bytes):
            return None if found is None else len(found)
        return found.stat().st_size if found.is_file() else None

    def outside(self) -> list[int]:
        """The rows whose files lie outside the folder, by their paths or through links."""
        real: dict[Path, Path] = {}
        found = ((row, self._found(row)) for row in range(len(self)))
        return [row for row, place in found if isinstance(place, Path) and self._leads_out(place, real)]

    def unreadable(self, row: int, error: Exception | str) -> MirrortuneError:
        """The error for a file that what decodes it refused by ``error``, or that is not fit for the reason given."""
        if isinstance(error, MirrortuneError):
            return error
        value: Any = self.cells[row].as_py()
        path = value.get("path") if isinstance(value, dict) else value
        name = f" '{path}'" if isinstance(path, str) else ""
        reason = error if isinstance(error, str) else f"{type(error).__name__}: {first_line(error)}"
        reason = "it is missing" if value is None else reason
        return DataError(
            self.places.where(row), f"its {self.role}{name} cannot be read ({reason})",
            allowed=f"{self.readable}; paths are relative to the table's folder", fix="Replace or remove the row",
        )  # fmt: skip

    def path(self, row: int) -> str:
        """Where the file of one row is, for messages."""
        found = self._found(row)
        return shown_path(str(found)) if isinstance(found, Path) else "in the table"

    def _found(self, row: int) -> bytes | Path | None:
        """What the cell of a row holds, or names."""
        value = self.cells[row].as_py()
        if isinstance(value, dict):
            value = value["path"] if value.get("bytes") is None else value["bytes"]
        if value is None or isinstance(value, bytes):
            return value
        path = Path(value)
        with suppress(RuntimeError):  # ~ stands for nobody's home: there is no such file
            path = path.expanduser()
        return path if path.is_absolute() or self.folder is None else self.folder / path

    def _leads_out(self, path: Path, real: dict[Path, Path]) -> bool:
        """Whether a path leads out of the folder; ``real`` remembers where folders really are."""
        inside = _real(self.folder, real) if self.folder is not None else _downloaded()
        where = _real(path.parent, real) / path.name
        return not Path(os.path.realpath(where) if where.is_symlink() else where).is_relative_to(inside)


def remarks_on(data: DataSet, columns: Sequence[tuple[str, str]]) -> list[str]:
    """What a user should know of the files of a data set: which were left out, and which lie outside its folder.

    Args:
        data: the data set.
        columns: (role, column), of ``Task.columns``.
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


def _real(folder: Path, known: dict[Path, Path]) -> Path:
    if folder not in known:
        known[folder] = Path(os.path.realpath(folder))
    return known[folder]


def _downloaded() -> Path:
    """Where the files of data sets of the Hub are."""
    from huggingface_hub import constants  # noqa: PLC0415

    return Path(os.path.realpath(constants.HF_HOME))
