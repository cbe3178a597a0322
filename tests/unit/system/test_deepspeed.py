# SPDX-License-Identifier: Apache-2.0
"""zero: two processes under DeepSpeed, on the CPU, train as one does. They run once a stage, as
``tests/two_zero_ranks.py``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mirrortune.errors import ConfigError
from mirrortune.system.compiler import compile_model
from mirrortune.system.devices import widen
from mirrortune.system.distributed.deepspeed import make_plugin, stage_of
from mirrortune.training.evaluate import evaluate_split
from tests.cli.console import mirrortune, reviews, write_table
from tests.laws.test_training_laws import differences
from tests.tiny_models import tiny_bert, write_tiny_model
from tests.tiny_runs import HEAD, adapt, make_trainer
from tests.two_ranks import STEPS, found_by_each, launch
from tests.two_zero_ranks import RUNS

LAST = Path("checkpoints", "step-000008")
needs_deepspeed = pytest.mark.deepspeed


@dataclass(frozen=True)
class Pair:
    """What two processes did under one stage: where, and what each of them found."""

    stage: int
    folder: Path
    found: list[dict[str, Any]]


def launch_zero(folder: Path, stage: int, *words: object) -> subprocess.CompletedProcess[str]:
    """Two processes under DeepSpeed, as accelerate launch would start them on GPUs."""
    own = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage), "DS_ACCELERATOR": "cpu"}
    return launch("two_zero_ranks", folder, *words, env=own)


@pytest.fixture(scope="module", params=[2, 3], ids=["zero2", "zero3"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    pytest.importorskip("deepspeed", exc_type=ImportError)
    folder = tmp_path_factory.mktemp(f"zero{request.param}")
    process = launch_zero(folder, request.param)
    assert process.returncode == 0, process.stderr
    return Pair(request.param, folder, found_by_each(folder))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs of one process with the batch of both, without DeepSpeed."""
    folder = tmp_path_factory.mktemp("alone")
    for name, (spec, settings) in RUNS.items():
        given = dict(settings)
        is_half = given.pop("half", False)
        adapted = adapt(spec, model=tiny_bert().bfloat16() if is_half else None, trained=None)
        if is_half:
            widen(adapted.model, HEAD)
        own = {**STEPS, **given, "batch_size": 8, "gradient_accumulation_steps": 1}
        trainer = make_trainer(folder / name, adapted=adapted, **own)
        last = trainer.fit()
        losses = [*trainer.progress.losses, last.metrics["loss"]]
        (folder / name / "losses.json").write_text(json.dumps(losses), encoding="utf-8")
    return folder


@needs_deepspeed
@pytest.mark.parametrize("name", [name for name in RUNS if name != "half"])
def test_two_processes_train_as_one_without_it(pair: Pair, alone: Path, name: str) -> None:
    losses = json.loads((alone / name / "losses.json").read_text(encoding="utf-8"))
    assert [found["count"] for found in pair.found] == [2, 2]
    assert pair.found[0]["runs"][name]["losses"][1:] == pytest.approx(losses, rel=1e-5)  # the main process is told
    for file in ("adapter", "training"):
        here, there = (load_file(folder / name / LAST / f"{file}.safetensors") for folder in (pair.folder, alone))
        # What a layer does to its weight can be probed only where it is whole; factors are kept there too, and where
        # there are probes, of sketches the signs.
        kinds = ("effects", "signs", "factor") if pair.stage == 3 else ()
        of_whole = {n for n in there if n.partition(".")[0] in kinds}
        of_cut = {n for n in here if pair.stage == 3 and n.partition(".")[0] == "sketch"}
        assert {n for n in here if not n.startswith("random.1.")} - of_cut == there.keys() - of_whole
        assert bool(of_cut) == (pair.stage == 3 and "signs" in there)
        for key in here.keys() & there.keys():
            # Attention does not depend on a key's bias: its gradient is rounding, which Adam makes as large as any.
            if not key.startswith("random.") and "key.bias" not in key:
                torch.testing.assert_close(
                    here[key], there[key], rtol=1e-3, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}"
                )


@needs_deepspeed
def test_a_base_in_16_bits_trains_what_is_trained_in_32(pair: Pair, alone: Path) -> None:
    losses = json.loads((alone / "half" / "losses.json").read_text(encoding="utf-8"))
    assert pair.found[0]["runs"]["half"]["losses"][1:] == pytest.approx(losses, rel=2e-2)
    assert pair.found[0]["runs"]["half"]["trained in"] == ["torch.float32"]
    assert losses != pytest.approx(json.loads((alone / "plain" / "losses.json").read_text(encoding="utf-8")), rel=1e-5)


