# SPDX-License-Identifier: Apache-2.0
"""PEFT's tuners in the place of cores, in PEFT's own files, and merged: each checked against PEFT itself."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import mirrortune
from mirrortune.adapters.files.adapter_file import read_adapter, write_adapter
from mirrortune.adapters.files.description import edited_text
from mirrortune.adapters.files.load import adapt, load_into
from mirrortune.adapters.inject import adapter_parameters, attachment, spectral_layers
from mirrortune.adapters.peft_bridge.options import check_options
from mirrortune.adapters.peft_bridge.tuners import count_trained
from mirrortune.adapters.spec import AdapterSpec
from mirrortune.adapters.targets import find_targets
from mirrortune.errors import ConfigError, InterruptedRun, VerificationError
from mirrortune.merging.in_memory import adapted_tensors
from mirrortune.runs.size import make_plan
from tests.peft_methods import NOT_MERGED, PEFT_METHODS, START_ELSEWHERE, move, tiny_spec
from tests.tiny_models import FAMILIES, tiny_bert
from tests.tiny_runs import HEAD, Adapted, logits, make_trainer, terminate_after

BASE = {"name": "tiny", "commit": None, "dtype": "float32", "auto_class": "AutoModelForSequenceClassification"}


def small_bert() -> nn.Module:
    """One layer: PEFT builds it in milliseconds, and every kind of linear layer is there."""
    return tiny_bert(num_hidden_layers=1)


def no_factors(name: str, weight: Tensor, rank: int) -> Any:
    raise AssertionError(name)


@dataclass
class Saved:
    """A tiny model with one of PEFT's adapters, and where it was saved."""

    spec: AdapterSpec
    start: Tensor
    model: nn.Module
    folder: Path


