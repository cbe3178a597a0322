# SPDX-License-Identifier: Apache-2.0
"""Reading any checkpoint one matrix at a time: names matched, adapters merged, other architectures refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel

import mirrortune
from mirrortune.adapters.inject import spectral_layers
from mirrortune.adapters.spec import AdapterSpec
from mirrortune.analyze.checkpoints import open_pair, open_weights
from mirrortune.analyze.matrices import pair_matrices
from mirrortune.analyze.weights import AdaptedWeights, StoredWeights
from mirrortune.errors import ConfigError, VerificationError
from mirrortune.models.tensors import match_names
from tests.tiny_models import tiny_bert, write_tiny_model
from tests.tiny_runs import adapt


def write(folder: Path, tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / name, {"format": "pt"})
    return folder


def two_layers(seed: int, prefix: str = "") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = [f"{prefix}layers.{i}.{kind}" for i in range(2) for kind in ("up", "down")]
    found = {f"{name}.weight": torch.randn(6, 4, generator=generator) for name in names}
    return {**found, f"{prefix}layers.0.norm.weight": torch.ones(4), f"{prefix}ids": torch.arange(3)}


def test_names_are_matched_across_one_prefix() -> None:
    ours = ["encoder.0.a.weight", "encoder.1.a.weight", "pooler.weight"]
    theirs = ["bert.encoder.0.a.weight", "bert.encoder.1.a.weight", "bert.pooler.weight", "classifier.weight"]
    assert match_names(ours, theirs) == {name: f"bert.{name}" for name in ours}
    assert match_names(theirs, ours) == {f"bert.{name}": name for name in ours}
    assert match_names(ours, ours) == {name: name for name in ours}
    assert match_names(["a.w"], ["b.v"]) == {}
    # Only one prefix is taken: the one that most of the names have.
    assert match_names(["l.0.w", "l.1.w"], ["x.l.0.w", "x.l.1.w", "y.l.0.w"]) == {
        "l.0.w": "x.l.0.w",
        "l.1.w": "x.l.1.w",
    }


def test_shards_are_read_through_their_index_and_whole_numbers_left_out(tmp_path: Path) -> None:
    tensors = two_layers(0)
    half = list(tensors)[:2]
    write(tmp_path, {k: tensors[k] for k in half}, "model-00001-of-00002.safetensors")
    write(tmp_path, {k: v for k, v in tensors.items() if k not in half}, "model-00002-of-00002.safetensors")
    files = {k: f"model-0000{1 if k in half else 2}-of-00002.safetensors" for k in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    found = open_weights(str(tmp_path), None)

    assert set(found.shapes) == {k for k in tensors if k != "ids"}
    for name in found.shapes:
        assert torch.equal(found.read(name), tensors[name])
    assert torch.equal(found.read("layers.0.up.weight", 2), tensors["layers.0.up.weight"][2])
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConfigError, match="model-00002-of-00002"):
        open_weights(str(tmp_path), None)


def test_matrices_are_known_from_modules(tmp_path: Path) -> None:
    import transformers

    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=16, vocab_size=20)
    transformers.GPT2Model(config).save_pretrained(tmp_path / "gpt2")
    weights = open_weights(str(tmp_path / "gpt2"), None)
    found = {m.name: m for m in pair_matrices(weights, weights, "all-linear").matrices}

    assert "wte.weight" not in found, "an embedding is a table"
    attention = found["h.0.attn.c_attn.weight"]
    assert (attention.shape, attention.layout.is_transposed) == ((24, 8), True)
    assert attention.read(weights, attention.base).shape == (24, 8)
    bert = open_weights(str(write_tiny_model(tmp_path / "bert")), None)
    names = [m.name for m in pair_matrices(bert, bert, "query|key").matrices]
    assert (
        names == [f"encoder.layer.{i}.attention.self.{k}.weight" for i in (0, 1) for k in ("query", "key")]
        or len(names) == 4
    )


def test_convolutions_act_on_patches_and_stacks_are_many_matrices(tmp_path: Path) -> None:
    import transformers

    config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                                    image_size=8, patch_size=4)  # fmt: skip
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    vit = open_weights(str(tmp_path / "vit"), None)
    shapes = {m.name: m.shape for m in pair_matrices(vit, vit, "all-linear").matrices}
    patches = next(name for name in shapes if "patch" in name)
    assert shapes[patches] == (8, 3 * 4 * 4)
    assert not any("cls_token" in name or "position" in name for name in shapes)

    moe = transformers.MixtralConfig(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
                                     num_key_value_heads=2, num_local_experts=3, vocab_size=20)  # fmt: skip
    model = transformers.MixtralModel(moe)
    write(tmp_path / "moe", dict(model.state_dict()))
    moe.save_pretrained(tmp_path / "moe")
    weights = open_weights(str(tmp_path / "moe"), None)
    experts = [m for m in pair_matrices(weights, weights, "all-linear").matrices if "experts" in m.name]
    assert len(experts) == 6
    assert {m.shape for m in experts} == {(24, 8), (8, 12)}
    one = experts[1]
    assert torch.equal(one.read(weights, one.base), model.state_dict()[one.base][1])


def test_without_a_configuration_shapes_must_do(tmp_path: Path) -> None:
    write(tmp_path / "a", {**two_layers(0), "conv.weight": torch.randn(5, 3, 2, 2)})
    weights = open_weights(str(tmp_path / "a"), None)
    shapes = {m.name: m.shape for m in pair_matrices(weights, weights, "all-linear").matrices}
    assert shapes["conv.weight"] == (5, 12)
    file = open_weights(str(tmp_path / "a" / "model.safetensors"), None)
    assert file.shapes == weights.shapes


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    a = open_weights(str(write(tmp_path / "a", two_layers(0))), None)
    other = open_weights(str(write(tmp_path / "b", {"blocks.0.w": torch.randn(3, 3)})), None)
    wider = {k: torch.cat([v, v]) if v.ndim == 2 else v for k, v in two_layers(0).items()}
    wide = open_weights(str(write(tmp_path / "c", wider)), None)
    with pytest.raises(ConfigError, match=r"share no matrix.*layers.0.down.*blocks.0.w.*one architecture"):
        pair_matrices(a, other, "all-linear")
    with pytest.raises(ConfigError, match=r"differ in shape \(layers.0.down.weight: 6 x 4 and 12 x 4"):
        pair_matrices(a, wide, "all-linear")
    with pytest.raises(ConfigError, match="'upp' matches none"):
        pair_matrices(a, a, "upp")
    # A head for other labels is no other architecture.
    head = {**two_layers(0), "head.weight": torch.randn(2, 4)}
    more = {**two_layers(1), "head.weight": torch.randn(5, 4)}
    pairing = pair_matrices(*(open_weights(str(write(tmp_path / n, t)), None) for n, t in (("d", head), ("e", more))),
                            "all-linear")  # fmt: skip
    assert pairing.resized == ["head.weight"]
    assert len(pairing.matrices) == 4


def test_places_that_hold_nothing_say_so(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    write(tmp_path / "packed", {"w": torch.zeros(4, 4, dtype=torch.int8)})
    (tmp_path / "broken.safetensors").write_bytes(b"nonsense")
    for place, words in {
        "nowhere/at/all": "no such folder", "empty": "no safetensors", "packed": "packed",
        "broken.safetensors": "damaged",
        "unfinished": "not finished",
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            open_weights(str(tmp_path / place), None)
    with pytest.raises(ConfigError, match="not an adapter"):
        open_pair(str(write(tmp_path / "a", two_layers(0))), None, None, None)
    with pytest.raises(ConfigError, match="--revision"):
        open_weights(str(tmp_path / "a"), "main")


@pytest.mark.parametrize(
    "spec", [AdapterSpec(), AdapterSpec(method="speclora"), AdapterSpec(method="psoft", rank=4)], ids=lambda s: s.method
)
def test_an_adapter_is_merged_matrix_by_matrix(tmp_path: Path, spec: AdapterSpec) -> None:
    base = tiny_bert()
    state = {k.removeprefix("bert."): v for k, v in base.state_dict().items() if k.startswith("bert.")}
    write(tmp_path / "base", state)
    adapted = adapt(spec)
    folder = adapted.save(tmp_path / "adapter", name=str(tmp_path / "base"))
    before, after = open_pair(str(tmp_path / "base"), str(folder), None, None)
    layers = spectral_layers(adapted.model)

    assert isinstance(after, AdaptedWeights)
    assert len(layers) > 10
    for name, layer in layers.items():
        own = f"{name.removeprefix('bert.')}.weight"
        expected = layer.base_layer.weight.double() + layer.delta_weight()
        assert torch.allclose(after.read(own), expected, atol=1e-6)
        angles = after.angles(own)
        if spec.preset.pairing is not None:
            theta = layer.core.get_parameter("theta").double().rad2deg()
            assert angles == pytest.approx(theta.tolist())
        else:
            assert (angles is None) == (spec.method == "speclora")
    untouched = "embeddings.word_embeddings.weight"
    assert torch.equal(after.read(untouched), before.read(untouched))
    assert isinstance(open_pair(str(folder), None, None, None)[0], StoredWeights), "an adapter knows its base"


def test_the_rounding_of_training_in_16_bits_is_no_change(tmp_path: Path) -> None:
    """The base is stored in float32, and a merge adds the adapter's change to that."""
    base = write_tiny_model(tmp_path / "base")
    model = AutoModel.from_pretrained(base, dtype=torch.bfloat16)
    mirrortune.attach(model)
    mirrortune.save_adapter(model, tmp_path / "adapter")
    before, after = open_pair(str(base), str(tmp_path / "adapter"), None, None)
    name = "encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(before.read(name), before.read(name).bfloat16().float())
    assert torch.allclose(after.read(name), before.read(name).double(), rtol=0, atol=1e-9)


