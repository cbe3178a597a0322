# SPDX-License-Identifier: Apache-2.0
"""A base model in 16 bits with a head in 32: what is trained keeps its digits, what is frozen keeps its size."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import nn

_HALF = (torch.bfloat16, torch.float16)


def widen(model: nn.Module, names: Iterable[str]) -> None:
    """Turn the named 16-bit parameters into float32, in place.

    A head in bfloat16 stops learning early: AdamW's small steps are below half a unit in the last of its 8 bits.
    """
    wanted = set(names)
    for name, parameter in model.named_parameters():
        if name in wanted and parameter.dtype in _HALF:
            parameter.data = parameter.data.float()


def autocast(model: nn.Module) -> AbstractContextManager[object]:
    """The context to run ``model`` in: bfloat16 autocast when any of its weights is in 16 bits, nothing otherwise."""
    parameters = list(model.parameters())
    if any(p.dtype in _HALF for p in parameters):
        return torch.autocast(parameters[0].device.type, torch.bfloat16)
    return contextlib.nullcontext()
