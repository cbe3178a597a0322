# SPDX-License-Identifier: Apache-2.0
"""merging: a complete plain checkpoint that equals base + adapter, or nothing at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mirrortune.adapters.factor_cache import FactorCache
from mirrortune.adapters.files.adapter_file import read_adapter, write_adapter
from mirrortune.adapters.files.load import FingerprintBook
from mirrortune.adapters.inject import AdapterSpec, attach, spectral_layers
from mirrortune.errors import ConfigError, VerificationError
from mirrortune.merging.in_memory import merged_state, verify
from mirrortune.merging.verify import OutputError, TensorLedger, Verification
from mirrortune.merging.write import merge_folder
from mirrortune.models.load import find_model, load_model, load_tokenizer
from mirrortune.tasks.base import task_to_dict
from mirrortune.tasks.model_outputs import compared_outputs
from mirrortune.tasks.probes import text_probe
from tests.spectral import relative, train_a_little
from tests.tiny_models import write_tiny_model
from tests.tiny_runs import classification, logits

SPECS = {
    "mirror": AdapterSpec(),
    "rank 5": AdapterSpec(rank=5),
    "scaled input side": AdapterSpec(method="random", options={"scale_top_k": "all", "side": "input"}),
    "rounds over all outputs": AdapterSpec(rank="out", options={"rounds": 2}),
    "listed": AdapterSpec(pairing={"all-linear": [[0, 9], [3, 4]]}),
    "bitfit": AdapterSpec(method="bitfit"),
    "none": AdapterSpec(method="none"),
}


def write_trained(base: Path, folder: Path, spec: AdapterSpec, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """An adapter of the model in ``base``, as training leaves it; returns the adapted model."""
    task = classification()
    loaded = load_model(find_model(str(base)), task.auto_class, task.config_fields(), dtype, 0)
    book = FingerprintBook()
    model = attach(loaded.model, spec, new_parameters=loaded.new_parameters, factor_source=FactorCache(), on_layer=book)
    with torch.no_grad():
        for index, layer in enumerate(spectral_layers(model).values()):
            train_a_little(layer.core, index)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".core." not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    identity: dict[str, Any] = {"name": str(base), "revision": None, "commit": None, "auto_class": task.auto_class}
    identity["dtype"] = str(dtype).removeprefix("torch.")
    folder.mkdir(parents=True)
    write_adapter(folder, model, book.entries, base=identity, task=task_to_dict(task), extra={"max_length": 32})
    return model.eval()


def merge(adapter: Path, target: Path, **options: Any) -> Verification:
    """Merge with factors from the cache."""
    return merge_folder([read_adapter(adapter)], target, factor_source=FactorCache(), **options)


def reopen(folder: Path) -> nn.Module:
    """The merged model, by transformers alone."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert isinstance(model, nn.Module)
    return model.eval()


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_a_merged_model_is_the_adapted_one(tiny_model_dir: Path, tmp_path: Path, spec: AdapterSpec) -> None:
    adapted = write_trained(tiny_model_dir, tmp_path / "adapter", spec)
    verdict = merge(tmp_path / "adapter", tmp_path / "merged")
    assert verdict.passed
    assert verdict.changed_tensors == 0
    assert verdict.max_rel_weight_error <= verdict.weight_tolerance == torch.finfo(torch.float32).eps
    assert verdict.max_abs_logit_error <= verdict.tolerance
    # float32: the merged weight is rounded once more than the branch's terms are.
    assert relative(logits(reopen(tmp_path / "merged")), logits(adapted)) <= 1e-5


def test_a_merged_folder_is_complete(tiny_model_dir: Path, tmp_path: Path) -> None:
    write_trained(tiny_model_dir, tmp_path / "adapter", AdapterSpec())
    verdict = merge(tmp_path / "adapter", tmp_path / "merged", extra_files={"README.md": "# merged\n"})
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "merge.json", "README.md"} <= names
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good"}
    assert config["architectures"] == ["BertForSequenceClassification"]
    report = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert report["verification"]["passed"] is True
    assert report["verification"]["max_abs_logit_error"] == verdict.max_abs_logit_error
    from transformers import AutoTokenizer

    text = "the film was great, really!"
    ours, merged = (AutoTokenizer.from_pretrained(folder) for folder in (tiny_model_dir, tmp_path / "merged"))
    assert ours(text)["input_ids"] == merged(text)["input_ids"]


