# SPDX-License-Identifier: Apache-2.0
"""plain: parameters that are trained as they are beside an adapter, chosen by word or pattern, saved and merged."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import nn

import mirrortune
from mirrortune.adapters.files.adapter_file import read_adapter
from mirrortune.adapters.files.description import edited_text
from mirrortune.adapters.inject import AdapterSpec, adapter_parameters, attach, plain_parameters
from mirrortune.adapters.targets import find_targets
from mirrortune.errors import ConfigError, VerificationError
from mirrortune.merging.in_memory import merged_state
from mirrortune.system.devices import widen
from mirrortune.training.optim import build_optimizer
from tests.bank_cases import Cases, logits_of, save_trained, token_ids
from tests.tiny_models import normed_bert, tiny_bert, tiny_causal
from tests.tiny_runs import HEAD, logits

TYPE = "bert.embeddings.token_type_embeddings.weight"


def chosen(*also_train: str, model: nn.Module | None = None, **settings: Any) -> tuple[str, ...]:
    """Names of the parameters that are trained beside an adapter."""
    spec = AdapterSpec(also_train=also_train, **settings)
    return find_targets(model or tiny_bert(), spec, HEAD).plain


@pytest.mark.parametrize(
    ("entry", "count", "one"),
    [
        ("norms", 10, "bert.encoder.layer.1.output.LayerNorm.weight"),
        ("biases", 18, "bert.encoder.layer.0.attention.self.query.bias"),
        ("embeddings", 3, TYPE),
        ("pooler", 2, "bert.pooler.dense.bias"),
        (r"layer\.1", 16, "bert.encoder.layer.1.intermediate.dense.weight"),
        ("token_type_embeddings", 1, TYPE),
        (r"token_type_embeddings\.weight", 1, TYPE),
        ("pooler|token_type.*", 3, TYPE),
    ],
)
def test_a_word_or_a_pattern_for_parameters_or_modules_chooses(entry: str, count: int, one: str) -> None:
    found = chosen(entry)
    assert len(found) == count
    assert one in found


def test_entries_add_up_in_the_order_of_the_model() -> None:
    both = chosen("pooler", "norms")
    assert len(both) == 12
    assert set(both) == {*chosen("norms"), *chosen("pooler")}
    assert both == chosen("norms", "pooler", "norms")


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_a_tied_parameter_has_one_name_and_may_be_called_by_any(family: str) -> None:
    model = tiny_causal(family)
    by_output = chosen("lm_head", model=model)
    assert len(by_output) == 1
    assert (by_output[0] in chosen("embeddings", model=model)) == (family == "GPT2")
    assert chosen("norms", model=model)  # of whatever class


@pytest.mark.parametrize(
    ("also_train", "settings", "said"),
    [
        (["pooller"], {}, r"'pooller' chooses no parameter of this model. Did you mean 'pooler'\?"),
        (["norms", "(a"], {}, r"not a regular expression: '\(a'"),
        (["all-linear"], {}, "'all-linear' chooses no parameter"),
        (["classifier"], {}, r"in the task head \(classifier.bias\), which is trained anyway"),
        (["pooler"], {"target_modules": "dense"}, "'pooler' chooses bert.pooler.dense, which adapter.target_modules"),
        ([".*"], {}, "it leaves no layer to adapt"),
        (["biases"], {"method": "lora"}, "inside a layer that 'lora' adapts"),
    ],
)
def test_what_cannot_be_is_refused(also_train: list[str], settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"adapter.also_train: .*{said}"):
        chosen(*also_train, **settings)


@pytest.mark.parametrize("method", ["full", "bitfit"])
def test_methods_that_choose_themselves_take_no_other_choice(method: str) -> None:
    with pytest.raises(ConfigError, match=f"adapter.also_train: method '{method}' chooses itself"):
        attach(tiny_bert(), AdapterSpec(method=method, also_train=("norms",)), new_parameters=HEAD)


def test_a_layer_that_is_trained_whole_is_not_adapted() -> None:
    targets = find_targets(tiny_bert(), AdapterSpec(also_train=("pooler",)), HEAD)
    assert "bert.pooler.dense" not in targets.layers
    assert targets.skipped["bert.pooler.dense"] == "trained whole by adapter.also_train"
    assert len(targets.layers) == 12


# A core holds singular values in float32, of which factored makes the whole weight.
@pytest.mark.parametrize(("strategy", "bound"), [("branch", 1e-12), ("dense", 1e-12), ("factored", 1e-6)])
def test_the_bias_of_an_adapted_layer_has_the_gradient_that_it_has_without_adapter(strategy: Any, bound: float) -> None:
    """In float64, with an untrained core: both models are the same function."""
    base = tiny_bert().double()
    for parameter in base.parameters():
        parameter.requires_grad_(requires_grad=True)
    adapted = attach(
        copy.deepcopy(base), AdapterSpec(strategy=strategy, also_train=("biases",)), new_parameters=HEAD
    )  # fmt: skip
    ids = token_ids(3, 7)
    for model in (base, adapted):
        model(input_ids=ids).logits.square().sum().backward()
    beside = attachment_names(adapted)
    assert len(beside) == 18
    held, before = plain_parameters(adapted), dict(base.named_parameters())
    for name in beside:
        expected, found = before[name].grad, held[name].grad
        assert expected is not None
        assert found is not None
        assert float((found - expected).norm()) <= bound * float(expected.norm()) + 1e-12, name


def attachment_names(model: nn.Module) -> tuple[str, ...]:
    """Names of what is trained beside the adapter and the head."""
    return tuple(name for name in plain_parameters(model) if name not in HEAD)


@pytest.mark.parametrize("method", ["mirror", "none", "lora"])
def test_it_is_saved_and_loaded_bit_for_bit(tmp_path: Path, method: str) -> None:
    if method == "lora":
        pytest.importorskip("peft")
    base, entries = tiny_bert(), ["norms", "pooler", "token_type_embeddings"]
    entries += [] if method == "lora" else [r"query\.bias"]
    model = save_trained(base, tmp_path / "adapter", 3, method=method, also_train=entries)
    before = dict(base.named_parameters())
    held = plain_parameters(model)
    assert all(not torch.equal(held[name], before[name]) for name in attachment_names(model))

    loaded = mirrortune.load_adapter(copy.deepcopy(base), tmp_path / "adapter")
    again = plain_parameters(loaded)
    assert again.keys() == held.keys()
    assert all(torch.equal(again[name], held[name]) for name in held)
    assert torch.equal(logits(loaded), logits(model))
    # Names alone are stored: what chose them is never run from a file.
    described = json.loads((tmp_path / "adapter" / "adapter.json").read_text())
    assert set(described["plain"]) == set(attachment_names(model))
    assert "also_train" not in described["adapter"]


def test_a_file_that_holds_a_layer_twice_is_refused(tmp_path: Path) -> None:
    base = tiny_bert()
    save_trained(base, tmp_path / "adapter", 0)
    weight = "bert.encoder.layer.0.output.dense.weight"
    tensors = load_file(tmp_path / "adapter" / "adapter.safetensors") | {f"param.{weight}": base.get_parameter(weight)}
    forge(tmp_path / "adapter", tensors, plain=[weight])
    with pytest.raises(VerificationError, match=f"{weight}: the adapter changes it, and holds it whole"):
        mirrortune.load_adapter(base, tmp_path / "adapter")


def forge(folder: Path, tensors: dict[str, torch.Tensor], **changes: Any) -> None:
    """Write other tensors, and other words in the description, with hashes that fit."""
    import hashlib

    data = save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, {"format_version": "1"})
    (folder / "adapter.safetensors").write_bytes(data)
    text = (folder / "adapter.json").read_text()
    fresh = {**changes, "tensors_sha256": hashlib.sha256(data).hexdigest()}
    (folder / "adapter.json").write_text(edited_text(text, lambda found: found.update(fresh)))


def test_what_the_base_lacks_is_named(tmp_path: Path) -> None:
    base = tiny_bert()
    save_trained(base, tmp_path / "adapter", 0)
    tensors = load_file(tmp_path / "adapter" / "adapter.safetensors")
    forge(tmp_path / "adapter", tensors | {"param.bert.nothing": torch.zeros(2)}, plain=["bert.nothing"])
    with pytest.raises(VerificationError, match=r"tensor .param\.bert\.nothing. is only in the adapter"):
        mirrortune.load_adapter(base, tmp_path / "adapter")
    assert read_adapter(tmp_path / "adapter").plain == ("bert.nothing",)


def test_it_has_a_learning_rate_of_its_own_and_no_decay() -> None:
    model = attach(tiny_bert(), AdapterSpec(also_train=("embeddings", "norms")), new_parameters=HEAD)
    optimizer = build_optimizer(model, lr=0.1, head_lr=0.2, weight_decay=0.5, also_train_lr=0.3)
    rates = {
        id(p): (group["peak_lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    held = plain_parameters(model)
    assert {rates[id(p)] for p in adapter_parameters(model).values()} == {(0.1, 0.0)}
    assert {rates[id(held[name])] for name in attachment_names(model)} == {(0.3, 0.0)}
    assert rates[id(held["classifier.weight"])] == (0.2, 0.5)
    # The embedding of a word that no row has stays as it is, bit for bit.
    before = held["bert.embeddings.word_embeddings.weight"].detach().clone()
    for _ in range(2):
        model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = held["bert.embeddings.word_embeddings.weight"]
    is_same = (after == before).all(dim=1)
    assert not is_same[[5, 6, 7]].any()
    assert is_same[8:].all()


def test_rows_of_a_batch_may_have_their_own(tmp_path: Path) -> None:
    settings: dict[str, dict[str, Any]] = {
        "norms": {"also_train": ["norms"]},
        "tables": {"also_train": ["embeddings"], "method": "none"},
        "neither": {},
    }
    cases = Cases.make(tiny_bert(), tmp_path, {"input_ids": token_ids(4, 6)}, settings, logits_of)
    cases.check(cases.bank(), ["tables", "norms", None, "neither"], [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("family", "entry", "said"),
    [
        ("GPT2", "embeddings", "transformer.wte and lm_head share it"),
        ("Qwen2", r"q_proj\.bias", "its layer is adapted"),
    ],
)
def test_a_bank_refuses_what_it_would_compute_wrong(tmp_path: Path, family: str, entry: str, said: str) -> None:
    base = tiny_causal(family)
    save_trained(base, tmp_path / "a", 0, also_train=[entry])
    with pytest.raises(ConfigError, match=f"it is trained whole, and {said}"):
        mirrortune.AdapterBank(base).add("a", tmp_path / "a")


def test_a_model_in_16_bits_writes_with_norms_in_32() -> None:
    """They are trained in float32, in which small steps count; generate calls the model without autocast."""
    model = tiny_causal("Llama").bfloat16()
    spec = AdapterSpec(method="none", also_train=("norms",))
    widen(model, find_targets(model, spec).plain)
    attach(model, spec)
    assert model.get_parameter("model.norm.weight").dtype == torch.float32
    written: Any = model
    found = written.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert found.shape == (1, 5)
    assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[5000]]))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for place, options in ((model, {"prepend": True}), (model.get_submodule("model.layers.1"), {})):
        hook = place.register_forward_pre_hook(stop, **options)
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=torch.tensor([[5]]))
        assert not torch.is_autocast_enabled("cpu")
        hook.remove()


POOLER, HEADS = "bert.pooler.activation.1", "classifier.0"


def trained(base: nn.Module, **settings: Any) -> nn.Module:
    """An adapted copy after a few steps of a loop of the user's own, in training mode."""
    return after_steps(mirrortune.attach(copy.deepcopy(base), **settings))


