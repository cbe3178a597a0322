# SPDX-License-Identifier: Apache-2.0
"""merge_folder: tensor by tensor, several adapters, shards, 16 bits; test_in_memory has the arithmetic itself."""

from __future__ import annotations

import json
import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import mirrortune
from mirrortune.adapters.factor_cache import FactorCache
from mirrortune.adapters.files.adapter_file import read_adapter, write_adapter
from mirrortune.adapters.inject import AdapterSpec, attachment, spectral_layers
from mirrortune.adapters.layout import Layout
from mirrortune.errors import ConfigError, VerificationError
from mirrortune.merging import plan
from mirrortune.merging import write as module
from mirrortune.merging.verify import OutputError, TensorLedger, Verification
from mirrortune.models.parts import CannotLoadParts, PartLoader
from tests.bank_cases import save_trained
from tests.peft_methods import move, tiny_spec
from tests.spectral import relative, train_a_little
from tests.tiny_models import tiny_causal, tiny_chat_tokenizer, write_tiny_model
from tests.tiny_runs import logits
from tests.unit.merging.test_in_memory import write_trained

INPUTS = torch.randint(0, 250, (2, 11), generator=torch.Generator().manual_seed(4))


def merge(*adapters: Path, to: Path, **options: Any) -> Verification:
    """Merge with factors from the cache."""
    return module.merge_folder([read_adapter(a) for a in adapters], to, factor_source=FactorCache(), **options)


def report_of(folder: Path) -> dict[str, Any]:
    """The report beside the weights."""
    found: dict[str, Any] = json.loads((folder / "merge.json").read_text())
    return found


def write_causal(folder: Path, dtype: torch.dtype = torch.float32, shard: str = "40KB", **fields: Any) -> Path:
    """A tiny language model in several files."""
    tiny_causal(**fields).to(dtype).save_pretrained(folder, max_shard_size=shard)  # type: ignore[operator]
    tiny_chat_tokenizer().save_pretrained(folder)
    return folder


