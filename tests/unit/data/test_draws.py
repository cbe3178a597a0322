# SPDX-License-Identifier: Apache-2.0
"""What an epoch draws from each source of a mixture: exact counts, an even use of rows, the same for the same seed."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from mirrortune.data.draws import SourceDraws, repeated_rows
from mirrortune.data.duplicates import rows_in_both
from mirrortune.data.loader import Feed
from mirrortune.data.mixture import joined_splits
from tests.tiny_runs import as_examples
from tests.unit.data.test_mixture import part

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=4)
WEIGHTS = st.floats(0.05, 4)


def draws_of(sizes: list[int], weights: list[float]) -> SourceDraws:
    return SourceDraws(sources=np.repeat(np.arange(len(sizes)), sizes), weights=tuple(weights))


@given(data=st.data(), sizes=SIZES, seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 5))
def test_an_epoch_draws_the_number_nearest_to_size_times_weight(
    data: st.DataObject, sizes: list[int], seed: int, epoch: int
) -> None:
    weights = data.draw(st.lists(WEIGHTS, min_size=len(sizes), max_size=len(sizes)))
    draws = draws_of(sizes, weights)
    rows = draws.rows(seed, epoch)
    found = np.bincount(draws.sources[rows], minlength=len(sizes))
    assert len(rows) == draws.size
    for count, size, weight in zip(found, sizes, weights, strict=True):
        assert abs(count - size * weight) <= 0.5 or (count == 1 and size * weight < 1)
    np.testing.assert_array_equal(rows, draws_of(sizes, weights).rows(seed, epoch))


@given(sizes=SIZES, weight=WEIGHTS, seed=st.integers(0, 99), epochs=st.integers(1, 8))
def test_no_row_is_drawn_again_before_all_others_of_its_source(
    sizes: list[int], weight: float, seed: int, epochs: int
) -> None:
    draws = draws_of(sizes, [weight] * len(sizes))
    times = np.bincount(np.concatenate([draws.rows(seed, epoch) for epoch in range(epochs)]), minlength=sum(sizes))
    for number in range(len(sizes)):
        own = times[draws.sources == number]
        assert own.max() - own.min() <= 1


def test_weights_are_times_a_row_is_drawn() -> None:
    draws = draws_of([10, 6], [2, 0.5])
    times = np.bincount(draws.rows(0, 0), minlength=16)
    assert times[:10].tolist() == [2] * 10
    assert sorted(times[10:].tolist()) == [0, 0, 0, 1, 1, 1]
    assert set(draws.rows(0, 0)[20:]) | set(draws.rows(0, 1)[20:]) == set(range(10, 16))  # the other half


def test_rows_that_are_in_a_source_before_are_counted() -> None:
    split = joined_splits([part(0, text=["a", "b"]), part(1, text=["b", "b", "c"]), part(2, text=["c", "d"])])
    assert repeated_rows(split, [("text", "text")], 3) == [0, 2, 1]
    assert rows_in_both(split, split, [("text", "text")]) == 7


def steps(draws: SourceDraws, epoch: int, step: int, count: int, ranks: int, rank: int) -> list[list[int]]:
    """Row numbers of the micro-batches of a process, beginning at a step of an epoch."""
    accelerator = SimpleNamespace(num_processes=ranks, process_index=rank, device=torch.device("cpu"))
    rows = as_examples([[5] * (3 + row % 4) for row in range(len(draws.sources))])
    feed = Feed(rows, accelerator, batch_size=3, num_micro=1, num_workers=0, seed=4, draws=draws)
    assert feed.steps_per_epoch == -(-draws.size // (3 * ranks))
    return [[] if made.is_empty else made.batch["targets"].tolist() for made in feed.micro_batches(epoch, step, count)]


def test_processes_share_what_an_epoch_draws_and_go_on_in_the_middle_of_one() -> None:
    draws = draws_of([9, 7], [1.5, 0.5])
    size = -(-draws.size // 6)
    both = [steps(draws, 0, 0, 2 * size, ranks=2, rank=rank) for rank in (0, 1)]
    for epoch in (0, 1):
        own = slice(epoch * size, (epoch + 1) * size)
        found = [row for part in both for batch in part[own] for row in batch]
        assert sorted(found) == sorted(draws.rows(4, epoch).tolist())
    for step in (1, size + 1):
        for rank in (0, 1):
            again = steps(draws, *divmod(step, size), 2 * size - step, ranks=2, rank=rank)
            assert again == both[rank][step:]
