# SPDX-License-Identifier: Apache-2.0
"""Compute the learning rate as a pure function of the step: a linear warm-up, then a decay as in transformers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import torch

Schedule = Literal["linear", "cosine", "constant", "cosine-restarts", "wsd", "inverse-sqrt"]


def lr_factor(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    schedule: Schedule,
    min_lr_ratio: float = 0.0,
    num_cycles: int = 2,
    decay_ratio: float = 0.1,
) -> float:
    """Return the learning rate of an optimizer step as a share of the peak, in [0, 1].

    It rises linearly over ``warmup_steps``, starting above 0, then decays and would reach ``min_lr_ratio`` in the step
    after the last; ``inverse-sqrt`` decays more slowly and only approaches it.

    Args:
        step: index of the step, starting at 0.
        total_steps: number of steps of the run.
        warmup_steps: number of steps of the warm-up.
        schedule: shape of the decay.
        min_lr_ratio: share of the peak at the end.
        num_cycles: number of cycles of ``cosine-restarts``.
        decay_ratio: share of ``total_steps`` in which ``wsd`` decays.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    left = max(1, total_steps - warmup_steps)
    if schedule == "linear":
        factor = max(0.0, 1.0 - (step - warmup_steps) / left)
    elif schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup_steps) / left)))
    elif schedule == "cosine-restarts":
        factor = _decay("cosine_with_restarts", 0, left, num_cycles=num_cycles)(step - warmup_steps)
    elif schedule == "wsd":
        length = min(left, max(1, whole_steps(decay_ratio * total_steps)))
        factor = _decay("warmup_stable_decay", 0, left, num_decay_steps=length)(step - warmup_steps)
    else:
        start = max(1, warmup_steps)  # transformers takes 10,000 steps in place of a warm-up of 0
        factor = _decay("inverse_sqrt", start, None)(step - warmup_steps + start)
    return min_lr_ratio + (1.0 - min_lr_ratio) * factor if min_lr_ratio else factor


def whole_steps(steps: float) -> int:
    """Round a number of steps up, except for the rounding error of the product it is: 0.07 * 100 is above 7."""
    return math.ceil(steps - 1e-9)


@functools.cache
def _decay(name: str, warmup_steps: int, total_steps: int | None, **options: int) -> Callable[[int], float]:
    """Return the decay of transformers' scheduler of this name, as a function of the step."""
    from transformers import get_scheduler  # noqa: PLC0415

    unused = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)  # schedulers require an optimizer
    scheduler: Any = get_scheduler(
        name, unused, num_warmup_steps=warmup_steps, num_training_steps=total_steps, scheduler_specific_kwargs=options
    )
    decay: Callable[[int], float] = scheduler.lr_lambdas[0]
    return decay
