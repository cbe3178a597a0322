# SPDX-License-Identifier: Apache-2.0
"""Packed rows: every one once, no sequence too long, and no row sees another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mirrortune.data.examples import Padding, TokenExamples
from mirrortune.data.token_cache import ragged
from mirrortune.errors import ConfigError
from mirrortune.tasks.kinds.causal_lm import Task
from mirrortune.tasks.packing import PackedExamples, best_fit
from tests.tiny_models import tiny_causal

TASK = Task(
    text_columns=("text",), label_column=None, layout="text", loss_on="all", format="auto", packing=True,
    metric_names=("perplexity",), selection_metric="perplexity",
)  # fmt: skip
LENGTHS = [5, 9, 3, 14, 2, 7]


def documents(lengths: list[int] = LENGTHS, max_length: int = 16, seed: int = 0) -> TokenExamples:
    """Random tokens, of which about half are learned."""
    random = np.random.default_rng(seed)
    ids = [random.integers(0, 250, n).tolist() for n in lengths]
    targets = [[-100, *(t if random.random() < 0.5 else -100 for t in row[1:])] for row in ids]
    flat, offsets = ragged(ids)
    return TokenExamples(
        features={"input_ids": flat, "targets": ragged(targets)[0]}, offsets=offsets, targets=None,
        padding=Padding(side="right", fill={"input_ids": 3, "targets": -100}), max_length=max_length,
        switches={"use_cache": False},
    )  # fmt: skip


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=120).map(np.array), capacity=st.integers(40, 90))
def test_every_row_is_in_one_bin_and_no_bin_is_too_full(lengths: Any, capacity: int) -> None:
    bins = best_fit(lengths, capacity)
    assert sorted(np.concatenate(bins).tolist()) == list(range(len(lengths)))
    assert max(lengths[rows].sum() for rows in bins) <= capacity
    # No two bins could have been one: best fit leaves at most one bin half empty.
    assert sum(lengths[rows].sum() * 2 <= capacity for rows in bins) <= 1


def total_loss(model: nn.Module, examples: Any, rows: Any) -> tuple[torch.Tensor, int]:
    """The sum of the loss, and its number of tokens."""
    batch = examples.batch(np.asarray(rows))
    targets = batch.pop("targets")
    return TASK.loss(batch, model(**batch), targets)


@pytest.mark.parametrize(
    ("family", "attention"),
    [("Llama", "sdpa"), ("Llama", "eager"), ("GPT2", "sdpa"), ("GPT2", "eager"), ("Qwen2", "sdpa"), ("Mistral", "sdpa"),
     ("Gemma2", "eager"), ("Phi3", "sdpa"), ("Qwen3", "sdpa"), ("GPTNeoX", "sdpa")],
)  # fmt: skip
def test_the_loss_and_gradient_are_those_of_the_rows_apart(family: str, attention: str) -> None:
    """To float32, in which the loss and some models' positions are computed."""
    fields = {"Gemma2": {"head_dim": 8}, "Qwen3": {"head_dim": 8}, "Mistral": {"sliding_window": 4}}.get(family, {})
    model = tiny_causal(family, **fields, attn_implementation=attention).double()
    apart = documents()
    packed = PackedExamples.of(apart)
    assert len(packed) < len(apart)
    packed.verify(model)
    losses = []
    for examples in (apart, packed):
        model.zero_grad()
        loss, items = total_loss(model, examples, range(len(examples)))
        loss.backward()
        losses.append((loss.item(), items, model.get_input_embeddings().weight.grad.clone()))
    assert losses[0][1] == losses[1][1]
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-6)
    torch.testing.assert_close(losses[1][2], losses[0][2], rtol=1e-4, atol=1e-5)


def test_a_real_family_that_mixes_rows_up_is_refused() -> None:
    """OPT takes positions and masks nothing by them."""
    with pytest.raises(ConfigError, match=r"data\.packing: this model lets packed rows see each other"):
        PackedExamples.of(documents()).verify(tiny_causal("OPT", ffn_dim=64, word_embed_proj_dim=32))


def test_a_model_that_mixes_rows_up_is_refused() -> None:
    class Mixer(nn.Module):
        """Ignores positions and sums over all that came before."""

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(272, 4)

        def forward(self, input_ids: torch.Tensor, **ignored: Any) -> Any:
            return type("Output", (), {"logits": self.table(input_ids).cumsum(dim=1)})()

    with pytest.raises(ConfigError, match=r"data\.packing: this model lets packed rows see each other"):
        PackedExamples.of(documents()).verify(Mixer())


def test_a_cache_would_mix_rows_up_and_is_switched_off() -> None:
    """The trap: transformers looks for packed rows only where there is no cache, and models make one by default."""
    model = tiny_causal("Llama").double()
    batch = PackedExamples.of(documents()).batch(np.array([0]))
    assert batch["use_cache"] is False
    del batch["targets"]
    mixed = model(**{**batch, "use_cache": True}).logits
    assert not torch.allclose(mixed, model(**batch).logits)


def test_it_says_how_full_the_sequences_are() -> None:
    assert PackedExamples.of(documents()).describe().endswith("; packed into 3 sequences, 83% full")


def test_the_lengths_of_sequences_are_those_of_their_rows() -> None:
    packed = PackedExamples.of(documents())
    lengths = [sum(LENGTHS[row] for row in rows) for rows in packed.bins]
    assert packed.lengths.tolist() == lengths
    assert packed.batch(np.array([1]))["input_ids"].shape == (1, lengths[1])


def test_lengths_of_rows_are_found_once_for_all_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, calls = PackedExamples.of(documents()), []
    monkeypatch.setattr(TokenExamples, "lengths", property(lambda self: calls.append(1) or np.diff(self.offsets)))
    assert len(packed.lengths) == len(packed) > 1
    assert len(calls) == 1
