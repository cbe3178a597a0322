# SPDX-License-Identifier: Apache-2.0
"""Merging into a base without tokenizer, image processor or feature extractor: done and said, since it needs none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mirrortune as package
from mirrortune.adapters.files.adapter_file import write_adapter
from mirrortune.adapters.inject import AdapterSpec, adapter_parameters
from mirrortune.models.load import NoProcessorError, find_model, load_tokenizer
from mirrortune.tasks.base import task_class, task_to_dict
from tests.cli.console import mirrortune
from tests.tiny_models import (
    write_tiny_audio,
    write_tiny_causal,
    write_tiny_model,
    write_tiny_seq2seq,
    write_tiny_vision,
)
from tests.unit.merging.test_in_memory import write_trained

PROCESSORS = ("tokenizer*", "*.jinja", "special_tokens_map.json", "vocab*", "preprocessor_config.json")
SCORES: dict[str, Any] = {"metric_names": ("accuracy",), "selection_metric": "accuracy"}
CLASSES = {"label_column": "label", "labels": ("left", "right")}


def without_processors(folder: Path) -> Path:
    """The folder with nothing but configuration and weights."""
    for pattern in PROCESSORS:
        for file in folder.glob(pattern):
            file.unlink()
    assert {file.suffix for file in folder.iterdir()} <= {".json", ".safetensors"}
    return folder


def moved(model: nn.Module) -> nn.Module:
    """The adapted model as training may leave it."""
    with torch.no_grad():
        for index, parameter in enumerate(adapter_parameters(model).values()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    return model


def outside_a_task(base: Path, auto_class: str, adapter: Path) -> None:
    """An adapter that was saved in Python."""
    import transformers

    model = getattr(transformers, auto_class).from_pretrained(base)
    package.save_adapter(moved(package.attach(model)), adapter)


def inside_a_task(base: Path, kind: str, adapter: Path, **fields: Any) -> None:
    """An adapter as ``train`` saves it."""
    import transformers

    task = task_class(kind)(**CLASSES, **SCORES, **fields)
    model = getattr(transformers, task.auto_class).from_pretrained(base, num_labels=2)
    moved(package.attach(model))
    identity = {"name": str(base), "revision": None, "commit": None, "dtype": "float32", "auto_class": task.auto_class}
    adapter.mkdir()
    entries = model._mirrortune_fingerprints.entries
    write_adapter(adapter, model, entries, base=identity, task=task_to_dict(task), extra={})


def merged(tmp_path: Path, what: str) -> dict[str, Any]:
    """Merge from the command line; what was missing is said, and nothing is made up in its place."""
    outcome = mirrortune("merge", tmp_path / "adapter", "-o", tmp_path / "merged", "--json")
    assert f"the base has no {what}, so none is written" in outcome.stderr
    verdict: dict[str, Any] = outcome.data["verification"]
    assert verdict["passed"]
    assert 0 <= verdict["max_abs_logit_error"] <= verdict["tolerance"]
    names = {file.name for file in (tmp_path / "merged").iterdir()}
    assert not any(file for pattern in PROCESSORS for file in (tmp_path / "merged").glob(pattern)), names
    assert {"config.json", "model.safetensors", "merge.json", "README.md"} <= names
    contents = json.loads((tmp_path / "merged" / "merge.json").read_text())["contents"]
    assert (contents["processor"], contents["chat_template"]) == (None, False)
    return verdict


def test_a_classifier_of_a_task(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base")
    write_trained(base, tmp_path / "adapter", AdapterSpec())
    without_processors(base)
    merged(tmp_path, "tokenizer")


@pytest.mark.parametrize("auto_class", ["AutoModelForCausalLM", "AutoModel"])
def test_a_language_model_and_its_bare_encoder(tmp_path: Path, auto_class: str) -> None:
    outside_a_task(without_processors(write_tiny_causal(tmp_path / "base")), auto_class, tmp_path / "adapter")
    merged(tmp_path, "tokenizer")


@pytest.mark.parametrize("auto_class", ["AutoModelForSeq2SeqLM", "AutoModel", "T5EncoderModel"])
def test_an_encoder_decoder_for_which_transformers_makes_a_tokenizer_up(tmp_path: Path, auto_class: str) -> None:
    base = without_processors(write_tiny_seq2seq(tmp_path / "base"))
    outside_a_task(base, auto_class, tmp_path / "adapter")
    merged(tmp_path, "tokenizer")
    with pytest.raises(NoProcessorError, match="it has no tokenizer files"):  # nor is it trained with
        load_tokenizer(find_model(str(base)))


@pytest.mark.parametrize("is_of_task", [False, True])
def test_a_model_of_images(tmp_path: Path, *, is_of_task: bool) -> None:
    base = without_processors(write_tiny_vision(tmp_path / "base"))
    if is_of_task:
        inside_a_task(base, "image-classification", tmp_path / "adapter", image_column="image")
    else:
        outside_a_task(base, "AutoModel", tmp_path / "adapter")
    merged(tmp_path, "image processor")


@pytest.mark.parametrize("is_of_task", [False, True])
def test_a_model_of_recordings(tmp_path: Path, *, is_of_task: bool) -> None:
    base = without_processors(write_tiny_audio(tmp_path / "base"))
    if is_of_task:
        inside_a_task(base, "audio-classification", tmp_path / "adapter", audio_column="audio", max_seconds=1.0)
    else:
        outside_a_task(base, "AutoModel", tmp_path / "adapter")
    merged(tmp_path, "feature extractor")


def test_what_is_there_is_written_without_a_task_too(tmp_path: Path) -> None:
    base = write_tiny_vision(tmp_path / "base")
    outside_a_task(base, "AutoModel", tmp_path / "adapter")
    outcome = mirrortune("merge", tmp_path / "adapter", "-o", tmp_path / "merged", "--json")
    assert outcome.data["verification"]["passed"]
    assert "the base has no" not in outcome.stderr
    ours, theirs = (json.loads((f / "preprocessor_config.json").read_text()) for f in (tmp_path / "merged", base))
    assert ours == theirs


def test_python_warns(tmp_path: Path) -> None:
    base = without_processors(write_tiny_causal(tmp_path / "base"))
    outside_a_task(base, "AutoModel", tmp_path / "adapter")
    with pytest.warns(UserWarning, match="the base has no tokenizer"):
        assert package.merge_adapter(None, tmp_path / "adapter", tmp_path / "merged")["passed"]
