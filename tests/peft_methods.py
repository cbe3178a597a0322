# SPDX-License-Identifier: Apache-2.0
"""Every method that runs a tuner of PEFT, with the options by which it fits layers of 32 and 64 features."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mirrortune.adapters.inject import adapter_parameters, attachment
from mirrortune.adapters.methods import PRESETS
from mirrortune.adapters.spec import AdapterSpec

PEFT_METHODS = sorted(method for method, preset in PRESETS.items() if preset.peft)
# By design, or by PEFT's default, these do not start from the base model: their change is drawn at random.
START_ELSEWHERE = {"c3a", "fourierft", "unilora", "vblora"}
# Those whose merge PEFT leaves out.
NOT_MERGED = {"lily"}
# What is too large for the tiny models by default.
_RANKS = {"psoft-peft": 16, "vera": 8, "randlora": 8, "shira": 4, "miss": 8, "gralora": 8}
_OPTIONS: dict[str, dict[str, Any]] = {
    "c3a": {"block_size": 16},
    "fourierft": {"n_frequency": 100},
    "road": {"group_size": 32},
    "tinylora": {"u": 8},
    "vblora": {"vector_length": 16, "num_vectors": 32},
    "waveft": {"n_frequency": 100},
}


def tiny_spec(method: str, **fields: Any) -> AdapterSpec:
    """The method with a rank and options for the tiny models."""
    return AdapterSpec(method=method, rank=_RANKS.get(method), options=_OPTIONS.get(method, {}), **fields)


def tiny_words(method: str) -> list[str]:
    """The same as words of a command line."""
    spec = tiny_spec(method)
    rank = [] if spec.rank is None else ["--rank", str(spec.rank)]
    return ["--method", method, *rank, *(f"adapter.options.{key}={value}" for key, value in spec.options.items())]


def move(model: nn.Module, seed: int = 0) -> nn.Module:
    """Change every trained number of an adapted model a little, as training would."""
    generator = torch.Generator().manual_seed(seed)
    head = [model.get_parameter(name) for name in attachment(model).targets.head]
    with torch.no_grad():
        for parameter in [*adapter_parameters(model).values(), *head]:
            noise = 0.05 * torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter.device, parameter.dtype))
    return model
