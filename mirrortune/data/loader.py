# SPDX-License-Identifier: Apache-2.0
"""Batches made ahead of the loop by threads, in the loop's order: what is made does not depend on who makes it.

Threads and not processes: making a batch is mostly NumPy, decoding and copying, which let go of Python's lock; and
signals, CUDA and the token arrays need no second copy.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor, nn

from mirrortune.data.examples import Batch, Examples, Rows
from mirrortune.data.row_stream import Place, RowStream
from mirrortune.errors import DataError, NoRowsError
from mirrortune.system.devices import autocast

# Global batches sorted together by length: enough to make padding small, few enough to leave the order random.
_BUCKET = 32


def epoch_batches(lengths: npt.NDArray[Any], global_batch_size: int, seed: int, epoch: int) -> list[Rows]:
    """The global batches of one epoch, in order: every row once, rows of similar length together.

    Args:
        lengths: tokens of each row, shape (N,).
        global_batch_size: rows of one optimizer step; the last batch may be smaller.
        seed: of the run.
        epoch: from 0; each has its own order.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    span = global_batch_size * _BUCKET
    batches: list[Rows] = []
    for start in range(0, len(order), span):
        bucket = order[start : start + span]
        bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
        batches += [bucket[i : i + global_batch_size] for i in range(0, len(bucket), global_batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


def micro_batches(batch: Rows, lengths: npt.NDArray[Any], *, num_micro: int, num_ranks: int, rank: int) -> list[Rows]:
    """The parts of a global batch that ``rank`` computes: exactly ``num_micro`` of them, some possibly empty.

    Rows are sorted by length first, so that each part is padded little.
    """
    ordered = batch[np.argsort(lengths[batch], kind="stable")]
    return np.array_split(ordered, num_micro * num_ranks)[rank::num_ranks]


def forward(model: nn.Module, batch: Batch, device: torch.device) -> tuple[Batch, Any, Tensor]:
    """Run a model on a batch: its inputs on ``device``, what the model gave, and the targets on ``device``."""
    inputs = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
    targets = inputs.pop("targets")
    with autocast(model):
        return inputs, model(**inputs), targets


Job = TypeVar("Job")
Made = TypeVar("Made")
# Batches that wait besides those being made: one is enough to never wait, if they are made as fast as they are used.
_SPARE = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """What one rank computes at a time.

    Attributes:
        batch: inputs by name and ``targets``; in pinned memory if they go to a GPU.
        is_empty: whether it stands for no row at all: then it counts nothing, and is there because a last global batch
            may have fewer rows than parts, and the other ranks wait for this one's gradients.
        num_rows_of_step: rows of the global batch that it is a part of.
        num_tokens_of_step: its tokens without padding; None for rows that are not text.
    """

    batch: Batch
    is_empty: bool
    num_rows_of_step: int
    num_tokens_of_step: int | None


class Feed:
    """The micro-batches of this rank.

    Args:
        examples: to learn from.
        accelerator: accelerate's.
        global_batch_size: rows of an optimizer step.
        num_micro: micro-batches per rank and step.
        num_workers: threads; 0 makes each batch when it is asked for.
        seed: of the order.
    """

    place: dict[str, int] | None = None
    """Nothing but epoch and step need be known to go on; compare ``stream_feeding.py``."""

    def __init__(
        self,
        examples: Examples,
        accelerator: Any,
        *,
        global_batch_size: int,
        num_micro: int,
        num_workers: int,
        seed: int,
    ) -> None:
        self.examples, self.accelerator = examples, accelerator
        self.global_batch_size, self.num_micro = global_batch_size, num_micro
        self.num_workers, self.seed = num_workers, seed

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of all rows."""
        return math.ceil(len(self.examples) / self.global_batch_size)

    def micro_batches(self, epoch: int, step_in_epoch: int, num_steps: int) -> Generator[MicroBatch, None, None]:
        """``num_micro`` for each of ``num_steps`` steps, from a step of an epoch on and through the epochs after it."""
        steps = itertools.islice(self._steps(epoch, step_in_epoch), num_steps)
        jobs = (
            (part, batch, int(self.examples.lengths[batch].sum()), number)
            for batch, number in steps
            for part in self._parts(batch)
        )
        return made_ahead(jobs, lambda job: self._make(*job), self.num_workers)

    def _steps(self, epoch: int, step_in_epoch: int) -> Iterator[tuple[Rows, int]]:
        """Global batches, each with its epoch."""
        for number in itertools.count(epoch):
            batches = epoch_batches(self.examples.lengths, self.global_batch_size, self.seed, number)
            yield from ((batch, number) for batch in batches[step_in_epoch if number == epoch else 0 :])

    def _parts(self, batch: Rows) -> list[Rows]:
        return micro_batches(
            batch,
            self.examples.lengths,
            num_micro=self.num_micro,
            num_ranks=self.accelerator.num_processes,
            rank=self.accelerator.process_index,
        )

    def _make(self, rows: Rows, batch: Rows, num_tokens: int, epoch: int) -> MicroBatch:
        is_empty = len(rows) == 0
        made = self.examples.batch(batch[:1] if is_empty else rows, epoch)
        return MicroBatch(
            batch=pinned(made, self.accelerator.device),
            is_empty=is_empty,
            num_rows_of_step=len(batch),
            num_tokens_of_step=num_tokens if "input_ids" in made else None,
        )


def pinned(batch: Batch, device: torch.device) -> Batch:
    """The batch in memory from which ``device`` can copy while the program goes on, if it is one that can."""
    if device.type != "cuda":
        return batch
    return {name: value.pin_memory() if isinstance(value, Tensor) else value for name, value in batch.items()}


def made_ahead(jobs: Iterator[Job], make: Callable[[Job], Made], num_workers: int) -> Generator[Made, None, None]:
    """``make(job)`` for every job, in order; ``num_workers`` threads work ahead, by a bounded number of jobs.

    Args:
        jobs: read in the caller's thread.
        make: called in the threads, so it must depend on its job alone; what it raises is raised here, in its turn.
        num_workers: 0 calls ``make`` in the caller's thread, when its result is asked for.
    """
    if num_workers == 0:
        yield from map(make, jobs)
        return
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="mirrortune-batches")
    try:
        first = itertools.islice(jobs, num_workers + _SPARE)
        waiting: deque[Future[Made]] = deque(pool.submit(make, job) for job in first)
        while waiting:
            made = waiting.popleft().result()
            waiting.extend(pool.submit(make, job) for job in itertools.islice(jobs, 1))
            yield made
    finally:
        pool.shutdown(cancel_futures=True)


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
