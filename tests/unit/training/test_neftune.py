# SPDX-License-Identifier: Apache-2.0
"""neftune: noise of the paper's size on the embeddings of tokens, in training alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from mirrortune.training.neftune import add_noise


class Embeds(nn.Module):
    """Returns its embeddings."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.table = nn.Embedding(9, width)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.table(input_ids)


def noise_of(alpha: float, lengths: list[int], *, masked: bool = True) -> Tensor:
    """What is added to the embeddings of rows of these lengths, padded to the longest."""
    model = Embeds()
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.stack([torch.arange(max(lengths)) < length for length in lengths]).long()
    plain = model(ids)
    add_noise(model, alpha)
    torch.manual_seed(0)
    return (model(input_ids=ids, attention_mask=mask if masked else None) - plain).detach()


def test_the_noise_is_uniform_and_as_large_as_in_the_paper() -> None:
    noise = noise_of(5.0, [40, 10])
    for row, length in enumerate((40, 10)):
        size = 5.0 / math.sqrt(length * 64)
        own = noise[row, :length] / size
        assert own.abs().max() <= 1 + 1e-5
        assert own.abs().max() > 0.97
        assert own.var() == pytest.approx(1 / 3, abs=0.05)
        assert own.mean() == pytest.approx(0, abs=0.08)
    assert not noise[1, 10:].any(), "padding gets none"


def test_without_a_mask_every_position_is_a_token() -> None:
    noise = noise_of(3.0, [30, 2], masked=False)
    assert noise.abs().max() == pytest.approx(3.0 / math.sqrt(30 * 64), rel=0.03)
    assert noise[1, 2:].any()


def test_evaluation_has_none_and_a_seed_repeats_it() -> None:
    model = Embeds()
    add_noise(model, 5.0)
    ids = torch.ones(1, 4, dtype=torch.long)
    assert torch.equal(model.eval()(ids), model.table.weight[ids])
    model.train()
    first, second = (torch.manual_seed(seed) and model(ids) for seed in (1, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, model(ids))
    assert list(model.state_dict()) == ["table.weight"]
