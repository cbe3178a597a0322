# SPDX-License-Identifier: Apache-2.0
"""Models that read the weights of each module just before it runs."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mirrortune.models.load import find_model
from mirrortune.models.skeleton import outline, read_lazily
from tests.tiny_models import tiny_bert, tiny_deberta

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.mark.parametrize("model", [tiny_bert(), tiny_deberta()], ids=["bert", "deberta"])
@torch.no_grad()
def test_a_lazily_read_model_computes_the_same(tmp_path: Path, model: nn.Module) -> None:
    """DeBERTa's attention reads the table of relative positions, which is that of a module that never runs."""
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    held, read = model.state_dict(), Counter[str]()

    def value(name: str) -> Tensor:
        read[name] += 1
        return held[name].clone()

    lazy = read_lazily(outline(find_model(str(tmp_path)), "AutoModelForSequenceClassification", {}, None), value)
    assert {p.device.type for p in lazy.parameters()} == {"meta"}
    expected = model(IDS).logits
    assert torch.equal(lazy(IDS).logits, expected)
    assert {name: read[name] for name in held} == dict.fromkeys(held, 1)
    assert {p.device.type for p in lazy.parameters()} == {"meta"}
    assert torch.equal(copy.deepcopy(lazy)(IDS).logits, expected)
