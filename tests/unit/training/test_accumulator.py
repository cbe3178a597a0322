# SPDX-License-Identifier: Apache-2.0
"""tally: sums on the device, and what they say of a step that is not finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mirrortune.training.accumulator import StepClock, Tally

CPU = torch.device("cpu")


def add(tally: Tally, loss_sum: float, items: float, norm: float, step: int) -> Tensor:
    """Count a step."""
    return tally.add(torch.tensor([loss_sum, items], dtype=torch.float64), torch.tensor(norm), step)


def test_a_window_sums_losses_and_items() -> None:
    tally = Tally(CPU)
    for step, (loss, items) in enumerate(((1.5, 3), (0.25, 4), (2.0, 1)), start=1):
        assert add(tally, loss, items, step / 4, step) == 0
    reading = tally.read()
    assert (reading.loss_sum, reading.num_items, reading.is_finite) == (3.75, 8, True)
    assert (reading.step, reading.loss, reading.grad_norm) == (3, 2.0, 0.75)
    tally.open_window()
    assert (tally.read().loss_sum, tally.read().num_items) == (0, 0)


@pytest.mark.parametrize("weight", [0.3, 0.005])
def test_a_window_of_weighted_rows_has_the_sum_of_their_weights(weight: float) -> None:
    tally, resumed = Tally(CPU), Tally(CPU)
    for step in (1, 2):
        add(tally, 2.0 * 24 * weight, 24 * weight, 1.0, step)
    reading = tally.read()
    assert reading.num_items == pytest.approx(48 * weight)
    assert reading.loss_sum / reading.num_items == pytest.approx(2.0)
    resumed.open_window(reading.loss_sum, reading.num_items)
    assert resumed.read().num_items == reading.num_items


def test_a_window_that_was_cut_sums_as_one_that_was_not() -> None:
    """0.1 + 0.2 + 0.3 depends on the order of its sums; a resumed window must not."""
    whole, first, second = Tally(CPU), Tally(CPU), Tally(CPU)
    for step, loss in enumerate((0.1, 0.2, 0.3, 0.7), start=1):
        add(whole, loss, 1, 1.0, step)
        if step == 3:
            second.open_window(first.read().loss_sum, first.read().num_items)
        add(first if step < 3 else second, loss, 1, 1.0, step)
    assert second.read().loss_sum == whole.read().loss_sum
    assert second.read().num_items == 4


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "norm"])
def test_the_first_step_that_is_not_finite_is_remembered(value: float, where: str) -> None:
    tally = Tally(CPU)
    assert add(tally, 2.0, 4, 1.0, 1) == 0
    assert add(tally, value if where == "loss" else 1.0, 4, value if where == "norm" else 1.0, 2) == 1
    assert add(tally, 2.0, 4, 1.0, 3) == 1, "no step is made after it"
    reading = tally.read()
    assert not reading.is_finite
    assert reading.step == 2
    assert str(reading.loss if where == "loss" else reading.grad_norm) == str(value)
    assert (reading.loss_sum, reading.num_items) == (2.0, 4)


def test_a_clock_counts_every_step() -> None:
    clock = StepClock(CPU)
    for _ in range(3):
        clock.start()
        clock.stop()
    assert len(clock.seconds()) == 3
    clock.start()
    clock.stop()
    assert len(clock.seconds()) == 4
    assert all(second >= 0 for second in clock.seconds())
