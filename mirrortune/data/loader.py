# SPDX-License-Identifier: Apache-2.0
"""Batches: their order, and the threads that make them ahead of training. Results do not depend on the threads.

Threads rather than processes: making a batch is mostly NumPy, decoding and copying, which release the GIL; and signals,
CUDA and token arrays need no second copy.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor, nn

from mirrortune.data.draws import SourceDraws
from mirrortune.data.examples import Batch, Examples, Rows
from mirrortune.data.row_stream import Place, RowStream
from mirrortune.errors import DataError, NoRowsError
from mirrortune.system.devices import autocast

# Global batches sorted together by length: enough to keep padding small, few enough to keep the order random.
_BUCKET = 32


def epoch_batches(
    lengths: npt.NDArray[Any],
    global_batch_size: int,
    seed: int,
    epoch: int,
    classes: npt.NDArray[np.int64] | None = None,
    drawn: Rows | None = None,
) -> list[Rows]:
    """Return the global batches of one epoch, in order: every row once, rows of similar length together.

    Args:
        lengths: of each row, shape (N,).
        global_batch_size: rows of one optimizer step; the last batch may be smaller.
        seed: of the run.
        epoch: from 0; every epoch has its own order.
        classes: of each row, shape (N,), to draw as many rows, N, evenly from all classes instead of every row once.
        drawn: the rows of the epoch, instead of every row once.
    """
    random = np.random.default_rng([seed, epoch])
    if drawn is None and classes is not None:
        drawn = _drawn_evenly(classes, random)
    order = random.permutation(len(lengths) if drawn is None else drawn)
    span = global_batch_size * _BUCKET
    batches: list[Rows] = []
    for start in range(0, len(order), span):
        bucket = order[start : start + span]
        bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
        batches += [bucket[i : i + global_batch_size] for i in range(0, len(bucket), global_batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


def _drawn_evenly(classes: npt.NDArray[np.int64], random: np.random.Generator) -> Rows:
    """Return N rows, as many of each class but for one: all rows of a class before any of them again."""
    found = np.unique(classes)
    each, rest = divmod(len(classes), len(found))
    more = random.permutation(len(found)) < rest
    drawn = []
    for number, one_more in zip(found, more, strict=True):
        rows, count = np.flatnonzero(classes == number), each + int(one_more)
        drawn += [random.permutation(rows) for _ in range(count // len(rows))]
        drawn.append(random.permutation(rows)[: count % len(rows)])
    return np.concatenate(drawn)


def micro_batches(batch: Rows, lengths: npt.NDArray[Any], *, num_micro: int, num_ranks: int, rank: int) -> list[Rows]:
    """Return the parts of a global batch that ``rank`` computes: exactly ``num_micro``, some possibly empty.

    Rows are sorted by length first, so that each part needs little padding.
    """
    ordered = batch[np.argsort(lengths[batch], kind="stable")]
    return np.array_split(ordered, num_micro * num_ranks)[rank::num_ranks]


def forward(model: nn.Module, batch: Batch, device: torch.device) -> tuple[Batch, Any, Tensor]:
    """Run a model on a batch; return its inputs on ``device``, the outputs, and the targets on ``device``."""
    inputs = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
    targets = inputs.pop("targets")
    with autocast(model):
        return inputs, model(**inputs), targets


Job = TypeVar("Job")
Made = TypeVar("Made")
# Batches that wait besides those being made: one is enough, if they are made as fast as they are used.
_SPARE = 1
# Consecutive blocks without a usable row after which a stream is given up.
_MAX_EMPTY_BLOCKS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """What one rank computes at a time.

    Attributes:
        batch: inputs by name and ``targets``; in pinned memory if they go to a GPU.
        is_empty: whether it stands for no row and must not count: the last global batch may have fewer rows than parts,
            and the other ranks wait for this one's gradients.
        num_rows_of_step: rows of the global batch that it is a part of.
        num_tokens_of_step: tokens of the global batch without padding; None for rows that are not text.
        num_tokens, num_positions: of this batch's inputs, without and with padding; 0 for rows that are not text.
    """

    batch: Batch
    is_empty: bool
    num_rows_of_step: int
    num_tokens_of_step: int | None
    num_tokens: int = 0
    num_positions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedExamples:
    """Training rows that are encoded while they are read.

    Attributes:
        stream: of rows.
        encode: rows and a seed -> examples.
        block_rows: rows of a process that are shuffled together.
    """

    stream: RowStream
    encode: Callable[[pa.Table, int], Examples]
    block_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """What this rank computes in one optimizer step.

    Attributes:
        examples: rows in memory.
        parts: rows of each micro-batch; some may be empty.
        any_row: one row, for micro-batches without any.
        epoch: from 0.
        num_rows, num_tokens: of the global batch.
        place: after the step, in a stream; else None.
    """

    examples: Examples
    parts: list[Rows]
    any_row: Rows
    epoch: int
    num_rows: int
    num_tokens: int
    place: Place | None


class Feed:
    """The micro-batches of this rank, from rows in memory or from its share of a stream.

    Args:
        rows: to train on.
        accelerator: accelerate's.
        batch_size: rows of a micro-batch.
        num_micro: micro-batches per rank and step.
        num_workers: threads that make batches; 0 makes each when it is asked for. One more reads a stream.
        seed: of the order of rows.
        classes: of rows in memory, to draw them evenly; None to use each row once an epoch.
        draws: what an epoch draws from each source of a mixture; None to use each row once an epoch.

    Attributes:
        num_tokens, num_positions: of all micro-batches so far, without and with padding; 0 for rows that are not text.
    """

    def __init__(
        self,
        rows: Examples | StreamedExamples,
        accelerator: Any,
        *,
        batch_size: int,
        num_micro: int,
        num_workers: int,
        seed: int,
        classes: npt.NDArray[np.int64] | None = None,
        draws: SourceDraws | None = None,
    ) -> None:
        self.rows, self.accelerator, self.classes, self.draws = rows, accelerator, classes, draws
        self.num_micro, self.num_workers, self.seed = num_micro, num_workers, seed
        self.rows_per_step = batch_size * num_micro  # of this rank
        self._place = Place() if isinstance(rows, StreamedExamples) else None
        self.num_tokens = self.num_positions = 0

    @property
    def place(self) -> dict[str, Any] | None:
        """Place in the stream after the step whose micro-batches were taken last; None for rows in memory, where epoch
        and step suffice to continue.
        """
        return None if self._place is None else self._place.to_dict()

    @place.setter
    def place(self, place: dict[str, Any]) -> None:
        self._place = Place.from_dict(place)

    @property
    def steps_per_epoch(self) -> int | None:
        """Steps of an epoch, mostly every row once; None for a stream, whose end is not known."""
        if isinstance(self.rows, StreamedExamples):
            return None
        ranks: int = self.accelerator.num_processes
        size = len(self.rows) if self.draws is None else self.draws.size
        return math.ceil(size / (self.rows_per_step * ranks))

    def micro_batches(self, epoch: int, step_in_epoch: int, num_steps: int) -> Generator[MicroBatch, None, None]:
        """Yield ``num_micro`` micro-batches for each of ``num_steps`` steps, beginning at a step of an epoch and going
        on through the following epochs; a stream begins at :attr:`place` instead.
        """
        rows = self.rows
        found = self._streamed(rows) if isinstance(rows, StreamedExamples) else self._stored(rows, epoch, step_in_epoch)
        with closing(found) as steps:
            jobs = ((step, part) for step in itertools.islice(steps, num_steps) for part in step.parts)
            with closing(made_ahead(jobs, lambda job: self._make(*job), self.num_workers)) as made:
                for micro_batch, place in made:
                    self._place = place
                    self.num_tokens += micro_batch.num_tokens
                    self.num_positions += micro_batch.num_positions
                    yield micro_batch

    def _stored(self, rows: Examples, epoch: int, step_in_epoch: int) -> Generator[_Step, None, None]:
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        for number in itertools.count(epoch):
            drawn = None if self.draws is None else self.draws.rows(self.seed, number)
            batches = epoch_batches(rows.lengths, self.rows_per_step * ranks, self.seed, number, self.classes, drawn)
            for batch in batches[step_in_epoch if number == epoch else 0 :]:
                parts = micro_batches(batch, rows.lengths, num_micro=self.num_micro, num_ranks=ranks, rank=rank)
                yield _Step(
                    examples=rows, parts=parts, any_row=batch[:1], epoch=number, num_rows=len(batch),
                    num_tokens=int(rows.lengths[batch].sum()), place=None,
                )  # fmt: skip

    def _streamed(self, rows: StreamedExamples) -> Generator[_Step, None, None]:
        start, empty, ranks = self._place or Place(), 0, self.accelerator.num_processes
        # Whole batches, so that only rows left out can make the last batch of a block smaller.
        size = -(-rows.block_rows // self.rows_per_step) * self.rows_per_step
        tables = rows.stream.blocks(
            rank=self.accelerator.process_index, num_ranks=ranks, size=size, seed=self.seed, start=start
        )
        # A single thread reads, so that blocks come in order.
        blocks = made_ahead(
            itertools.repeat(None), lambda _: self._encode(rows, *next(tables)), min(self.num_workers, 1)
        )
        with closing(blocks):
            for place, examples in blocks:
                empty = 0 if examples else empty + 1
                if empty > _MAX_EMPTY_BLOCKS:
                    raise DataError(rows.stream.source, f"{empty} blocks in a row hold no usable row")
                if examples is None:
                    continue
                skipped = start.batch if place == replace(start, batch=0) else 0
                batches = epoch_batches(examples.lengths, self.rows_per_step, place.seed(self.seed), place.epoch)
                for number, batch in itertools.islice(enumerate(batches), skipped, None):
                    # What other ranks read is known only to them, and is about as much.
                    yield _Step(
                        examples=examples,
                        parts=micro_batches(batch, examples.lengths, num_micro=self.num_micro, num_ranks=1, rank=0),
                        any_row=batch[:1], epoch=place.epoch, num_rows=len(batch) * ranks,
                        num_tokens=int(examples.lengths[batch].sum()) * ranks, place=replace(place, batch=number + 1),
                    )  # fmt: skip

    def _encode(self, rows: StreamedExamples, place: Place, table: pa.Table) -> tuple[Place, Examples | None]:
        """Return the examples of a block, None if it has no usable row."""
        try:
            examples = rows.encode(table, place.seed(self.seed)) if table.num_rows else None
        except NoRowsError:
            examples = None
        return place, examples if examples is not None and len(examples) else None

    def _make(self, step: _Step, rows: Rows) -> tuple[MicroBatch, Place | None]:
        is_empty = len(rows) == 0
        batch = step.examples.batch(np.asarray(step.any_row if is_empty else rows), step.epoch)
        num_tokens, num_positions = (0, 0) if is_empty else _token_counts(batch)
        micro_batch = MicroBatch(
            num_tokens=num_tokens, num_positions=num_positions, batch=pinned(batch, self.accelerator.device),
            is_empty=is_empty, num_rows_of_step=step.num_rows,
            num_tokens_of_step=step.num_tokens if "input_ids" in batch else None,
        )  # fmt: skip
        return micro_batch, step.place


def _token_counts(batch: Batch) -> tuple[int, int]:
    """Return the tokens of a batch's inputs without and with padding; 0 where the mask does not say which are which."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if ids is None or mask is None or mask.shape != ids.shape:
        return 0, 0
    return int(mask.count_nonzero()), ids.numel()


def pinned(batch: Batch, device: torch.device) -> Batch:
    """Return the batch in pinned memory if ``device`` can copy from it asynchronously, else the batch itself."""
    if device.type != "cuda":
        return batch
    return {name: value.pin_memory() if isinstance(value, Tensor) else value for name, value in batch.items()}


def made_ahead(jobs: Iterator[Job], make: Callable[[Job], Made], num_workers: int) -> Generator[Made, None, None]:
    """Yield ``make(job)`` for every job, in order; ``num_workers`` threads work ahead by a bounded number of jobs.

    Args:
        jobs: read in the caller's thread.
        make: called in the threads, so it must depend on its job alone; its exceptions are raised here, in order.
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
