# SPDX-License-Identifier: Apache-2.0
"""gaps: weights that a checkpoint lacks or holds in another shape become parts of the head only if they may."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mirrortune.errors import ConfigError
from mirrortune.models.gaps import check_shapes, describe_missing
from mirrortune.models.load import LoadedModel, find_model, load_model
from tests.tiny_models import tiny_bert, write_tiny_model


def load(folder: Path, auto_class: str = "AutoModelForSequenceClassification", **fields: Any) -> LoadedModel:
    return load_model(find_model(str(folder)), auto_class, fields, torch.float32, 0)


@pytest.mark.parametrize("auto_class", ["AutoModelForSequenceClassification", "AutoModel"])
def test_a_configuration_that_does_not_fit_the_weights_is_refused(tmp_path: Path, auto_class: str) -> None:
    folder = write_tiny_model(tmp_path)
    described = json.loads((folder / "config.json").read_text())
    rows = described["vocab_size"]
    (folder / "config.json").write_text(json.dumps(described | {"vocab_size": rows + 8}))
    with pytest.raises(ConfigError, match=rf"word_embeddings\.weight is \({rows}, 32\) there, \({rows + 8}, 32\) by"):
        load(folder, auto_class)


def test_what_the_checkpoint_lacks_of_the_base_is_named(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    assert load(folder).missing == ()  # its head is no part of the base
    tensors = load_file(folder / "model.safetensors")
    gone = [name for name in tensors if "pooler" in name or "layer.1.attention.self.query" in name]
    save_file({n: t for n, t in tensors.items() if n not in gone}, folder / "model.safetensors", {"format": "pt"})
    found = load(folder)
    assert found.missing == tuple(sorted(f"bert.{name}" for name in gone))
    assert set(found.new_parameters) == {*found.missing, "classifier.weight", "classifier.bias"}
    assert load(folder, "AutoModel").missing == tuple(sorted(gone))
    assert describe_missing(found.missing).endswith(f"{', '.join(found.missing[:3])} and 1 more")


@pytest.mark.parametrize("auto_class", ["AutoModelForSequenceClassification", "AutoModel"])
def test_a_checkpoint_that_names_its_weights_otherwise_is_refused(tmp_path: Path, auto_class: str) -> None:
    folder = write_tiny_model(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file({f"other.{n}": t for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"^model .*: none of its weights has a name that Bert\w+ expects"):
        load(folder, auto_class)


def test_a_head_of_another_size_is_replaced_wherever_it_is(tmp_path: Path) -> None:
    model = tiny_bert(num_labels=5)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    assert load(tmp_path, num_labels=2).new_parameters == ("classifier.bias", "classifier.weight")
    # Some models have their head inside the base model.
    config: Any = model.config
    asked = tiny_bert(num_labels=2)
    asked.base_model_prefix = ""  # type: ignore[assignment]
    check_shapes("tiny", asked, {"classifier.weight": (5, 32), "classifier.bias": (5,)}, config)
    with pytest.raises(ConfigError, match=r"classifier\.weight is \(7, 32\) there, \(5, 32\) by config\.json"):
        check_shapes("tiny", asked, {"classifier.weight": (7, 32)}, config)
