# SPDX-License-Identifier: Apache-2.0
"""Methods that run a tuner of PEFT, from the command line: train, eval, merge; and PEFT itself on the run."""

from __future__ import annotations

import json
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.cli.console import mirrortune, reviews, write_table
from tests.peft_methods import NOT_MERGED, PEFT_METHODS, tiny_words

# One of each kind: a product beside the weight, a changed base weight, a changed bias, no merge.
_EVERY_TIME = ("lora", "pissa", "road", "lily")
METHODS = [m if m in _EVERY_TIME else pytest.param(m, marks=pytest.mark.slow) for m in PEFT_METHODS]
SETTINGS = ["--epochs", 1, "--batch-size", 16, "--head-lr", 1e-2, "train.log_every_steps=1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("data") / "reviews.csv", reviews(60))


def words(model: Path, data: Path, method: str) -> list[object]:
    return ["train", "-m", model, "-t", "text-classification", "-d", data, *SETTINGS, *tiny_words(method)]


@torch.no_grad()
def logits_of(model: Any, folder: Path) -> torch.Tensor:
    inputs = AutoTokenizer.from_pretrained(folder)(
        ["the film was very good", "an awful plot"], padding=True, return_tensors="pt"
    )
    return torch.as_tensor(model.eval()(**inputs).logits)


@pytest.mark.parametrize("method", METHODS)
def test_train_eval_merge_and_peft_itself_agree(tiny_model_dir: Path, data: Path, tmp_path: Path, method: str) -> None:
    run, merged = tmp_path / "run", tmp_path / "merged"

    trained = mirrortune(*words(tiny_model_dir, data, method), "-o", run, "--json")

    assert trained.is_plain
    assert (method in NOT_MERGED) == ("PEFT cannot merge" in trained.stderr)
    result = trained.data
    planned = re.search(r"trainable parameters: ([\d,]+)", trained.stderr)
    assert planned is not None
    assert int(planned[1].replace(",", "")) == result["trainable_parameters"] > 0
    files = {path.name: path.stat().st_size for path in (run / "adapter").iterdir()}
    assert sorted(files) == ["adapter.json", "adapter_config.json", "adapter_model.safetensors"]
    assert result["adapter_bytes"] == sum(files.values())

    scored = mirrortune("eval", run, "--json")
    assert scored.is_plain
    assert scored.data["metrics"] == result["metrics"]

    base = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = logits_of(peft.PeftModel.from_pretrained(base, run / "adapter"), tiny_model_dir)

    outcome = mirrortune("merge", run, "-o", merged, "--json")
    if method in NOT_MERGED:
        assert outcome.exit_code == 2
        assert f"PEFT cannot merge method '{method}' (This method is not supported" in outcome.said
        assert not merged.exists()
        return
    assert outcome.data["verification"]["passed"]
    spectra = [mirrortune("analyze", tiny_model_dir, tuned, "--json").data for tuned in (run / "adapter", merged)]
    assert spectra[0]["overall"]["relative"] == pytest.approx(spectra[1]["overall"]["relative"], rel=1e-3)
    plain = AutoModelForSequenceClassification.from_pretrained(merged)
    torch.testing.assert_close(logits_of(plain, merged), theirs, rtol=1e-4, atol=1e-4)


def test_prepare_has_nothing_to_factorise(tiny_model_dir: Path, data: Path) -> None:
    outcome = mirrortune("prepare", *words(tiny_model_dir, data, "lora")[1:])
    assert outcome.exit_code == 0
    assert "factorised" not in outcome.stdout
    assert "13 layers, 7,680 trainable parameters" in outcome.stdout


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("lora", ["--pairing", "mirror"], "adapter.pairing: method 'lora' has no pairing"),
        ("lora", ["--rank", "full"], "adapter.rank: got 'full'. Allowed: a number"),
        ("lora", ["adapter.options.lora_drop=0.1"], "Did you mean 'lora_dropout'?"),
        ("lora", ["adapter.options.bias=all"], "adapter.options.bias: it follows from the method"),
        ("ia3", ["--rank", 4], "adapter.rank: method 'ia3' has no rank"),
        ("road", ["adapter.options.group_size=64"], "divisible by group_size"),
        ("lorra", [], "unknown method 'lorra'. Did you mean 'lora'?"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(
    tiny_model_dir: Path, data: Path, tmp_path: Path, method: str, more: list[object], message: str
) -> None:
    base = ["train", "-m", tiny_model_dir, "-t", "text-classification", "-d", data, "--method", method]
    outcome = mirrortune(*base, *more, "-o", tmp_path / "run")
    assert outcome.exit_code == 2
    assert message in outcome.said
    assert not (tmp_path / "run").exists()


def test_without_the_extra_it_says_what_to_install(
    tiny_model_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not installed
    outcome = mirrortune(*words(tiny_model_dir, data, "lora"), "-o", tmp_path / "run")
    assert outcome.exit_code == 2
    assert "method 'lora' runs PEFT's tuner, and the package peft is not installed" in outcome.said
    assert 'pip install "mirrortune[peft]"' in outcome.said
    assert mirrortune("prepare", *words(tiny_model_dir, data, "lora")[1:], "--method", "mirror", "--dry-run")


def test_a_damaged_or_foreign_adapter_is_refused(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert mirrortune(*words(tiny_model_dir, data, "lora"), "-o", run).exit_code == 0
    broken = Path(shutil.copytree(run, tmp_path / "broken"))
    path = broken / "adapter" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    outcome = mirrortune("eval", broken)
    assert (outcome.exit_code, "damaged: its hash" in outcome.said) == (5, True)
    description = json.loads((run / "adapter" / "adapter.json").read_text())
    assert description["adapter"]["method"] == "lora"
    assert len(description["layers"]) == 13
    assert all(len(layer["weight"]) == len("values:") + 64 for layer in description["layers"].values())
