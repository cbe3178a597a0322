# SPDX-License-Identifier: Apache-2.0
"""training: how many steps, what is logged, kept and published, and how the loop stops; its laws are in tests/laws."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mirrortune.adapters.files.adapter_file import read_adapter
from mirrortune.adapters.inject import adapter_parameters, plain_parameters
from mirrortune.adapters.spec import AdapterSpec
from mirrortune.data.examples import TokenExamples
from mirrortune.data.loader import StreamedExamples, epoch_batches, micro_batches
from mirrortune.data.row_stream import Place
from mirrortune.errors import ConfigError, DataError, DivergedError, HubError, InterruptedRun, VerificationError
from mirrortune.system.run_directory import RunDirectory
from mirrortune.tasks.objective import Objective
from mirrortune.training.accumulator import StepClock
from mirrortune.training.evaluate import evaluate_split
from mirrortune.training.trainer import Trainer
from tests.laws.test_training_laws import differences
from tests.tiny_models import normed_bert, tiny_bert
from tests.tiny_runs import (
    SETTINGS,
    Adapted,
    Watcher,
    adapt,
    make_trainer,
    sentences,
    terminate_after,
    terminate_after_rows,
)  # fmt: skip


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The logged events of one kind."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def numbers(adapted: Adapted) -> dict[str, torch.Tensor]:
    """Copies of the trained parameters."""
    model = adapted.model
    return {n: p.detach().clone() for n, p in {**adapter_parameters(model), **plain_parameters(model)}.items()}


# 30 rows in batches of 8 are 4 steps an epoch.
@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"),
    [(2, None, 8), (1, None, 4), (0.5, None, 2), (0.1, None, 1), (1.5, None, 6), (3, 5, 5), (1, 99, 4)],
)
def test_the_number_of_steps(tmp_path: Path, epochs: float, max_steps: int | None, expected: int) -> None:
    watcher = Watcher()
    trainer = make_trainer(tmp_path, progress=watcher, epochs=epochs, max_steps=max_steps)
    result = trainer.fit()
    assert result.global_step == trainer.total_steps == expected
    assert watcher.started == [(expected, 0)]
    assert len(watcher.rows) == expected
    assert trainer.run.saved_steps()[-1] == expected


def test_a_finished_run_holds_what_it_promises(tmp_path: Path) -> None:
    watcher = Watcher()
    trainer = make_trainer(tmp_path, progress=watcher)
    result = trainer.fit()
    scored = events(tmp_path, "evaluate")
    assert [event["step"] for event in scored] == [4, 8]
    assert [event["epoch"] for event in scored] == [1, 2]
    best = max(scored, key=lambda event: (event["accuracy"], -event["step"]))
    assert result.best_step == best["step"]
    assert result.metrics == {"accuracy": best["accuracy"], "loss": best["loss"]}
    assert trainer.run.saved_steps() == sorted({best["step"], 8})
    published, kept = read_adapter(tmp_path / "adapter"), read_adapter(trainer.run.checkpoint(best["step"]))
    assert all(torch.equal(tensor, kept.tensors[name]) for name, tensor in published.tensors.items())
    assert watcher.evaluated == 40
    assert result.samples_per_second == pytest.approx(60 / result.train_seconds)
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == watcher.events


def test_a_checkpoint_holds_adapter_head_and_optimizer_and_nothing_frozen(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit()
    folder = trainer.run.checkpoint(1)
    adapter, training = (load_file(folder / f"{name}.safetensors") for name in ("adapter", "training"))
    trained = {n for n, p in trainer.bare_model.named_parameters() if p.requires_grad}
    assert {n for n in adapter if n.startswith("param.")} == {"param.classifier.weight", "param.classifier.bias"}
    assert {n.partition(".")[0] for n in adapter} == {"core", "param", "signs", "effects"}
    assert {n.partition(".")[0] for n in training} == {"optimizer", "random"}
    moments = {n.removeprefix("optimizer.").rpartition(".")[0] for n in training if n.startswith("optimizer.")}
    assert moments == {name.replace(".core.", ".") for name in trained}


def test_what_is_logged_of_a_step(tmp_path: Path) -> None:
    watcher = Watcher()
    make_trainer(tmp_path, progress=watcher, warmup_ratio=0.25).fit()
    logged = events(tmp_path, "train")
    assert [event["step"] for event in logged] == list(range(1, 9))
    assert [event["epoch"] for event in logged] == [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]
    assert [event["loss"] for event in logged] == watcher.losses
    factors = [1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]  # two steps of warm-up
    assert [event["lr"] for event in logged] == pytest.approx([SETTINGS.lr * factor for factor in factors])
    assert [event["head_lr"] for event in logged] == pytest.approx([SETTINGS.head_lr * factor for factor in factors])
    assert all(event["grad_norm"] > 0 for event in logged)


def test_a_logged_loss_is_the_mean_over_its_window(tmp_path: Path) -> None:
    watcher = Watcher()
    make_trainer(tmp_path / "every step", progress=watcher).fit()
    make_trainer(tmp_path / "every third", log_every_steps=3).fit()
    logged = events(tmp_path / "every third", "train")
    assert [event["step"] for event in logged] == [3, 6, 8]
    for event, steps in zip(logged, (slice(0, 3), slice(3, 6), slice(6, 8)), strict=True):
        losses, rows = watcher.losses[steps], watcher.rows[steps]
        mean = sum(loss * count for loss, count in zip(losses, rows, strict=True)) / sum(rows)
        assert event["loss"] == pytest.approx(mean, rel=1e-12)


def test_evaluation_and_saving_have_their_own_intervals(tmp_path: Path) -> None:
    saved: list[int] = []
    trainer = make_trainer(tmp_path, eval_every_steps=3, save_every_steps=2)
    write = trainer.snapshots.write_adapter_files
    trainer.snapshots.write_adapter_files = lambda folder: (saved.append(trainer.state.global_step), write(folder))
    trainer.fit()
    assert [event["step"] for event in events(tmp_path, "evaluate")] == [3, 6, 8]
    assert {2, 4, 6, 8} <= set(saved) <= {2, 3, 4, 6, 8}  # and at 3 because its first evaluation is the best so far


def test_a_metric_of_which_less_is_better_chooses_the_least(tmp_path: Path) -> None:
    from dataclasses import replace

    from mirrortune.tasks.kinds.regression import Task

    adapted = adapt(trained=None)
    adapted.model.classifier = nn.Linear(32, 1)
    trainer = make_trainer(tmp_path, adapted=adapted, epochs=4)
    trainer.task = Task(text_columns=("text",), label_column="label", metric_names=("mse",), selection_metric="mse")
    trainer.stepper.objective = Objective(trainer.task)
    for name in ("train", "validation"):
        split = getattr(trainer, name)
        setattr(trainer, name, replace(split, targets=split.targets.astype("float32")))
    trainer.feed.examples = trainer.train
    result = trainer.fit()
    scores = {event["step"]: event["mse"] for event in events(tmp_path, "evaluate")}
    assert result.metrics["mse"] == min(scores.values())
    assert scores[result.best_step] == min(scores.values())


def poison(trainer: Trainer, step: int, value: float) -> None:
    """After ``step``, one number of the head becomes ``value``, as a broken row or too large a step would make it."""
    bias = trainer.bare_model.get_parameter("classifier.bias")

    def act(done: int, rows: int, tokens: int | None) -> None:
        if done == step:
            with torch.no_grad():
                bias[0] = value

    trainer.progress.on_step = act


# After step 5: step 6 is broken. It is found when a line of the log, an evaluation or a checkpoint is due: at once, two
# steps later, or at the end.
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("due", [{"log_every_steps": 1}, {"save_every_steps": 4}, {"eval_every_steps": 7}, {}])
def test_a_step_that_is_not_finite_is_not_made(tmp_path: Path, value: float, due: dict[str, int]) -> None:
    settings = {"log_every_steps": 99, "save_every_steps": 2, "eval_every_steps": 99, **due}
    adapted = adapt(trained=None)
    trainer = make_trainer(tmp_path, adapted=adapted, **settings)
    poison(trainer, 5, value)
    with pytest.raises(DivergedError) as caught:
        trainer.fit()
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert message.startswith("step 6: the training loss is")
    assert "the step was not taken" in message
    assert f"the last good checkpoint is {tmp_path / 'checkpoints' / 'step-000004'}" in message
    assert "--lr" in message
    assert trainer.run.saved_steps() == [4]
    assert all(event["step"] <= 5 for event in trainer.run.events())
    for name, tensor in numbers(adapted).items():
        assert name == "classifier.bias" or torch.isfinite(tensor).all()
    good = read_adapter(trainer.run.checkpoint(4))
    assert all(torch.isfinite(tensor).all() for tensor in good.tensors.values())


def test_nothing_moves_after_a_step_that_is_not_finite(tmp_path: Path) -> None:
    """Neither numbers nor moments: not by that step, nor by those that are under way before somebody looks."""
    adapted = adapt(trained=None)
    rarely = dict.fromkeys(("log_every_steps", "eval_every_steps", "save_every_steps"), 99)
    trainer = make_trainer(tmp_path, adapted=adapted, max_steps=5, **rarely)
    theta = next(iter(adapter_parameters(adapted.model).values()))
    calls: list[int] = []
    theta.register_hook(lambda gradient: gradient / 0 if calls.append(1) or len(calls) == 3 else gradient)
    seen: list[dict[str, torch.Tensor]] = []

    def remember(done: int, rows: int, tokens: int | None) -> None:
        states = trainer.optimizer.optimizer.state
        moments = {f"{i}.{k}": v.clone() for i, state in enumerate(states.values()) for k, v in state.items()}
        seen.append({**numbers(adapted), **moments})

    trainer.progress.on_step = remember
    with pytest.raises(DivergedError, match=r"^step 3: .*gradient norm (nan|inf).*there is no checkpoint yet"):
        trainer.fit()
    assert len(seen) == 5
    assert any(not torch.equal(seen[0][name], tensor) for name, tensor in seen[1].items())
    for later in seen[2:]:
        assert all(torch.equal(later[name], tensor) for name, tensor in seen[1].items())


def test_no_step_waits_for_the_device(tmp_path: Path) -> None:
    """Whatever reads a number from a tensor is an error, but within the model (which may look at its mask)."""
    from torch.overrides import TorchFunctionMode

    is_inside_model = False

    class Forbid(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            reads = ("item", "tolist", "numpy", "cpu", "nonzero", "__float__", "__int__", "__bool__", "__index__")
            assert is_inside_model or getattr(func, "__name__", "") not in reads, func
            return func(*args, **(kwargs or {}))

    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2, num_workers=0)
    parts = list(trainer.feed.micro_batches(0, 0, 3))
    batches = iter(parts)  # made before, because making them reads numbers
    forward = trainer.stepper.model.forward

    def freely(**inputs: Any) -> Any:
        nonlocal is_inside_model
        is_inside_model = True
        outputs = forward(**inputs)
        is_inside_model = False
        return outputs

    trainer.stepper.model.forward = freely
    trainer.stepper.step(1, batches, 1.0)
    with Forbid():
        for number in (2, 3):
            trainer.stepper.step(number, batches, 1.0)
        with pytest.raises(AssertionError, match="tolist"):
            trainer.tally.read()
    assert trainer.tally.read().step == 3


@pytest.mark.parametrize(
    ("number", "code", "advice"),
    [
        (signal.SIGINT, 130, "Continue with the same command and --resume"),
        (signal.SIGTERM, 143, "Continue with the same command and --resume"),
        (signal.SIGUSR1, 143, "Submit it again with --resume in its command"),
    ],
)
def test_a_signal_stops_after_a_safe_checkpoint(tmp_path: Path, number: signal.Signals, code: int, advice: str) -> None:
    before = signal.getsignal(number)
    watcher = Watcher(lambda step: signal.raise_signal(number) if step == 3 else None)
    trainer = make_trainer(tmp_path, progress=watcher)
    with pytest.raises(InterruptedRun, match=rf"{number.name} stopped it after step 3 of 8.*{advice}") as caught:
        trainer.fit()
    assert caught.value.exit_code == code
    assert trainer.run.saved_steps() == [3]
    assert not (tmp_path / "adapter").exists()
    assert signal.getsignal(number) == before


def test_slurms_warning_says_which_job_to_requeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    watcher = Watcher(lambda step: signal.raise_signal(signal.SIGUSR1))
    with pytest.raises(InterruptedRun, match=r"Requeue it \(scontrol requeue 4711\) with --resume in its command"):
        make_trainer(tmp_path, progress=watcher).fit()


def after_step_1(*numbers: signal.Signals) -> Watcher:
    """A progress that sends this process signals after its first step."""
    return Watcher(lambda step: [signal.raise_signal(number) for number in numbers] and None)


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mirrortune.system.signals.IMPATIENT_AFTER_SECONDS", 0.0)
    before = signal.getsignal(signal.SIGINT)
    trainer = make_trainer(tmp_path, progress=after_step_1(signal.SIGTERM, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert trainer.run.saved_steps() == []
    assert signal.getsignal(signal.SIGINT) == before


def test_the_same_ctrl_c_from_terminal_and_launcher_is_one(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, progress=after_step_1(signal.SIGINT, signal.SIGINT, signal.SIGTERM))
    with pytest.raises(InterruptedRun, match="SIGINT stopped it after step 1") as caught:
        trainer.fit()
    assert caught.value.exit_code == 130
    assert trainer.run.saved_steps() == [1]


# 20 validation rows are scored in two batches, 16 and 4.
def test_a_signal_stops_an_evaluation(tmp_path: Path) -> None:
    watcher = terminate_after_rows(16)
    trainer = make_trainer(tmp_path, progress=watcher)
    with pytest.raises(InterruptedRun, match="SIGTERM stopped it after step 4 of 8"):
        trainer.fit()
    assert watcher.evaluated == 16
    assert trainer.run.saved_steps() == [4]
    assert trainer.run.load_checkpoint(4)[0].owes_evaluation
    assert trainer.bare_model.training
    again = make_trainer(tmp_path, fresh=False)
    again.resume()
    again.fit()
    assert [event["step"] for event in events(tmp_path, "evaluate")] == [4, 8]


def test_a_signal_in_the_last_evaluation_is_honoured_too(tmp_path: Path) -> None:
    with pytest.raises(InterruptedRun, match="after step 8 of 8"):
        make_trainer(tmp_path, progress=terminate_after(8)).fit()
    watcher = Watcher()
    trainer = make_trainer(tmp_path, fresh=False, progress=watcher)
    trainer.resume()
    assert trainer.fit().global_step == 8
    assert watcher.losses == []
    assert watcher.evaluated == 20
    assert (tmp_path / "adapter").is_dir()


class Blocks:
    """A stream of blocks, each one number."""

    source = "numbers"

    def blocks(self, *, start: Place, **_: int) -> Iterator[tuple[Place, pa.Table]]:
        for number in itertools.count(start.row):
            yield Place(row=number), pa.table({"number": [number]})


def differs_when_resumed(trainer: Callable[..., Trainer], folder: Path) -> list[str]:
    """Resume the broken run ``run``, and return in which files it then differs from an unbroken one."""
    again = trainer("run", fresh=False)
    again.resume()
    again.fit()
    torch.manual_seed(0)
    trainer("whole").fit()
    return differences(folder / "whole", folder / "run")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_rows_of_a_stream_that_cannot_be_read_lose_no_step(tmp_path: Path, num_workers: int) -> None:
    """Each block is three steps of two micro-batches; the third block fails once."""
    fails = [False, False, True]

    def encode(table: pa.Table, seed: int) -> TokenExamples:
        number = table["number"][0].as_py()
        if number == 2 and fails.pop():
            raise HubError("numbers", "the connection was lost", fix="Try again")
        return sentences(24, number)

    def trainer(name: str, *, fresh: bool = True) -> Trainer:
        rows = StreamedExamples(stream=cast("Any", Blocks()), encode=encode, block_rows=24)
        settings = {"batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 8, "num_workers": num_workers}
        adapted = adapt(model=tiny_bert(dropout=0.3), trained=None)
        return make_trainer(tmp_path / name, adapted=adapted, train=rows, fresh=fresh, keep=9, **settings)

    torch.manual_seed(0)
    with pytest.raises(HubError) as caught:
        trainer("run").fit()
    place = tmp_path / "run/checkpoints/step-000006"
    advice = f"Try again. Step 6 is saved in {place}: continue with the same command and --resume."
    assert str(caught.value).endswith(advice)
    assert differs_when_resumed(trainer, tmp_path) == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_row_that_fails_in_the_middle_of_a_step_leaves_the_last_step_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    """The second of the two micro-batches of step 4 fails once."""
    rows, plain, fails = sentences(48, 0), TokenExamples.batch, [True]

    def trainer(name: str, *, fresh: bool = True) -> Trainer:
        settings = {"batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 6, "num_workers": num_workers}
        adapted = adapt(model=tiny_bert(dropout=0.3), trained=None)
        return make_trainer(tmp_path / name, adapted=adapted, train=rows, fresh=fresh, keep=9, **settings)

    batches = epoch_batches(rows.lengths, 8, trainer("probe").feed.seed, 0, None, None)
    parts = [p for b in batches for p in micro_batches(b, rows.lengths, num_micro=2, num_ranks=1, rank=0)]

    def batch(self: TokenExamples, numbers: Any, *rest: Any, **more: Any) -> Any:
        if self is rows and fails and [*map(int, numbers)] == [*map(int, parts[7])]:
            fails.clear()
            raise DataError("cat.png", "cannot be read")
        return plain(self, numbers, *rest, **more)

    monkeypatch.setattr(TokenExamples, "batch", batch)
    torch.manual_seed(0)
    with pytest.raises(DataError, match="Step 3 is saved"):
        trainer("run").fit()
    assert differs_when_resumed(trainer, tmp_path) == []


def test_validation_rows_that_cannot_be_read_lose_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise DataError("cat.png", "it cannot be read")

    monkeypatch.setattr("mirrortune.training.trainer.evaluate_split", fail)
    with pytest.raises(DataError, match=r"cannot be read\. Step 4 is saved in"):
        make_trainer(tmp_path).fit()
    monkeypatch.undo()
    again = make_trainer(tmp_path, fresh=False)
    again.resume()
    again.fit()
    assert [event["step"] for event in events(tmp_path, "evaluate")] == [4, 8]


def test_the_time_of_all_parts_of_a_resumed_run_counts(tmp_path: Path) -> None:
    with pytest.raises(InterruptedRun):
        make_trainer(tmp_path, progress=terminate_after(3)).fit()
    before = make_trainer(tmp_path, fresh=False).run.load_checkpoint(3)[0]
    assert before.train_seconds > 0
    second = make_trainer(tmp_path, fresh=False)
    second.resume()
    result = second.fit()
    assert result.train_seconds == pytest.approx(before.train_seconds + sum(second.clock.seconds()))
    assert result.samples_per_second == pytest.approx(60 / result.train_seconds)

    third = make_trainer(tmp_path, fresh=False)
    third.resume()
    assert third.fit() == result  # nothing is left to do, so nothing is measured


@pytest.mark.parametrize("step", [4, 8])
def test_a_signal_while_saving_waits_for_the_checkpoint(tmp_path: Path, step: int) -> None:
    trainer = make_trainer(tmp_path, eval_every_steps=99, save_every_steps=4)
    write = trainer.snapshots.write_adapter_files

    def warned(folder: Path) -> None:
        if trainer.state.global_step == step:
            signal.raise_signal(signal.SIGTERM)
        write(folder)

    trainer.snapshots.write_adapter_files = warned
    if step == 4:
        with pytest.raises(InterruptedRun, match="after step 4 of 8"):
            trainer.fit()
    else:
        trainer.fit()  # all that is left is to publish
    assert trainer.run.saved_steps()[-1] == step
    assert not trainer.run.load_checkpoint(step)[0].is_interim


def test_checkpoints_are_kept_as_asked(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, save_every_steps=1, eval_every_steps=99, keep=3)
    trainer.fit()
    assert trainer.run.saved_steps() == [6, 7, 8]


def rigged(trainer: Trainer, scores: list[float], monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """A loop whose evaluations, in turn, have these accuracies."""
    from dataclasses import replace

    import mirrortune.training.trainer
    from mirrortune.training.evaluate import evaluate_split

    given = iter(scores)

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        return replace(evaluate_split(*args, **kwargs), metrics={"accuracy": next(given), "loss": 0.5})

    monkeypatch.setattr(mirrortune.training.trainer, "evaluate_split", evaluate)
    return trainer


@pytest.mark.parametrize(
    ("patience", "scores", "steps", "best"),
    [
        (1, [0.5, 0.6, 0.6], 3, 2),  # as good is not better
        (2, [0.5, 0.4, 0.6, 0.5, 0.5], 5, 3),
        (3, [0.5, 0.4, 0.4, 0.4], 4, 1),
        (9, [0.5] * 8, 8, 1),
    ],
)
def test_patience_ends_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: int, scores: list[float], steps: int, best: int
) -> None:
    trainer = make_trainer(tmp_path, eval_every_steps=1, save_every_steps=99, patience=patience)
    result = rigged(trainer, scores, monkeypatch).fit()
    assert (result.global_step, result.best_step, result.stopped_early) == (steps, best, steps < 8)
    assert trainer.run.saved_steps() == sorted({best, steps})
    assert (tmp_path / "adapter").is_dir()


def test_patience_survives_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"eval_every_steps": 1, "patience": 3}
    first = make_trainer(tmp_path, progress=terminate_after(3), **settings)
    with pytest.raises(InterruptedRun):  # before the third evaluation
        rigged(first, [0.5, 0.4], monkeypatch).fit()
    second = make_trainer(tmp_path, fresh=False, **settings)
    second.resume()
    result = rigged(second, [0.3, 0.2], monkeypatch).fit()
    assert (result.global_step, result.best_step) == (4, 1)
    third = make_trainer(tmp_path, fresh=False, **settings)
    third.resume()
    assert third.fit().global_step == 4


def test_training_works_outside_of_the_main_thread(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    trainer = make_trainer(tmp_path, max_steps=1)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(trainer.fit).result().global_step == 1


def interrupted(folder: Path) -> Path:
    """A run directory that was terminated after step 3."""
    with pytest.raises(InterruptedRun):
        make_trainer(folder, progress=terminate_after(3)).fit()
    return folder


def test_resuming_says_where_it_goes_on(tmp_path: Path) -> None:
    watcher = Watcher()
    trainer = make_trainer(interrupted(tmp_path / "run"), fresh=False, progress=watcher)
    trainer.resume()
    trainer.fit()
    assert watcher.started == [(8, 3)]
    assert len(watcher.losses) == 5


def test_resuming_a_finished_run_publishes_it_again(tmp_path: Path) -> None:
    first = make_trainer(tmp_path / "run").fit()
    data = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    (tmp_path / "run" / "adapter" / "adapter.json").unlink()
    trainer = make_trainer(tmp_path / "run", fresh=False)
    trainer.resume()
    again = trainer.fit()
    assert (again.metrics, again.best_step, again.global_step) == (first.metrics, first.best_step, first.global_step)
    assert again == first
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == data
    read_adapter(tmp_path / "run" / "adapter")


def test_resuming_with_other_processes_is_refused(tmp_path: Path) -> None:
    first = make_trainer(tmp_path, progress=terminate_after(3))
    first.state.num_processes = 2
    with pytest.raises(InterruptedRun):
        first.fit()
    with pytest.raises(ConfigError, match=r"^--resume: the checkpoint is of 2 processes.*Launch 2 processes"):
        make_trainer(tmp_path, fresh=False).resume()


def test_resuming_in_another_basis_is_refused(tmp_path: Path) -> None:
    folder = interrupted(tmp_path)
    adapted = adapt(trained=None)
    layer = adapted.model.get_submodule("bert.encoder.layer.0.attention.self.query")
    with torch.no_grad():  # another decomposition of the same weight, as another machine may compute it
        layer.get_parameter("U")[:, ::2] *= -1
        layer.get_parameter("Vh")[::2] *= -1
    with pytest.raises(VerificationError, match=r"self\.query: the model holds another basis of this weight"):
        make_trainer(folder, adapted=adapted, fresh=False).resume()


def test_resuming_from_a_damaged_adapter_is_refused(tmp_path: Path) -> None:
    folder = interrupted(tmp_path / "run")
    path = folder / "checkpoints" / "step-000003" / "adapter.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(VerificationError, match=r"step-000003.*damaged"):
        make_trainer(folder, fresh=False).resume()


def test_gradients_are_clipped_to_the_norm(tmp_path: Path) -> None:
    """With plain constant steps and a tiny norm, AdamW's first step is still the learning rate times the sign."""
    norms = []
    for limit in (1e9, 1e-3):
        adapted = adapt(trained=None)
        make_trainer(tmp_path / str(limit), adapted=adapted, max_steps=1, max_grad_norm=limit).fit()
        norms.append(events(tmp_path / str(limit), "train")[0]["grad_norm"])
    assert norms[0] == norms[1] > 1e-3  # what is logged is the norm before clipping