@needs_deepspeed
def test_a_model_is_scored_before_its_first_step(pair: Pair, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", **STEPS)
    expected = evaluate_split(
        trainer.bare_model, trainer.task, trainer.validation, trainer.accelerator, batch_size=16, source="validation"
    )
    for found in pair.found:
        for name in ("plain", "low", "dense"):
            assert found["runs"][name]["losses"][0] == pytest.approx(expected.metrics["loss"], rel=1e-5)


@needs_deepspeed
def test_each_process_holds_its_share(pair: Pair) -> None:
    for name, (spec, settings) in RUNS.items():
        half = adapt(spec, model=tiny_bert().bfloat16() if "half" in settings else None, trained=None).model
        whole = sum(p.numel() for p in half.parameters())
        held = [found["runs"][name]["held"] for found in pair.found]
        if pair.stage == 2:
            assert held == [whole, whole]
        else:  # odd ones are padded by one
            assert whole <= sum(held) <= whole + 2 * len(list(half.parameters()))
            assert held[0] == held[1]


@needs_deepspeed
def test_a_stopped_run_goes_on_bit_for_bit(pair: Pair) -> None:
    assert "SIGTERM stopped it after step 6 of 8" in pair.found[0]["stopped"]["said"]
    assert pair.found[1]["stopped"]["said"] == "peer 143"
    assert differences(pair.folder / "whole", pair.folder / "cut") == []


@needs_deepspeed
def test_a_gradient_that_is_not_finite_ends_a_run_before_its_step(pair: Pair) -> None:
    main, other = (found["diverged"] for found in pair.found)
    assert main["said"].startswith("step 5: the training loss is ")
    assert "the gradient norm nan; the step was not taken, and the last good checkpoint is" in main["said"]
    assert "step-000003" in main["said"]
    assert main["step"] == other["step"] == 4  # neither that step nor the one after it


@needs_deepspeed
@pytest.mark.parametrize(
    ("stage", "method"), [(2, "mirror"), (2, "lora"), (3, "mirror"), (3, "lora"), (3, "dora"), (3, "oft")]
)
def test_a_command_goes_the_whole_way(tmp_path: Path, stage: int, method: str) -> None:
    pytest.importorskip("deepspeed", exc_type=ImportError)
    words: list[object] = ["train", "-m", write_tiny_model(tmp_path / "model"), "-t", "text-classification"]
    words += ["-d", write_table(tmp_path / "reviews.csv", reviews(61)), "--epochs", 2, "--lr", 0.1, "--json"]
    words += ["--method", method]
    process = launch_zero(tmp_path, stage, *words, "-o", tmp_path / "two", "--batch-size", 8)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("\n") == 1
    one = mirrortune(*words, "-o", tmp_path / "one", "--batch-size", 16).data
    two = json.loads(process.stdout)
    assert two["metrics"] == pytest.approx(one["metrics"], abs=1e-4)
    for name in ("trainable_parameters", "head_parameters"):
        assert two[name] == one[name]
    assert f"with 2 processes (DeepSpeed ZeRO-{stage})" in process.stderr
    environment = json.loads((tmp_path / "two" / "environment.json").read_text(encoding="utf-8"))
    assert environment["packages"]["deepspeed"]
    scored = mirrortune("eval", tmp_path / "two", "--json").data
    assert scored["metrics"] == pytest.approx(two["metrics"], abs=1e-6)
    merged = mirrortune("merge", tmp_path / "two", "-o", tmp_path / "merged", "--json").data
    assert merged["verification"]["passed"]


@needs_deepspeed
@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"zero_optimization": {"stage": 1}}, "zero_stage: got 1"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer_device: got cpu",
        ),
        ({"zero_optimization": {"stage": 3}, "fp16": {"enabled": True}}, "train.precision"),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
            "zero_optimization.zero_quantized_weights",
        ),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}, "DeepSpeed config, optimizer"),
    ],
)
def test_what_was_not_shown_to_be_exact_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], said: str
) -> None:
    pytest.importorskip("deepspeed", exc_type=ImportError)
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    with pytest.raises(ConfigError, match=said):
        make_plugin(is_bf16=False)


def test_without_deepspeed_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"pip install 'mirrortune\[deepspeed\]'"):
        make_plugin(is_bf16=False)


def test_a_compiled_model_does_not_go_with_it() -> None:
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 3}})
    accelerator = SimpleNamespace(is_fsdp2=False, state=SimpleNamespace(deepspeed_plugin=plugin))
    assert stage_of(accelerator) == 3
    with pytest.raises(ConfigError, match="DeepSpeed"):
        compile_model(tiny_bert(), accelerator)
