# SPDX-License-Identifier: Apache-2.0
"""Arrow arrays of text and of flags, made without ``pa.array``.

That imports pandas to ask whether what it is given is one of its own: a third of a second at the start of every command
that reads a table.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

_MOST = 2**31 - 1  # bytes of an array of type string


def text_array(cells: Sequence[str | None]) -> pa.Array:
    """``cells``, whose None are nulls, as an array of type string; of large_string if they hold 2 GiB or more.

    Raises:
        UnicodeEncodeError: a cell holds half a surrogate pair.
    """
    joined, ends = bytearray(), [0]  # grows in place: a list of encoded cells would hold all of them once more
    for cell in cells:
        if cell is not None:
            joined += cell.encode()
        ends.append(len(joined))
    offsets = np.array(ends, np.int64)
    is_large = offsets[-1] > _MOST
    known = np.fromiter((cell is not None for cell in cells), np.bool_, len(cells))
    mask = None if known.all() else _bits(known)
    data = [pa.py_buffer(offsets if is_large else offsets.astype(np.int32)), pa.py_buffer(joined)]
    return pa.Array.from_buffers(pa.large_string() if is_large else pa.string(), len(cells), [mask, *data])


def flag_array(flags: npt.NDArray[np.bool_]) -> pa.BooleanArray:
    """``flags``, shape (N,), as an array."""
    return pa.Array.from_buffers(pa.bool_(), len(flags), [None, _bits(flags)])


def _bits(flags: npt.NDArray[np.bool_]) -> pa.Buffer:
    return pa.py_buffer(np.packbits(flags, bitorder="little"))