def test_gradients_are_multiplied_in_one_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    multiply, found = torch._foreach_mul_, set()

    def multiplied(gradients: list[torch.Tensor], factor: torch.Tensor) -> None:
        found.update((gradient.dtype, factor.dtype) for gradient in gradients)
        multiply(gradients, factor)

    monkeypatch.setattr(torch, "_foreach_mul_", multiplied)
    make_trainer(tmp_path, max_steps=1).fit()
    assert found == {(torch.float32, torch.float32)}, (
        "CUDA has one for all gradients only where the factor is like them"
    )


def test_one_row_can_be_trained_on(tmp_path: Path) -> None:
    result = make_trainer(tmp_path, train=sentences(1), batch_size=4, gradient_accumulation_steps=3).fit()
    assert result.global_step == 2


def test_the_model_is_scored_before_its_first_step(tmp_path: Path) -> None:
    watcher = Watcher()
    result = make_trainer(tmp_path / "run", eval_before=True, progress=watcher).fit()
    first, *others = events(tmp_path / "run", "evaluate")
    assert (first["step"], first["epoch"]) == (0, 0)
    assert [event["step"] for event in others] == [4, 8]
    assert result.metrics_before == {name: first[name] for name in ("accuracy", "loss")}
    assert result.best_step in (4, 8)
    assert watcher.evaluated == 60
    assert make_trainer(tmp_path / "without").fit().metrics_before is None