def adapt(base: Path, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """A trained adapter of a language model."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    mirrortune.attach(model, **options)
    for index, layer in enumerate(spectral_layers(model).values()):
        train_a_little(layer.core, seed + index)
    mirrortune.save_adapter(model, folder)
    assert isinstance(model, nn.Module)
    return model.eval()


def answers(model: nn.Module) -> torch.Tensor:
    """Logits on fixed tokens."""
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=INPUTS).logits)


@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize("family", ["Llama", "GPT2"])  # GPT2 ties its embeddings and stores its matrices transposed
def test_a_sharded_model_is_merged_tensor_by_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, lazily: bool
) -> None:
    monkeypatch.setattr(module, "LARGE", 0 if lazily else 2**40)
    base = write_causal(tmp_path / "base", family=family)
    adapted = adapt(base, tmp_path / "adapter")
    verdict = merge(tmp_path / "adapter", to=tmp_path / "merged")
    assert verdict.passed
    report = report_of(tmp_path / "merged")
    assert "in_memory" not in report
    assert report["tensors"].keys() == {f"{name}.weight" for name in spectral_layers(adapted)}
    ours, theirs = (sorted(p.name for p in f.glob("*.safetensors*")) for f in (tmp_path / "merged", base))
    assert ours == theirs
    assert len(ours) > 3
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert relative(answers(merged), answers(adapted)) <= 1e-5
    for file in base.glob("*.safetensors"):
        before, after = load_file(file), load_file(tmp_path / "merged" / file.name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[n], after[n]) for n in before if n not in report["tensors"])


@pytest.mark.parametrize("lazily", [False, True])
def test_a_classifier_lazily_or_not(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lazily: bool
) -> None:
    """Its base has other names, and no head."""
    monkeypatch.setattr(module, "LARGE", 0 if lazily else 2**40)
    write_trained(tiny_model_dir, tmp_path / "adapter", AdapterSpec(method="speclora"))
    verdict = merge(tmp_path / "adapter", to=tmp_path / "merged")
    assert verdict.passed
    assert verdict.max_abs_logit_error > 0  # two ways to compute it
    assert "in_memory" not in report_of(tmp_path / "merged")


def test_shards_of_a_size_that_was_asked_for(tmp_path: Path) -> None:
    base = write_causal(tmp_path / "base", shard="1GB")
    adapt(base, tmp_path / "adapter", rank=4)
    merge(tmp_path / "adapter", to=tmp_path / "merged", max_shard_bytes=30_000)
    files = list((tmp_path / "merged").glob("*.safetensors"))
    assert len(files) > 4
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    merge(tmp_path / "adapter", to=tmp_path / "whole")
    assert [f.name for f in (tmp_path / "whole").glob("*.safetensors*")] == ["model.safetensors"]


def test_a_fault_smaller_than_rounding_to_16_bits_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_tiny_model(tmp_path / "base", dtype=torch.bfloat16)
    write_trained(base, tmp_path / "adapter", AdapterSpec(), dtype=torch.float32)
    verdict = merge(tmp_path / "adapter", to=tmp_path / "merged")
    assert verdict.passed
    assert verdict.max_abs_logit_error_unrounded is not None
    assert verdict.tolerance_unrounded is not None
    assert verdict.max_abs_logit_error_unrounded < 1e-5 < verdict.tolerance_unrounded < 1e-3
    assert "before rounding to 16 bits (allowed" in verdict.describe()
    change = plan.MergePlan._changed

    def lacking(self: plan.MergePlan, name: str, weight: torch.Tensor, *given: Any) -> torch.Tensor:
        changed = change(self, name, weight, *given)
        return changed.lerp(weight.double(), 0.05) if "layer.0.attention.self.query" in name else changed

    monkeypatch.setattr(plan.MergePlan, "_changed", lacking)
    with pytest.raises(
        VerificationError, match=r"layer\.0\.attention\.self\.query: the change .* differs by 5\.0e-02 of it"
    ):
        merge(tmp_path / "adapter", to=tmp_path / "again")
    monkeypatch.setattr(TensorLedger, "_check_effects", lambda *_: None)
    with pytest.raises(VerificationError, match="before rounding to 16 bits") as caught:
        merge(tmp_path / "adapter", to=tmp_path / "again")
    rounded = re.search(r"by (\S+) after it", str(caught.value))
    assert rounded
    assert float(rounded[1]) < verdict.tolerance  # would not have been noticed


@pytest.mark.parametrize("trained_in", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("how", ["loaded", "lazily", "in memory"])
def test_a_change_that_is_left_out_of_one_layer_is_found_in_16_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, trained_in: torch.dtype
) -> None:
    base = write_tiny_model(tmp_path / "base", dtype=torch.bfloat16)
    adapted = write_trained(base, tmp_path / "adapter", AdapterSpec(), dtype=trained_in)
    monkeypatch.setattr(module, "LARGE", 0 if how == "lazily" else 2**40)
    if how == "in memory":
        monkeypatch.setattr(module, "_by_tensors", lambda *_: (_ for _ in ()).throw(plan.NotTensorByTensor("as asked")))
    assert merge(tmp_path / "adapter", to=tmp_path / "merged").passed
    whole, name = Layout.tensor, "bert.encoder.layer.0.attention.self.query"
    delta = spectral_layers(adapted)[name].delta_weight()

    def lacking(self: Layout, matrix: torch.Tensor) -> torch.Tensor:
        is_own = matrix.shape == delta.shape and relative(matrix.double(), delta) < 1e-3
        return whole(self, 0 * matrix if is_own else matrix)

    monkeypatch.setattr(Layout, "tensor", lacking)
    with pytest.raises(VerificationError, match=rf"{name}: the change in its merged weight is not the adapter's"):
        merge(tmp_path / "adapter", to=tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_layer_that_is_not_merged_at_all_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_tiny_model(tmp_path / "base", dtype=torch.bfloat16)
    write_trained(base, tmp_path / "adapter", AdapterSpec(), dtype=torch.bfloat16)
    found, name = plan._adapted, "bert.encoder.layer.0.attention.self.query"
    monkeypatch.setattr(plan, "_adapted", lambda *given: {k: v for k, v in found(*given).items() if name not in k})
    with pytest.raises(VerificationError, match=rf"{name}: the merged model lacks the adapter's change"):
        merge(tmp_path / "adapter", to=tmp_path / "merged")


def test_outputs_that_rounding_alone_moves_far_are_accepted() -> None:
    exact = OutputError(error=1e-7, tolerance=1e-4)
    assert OutputError(error=0.3, tolerance=0.1, unrounded=exact).is_within
    assert not OutputError(error=0.3, tolerance=0.1).is_within
    assert not OutputError(error=0.0, tolerance=0.1, unrounded=replace(exact, error=1e-3)).is_within


def test_factors_in_16_bits_differ_from_the_weight_that_they_replace(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", dtype=torch.bfloat16)
    write_trained(base, tmp_path / "adapter", AdapterSpec(strategy="factored"), dtype=torch.bfloat16)
    verdict = merge(tmp_path / "adapter", to=tmp_path / "merged")
    assert verdict.passed
    assert verdict.max_abs_logit_error_unrounded is None


def test_what_a_model_makes_in_16_bits_itself_is_no_difference(tmp_path: Path) -> None:
    """Gemma multiplies its embeddings by a number that it holds in the dtype in which it is loaded."""
    base = write_causal(tmp_path / "base", torch.bfloat16, family="Gemma3Text")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    mirrortune.attach(model)
    mirrortune.save_adapter(model, tmp_path / "adapter")
    verdict = merge(tmp_path / "adapter", to=tmp_path / "merged")
    assert verdict.max_abs_logit_error_unrounded is not None
    assert verdict.max_abs_logit_error_unrounded < 1e-5


@pytest.mark.parametrize(("dtype", "lazily"), [(torch.bfloat16, True), (torch.float16, True), (torch.float16, False)])
def test_16_bits_keep_their_dtype_and_say_what_they_lose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, lazily: bool
) -> None:
    monkeypatch.setattr(module, "LARGE", 0 if lazily else 2**40)
    base = write_tiny_model(tmp_path / "base", dtype=dtype)
    write_trained(base, tmp_path / "adapter", AdapterSpec(), dtype=torch.float32)
    verdict = merge(tmp_path / "adapter", to=tmp_path / "merged")
    assert verdict.passed
    entries = report_of(tmp_path / "merged")["tensors"].values()
    assert all(0 < e["rounding_loss"] < 0.05 for e in entries)
    assert all(e["rel_weight_error"] <= torch.finfo(dtype).eps for e in entries)
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(n).dtype for n in file.keys()} == {dtype}  # noqa: SIM118
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize(("method", "how"), [("none", "hf"), ("lora", "hf"), ("mirror", "hf"), ("mirror", "lora")])
def test_a_float16_classifier_with_a_head_in_float32_is_merged(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, how: str, lazily: bool
) -> None:
    monkeypatch.setattr(module, "LARGE", 0 if lazily else 2**40)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, dtype=torch.float16)
    mirrortune.save_adapter(mirrortune.attach(model, method), tmp_path / "adapter")
    verdict = mirrortune.merge_adapter(tiny_model_dir, tmp_path / "adapter", tmp_path / "merged", format=how)
    assert verdict["passed"]
    assert verdict["max_abs_logit_error"] is not None


@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize("how", ["hf", "lora"])
def test_a_float16_model_that_is_computed_in_bfloat16_is_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, lazily: bool
) -> None:
    """As most are, whose outputs bfloat16 rounds eight times as much."""
    monkeypatch.setattr(module, "LARGE", 0 if lazily else 2**40)
    base = write_causal(tmp_path / "base", torch.float16)
    adapt(base, tmp_path / "adapter", dtype=torch.float16, rank=4)
    verdict = mirrortune.merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", format=how)
    assert verdict["passed"]
    assert verdict["max_abs_logit_error"] > 8 * torch.finfo(torch.float16).eps


def test_adapters_of_one_base_change_different_weights(tmp_path: Path) -> None:
    base = write_causal(tmp_path / "base")
    one = adapt(base, tmp_path / "one", target_modules="q_proj|v_proj")
    two = adapt(base, tmp_path / "two", seed=9, target_modules="gate_proj|up_proj|down_proj")
    assert merge(tmp_path / "one", tmp_path / "two", to=tmp_path / "merged").passed
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for part in (one, two):
        for name, layer in spectral_layers(part).items():
            exact = layer.base_layer.weight.double() + layer.delta_weight()
            assert torch.equal(merged.get_parameter(f"{name}.weight"), exact.float())
    both = merge(tmp_path / "two", tmp_path / "one", to=tmp_path / "other-order")
    assert both.passed
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "other-order")
    assert all(torch.equal(a, b) for a, b in zip(merged.parameters(), other.parameters(), strict=True))


def test_adapters_trained_in_different_dtypes_find_their_base(tmp_path: Path) -> None:
    base = write_causal(tmp_path / "base")
    adapt(base, tmp_path / "one", dtype=torch.bfloat16, target_modules="q_proj")
    adapt(base, tmp_path / "two", seed=9, target_modules="gate_proj")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a base that differs
        assert merge(tmp_path / "one", tmp_path / "two", to=tmp_path / "merged").passed


def test_adapters_of_one_base_that_change_the_same_weights_are_refused(tmp_path: Path) -> None:
    base = write_causal(tmp_path / "base")
    adapt(base, tmp_path / "one", target_modules="q_proj")
    adapt(base, tmp_path / "two", seed=9, target_modules="q_proj|k_proj")
    one, two = (re.escape(str(tmp_path / name)) for name in ("one", "two"))
    said = f"q_proj: {one} changed this weight before, and {two} was not trained on the result"
    with pytest.raises(VerificationError, match=said):
        merge(tmp_path / "one", tmp_path / "two", to=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_adapters_in_sequence_are_merged_in_sequence(tmp_path: Path) -> None:
    base = write_causal(tmp_path / "base")
    adapt(base, tmp_path / "one")
    merge(tmp_path / "one", to=tmp_path / "first")
    second = adapt(tmp_path / "first", tmp_path / "two", seed=9)
    merge(tmp_path / "two", to=tmp_path / "step-by-step")
    assert merge(tmp_path / "one", tmp_path / "two", to=tmp_path / "at-once", base=str(base)).passed
    once, steps = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("at-once", "step-by-step"))
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), steps.parameters(), strict=True))
    assert relative(answers(once), answers(second)) <= 1e-5
    with pytest.raises(VerificationError, match="the base weight is not the one"):
        merge(tmp_path / "two", tmp_path / "one", to=tmp_path / "backwards", base=str(base))


@pytest.mark.parametrize("order", [("full", "mirror"), ("mirror", "full")])
def test_a_weight_trained_whole_by_one_adapter_and_changed_by_another_is_refused(
    tmp_path: Path, order: tuple[str, str]
) -> None:
    base = write_causal(tmp_path / "base")
    for method in order:
        adapt(base, tmp_path / method, method=method, target_modules="q_proj")
    with pytest.raises(VerificationError, match=r"q_proj\.weight' is trained as a whole by one adapter and changed"):
        merge(*(tmp_path / method for method in order), to=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("family", ["Llama", "Mixtral"])  # Mixtral's experts are stored one by one and loaded stacked
def test_each_reference_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    base = write_causal(tmp_path / "base", family=family, **({"num_local_experts": 2} if family == "Mixtral" else {}))
    adapt(base, tmp_path / "adapter", rank=4)
    found: list[str] = []
    factors = plan.trained_factors

    def counted(adapter: Any, layer: str, *args: Any, **kwargs: Any) -> Any:
        found.append(layer)
        return factors(adapter, layer, *args, **kwargs)

    monkeypatch.setattr(plan, "trained_factors", counted)
    assert merge(tmp_path / "adapter", to=tmp_path / "merged").passed
    assert len(found) == len({*found}) == len(report_of(tmp_path / "merged")["tensors"])


def test_two_heads_of_one_base_are_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    for name, part in (("one", "query"), ("two", "key")):
        write_trained(tiny_model_dir, tmp_path / name, AdapterSpec(target_modules=part))
    with pytest.raises(ConfigError, match=r"have both trained 'classifier\.\w+'"):
        merge(tmp_path / "one", tmp_path / "two", to=tmp_path / "merged")


def test_other_weights_only_by_force(tmp_path: Path) -> None:
    base = write_causal(tmp_path / "base")
    write_causal(tmp_path / "other", seed=1)
    adapt(base, tmp_path / "adapter", rank=4)  # portable
    said = rf"the base weight is not the one .* Allowed: {re.escape(str(base))}, in float32\. Load that base"
    with pytest.raises(VerificationError, match=said):
        merge(tmp_path / "adapter", to=tmp_path / "merged", base=str(tmp_path / "other"))
    verdict = merge(tmp_path / "adapter", to=tmp_path / "merged", base=str(tmp_path / "other"), remarks=[])
    assert verdict.passed
    remarks = report_of(tmp_path / "merged")["remarks"]
    assert any("the base weight is not the one" in remark for remark in remarks)


def test_a_base_without_safetensors_is_merged_in_memory(tiny_model_dir: Path, tmp_path: Path) -> None:
    base = without_safetensors(tiny_model_dir, tmp_path / "base")
    adapted = write_trained(base, tmp_path / "adapter", AdapterSpec())
    assert merge(tmp_path / "adapter", to=tmp_path / "merged").passed
    assert report_of(tmp_path / "merged")["in_memory"] == "the base has no safetensors files"
    from tests.unit.merging.test_in_memory import reopen

    assert relative(logits(reopen(tmp_path / "merged")), logits(adapted)) <= 1e-5


def without_safetensors(source: Path, folder: Path) -> Path:
    """The same model as a pickle, which is merged in memory."""
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(source / "model.safetensors"), folder / "pytorch_model.bin")
    return folder


def test_why_a_model_is_merged_in_memory_is_said(tiny_model_dir: Path, tmp_path: Path) -> None:
    base = without_safetensors(tiny_model_dir, tmp_path / "base")
    write_trained(base, tmp_path / "adapter", AdapterSpec())
    notes: list[str] = []
    merge(tmp_path / "adapter", to=tmp_path / "merged", on_note=notes.append)
    assert notes == ["merging with the whole model in memory (about 0.0 GiB), not tensor by tensor: "
                     "the base has no safetensors files"]  # fmt: skip
    mirrortune.save_adapter(mirrortune.attach(AutoModelForCausalLM.from_pretrained(
        write_causal(tmp_path / "causal", shard="1GB"))), tmp_path / "plain")  # fmt: skip
    notes.clear()
    merge(tmp_path / "plain", to=tmp_path / "by-tensors", on_note=notes.append)
    assert notes == []


def test_what_was_half_written_goes_with_its_folders(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_trained(tiny_model_dir, tmp_path / "adapter", AdapterSpec())

    def give_up(folder: Path, *_: Any, **__: Any) -> Any:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("half")
        raise CannotLoadParts("as of a test")

    monkeypatch.setattr(module, "check_contents", give_up_once := Once(give_up, module.check_contents))
    assert merge(tmp_path / "adapter", to=tmp_path / "merged").passed
    assert give_up_once.calls == 2
    assert not (tmp_path / "merged" / "additional_chat_templates").exists()
    assert report_of(tmp_path / "merged")["in_memory"] == "as of a test"


class Once:
    """One function for the first call, another for those after it."""

    def __init__(self, first: Any, then: Any) -> None:
        self.first, self.then, self.calls = first, then, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return (self.first if self.calls == 1 else self.then)(*args, **kwargs)


@pytest.mark.parametrize("kind", [AttributeError, TypeError, KeyError])
def test_mistakes_of_our_own_are_no_reason_to_merge_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    """A line of this package that raises, called by what asks transformers' loader."""
    base = write_causal(tmp_path / "base")
    adapt(base, tmp_path / "adapter", rank=4)
    wrong = {AttributeError: "part.nothing", TypeError: "len(5)", KeyError: "{}['key']"}[kind]
    place = Path(mirrortune.__file__).parent / "part_loading.py"
    names: dict[str, Any] = {}
    exec(compile(f"def wrong(self, part=None):\n    {wrong}", str(place), "exec"), names)
    monkeypatch.setattr(PartLoader, "_find_parts", names["wrong"])
    if kind is AttributeError:  # of an object of ours
        monkeypatch.setattr(PartLoader, "_find_parts", lambda self: names["wrong"](self, PartLoader))
    with pytest.raises(kind):
        merge(tmp_path / "adapter", to=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_what_another_version_of_transformers_lacks_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.conversion_mapping as loader

    base = write_causal(tmp_path / "base", family="Mixtral", num_local_experts=2)
    adapt(base, tmp_path / "adapter", rank=4)

    def changed(*_: Any) -> Any:
        raise TypeError("it works in another way now")

    monkeypatch.setattr(loader, "get_model_conversion_mapping", changed)
    notes: list[str] = []
    assert merge(tmp_path / "adapter", to=tmp_path / "merged", on_note=notes.append).passed
    assert len(notes) == 1
    assert "not tensor by tensor: the files hold no 'model.layers.0.mlp.experts" in notes[0]


# Beside the weight, rescaled, with its bias, before the weight; of numbers that all layers share.
@pytest.mark.parametrize(
    ("method", "lazily"),
    [("lora", False), ("dora", True), ("road", True), ("oft", False), ("vera", True), ("randlora", False),
     ("vblora", True), ("unilora", False), ("tinylora", True)],
)  # fmt: skip
def test_tuners_of_peft_are_merged_tensor_by_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, lazily: bool
) -> None:
    pytest.importorskip("peft")
    monkeypatch.setattr(module, "LARGE", 0 if lazily else 2**40)
    base = write_causal(tmp_path / "base", family="Qwen2", shard="60KB", num_key_value_heads=4)  # has biases
    model = AutoModelForCausalLM.from_pretrained(base)
    spec = tiny_spec(method)
    mirrortune.attach(model, method=method, rank=spec.rank, **spec.options)
    mirrortune.save_adapter(move(model), tmp_path / "adapter")
    assert merge(tmp_path / "adapter", to=tmp_path / "merged").passed
    report = report_of(tmp_path / "merged")
    assert "in_memory" not in report
    assert report["contents"]["chat_template"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert relative(answers(merged), answers(model.eval())) <= 1e-5
    assert relative(answers(merged), answers(AutoModelForCausalLM.from_pretrained(base).eval())) > 1e-3


def test_a_foreign_base_of_a_tuner_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    base = write_causal(tmp_path / "base")
    write_causal(tmp_path / "other", seed=1)
    model = AutoModelForCausalLM.from_pretrained(base)
    mirrortune.save_adapter(mirrortune.attach(model, method="lora", rank=2), tmp_path / "adapter")
    said = rf"the base weight is not the one .* Allowed: {re.escape(str(base))}, in float32\. Load that base"
    with pytest.raises(VerificationError, match=said):
        merge(tmp_path / "adapter", to=tmp_path / "merged", base=str(tmp_path / "other"))


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own-llama"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = 2 * outputs.logits
        return outputs
"""


def test_a_model_with_code_of_its_own_is_merged_whole_and_keeps_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    base = write_causal(tmp_path / "base", shard="1GB")
    (base / "own.py").write_text(OWN_CODE)
    described = json.loads((base / "config.json").read_text())
    described |= {"model_type": "own-llama", "architectures": ["OwnForCausalLM"]}
    described["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (base / "config.json").write_text(json.dumps(described))
    model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True)
    mirrortune.attach(model, rank=4)
    for index, layer in enumerate(spectral_layers(model).values()):
        train_a_little(layer.core, index)
    identity = {"name": str(base), "dtype": "float32", "auto_class": "AutoModelForCausalLM"}
    (tmp_path / "adapter").mkdir()
    entries = model._mirrortune_fingerprints.entries
    write_adapter(tmp_path / "adapter", model, entries, base=identity, task=None, extra={})
    with pytest.raises(ConfigError, match="--trust-remote-code"):
        merge(tmp_path / "adapter", to=tmp_path / "merged")
    verdict = merge(tmp_path / "adapter", to=tmp_path / "merged", trust_remote_code=True)
    assert verdict.passed
    assert verdict.max_abs_logit_error is not None
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True).eval()
    assert type(merged).__name__ == "OwnForCausalLM"
    assert relative(answers(merged), answers(model.eval())) <= 1e-5


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning", "ignore:Model has `tie_word")  # PEFT's
@pytest.mark.parametrize("family", ["Llama", "GPT2", "Qwen2"])  # GPT2 ties its embeddings, Qwen2's layers have biases
@pytest.mark.parametrize("how", ["hf", "lora"])
def test_what_is_trained_beside_the_adapter_is_merged_and_nothing_else_changes(
    tmp_path: Path, family: str, how: str
) -> None:
    if how == "lora":
        pytest.importorskip("peft")
    base = write_causal(tmp_path / "base", family=family)
    also_train = ["norms", "embeddings"] + ([r"q_proj\.bias"] if family == "Qwen2" and how == "hf" else [])
    model = AutoModelForCausalLM.from_pretrained(base)
    save_trained(model, tmp_path / "adapter", 5, also_train=also_train, rank=4)
    adapted = mirrortune.load_adapter(model, tmp_path / "adapter")
    verdict = mirrortune.merge_adapter(str(base), tmp_path / "adapter", tmp_path / "out", how)
    assert verdict["passed"]
    fresh = AutoModelForCausalLM.from_pretrained(base)
    if how == "lora":
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(fresh, tmp_path / "out")
        assert relative(answers(loaded.eval()), answers(adapted)) <= 1e-5
        return
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert relative(answers(merged.eval()), answers(adapted)) <= 1e-5
    targets = attachment(adapted).targets
    before, after = dict(fresh.named_parameters()), dict(merged.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {*targets.plain, *(target.tensors[0] for target in targets.layers.values())}
    stored = read_adapter(tmp_path / "adapter").plain_tensors()
    assert all(torch.equal(after[name], tensor) for name, tensor in stored.items())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning", "ignore:Model has `tie_word")  # PEFT's
@pytest.mark.parametrize("is_tied", [False, True])
def test_a_tuner_of_peft_with_parameters_beside_it_is_merged_and_loaded_by_peft(tmp_path: Path, is_tied: bool) -> None:
    peft = pytest.importorskip("peft")
    base = write_causal(tmp_path / "base", tie_word_embeddings=is_tied)
    model = AutoModelForCausalLM.from_pretrained(base)
    mirrortune.attach(model, method="lora", also_train=["norms", "embeddings", "lm_head"])
    move(model)
    with torch.no_grad():
        for name in attachment(model).targets.plain:
            parameter = model.get_parameter(name)
            parameter.add_(0.1 * torch.randn_like(parameter))
    mirrortune.save_adapter(model, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    assert relative(answers(loaded.eval()), answers(model.eval())) <= 1e-6
    assert merge(tmp_path / "adapter", to=tmp_path / "merged", base=str(base)).passed
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative(answers(merged.eval()), answers(model)) <= 1e-5
