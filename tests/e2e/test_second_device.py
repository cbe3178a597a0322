# SPDX-License-Identifier: Apache-2.0
"""Models on a device that is not the CPU, simulated: no tensor is left behind, and scores are those of the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.cli.console import REPOSITORY, reviews, write_table
from tests.tiny_models import write_tiny_causal, write_tiny_model

_SHORT = ("--max-steps", "3", "--batch-size", "8", "--seed", "1")
_IN_PYTHON = """
import copy
import sys
import torch
from tests import second_device
second_device.start(has_float64=sys.argv[1] == "True")
from mirrortune import AdapterBank, attach, load_adapter, save_adapter
from tests.tiny_models import tiny_bert

ids = torch.randint(5, 40, (3, 9), generator=torch.Generator().manual_seed(0)).to("sim")
inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

def answers(model):
    with torch.no_grad():
        return model.eval()(**inputs).logits.cpu()

def on_cpu(function):
    def checked(matrix, **options):
        assert matrix.device.type == "cpu", "decompositions are LAPACK's, wherever the weight is"
        return function(matrix, **options)
    return checked

torch.linalg.svd, torch.linalg.eigvals = on_cpu(torch.linalg.svd), on_cpu(torch.linalg.eigvals)
for method in ("mirror-scale", "neighbor", "svft", "psoft", "lora-xs", "speclora", "lora"):
    rank = {"psoft": 8, "lora-xs": 8}.get(method)
    for _ in range(2):  # the second time, factors come from the cache
        model = attach(tiny_bert().to("sim"), method, rank)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model.train()(**inputs, labels=torch.zeros(3, dtype=torch.long).to("sim")).loss.backward()
        optimizer.step()
    for layer in model.mirrortune.layers.values() if method in ("mirror-scale", "neighbor", "psoft") else ():
        gathered = copy.deepcopy(layer.core)  # as FSDP2's parameters are, to be read
        for name, parameter in list(gathered.named_parameters()):
            gathered.register_parameter(name, torch.nn.Parameter(parameter.detach().cpu()))
        torch.testing.assert_close(gathered.angles(), layer.core.angles().cpu())
    expected = answers(model)
    save_adapter(model, method)
    torch.testing.assert_close(answers(load_adapter(tiny_bert().to("sim"), method)), expected)
    if method not in ("speclora", "lora"):
        bank = AdapterBank(tiny_bert().to("sim"))
        bank.add(method, method)
        with bank.rows([method, None, method]):
            torch.testing.assert_close(answers(bank.model)[[0, 2]], expected[[0, 2]], rtol=1e-4, atol=1e-5)
"""

_IN_TF32 = """
import torch
from tests import second_device
second_device.start(has_tf32=True)
from mirrortune import attach
from tests.tiny_models import tiny_bert

made, svd = [], torch.linalg.svd
torch.linalg.svd = lambda matrix, **options: (made.append(1), svd(matrix, **options))[1]
attach(tiny_bert(17).to("sim"), "mirror")
expected = len(made)  # of weights that no other test has put into the cache
attach(tiny_bert(17).to("sim"), "mirror")
assert len(made) == expected > 0, "factors come from the cache, however the device rounds its products"
"""


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a classifier and a language model."""
    folder = tmp_path_factory.mktemp("desk")
    write_table(folder / "reviews.csv", reviews(40))
    rows = [{"prompt": f"the film was {word}", "completion": "good fun"} for word in ("good", "bad", "fun", "dull") * 6]
    (folder / "chat.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    write_tiny_model(folder / "bert")
    write_tiny_causal(folder / "llama")
    return folder


def on_device(desk: Path, *words: str, start: Sequence[str] = ("-m", "tests.second_device")) -> str:
    """Run commands with models on the device, or what ``start`` says; they succeed. Return all that they print."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "MIRRORTUNE_CACHE": str(desk / "cache")}
    done = subprocess.run(
        [sys.executable, *start, *words], cwd=desk, env=env, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def classify(method: str, run: str, *words: str) -> tuple[str, ...]:
    """Return the words of a training of the classifier."""
    data = ("--task", "text-classification", "--data", "reviews.csv")
    return ("train", "--model", "bert", *data, "--method", method, "-o", run, *_SHORT, *words)


def results(desk: Path, run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((desk / run / "results.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_model_is_trained_scored_and_merged_as_on_the_cpu(desk: Path, precision: str) -> None:
    words = ("--precision", precision)
    said = on_device(
        desk, *classify("mirror-scale", f"{precision}-run", *words),
        "--then", "eval", f"{precision}-run", "--then", "merge", f"{precision}-run", "-o", f"{precision}-merged",
        "--then", "predict", f"{precision}-run", "--data", "reviews.csv", "-o", f"{precision}-answers.csv",
    )  # fmt: skip
    on_device(desk, *classify("mirror-scale", f"{precision}-cpu", *words), start=("-m", "mirrortune"))
    assert "running on sim with 1 process" in said
    scores = [results(desk, f"{precision}-{name}")["metrics"]["loss"] for name in ("run", "cpu")]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5 if precision == "fp32" else 1e-2)
    assert (desk / f"{precision}-merged" / "model.safetensors").is_file()


def test_a_device_without_float64_trains_rotations_and_draws_answers(desk: Path) -> None:
    said = on_device(
        desk, "--no-float64", "train", "--model", "llama", "--task", "causal-lm", "--data", "chat.jsonl",
        "-o", "apple", *_SHORT, "model.attention=eager",
        "--then", "predict", "apple", "--text", "the film was", "--temperature", "0.8", "--top-p", "0.9",
        "--max-new-tokens", "4",
    )  # fmt: skip
    assert "running on sim with 1 process" in said
    angles = [json.loads(line) for line in (desk / "apple" / "progress.jsonl").read_text().splitlines()]
    assert any(entry.get("angle_rms") for entry in angles)


@pytest.mark.parametrize("float64", [pytest.param(True, marks=pytest.mark.slow), False])
def test_models_that_are_on_the_device_are_adapted_there(desk: Path, float64: bool) -> None:
    on_device(desk, str(float64), start=("-c", _IN_PYTHON))


def test_cached_factors_are_believed_whatever_the_device_rounds(desk: Path) -> None:
    on_device(desk, start=("-c", _IN_TF32))


@pytest.mark.slow
@pytest.mark.parametrize("float64", [(), ("--no-float64",)])
@pytest.mark.parametrize(
    "method", ["mirror", "adaptive", "psoft", "svft", "lora-xs", "lora-sb", "speclora", "lora", "oft", "full"]
)
def test_every_kind_of_method_is_trained_scored_and_merged(desk: Path, method: str, float64: tuple[str, ...]) -> None:
    words = ("--rank", "8") if method in ("psoft", "lora-xs", "lora-sb") else ()
    run = f"run-of-{method}{'-'.join(float64)}"  # adapters saved in Python have the plain names
    said = on_device(
        desk, *float64, *classify(method, run, *words), "--then", "eval", run, "--then", "merge", run, "-o", f"{run}-m",
    )  # fmt: skip
    assert "running on sim with 1 process" in said
    assert (desk / f"{run}-m" / "model.safetensors").is_file()