@pytest.mark.parametrize(
    ("stored", "trained_in"),
    [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)],
)
def test_weights_keep_the_stored_dtype(tmp_path: Path, stored: torch.dtype, trained_in: torch.dtype) -> None:
    base = write_tiny_model(tmp_path / "base", dtype=stored)
    adapted = write_trained(base, tmp_path / "adapter", AdapterSpec(), dtype=trained_in)
    verdict = merge(tmp_path / "adapter", tmp_path / "merged")
    assert verdict.passed
    merged = reopen(tmp_path / "merged")
    assert {p.dtype for p in merged.parameters()} == {stored}
    for name, layer in spectral_layers(adapted).items():
        # One rounding of the sum made in float64.
        exact = layer.base_layer.weight.double() + layer.delta_weight()
        assert torch.equal(merged.get_parameter(f"{name}.weight"), exact.to(stored))


def test_the_base_is_left_as_it_was(tiny_model_dir: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in tiny_model_dir.iterdir()}
    write_trained(tiny_model_dir, tmp_path / "adapter", AdapterSpec())
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert {path.name: path.read_bytes() for path in tiny_model_dir.iterdir()} == before


def test_another_place_of_the_same_base_will_do(tiny_model_dir: Path, tmp_path: Path) -> None:
    import shutil

    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    write_trained(base, tmp_path / "adapter", AdapterSpec())
    base.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="no such folder"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    assert merge(tmp_path / "adapter", tmp_path / "merged", base=str(tmp_path / "moved")).passed


def test_another_base_is_refused_and_nothing_written(tiny_model_dir: Path, tmp_path: Path) -> None:
    write_trained(tiny_model_dir, tmp_path / "adapter", AdapterSpec())
    other = write_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(VerificationError, match=r"^bert\..*: the base weight is not the one"):
        merge(tmp_path / "adapter", tmp_path / "merged", base=str(other))
    assert not (tmp_path / "merged").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_merge_that_fails_its_check_is_not_written(tiny_model_dir: Path, tmp_path: Path) -> None:
    """An adapter of finite numbers that overflow: NaN equals nothing, so nobody can say that the merge is right."""
    adapted = write_trained(tiny_model_dir, tmp_path / "adapter", AdapterSpec())
    with torch.no_grad():
        adapted.get_parameter("classifier.weight").fill_(3e38)
    description = read_adapter(tmp_path / "adapter")
    write_adapter(
        tmp_path / "adapter", adapted, description.fingerprints, base=description.base, task=description.task, extra={}
    )
    with pytest.raises(VerificationError, match="the merged model differs from base") as caught:
        merge(tmp_path / "adapter", tmp_path / "merged")
    assert caught.value.exit_code == 5
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_output_folder_that_holds_anything_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    write_trained(tiny_model_dir, tmp_path / "adapter", AdapterSpec(rank=2))
    target = tmp_path / "merged"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="the output directory is not empty"):
        merge(tmp_path / "adapter", target)
    with pytest.raises(ConfigError, match="is no folder that mirrortune wrote and is left alone"):
        merge(tmp_path / "adapter", target, overwrite=True)
    assert (target / "notes.txt").read_text() == "mine"
    (target / "notes.txt").unlink()
    merge(tmp_path / "adapter", target)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="--overwrite"):
        merge(tmp_path / "adapter", target)
    with pytest.raises(
        ConfigError,
        match=r"also contains files or folders that are not part of the merged model: notes\.txt\. Move it elsewhere",
    ):
        merge(tmp_path / "adapter", target, overwrite=True)
    (target / "notes.txt").unlink()
    assert merge(tmp_path / "adapter", target, overwrite=True).passed


def test_an_adapter_without_a_base_asks_for_it(tiny_model_dir: Path, tmp_path: Path) -> None:
    from tests.tiny_runs import adapt

    folder = adapt().save(tmp_path / "adapter", name=None)
    with pytest.raises(ConfigError, match=r"does not say what its base model is.*--model"):
        merge(folder, tmp_path / "merged")


class Merged:
    """A merged folder with what verification compares it to."""

    def __init__(self, base: Path, tmp_path: Path) -> None:
        self.folder, self.task = tmp_path / "merged", classification()
        self.adapted = write_trained(base, tmp_path / "adapter", AdapterSpec())
        source = find_model(str(base))
        self.probe = text_probe(load_tokenizer(source), source.config)
        self.plain = load_model(source, self.task.auto_class, self.task.config_fields(), torch.float32, 0).model
        self.ledger = TensorLedger()
        self.state = merged_state(self.plain, self.adapted, self.ledger)

    def verify(self) -> Verification:
        """Write the state and verify what was written."""
        self.plain.save_pretrained(self.folder, state_dict=self.state)
        return verify(self.folder, self.plain, self.adapted, self.task.auto_class, self.probe, self.ledger)


