# SPDX-License-Identifier: Apache-2.0
"""drawn_inputs: what a model computes of which nothing but class and configuration is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from mirrortune.data.examples import Batch
from mirrortune.tasks.drawn_inputs import drawn_inputs, first_that_runs
from mirrortune.tasks.model_outputs import compared_outputs


def first_of(name: str, **fields: Any) -> Batch:
    """The likeliest inputs of a model class."""
    found = getattr(transformers, name)
    return next(drawn_inputs(found, found.config_class(**fields)))


def test_tokens_are_in_the_vocabulary_and_no_special_ones() -> None:
    batch = first_of("LlamaModel", vocab_size=40, bos_token_id=1, eos_token_id=[2, 7], pad_token_id=0)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 16)
    assert int(batch["input_ids"].max()) < 40
    assert not torch.isin(batch["input_ids"], torch.tensor([0, 1, 2, 7])).any()
    assert first_of("BertModel", max_position_embeddings=10)["input_ids"].shape == (2, 6)


def test_a_decoder_is_given_something_to_read() -> None:
    batch = first_of("T5Model", vocab_size=50)
    assert batch["decoder_input_ids"].shape == (2, 7)
    assert int(batch["decoder_input_ids"].max()) < 50
    assert first_of("T5EncoderModel").keys() == {"input_ids", "attention_mask"}
    whisper = first_of("WhisperForConditionalGeneration", num_mel_bins=20, max_source_positions=50)
    assert whisper["input_features"].shape == (2, 20, 100)


def test_sizes_are_those_of_the_configuration() -> None:
    assert first_of("ViTModel", image_size=32, num_channels=1)["pixel_values"].shape == (2, 1, 32, 32)
    assert first_of("VideoMAEModel", image_size=32, num_frames=4)["pixel_values"].shape == (2, 4, 3, 32, 32)
    assert first_of("ASTModel", max_length=64, num_mel_bins=24)["input_values"].shape == (2, 64, 24)
    assert first_of("BertForMultipleChoice")["input_ids"].shape == (2, 3, 16)


def test_models_of_two_kinds_of_input_are_offered_both() -> None:
    candidates = list(drawn_inputs(transformers.CLIPModel, transformers.CLIPConfig()))
    assert {frozenset(batch) for batch in candidates} >= {
        frozenset({"input_ids", "attention_mask"}), frozenset({"input_ids", "attention_mask", "pixel_values"})
    }  # fmt: skip


def test_the_first_that_runs_is_taken() -> None:
    def run(batch: Batch) -> int:
        return len(torch.ones(2) @ batch["x"])  # torch raises, not this line

    bad, good = {"x": torch.ones(3, 1)}, {"x": torch.ones(2, 5)}
    assert first_that_runs([bad, good, bad], run) == (good, 5)
    assert "RuntimeError: mat1 and mat2 shapes" in str(first_that_runs([bad], run))
    assert first_that_runs([], run) == "no inputs are known for it"


def test_mistakes_of_this_package_are_not_taken_for_inputs_that_do_not_fit() -> None:
    with pytest.raises(AttributeError, match="'list' object has no attribute 'items'"):
        first_that_runs([{}], lambda _: compared_outputs(torch.nn.Linear(1, 1), []))  # type: ignore[arg-type]
