# SPDX-License-Identifier: Apache-2.0
"""What a run computes on and in which precision, and the environment variables that have a say in it."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from mirrortune.errors import ResourceError


def default_device() -> torch.device:
    """The device that accelerate will choose."""
    if is_set("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def resolve_precision(asked: str) -> str:
    """``fp32`` or ``bf16``; ResourceError if bf16 is asked of a GPU that lacks it."""
    has_gpu = torch.cuda.is_available()
    if asked == "auto":
        return "bf16" if has_gpu and torch.cuda.is_bf16_supported() else "fp32"
    if asked == "bf16" and has_gpu and not torch.cuda.is_bf16_supported():
        raise ResourceError("train.precision", "this GPU has no bf16", fix="Use --precision fp32")
    return asked


# Compute capabilities of NVIDIA's data-centre GPUs (P100, V100, A100, H100, B200), which compute in float64 at half the
# rate of float32. Others do at a 32nd or 64th of it, which is less than a few CPU cores do.
_FLOAT64_CAPABILITIES = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}


def factorising_device(device: torch.device) -> torch.device | None:
    """``device`` if large matrices are factorised there in float64, None if the CPU is as good a place."""
    is_fast = device.type == "cuda" and torch.cuda.get_device_capability(device) in _FLOAT64_CAPABILITIES
    return device if is_fast else None


_SLOW = 1.5
"""Times as long as in float32 that a product in bfloat16 takes on a CPU that has no units for it: it was 3 to 45 on
such machines, and 0.4 to 0.8 on those that have them.
"""


def is_slow(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether ``device`` computes slower in a 16-bit ``dtype`` than in float32, by so much that nobody wants it."""
    if device.type != "cpu":
        return False
    return dtype == torch.float16 or (dtype == torch.bfloat16 and bfloat16_slowdown() > _SLOW)


@functools.cache
def bfloat16_slowdown() -> float:
    """Time of a linear layer, forward and backward, in bfloat16 on this CPU, in units of its time in float32.

    It is measured once in a process: which instructions make a CPU fast is another list for every vendor, and the
    libraries under torch may be told not to use them.
    """
    return _linear_seconds(torch.bfloat16) / _linear_seconds(torch.float32)


def _linear_seconds(dtype: torch.dtype) -> float:
    """Best of a few: the first one sets the libraries up, and others may be disturbed."""
    x, weight = (torch.ones(64, 512, dtype=dtype, requires_grad=True), torch.ones(512, 512, dtype=dtype))
    found = []
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        for _ in range(6):
            started = time.perf_counter()
            torch.autograd.grad(torch.nn.functional.linear(x, weight).sum(), x)
            found.append(time.perf_counter() - started)
    return min(found)


def is_set(variable: str) -> bool:
    """Whether an environment variable says yes, in the words that accelerate takes for it."""
    return os.environ.get(variable, "").lower() in ("y", "yes", "t", "true", "on", "1")


def peak_resident_bytes() -> int:
    """Largest resident set of this process so far."""
    try:
        import resource  # noqa: PLC0415  (Windows has none)
    except ImportError:
        import psutil  # noqa: PLC0415

        memory: Any = psutil.Process().memory_info()
        return int(memory.peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


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
