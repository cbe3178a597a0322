# SPDX-License-Identifier: Apache-2.0
"""load: an adapter is attached to its own base only, also where nothing but weights that it does not adapt differ."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mirrortune
from mirrortune.adapters.factor_cache import FactorCache
from mirrortune.adapters.files.adapter_file import read_adapter, write_adapter
from mirrortune.adapters.files.load import adapt, load_into
from mirrortune.adapters.fingerprint import frozen_digests, num_lost
from mirrortune.adapters.spec import AdapterSpec
from mirrortune.errors import VerificationError
from mirrortune.tasks.base import task_to_dict
from tests.tiny_models import tiny_bert, tiny_causal, write_tiny_causal
from tests.tiny_runs import HEAD, classification, logits

METHODS = ["mirror-scale", "lora", "none", "bitfit"]
NORM, WORDS = "bert.encoder.layer.1.output.LayerNorm.weight", "bert.embeddings.word_embeddings.weight"


def written(folder: Path, method: str, *, in_python: bool = False) -> Path:
    """An adapter of the tiny BERT's queries."""
    folder.mkdir()
    model = tiny_bert()
    targets = "all-linear" if method in ("none", "bitfit") else "query"
    spec = AdapterSpec(method=method, target_modules=targets)
    book = adapt(model, spec, factor_source=FactorCache(), new_parameters=HEAD)
    base = {"name": "tiny", "dtype": "float32", "auto_class": "AutoModelForSequenceClassification"}
    task = None if in_python else task_to_dict(classification())
    write_adapter(folder, model, book.entries, base=base, task=task, extra={})
    return folder


@torch.no_grad()
def other_base(name: str) -> nn.Module:
    """The tiny BERT with another value in one parameter."""
    model = tiny_bert()
    model.get_parameter(name).view(-1)[0] += 1
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [NORM, WORDS])
def test_a_base_that_differs_in_other_weights_is_refused_and_left_as_it_is(
    tmp_path: Path, method: str, name: str
) -> None:
    adapter, model = read_adapter(written(tmp_path / "adapter", method)), other_base(name)
    with pytest.raises(VerificationError, match="differs in 1 of the weights that the adapter leaves as they are"):
        load_into(model, adapter, FactorCache())
    forced = load_into(model, adapter, FactorCache(), force_base=True)
    assert len(forced.remarks) == 1
    assert "leaves as they are" in forced.remarks[0]
    base = {"name": "tiny", "dtype": "float32"}
    write_adapter(tmp_path, model, forced.entries, base=base, task=None, extra={})
    assert read_adapter(tmp_path).frozen != adapter.frozen, "saved again, it is an adapter of the other base"


def test_parameters_that_the_adapter_holds_may_differ_and_so_may_the_dtype_and_the_names(tmp_path: Path) -> None:
    adapter = read_adapter(written(tmp_path / "adapter", "bitfit"))
    model = other_base("classifier.weight")
    model.get_parameter("bert.encoder.layer.0.output.dense.bias").data += 1
    book = load_into(model.double(), adapter, FactorCache())
    assert book.remarks == []
    expected = tiny_bert()
    load_into(expected, adapter, FactorCache())
    torch.testing.assert_close(logits(model).float(), logits(expected))


