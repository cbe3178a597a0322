# SPDX-License-Identifier: Apache-2.0
"""dropout: every dropout of a model in training, by its configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn
from transformers import BertConfig, GPT2Config, LlamaConfig, T5Config

from mirrortune.errors import ConfigError
from mirrortune.models.dropout import with_dropout
from mirrortune.models.load import ModelSource, empty_model


def source(config: object) -> ModelSource:
    """A model with this configuration."""
    return ModelSource(name="m", location="m", revision=None, commit=None, trust_remote_code=False, config=config)


def test_every_dropout_of_an_encoder_changes_and_the_given_source_does_not(tiny_model_dir: Path) -> None:
    given = source(BertConfig.from_pretrained(tiny_model_dir))
    before = given.config.to_dict()
    model = empty_model(with_dropout(given, 0.3), "AutoModelForSequenceClassification", {})
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.3}
    assert given.config.to_dict() == before


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (GPT2Config(), {"attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout"}),
        (T5Config(), {"dropout_rate", "classifier_dropout"}),
        (LlamaConfig(), {"attention_dropout"}),
    ],
    ids=["gpt2", "t5", "llama"],
)
def test_the_names_of_other_families(config: object, names: set[str]) -> None:
    found = with_dropout(source(config), 0.25).config.to_dict()
    before = config.to_dict()  # type: ignore[attr-defined]
    assert {key for key, value in found.items() if value != before[key]} == names
    assert {found[key] for key in names} == {0.25}


def test_a_model_without_dropout_is_refused() -> None:
    config = BertConfig()
    described = {k: v for k, v in config.to_dict().items() if "dropout" not in k}

    class Bare:
        def to_dict(self) -> dict[str, object]:
            return dict(described)

    with pytest.raises(ConfigError, match=r"model.dropout: the configuration of 'm' has no dropout, got 0.1"):
        with_dropout(source(Bare()), 0.1)