def after_steps(model: Any) -> nn.Module:
    """An adapted model after a few steps of a loop of the user's own, in training mode."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for step in range(3):
        ids = torch.randint(5, 45, (6, 9), generator=torch.Generator().manual_seed(step))
        torch.as_tensor(model(input_ids=ids, labels=ids[:, 0] % 2).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert isinstance(model, nn.Module)
    return model


@pytest.mark.parametrize("settings", [{}, {"method": "full"}], ids=str)
def test_a_batch_of_one_row_is_normalised_by_the_running_statistics(settings: dict[str, Any]) -> None:
    """It has no variance of its own; an epoch may end with one."""
    model: Any = trained(normed_bert(), **settings)
    before = {name: value.clone() for name, value in model.named_buffers()}
    ids = torch.randint(5, 45, (1, 9), generator=torch.Generator().manual_seed(5))
    found = model(input_ids=ids, labels=ids[:, 0] % 2)
    found.loss.backward()
    assert model.classifier[0].training
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert model.get_parameter("classifier.1.weight").grad.abs().sum() > 0
    after_steps(model)
    assert not torch.equal(model.classifier[0].running_mean, before["classifier.0.running_mean"])


@pytest.mark.parametrize("is_copied", [False, True])
def test_statistics_are_held_in_layers_that_synchronise_processes(tmp_path: Path, is_copied: bool) -> None:
    """These take the place of others when a model is converted, after the adapter was attached too."""
    base = normed_bert()
    whole = trained(base)
    model = mirrortune.attach(copy.deepcopy(base))
    if is_copied:
        model = copy.deepcopy(model)
    model = after_steps(nn.SyncBatchNorm.convert_sync_batchnorm(model.train()))
    assert isinstance(model.get_submodule(POOLER), nn.SyncBatchNorm)
    for (name, found), expected in zip(model.named_buffers(), whole.buffers(), strict=True):
        assert torch.equal(found, expected), name
    mirrortune.save_adapter(model, tmp_path / "adapter")
    loaded = mirrortune.load_adapter(copy.deepcopy(base), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    ("settings", "norms"),
    [
        ({}, [HEADS]),
        ({"method": "none"}, [HEADS]),
        ({"method": "lora"}, [HEADS]),
        ({"also_train": ["norms"]}, [POOLER, HEADS]),
        ({"also_train": [r"activation\.1"]}, [POOLER, HEADS]),
        ({"method": "bitfit"}, [POOLER, HEADS]),
        ({"method": "full"}, [POOLER, HEADS]),
        ({"method": "lora", "also_train": ["norms"]}, [POOLER, HEADS]),
    ],
    ids=str,
)
def test_running_statistics_move_where_their_layer_is_trained_and_are_saved(
    tmp_path: Path, settings: dict[str, Any], norms: list[str]
) -> None:
    if settings.get("method") == "lora":
        pytest.importorskip("peft")
    base = normed_bert()
    model = trained(base, **settings)
    before, after = dict(base.named_buffers()), dict(model.named_buffers())
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    names = ("running_mean", "running_var", "num_batches_tracked")
    assert moved == {f"{norm}.{name}" for norm in norms for name in names}

    mirrortune.save_adapter(model, tmp_path / "adapter")
    loaded = mirrortune.load_adapter(copy.deepcopy(base), tmp_path / "adapter")
    again = dict(loaded.named_buffers())
    assert all(torch.equal(again[name], after[name]) for name in before)
    assert torch.equal(logits(loaded), logits(model))
    merged = copy.deepcopy(base)
    merged.load_state_dict(merged_state(base, loaded))
    assert all(torch.equal(value, after[name]) for name, value in merged.named_buffers())
    assert torch.allclose(logits(merged), logits(model), atol=1e-5)


def test_statistics_of_a_layer_without_parameters_follow_what_is_around_it() -> None:
    base: Any = normed_bert()
    base.bert.pooler.activation[1] = nn.BatchNorm1d(32, affine=False)
    base.classifier[0] = nn.BatchNorm1d(32, affine=False)
    found = {m: find_targets(base, AdapterSpec(method=m)).statistics for m in ("mirror", "bitfit", "full")}
    assert {m: {n.rpartition(".")[0] for n in names} for m, names in found.items()} == {
        "mirror": {HEADS}, "bitfit": {HEADS}, "full": {POOLER, HEADS},
    }  # fmt: skip


def test_statistics_of_a_model_in_16_bits_are_held_in_32_with_their_norm() -> None:
    model = normed_bert().to(torch.bfloat16)
    widen(model, [f"{POOLER}.weight", f"{POOLER}.bias"])
    assert model.get_buffer(f"{POOLER}.running_var").dtype == torch.float32
    assert model.get_buffer(f"{HEADS}.running_var").dtype == torch.bfloat16


def test_a_bank_refuses_running_statistics(tmp_path: Path) -> None:
    base = normed_bert()
    mirrortune.save_adapter(trained(base), tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"running statistics of its own \(classifier\.0\.running_mean\)"):
        mirrortune.AdapterBank(base).add("one", tmp_path / "adapter")


@pytest.mark.parametrize("normalise", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_the_vectors_of_a_spectral_normalisation_are_held_too(normalise: Any) -> None:
    base: Any = tiny_bert()
    base.bert.pooler.dense = normalise(base.bert.pooler.dense)
    before, after = (dict(model.named_buffers()) for model in (base, trained(base)))
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