def test_scoring_before_the_first_step_moves_nothing_that_follows(tmp_path: Path) -> None:
    """Not even for a model that draws random numbers in evaluation mode, as some of recordings do."""

    def losses(folder: str, *, eval_before: bool) -> list[float]:
        torch.manual_seed(0)
        adapted, watcher = adapt(trained=None, model=tiny_bert(dropout=0.2)), Watcher()
        adapted.model.register_forward_pre_hook(lambda *_: torch.rand(()) and None)
        make_trainer(tmp_path / folder, adapted=adapted, progress=watcher, eval_before=eval_before).fit()
        return watcher.losses

    assert losses("before", eval_before=True) == losses("not", eval_before=False)


def test_a_run_stopped_before_its_first_checkpoint_keeps_the_one_it_would_replace(tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", max_steps=1).fit()
    kept = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    run = RunDirectory(tmp_path / "run")
    with run.held([], overwrite=True, resume=False):
        run.create(overwrite=True)
        trainer = make_trainer(run.path, fresh=False, eval_before=True, progress=terminate_after_rows(16))
        words = r"before its first step, and the run that it would have replaced is kept\. Start again with"
        with pytest.raises(InterruptedRun, match=words):
            trainer.fit()
    assert (run.path / "metrics.jsonl").read_bytes() == kept


def test_a_resumed_run_is_scored_before_its_first_step_once(tmp_path: Path) -> None:
    with pytest.raises(InterruptedRun, match="SIGTERM stopped it before its first step"):
        make_trainer(tmp_path / "run", eval_before=True, progress=terminate_after_rows(16)).fit()
    again = make_trainer(tmp_path / "run", eval_before=True, progress=terminate_after(3), fresh=False)
    again.resume()
    with pytest.raises(InterruptedRun, match="after step 3 of 8"):
        again.fit()
    last = make_trainer(tmp_path / "run", eval_before=True, fresh=False)
    last.resume()
    result = last.fit()
    make_trainer(tmp_path / "whole", eval_before=True).fit()
    assert [event["step"] for event in events(tmp_path / "run", "evaluate")] == [0, 4, 8]
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert result.metrics_before is not None


def test_a_killed_run_without_a_checkpoint_begins_its_log_anew(tmp_path: Path) -> None:
    run = make_trainer(tmp_path, eval_before=True).run
    run.log({"event": "evaluate", "split": "validation", "step": 0, "epoch": 0, "accuracy": 0.5, "loss": 1.0})
    again = make_trainer(tmp_path, eval_before=True, fresh=False)
    again.resume()
    again.fit()
    assert [event["step"] for event in events(tmp_path, "evaluate")] == [0, 4, 8]


def test_the_first_step_is_shown_and_then_one_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watcher = Watcher()
    make_trainer(tmp_path / "fast", progress=watcher, log_every_steps=99).fit()
    assert watcher.shown == [1]
    assert sum(n or 0 for n in watcher.tokens) == 2 * int(sentences(30).lengths.sum())

    clock = iter(range(0, 10_000, 4))  # four seconds a look
    monkeypatch.setattr("mirrortune.training.trainer.time.monotonic", lambda: next(clock))
    slow = Watcher()
    make_trainer(tmp_path / "slow", progress=slow, log_every_steps=99).fit()
    assert slow.shown[0] == 1
    assert 1 < len(slow.shown) < 8
    logs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("fast", "slow")]
    assert logs[0] == logs[1], "what is shown leaves no trace in the log"


