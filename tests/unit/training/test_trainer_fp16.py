# SPDX-License-Identifier: Apache-2.0
"""fp16: scaled gradients on a CPU through torch's own scaler: overflow, schedule, clipping, accumulation, resume."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from mirrortune.adapters.inject import adapter_parameters, plain_parameters
from mirrortune.errors import DivergedError, InterruptedRun, ResourceError
from mirrortune.system import devices
from mirrortune.system.distributed.processes import make_accelerator
from mirrortune.tasks.objective import Objective
from mirrortune.training.lr_sweep import sweep_rates
from mirrortune.training.trainer import Trainer
from tests import tiny_runs
from tests.tiny_runs import SETTINGS, Watcher, adapt, make_trainer, terminate_after


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """accelerate's state of a process that has just begun, for this test alone."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def in_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """All loops of this module compute in float16."""
    monkeypatch.setattr(tiny_runs, "make_accelerator", lambda: make_accelerator("fp16"))


def overflow(trainer: Trainer, *steps: int, value: float = math.inf) -> None:
    """Make a gradient of these steps (from 1) overflow, once in each."""
    theta = next(iter(adapter_parameters(trainer.bare_model).values()))
    calls: list[int] = []

    def act(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient + value if len(calls) in steps else gradient

    theta.register_hook(act)


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of trained parameters and moments."""
    model = trainer.bare_model
    found = {n: p.detach().clone() for n, p in {**adapter_parameters(model), **plain_parameters(model)}.items()}
    states = trainer.optimizer.optimizer.state
    return found | {f"{i}.{k}": v.clone() for i, state in enumerate(states.values()) for k, v in state.items()}


def logged(folder: Path) -> list[dict[str, Any]]:
    """The lines of training in the log."""
    events = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [event for event in events if event["event"] == "train"]


def test_layers_compute_in_float16_and_the_adapter_learns_in_float32(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, epochs=6)
    seen: set[torch.dtype] = set()
    layer = trainer.bare_model.get_submodule("bert.encoder.layer.0.attention.self.query")
    layer.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    result = trainer.fit()
    assert seen == {torch.float16}
    assert {p.dtype for p in adapter_parameters(trainer.bare_model).values()} == {torch.float32}
    losses = [event["loss"] for event in logged(tmp_path)]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert result.skipped_steps == 0
    assert [event["skipped_steps"] for event in logged(tmp_path)] == [0] * 24


def test_losses_and_norms_are_those_of_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for rounding: the logged norm and clipping see gradients at their own scale, in any number of parts."""
    settings = {"max_steps": 3, "max_grad_norm": 0.5}
    make_trainer(tmp_path / "fp16", **settings).fit()
    make_trainer(tmp_path / "parts", gradient_accumulation_steps=2, **{**settings, "batch_size": 4}).fit()
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(tiny_runs, "make_accelerator", lambda: make_accelerator("fp32"))
    make_trainer(tmp_path / "fp32", **settings).fit()
    exact = logged(tmp_path / "fp32")
    assert max(event["grad_norm"] for event in exact) > 0.5
    for folder in ("fp16", "parts"):
        found = logged(tmp_path / folder)
        for name in ("loss", "grad_norm"):
            assert [e[name] for e in found] == pytest.approx([e[name] for e in exact], rel=5e-3)
        assert [e["loss_scale"] for e in found] == [2.0**13] * 3  # torch's 2**16 for the mean, for sums of 8 rows
    assert "loss_scale" not in exact[0]


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_step_that_overflows_moves_nothing_but_the_scale(tmp_path: Path, value: float) -> None:
    watcher = Watcher()
    trainer = make_trainer(tmp_path, progress=watcher, max_steps=6, schedule="linear")
    overflow(trainer, 3, 4, value=value)
    seen: list[dict[str, torch.Tensor]] = []
    trainer.progress.on_step = lambda *_: seen.append(state_of(trainer))
    result = trainer.fit()
    assert all(torch.equal(seen[3][name], tensor) for name, tensor in seen[1].items())
    assert not all(torch.equal(seen[4][name], tensor) for name, tensor in seen[3].items())
    assert max(t.item() for name, t in seen[5].items() if name.endswith(".step")) == 4
    lines = logged(tmp_path)
    assert [e["skipped_steps"] for e in lines] == [0, 0, 1, 2, 2, 2]
    assert [e["loss_scale"] for e in lines] == [2.0**13, 2.0**13, 2.0**12, 2.0**11, 2.0**11, 2.0**11]
    # The schedule waits: after warm-up it is 5/5, 4/5, 3/5 for the steps that are made.
    assert [e["lr"] / SETTINGS.lr for e in lines] == pytest.approx([1 / 2, 1, 4 / 5, 4 / 5, 4 / 5, 3 / 5])
    assert all(math.isfinite(e["loss"]) and math.isfinite(e["grad_norm"]) for e in lines)
    assert result.skipped_steps == 2
    assert result.global_step == 6


def break_losses(trainer: Any, is_broken: Callable[[int], bool]) -> None:
    """Make the losses of some batches infinite, by the number of the call, from 1."""
    task, calls = trainer.task, itertools.count(1)

    class Breaking:
        def loss(self, inputs: Any, outputs: Any, targets: Any) -> Any:
            loss, items = task.loss(inputs, outputs, targets)
            return (loss * math.inf if is_broken(next(calls)) else loss), items

    trainer.stepper.objective = Objective(Breaking())


def test_a_loss_that_is_not_finite_is_left_out_too(tmp_path: Path) -> None:
    """An activation may exceed float16's largest number in one batch and in no other."""
    trainer = make_trainer(tmp_path, max_steps=4)
    break_losses(trainer, lambda call: call == 2)
    result = trainer.fit()
    assert result.skipped_steps == 1
    assert [e["step"] for e in logged(tmp_path)] == [1, 3, 4]  # a window without a finite loss has no line


def test_a_sweep_ends_at_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    """The step is skipped, so that no parameter breaks: the sweep must not go on with the loss before."""
    trainer = make_trainer(tmp_path, lr=1.0)
    break_losses(trainer, lambda call: call > 5)
    assert len(sweep_rates(trainer, lr=3e-2, num_steps=12, on_step=lambda: None).losses) == 5


def test_overflow_at_every_scale_ends_the_run(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, epochs=9, log_every_steps=99, eval_every_steps=99)
    overflow(trainer, *range(3, 99))
    with pytest.raises(DivergedError, match=r"step 22: .*overflowed in float16 in 20 steps in a row.*--precision fp32"):
        trainer.fit()


def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(tmp_path: Path) -> None:
    def run(folder: Path, **given: Any) -> Trainer:
        adapted = adapt(trained=None)
        return make_trainer(folder, adapted=adapted, epochs=2, **given)

    whole = run(tmp_path / "whole")
    whole.accelerator.scaler.set_growth_interval(3)  # grows after the stop, if its count of steps was kept
    overflow(whole, 2)
    whole.fit()
    AcceleratorState._reset_state(reset_partial_state=True)
    cut = run(tmp_path / "cut", progress=terminate_after(4))
    cut.accelerator.scaler.set_growth_interval(3)
    overflow(cut, 2)
    with pytest.raises(InterruptedRun):
        cut.fit()
    AcceleratorState._reset_state(reset_partial_state=True)
    resumed = run(tmp_path / "cut", fresh=False)
    resumed.accelerator.scaler.set_growth_interval(3)
    resumed.resume()
    assert resumed.accelerator.scaler.state_dict()["_growth_tracker"] == 2
    assert resumed.fit().skipped_steps == 1
    assert logged(tmp_path / "whole")[-1]["loss_scale"] == 2.0**14  # halved once, doubled twice
    assert (tmp_path / "cut/metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()
    for name in ("adapter.safetensors", "training.safetensors"):
        first, second = (load_file(run.run.checkpoint(8) / name) for run in (whole, resumed))
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


def test_pairs_are_measured_in_float32(tmp_path: Path) -> None:
    """Unscaled gradients of float16 round to zero, and pairs of zeros are any pairs."""
    from mirrortune.adapters.svd import factorize
    from mirrortune.adapters.targets import find_targets
    from mirrortune.training.calibration import Calibration, CalibrationSettings
    from tests.tiny_models import tiny_bert

    settings = CalibrationSettings(
        saliency="mean", num_batches=1, warmup_steps=0, batch_size=8, head_lr=1e-3, side="output", unit="angle", seed=0
    )
    found = []
    for precision in ("fp32", "fp16"):
        AcceleratorState._reset_state(reset_partial_state=True)
        model = tiny_bert()
        targets = find_targets(model, tiny_runs.MIRROR, tiny_runs.HEAD)
        calibration = Calibration(
            model=model, targets=targets, objective=Objective(tiny_runs.classification()),
            examples=tiny_runs.sentences(8), settings=settings, accelerator=make_accelerator(precision),
        )  # fmt: skip
        found.append(calibration.measure_saliency(lambda name, matrix, rank: factorize(matrix, rank, name=name)))
    assert all(torch.equal(found[0][name], tensor) for name, tensor in found[1].items())


@pytest.mark.parametrize(
    ("has_gpu", "native", "sharded", "expected"),
    [(False, False, "", "fp32"), (True, True, "", "bf16"), (True, False, "", "fp16"), (True, True, "FSDP", "bf16"),
     (True, False, "FSDP", "fp32"), (True, False, "DEEPSPEED", "fp32")],
)  # fmt: skip
def test_auto_is_what_the_gpu_computes_in(
    monkeypatch: pytest.MonkeyPatch, has_gpu: bool, native: bool, sharded: str, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    # torch says yes for a T4 too, which emulates it.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    if sharded:
        monkeypatch.setenv(f"ACCELERATE_USE_{sharded}", "true")
    assert devices.resolve_precision("auto") == expected
    assert devices.resolve_precision("bf16") == "bf16"
    if sharded:
        with pytest.raises(ResourceError, match="not scaled under FSDP and DeepSpeed"):
            devices.resolve_precision("fp16")
    else:
        assert devices.resolve_precision("fp16") == "fp16"


def test_16_bit_weights_are_computed_in_the_autocast_that_is_on() -> None:
    model = torch.nn.Linear(2, 2).to(torch.bfloat16)
    with torch.autocast("cpu", torch.float16), devices.autocast(model):
        assert model(torch.ones(1, 2)).dtype == torch.float16
    with devices.autocast(model):
        assert model(torch.ones(1, 2)).dtype == torch.bfloat16
