# SPDX-License-Identifier: Apache-2.0
"""export: a LoRA adapter that PEFT itself loads, exact where the rank suffices and the best of its rank elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

import mirrortune
from mirrortune.adapters.files.find import adapter_to_score, require_adapter
from mirrortune.adapters.inject import AdapterSpec, spectral_layers
from mirrortune.errors import ConfigError
from mirrortune.merging.lora import LoraExport, export_lora
from tests.spectral import relative, train_a_little
from tests.tiny_models import tiny_causal, tiny_chat_tokenizer, tiny_roberta, tiny_tokenizer
from tests.tiny_runs import logits
from tests.unit.merging.test_in_memory import write_trained

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own

SPECS = {
    "mirror": (AdapterSpec(), 32),
    "rank 5": (AdapterSpec(method="mirror", rank=5), 4),  # the middle axis of an odd rank stays
    "scaled": (AdapterSpec(method="random", rank=6, options={"scale_top_k": "all", "side": "input"}), 6),
    "rounds over all outputs": (AdapterSpec(rank="out", options={"rounds": 2}), 32),
    "listed": (AdapterSpec(method="givens", pairing=[[0, 9], [3, 4]]), 4),
    "psoft": (AdapterSpec(method="psoft", rank=5), 5),
    "lora-xs": (AdapterSpec(method="lora-xs", rank=9), 9),
    "speclora": (AdapterSpec(method="speclora", options={"top_k": 3, "lora_rank": 4}), 7),
}


def export(adapter: Path, target: Path, **options: Any) -> LoraExport:
    """Export into a folder of the test's own."""
    return export_lora(str(adapter), target, **options)


def by_peft(base: Path, folder: Path) -> nn.Module:
    """Base + LoRA, by transformers and PEFT alone."""
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    model = peft.PeftModel.from_pretrained(plain, folder)
    assert isinstance(model, nn.Module)
    return model.eval()


@pytest.mark.parametrize(("spec", "needed"), SPECS.values(), ids=list(SPECS))
def test_peft_loads_it_and_computes_the_same(
    tiny_model_dir: Path, tmp_path: Path, spec: AdapterSpec, needed: int
) -> None:
    adapted = write_trained(tiny_model_dir, tmp_path / "adapter", spec)
    verdict = export(tmp_path / "adapter", tmp_path / "lora")
    assert verdict.passed
    assert verdict.needed_rank == needed
    assert verdict.rank == next(r for r in (8, 16, 32) if r >= needed)
    assert verdict.max_rel_delta_error <= 1e-6
    assert verdict.has_head
    assert relative(logits(by_peft(tiny_model_dir, tmp_path / "lora")), logits(adapted)) <= 1e-5


@pytest.mark.parametrize("target_modules", ["all-linear", r"h\.1\..*"])
def test_layers_with_transposed_weights_travel_too(tmp_path: Path, target_modules: str) -> None:
    """GPT-2's: PEFT loads them without a warning, and into these layers alone."""
    tiny_causal("GPT2").save_pretrained(tmp_path / "base")  # type: ignore[operator]
    tiny_chat_tokenizer().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    mirrortune.attach(model, rank=4, target_modules=target_modules)
    for index, layer in enumerate(spectral_layers(model).values()):
        train_a_little(layer.core, index)
    mirrortune.save_adapter(model, tmp_path / "adapter")
    assert export(tmp_path / "adapter", tmp_path / "lora").passed
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "lora")
    assert relative(logits(loaded.eval()), logits(model)) <= 1e-5
    adapted = {name for name, module in loaded.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == set(spectral_layers(model))


@pytest.mark.parametrize("rank", [1, 3, 8, 20])
def test_a_smaller_rank_is_the_best_there_is(tiny_model_dir: Path, tmp_path: Path, rank: int) -> None:
    adapted = write_trained(tiny_model_dir, tmp_path / "adapter", AdapterSpec())
    verdict = export(tmp_path / "adapter", tmp_path / "lora", rank=rank)
    assert verdict.passed
    worst = 0.0
    for layer in spectral_layers(adapted).values():
        values = torch.linalg.svdvals(layer.delta_weight())  # Eckart and Young
        worst = max(worst, float(values[rank:].norm() / values.norm()))
    assert verdict.max_rel_delta_error == pytest.approx(worst, abs=1e-6)
    assert "truncated" in verdict.describe()
    stored = f"rank {rank}" if rank == verdict.rank else f"rank {rank}, padded to {verdict.rank}"
    assert verdict.describe().startswith(f"{stored} (the change has rank {verdict.needed_rank})")
    for take in (require_adapter, adapter_to_score):
        with pytest.raises(ConfigError, match=r"lora: a LoRA that merge --format exported.*Give the run"):
            take(str(tmp_path / "lora"))
    written = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    stored = {t.shape[0] for name, t in written.items() if "lora_A" in name}
    assert stored == {verdict.rank} <= {8, 32}


def test_a_causal_model_travels_whole(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=len(tiny_tokenizer()), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    mirrortune.attach(model, method="mirror", rank=8)
    for index, layer in enumerate(spectral_layers(model).values()):
        train_a_little(layer.core, index)
    mirrortune.save_adapter(model, tmp_path / "adapter")
    verdict = export(tmp_path / "adapter", tmp_path / "lora")
    assert (verdict.passed, verdict.has_head, verdict.rank) == (True, False, 8)
    described = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert described["task_type"] == "CAUSAL_LM"
    assert described["modules_to_save"] is None
    # What servers look for: the last parts of the names, when they stand for these layers and no others.
    assert described["target_modules"] == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"
    ]  # fmt: skip
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "lora")
    assert relative(logits(loaded.eval()), logits(model)) <= 1e-5


