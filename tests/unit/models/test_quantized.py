# SPDX-License-Identifier: Apache-2.0
"""Quantised bases: packed layers are read and adapted beside what they compute, and merged into plain weights."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2ForCausalLM

from mirrortune.adapters.files.adapter_file import read_adapter, write_adapter
from mirrortune.adapters.files.load import FingerprintBook, load_into
from mirrortune.adapters.inject import adapter_parameters, attach, attachment, spectral_layers
from mirrortune.adapters.kinds import QuantisedLinear
from mirrortune.adapters.spec import AdapterSpec
from mirrortune.adapters.svd import Factors, factorize
from mirrortune.adapters.targets import find_targets
from mirrortune.errors import ConfigError, VerificationError
from mirrortune.merging.bases import load_plain
from mirrortune.merging.in_memory import merged_state
from mirrortune.models import quantized
from mirrortune.models.load import find_model, load_model, task_config
from mirrortune.models.quantized import dequantise, keep_trainable, loading_config
from mirrortune.runs import train
from mirrortune.system.console import Reporter
from mirrortune.system.devices import widen
from tests.spectral import relative
from tests.tiny_models import tiny_causal

TOKENS = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(0))
BITS = ["8bit", "4bit"]


class Int8Linear(nn.Module):
    """A packed layer of nobody's: rows of small integers with a scale each."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.packed * self.scale).to(x.dtype), self.bias)


