# SPDX-License-Identifier: Apache-2.0
"""The rows of a table as Python's own values, so many at a time as memory surely holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mirrortune.data.files.arrow_arrays import flag_array, python_values

_ROWS, _SIZE = 1024, 1 << 22  # of a chunk; bytes in the table, of which Python's values and tokens take many times more

Columns = list[list[Any]]
"""The cells of some rows: a list for each column, None where a cell is null."""


def row_chunks(table: pa.Table, columns: Sequence[str], keep: npt.NDArray[np.bool_] | None = None) -> Iterator[Columns]:
    """The cells of ``columns``, a thousand rows at a time, fewer where they are long.

    Args:
        table: any number of rows; none of it is copied as a whole.
        columns: names.
        keep: which rows, shape (N,); None for all. Chunks of which none is kept are left out.
    """
    chosen, start = table.select(list(columns)), 0
    for stored in chosen.to_batches():
        each = stored.nbytes // max(1, stored.num_rows)
        size = max(1, min(_ROWS, _SIZE // max(1, each)))
        for first in range(0, stored.num_rows, size):
            batch = stored.slice(first, size)
            flags = None if keep is None else keep[start : start + batch.num_rows]
            start += batch.num_rows
            if flags is not None and not flags.all():
                batch = batch.filter(flag_array(flags))
            if batch.num_rows:
                yield [python_values(column) for column in batch.columns]


def cells(table: pa.Table, column: str, keep: npt.NDArray[np.bool_] | None = None) -> Iterator[Any]:
    """The cells of one column, one after the other."""
    for (chunk,) in row_chunks(table, [column], keep):
        yield from chunk


def nulls(table: pa.Table, column: str) -> npt.NDArray[np.bool_]:
    """Which cells of a column are null, shape (N,)."""
    return np.asarray(table.column(column).is_null().to_numpy())
