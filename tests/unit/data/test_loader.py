# SPDX-License-Identifier: Apache-2.0
"""Batches: every row once, little padding, exact partitions; made ahead of the loop, in its order, by any threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mirrortune.data.loader import Feed, epoch_batches, made_ahead, micro_batches
from mirrortune.errors import DataError
from tests.tiny_runs import as_examples, sentences

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


@WORKERS
def test_jobs_that_end_in_an_error_are_made_first(num_workers: int) -> None:
    def jobs() -> Iterator[int]:
        yield from range(2)
        raise DataError("rows", "row 2")

    batches = made_ahead(jobs(), lambda job: job, num_workers)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(DataError, match="row 2"):
        next(batches)


def test_closing_ends_the_threads() -> None:
    batches = made_ahead(iter(range(1000)), lambda job: job, 2)
    next(batches)
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("mirrortune-batches")]


BALANCED = np.arange(30) % 5 // 4  # 24 rows of one class, 6 of another


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


@pytest.mark.parametrize("classes", [None, BALANCED])
def test_a_feed_can_begin_anywhere(classes: Any) -> None:
    """Steps 5 to 8 of two epochs of four are the second epoch's, and a cut within an epoch changes nothing."""
    whole = list(feed(classes=classes).micro_batches(0, 0, 8))
    for done in (3, 4, 6):
        rest = list(feed(classes=classes).micro_batches(done // 4, done % 4, 8 - done))
        for one, other in zip(rest, whole[2 * done :], strict=True):
            assert all(torch.equal(one.batch[name], tensor) for name, tensor in other.batch.items())


def test_tokens_are_counted_with_and_without_padding() -> None:
    rows, found = sentences(30), feed(num_workers=2)

    masks = [part.batch["attention_mask"] for part in found.micro_batches(0, 0, 4)]

    assert found.num_tokens == rows.lengths.sum() == sum(int(mask.sum()) for mask in masks)
    assert found.num_positions == sum(mask.numel() for mask in masks) > found.num_tokens


@pytest.mark.parametrize("classes", [None, BALANCED])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_every_row_of_a_step_once(ranks: int, classes: Any) -> None:
    rows = sentences(30)
    steps = epoch_batches(rows.lengths, 8, 3, 0, classes)
    parts = [list(feed(rank, ranks, classes=classes).micro_batches(0, 0, 4)) for rank in range(ranks)]
    for number, step in enumerate(steps):
        mine = [part for own in parts for part in own[2 * number : 2 * number + 2]]
        assert {part.num_rows_of_step for part in mine} == {len(step)}
        lengths = [int(mask.sum()) for p in mine if not p.is_empty for mask in p.batch["attention_mask"]]
        assert sorted(lengths) == sorted(np.asarray(rows.lengths[step]).tolist())


SEEDS = st.integers(0, 2**16)
LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=200).map(np.array)


def padded(batches: list[npt.NDArray[Any]], lengths: npt.NDArray[Any]) -> int:
    """Tokens of all batches with their padding."""
    return sum(len(rows) * int(lengths[rows].max()) for rows in batches if len(rows))


@given(lengths=LENGTHS, size=st.integers(1, 40), seed=SEEDS, epoch=st.integers(0, 5))
def test_an_epoch_holds_every_row_once(lengths: npt.NDArray[Any], size: int, seed: int, epoch: int) -> None:
    batches = epoch_batches(lengths, size, seed, epoch)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // size)
    assert sorted(len(batch) for batch in batches)[1:] == [size] * (len(batches) - 1)


@given(lengths=LENGTHS, size=st.integers(1, 40), seed=SEEDS, epoch=st.integers(0, 5))
def test_an_epoch_is_a_function_of_seed_and_epoch(lengths: npt.NDArray[Any], size: int, seed: int, epoch: int) -> None:
    np.random.seed(epoch)  # noqa: NPY002  (must not matter)
    first = epoch_batches(lengths, size, seed, epoch)
    np.random.seed(epoch + 1)  # noqa: NPY002
    second = epoch_batches(lengths, size, seed, epoch)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@given(
    classes=st.lists(st.sampled_from([0, 0, 0, 0, 2, 5]), min_size=1, max_size=200).map(np.array),
    size=st.integers(1, 40),
    seed=SEEDS,
)
def test_a_balanced_epoch_draws_classes_evenly(classes: npt.NDArray[np.int64], size: int, seed: int) -> None:
    lengths = np.arange(len(classes)) % 7 + 1

    rows = np.concatenate(epoch_batches(lengths, size, seed, 0, classes))

    assert len(rows) == len(classes), "an epoch has as many steps as without"
    drawn, kinds = np.bincount(classes[rows], minlength=6), np.unique(classes)
    assert drawn.sum() == drawn[kinds].sum()
    assert drawn[kinds].max() - drawn[kinds].min() <= 1
    for kind in kinds:  # no row is drawn again before all of its class were
        times = np.bincount(rows, minlength=len(classes))[classes == kind]
        assert times.max() - times.min() <= 1
    again = np.concatenate(epoch_batches(lengths, size, seed, 0, classes))
    assert np.array_equal(rows, again)


@pytest.mark.parametrize("other", [{"seed": 1}, {"epoch": 1}])
def test_seeds_and_epochs_have_their_own_orders(other: dict[str, int]) -> None:
    lengths = np.full(256, 9)
    one, two = (epoch_batches(lengths, 8, **{"seed": 0, "epoch": 0, **given}) for given in ({}, other))
    assert not any(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def realistic_lengths(rows: int, seed: int) -> npt.NDArray[np.int64]:
    """Like GLUE's sentences: log-normal with a median of 25 tokens, cut at 128."""
    return np.clip(np.random.default_rng(seed).lognormal(np.log(25), 0.6, rows), 4, 128).astype(np.int64)


@pytest.mark.parametrize("size", [8, 32, 64])
@pytest.mark.parametrize("seed", range(3))
def test_padding_is_at_most_a_quarter(size: int, seed: int) -> None:
    """The bound of an epoch: 1.25 tokens computed for a real one. Random batches need 1.6 to 3."""
    lengths = realistic_lengths(6000, seed)
    batches = epoch_batches(lengths, size, seed, 0)
    real = int(lengths.sum())
    assert padded(batches, lengths) <= 1.25 * real
    shuffled = np.array_split(np.random.default_rng(seed).permutation(6000), len(batches))
    assert padded(shuffled, lengths) > 1.6 * real


def test_micro_batches_are_padded_less_than_their_batch() -> None:
    lengths = realistic_lengths(64, 0)
    parts = micro_batches(np.arange(64), lengths, num_micro=8, num_ranks=1, rank=0)
    assert padded(parts, lengths) <= 1.25 * int(lengths.sum()) < 0.5 * padded([np.arange(64)], lengths)


def test_batches_do_not_come_in_the_order_of_their_lengths() -> None:
    lengths = realistic_lengths(2000, 0)
    means = [lengths[batch].mean() for batch in epoch_batches(lengths, 16, 0, 0)]
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.3


@given(lengths=LENGTHS, num_micro=st.integers(1, 9), num_ranks=st.integers(1, 4), picked=st.integers(1, 50), seed=SEEDS)
def test_micro_batches_partition_the_batch(
    lengths: npt.NDArray[Any], num_micro: int, num_ranks: int, picked: int, seed: int
) -> None:
    batch = np.random.default_rng(seed).permutation(len(lengths))[:picked]
    shares = [
        micro_batches(batch, lengths, num_micro=num_micro, num_ranks=num_ranks, rank=rank) for rank in range(num_ranks)
    ]
    assert [len(share) for share in shares] == [num_micro] * num_ranks
    parts = [part for share in shares for part in share]
    assert sorted(np.concatenate(parts).tolist()) == sorted(batch.tolist())
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    # Rows that are compared with each other are the same as those of one process.
    alone = micro_batches(batch, lengths, num_micro=num_micro, num_ranks=1, rank=0)
    assert [np.concatenate(together).tolist() for together in zip(*shares, strict=True)] == [p.tolist() for p in alone]
    # Ranks share the long rows: at the same moment, all are at parts of about the same length.
    flat = [int(lengths[part].max()) for index in range(num_micro) for part in [s[index] for s in shares] if len(part)]
    assert flat == sorted(flat)


ROWS = [[5, 6, 7], [8], [9, 10, 11, 12]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_batches_are_padded_to_the_longest_on_the_tokenizers_side(tokenizer: Any, side: str) -> None:
    import copy

    tokenizer = copy.copy(tokenizer)
    tokenizer.padding_side = side
    batch = as_examples(ROWS, [[i % 2 for i in row] for row in ROWS], tokenizer).batch(np.array([1, 0]))
    pad = tokenizer.pad_token_id
    expected = {"right": [[8, pad, pad], [5, 6, 7]], "left": [[pad, pad, 8], [5, 6, 7]]}[side]
    assert batch["input_ids"].tolist() == expected
    assert batch["attention_mask"].tolist() == [{"right": [1, 0, 0], "left": [0, 0, 1]}[side], [1, 1, 1]]
    assert batch["token_type_ids"].tolist()[1] == [1, 0, 1]
    assert batch["targets"].tolist() == [1, 0]
    assert {t.dtype for t in batch.values()} == {torch.int64}


def test_batches_are_padded_as_the_tokenizer_itself_does(tokenizer: Any) -> None:
    texts = ["the film is good", "bad", "a very very dull plot , and so long"]
    expected = tokenizer(texts, padding=True, return_tensors="pt")
    rows = tokenizer(texts)
    batch = as_examples(rows["input_ids"], rows["token_type_ids"]).batch(np.arange(3))
    assert set(batch) == {*expected, "targets"}
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_a_batch_is_only_what_the_model_takes() -> None:
    batch = as_examples(ROWS).batch(np.array([2]))
    assert set(batch) == {"input_ids", "attention_mask", "targets"}
    assert batch["input_ids"].tolist() == [[9, 10, 11, 12]]
