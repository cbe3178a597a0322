# SPDX-License-Identifier: Apache-2.0
"""The bench as far as it goes without an hour or a GPU: command lines, shapes on the meta device, targets."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mirrortune.adapters.inject import spectral_layers
from mirrortune.adapters.methods import preset
from mirrortune.adapters.spec import AdapterSpec
from mirrortune.runs.memory import Footprint
from mirrortune.runs.size import Load, footprint
from tests.bench import __main__ as bench
from tests.bench import assets, pairing_drift, precisions, rates
from tests.bench.contestants import (
    FROZEN,
    METHODS,
    REFERENCE,
    SIZES,
    any_factors,
    contestant,
    make_batch,
    make_model,
)
from tests.bench.methods import merge_seconds, turns
from tests.bench.parts import PARTS, Part
from tests.bench.targets import read_results, targets

ALL = [(device, name) for device, parts in PARTS.items() for name in parts]


@pytest.mark.parametrize("is_quick", [False, True])
@pytest.mark.parametrize(("device", "name"), ALL, ids=[f"{d} {n}" for d, n in ALL])
def test_every_part_understands_its_words(device: str, name: str, is_quick: bool, tmp_path: Path) -> None:
    part = PARTS[device][name]
    if is_quick and part.quick is None:
        pytest.skip("left out of a quick run")
    options = part.parsed(part.command(tmp_path / "out", tmp_path, is_quick=is_quick, clock="wall"))
    assert getattr(options, "device", device) == device
    assert getattr(options, "output", None) == (tmp_path / "out" if part.writes else None)


def counted(size: str, name: str, *, layers: int, length: int) -> Footprint:
    """The memory of a step in bfloat16 on one row, counted without numbers."""
    dtype = torch.bfloat16
    method, rank = METHODS[name]
    model = make_model(size, length, dtype, "meta", layers=layers)
    batch = make_batch(1, length, "cpu")
    batch["targets"] = batch.pop("labels")

    def loss(inputs: Any, outputs: Any, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
        return torch.nn.functional.cross_entropy(outputs.logits.float(), targets, reduction="sum"), 1

    load = Load(batch=batch, scored=batch, loss=loss, dtype=dtype, is_16bit_compute=False, device="cpu")
    return footprint(model, AdapterSpec(method=method, rank=rank), load)


@pytest.mark.parametrize("name", [REFERENCE, "mirror"])
@pytest.mark.parametrize("size", ["base", "1b", "8b"])
def test_a_step_of_every_size_goes_through(size: str, name: str) -> None:
    # As large as on a GPU, and without numbers: all that can be known here of a step there.
    found = counted(size, name, layers=1, length=2048)
    assert found.is_counted, "a guess means that it raised"
    hidden, inner, *_ = SIZES[size]
    attention = 4 * hidden**2 if size == "base" else 2 * hidden * (hidden + 8 * 2 * hidden // 64)
    assert found.weights > 2 * attention + 2 * 2 * hidden * inner


def test_an_8b_model_takes_less_at_rank_128_than_with_lora() -> None:
    ours, theirs = (counted("8b", name, layers=2, length=2048) for name in ("mirror r=128", REFERENCE))
    assert ours.weights == theirs.weights
    assert ours.total <= theirs.total


def test_a_method_without_a_kernel_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(batch: object) -> None:
        raise RuntimeError("linalg_solve is not implemented for BFloat16")

    some: Any = SimpleNamespace(step=lambda batch: None)
    other: Any = SimpleNamespace(step=fail, optimizer=SimpleNamespace(zero_grad=lambda: None))
    taken = turns({REFERENCE: some, "mirror": some, "oft": other}, {}, 1, 2, time.perf_counter)
    assert {name: len(steps) for name, steps in taken.items()} == {REFERENCE: 2, "mirror": 2}
    assert "oft is left out: RuntimeError: linalg_solve" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="linalg_solve"):
        turns({REFERENCE: other}, {}, 1, 2, time.perf_counter)


def test_made_up_factors_have_the_shapes_of_real_ones() -> None:
    base = make_model("mini", 16, torch.float32, "cpu", layers=1)
    made = contestant(base, "mirror r=64", any_factors, is_copy=False)
    made.step(make_batch(2, 16, "cpu"))
    assert made.trained == 7 * 32, "an angle for each pair of 64 directions"


@pytest.mark.parametrize("tokens", [16, 4096])
def test_merging_is_timed_however_a_layer_computes(tokens: int) -> None:
    base = make_model("mini", 16, torch.float32, "cpu", layers=1)
    made = contestant(base, "mirror", any_factors, tokens=tokens)
    strategies = {layer.strategy for layer in spectral_layers(made.model).values()}
    assert ("dense" in strategies) == (tokens == 4096)
    seconds = merge_seconds(made, base, time.perf_counter)
    assert seconds is not None
    assert seconds > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["methods", "--device", "cuda"], "no part methods on cuda; there are precisions, methods-1b-1024, "),
        (["--device", "cuda", "--clock", "cpu"], "the processor's time says nothing of a GPU"),
    ],
)
def test_what_makes_no_sense_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.parse(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_packages_that_were_brought_to_a_machine_are_found_by_every_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = f"import sys; sys.exit(sys.path[1:3] != ['{bench.ROOT}', '{tmp_path}'])"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}"\n', encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    part = Part(module="scaling", folder="scaling")
    assert bench.run(part, tmp_path / "out", bench.parse(["scaling"]), seconds=100)


def test_a_part_is_cut_when_its_time_is_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = bench.parse(["scaling", "methods", "--minutes", "0"])
    started = time.perf_counter()
    assert not bench.run(PARTS["cpu"]["methods"], tmp_path / "out", options, seconds=0.2)
    assert time.perf_counter() - started < 60, "it would take many minutes"
    assert bench.measure(options, tmp_path) == ["scaling", "methods"], "no time is left to begin with them"
    assert "Failed, or not finished: scaling, methods." in capsys.readouterr().out


def test_a_command_that_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(precisions.ROOT)}
    failed = precisions.run("what, bf16", ["what"], tmp_path, env)
    assert failed["code"] == 2
    assert failed["said"] in failed["stderr"]
    gone = precisions.run("resume, bf16", ["train"], tmp_path, env)
    assert gone["code"] == -1, "what it would continue has failed"
    numbers = {"median_step_seconds": 0.01, "peak_memory_bytes": 2**30, "loss": 0.5, "skipped_steps": 0}
    rows = {"lora r=8, bf16": {"code": 0, "seconds": 9.0, **numbers}, "what, bf16": failed, "resume, bf16": gone}
    rows["mirror-scale, bf16"] = {**rows["lora r=8, bf16"], "median_step_seconds": 0.02}
    found = {"commands": rows, "setting": "Any.", "hardware": "any", "versions": {"torch": "2"}}
    said = precisions.table(found)
    assert "| `mirror-scale` | bf16 | 20.0 ms | 2.00 | 1,024 MiB | 1.00 | 0.5000 | 0 |" in said
    assert "| `lora r=8` | fp16 | not run |" in said
    assert f"| what, bf16 | {failed['seconds']:.0f} | **exit code 2**: " in said


def test_the_commands_of_a_first_session_have_folders_of_their_own(tmp_path: Path) -> None:
    options = precisions.parse([str(tmp_path), "--device", "cuda"])
    every = dict(precisions.commands(options))
    trained = [
        words[words.index("-o") + 1] for words in every.values() if words[0] == "train" and "--resume" not in words
    ]
    assert len({*trained}) == len(trained) >= 13
    used = [words[1] for words in every.values() if words[0] in ("eval", "predict", "merge")]
    assert {*used} <= {*trained, "merged-bf16", "merged-fp16"}


def test_the_results_that_are_kept_can_be_read() -> None:
    results = read_results(bench.RESULTS, "cpu")
    verdicts = {line: verdict for line, _, _, verdict in (t.row(results) for t in targets("cpu", "cpu"))}
    assert verdicts["step at full rank relative to hra r=8 (1,024 tokens)"] == "met"
    assert {"met", "missed"} <= set(verdicts.values()) <= {"met", "missed", "not measured"}


def test_a_learning_rate_is_judged_by_its_worst_pair(tmp_path: Path) -> None:
    tried = {
        "words": {0.01: 0.5, 0.03: 0.4, 0.1: 0.6},
        "images": {0.01: 1.0, 0.03: 1.5},
        "chat": {0.01: 2.0, 0.03: 2.2},
    }
    for name, losses in tried.items():
        (tmp_path / name).mkdir()
        method = {"tuning": {str(rate): {"loss": loss} for rate, loss in losses.items()}}
        finer = {"tuning": {"0.02": {"loss": 2.5}}} if name == "chat" else method
        results = {"tasks": {name: {"methods": {"mirror": method, "none": method, "mirror:lr=2e-2": finer}}}}
        (tmp_path / name / "results.json").write_text(json.dumps(results))

    (row,) = rates.rows(rates.read([f"{name}={tmp_path / name}" for name in tried]), list(tried))

    assert row["method"] == "mirror", "what trains no adapter has no rate of its own"
    assert row["least"] == (0.01, pytest.approx(1.25)), "0.03 is better on two pairs, and 1.5 times the best on one"
    assert row["losses"]["images"] == {0.01: 1.0, 0.03: 1.5}
    said = rates.table([row], list(tried))
    assert "| `mirror` | 1.25 1.00 1.00 | - - 1.25 | 1.00 1.50 1.10 | 1.50 - - | 0.01 (1.25) | 0.02 |" in said


def test_the_defaults_are_those_of_the_evidence() -> None:
    kept = json.loads((bench.RESULTS / "rates" / "results.json").read_text(encoding="utf-8"))
    assert {row["method"]: row["default"] for row in kept} == {
        row["method"]: preset(row["method"].partition(":")[0]).lr for row in kept
    }
    for row in kept:
        rate, ratio = row["least"]
        assert rate / 3 < row["default"] < rate * 3, f"{row['method']} has its least at {rate}, {ratio:.2f} of the best"


def test_what_pairs_carry_is_the_gradient_of_their_planes() -> None:
    planes = torch.tensor([[0.0, 1, 2], [-1, 0, 3], [-2, -3, 0]], dtype=torch.float64)
    assert pairing_drift.carried({"a": torch.tensor([[0, 2]])}, {"a": planes}) == 4
    assert pairing_drift.carried({"a": torch.tensor([[[0, 1], [1, 2]]])}, {"a": planes}) == 10


def test_a_target_is_judged_by_its_ratio() -> None:
    def results(ratio: float) -> dict[str, Any]:
        rows = {REFERENCE: 1.0, FROZEN: 0.8, "mirror r=64": ratio, "dora r=8": 1.2, "mirror": 1.2}
        return {"methods": {"methods": {n: {"step_ratio": r, "saved_bytes": 8 * r} for n, r in rows.items()}}}

    def found(ratio: float) -> dict[str, list[str]]:
        return {row[0]: row[1:] for row in (t.row(results(ratio)) for t in targets("cpu", "wall"))}

    step = "step at rank 64 relative to LoRA (1,024 tokens)"
    assert found(1.0)[step] == ["<= 1", "1", "met"]
    assert found(1.01)[step] == ["<= 1", "1.01", "missed"]
    trained = {"commands": {f"{name}, bf16": {"median_step_seconds": seconds}
                            for name, seconds in (("lora r=8", 2.0), ("mirror-scale r=64", 1.5))}}  # fmt: skip
    first, second, *_ = (t.row({"precisions": trained}) for t in targets("cuda", "wall"))
    assert first[1:] == ["<= 1", "0.75", "met"]
    assert second[3] == "not measured"
    assert found(0.7)["saved activations at rank 64 relative to LoRA (1,024 tokens)"] == ["<= 0.75", "0.7", "met"]
    assert found(1.0)["step at full rank relative to dora r=8 (1,024 tokens)"] == ["< 1", "1", "missed"]
    assert found(1.0)["step at full rank relative to oft (1,024 tokens)"][2] == "not measured"


@pytest.mark.parametrize("module", ["assets", "image_rates"])
def test_help_is_all_that_help_does(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"tests.bench.{module}").parse(["--help"])
    assert (ended.value.code, capsys.readouterr().out[:6]) == (0, "usage:")


def test_an_unknown_asset_is_refused_before_any_is_made(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        assets.parse(["folder", "chatterbot", "nothing"])
    assert "unknown: nothing; names: " in capsys.readouterr().err
