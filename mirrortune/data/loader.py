# SPDX-License-Identifier: Apache-2.0
"""Determine the order of batches, and make them in threads ahead of training. Results do not depend on the threads.

Threads suffice because making a batch is mostly NumPy, decoding and copying, which release the GIL. Processes would
need copies of token arrays, and special handling of signals and CUDA.
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
from mirrortune.errors import DataError, MirrortuneError, NoRowsError
from mirrortune.system.devices import autocast

# Number of global batches sorted together by length: large enough for little padding, small enough for a random order.
_BUCKET = 32


def epoch_batches(
    lengths: npt.NDArray[Any],
    global_batch_size: int,
    seed: int,
    epoch: int,
    classes: npt.NDArray[np.int64] | None = None,
    drawn: Rows | None = None,
) -> list[Rows]:
    """Return the global batches of one epoch, in order, with rows of similar length together.

    By default each row is used once.

    Args:
        lengths: length of each row, shape (N,).
        global_batch_size: number of rows of an optimizer step; the last batch may be smaller.
        seed: seed of the run.
        epoch: index of the epoch, from 0; each epoch has a different order.
        classes: class of each row, shape (N,), to draw N rows evenly from all classes; None for no even draws.
        drawn: indices of the rows to use in this epoch; None for all rows.
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
    """Draw N rows so that the class counts differ by at most one; no row repeats before all rows of its class occur."""
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
    """Return the ``num_micro`` parts of a global batch that ``rank`` computes, some of which may be empty.

    Rows are sorted by length before they are divided, so that each part needs little padding. The parts of all ranks
    at the same moment, whose rows some tasks compare with each other, are those of one process.
    """
    ordered = batch[np.argsort(lengths[batch], kind="stable")]
    return [np.array_split(part, num_ranks)[rank] for part in np.array_split(ordered, num_micro)]


def forward(model: nn.Module, batch: Batch, device: torch.device) -> tuple[Batch, Any, Tensor]:
    """Run a model on a batch; return its inputs on ``device``, the outputs, and the targets on ``device``."""
    inputs = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
    targets = inputs.pop("targets")
    with autocast(model):
        return inputs, model(**inputs), targets


Job = TypeVar("Job")
Made = TypeVar("Made")
# Number of finished batches that wait, besides those being made. One suffices if making is as fast as using them.
_SPARE = 1
# Number of consecutive blocks without a usable row after which reading a stream fails.
_MAX_EMPTY_BLOCKS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """The rows of one forward and backward pass of a rank.

    Attributes:
        batch: inputs by name and ``targets``; in pinned memory if they are copied to a GPU.
        is_empty: whether the batch is a placeholder that must not contribute to the loss. The last global batch may
            have fewer rows than parts, but all ranks must take part in the reduction of gradients.
        num_rows_of_step: number of rows of the global batch.
        num_tokens_of_step: number of tokens of the global batch without padding; None for rows that are not text.
        num_tokens, num_positions: number of tokens in this batch without and with padding; 0 for rows that are not
            text.
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
        stream: stream of the rows.
        encode: (rows, seed) -> examples.
        block_rows: number of rows of a process that are shuffled together.
    """

    stream: RowStream
    encode: Callable[[pa.Table, int], Examples]
    block_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """The rows of one optimizer step of this rank.

    Attributes:
        examples: encoded rows.
        parts: row indices of each micro-batch, some of which may be empty.
        any_row: index of one row, used for empty micro-batches.
        epoch: index of the epoch, from 0.
        num_rows, num_tokens: number of rows and tokens in the global batch.
        place: place in the stream after the step; None for rows in memory.
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
        rows: training rows.
        accelerator: an ``accelerate.Accelerator``.
        batch_size: number of rows of a micro-batch.
        num_micro: number of micro-batches per rank and step.
        num_workers: number of threads that make batches; 0 to make each batch on demand. Another thread reads a stream.
        seed: seed of the order of rows.
        classes: classes of rows in memory, to draw them evenly; None to use each row once per epoch.
        draws: rows that an epoch draws from each source of a mixture; None to use each row once per epoch.

    Attributes:
        num_tokens, num_positions: number of tokens in all micro-batches so far, without and with padding; 0 for rows
            that are not text.
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
        """Place in the stream after the last step whose micro-batches were consumed; None for rows in memory, for which
        epoch and step suffice to resume.
        """
        return None if self._place is None else self._place.to_dict()

    @place.setter
    def place(self, place: dict[str, Any]) -> None:
        self._place = Place.from_dict(place)

    @property
    def steps_per_epoch(self) -> int | None:
        """Number of steps of an epoch; None for a stream, whose length is unknown."""
        if isinstance(self.rows, StreamedExamples):
            return None
        ranks: int = self.accelerator.num_processes
        size = len(self.rows) if self.draws is None else self.draws.size
        return math.ceil(size / (self.rows_per_step * ranks))

    def micro_batches(self, epoch: int, step_in_epoch: int, num_steps: int) -> Generator[MicroBatch, None, None]:
        """Yield ``num_micro`` micro-batches for each of ``num_steps`` steps, across epochs.

        The first step is ``step_in_epoch`` of ``epoch``; for a stream, it is the one at :attr:`place`.
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
                    num_tokens=int(rows.num_tokens[batch].sum()), place=None,
                )  # fmt: skip

    def _streamed(self, rows: StreamedExamples) -> Generator[_Step, None, None]:
        start, empty, ranks = self._place or Place(), 0, self.accelerator.num_processes
        # A multiple of the batch size, so that the last batch of a block is smaller only if rows are left out.
        size = -(-rows.block_rows // self.rows_per_step) * self.rows_per_step
        tables = rows.stream.blocks(
            rank=self.accelerator.process_index, num_ranks=ranks, size=size, seed=self.seed, start=start
        )
        # A single thread reads, so that blocks are in order.
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
                    # The counts of other ranks are not known here; they are about the same.
                    yield _Step(
                        examples=examples,
                        parts=micro_batches(batch, examples.lengths, num_micro=self.num_micro, num_ranks=1, rank=0),
                        any_row=batch[:1], epoch=place.epoch, num_rows=len(batch) * ranks,
                        num_tokens=int(examples.num_tokens[batch].sum()) * ranks,
                        place=replace(place, batch=number + 1),
                    )  # fmt: skip

    def _encode(self, rows: StreamedExamples, place: Place, table: pa.Table) -> tuple[Place, Examples | None]:
        """Return the examples of a block, or None if it has no usable row."""
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
    """Return the number of tokens in a batch without and with padding; 0 if the mask does not tell them apart."""
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
    """Yield ``make(job)`` for each job, in order; ``num_workers`` threads work ahead by a bounded number of jobs.

    Args:
        jobs: jobs, read in the caller's thread.
        make: called in the threads, so it must depend only on its job. Its exceptions, and those of ``jobs``, are
            raised here, in order.
        num_workers: number of threads; 0 to call ``make`` in the caller's thread on demand.
    """
    if num_workers == 0:
        yield from map(make, jobs)
        return
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="mirrortune-batches")

    def submitted() -> Iterator[Future[Made]]:
        try:
            for job in jobs:
                yield pool.submit(make, job)
        except MirrortuneError as error:  # not before what was made of the jobs before it is used
            failed: Future[Made] = Future()
            failed.set_exception(error)
            yield failed

    try:
        futures = submitted()
        waiting = deque(itertools.islice(futures, num_workers + _SPARE))
        while waiting:
            made = waiting.popleft().result()
            waiting.extend(itertools.islice(futures, 1))
            yield made
    finally:
        pool.shutdown(cancel_futures=True)
