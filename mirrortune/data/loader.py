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
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from mirrortune.data.batching import epoch_batches, micro_batches
from mirrortune.data.examples import Batch, Examples, Rows

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
