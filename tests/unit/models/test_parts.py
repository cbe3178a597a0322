# SPDX-License-Identifier: Apache-2.0
"""part_loading: what transformers stacks, packs or unpacks when it loads a model is read and merged part by part."""

from __future__ import annotations

import gc
import json
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mirrortune.adapters.factor_cache import FactorCache
from mirrortune.adapters.files.adapter_file import write_adapter
from mirrortune.adapters.files.load import FingerprintBook
from mirrortune.adapters.inject import attach, spectral_layers
from mirrortune.adapters.spec import AdapterSpec
from mirrortune.adapters.targets import Target, find_targets
from mirrortune.merging import write as module
from mirrortune.merging.bases import load_plain
from mirrortune.models.load import ModelSource, empty_model, find_model
from mirrortune.models.parts import PartLoader, value_of
from mirrortune.models.tensors import part_loader, stored_layers
from tests.spectral import relative, train_a_little
from tests.tiny_models import tiny_causal, tiny_chat_tokenizer
from tests.unit.merging.test_write import adapt, answers, merge, report_of
from tests.unit.models.test_quantized import write_float8

CAUSAL, WIDE = "AutoModelForCausalLM", {"hidden_size": 64, "intermediate_size": 64}
FORMS = ["4bit", "8bit", "stored in 4bit", "stored in float8"]


def write(folder: Path, family: str = "Llama", **fields: Any) -> Path:
    """A tiny language model in several files."""
    tiny_causal(family, **fields).save_pretrained(folder, max_shard_size="60KB")  # type: ignore[operator]
    tiny_chat_tokenizer().save_pretrained(folder)
    return folder


def quantised(folder: Path, form: str) -> tuple[Path, dict[str, Any]]:
    """A base for ``form``, and what an adapter of it says of its base."""
    pytest.importorskip("bitsandbytes")
    base = write(folder / "base", **WIDE)
    described: dict[str, Any] = {"dtype": "float32", "auto_class": CAUSAL, "quantised": True}
    if not form.startswith("stored"):
        return base, {**described, "name": str(base), "load_in": form}
    if form.endswith("float8"):
        AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp := folder / "whole")
        tiny_chat_tokenizer().save_pretrained(tmp)
        write_float8(tmp, folder / "packed")
        return folder / "packed", {**described, "name": str(folder / "packed")}
    from transformers import BitsAndBytesConfig

    packing: Any = BitsAndBytesConfig
    with warnings.catch_warnings():  # bitsandbytes' own, on import
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, quantization_config=packing(load_in_4bit=True))
        model.save_pretrained(folder / "packed")
    tiny_chat_tokenizer().save_pretrained(folder / "packed")
    return folder / "packed", {**described, "name": str(folder / "packed")}


