# SPDX-License-Identifier: Apache-2.0
"""The learning rate as a pure function of the step: a linear warm-up, then a decay, by transformers where it has it."""

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
    """Return the share of the peak learning rate for optimizer step ``step`` (from 0), in [0, 1].

    It rises linearly over ``warmup_steps`` (the first step is above 0), then decays to ``min_lr_ratio`` at the step
    after the last; ``inverse-sqrt`` decays more slowly, and towards it.

    Args:
        step: from 0.
        total_steps: steps of the run.
        warmup_steps: those of them over which it rises.
        schedule: shape of the decay.
        min_lr_ratio: share of the peak at the end.
        num_cycles: of ``cosine-restarts``.
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
        length = min(left, max(1, math.ceil(decay_ratio * total_steps)))
        factor = _decay("warmup_stable_decay", 0, left, num_decay_steps=length)(step - warmup_steps)
    else:
        factor = _decay("inverse_sqrt", warmup_steps, None)(step)
    return min_lr_ratio + (1.0 - min_lr_ratio) * factor if min_lr_ratio else factor


@functools.cache
def _decay(name: str, warmup_steps: int, total_steps: int | None, **options: int) -> Callable[[int], float]:
    """Return a decay by transformers' scheduler of that name, as a function of the step."""
    from transformers import get_scheduler  # noqa: PLC0415

    unused = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)  # a scheduler sets the rates of an optimizer
    scheduler: Any = get_scheduler(
        name, unused, num_warmup_steps=warmup_steps, num_training_steps=total_steps, scheduler_specific_kwargs=options
    )
    decay: Callable[[int], float] = scheduler.lr_lambdas[0]
    return decay