def test_python_warns_of_a_base_with_other_weights(tmp_path: Path) -> None:
    folder = written(tmp_path / "adapter", "mirror-scale", in_python=True)
    with pytest.warns(UserWarning, match="leaves as they are"):
        mirrortune.load_adapter(other_base(NORM), folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mirrortune.load_adapter(tiny_bert(), folder)


def test_python_warns_when_a_checkpoint_is_restored_into_another_base(tmp_path: Path) -> None:
    mirrortune.save_adapter(mirrortune.attach(tiny_bert(), target_modules="query"), tmp_path / "adapter")
    model = mirrortune.attach(other_base(NORM), target_modules="query")
    with pytest.warns(UserWarning, match="leaves as they are"):
        mirrortune.api.restore_adapter(model, tmp_path / "adapter")


def test_a_base_may_have_weights_that_training_has_removed(tmp_path: Path) -> None:
    model = tiny_bert()
    model.get_submodule("bert").register_module("pooler", None)  # as a task that pools by itself does
    book = adapt(model, AdapterSpec(target_modules="query"), factor_source=FactorCache(), new_parameters=HEAD)
    base = {"name": "tiny", "dtype": "float32", "auto_class": "AutoModelForSequenceClassification"}
    write_adapter(tmp_path, model, book.entries, base=base, task=task_to_dict(classification()), extra={})
    assert load_into(tiny_bert(), read_adapter(tmp_path), FactorCache()).remarks == []


def test_one_of_several_equal_weights_that_differs_is_counted() -> None:
    model, other = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4)), nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4))
    with torch.no_grad():
        other.get_parameter("1.weight").fill_(3)
    recorded, found = frozen_digests(model, ()), frozen_digests(other, ())
    assert recorded is not None
    assert found is not None
    assert num_lost(recorded, found) == 1
    assert num_lost(recorded, recorded + found) == 0, "the base may have others besides"


@pytest.mark.parametrize("method", ["mirror", "lora"])
def test_a_base_in_a_narrower_dtype_is_called_that(tmp_path: Path, method: str) -> None:
    adapter = read_adapter(written(tmp_path / "adapter", method))
    with pytest.raises(VerificationError, match=r"trained in float32, the base is loaded in bfloat16.*dtype=float32"):
        load_into(tiny_bert().bfloat16(), adapter, FactorCache())


def test_an_adapter_of_tied_weights_is_refused_where_they_are_not_tied(tmp_path: Path) -> None:
    tied, untied = (tiny_causal(tie_word_embeddings=is_tied) for is_tied in (True, False))
    untied.load_state_dict(tied.state_dict())
    mirrortune.save_adapter(mirrortune.attach(tied, target_modules="embed_tokens"), tmp_path / "adapter")
    with pytest.raises(
        VerificationError, match=r"lm_head\.weight: the adapter was trained where it is tied to model\."
    ):
        mirrortune.load_adapter(untied, tmp_path / "adapter")
    mirrortune.load_adapter(tiny_causal(tie_word_embeddings=True), tmp_path / "adapter")


@pytest.mark.parametrize(
    "options",
    [{"method": "full"}, {"also_train": "embeddings"}, {"method": "lora", "rank": 2, "also_train": "lm_head"}],
)
def test_tied_weights_that_were_trained_whole_are_refused_where_they_are_not_tied(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    tied, untied = (tiny_causal(tie_word_embeddings=is_tied) for is_tied in (True, False))
    untied.load_state_dict(tied.state_dict())
    with torch.no_grad():
        mirrortune.attach(tied, **options).get_input_embeddings().weight.add_(1)
    expected = tied(torch.arange(4)[None]).logits
    mirrortune.save_adapter(tied, tmp_path / "adapter")
    with pytest.raises(
        VerificationError, match=r"lm_head\.weight: the adapter was trained where it is tied to model\."
    ):
        mirrortune.load_adapter(untied, tmp_path / "adapter")
    untied = write_tiny_causal(tmp_path / "untied", tie_word_embeddings=False)
    with pytest.raises(VerificationError, match=r"lm_head\.weight: the adapter was trained where it is tied"):
        mirrortune.merge_adapter(untied, tmp_path / "adapter", tmp_path / "merged")
    again = mirrortune.load_adapter(tiny_causal(tie_word_embeddings=True), tmp_path / "adapter")
    torch.testing.assert_close(again(torch.arange(4)[None]).logits, expected)
    mirrortune.save_adapter(again, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter.json").read_text())["tied"] == {
        "model.embed_tokens.weight": ["lm_head.weight"]
    }


def test_weights_that_were_trained_apart_are_refused_where_they_are_tied(tmp_path: Path) -> None:
    model = mirrortune.attach(tiny_causal(tie_word_embeddings=False), method="full")
    mirrortune.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(VerificationError, match=r"lm_head\.weight"):
        mirrortune.load_adapter(tiny_causal(tie_word_embeddings=True), tmp_path / "adapter")
