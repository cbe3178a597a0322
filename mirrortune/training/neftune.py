# SPDX-License-Identifier: Apache-2.0
"""Add uniform noise to the embeddings of a language model in training (NEFTune).

Reference: Jain et al. 2023, "NEFTune: Noisy Embeddings Improve Instruction Finetuning".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def add_noise(model: nn.Module, alpha: float) -> None:
    """Add noise to the output of the token embedding of ``model`` in training mode; evaluation and files have none.

    Each element of a sequence of L tokens and width d gets noise that is uniform in [-1, 1] times alpha / sqrt(L d).
    Padding tokens do not count and get no noise.

    Args:
        model: adapted model.
        alpha: strength of the noise; 5 to 15 in the paper.
    """
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    masks: list[Tensor | None] = [None]

    def remember_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        masks[0] = kwargs.get("attention_mask")

    def disturb(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not module.training:
            return output
        mask = masks[0]
        if mask is None or mask.shape != output.shape[:2]:  # the mask of packed rows has another shape
            mask = torch.ones(output.shape[:2], device=output.device)
        mask = mask.to(torch.float32).unsqueeze(-1)  # (B, L, 1)
        size = alpha * torch.rsqrt(mask.sum(dim=1, keepdim=True).clamp(min=1) * output.shape[-1])  # (B, 1, 1)
        noise = torch.empty_like(output, dtype=torch.float32).uniform_(-1, 1)
        return output + (noise * mask * size).to(output.dtype)

    model.register_forward_pre_hook(remember_mask, with_kwargs=True)
    embedding.register_forward_hook(disturb)
