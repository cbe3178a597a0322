# SPDX-License-Identifier: Apache-2.0
"""What is said before any weight is fetched: whether the run fits, what would make it fit, and all that is wrong."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mirrortune.errors import ResourceError
from mirrortune.runs.fit import LIMIT_VARIABLE
from mirrortune.system.disk import check_disk
from tests.cli.console import changed, mirrortune, reviews, write_table
from tests.tiny_models import write_tiny_model

PREPARE = ("prepare", "-t", "text-classification", "-d", "reviews.csv")


@pytest.fixture
def without_weights(desk: Path, tiny_model_dir: Path) -> Path:
    """A model's folder with everything but its weights: nothing here may need them."""
    shutil.copytree(tiny_model_dir, desk / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    return desk / "model"


def test_the_plan_says_where_the_memory_goes(without_weights: Path) -> None:
    outcome = mirrortune(*PREPARE, "-m", without_weights, "--dry-run", "--json")

    parts = outcome.data["memory"]
    assert parts.keys() == {"weights", "factors", "gradients", "optimizer", "activations", "evaluation"}
    assert sum(parts.values()) == outcome.data["estimated_memory_bytes"]
    assert parts["gradients"] == 4 * (outcome.data["trainable_parameters"] + outcome.data["head_parameters"])
    assert parts["optimizer"] == 2 * parts["gradients"]
    assert "for 32 x 7 positions: weights 0.1, factors 0.1, gradients 0.0" in outcome.stderr
    assert "13 layers factored" in outcome.stderr
    more = mirrortune(*PREPARE, "-m", without_weights, "--dry-run", "--json", "--batch-size", 64).data["memory"]
    assert {name for name in parts if more[name] != parts[name]} == {"activations"}
    assert more["activations"] == pytest.approx(2 * parts["activations"], rel=0.2)
    assert "as a LoRA: rank 32" in mirrortune(*PREPARE, "-m", without_weights, "--dry-run", "-v").stderr


@pytest.mark.parametrize("command", ["prepare", "train"])
def test_what_does_not_fit_is_refused_with_what_would(
    without_weights: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    fits = mirrortune(*PREPARE, "-m", without_weights, "--dry-run", "--json").data["estimated_memory_bytes"]
    monkeypatch.setenv(LIMIT_VARIABLE, str(0.6 * fits / 2**30))

    outcome = mirrortune(command, *PREPARE[1:], "-m", without_weights)

    assert outcome.exit_code == 4
    assert "memory: a training step takes about 0.00 GiB, MIRRORTUNE_DEVICE_MEMORY=" in outcome.said
    words = re.search(r"makes it fit: --batch-size (\d+) --gradient-accumulation-steps (\d+) \(", outcome.said)
    assert words is not None, outcome.said
    rows, steps = map(int, words.groups())
    assert rows * steps == 32, "the step stays as large as it was"
    assert not Path("runs").exists()
    flags = ["--batch-size", rows, "--gradient-accumulation-steps", steps]
    assert mirrortune(*PREPARE, "-m", without_weights, "--dry-run", *flags).exit_code == 0, "what it said is so"


@pytest.mark.parametrize("limit", ["plenty", "-1", "0", "nan", "inf"])
def test_a_limit_that_is_none_is_refused(limit: str, without_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, limit)
    outcome = mirrortune(*PREPARE, "-m", without_weights, "--dry-run")
    assert outcome.exit_code == 2
    assert f"MIRRORTUNE_DEVICE_MEMORY: got '{limit}'. Allowed: a number of GiB above 0." in outcome.said


def test_a_model_that_fits_nothing_says_so(without_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, "0.00001")
    outcome = mirrortune(*PREPARE, "-m", without_weights, "--dry-run")
    assert outcome.exit_code == 4
    assert "Use a smaller model or a larger device." in outcome.said


def test_disks_are_asked_before_anything_is_written(tmp_path: Path) -> None:
    check_disk({tmp_path / "not" / "there": {"factors": 1}, tmp_path: {"checkpoints": 1000}})
    free = shutil.disk_usage(tmp_path).free

    with pytest.raises(ResourceError) as caught:
        check_disk({tmp_path / "a": {"factors": free}, tmp_path / "b": {"checkpoints": free // 2, "nothing": 0}})

    assert "MiB are free" in str(caught.value)
    assert "factors" in str(caught.value)
    assert "checkpoints" in str(caught.value), "one disk, both together"


def test_all_that_is_wrong_is_said_at_once(without_weights: Path) -> None:
    settings = ["--target-modules", "quary", "--max-length", 99]
    outcome = mirrortune(*PREPARE, "-m", without_weights, *settings)
    assert outcome.exit_code == 2
    assert "'quary' matches none of the 13 linear layers. Nearest: query." in outcome.said
    assert "got 99, the model takes at most 64 tokens" in outcome.said

    outcome = mirrortune(*PREPARE, "-m", "./nowhere", "--label-column", "lable")
    assert outcome.exit_code == 3
    assert "--label-column 'lable' is not a column. Did you mean 'label'?" in outcome.said
    assert "no such folder: nowhere" in outcome.said


def test_rows_that_are_wrong_are_found_before_tokenising(without_weights: Path) -> None:
    write_table(Path("parts/train.csv"), reviews(20))
    write_table(Path("parts/validation.csv"), reviews(9), header=("text", "verdict"))
    outcome = mirrortune(*changed(PREPARE, "-m", without_weights, "-d", "parts", "--rank", 33))
    assert outcome.exit_code == 2
    assert "rank 33 does not fit" in outcome.said
    assert "validation.csv: it has no label column 'label'" in outcome.said


def test_a_count_is_made_once(without_weights: Path, desk: Path) -> None:
    """By any process: it takes about a second. A file that is damaged is counted again."""
    words, cache = [*PREPARE, "-m", without_weights, "--dry-run", "--json"], desk / "cache"
    first = mirrortune(*words, cache=cache).data["memory"]
    (kept,) = (cache / "footprints").rglob("*.json")
    counted = json.loads(kept.read_text(encoding="utf-8"))
    counted_parts = {name: counted[name] for name in first if name != "evaluation"}
    assert {**counted_parts, "evaluation": 0} == first, "what an evaluation takes beyond a step, which is nothing"
    kept.write_text(json.dumps({**counted, "activations": 7}), encoding="utf-8")
    assert mirrortune(*words, cache=cache).data["memory"]["activations"] == 7
    kept.write_text("{", encoding="utf-8")
    assert mirrortune(*words, cache=cache).data["memory"] == first


def test_an_evaluation_is_part_of_the_estimate(without_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes more than a training step is counted, refused where there is no room, and told how to fit."""
    words = [*PREPARE, "-m", without_weights, "--dry-run", "--json", "--batch-size", 1]
    words += ["data.validation_fraction=0.6", "--gradient-accumulation-steps", 2]
    small = mirrortune(*words, "eval.batch_size=1").data["memory"]
    large = mirrortune(*words, "eval.batch_size=32").data
    assert small["evaluation"] == 0
    assert large["memory"]["evaluation"] > 0
    assert sum(large["memory"].values()) == large["estimated_memory_bytes"]

    monkeypatch.setenv(LIMIT_VARIABLE, str((large["estimated_memory_bytes"] - 10_000) / 2**30))
    refused = mirrortune(*words, "eval.batch_size=32")
    assert refused.exit_code == 4
    assert "memory: an evaluation takes about" in refused.said
    found = re.search(r"makes it fit: eval\.batch_size=(\d+) \(", refused.said)
    assert found is not None, refused.said
    assert mirrortune(*words, f"eval.batch_size={found.group(1)}").exit_code == 0


@pytest.mark.slow
def test_a_checkpoint_in_bfloat16_is_loaded_in_float32_where_that_is_faster(
    desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_tiny_model(desk / "half", dtype=torch.bfloat16)
    words = [*PREPARE, "-m", model, "--dry-run", "--json"]
    fast = mirrortune(*words)
    monkeypatch.setattr("mirrortune.system.devices.bfloat16_slowdown", lambda: 40.0)
    slow = mirrortune(*words)
    assert "base weights: stored in bfloat16, loaded in float32, because this CPU is slow in bfloat16" in slow.stderr
    assert "base weights" not in fast.stderr
    assert slow.data["memory"]["weights"] == pytest.approx(2 * fast.data["memory"]["weights"], rel=0.05)
    kept = mirrortune(*words, "model.dtype=bfloat16")
    assert kept.data["memory"] == fast.data["memory"]
    assert "base weights" not in kept.stderr

    monkeypatch.setenv(LIMIT_VARIABLE, "0.00001")
    assert "bf" not in mirrortune(*words).said.partition("makes it fit")[2], "a slow way out is none"
    monkeypatch.delenv(LIMIT_VARIABLE)

    run = ["train", *PREPARE[1:], "-m", model, "--max-steps", 2, "-o", "run", "--json"]
    trained = mirrortune(*run)
    assert trained.exit_code == 0, trained.stderr
    assert json.loads((desk / "run" / "adapter" / "adapter.json").read_text())["base"]["dtype"] == "float32"
    merged = mirrortune("merge", "run", "-o", "merged", "--json")
    assert merged.data["verification"]["passed"]
    tensors = load_file(desk / "merged" / "model.safetensors")
    assert {t.dtype for name, t in tensors.items() if not name.startswith("classifier")} == {torch.bfloat16}
