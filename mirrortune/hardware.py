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


def is_set(variable: str) -> bool:
    """Whether an environment variable says yes."""
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")
