# SPDX-License-Identifier: Apache-2.0
"""Batches of rows that are streamed: a block at a time is made into examples, and its batches are those of an epoch of
so many rows, shuffled and by length.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from mirrortune.data.batching import epoch_batches, micro_batches
from mirrortune.data.examples import Examples, Rows
from mirrortune.data.loader import Feed, MicroBatch, made_ahead, pinned
from mirrortune.data.row_stream import Place, RowStream
from mirrortune.errors import DataError, NoRowsError

# Blocks in a row without a row to learn from after which a stream is given up.
_LARGEST_DESERT = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedExamples:
    """Training rows that become examples while they are read.

    Attributes:
        stream: of rows.
        encode: rows and a seed -> examples.
        block_rows: rows of a process that are shuffled together.
    """

    stream: RowStream
    encode: Callable[[pa.Table, int], Examples]
    block_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    place: Place
    examples: Examples | None


class StreamFeed:
    """The micro-batches of this rank, from its share of a stream; compare :class:`mirrortune.data.loader.Feed`.

    Args:
        rows: to learn from.
        accelerator: accelerate's.
        rows_per_step: of this rank.
        num_micro: micro-batches per rank and step.
        num_workers: threads that make batches; one more makes blocks, unless it is 0.
        seed: of the order.
    """

    steps_per_epoch: int | None = None

    def __init__(
        self,
        rows: StreamedExamples,
        accelerator: Any,
        *,
        rows_per_step: int,
        num_micro: int,
        num_workers: int,
        seed: int,
    ) -> None:
        self.rows, self.accelerator = rows, accelerator
        self.rows_per_step, self.num_micro = rows_per_step, num_micro
        self.num_workers, self.seed = num_workers, seed
        # Whole batches, so that only what was left out makes the last one of a block smaller.
        self._block_rows = -(-rows.block_rows // rows_per_step) * rows_per_step
        self._place = Place()

    @property
    def place(self) -> dict[str, int] | None:
        """Behind the step whose micro-batches were taken last."""
        return asdict(self._place)

    @place.setter
    def place(self, place: dict[str, int] | None) -> None:
        self._place = Place(**place or {})

    def micro_batches(self, epoch: int, step_in_epoch: int, num_steps: int) -> Generator[MicroBatch, None, None]:
        """``num_micro`` for each of ``num_steps`` steps, from :attr:`place` on, whatever the other arguments."""
        with closing(self._steps()) as steps:
            jobs = (
                (part, block, batch, number)
                for block, batch, number in itertools.islice(steps, num_steps)
                for part in self._parts(block, batch)
            )
            with closing(made_ahead(jobs, lambda job: self._make(*job), self.num_workers)) as made:
                for micro_batch, place in made:
                    self._place = place
                    yield micro_batch

    def _steps(self) -> Generator[tuple[_Block, Rows, int], None, None]:
        """This rank's rows of each step, as rows of a block, and which batch of the block they are."""
        start, barren = self._place, 0
        tables = self.rows.stream.blocks(
            rank=self.accelerator.process_index, num_ranks=self.accelerator.num_processes,
            size=self._block_rows, seed=self.seed, start=start,
        )  # fmt: skip
        # One thread, which alone reads: blocks come in order.
        blocks = made_ahead(itertools.repeat(None), lambda _: self._encode(*next(tables)), min(self.num_workers, 1))
        with closing(blocks):
            for block in blocks:
                barren = 0 if block.examples else barren + 1
                if barren > _LARGEST_DESERT:
                    raise DataError(self.rows.stream.source, f"{barren} blocks in a row hold nothing to learn from")
                skipped = start.batch if block.place == replace(start, batch=0) else 0
                for number, batch in itertools.islice(enumerate(self._batches(block)), skipped, None):
                    yield block, batch, number

    def _encode(self, place: Place, table: pa.Table) -> _Block:
        try:
            examples = self.rows.encode(table, place.seed(self.seed)) if table.num_rows else None
        except NoRowsError:
            examples = None
        return _Block(place=place, examples=examples if examples is not None and len(examples) else None)

    def _batches(self, block: _Block) -> list[Rows]:
        if block.examples is None:
            return []
        place = block.place
        return epoch_batches(block.examples.lengths, self.rows_per_step, place.seed(self.seed), place.epoch)

    def _parts(self, block: _Block, batch: Rows) -> Iterator[Rows]:
        assert block.examples is not None
        return iter(micro_batches(batch, block.examples.lengths, num_micro=self.num_micro, num_ranks=1, rank=0))

    def _make(self, rows: Rows, block: _Block, batch: Rows, number: int) -> tuple[MicroBatch, Place]:
        assert block.examples is not None
        is_empty = len(rows) == 0
        made = block.examples.batch(np.asarray(batch[:1] if is_empty else rows), block.place.epoch)
        count = self.accelerator.num_processes  # what the others read is known to them alone, and is about as much
        num_tokens = int(block.examples.lengths[batch].sum()) * count if "input_ids" in made else None
        micro_batch = MicroBatch(
            batch=pinned(made, self.accelerator.device), is_empty=is_empty,
            num_rows_of_step=len(batch) * count, num_tokens_of_step=num_tokens,
        )  # fmt: skip
        return micro_batch, replace(block.place, batch=number + 1)


def make_feed(
    rows: Examples | StreamedExamples,
    accelerator: Any,
    *,
    batch_size: int,
    num_micro: int,
    num_workers: int,
    seed: int,
) -> Feed | StreamFeed:
    """The micro-batches of this rank, of ``batch_size`` rows each; arguments as of both kinds of feed."""
    own = batch_size * num_micro
    if isinstance(rows, StreamedExamples):
        return StreamFeed(rows, accelerator, rows_per_step=own, num_micro=num_micro, num_workers=num_workers, seed=seed)
    global_batch_size = own * accelerator.num_processes
    return Feed(
        rows, accelerator, global_batch_size=global_batch_size, num_micro=num_micro, num_workers=num_workers, seed=seed
    )
