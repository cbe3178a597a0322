# SPDX-License-Identifier: Apache-2.0
"""stored_model: what is read from the files is what the loaded model holds, or nothing is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mirrortune.adapters.spec import AdapterSpec
from mirrortune.adapters.targets import complete_targets, find_targets
from mirrortune.models.load import empty_model, find_model, load_model
from mirrortune.models.tensors import stored_layers
from tests.cli.console import mirrortune, reviews, write_table
from tests.tiny_models import tiny_bert, tiny_causal, write_tiny_causal, write_tiny_model, write_tiny_seq2seq

CAUSAL = "AutoModelForCausalLM"
CLASSIFIER = "AutoModelForSequenceClassification"


def layers(folder: Path, auto_class: str = CAUSAL, dtype: torch.dtype = torch.float32, **spec: Any) -> Any:
    """The stored layers of a model folder, and the same ones of the loaded model."""
    source, settings = find_model(str(folder)), AdapterSpec(**spec)
    loaded = load_model(source, auto_class, {}, dtype, None)
    targets = find_targets(loaded.model, settings, loaded.new_parameters).layers
    expected = {name: (target.read(loaded.model), target.rank) for name, target in targets.items()}
    planned = find_targets(empty_model(source, auto_class, {}), settings).layers
    return stored_layers(source, auto_class, {}, planned, dtype), expected


def check(found: Any, expected: Any) -> None:
    assert [name for name, _, _ in found] == list(expected)
    for name, read, rank in found:
        matrix = read()
        assert rank == expected[name][1]
        assert matrix.dtype == expected[name][0].dtype
        assert torch.equal(matrix, expected[name][0])


def test_shards_hold_what_the_model_does(tmp_path: Path) -> None:
    tiny_causal("GPT2").to(torch.bfloat16).save_pretrained(tmp_path / "a", max_shard_size="40KB")  # type: ignore[operator]
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    check(*layers(tmp_path / "a"))  # stored in bfloat16, read in float32; (in, out) weights
    check(*layers(tmp_path / "a", dtype=torch.bfloat16, split={"c_attn": 3}, rank=4))


def test_experts_that_are_stored_one_by_one_are_stacked(tmp_path: Path) -> None:
    tiny_causal("Mixtral", num_local_experts=2).save_pretrained(tmp_path / "moe")  # type: ignore[operator]
    check(*layers(tmp_path / "moe"))


def test_an_encoder_in_a_classifier_is_found_by_its_own_names(tmp_path: Path) -> None:
    check(*layers(write_tiny_model(tmp_path / "a"), CLASSIFIER))


def test_what_the_files_do_not_hold_as_the_model_does_is_left_to_loading(tmp_path: Path) -> None:
    seq2seq = write_tiny_seq2seq(tmp_path / "t5")
    check(*layers(seq2seq, "AutoModelForSeq2SeqLM"))
    assert layers(seq2seq, "AutoModelForSeq2SeqLM", torch.bfloat16)[0] is None, "T5 keeps some weights in float32"
    model = transformers.AutoModelForCausalLM.from_pretrained(write_tiny_causal(tmp_path / "pickle"))
    torch.save(model.state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    (tmp_path / "pickle" / "model.safetensors").unlink()
    assert layers(tmp_path / "pickle")[0] is None


FOUND_EMPTY: dict[str, tuple[Callable[[Path], object], str, dict[str, Any]]] = {
    "causal": (lambda folder: tiny_causal().save_pretrained(folder), CAUSAL, {}),  # type: ignore[operator]
    "tied": (lambda folder: tiny_causal("GPT2").save_pretrained(folder), CAUSAL, {}),  # type: ignore[operator]
    "experts": (lambda folder: tiny_causal("Mixtral").save_pretrained(folder), CAUSAL, {}),  # type: ignore[operator]
    "16 bits": (lambda folder: tiny_causal().bfloat16().save_pretrained(folder), CAUSAL, {}),  # type: ignore[operator]
    "encoder": (write_tiny_model, CLASSIFIER, {}),
    "embeddings": (write_tiny_model, CLASSIFIER, {"target_modules": ".*embeddings.*"}),
    "sequences": (write_tiny_seq2seq, "AutoModelForSeq2SeqLM", {}),
    "peft": (write_tiny_model, CLASSIFIER, {"method": "lora"}),
    "biases": (write_tiny_model, CLASSIFIER, {"method": "bitfit"}),
}


@pytest.mark.parametrize("case", FOUND_EMPTY)
def test_targets_of_the_model_without_weights_are_those_of_the_loaded_one(tmp_path: Path, case: str) -> None:
    write, auto_class, fields = FOUND_EMPTY[case]
    write(tmp_path / "model")
    spec, source = AdapterSpec(**fields), find_model(str(tmp_path / "model"))
    planned = find_targets(empty_model(source, auto_class, {}), spec)
    loaded = load_model(source, auto_class, {}, torch.bfloat16 if case == "16 bits" else torch.float32, None)
    assert planned == find_targets(loaded.model, spec, loaded.new_parameters)
    assert complete_targets(planned, loaded.model, spec, loaded.new_parameters) is planned


def test_targets_are_found_again_where_loading_changes_the_model(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    source = find_model(str(tmp_path / "model"))
    planned, model = find_targets(empty_model(source, CLASSIFIER, {}), AdapterSpec()), tiny_bert()
    # A checkpoint without the pooler: it is trained with the head, and is no layer of the adapter.
    new = ("bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias")
    found = complete_targets(planned, model, AdapterSpec(), new)
    assert found.head == new
    assert planned.layers.keys() - found.layers.keys() == {"bert.pooler.dense"}
    # A quantised layer in the place of a linear one.
    model.bert.pooler.dense.weight = torch.nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)  # type: ignore[union-attr]
    found = complete_targets(planned, model, AdapterSpec(), ())
    assert found.layers["bert.pooler.dense"].kind.is_quantised


@pytest.mark.usefixtures("quick_figures")
def test_a_first_run_finds_its_targets_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def counting(*words: Any, **more: Any) -> Any:
        calls.append(words)
        return find_targets(*words, **more)

    for module in ("adapters.targets", "adapters.inject", "adapters.files.load", "runs.size"):
        monkeypatch.setattr(f"mirrortune.{module}.find_targets", counting)
    data = write_table(tmp_path / "reviews.csv", reviews(40))
    outcome = mirrortune("train", "-m", write_tiny_model(tmp_path / "model"), "-t", "text-classification", "-d", data,
                         "-o", tmp_path / "run", "--max-steps", 1, "--method", "adaptive")  # fmt: skip
    assert outcome.exit_code == 0, outcome.said
    assert len(calls) == 1


@pytest.mark.usefixtures("quick_figures")
def test_training_factorises_nothing_that_was_prepared(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("-m", tiny_model_dir, "-t", "text-classification", "-d", write_table(tmp_path / "r.csv", reviews(20)))
    first = mirrortune("prepare", *words, "--json").data
    assert first["svd_cache"] == {"hits": 0, "misses": first["targets"]}
    entries = set((tmp_path.parent).rglob("*.safetensors"))
    mirrortune("train", *words, "--max-steps", 1, "-o", tmp_path / "run", "-q")
    assert mirrortune("prepare", *words, "--json").data["svd_cache"] == {"hits": first["targets"], "misses": 0}
    assert {p for p in tmp_path.parent.rglob("*.safetensors") if "factors" in p.parts} <= entries
