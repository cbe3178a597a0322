# SPDX-License-Identifier: Apache-2.0
"""A model that was cast (``model.half()``) after an adapter was attached: what is saved fits the base as it was."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

import mirrortune
from mirrortune.adapters.inject import adapter_parameters
from mirrortune.errors import ConfigError
from tests.spectral import relative
from tests.tiny_models import tiny_bert, write_tiny_model
from tests.tiny_runs import logits

RANKS = {"mirror-scale": None, "psoft": 8, "speclora": 4, "lora": 4, "none": None}
CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda model: model.half(),
    "half and back": lambda model: model.half().float(),
    "bfloat16 and back": lambda model: model.bfloat16().float(),
    "double": lambda model: model.double(),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a base with a head."""
    folder = write_tiny_model(tmp_path_factory.mktemp("base") / "base")
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).save_pretrained(folder)
    return folder


def adapted(base: Path, method: str, dtype: torch.dtype = torch.float32) -> Any:
    """A trained model."""
    model = AutoModelForSequenceClassification.from_pretrained(base, dtype=dtype).eval()
    mirrortune.attach(model, method, rank=RANKS[method])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.2)
    return model


@pytest.mark.filterwarnings("ignore:merging with the whole model in memory")
@pytest.mark.parametrize("how", CASTS)
@pytest.mark.parametrize("method", RANKS)
def test_what_is_saved_after_a_cast_is_loaded_merged_and_served(
    base: Path, tmp_path: Path, method: str, how: str
) -> None:
    model = CASTS[how](adapted(base, method))
    mirrortune.save_adapter(model, tmp_path / "adapter")
    load = functools.partial(AutoModelForSequenceClassification.from_pretrained, base)
    loaded = mirrortune.load_adapter(load().eval(), tmp_path / "adapter")
    assert relative(logits(loaded).float(), logits(model.float())) <= 0.05
    assert mirrortune.merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")["passed"]
    bank = mirrortune.AdapterBank(served := load().eval())
    if method != "lora":
        bank.add("one", tmp_path / "adapter")
        with bank.rows(["one"] * 3):
            torch.testing.assert_close(logits(served), logits(loaded), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", RANKS)
def test_an_adapter_of_a_16_bit_base_stays_one_when_the_model_is_widened(
    base: Path, tmp_path: Path, method: str
) -> None:
    model = adapted(base, method, torch.bfloat16).float()
    mirrortune.save_adapter(model, tmp_path / "adapter")
    narrow = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.bfloat16).eval()
    loaded = mirrortune.load_adapter(narrow, tmp_path / "adapter")
    assert relative(logits(loaded).float(), logits(model)) <= 0.05
    assert mirrortune.merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")["passed"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of PEFT
def test_no_adapter_is_attached_over_one_of_a_module_inside(tmp_path: Path) -> None:
    mirrortune.save_adapter(mirrortune.attach(tiny_bert(), target_modules="value"), tmp_path / "adapter")
    inside = tiny_bert()
    mirrortune.attach(inside.get_submodule("bert"), target_modules="query")
    outside = mirrortune.attach(tiny_bert(), target_modules="query")
    lora: Any = peft.get_peft_model(tiny_bert(), peft.LoraConfig(target_modules=["query"]))  # type: ignore[arg-type]
    for model, problem in (
        (inside, "a module inside has an adapter already: 'bert'"),
        (
            outside.get_submodule("bert"),
            "a module inside has an adapter already: 'encoder.layer.0.attention.self.query'",
        ),
        (lora.get_base_model(), "the model has an adapter of PEFT already, in 'bert.encoder.layer.0"),
    ):
        for act in (
            functools.partial(mirrortune.attach, model, target_modules="value"),
            functools.partial(mirrortune.load_adapter, model, tmp_path / "adapter"),
            functools.partial(mirrortune.AdapterBank, model),
        ):
            with pytest.raises(ConfigError, match=problem.replace(".", r"\.")):
                act()


def test_a_response_is_recorded_whatever_the_dtype_of_other_layers(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).bfloat16())
    mirrortune.save_adapter(mirrortune.attach(model, "lora", rank=2, target_modules="0|1"), tmp_path)
    layers = json.loads((tmp_path / "adapter.json").read_text())["layers"]
    assert all(layer["response"] for layer in layers.values())
