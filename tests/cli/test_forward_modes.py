# SPDX-License-Identifier: Apache-2.0
"""forward_modes: attention implementations agree through adapted layers, and checkpointing changes memory alone."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mirrortune.adapters.inject import adapter_parameters
from mirrortune.errors import ConfigError, ResourceError
from mirrortune.models.load import checkpoint_activations
from mirrortune.system.devices import check_attention
from tests.cli.console import mirrortune, reviews, write_table
from tests.spectral import relative
from tests.tiny_models import tiny_bert, tiny_causal
from tests.tiny_runs import adapt

TOKENS = torch.randint(5, 45, (3, 9), generator=torch.Generator().manual_seed(0))


def numbers(model: nn.Module) -> list[Tensor]:
    """Logits of rows with padding, and the gradients of their squares for every core."""
    mask = torch.ones_like(TOKENS)
    mask[1, 6:] = 0
    logits = model(input_ids=TOKENS, attention_mask=mask).logits
    logits = logits[mask.bool()] if logits.ndim == 3 else logits
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad for p in adapter_parameters(model).values() if p.grad is not None)]


@pytest.mark.parametrize("build", [tiny_bert, tiny_causal])
def test_sdpa_and_eager_attention_are_the_same_through_adapted_layers(build: object) -> None:
    assert callable(build)
    found = [numbers(adapt(model=build(attn_implementation=name)).model) for name in ("eager", "sdpa")]
    assert len(found[0]) > 10
    assert all(relative(a, b) < 1e-4 for a, b in zip(*found, strict=True))


def test_checkpointed_activations_give_the_same_numbers() -> None:
    model = adapt(model=tiny_causal()).model.train()
    expected = numbers(copy.deepcopy(model))
    found = numbers(checkpoint_activations(model))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(ConfigError, match=r"train\.gradient_checkpointing: Linear has none"):
        checkpoint_activations(nn.Linear(2, 2))


def test_flash_attention_is_refused_where_it_cannot_run(desk: Path, tiny_model_dir: Path) -> None:
    words = ("train", "-m", tiny_model_dir, "-t", "text-classification", "-d", write_table(desk / "r.csv", reviews(20)))
    outcome = mirrortune(*words, "model.attention=flash_attention_2")
    assert outcome.exit_code == 4
    assert "model.attention: flash_attention_2 runs only on CUDA GPUs, got cpu. Use sdpa." in outcome.said
    if importlib.util.find_spec("flash_attn") is None:
        with pytest.raises(ResourceError, match="needs the package flash-attn"):
            check_attention("flash_attention_2", torch.device("cuda"))
    assert mirrortune(*words, "model.attention=flash").exit_code == 2


def test_a_run_keeps_less_and_learns_the_same(desk: Path, tiny_model_dir: Path) -> None:
    data = write_table(desk / "r.csv", reviews(24))
    words = ("-m", tiny_model_dir, "-t", "text-classification", "-d", data, "--json")
    plain = mirrortune("train", *words, "-o", "a", "--max-steps", 2).data
    modes = ("train.gradient_checkpointing=true", "model.attention=eager")
    other = mirrortune("train", *words, "-o", "b", "--max-steps", 2, *modes).data
    assert other["metrics"] == pytest.approx(plain["metrics"], abs=1e-4)
    sizes = [mirrortune("prepare", *words, "--dry-run", *more).data["memory"]["activations"]
             for more in ((), ("train.gradient_checkpointing=true",))]  # fmt: skip
    assert sizes[1] < 0.8 * sizes[0]
