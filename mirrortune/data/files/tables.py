# SPDX-License-Identifier: Apache-2.0
"""Tables that come in parts: held in memory while they are small, else on disk and mapped.

What is mapped is paged in when it is read and dropped when memory runs short, so rows may be more than memory holds.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mirrortune.data.files.arrow_arrays import aligned, flag_array
from mirrortune.data.files.column_problems import is_unreadable, problem_field
from mirrortune.system.atomic import cannot_write
from mirrortune.system.cache import leave_room
from mirrortune.system.paths import cache_folder

_LIMIT = 1 << 28  # bytes held in memory
_ROWS = 65_536


def join_parts(parts: Iterable[pa.Table], limit: int = _LIMIT, source: str = "rows") -> pa.Table:
    """One table of all parts, in order.

    Args:
        parts: with the same columns, or with others that go together: whole with real numbers, null with anything, JSON
            with whatever JSON can hold. A column whose types do not go together becomes one that cannot be read
            (:mod:`mirrortune.data.files.column_problems`).
        limit: beyond so many bytes parts go to a file in the cache folder, which nobody else sees and which is gone
            with the process.
        source: the file, for messages.

    Raises:
        ResourceError: the disk is full, or the cache folder cannot be written.
    """
    held: list[pa.Table] = []
    size = 0
    spilled: list[pa.Table] = []
    for part in parts:
        held.append(part)
        size += part.nbytes
        if size > limit:
            spilled += _spilled(held)
            held, size = [], 0
    if spilled and held:
        spilled, held = spilled + _spilled(held), []
    return joined([*spilled, *held], source)


def joined(tables: Sequence[pa.Table], source: str) -> pa.Table:
    """The rows of all ``tables``, in order, with the columns of all of them; see :func:`join_parts` for types that
    differ.
    """
    tables = aligned(tables)
    fields = [{field.name: field for field in table.schema} for table in tables]
    names = dict.fromkeys(name for known in fields for name in known)
    unusable = {name: field for name in names if (field := _conflict(tables, fields, name, source)) is not None}
    return pa.concat_tables([_without(table, unusable) for table in tables], promote_options="permissive")


def _conflict(
    tables: Sequence[pa.Table], known: Sequence[dict[str, pa.Field]], name: str, source: str
) -> pa.Field | None:
    """The field of a column that one of ``tables`` (with the fields ``known``) could not read, or whose types do not go
    together.
    """
    having = [table for table, own in zip(tables, known, strict=True) if name in own]
    fields = [own[name] for own in known if name in own]
    if (broken := next((field for field in fields if is_unreadable(field)), None)) is not None:
        return broken
    if all(field.type == fields[0].type for field in fields):
        return None
    try:
        pa.concat_tables([table.select([name]) for table in having], promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        kinds = " and ".join(dict.fromkeys(str(field.type) for field in fields))
        problem = f"column '{name}' mixes types ({kinds})"
        return problem_field(name, source, problem, "Give every row the same type")
    return None


def _without(table: pa.Table, unusable: dict[str, pa.Field]) -> pa.Table:
    """The table with nulls in place of the columns that cannot be read."""
    for name in unusable.keys() & set(table.column_names):
        place = table.column_names.index(name)
        table = table.set_column(place, unusable[name], pa.nulls(table.num_rows))
    return table


def take_rows(table: pa.Table, keep: npt.NDArray[np.bool_], limit: int = _LIMIT) -> pa.Table:
    """The rows where ``keep`` (N,) is true, in order, as :func:`join_parts` joins them."""
    if table.nbytes <= limit:
        return table.filter(flag_array(keep))
    return join_parts(_kept(table, keep), limit)


def _kept(table: pa.Table, keep: npt.NDArray[np.bool_]) -> Iterator[pa.Table]:
    start = 0
    for batch in table.to_batches(max_chunksize=_ROWS):
        mask = flag_array(keep[start : start + batch.num_rows])
        start += batch.num_rows
        yield pa.Table.from_batches([batch.filter(mask)], schema=table.schema)


def on_disk(write: Callable[[IO[bytes]], object]) -> pa.Buffer:
    """What ``write`` writes, mapped from a file without a name in the cache folder.

    Raises:
        ResourceError: the disk is full, or the cache folder cannot be written.
    """
    place = cache_folder()
    try:
        place.mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=place)  # noqa: SIM115
    except OSError as error:
        raise cannot_write(place, error) from error
    with file:
        try:
            write(file)
            file.flush()
        except OSError as error:
            if error.errno is None:  # not of the disk: of whatever is being read
                raise
            raise cannot_write(place, error) from error
        # The mapping keeps the file alive: on POSIX it has no name any more, elsewhere it is deleted when closed.
        return pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if file.tell() else b"")


def _spilled(parts: list[pa.Table]) -> list[pa.Table]:
    """The same tables, on disk."""
    starts: list[int] = []
    content = on_disk(lambda file: starts.extend(_append(file, part) for part in parts))
    return [pa.ipc.open_stream(content.slice(start)).read_all() for start in starts]


def _append(file: IO[bytes], part: pa.Table) -> int:
    leave_room(cache_folder(), "the data that is being read")
    start = file.tell()
    # A stream, not a file: its dictionaries may change from batch to batch.
    with pa.ipc.new_stream(file, part.schema) as writer:
        writer.write_table(part, max_chunksize=_ROWS)
    return start