@pytest.mark.parametrize(
    ("stored", "trained_in"), [("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")]
)
def test_it_is_compared_and_used_in_the_dtype_of_training_and_in_the_stored_one(
    tmp_path: Path, stored: str, trained_in: str
) -> None:
    """An adapter that was trained in float32 on a checkpoint in bfloat16 is right, and is exported as exactly."""
    tiny_causal().to(getattr(torch, stored)).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    tiny_chat_tokenizer().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=trained_in)
    mirrortune.attach(model, rank=8)
    for index, layer in enumerate(spectral_layers(model).values()):
        train_a_little(layer.core, index)
    mirrortune.save_adapter(model, tmp_path / "adapter")
    verdict = export(tmp_path / "adapter", tmp_path / "lora")
    epsilon = torch.finfo(getattr(torch, trained_in)).eps
    ours = causal_logits(model.eval())
    largest = max(1.0, float(ours.abs().max()))
    assert verdict.passed
    assert verdict.tolerance <= max(1e-5, 8 * epsilon) * max(1.0, 2 * largest)
    assert verdict.max_rel_delta_error <= 1e-6
    for dtype in ("float32", "bfloat16"):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
        by_peft = peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()
        coarsest = max(epsilon, torch.finfo(getattr(torch, dtype)).eps)
        difference = float((causal_logits(by_peft) - ours).abs().max())
        assert difference <= max(1e-5, 8 * coarsest) * largest


@pytest.mark.parametrize(("method", "trained_in"), [("mirror-scale", "bfloat16"), ("mirror", "float16")])
def test_an_adapter_that_was_loaded_in_a_wider_dtype_is_exported(tmp_path: Path, method: str, trained_in: str) -> None:
    """Its layers hold factors rounded to 16 bits beside the whole weight; the reference is W + delta in float64."""
    dtype = getattr(torch, trained_in)
    tiny_causal().to(dtype).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    tiny_chat_tokenizer().save_pretrained(tmp_path / "base")
    wide, exact = (AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=d) for d in ("float32", "float64"))
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    mirrortune.attach(narrow, method=method)
    for index, layer in enumerate(spectral_layers(narrow).values()):
        train_a_little(layer.core, index)
    mirrortune.save_adapter(narrow, tmp_path / "narrow")
    mirrortune.load_adapter(wide, tmp_path / "narrow")
    mirrortune.save_adapter(wide, tmp_path / "wide")

    verdict = mirrortune.merge_adapter(None, tmp_path / "wide", tmp_path / "lora", "lora")

    with torch.no_grad():
        for name, layer in spectral_layers(narrow).items():
            weight = exact.get_parameter(f"{name}.weight")
            weight.add_(layer.layout.tensor(layer.delta_weight()))
    expected = causal_logits(exact.eval())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="float32")
    by_peft = peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    assert (verdict["passed"], verdict["tolerance"] < 1e-4) == (True, True)
    assert relative(causal_logits(by_peft), expected) <= 1e-6
    assert relative(causal_logits(wide.eval()), expected) <= 1e-6