def test_an_adapter_on_another_base_is_refused(tmp_path: Path) -> None:
    other = {k.removeprefix("bert."): v for k, v in tiny_bert(seed=5).state_dict().items() if k.startswith("bert.")}
    write(tmp_path / "other", other)
    write(tmp_path / "unlike", two_layers(0))
    folder = adapt().save(tmp_path / "adapter")
    _, after = open_pair(str(tmp_path / "other"), str(folder), None, None)
    with pytest.raises(VerificationError, match="the base weight is not the one"):
        after.read("encoder.layer.0.attention.self.query.weight")
    with pytest.raises(ConfigError, match="lacks 13 weights"):
        open_pair(str(tmp_path / "unlike"), str(folder), None, None)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("chosen", [["query", "value"], r"bert\..*\.(query|value)"])
def test_peft_adapters_are_merged_by_peft(
    tmp_path: Path, chosen: list[str] | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    base = write_tiny_model(tmp_path / "base")
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=chosen, task_type="SEQ_CLS", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "lora")
    # A pattern from a file is not matched: the layers are those that the file has tensors for.
    monkeypatch.setattr(peft.tuners.tuners_utils, "match_target_against_key", None)
    before, after = open_pair(str(base), str(tmp_path / "lora"), None, None)
    names = {m.name for m in pair_matrices(before, after, "query|value").matrices}
    merged = adapted.merge_and_unload().state_dict()

    assert len(names) == 4
    for name in names:
        assert torch.allclose(after.read(name), merged[f"bert.{name}"], atol=1e-6)
        assert not torch.equal(after.read(name), before.read(name))
    key = "encoder.layer.0.attention.self.key.weight"
    assert torch.equal(after.read(key), before.read(key))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_modules_that_a_peft_adapter_holds_whole_are_not_taken_for_unchanged(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = write_tiny_model(tmp_path / "base")
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    config = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["pooler"], task_type="SEQ_CLS")
    adapted = peft.get_peft_model(model, config)
    trained = adapted.base_model.model.bert.pooler.modules_to_save["default"].dense.weight
    trained.data += 0.5
    adapted.save_pretrained(tmp_path / "lora")
    before, after = open_pair(str(base), str(tmp_path / "lora"), None, None)
    name = "pooler.dense.weight"

    assert not torch.equal(before.read(name), trained)
    assert torch.equal(after.read(name), trained)
    assert torch.equal(after.read(name, 1), trained[1])


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("method", ["mirror", "lora"])
def test_an_adapter_may_lie_in_the_folder_of_its_own_base(tmp_path: Path, method: str) -> None:
    base = write_tiny_model(tmp_path / "base")
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    if method == "lora":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
        peft.get_peft_model(model, config).save_pretrained(base)
    else:
        model = mirrortune.attach(model, method=method)
        next(iter(spectral_layers(model).values())).core.get_parameter("theta").data += 0.1
        mirrortune.save_adapter(model, base)
    before, after = open_pair(str(base), None, None, None)
    name = "encoder.layer.0.attention.self.query.weight"

    assert isinstance(before, StoredWeights)
    assert not torch.equal(after.read(name), before.read(name))


