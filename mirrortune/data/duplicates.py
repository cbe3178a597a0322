# SPDX-License-Identifier: Apache-2.0
"""Count the validation rows that are also training rows; texts are compared by characters, files by content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mirrortune.data.dataset import Split
from mirrortune.data.files.arrow import rows_of
from mirrortune.data.files.media import FILE_ROLES, FileCells

_BEGIN = 1 << 16  # bytes at the start of a file, which are compared first


def rows_in_both(train: Split, validation: Split, columns: Sequence[tuple[str, str]]) -> int:
    """Return how many rows of ``validation`` equal a row of ``train`` in all of ``columns`` (role, column).

    Cells of the roles in ``FILE_ROLES`` are compared by the content of their files, not by their paths. Files are read
    only as far as needed, because most of them differ in size.
    """
    texts = [column for role, column in columns if role not in FILE_ROLES]
    files = [column for role, column in columns if role in FILE_ROLES]
    if not files:
        return _same_cells(train.table, validation.table, texts)
    cells = [tuple(FileCells.of(split, column, role="file", readable="") for column in files)
             for split in (train, validation)]  # fmt: skip
    left = [range(split.table.num_rows) for split in (train, validation)]
    stages: tuple[Callable[[FileCells, int], object], ...] = (_size, _begin, _digest)
    for stage in stages:
        keys = [{row: tuple(stage(c, row) for c in own) for row in rows} for own, rows in zip(cells, left, strict=True)]
        common = set(keys[0].values()) & set(keys[1].values())
        left = [[row for row, key in found.items() if key in common and None not in key] for found in keys]  # type: ignore[misc]
    if not texts:
        return len(left[1])
    parts = [
        split.table.take(pa.array(rows, pa.int64())) for split, rows in zip((train, validation), left, strict=True)
    ]
    return _same_cells(parts[0], parts[1], texts)


def _same_cells(train: pa.Table, validation: pa.Table, columns: Sequence[str]) -> int:
    if not columns:
        return 0
    return int(np.isin(_row_hashes(validation, columns), _row_hashes(train, columns)).sum())


def _row_hashes(table: pa.Table, columns: Sequence[str]) -> npt.NDArray[np.int64]:
    """Return a 64-bit hash of each row, (N,), valid within this process. Hashes fit into memory where rows may not."""
    rows = rows_of(table, columns)
    hashes = (hash(tuple(cell if isinstance(cell, str | None) else repr(cell) for cell in row)) for row in rows)
    return np.fromiter(hashes, dtype=np.int64, count=table.num_rows)


def _size(cells: FileCells, row: int) -> int | None:
    return cells.size(row)


def _begin(cells: FileCells, row: int) -> bytes:
    return next(_blocks(cells, row), b"")


def _digest(cells: FileCells, row: int) -> bytes:
    digest = hashlib.blake2b()
    for block in _blocks(cells, row):
        digest.update(block)
    return digest.digest()


def _blocks(cells: FileCells, row: int) -> Iterator[bytes]:
    source: Any = cells.open(row)
    if not isinstance(source, str):
        yield from iter(lambda: source.read(_BEGIN), b"")
        return
    with open(source, "rb") as file:  # noqa: PTH123
        yield from iter(lambda: file.read(_BEGIN), b"")
