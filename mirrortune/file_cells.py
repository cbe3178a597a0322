# SPDX-License-Identifier: Apache-2.0
"""Columns whose cells are files (images, recordings): encoded, or as paths to them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from mirrortune.data import Split
from mirrortune.errors import DataError
from mirrortune.row_places import RowPlaces


@dataclass(frozen=True, slots=True, kw_only=True)
class FileCells:
    """The files of a column, one a row.

    Attributes:
        cells: bytes, paths, or the datasets library's structs of ``bytes`` and ``path``.
        folder: where relative paths begin.
        places: of the rows, for messages.
        role: what a file holds, for messages.
        readable: which files can be read, for messages.
    """

    cells: pa.ChunkedArray
    folder: Path | None
    places: RowPlaces
    role: str
    readable: str

    @classmethod
    def of(cls, split: Split, column: str, *, role: str, readable: str) -> FileCells:
        """The files of one column of ``split``."""
        cells = split.table.column(column)
        return cls(cells=cells, folder=split.folder, places=split.places, role=role, readable=readable)

    def __len__(self) -> int:
        return len(self.cells)

    def open(self, row: int) -> io.BytesIO | str:
        """The file of one row, as what decodes it takes: its content or its path; ValueError if there is none."""
        value = self.cells[row].as_py()
        if isinstance(value, dict):
            value = value["path"] if value.get("bytes") is None else value["bytes"]
        if value is None:
            raise ValueError(f"no {self.role}")
        if isinstance(value, bytes):
            return io.BytesIO(value)
        path = Path(value).expanduser()
        return str(path if path.is_absolute() or self.folder is None else self.folder / path)

    def unreadable(self, row: int, error: Exception) -> DataError:
        """The error for a file that what decodes it refused by ``error``."""
        value: Any = self.cells[row].as_py()
        path = value.get("path") if isinstance(value, dict) else value
        name = f" '{path}'" if isinstance(path, str) else ""
        reason = "it is missing" if value is None else f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
        return DataError(
            self.places.where(row), f"its {self.role}{name} cannot be read ({reason})",
            allowed=f"{self.readable}; paths are relative to the table's folder", fix="Replace or remove the row",
        )  # fmt: skip