def test_a_first_signal_is_answered_at_once(tmp_path: Path) -> None:
    watcher = after_step_1(signal.SIGINT)
    with pytest.raises(InterruptedRun):
        make_trainer(tmp_path, progress=watcher).fit()
    assert watcher.signals == [signal.SIGINT]
    assert signal.set_wakeup_fd(-1) == -1, "as it was"


def test_a_signal_is_answered_while_the_main_thread_is_busy(tmp_path: Path) -> None:
    """Python's own handler waits until a product or a backward pass returns, which takes long where stopping counts."""
    answered: list[float] = []
    returned: list[float] = []

    def busy(step: int) -> None:
        if step == 1:
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 400_000)  # some tenths of a second without Python
            returned.append(time.monotonic())

    watcher = Watcher(busy)
    watcher.on_signal = lambda number: answered.append(time.monotonic())  # type: ignore[method-assign]
    with pytest.raises(InterruptedRun, match="after step 1"):
        make_trainer(tmp_path, progress=watcher).fit()
    assert answered[0] < returned[0]


def test_events_of_a_device_are_let_go_of_at_every_line_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    living: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            living.add(self)

        def record(self) -> None:
            nonlocal most
            most = max(most, len(living))

        def synchronize(self) -> None:
            """Nothing: a fake."""

        def elapsed_time(self, other: Event) -> float:
            return 1000.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    trainer = make_trainer(tmp_path, log_every_steps=2, epochs=10)
    trainer.clock = StepClock(torch.device("cuda"))
    result = trainer.fit()
    assert result.global_step == 40
    assert result.train_seconds == 40
    assert most <= 6


