# SPDX-License-Identifier: Apache-2.0
"""Join parts of tables that may be larger than memory; beyond a size, they are kept in a memory-mapped file."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mirrortune.data.files.arrow import flag_array, is_unreadable, problem_field, with_json_aligned
from mirrortune.data.files.row_places import IntArray
from mirrortune.system.atomic import cannot_write
from mirrortune.system.disk import leave_room
from mirrortune.system.paths import cache_folder

_LIMIT = 1 << 28  # bytes held in memory
_ROWS = 65_536
# Size of a part: rows, and characters.
PART_ROWS, PART_SIZE = 65_536, 1 << 24
Part = tuple[pa.Table, IntArray | None]
"""Some rows, and the line of each, shape (N,), if the file has lines."""


def join_parts(parts: Iterable[pa.Table], limit: int = _LIMIT, source: str = "rows") -> pa.Table:
    """Concatenate tables.

    Args:
        parts: tables with the same columns, of equal or compatible types: integers and floats, null and any type, JSON
            and any JSON value. A column of incompatible types is marked as unreadable
            (:func:`mirrortune.data.files.arrow.problem_field`).
        limit: parts beyond this number of bytes go to an unnamed file in the cache folder, which ends with the process.
        source: the file, for messages.

    Raises:
        ResourceError: if the disk is full, or the cache folder cannot be written.
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
    """Concatenate tables in memory, with the columns of all of them; see :func:`join_parts` for differing types."""
    tables = with_json_aligned(tables)
    fields = [{field.name: field for field in table.schema} for table in tables]
    names = dict.fromkeys(name for known in fields for name in known)
    unusable = {name: field for name in names if (field := _conflict(tables, fields, name, source)) is not None}
    return pa.concat_tables([_without(table, unusable) for table in tables], promote_options="permissive")


def _conflict(
    tables: Sequence[pa.Table], known: Sequence[dict[str, pa.Field]], name: str, source: str
) -> pa.Field | None:
    """Return the field that marks a column as unreadable, or None if the column can be used.

    A column is unreadable if it is so in one of ``tables``, whose fields are ``known``, or if its
    types are incompatible.
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
    """Return the table with nulls in place of the unreadable columns."""
    for name in unusable.keys() & set(table.column_names):
        place = table.column_names.index(name)
        table = table.set_column(place, unusable[name], pa.nulls(table.num_rows))
    return table


def take_rows(table: pa.Table, keep: npt.NDArray[np.bool_], limit: int = _LIMIT) -> pa.Table:
    """Return the rows where ``keep`` (N,) is true, in order; ``limit`` as of :func:`join_parts`."""
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
    """Call ``write`` with an unnamed file in the cache folder, and return its content as a memory map.

    Raises:
        ResourceError: if the disk is full, or the cache folder cannot be written.
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
            if error.errno is None:  # an error of the source, not of the disk
                raise
            raise cannot_write(place, error) from error
        # The mapping keeps the file alive: on POSIX it has been unlinked, elsewhere it is deleted on close.
        return pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if file.tell() else b"")


def _spilled(parts: list[pa.Table]) -> list[pa.Table]:
    """Return the same tables, on disk."""
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


def line_numbers(part: list[tuple[int, Any]]) -> IntArray:
    """Return the line of each row of a part, shape (N,)."""
    return np.fromiter((line for line, _ in part), dtype=np.int64, count=len(part))


def parts_of(rows: Iterable[tuple[Any, int]]) -> Iterator[list[Any]]:
    """Group rows, given with their sizes, into parts of bounded size; the first one may be empty."""
    part: list[Any] = []
    size, is_first = 0, True
    for row, more in rows:
        part.append(row)
        size += more
        if size >= PART_SIZE or len(part) >= PART_ROWS:
            yield part
            part, size, is_first = [], 0, False
    if part or is_first:
        yield part
