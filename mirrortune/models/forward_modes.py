# SPDX-License-Identifier: Apache-2.0
"""Which attention a model computes with, and what it keeps for its backward pass; refused where it cannot be."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from mirrortune.errors import ConfigError, ResourceError


def check_attention(asked: str | None, device: torch.device) -> None:
    """Refuse flash attention where it cannot run.

    Args:
        asked: one of transformers' names, or None for the model's own choice.
        device: to train on.

    Raises:
        ResourceError: it is no CUDA device, or the package flash_attn is missing.
    """
    if asked != "flash_attention_2":
        return
    if device.type != "cuda":
        raise ResourceError("model.attention", f"{asked} runs on CUDA GPUs alone, got {device.type}", fix="Use sdpa")
    if importlib.util.find_spec("flash_attn") is None:
        raise ResourceError("model.attention", f"{asked} needs the package flash-attn", fix="Install it, or use sdpa")


def checkpoint_activations(model: nn.Module) -> nn.Module:
    """Let ``model``, in place, keep only the inputs of its blocks for the backward pass, which computes the rest again.

    Raises:
        ConfigError: transformers has no gradient checkpointing for it.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError("train.gradient_checkpointing", f"{type(model).__name__} has none", fix="Remove it")
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # of newer and older transformers
    enable: Any = next(found for name in names if (found := getattr(model, name, None)) is not None)
    enable({"use_reentrant": False})  # the other form wants an input with a gradient, which frozen embeddings lack
    return model
