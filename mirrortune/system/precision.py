# SPDX-License-Identifier: Apache-2.0
"""A base model in 16 bits with a head in 32: what is trained keeps its digits, what is frozen keeps its size."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

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
    if holds_half(model):
        return torch.autocast(next(model.parameters()).device.type, torch.bfloat16)
    return contextlib.nullcontext()


def holds_half(model: nn.Module) -> bool:
    """Whether any of its weights is in 16 bits."""
    return any(p.dtype in _HALF for p in model.parameters())


@contextlib.contextmanager
def as_computed(model: nn.Module) -> Iterator[None]:
    """While it is open, ``model`` gives its outputs in the dtype that it computed them in. With mixed precision
    accelerate makes float32 of all outputs of a model that it has prepared. A compiled model is left as it is.
    """
    own = vars(model)
    if "_original_forward" not in own or own.get("_compiled_call_impl") is not None:
        yield
        return
    wrapped, own["forward"] = own["forward"], own["_original_forward"]
    try:
        yield
    finally:
        own["forward"] = wrapped


def mixed(accelerator: Any) -> AbstractContextManager[object]:
    """The context to run a model in that is called without the wrapper that ``accelerator`` has put around it."""
    plugin = getattr(getattr(accelerator, "state", None), "deepspeed_plugin", None)
    if plugin is None:
        context: AbstractContextManager[object] = accelerator.autocast()
        return context
    # accelerate leaves autocast to DeepSpeed, which has it in its own wrapper.
    enabled = plugin.deepspeed_config["torch_autocast"]["enabled"]
    return torch.autocast(accelerator.device.type, torch.bfloat16, enabled=enabled)