@pytest.mark.parametrize("method", ["mirror", "full"])
def test_running_statistics_are_those_of_the_saved_adapter(tmp_path: Path, method: str) -> None:
    def adapted() -> Adapted:
        return adapt(AdapterSpec(method=method), model=normed_bert(), trained=None)

    settings: dict[str, Any] = {"lr": 1e-3, "eval_every_steps": 2, "save_every_steps": 2, "eval_before": True}
    whole = make_trainer(tmp_path / "whole", adapted=adapted(), **settings)
    whole.fit()
    with pytest.raises(InterruptedRun):
        make_trainer(tmp_path / "cut", adapted=adapted(), progress=terminate_after(3), **settings).fit()
    resumed = make_trainer(tmp_path / "cut", adapted=adapted(), fresh=False, **settings)
    resumed.resume()
    resumed.fit()
    ends = [dict(trainer.bare_model.named_buffers()) for trainer in (whole, resumed)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert events(tmp_path / "whole", "evaluate") == events(tmp_path / "cut", "evaluate")

    loaded = adapted()
    read_adapter(tmp_path / "whole" / "adapter").restore(loaded.model)
    scored = evaluate_split(
        loaded.model, whole.task, whole.validation, whole.accelerator, batch_size=16, source="validation"
    )
    assert whole.best_result is not None
    assert scored.metrics == whole.best_result.metrics
    before = dict(normed_bert().named_buffers())
    moved = {name.partition(".")[0] for name, value in before.items() if not torch.equal(value, ends[0][name])}
    assert moved == ({"bert", "classifier"} if method == "full" else {"classifier"})
