# SPDX-License-Identifier: Apache-2.0
"""AdamW with a group for the adapter and groups for the head, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

from mirrortune.adapters.inject import adapter_parameters, attachment, plain_parameters

Schedule = Literal["linear", "cosine", "constant"]


def build_optimizer(model: nn.Module, *, lr: float, head_lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Build fused AdamW over the trained parameters of ``model``.

    Groups have a ``peak_lr``: ``lr`` for cores (and for base parameters that are trained), ``head_lr`` for the head.
    Weight decay applies to matrices outside the cores only: an angle has no reason to go back to zero.
    """
    head_names = set(attachment(model).targets.head)
    plain = plain_parameters(model)
    wanted = [
        (list(adapter_parameters(model).values()), lr, 0.0),
        ([p for n, p in plain.items() if n not in head_names and p.ndim < 2], lr, 0.0),
        ([p for n, p in plain.items() if n not in head_names and p.ndim >= 2], lr, weight_decay),
        ([p for n, p in plain.items() if n in head_names and p.ndim < 2], head_lr, 0.0),
        ([p for n, p in plain.items() if n in head_names and p.ndim >= 2], head_lr, weight_decay),
    ]
    groups = [
        {"params": params, "lr": peak, "peak_lr": peak, "weight_decay": decay}
        for params, peak, decay in wanted
        if params
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=True)


def lr_factor(step: int, *, total_steps: int, warmup_steps: int, schedule: Schedule) -> float:
    """Return the share of the peak learning rate for optimizer step ``step`` (from 0), in [0, 1].

    It rises linearly over ``warmup_steps`` (the first step is above 0), then decays to 0 at the step after the last.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return max(0.0, 1.0 - done)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rate of every group to ``factor`` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
