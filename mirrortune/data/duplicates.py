# SPDX-License-Identifier: Apache-2.0
"""Count the validation rows that are also training rows; texts are compared by characters, files by content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mirrortune.data.dataset import Split
from mirrortune.data.files.arrow import Columns, row_chunks
from mirrortune.data.files.media import FILE_ROLES, FileCells
from mirrortune.data.files.row_places import IntArray

_BEGIN = 1 << 16  # bytes at the start of a file, which are compared first
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing


def rows_in_both(
    train: Split, validation: Split, columns: Sequence[tuple[str, str]], chosen: tuple[IntArray, IntArray] | None = None
) -> int:
    """Return how many rows of ``validation`` equal a row of ``train`` in all of ``columns`` (role, column).

    Cells of the roles in ``FILE_ROLES`` are compared by the content of their files, not by their paths. Files are read
    only as far as needed, because most of them differ in size.

    Args:
        train: rows to compare with.
        validation: rows to count.
        columns: what is compared.
        chosen: indices of the rows of each that are considered; None for all.
    """
    splits = train, validation
    texts = [column for role, column in columns if role not in FILE_ROLES]
    files = [column for role, column in columns if role in FILE_ROLES]
    left = list(chosen or (np.arange(split.table.num_rows) for split in splits))
    if files:
        cells = [tuple(FileCells.of(split, column, role="file", readable="") for column in files) for split in splits]
        stages: tuple[Callable[[FileCells, int], object], ...] = (FileCells.size, _begin, _digest)
        for stage in stages:
            keys = [{row: tuple(stage(c, row) for c in own) for row in rows.tolist()}
                    for own, rows in zip(cells, left, strict=True)]  # fmt: skip
            common = set(keys[0].values()) & set(keys[1].values())
            left = [np.array([row for row, key in found.items() if key in common and None not in key], dtype=np.int64)
                    for found in keys]  # fmt: skip
    if not texts:
        return len(left[1]) if files else 0
    hashes = [_row_hashes(split, texts)[rows] for split, rows in zip(splits, left, strict=True)]
    return int(np.isin(hashes[1], hashes[0]).sum())


def hashed_chunks(split: Split, columns: Sequence[str]) -> Iterator[Columns]:
    """Yield cells as :func:`row_chunks` does, and store the hashes of all of them in the split after the last chunk."""
    hashes, done = np.empty((len(columns), split.table.num_rows), dtype=np.int64), 0
    for chunk in row_chunks(split.table, columns):
        start, done = done, done + len(chunk[0])
        for own, cells in zip(hashes, chunk, strict=True):
            own[start:done] = [hash(cell if type(cell) is str or cell is None else repr(cell)) for cell in cells]
        yield chunk
    split.known.update(zip(columns, hashes, strict=True))


def _row_hashes(split: Split, columns: Sequence[str]) -> npt.NDArray[np.uint64]:
    """Return a 64-bit hash of each row, (N,), valid within this process. Hashes fit into memory where rows may not."""
    if unknown := [column for column in columns if column not in split.known]:
        for _ in hashed_chunks(split, unknown):
            pass
    found = np.zeros(split.table.num_rows, dtype=np.uint64)
    for column in columns:
        found = found * _FACTOR + split.known[column].view(np.uint64)
    return found


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
