# SPDX-License-Identifier: Apache-2.0
"""feeding: batches ahead of the loop, in its order, by however many threads."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mirrortune.data.loader import Feed, epoch_batches, made_ahead
from tests.tiny_runs import sentences

WORKERS = pytest.mark.parametrize("num_workers", [0, 1, 3])


@WORKERS
def test_what_is_made_comes_in_the_order_of_the_jobs(num_workers: int) -> None:
    def make(job: int) -> int:
        time.sleep(0.002 * (job % 3))
        return job * job

    assert list(made_ahead(iter(range(20)), make, num_workers)) == [job * job for job in range(20)]
    assert list(made_ahead(iter([]), make, num_workers)) == []


@pytest.mark.parametrize("num_workers", [1, 3])
def test_threads_work_ahead_but_not_without_end(num_workers: int) -> None:
    made: list[int] = []
    batches = made_ahead(iter(range(100)), made.append, num_workers)
    next(batches)
    deadline = time.monotonic() + 30
    while len(made) < num_workers + 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert len(made) == num_workers + 2  # the one that was taken, and those that wait
    batches.close()


@WORKERS
def test_what_fails_fails_in_its_turn(num_workers: int) -> None:
    def make(job: int) -> int:
        if job == 2:
            raise ValueError("row 2")
        return job

    batches = made_ahead(iter(range(9)), make, num_workers)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(ValueError, match="row 2"):
        next(batches)


def test_closing_ends_the_threads() -> None:
    batches = made_ahead(iter(range(1000)), lambda job: job, 2)
    next(batches)
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("mirrortune-batches")]


def feed(rank: int = 0, ranks: int = 1, **settings: Any) -> Feed:
    """Thirty sentences, eight a step, cut into two micro-batches for each rank."""
    accelerator = SimpleNamespace(num_processes=ranks, process_index=rank, device=torch.device("cpu"))
    options: dict[str, Any] = {"batch_size": 4 // ranks, "num_micro": 2, "num_workers": 1, "seed": 3, **settings}
    return Feed(sentences(30), accelerator, **options)


@WORKERS
def test_batches_do_not_depend_on_who_makes_them(num_workers: int) -> None:
    expected = list(feed(num_workers=0).micro_batches(0, 0, 8))
    found = list(feed(num_workers=num_workers).micro_batches(0, 0, 8))
    assert len(found) == len(expected) == 16
    for one, other in zip(found, expected, strict=True):
        assert one.num_rows_of_step == other.num_rows_of_step
        assert all(torch.equal(one.batch[name], tensor) for name, tensor in other.batch.items())


def test_a_feed_can_begin_anywhere() -> None:
    """Steps 5 to 8 of two epochs of four are the second epoch's, and a cut within an epoch changes nothing."""
    whole = list(feed().micro_batches(0, 0, 8))
    for done in (3, 4, 6):
        rest = list(feed().micro_batches(done // 4, done % 4, 8 - done))
        for one, other in zip(rest, whole[2 * done :], strict=True):
            assert all(torch.equal(one.batch[name], tensor) for name, tensor in other.batch.items())


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_every_row_of_a_step_once(ranks: int) -> None:
    rows = sentences(30)
    steps = epoch_batches(rows.lengths, 8, 3, 0)
    parts = [list(feed(rank, ranks).micro_batches(0, 0, 4)) for rank in range(ranks)]
    for number, step in enumerate(steps):
        mine = [part for own in parts for part in own[2 * number : 2 * number + 2]]
        assert {part.num_rows_of_step for part in mine} == {len(step)}
        lengths = [int(mask.sum()) for p in mine if not p.is_empty for mask in p.batch["attention_mask"]]
        assert sorted(lengths) == sorted(np.asarray(rows.lengths[step]).tolist())
