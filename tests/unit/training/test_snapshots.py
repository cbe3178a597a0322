# SPDX-License-Identifier: Apache-2.0
"""snapshots: optimizer and random states as tensors, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mirrortune.training.snapshots import (
    FrozenBuffers,
    optimizer_tensors,
    random_tensors,
    restore_optimizer,
    restore_random,
)
from tests.tiny_models import normed_bert
from tests.tiny_runs import adapt


def test_random_states_come_back() -> None:
    def draw() -> tuple[Any, ...]:
        numpy = np.random.standard_normal(3).tolist()  # noqa: NPY002
        return torch.rand(3).tolist(), torch.randn(1).item(), numpy

    np.random.standard_normal(1)  # noqa: NPY002  (so that a second normal number is waiting)
    states = random_tensors()
    expected = draw()
    assert draw() != expected
    restore_random(states)
    assert draw() == expected


def stepped(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, dict[int, str]]:
    """A small model after two AdamW steps; one of its parameters never got a gradient."""
    torch.manual_seed(seed)
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "ab": nn.Linear(2, 1), "idle": nn.Linear(1, 1)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        model["ab"](model["a"](torch.ones(1, 2))).sum().backward()
        optimizer.step()
    return model, optimizer, dict(model.named_parameters())


def test_optimizer_states_come_back() -> None:
    model, optimizer, names = stepped(0)
    tensors = optimizer_tensors(optimizer, names)
    assert set(tensors) == {
        f"optimizer.{name}.{entry}"
        for name, _ in model.named_parameters()
        if not name.startswith("idle")
        for entry in ("step", "exp_avg", "exp_avg_sq")
    }
    other, fresh, other_names = stepped(1)
    restore_optimizer(fresh, other_names, {name: tensor.clone() for name, tensor in tensors.items()})
    again: dict[str, Tensor] = optimizer_tensors(fresh, other_names)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    other.load_state_dict(model.state_dict())
    for one, its_optimizer in ((model, optimizer), (other, fresh)):
        its_optimizer.zero_grad()
        one["ab"](one["a"](torch.ones(1, 2))).sum().backward()
        its_optimizer.step()
    assert all(torch.equal(other.get_parameter(name), parameter) for name, parameter in model.named_parameters())


def test_frozen_buffers_get_back_what_a_module_has_written_or_replaced() -> None:
    model: Any = adapt(model=normed_bert()).model
    pooler = model.bert.pooler
    pooler.register_buffer("codebook", torch.ones(3))
    pooler.register_buffer("calls", torch.tensor(4))
    pooler.register_buffer("scratch", torch.zeros(1), persistent=False)
    codebook, frozen = pooler.codebook, FrozenBuffers(model)
    for _ in range(2):
        codebook.mul_(2)
        pooler.calls = pooler.calls + 1
        pooler.scratch.add_(1)
        model.classifier[0].running_mean.add_(1)  # trained with the head
        frozen.restore()
    assert pooler.codebook is codebook
    assert (codebook.tolist(), int(pooler.calls), int(pooler.scratch)) == ([1, 1, 1], 4, 2)
    assert torch.equal(model.classifier[0].running_mean, torch.full((32,), 2.0))