class Small(nn.Module):
    """Two packed layers and a plain norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(6)
        self.up, self.down = Int8Linear(nn.Linear(6, 10)), Int8Linear(nn.Linear(10, 4, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.norm(x)).relu())


def factors(name: str, weight: Tensor, rank: int) -> Factors:
    return factorize(weight, rank, name=name)


def moved(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for index, parameter in enumerate(adapter_parameters(model).values()):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def load(folder: Path, load_in: str | None) -> nn.Module:
    packing: dict[str, Any] = {}
    with warnings.catch_warnings():  # bitsandbytes' own, on import and of the dtypes that it computes in
        warnings.simplefilter("ignore")
        if load_in is not None:
            pytest.importorskip("bitsandbytes")
            packing = {"quantization_config": loading_config(load_in, torch.float32)}
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, **packing)
    return keep_trainable(model.eval())


def logits(model: nn.Module) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: Tensor = model(TOKENS).logits
    return found


@pytest.mark.parametrize(("is_native", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_that_emulates_bfloat16_computes_4_bit_layers_in_float16(
    monkeypatch: pytest.MonkeyPatch, is_native: bool, expected: torch.dtype
) -> None:
    pytest.importorskip("bitsandbytes")
    assert loading_config("4bit", torch.bfloat16).bnb_4bit_compute_dtype == torch.bfloat16, "on a CPU"
    monkeypatch.setattr(quantized, "uses_cuda", lambda: True)
    monkeypatch.setattr(quantized, "has_bf16", lambda: is_native)
    assert loading_config("4bit", torch.bfloat16).bnb_4bit_compute_dtype == expected
    assert loading_config("4bit", torch.float32).bnb_4bit_compute_dtype == torch.float32


@pytest.mark.parametrize(("sharding", "library"), [
    ({"is_fsdp2": True}, "FSDP2"),
    ({"state": SimpleNamespace(deepspeed_plugin=SimpleNamespace(
        deepspeed_config={"zero_optimization": {"stage": 2}}))}, "DeepSpeed"),
])  # fmt: skip
def test_quantised_weights_are_not_sharded(
    monkeypatch: pytest.MonkeyPatch, sharding: dict[str, Any], library: str
) -> None:
    job = SimpleNamespace(source=SimpleNamespace(is_quantised=True))
    monkeypatch.setattr(train, "assemble", lambda *_: job)
    settings: Any = None
    assert train._assemble(settings, None, SimpleNamespace(), Reporter()) is job
    with pytest.raises(ConfigError, match=f"{library} is untested with quantised weights"):
        train._assemble(settings, None, SimpleNamespace(**sharding), Reporter())


def test_a_packed_layer_of_any_make_is_read_by_what_it_computes() -> None:
    model, kind = Small(), QuantisedLinear()
    weight = model.up.packed * model.up.scale  # type: ignore[operator]
    assert torch.equal(kind.read(model.up, "weight"), weight)
    assert torch.equal(find_targets(model, AdapterSpec()).layers["up"].read(model), weight)
    assert not kind.layouts(nn.Linear(3, 4))
    assert not kind.layouts(nn.Sequential(nn.Linear(3, 4)))
    assert not kind.layouts(nn.Conv1d(3, 4, 1))


@pytest.mark.parametrize("method", ["mirror", "psoft", "speclora"])
def test_its_adapter_computes_what_the_dequantised_model_does(method: str) -> None:
    spec = AdapterSpec(method=method, options={"lora_rank": 2} if method == "speclora" else {})
    packed, plain = attach(Small(), spec), attach(dequantise(Small()), spec)
    assert list(spectral_layers(packed)) == list(spectral_layers(plain)) == ["up", "down"]
    assert all(layer.strategy == "branch" for layer in spectral_layers(packed).values())
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(packed(x), Small()(x))  # an untrained adapter changes not one bit
    outputs = [moved(model)(x) for model in (packed, plain)]
    assert relative(outputs[0], outputs[1]) < 1e-5
    weights = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))  # rotations keep a sum of squares
    for output in outputs:
        (output * weights).sum().backward()
    for ours, theirs in zip(adapter_parameters(packed).values(), adapter_parameters(plain).values(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert relative(ours.grad, theirs.grad) < 1e-4


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        (AdapterSpec(strategy="factored"), "up is quantised, got factored"),
        (AdapterSpec(strategy="dense"), "up is quantised, got dense"),
        (AdapterSpec(split={"up": 2}), "up is quantised and stays whole"),
    ],
)
def test_what_would_replace_a_packed_weight_is_refused(spec: AdapterSpec, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        attach(Small(), spec)


def test_training_every_weight_of_a_quantised_model_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"'full' trains every weight, and .*q_proj\.weight is quantised"):
        attach(load(checkpoint, "8bit"), AdapterSpec(method="full"))


@pytest.mark.parametrize("load_in", BITS)
def test_trained_biases_of_packed_layers_stay_in_float32(tmp_path: Path, load_in: str) -> None:
    """bitsandbytes converts a bias to the dtype of the input, in place."""
    pytest.importorskip("bitsandbytes")
    tiny_causal("Qwen2", hidden_size=64).bfloat16().save_pretrained(tmp_path)  # type: ignore[operator]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packing = loading_config(load_in, torch.bfloat16)
        model = Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=packing)
        keep_trainable(model)
        widen(model, find_targets(model, AdapterSpec(method="bitfit")).plain)
        attach(model, AdapterSpec(method="bitfit"))
        biases = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert len(biases) == 6
        optimizer = torch.optim.AdamW(biases.values(), lr=1e-6)
        before = {name: bias.detach().clone() for name, bias in biases.items()}
        for _ in range(2):
            model(TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert {bias.dtype for bias in biases.values()} == {torch.float32}
    assert all(float((bias != before[name]).float().mean()) > 0.9 for name, bias in biases.items() if "k_" not in name)


@pytest.mark.parametrize("load_in", BITS)
def test_an_adapter_of_a_quantised_model_is_saved_loaded_and_merged(
    checkpoint: Path, tmp_path: Path, load_in: str
) -> None:
    base = load(checkpoint, load_in)
    before, book = logits(base), FingerprintBook()
    adapted = attach(base, AdapterSpec(), factor_source=factors, on_layer=book)
    kinds = {target.kind.name for target in attachment(adapted).targets.layers.values()}
    assert kinds == {"quantised-linear"}
    assert torch.equal(logits(adapted), before)
    after = logits(moved(adapted))
    after.sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in adapter_parameters(adapted).values())
    write_adapter(
        tmp_path, adapted, book.entries, base={"name": str(checkpoint), "dtype": "float32"}, task=None, extra={}
    )
    stored = read_adapter(tmp_path)

    again = load(checkpoint, load_in)
    load_into(again, stored, factors)
    assert torch.equal(logits(again), after)

    plain = dequantise(load(checkpoint, load_in))
    assert not hasattr(plain.config, "quantization_config")
    adapted_plain = copy.deepcopy(plain)
    load_into(adapted_plain, stored, factors)
    plain.load_state_dict(merged_state(plain, adapted_plain))
    assert relative(logits(plain), logits(adapted_plain)) < 1e-5
    # bitsandbytes computes in 8 bits too; the merged model does not.
    assert relative(logits(plain), after) < (0.1 if load_in == "8bit" else 0.01)
    with pytest.raises(VerificationError, match="is not the one that the adapter was trained on"):
        load_into(load(checkpoint, None), stored, factors)


@pytest.mark.parametrize("load_in", BITS)
def test_an_adapter_of_a_quantised_model_is_merged_into_full_precision(
    checkpoint: Path, tmp_path: Path, load_in: str
) -> None:
    book = FingerprintBook()
    adapted = moved(attach(load(checkpoint, load_in), AdapterSpec(), factor_source=factors, on_layer=book))
    write_adapter(
        tmp_path, adapted, book.entries, base={"name": str(checkpoint), "dtype": "float32"}, task=None, extra={}
    )
    full, trained_on = load(checkpoint, None), dequantise(load(checkpoint, load_in))
    load_into(full, read_adapter(tmp_path), factors, trained_on=trained_on)
    plain = load(checkpoint, None)
    expected = plain.get_parameter("model.layers.0.self_attn.q_proj.weight").double()
    expected = expected + spectral_layers(adapted)["model.layers.0.self_attn.q_proj"].delta_weight()
    state = merged_state(plain, full)
    assert relative(state["model.layers.0.self_attn.q_proj.weight"].double(), expected) < 1e-6
    plain.load_state_dict(state)
    assert relative(logits(plain), logits(full)) < 1e-5


def test_an_evaluation_leaves_the_gradients_of_4_bit_layers(checkpoint: Path) -> None:
    model = moved(attach(load(checkpoint, "4bit"), AdapterSpec(target_modules="layers.0.self_attn.q_proj")))
    with torch.no_grad():
        logits(model)
    logits(model).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in adapter_parameters(model).values())


def test_torchao_weights_are_packed_ones() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 48))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    before = model(x)
    adapted = attach(copy.deepcopy(model), AdapterSpec())
    assert attachment(adapted).targets.layers["1"].kind.name == "quantised-linear"
    assert torch.equal(adapted(x), before)
    merged = dequantise(model)
    assert relative(merged(x), before) < 1e-5


def write_gguf(folder: Path) -> str:
    """The smallest Llama in GGUF's 8-bit blocks, without a tokenizer; its path."""
    gguf = pytest.importorskip("gguf")
    path, generator = folder / "tiny-q8.gguf", np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(64)
    writer.add_rope_freq_base(10000.0)
    shapes = {
        "token_embd": (64, 64),
        "output": (64, 64),
        **{f"blk.0.attn_{n}": (64, 64) for n in ("q", "k", "v", "output")},
    }
    shapes |= {"blk.0.ffn_gate": (128, 64), "blk.0.ffn_up": (128, 64), "blk.0.ffn_down": (64, 128)}
    for name, shape in shapes.items():
        numbers = generator.normal(0, 0.1, shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(numbers, kind), raw_dtype=kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def test_a_gguf_file_is_a_model_whose_merged_weights_are_plain(tmp_path: Path) -> None:
    source = find_model(write_gguf(tmp_path))
    arguments = ("AutoModelForCausalLM", {}, torch.float32, None)
    adapted, book = load_model(source, *arguments).model.eval(), FingerprintBook()
    moved(attach(adapted, AdapterSpec(), factor_source=factors, on_layer=book))
    assert len(spectral_layers(adapted)) == 7
    plain = load_plain(source, *arguments)
    plain.save_pretrained(tmp_path / "merged", state_dict=merged_state(plain, adapted))  # type: ignore[operator]
    assert not (tmp_path / "merged" / "config.json").read_text(encoding="utf-8").count("quantization")
    reopened = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert relative(logits(reopened), logits(adapted)) < 1e-4
    with pytest.raises(ConfigError, match="no such file"):
        find_model(str(tmp_path / "other.gguf"))


def write_float8(checkpoint: Path, folder: Path) -> dict[str, Tensor]:
    """The checkpoint as DeepSeek writes it, float8 with a scale for every block of 32 x 32; what its weights mean."""
    plain = safetensors.torch.load_file(checkpoint / "model.safetensors")
    meant, stored = dict(plain), dict[str, Tensor]()
    for name, weight in plain.items():
        if "_proj" not in name:
            stored[name] = weight
            continue
        blocks = weight.unfold(0, 32, 32).unfold(1, 32, 32)
        scale = blocks.abs().amax((-2, -1)) / 448
        wide = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
        stored[name], stored[f"{name}_scale_inv"] = (weight / wide).to(torch.float8_e4m3fn), scale
        meant[name] = stored[name].float() * wide
    shutil.copytree(checkpoint, folder)
    safetensors.torch.save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [32] * 2,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return meant


def test_float8_with_scales_is_dequantised_while_it_is_loaded(checkpoint: Path, tmp_path: Path) -> None:
    meant = write_float8(checkpoint, tmp_path / "float8")
    source = find_model(str(tmp_path / "float8"))
    assert source.is_stored_packed
    assert not source.is_quantised, "what is adapted is plain"
    # Without a GPU transformers would do so unasked.
    assert task_config(source, {}, None).quantization_config["dequantize"]
    arguments = ("AutoModelForCausalLM", {}, torch.float32, None)
    adapted = load_model(source, *arguments).model.eval()
    for name, weight in adapted.state_dict().items():
        assert relative(weight, meant[name]) < 1e-6, name
    moved(attach(adapted, AdapterSpec(), factor_source=factors))
    plain = load_plain(source, *arguments)
    plain.save_pretrained(tmp_path / "merged", state_dict=merged_state(plain, adapted))  # type: ignore[operator]
    assert "quantization" not in (tmp_path / "merged" / "config.json").read_text(encoding="utf-8")
    reopened = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert relative(logits(reopened), logits(adapted)) < 1e-4


def test_a_format_whose_package_is_not_here_is_named(checkpoint: Path, tmp_path: Path) -> None:
    write_float8(checkpoint, tmp_path / "other")
    place = tmp_path / "other" / "config.json"
    config = json.loads(place.read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "aqlm"}
    place.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"(?s)aqlm.*Install it"):
        load_model(find_model(str(place.parent)), "AutoModelForCausalLM", {}, torch.float32, None)


def test_a_packed_layer_that_cannot_be_called_by_itself_is_named() -> None:
    model = Small()
    model.up.forward = lambda x: x @ model.up.packed.to(torch.int8)  # type: ignore[method-assign, operator]
    with pytest.raises(ConfigError, match=r"cannot be called by itself.*Load the model dequantised"):
        find_targets(model, AdapterSpec()).layers["up"].read(model)


def test_an_optional_kernel_of_bitsandbytes_is_not_missed() -> None:
    name = pytest.importorskip("bitsandbytes.backends.cpu.ops").logger.name
    assert not logging.getLogger(name).isEnabledFor(logging.WARNING)