@pytest.fixture(scope="module", params=PEFT_METHODS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save(tiny_spec(request.param), tmp_path_factory.mktemp("peft"))


def save(spec: AdapterSpec, folder: Path, model: nn.Module | None = None, **base: Any) -> Saved:
    model = model or small_bert()
    book = adapt(model, spec, new_parameters=HEAD, factor_source=no_factors)
    start = logits(model)
    move(model)
    write_adapter(folder, model, book.entries, base={**BASE, **base}, task=None, extra={})
    return Saved(spec, start, model, folder)


def load_in_peft(base: nn.Module, folder: Path) -> nn.Module:
    """What a user of PEFT alone does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers about itself, and of tuners that draw from a seed
        return peft.PeftModel.from_pretrained(base, folder).eval()


def test_it_starts_from_the_base_model(saved: Saved) -> None:
    moved = float((saved.start - logits(small_bert())).abs().max())
    assert (moved > 1e-5) == (saved.spec.method in START_ELSEWHERE)


def test_the_adapter_and_the_head_are_trained_and_nothing_else(saved: Saved) -> None:
    trained = {id(p) for p in saved.model.parameters() if p.requires_grad}
    head = {id(saved.model.get_parameter(name)) for name in HEAD}
    assert trained == head | {id(p) for p in adapter_parameters(saved.model).values()}
    assert len(attachment(saved.model).layers) == 7
    model = saved.model.train()
    torch.as_tensor(model(input_ids=torch.randint(5, 45, (3, 9))).logits).sum().backward()
    # Everything takes part in the loss, as distributed training wants it.
    assert [name for name, p in adapter_parameters(model).items() if p.grad is None] == []
    model.zero_grad()
    model.eval()


def test_the_plan_counts_what_is_trained(saved: Saved) -> None:
    plan = make_plan(small_bert(), saved.spec)
    assert plan.trainable_parameters == mirrortune.trainable_parameters(saved.model)


def test_peft_reads_the_folder(saved: Saved) -> None:
    theirs = load_in_peft(small_bert(), saved.folder)
    assert torch.equal(logits(theirs), logits(saved.model))


def test_we_read_the_folder(saved: Saved, tmp_path: Path) -> None:
    loaded = small_bert()
    book = load_into(loaded, read_adapter(saved.folder), no_factors)
    assert torch.equal(logits(loaded), logits(saved.model))
    write_adapter(tmp_path, loaded, book.entries, base=BASE, task=None, extra={})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["adapter.json", "adapter_config.json", "adapter_model.safetensors"]
    for name in names:
        assert (tmp_path / name).read_bytes() == (saved.folder / name).read_bytes()


def test_the_merged_weights_are_those_of_peft(saved: Saved) -> None:
    plain = small_bert()
    if saved.spec.method in NOT_MERGED:
        with pytest.raises(ConfigError, match=rf"cannot merge method '{saved.spec.method}' \(This method is not"):
            list(adapted_tensors(saved.model, plain.state_dict()))
        assert any("cannot merge" in text for text in attachment(saved.model).remarks)  # type: ignore[attr-defined]
        return
    merged = {names[0]: tensor for names, tensor in adapted_tensors(saved.model, plain.state_dict())}
    assert {tensor.dtype for tensor in merged.values()} == {torch.float64}
    theirs = load_in_peft(small_bert(), saved.folder).merge_and_unload(safe_merge=True).state_dict()  # type: ignore[operator]
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, theirs[name].double(), rtol=1e-5, atol=2e-5)
    state = plain.state_dict() | {name: tensor.float() for name, tensor in merged.items()}
    state |= {name: saved.model.get_parameter(name) for name in HEAD}
    plain.load_state_dict(state)
    torch.testing.assert_close(logits(plain), logits(saved.model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_every_family_is_read_by_peft(family: str, method: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    new = [name for name, _ in model.named_parameters() if not name.startswith(model.base_model_prefix)]
    book = adapt(model, tiny_spec(method), new_parameters=new, factor_source=no_factors)
    move(model)
    write_adapter(tmp_path, model, book.entries, base=BASE, task=None, extra={})
    assert torch.equal(logits(load_in_peft(FAMILIES[family](), tmp_path)), logits(model))


def test_a_pooler_that_no_checkpoint_filled_is_saved_with_the_head(tmp_path: Path) -> None:
    model = small_bert()
    new = [*HEAD, "bert.pooler.dense.weight", "bert.pooler.dense.bias"]
    book = adapt(model, tiny_spec("lora"), new_parameters=new, factor_source=no_factors)
    move(model)
    write_adapter(tmp_path, model, book.entries, base=BASE, task=None, extra={})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["bert.pooler", "classifier"]
    assert torch.equal(logits(load_in_peft(small_bert(), tmp_path)), logits(model))


def test_the_configuration_is_peft_s_own(tmp_path: Path) -> None:
    spec = AdapterSpec(method="dora", rank=4, target_modules="query|value", options={"lora_alpha": 8})
    saved = save(spec, tmp_path, name="some/model", commit="abc")
    config = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert (config.peft_type, config.task_type, config.use_dora) == ("LORA", "SEQ_CLS", True)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0.0)
    assert (config.base_model_name_or_path, config.revision) == ("some/model", "abc")
    assert set(attachment(saved.model).layers) == {
        f"bert.encoder.layer.0.attention.self.{name}" for name in ("query", "value")
    }


@pytest.mark.parametrize(
    ("method", "rank", "expected"), [("lora", 1, 165_888), ("lora", 8, 1_327_104), ("road", None, 82_944)]
)
def test_published_counts_on_roberta_base(method: str, rank: int | None, expected: int) -> None:
    # METHODS: six linear layers of each of the twelve blocks, heads and poolers not counted.
    from transformers import RobertaConfig, RobertaForSequenceClassification

    with torch.device("meta"):
        model = RobertaForSequenceClassification(RobertaConfig())
    spec = AdapterSpec(method=method, rank=rank)
    assert count_trained(model, spec, find_targets(model, spec))[0] == expected
    assert not spectral_layers(model)
    assert not hasattr(model, "mirrortune")


def test_the_seed_alone_decides_the_start() -> None:
    def start(seed: int, draws: int) -> Tensor:
        torch.rand(draws)
        model = mirrortune.attach(small_bert(), method="lora", seed=seed)
        return torch.cat([p.flatten() for p in adapter_parameters(model).values()])

    assert torch.equal(start(1, 0), start(1, 5))
    assert not torch.equal(start(1, 0), start(2, 0))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    mirrortune.attach(small_bert(), method="lora")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_16_bit_base_gets_an_adapter_in_32(tmp_path: Path) -> None:
    model = small_bert().to(torch.bfloat16)
    adapt(model, tiny_spec("lora"), new_parameters=HEAD, factor_source=no_factors)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    # Merged into the same base, stored in 32 bits: its own digits are kept, not those that training saw.
    fine = {name: t.float() * 1.0001 for name, t in small_bert().to(torch.bfloat16).state_dict().items()}
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(fine[name].bfloat16(), model.get_parameter(name.replace("weight", "base_layer.weight")))
    merged = {names[0]: tensor for names, tensor in adapted_tensors(move_nothing(model), fine)}
    assert torch.equal(merged[name], fine[name].double())


def move_nothing(model: nn.Module) -> nn.Module:
    """A fresh LoRA adds nothing: B is 0."""
    return model


BAD = [
    ({"method": "lora", "pairing": "mirror"}, r"adapter\.pairing: method 'lora' has no pairing"),
    ({"method": "lora", "strategy": "branch"}, r"adapter\.strategy: method 'lora' has no strategy"),
    ({"method": "lora", "rank": "full"}, r"adapter\.rank: got 'full'\. Allowed: a number"),
    ({"method": "road", "rank": 4}, r"adapter\.rank: method 'road' has no rank, got '4'"),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_settings_that_a_tuner_would_ignore_are_refused(fields: dict[str, Any], message: str) -> None:
    model = small_bert()
    with pytest.raises(ConfigError, match=message):
        adapt(model, AdapterSpec(**fields), factor_source=no_factors)
    assert all(p.requires_grad for p in model.parameters())  # untouched


def test_fused_layers_are_not_split_for_a_tuner() -> None:
    with pytest.raises(ConfigError, match=r"^split: method 'lora' has no split, got \{'query': 2\}\. Remove it"):
        mirrortune.attach(small_bert(), method="lora", split={"query": 2})


BAD_OPTIONS = [
    ("lora", {"lora_drop": 0.1}, r"options\.lora_drop: method 'lora' has no option .* Did you mean 'lora_dropout'"),
    ("lora", {"lora_dropout": "much"}, r"options\.lora_dropout: got 'much'\. Allowed: a number"),
    ("lora", {"r": 4}, r"options\.r: it follows from adapter\.rank"),
    ("lora", {"target_modules": ["query"]}, r"options\.target_modules: it follows from adapter\.target_modules"),
    ("lora", {"modules_to_save": ["x"]}, r"options\.modules_to_save: it follows from the task"),
    ("lora", {"task_type": "SEQ_CLS"}, r"options\.task_type: it follows from the task"),
    ("lora", {"inference_mode": True}, r"options\.inference_mode: it follows from the command"),
    ("lora", {"bias": "all"}, r"options\.bias: it follows from the method"),
    ("lora", {"layer_replication": [[0, 1]]}, r"has no option 'layer_replication'"),
    ("lora", {"init_lora_weights": "eva"}, r"'eva' needs data"),
    ("dora", {"use_dora": False}, r"options\.use_dora: it follows from adapter\.method"),
    ("road", {"variant": "road_3"}, r"PEFT refuses them: Invalid variant road_3"),
]


@pytest.mark.parametrize(("method", "options", "message"), BAD_OPTIONS)
def test_wrong_options_are_refused_by_name(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_options(AdapterSpec(method=method, options=options))


def test_all_wrong_options_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        check_options(AdapterSpec(method="lora", options={"r": 4, "bias": "all", "loar": 1}))
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "adapter.options.r", "adapter.options.bias", "adapter.options.loar"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("road", "divisible by group_size"),
        ("c3a", "block size should be"),
        ("psoft-peft", "must be less than or equal"),
    ],
)
def test_a_layer_that_a_tuner_cannot_take_is_refused_before_the_model_is_touched(method: str, message: str) -> None:
    model = small_bert()
    with pytest.raises(ConfigError, match=rf"PEFT cannot put '{method}' into this model: .*{message}"):
        mirrortune.attach(model, method=method)
    assert not any(isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_checks_of_sparse_tensors_stay_as_the_user_has_set_them() -> None:
    with torch.sparse.check_sparse_tensor_invariants():
        mirrortune.attach(small_bert(), method="lora")
        assert torch.sparse.check_sparse_tensor_invariants.is_enabled()  # type: ignore[no-untyped-call]


def test_boft_does_not_silently_get_another_factor() -> None:
    with pytest.raises(ConfigError, match=r"boft_n_butterfly_factor: got 2; PEFT needs its CUDA extension"):
        mirrortune.attach(small_bert(), method="boft", boft_n_butterfly_factor=2)


def test_a_damaged_configuration_is_refused(tmp_path: Path) -> None:
    save(tiny_spec("lora"), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    with pytest.raises(VerificationError, match=r"adapter_config\.json: damaged"):
        read_adapter(tmp_path)


def test_a_configuration_of_another_tuner_is_refused(tmp_path: Path) -> None:
    """A shadow tuner would download the model that the file names, and load it."""
    save(tiny_spec("lora"), tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    shadow = {"peft_type": "SHADOW", "r": 8, "target_modules": stored["target_modules"], "shadow_model": "owner/name"}
    text = json.dumps(shadow).encode()
    (tmp_path / "adapter_config.json").write_bytes(text)
    path = tmp_path / "adapter.json"
    digest = hashlib.sha256(text).hexdigest()
    path.write_text(edited_text(path.read_text(), lambda found: found.update(config_sha256=digest)))
    with pytest.raises(VerificationError, match=r"'peft_type' of its adapter_config\.json is 'SHADOW', .*\(LORA\)"):
        read_adapter(tmp_path)


def test_another_base_is_refused_by_layer(tmp_path: Path) -> None:
    save(tiny_spec("lora"), tmp_path)
    with pytest.raises(VerificationError, match=r"attention\.self\.query: the base weight is not"):
        load_into(tiny_bert(1, num_hidden_layers=1), read_adapter(tmp_path), no_factors)


def other_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A singular value decomposition as right as torch's, in which the leading pair of vectors has the other sign."""
    svd = torch.linalg.svd

    def flipped(*args: Any, **options: Any) -> Any:
        U, S, Vh = svd(*args, **options)
        signs = torch.ones_like(S)
        signs[0] = -1
        return U * signs, S, signs[:, None] * Vh

    monkeypatch.setattr(torch.linalg, "svd", flipped)


def test_a_basis_that_peft_recomputes_otherwise_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # PEFT saves PSOFT's rotation and not its basis; with a flipped vector the rotation turns the wrong way, in silence.
    saved = save(tiny_spec("psoft-peft"), tmp_path)
    other_driver(monkeypatch)
    assert (logits(load_in_peft(small_bert(), tmp_path)) - logits(saved.model)).abs().max() > 1e-2
    with pytest.raises(VerificationError, match=r"query: the loaded layer does not compute what the saved one did"):
        load_into(small_bert(), read_adapter(tmp_path), no_factors)


def test_a_start_that_signs_do_not_change_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = save(tiny_spec("pissa"), tmp_path)
    other_driver(monkeypatch)
    loaded = small_bert()
    load_into(loaded, read_adapter(tmp_path), no_factors)
    torch.testing.assert_close(logits(loaded), logits(saved.model), rtol=1e-4, atol=1e-5)


def with_dropout(method: str) -> Adapted:
    """A model whose random states matter, as a new process makes it."""
    torch.manual_seed(1)
    model = tiny_bert(dropout=0.2)
    book = adapt(model, tiny_spec(method), new_parameters=HEAD, factor_source=no_factors)
    return Adapted(model, book)


@pytest.mark.parametrize("method", ["lora", "pissa", "vera"])
def test_ten_steps_are_five_and_five(tmp_path: Path, method: str) -> None:
    settings: dict[str, Any] = {"epochs": 10, "max_steps": 10, "lr": 1e-2}
    whole = make_trainer(tmp_path / "whole", adapted=with_dropout(method), **settings)
    whole.fit()
    first = make_trainer(tmp_path / "cut", adapted=with_dropout(method), progress=terminate_after(5), **settings)
    with pytest.raises(InterruptedRun):
        first.fit()
    adapted = with_dropout(method)
    move(adapted.model, 7)  # other numbers: every one of them must come from the checkpoint
    torch.manual_seed(999)
    second = make_trainer(tmp_path / "cut", adapted=adapted, fresh=False, **settings)
    second.resume()
    second.fit()
    for path in ("metrics.jsonl", "adapter/adapter_model.safetensors", "adapter/adapter.json"):
        assert (tmp_path / "whole" / path).read_bytes() == (tmp_path / "cut" / path).read_bytes()


def test_without_the_extra_it_says_what_to_install() -> None:
    code = """
import sys
sys.modules["peft"] = None  # as if it were not installed
from mirrortune.adapters.spec import AdapterSpec
from mirrortune.adapters.peft_bridge.options import check_options
check_options(AdapterSpec())
try:
    check_options(AdapterSpec(method="lora"))
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ConfigError adapter.method: method 'lora' runs PEFT's tuner")
    assert 'pip install "mirrortune[peft]"' in done.stdout


def test_the_python_interface_takes_them_too(tmp_path: Path) -> None:
    model = move(mirrortune.attach(small_bert(), method="lora", rank=2, target_modules="query"))
    assert mirrortune.trainable_parameters(model) == 2 * (32 + 32)
    mirrortune.save_adapter(model, tmp_path / "adapter")
    loaded = mirrortune.load_adapter(small_bert(), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
