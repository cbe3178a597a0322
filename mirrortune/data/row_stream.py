# SPDX-License-Identifier: Apache-2.0
"""Streams of rows, for data that fits neither memory nor disk: read in blocks during training, each process its share.

A place in the stream is four integers, so that a run can resume at any row. Only the order of pieces (files, or the
Hub's shards) and the order within a block (drawn by the consumer) are random: a shuffle buffer could not be restored
without its content.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from mirrortune.data.files.arrow import with_json_aligned
from mirrortune.errors import DataError

# Number of rows that are read at a time.
_READ = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The position of a process in its share of a stream.

    Attributes:
        epoch: completed passes.
        piece: pieces of this epoch completed before the block.
        row: rows of the piece read before the block.
        batch: completed batches of the block.
        others: epoch, piece and row in each further source of a mixture.
    """

    epoch: int = 0
    piece: int = 0
    row: int = 0
    batch: int = 0
    others: tuple[tuple[int, int, int], ...] = ()

    def seed(self, seed: int) -> int:
        """Return a seed for random draws in the block that begins here, derived from the seed of the run."""
        words = [seed, self.epoch, self.piece, self.row, *itertools.chain.from_iterable(self.others)]
        return int(np.random.SeedSequence(words).generate_state(1)[0])

    def to_dict(self) -> dict[str, Any]:
        """Return the place as JSON data."""
        own = {"epoch": self.epoch, "piece": self.piece, "row": self.row, "batch": self.batch}
        return {**own, "others": [list(other) for other in self.others]} if self.others else own

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Place:
        """Create a place from the result of :meth:`to_dict`."""
        others = tuple((int(epoch), int(piece), int(row)) for epoch, piece, row in data.get("others", ()))
        return cls(**{**data, "others": others})


@dataclass(frozen=True, slots=True, kw_only=True)
class RowStream:
    """A streamed split.

    Attributes:
        rows: a ``datasets.IterableDataset``.
        flatten: function applied to every table that is read.
        guard: returns a context manager that converts exceptions of readers to MirrortuneErrors.
        source: name of the rows in messages.
    """

    rows: Any
    flatten: Callable[[pa.Table], pa.Table]
    guard: Callable[[], AbstractContextManager[object]]
    source: str

    def head(self, count: int) -> pa.Table:
        """Return the first ``count`` rows, with the features of the data set if it has any."""
        parts, missing = [], count
        for table in self._read(self.rows):
            parts.append(table.slice(0, missing))
            missing -= parts[-1].num_rows
            if not missing:
                break
        with self.guard():
            found = _joined(parts) if parts else pa.table({})
            features = self.rows.features
            known = None if features is None else features.arrow_schema.metadata
        return self.flatten(found.replace_schema_metadata(known) if known else found)

    def in_order(self, size: int) -> Iterator[pa.Table]:
        """Yield all rows once, in their order, ``size`` at a time."""
        for _, table in _blocks(((Place(), table) for table in self._read(self.rows)), size):
            yield self.flatten(table)

    def shares_pieces(self, num_ranks: int) -> bool:
        """Return whether each process reads its own pieces; otherwise all processes read all rows and each keeps every
        n-th.
        """
        return bool(self.rows.num_shards % num_ranks == 0)

    def blocks(
        self, *, rank: int, num_ranks: int, size: int, seed: int, start: Place
    ) -> Iterator[tuple[Place, pa.Table]]:
        """Yield the share of a process, endlessly: blocks of at most ``size`` rows, each with the place it begins at.

        Args:
            rank: rank of the process.
            num_ranks: number of processes of the run.
            size: number of rows of a block; the last block of an epoch may have fewer, or none.
            seed: seed of the order of pieces.
            start: place of the first block.
        """
        every = 1 if self.shares_pieces(num_ranks) else num_ranks
        for tables in self._epochs(rank=rank, num_ranks=num_ranks, seed=seed, start=start):
            for place, table in _blocks(tables, size * every):
                yield place, self.flatten(_share(table, rank, every))

    def whole_blocks(
        self, *, rank: int, num_ranks: int, size: int, seed: int, start: Place
    ) -> Iterator[tuple[Place, pa.Table]]:
        """Yield blocks as :meth:`blocks` does, but with exactly ``size`` rows each: rows of the next epoch fill them.

        Raises:
            DataError: an epoch has no rows.
        """
        every = 1 if self.shares_pieces(num_ranks) else num_ranks

        def endless() -> Iterator[tuple[Place, pa.Table]]:
            is_empty = False
            for tables in self._epochs(rank=rank, num_ranks=num_ranks, seed=seed, start=start):
                was_empty, is_empty = is_empty, True
                for place, table in tables:
                    is_empty &= not table.num_rows
                    yield place, table
                if was_empty and is_empty:  # the first one may begin at the end of its rows
                    raise DataError(self.source, "it has no rows for a process", fix="Use fewer processes")

        for place, table in _blocks(endless(), size * every):
            yield place, self.flatten(_share(table, rank, every))

    def _epochs(
        self, *, rank: int, num_ranks: int, seed: int, start: Place
    ) -> Iterator[Iterator[tuple[Place, pa.Table]]]:
        """Yield the rows of each epoch from a place on, of a process that has its own pieces, or of all."""
        is_own = self.shares_pieces(num_ranks)
        pieces = np.arange(rank, self.rows.num_shards, num_ranks) if is_own else np.arange(self.rows.num_shards)
        begin = replace(start, batch=0, others=())
        for epoch in itertools.count(start.epoch):
            order = np.random.default_rng([seed, epoch]).permutation(pieces)
            yield self._from(order, replace(begin, epoch=epoch))
            begin = Place()

    def _from(self, order: Iterable[int], begin: Place) -> Iterator[tuple[Place, pa.Table]]:
        """Yield the rows of an epoch from a place on, each table with its own place."""
        done = begin.row
        for number, index in itertools.islice(enumerate(order), begin.piece, None):
            first = 0
            for table in self._read(self.rows.shard(num_shards=self.rows.num_shards, index=int(index))):
                used = min(max(done - first, 0), table.num_rows)
                if used < table.num_rows:
                    yield replace(begin, piece=number, row=first + used), table.slice(used)
                first += table.num_rows
            done = 0

    def _read(self, rows: Any) -> Iterator[pa.Table]:
        with self.guard():
            tables = iter(rows.with_format("arrow").iter(batch_size=_READ))
        while True:
            with self.guard():
                table = next(tables, None)
            if table is None:
                return
            yield table


def _share(table: pa.Table, rank: int, every: int) -> pa.Table:
    """Return every ``every``-th row of a table, the share of one process."""
    return table if every == 1 else table.take(pa.array(np.arange(rank, table.num_rows, every)))


def _blocks(tables: Iterable[tuple[Place, pa.Table]], size: int) -> Iterator[tuple[Place, pa.Table]]:
    """Regroup tables into blocks of ``size`` rows; the last one may be smaller."""
    parts: list[pa.Table] = []
    begin, missing = Place(), size
    for place, table in tables:
        taken = 0
        while taken < table.num_rows:
            if not parts:
                begin = replace(place, row=place.row + taken)
            parts.append(table.slice(taken, missing))
            taken += parts[-1].num_rows
            missing -= parts[-1].num_rows
            if not missing:
                yield begin, _joined(parts)
                parts, missing = [], size
    if parts:
        yield begin, _joined(parts)


def _joined(parts: list[pa.Table]) -> pa.Table:
    return pa.concat_tables(with_json_aligned(parts), promote_options="permissive")
