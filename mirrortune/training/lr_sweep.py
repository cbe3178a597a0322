# SPDX-License-Identifier: Apache-2.0
"""Sweep the learning rate of the adapter over a few decades, one step per rate, and propose a rate from the losses.

This is the range test of Smith (2017, "Cyclical learning rates for training neural networks"), with the proposals of
fastai and Lightning: the rate at which the loss falls fastest, and a tenth of the rate at which it is lowest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from mirrortune.errors import DivergedError
from mirrortune.training.trainer import Trainer

_BELOW, _ABOVE = 1e-3, 1e2
"""Lowest and highest rate of a sweep, relative to the set rate."""
_STOPS_AT = 4.0
"""A sweep ends when the loss exceeds the lowest loss so far by this factor."""
_WINDOW = 0.12
"""Width of the moving average of the losses, as a share of the sweep's steps."""
_AGREES, _DIFFERS = 4.0, 16.0
"""Ratio of the two proposals up to which they agree, and ratio from which they contradict each other."""
_CLEAR, _FAINT = 10.0, 5.0
"""Decrease of the loss, in standard errors of its noise, that is clear, and decrease that could be noise. A sweep has
about eight independent means; if the loss does not decrease, their range is about 3 standard errors and rarely 5.
"""

_LEAST = 0.2
"""Minimum share of a sweep's steps from which the noise is estimated."""

Sureness = Literal["sure", "fairly sure", "unsure"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """The losses at increasing learning rates.

    Attributes:
        rates: learning rate of the adapter in each step.
        losses: mean loss of the rows of each step, before the update.
        smoothed: losses averaged over neighbouring steps.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A learning rate read from a sweep.

    Attributes:
        lr: proposed learning rate; None if the loss never fell.
        steepest: rate at which the loss falls fastest.
        tenth_of_lowest: a tenth of the rate at which the loss is lowest.
        sureness: how reliable the proposal is: whether the two rates agree and the decrease exceeds the noise.
        reason: reason for the sureness, as text.
    """

    lr: float | None
    steepest: float | None
    tenth_of_lowest: float | None
    sureness: Sureness
    reason: str


def sweep_rates(trainer: Trainer, *, lr: float, num_steps: int, on_step: Callable[[], object]) -> Sweep:
    """Make one step at each of several increasing rates, from ``lr`` / 1000 to 100 ``lr``.

    The head keeps its own rate. The sweep ends early if the loss explodes.

    Args:
        trainer: trainer with a learning rate of 1; its model is changed and must not be used afterwards.
        lr: set learning rate; the sweep spans a thousandth to a hundred times it.
        num_steps: number of steps and rates.
        on_step: called after each step.

    Raises:
        DivergedError: the first loss is not finite.
    """
    rates = np.geomspace(lr * _BELOW, lr * _ABOVE, num_steps).tolist()
    groups = trainer.optimizer.param_groups
    heads = [(group, group["peak_lr"]) for group in groups if group["peak_lr"] != trainer.settings.lr]
    losses: list[float] = []
    trainer.model.train()
    with closing(trainer.feed.micro_batches(0, 0, num_steps)) as micro_batches:
        for number, rate in enumerate(rates, start=1):
            factor = rate / trainer.settings.lr
            for group, peak in heads:
                group["peak_lr"] = peak / factor
            trainer.tally.open_window()
            trainer.stepper.step(number, micro_batches, factor)
            reading = trainer.tally.read()
            on_step()
            # In float16, a step whose loss is not finite is skipped; its window has no items.
            if not (reading.is_finite and reading.num_items and math.isfinite(reading.loss)):
                break
            losses.append(reading.loss)
            if losses[-1] > _STOPS_AT * min(losses) and len(losses) > num_steps // 10:
                break
    if not losses:
        raise DivergedError(1, "the first loss is not finite", fix="Look at the rows for broken values")
    return Sweep(rates=rates[: len(losses)], losses=losses, smoothed=_smooth(losses, num_steps).tolist())


def propose(sweep: Sweep) -> Proposal:
    """Propose the geometric mean of the steepest rate and a tenth of the lowest, if the loss fell at all.

    The former is often a little too high and the latter a little too low.
    """
    smoothed, logs = np.array(sweep.smoothed), np.log10(sweep.rates)
    lowest = int(smoothed.argmin())
    fall = float(smoothed[: lowest + 1].max() - smoothed[lowest])
    noise = _noise(sweep)
    if lowest < 3 or fall <= _FAINT * noise:
        return Proposal(lr=None, steepest=None, tenth_of_lowest=None, sureness="unsure",
                        reason="the loss did not fall by more than its noise")  # fmt: skip
    slopes = np.gradient(smoothed[: lowest + 1], logs[: lowest + 1])
    steepest, tenth = sweep.rates[int(slopes.argmin())], sweep.rates[lowest] / 10
    apart = max(steepest / tenth, tenth / steepest)
    sureness: Sureness = "fairly sure"
    if apart > _DIFFERS or fall <= _CLEAR * noise:
        sureness = "unsure"
    elif apart <= _AGREES:
        sureness = "sure"
    return Proposal(
        lr=float(f"{math.sqrt(steepest * tenth):.1g}"), steepest=steepest, tenth_of_lowest=tenth, sureness=sureness,
        reason=f"the loss falls fastest at {steepest:.2g} and is lowest at {sweep.rates[lowest]:.2g}; it falls by "
        f"{fall:.3g}, its noise is {noise:.1g}",
    )  # fmt: skip


def _smooth(losses: list[float], num_steps: int) -> npt.NDArray[np.float64]:
    """Return a centred moving average, which does not lag behind; the window is truncated at the ends."""
    reach = max(1, round(_WINDOW * num_steps / 2))
    return np.array([np.mean(losses[max(0, i - reach) : i + reach + 1]) for i in range(len(losses))])


def _noise(sweep: Sweep) -> float:
    """Return the standard error of a smoothed loss: the residual deviation over the root of the window size."""
    before = max(int(np.argmin(sweep.smoothed)) + 1, round(_LEAST * len(sweep.losses)))
    rest = np.array(sweep.losses[:before]) - np.array(sweep.smoothed[:before])
    return float(rest.std() / math.sqrt(max(3, round(_WINDOW * len(sweep.losses)))))
