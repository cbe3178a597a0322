# SPDX-License-Identifier: Apache-2.0
"""What a run computes on and in which precision, and the environment variables that have a say in it."""

from __future__ import annotations

import os

import torch

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


def is_set(variable: str) -> bool:
    """Whether an environment variable says yes."""
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")
