# SPDX-License-Identifier: Apache-2.0
"""Methods whose bases are measured on the task: what their files hold, and how runs of them go on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import mirrortune as package
from mirrortune.adapters.files.adapter_file import read_adapter
from mirrortune.adapters.files.description import edited_text
from mirrortune.adapters.svd import factorize
from mirrortune.errors import ConfigError, VerificationError
from mirrortune.inference.bank import AdapterBank
from mirrortune.runs import adapted_base
from tests.bank_cases import save_trained
from tests.cli.console import mirrortune, reviews, write_table
from tests.tiny_models import write_tiny_model
from tests.tiny_runs import logits

RANK = 5


class Run:
    """A finished run of ``lora-sb`` with two checkpoints, and the words of its command."""

    def __init__(self, folder: Path) -> None:
        self.base = write_tiny_model(folder / "model", dropout=0.1)
        data = write_table(folder / "reviews.csv", reviews(60))
        self.words = ["train", "-m", self.base, "-t", "text-classification", "-d", data, "--method", "lora-sb"]
        self.words += ["--rank", RANK, "--batch-size", 8, "--epochs", 1, "train.save_every_steps=3", "train.keep=3"]
        self.words += ["adapter.calibration_batches=2", "adapter.calibration_warmup_steps=3"]
        self.cache, self.folder = folder / "cache", folder / "run"
        self.said = mirrortune(*self.words, "-o", self.folder, cache=self.cache).stdout
        self.result = json.loads((self.folder / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("measured"))


def test_the_file_holds_the_bases_and_they_are_not_those_of_the_weights(run: Run) -> None:
    adapter = read_adapter(run.folder / "adapter")
    assert (adapter.form, len(adapter.fingerprints)) == ("portable", 13)
    assert run.result["trainable_parameters"] == 13 * RANK**2
    assert run.result["pairing_seconds"] > 0
    assert "(portable form, with its bases: they were measured on the task)" in run.said
    base = _base(run)
    for name, layout in adapter.layouts.items():
        out_features, in_features = layout.matrix_shape
        U, Vh = (adapter.tensors[f"factor.{name}.{part}"].double() for part in ("U", "Vh"))
        assert (U.shape, Vh.shape) == ((out_features, RANK), (RANK, in_features))
        torch.testing.assert_close(U.T @ U, torch.eye(RANK, dtype=torch.float64), atol=1e-6, rtol=0)
        leading = factorize(base.get_submodule(name).weight, RANK)
        assert float((leading.U.T @ U).norm()) < 0.9 * RANK**0.5, "another subspace"


def test_a_run_goes_on_with_the_bases_of_its_checkpoint(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(run.folder, tmp_path / "run"))
    *_, last = sorted((copy / "checkpoints").iterdir())
    shutil.rmtree(last)
    shutil.rmtree(copy / "adapter")
    monkeypatch.setattr(adapted_base, "Calibration", None)  # it would be called
    resumed = mirrortune(*run.words, "-o", copy, "--resume", "--json", cache=run.cache).data
    assert resumed["metrics"] == run.result["metrics"]
    for file in ("metrics.jsonl", "adapter/adapter.safetensors"):
        assert (copy / file).read_bytes() == (run.folder / file).read_bytes()


def test_it_is_scored_merged_and_exported_as_it_was_trained(run: Run, tmp_path: Path) -> None:
    scored = mirrortune("eval", run.folder, "--json", cache=run.cache).data
    assert scored["metrics"] == pytest.approx(run.result["metrics"], abs=1e-6)
    merged = mirrortune("merge", run.folder, "-o", tmp_path / "m", "--json", cache=run.cache).data
    assert merged["verification"]["passed"]
    lora = mirrortune("merge", run.folder, "-o", tmp_path / "l", "--format", "lora", "--json", cache=run.cache).data
    assert lora["verification"]["passed"]
    assert 0 < lora["verification"]["needed_rank"] <= RANK


def test_a_bank_holds_its_bases_beside_those_of_the_weight(run: Run, tmp_path: Path) -> None:
    base = package.load_adapter(_base(run), run.folder / "adapter")
    expected = logits(base)
    bank = AdapterBank(_base(run))
    save_trained(_base(run), tmp_path / "mirror", 1, method="mirror")
    bank.add("mirror", tmp_path / "mirror")
    bank.add("own", run.folder / "adapter")
    bank.save(tmp_path / "bank.safetensors")
    for own in (bank, AdapterBank.load(_base(run), tmp_path / "bank.safetensors")):
        with torch.no_grad(), own.rows(["own", "own", "own"]):
            torch.testing.assert_close(logits(own.model), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["adapter.form=compact"],
            "adapter.form: the bases of 'lora-sb' are measured on the task, and have to be in the",
        ),
        (["adapter.strategy=factored"], "adapter.strategy: factored replaces the weight by its factors"),
        (["adapter.options.first_step=-1"], "adapter.options.first_step: got -1. Allowed: 0 or more."),
        (["--rank=out"], "adapter.rank: out keeps output directions that no input reaches"),
        (["--pairing", "mirror"], "adapter.pairing: method 'lora-sb' pairs nothing"),
        (["--load-in", "4bit"], "adapter.method: the bases of 'lora-sb' are gradients of weights, and"),
    ],
)
def test_what_cannot_be_is_refused_before_weights_are_read(
    run: Run, tmp_path: Path, words: list[str], said: str
) -> None:
    (empty := tmp_path / "base").mkdir()
    for file in run.base.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, empty)
    given = [empty if word == run.base else word for word in run.words]
    if words[0].startswith("--rank"):
        given[given.index("--rank") : given.index("--rank") + 2] = []
    outcome = mirrortune(*given, *words, "-o", tmp_path / "run", cache=run.cache)
    assert outcome.exit_code == 2
    assert said in outcome.said


def test_a_file_without_its_bases_is_refused(run: Run, tmp_path: Path) -> None:
    adapted = package.load_adapter(_base(run), run.folder / "adapter")
    with pytest.raises(ConfigError, match=r"^form: the bases of 'lora-sb'.*Allowed: auto or portable"):
        package.save_adapter(adapted, tmp_path / "again", form="compact")
    package.save_adapter(adapted, tmp_path / "again")
    expected = (run.folder / "adapter" / "adapter.safetensors").read_bytes()
    assert (tmp_path / "again" / "adapter.safetensors").read_bytes() == expected
    description = tmp_path / "again" / "adapter.json"
    text = edited_text(description.read_text(encoding="utf-8"), lambda said: said.update(form="compact"))
    description.write_text(text, encoding="utf-8")
    with pytest.raises(VerificationError, match="damaged"):
        read_adapter(tmp_path / "again")


def _base(run: Run) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(run.base, num_labels=2).eval()