def trained(described: dict[str, Any], folder: Path) -> nn.Module:
    """The dequantised base with an adapter, which is saved."""
    source = find_model(described["name"], load_in=described.get("load_in"))
    model, book = load_plain(source, CAUSAL, {}, torch.float32, None), FingerprintBook()
    attach(model, AdapterSpec(), factor_source=FactorCache(), on_layer=book)
    for index, layer in enumerate(spectral_layers(model).values()):
        train_a_little(layer.core, index)
    folder.mkdir()
    write_adapter(folder, model, book.entries, base=described, task=None, extra={})
    return model.eval()


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def state_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint as it is stored."""
    return {name: tensor for file in files(folder) for name, tensor in load_file(file).items()}


def test_a_plain_checkpoint_needs_no_loader(tmp_path: Path) -> None:
    base = write(tmp_path / "base")
    assert part_loader(find_model(str(base)), CAUSAL, {}, torch.float32, files(base)) is None


def test_stacked_experts_are_those_of_the_loaded_model_and_can_be_taken_apart(tmp_path: Path) -> None:
    base = write(tmp_path / "base", "Mixtral", num_local_experts=2)
    loader = PartLoader(find_model(str(base)), CAUSAL, {}, torch.float32, files(base))
    expected, found = AutoModelForCausalLM.from_pretrained(base).state_dict(), loader.tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value_of(found[name]), tensor) for name, tensor in expected.items())
    stored = state_of(base)
    stacked = [part for part in loader.parts if part.converter is not None]
    assert len(stacked) == 4
    for part in stacked:
        apart = loader._stored(part, {name: expected[name] for name in part.names})
        assert all(torch.equal(apart[key], stored[key]) for key in part.keys)


@pytest.mark.parametrize("lazily", [False, True])
def test_a_mixture_of_experts_is_merged_in_the_form_that_it_is_stored_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lazily: bool
) -> None:
    monkeypatch.setattr(module, "LARGE", 0 if lazily else 2**40)
    base = write(tmp_path / "base", "Mixtral", num_local_experts=2)
    adapted = adapt(base, tmp_path / "adapter", target_modules=r"q_proj|layers.1.mlp.experts.\w+")
    assert merge(tmp_path / "adapter", to=tmp_path / "merged").passed
    report = report_of(tmp_path / "merged")
    assert "in_memory" not in report
    changed = {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}
    changed |= {f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}
    assert report["tensors"].keys() == changed
    before, after = state_of(base), state_of(tmp_path / "merged")
    assert [p.name for p in files(base)] == [p.name for p in files(tmp_path / "merged")]
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert before.keys() - same == {n for n in before if "q_proj" in n or "layers.1.block_sparse_moe.experts" in n}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert relative(answers(merged), answers(adapted)) <= 1e-5


def targets_of(source: ModelSource) -> dict[str, Target]:
    return find_targets(empty_model(source, CAUSAL, {}), AdapterSpec()).layers


@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_base_is_read_and_merged_one_layer_at_a_time(tmp_path: Path, form: str) -> None:
    base, described = quantised(tmp_path, form)
    adapted = trained(described, tmp_path / "adapter")
    source = find_model(described["name"], load_in=described.get("load_in"))
    plain = load_plain(source, CAUSAL, {}, torch.float32, None)
    layers = stored_layers(source, CAUSAL, {}, targets_of(source), torch.float32)
    assert layers is not None
    assert [name for name, _, _ in layers] == list(spectral_layers(adapted))
    assert all(torch.equal(read(), plain.get_submodule(name).weight) for name, read, _ in layers)  # type: ignore[arg-type]

    assert merge(tmp_path / "adapter", to=tmp_path / "merged").passed
    report = report_of(tmp_path / "merged")
    assert "in_memory" not in report
    assert len(report["tensors"]) == len(layers)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    after, before = state_of(tmp_path / "merged"), plain.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        layer = spectral_layers(adapted).get(name.removesuffix(".weight"))
        expected = tensor if layer is None else (tensor.double() + layer.delta_weight()).float()
        assert torch.equal(after[name], expected), name
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert relative(answers(merged), answers(adapted)) <= 1e-5
    assert base.is_dir()


def test_what_the_loader_cannot_take_apart_is_left_to_loading(tmp_path: Path) -> None:
    base, _ = quantised(tmp_path, "stored in float8")
    broken = load_file(base / "model.safetensors")
    scales = [name for name in broken if name.endswith("_scale_inv")]
    save_file({n: t[:1, :0] if n in scales else t for n, t in broken.items()}, base / "model.safetensors")
    source = find_model(str(base))
    assert stored_layers(source, CAUSAL, {}, targets_of(source), torch.float32) is None


def test_an_adapter_of_a_quantised_base_is_merged_into_full_weights_one_at_a_time(tmp_path: Path) -> None:
    base, described = quantised(tmp_path, "4bit")
    adapted = trained(described, tmp_path / "adapter")
    assert merge(tmp_path / "adapter", to=tmp_path / "merged", base=str(base)).passed
    assert "in_memory" not in report_of(tmp_path / "merged")
    full, after = state_of(base), state_of(tmp_path / "merged")
    layers = spectral_layers(adapted)
    for name, tensor in full.items():
        layer = layers.get(name.removesuffix(".weight"))
        expected = tensor if layer is None else (tensor.double() + layer.delta_weight()).float()
        assert relative(after[name], expected) <= (0 if layer is None else 1e-6), name


def tiny_loader(folder: Path) -> PartLoader:
    base = write(folder)
    return PartLoader(find_model(str(base)), CAUSAL, {}, torch.float32, sorted(base.glob("*.safetensors")))


def test_threads_read_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them fill one skeleton, and tensors split from a fused one would replace each other there."""
    loader = tiny_loader(tmp_path)
    fill, meeting, met = vars(PartLoader)["_fill"], threading.Barrier(2), []

    def meet(self: PartLoader, parts: Any) -> None:
        with suppress(threading.BrokenBarrierError):
            met.append(meeting.wait(0.5))
        fill(self, parts)

    monkeypatch.setattr(PartLoader, "_fill", meet)
    names = [f"model.layers.0.mlp.{part}_proj.weight" for part in ("up", "gate")]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(loader.read, names))
    assert met == []
    stored = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in zip(names, found, strict=True))


def test_a_loader_that_has_read_another_dtype_goes_with_its_last_reference(tmp_path: Path) -> None:
    loader = tiny_loader(tmp_path)
    loader._load("model.norm.weight", torch.bfloat16)
    left = weakref.ref(loader)
    del loader
    gc.collect()
    assert left() is None
