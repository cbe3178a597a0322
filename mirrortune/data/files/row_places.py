# SPDX-License-Identifier: Apache-2.0
"""Map rows of a split back to lines of the files that they were read from, for messages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.integer[Any]]
_MOST = 5  # rows that a message lists


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRows:
    """The rows of one file, in order.

    Attributes:
        name: of the file in messages.
        count: number of rows.
        lines: line in which each row begins, numbered from 1, shape (count,); None for files without lines.
    """

    name: str
    count: int
    lines: IntArray | None = None

    def number(self, row: int) -> int:
        """Return the line (or the number, from 1) of ``row``, which counts from 0."""
        return row + 1 if self.lines is None else int(self.lines[row])

    def where(self, row: int) -> str:
        """Return ``file:line``, or ``file row number``."""
        return f"{self.name}{' row ' if self.lines is None else ':'}{self.number(row)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPlaces:
    """The origin of the rows of a split.

    Attributes:
        source: name of the split in messages.
        files: the files that were read, in order; empty if unknown, and then rows are numbered within the split.
        kept: which rows of the files the split holds, ascending, shape (N,); None for all of them.
        ends: cumulative number of rows at the end of each file.
    """

    source: str
    files: tuple[FileRows, ...] = ()
    kept: IntArray | None = None
    ends: IntArray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ends", np.cumsum([file.count for file in self.files], dtype=np.int64))

    def where(self, row: int) -> str:
        """Return the place of ``row`` (from 0): ``file:line``, ``file row number`` or ``source row number``."""
        file, place = self._locate(row)
        return file.where(place)

    def listed(self, rows: Iterable[int]) -> str:
        """Return the places of the first five of several rows (from 0), such as ``lines 3, 17``."""
        found = [self._locate(int(row)) for row in rows]
        shown, more = found[:_MOST], ", ..." if len(found) > _MOST else ""
        if len({file.name for file, _ in shown}) > 1:
            return ", ".join(file.where(place) for file, place in shown) + more
        file = shown[0][0]
        unit = "row" if file.lines is None else "line"
        name = f" of {file.name}" if len(self.files) > 1 else ""
        numbers = ", ".join(str(file.number(place)) for _, place in shown)
        return f"{unit}{'s' * (len(found) > 1)} {numbers}{more}{name}"

    def take(self, keep: npt.NDArray[np.bool_]) -> RowPlaces:
        """Return the places of the rows where ``keep`` (N,) is true."""
        return replace(self, kept=np.flatnonzero(keep) if self.kept is None else self.kept[keep])

    def _locate(self, row: int) -> tuple[FileRows, int]:
        place = row if self.kept is None else int(self.kept[row])
        number = int(np.searchsorted(self.ends, place, side="right"))
        if number == len(self.files):
            return FileRows(name=self.source, count=0), place
        return self.files[number], place - int(self.ends[number]) + self.files[number].count