def test_an_adapter_whose_base_is_an_adapter_is_refused(tmp_path: Path) -> None:
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    adapt().save(tmp_path / "first", name=second)
    adapt().save(tmp_path / "second", name=first)
    with pytest.raises(ConfigError, match=r"second: an adapter names it as its base, and it is an adapter.*Merge it"):
        open_pair(first, None, None, None)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_experts_that_the_file_stores_one_by_one_are_not_taken_for_unchanged(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import transformers

    moe = transformers.MixtralConfig(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
                                     num_key_value_heads=2, num_local_experts=3, vocab_size=20)  # fmt: skip
    base = tmp_path / "base"
    transformers.MixtralForCausalLM(moe).save_pretrained(base)
    experts = {"target_parameters": ["mlp.experts.down_proj"], "init_lora_weights": False}
    for name, chosen in (("some", ["q_proj"]), ("all", [])):
        config = peft.LoraConfig(r=2, target_modules=chosen, **experts)
        model = transformers.MixtralForCausalLM.from_pretrained(base)
        peft.get_peft_model(model, config).save_pretrained(tmp_path / name)
    own = mirrortune.attach(transformers.MixtralForCausalLM.from_pretrained(base))
    mirrortune.save_adapter(own, tmp_path / "own")

    for name, words in {
        "some": r"adapts model\.layers\.0\.mlp\.experts, whose weight is stored otherwise.*merge_and_unload",
        "all": r"none of its layers is in .*merge_and_unload.*analyze BASE MERGED",
        "own": r"lacks 2 weights of the adapter.*If it is the adapter's own base, merge first.*BASE MERGED",
    }.items():
        with pytest.raises((ConfigError, VerificationError), match=words):
            open_pair(str(tmp_path / name), None, None, None)