def causal_logits(model: Any) -> torch.Tensor:
    """Logits of a language model on fixed tokens, in the model's own dtype."""
    ids = torch.randint(0, 250, (2, 11), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=ids).logits).float()


def test_a_head_of_two_layers_travels_as_one_module(tmp_path: Path) -> None:
    tiny_roberta().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    mirrortune.attach(model, method="mirror", rank=8)
    with torch.no_grad():
        model.get_parameter("classifier.dense.weight").add_(0.1)
    mirrortune.save_adapter(model, tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "lora")
    assert relative(logits(by_peft(tmp_path / "base", tmp_path / "lora")), logits(model)) <= 1e-5


def test_only_the_adapted_layers_are_targets(tiny_model_dir: Path, tmp_path: Path) -> None:
    spec = AdapterSpec(rank=4, target_modules=r"encoder\.layer\.0\.attention\.self\.query")
    adapted = write_trained(tiny_model_dir, tmp_path / "adapter", spec)
    export(tmp_path / "adapter", tmp_path / "lora")
    described = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert described["target_modules"] == ["bert.encoder.layer.0.attention.self.query"]
    assert relative(logits(by_peft(tiny_model_dir, tmp_path / "lora")), logits(adapted)) <= 1e-5


@pytest.mark.parametrize(
    ("spec", "options", "said"),
    [
        (AdapterSpec(method="none"), {}, "changes no layer by a low-rank matrix"),
        (AdapterSpec(), {"rank": 0}, "got 0"),
        (AdapterSpec(), {"rank": 513}, "got 513"),
    ],
)
def test_what_is_no_lora_is_refused(
    tiny_model_dir: Path, tmp_path: Path, spec: AdapterSpec, options: dict[str, Any], said: str
) -> None:
    write_trained(tiny_model_dir, tmp_path / "adapter", spec)
    with pytest.raises(ConfigError, match=said):
        export(tmp_path / "adapter", tmp_path / "lora", **options)
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(("method", "converts"), [("lora", True), ("loha", False)])
def test_an_adapter_in_pefts_format_is_refused_with_what_reads_it(
    tiny_model_dir: Path, tmp_path: Path, method: str, *, converts: bool
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir)
    mirrortune.save_adapter(mirrortune.attach(model, method=method), tmp_path / "adapter")
    with pytest.raises(ConfigError, match="saved in PEFT's own format already") as caught:
        export(tmp_path / "adapter", tmp_path / "lora")
    assert ("llama.cpp's convert_lora_to_gguf.py reads too" in str(caught.value)) == converts


def test_a_rank_that_no_server_takes_is_refused_with_what_512_would_lose(tmp_path: Path) -> None:
    from mirrortune.merging.lora import LowRankChange, choose_ranks

    values = torch.linspace(2, 1, 600, dtype=torch.float64)
    change = LowRankChange(torch.eye(600, dtype=torch.float64), values, torch.eye(600, dtype=torch.float64))
    lost = float(values[512:].norm() / values.norm())
    with pytest.raises(ConfigError, match=f"rank 600.*--rank 512 keeps.*{lost:.1e}") as caught:
        choose_ranks(None, change.rank, {"layer": change})
    assert caught.value.where == "--format"  # nobody gave a rank
    assert choose_ranks(512, change.rank, {"layer": change}) == (512, 512)
    assert choose_ranks(10, change.rank, {"layer": change}) == (10, 16)


def test_an_earlier_export_is_replaced_only_on_demand(tiny_model_dir: Path, tmp_path: Path) -> None:
    write_trained(tiny_model_dir, tmp_path / "adapter", AdapterSpec(rank=4))
    export(tmp_path / "adapter", tmp_path / "lora")
    with pytest.raises(ConfigError, match="not empty"):
        export(tmp_path / "adapter", tmp_path / "lora")
    assert export(tmp_path / "adapter", tmp_path / "lora", overwrite=True).passed
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="left alone"):
        export(tmp_path / "adapter", tmp_path / "mine", overwrite=True)