@pytest.fixture
def merged(tiny_model_dir: Path, tmp_path: Path) -> Merged:
    """A merge before it is written."""
    return Merged(tiny_model_dir, tmp_path)


QUERY = "bert.encoder.layer.0.attention.self.query"


def test_a_right_merge_passes(merged: Merged) -> None:
    assert merged.verify().passed


@pytest.mark.parametrize("name", [f"{QUERY}.weight", "bert.encoder.layer.1.output.dense.weight"])
def test_a_weight_without_its_delta_fails(merged: Merged, name: str) -> None:
    merged.state[name] = merged.plain.state_dict()[name]
    verdict = merged.verify()
    assert not verdict.passed
    assert verdict.max_rel_weight_error > 1e-2


def test_a_delta_the_wrong_way_fails(merged: Merged) -> None:
    base = merged.plain.state_dict()[f"{QUERY}.weight"]
    merged.state[f"{QUERY}.weight"] = 2 * base - merged.state[f"{QUERY}.weight"]
    verdict = merged.verify()
    assert not verdict.passed
    assert verdict.max_abs_logit_error > verdict.tolerance


@pytest.mark.parametrize(
    "name", ["classifier.weight", "bert.embeddings.word_embeddings.weight", "bert.embeddings.LayerNorm.bias"]
)
def test_any_other_changed_tensor_fails(merged: Merged, name: str) -> None:
    tensor = merged.state[name].clone()
    tensor.view(-1)[0] = torch.nextafter(tensor.view(-1)[0], torch.tensor(9.0))
    merged.state[name] = tensor
    verdict = merged.verify()
    assert not verdict.passed
    assert verdict.changed_tensors == 1


def test_a_weight_rounded_twice_fails(merged: Merged) -> None:
    name = f"{QUERY}.weight"
    merged.state[name] = merged.state[name].bfloat16().float()
    assert not merged.verify().passed


def test_delta_weights_do_not_depend_on_the_driver(tiny_model_dir: Path, tmp_path: Path) -> None:
    write_trained(tiny_model_dir, tmp_path / "adapter", AdapterSpec())

    def flipped(name: str, weight: torch.Tensor, rank: int) -> Any:
        from mirrortune.adapters.svd import Factors

        found = FactorCache()(name, weight, rank)
        return Factors(U=-found.U, S=found.S, Vh=-found.Vh)

    merge(tmp_path / "adapter", tmp_path / "a")
    merge_folder([read_adapter(tmp_path / "adapter")], tmp_path / "b", factor_source=flipped)
    a, b = (reopen(tmp_path / name).state_dict() for name in ("a", "b"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_a_model_says_of_padding_is_not_compared() -> None:
    from tests.tiny_models import tiny_causal

    class Talker(torch.nn.Module):
        """Says noise of padding."""

        def __init__(self) -> None:
            super().__init__()
            self.model = tiny_causal()

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            outputs = self.model(input_ids=input_ids, attention_mask=attention_mask)
            outputs.logits = torch.where(attention_mask[..., None].bool(), outputs.logits, torch.rand(()))
            return outputs

    ids, mask = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    one, two = (compared_outputs(Talker(), {"input_ids": ids, "attention_mask": mask}) for _ in range(2))
    assert one.numel() == 5 * 272
    torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_weights_alone_are_compared_where_no_inputs_are_known(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And that is said; a weight that is wrong is found all the same."""
    from transformers import AutoModel

    import mirrortune

    model = mirrortune.attach(AutoModel.from_pretrained(tiny_model_dir))
    for index, layer in enumerate(spectral_layers(model).values()):
        train_a_little(layer.core, index)
    mirrortune.save_adapter(model, tmp_path / "adapter")
    wrong = {"input_ids": torch.tensor([[10**6]])}
    monkeypatch.setattr("mirrortune.tasks.probes.drawn_inputs", lambda *_: iter([wrong]))
    verdict = merge(tmp_path / "adapter", tmp_path / "merged")
    assert verdict.passed
    assert verdict.max_abs_logit_error is None
    assert "IndexError" in verdict.not_compared
    assert "outputs were not compared" in verdict.describe()
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["verification"]["max_abs_logit_error"] is None
    ledger = TensorLedger(errors={"weight": {"rel_weight_error": 1e-3, "weight_tolerance": 1e-7}})
    assert not ledger.verification(OutputError(error=None, tolerance=1e-4)).passed
