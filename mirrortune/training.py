# SPDX-License-Identifier: Apache-2.0
"""The loop: when to step, evaluate, save and stop. What decides the result is a function of seed and step alone."""

from __future__ import annotations

import math
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from mirrortune.adapters.inject import adapter_parameters, plain_parameters
from mirrortune.batching import epoch_batches
from mirrortune.checkpoint import (
    LoopState,
    RunDirectory,
    optimizer_tensors,
    random_tensors,
    restore_optimizer,
    restore_random,
)
from mirrortune.errors import ConfigError, DivergedError, InterruptedRun
from mirrortune.evaluation import evaluate_split
from mirrortune.examples import Examples
from mirrortune.metrics import METRICS
from mirrortune.optim import Schedule, build_optimizer, lr_factor
from mirrortune.signals import StopSignals
from mirrortune.stepping import NotFiniteError, Stepper, StepResult
from mirrortune.tasks import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    """Numbers of the loop, with the meanings and units of the recipe's ``train`` and ``eval`` sections."""

    lr: float
    head_lr: float
    batch_size: int
    gradient_accumulation_steps: int
    epochs: float
    max_steps: int | None
    schedule: Schedule
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    seed: int
    eval_every_steps: int | None
    save_every_steps: int | None
    log_every_steps: int
    eval_batch_size: int


class Progress(Protocol):
    """Who is told how the loop goes (``report.py``); called on the main process only."""

    def on_start(self, total_steps: int, done_steps: int) -> None:
        """The first step is about to run."""

    def on_step(self, step: int, loss: float, rows: int) -> None:
        """An optimizer step of ``rows`` rows was made; ``loss`` is its mean per item."""

    def on_log(self, event: dict[str, Any]) -> None:
        """An event was added to the log."""

    def on_evaluate(self, rows: int) -> None:
        """``rows`` more validation rows were scored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """What a finished loop achieved.

    Attributes:
        metrics: of the kept checkpoint, on the validation split.
        best_step, global_step: steps of the kept checkpoint, and in all.
        train_seconds: this process's time in optimizer steps, without evaluation and saving.
        samples_per_second: training rows a second over ``train_seconds``, all ranks together.
        median_step_seconds: of this process's optimizer steps, which a busy machine disturbs less than their mean.
    """

    metrics: dict[str, float]
    best_step: int
    global_step: int
    train_seconds: float
    samples_per_second: float
    median_step_seconds: float


class Trainer:
    """Fine-tunes an adapted model.

    Args:
        model: adapted, on any device; ``accelerator`` moves and wraps it.
        task: loss and metrics.
        train, validation: examples.
        settings: numbers of the loop.
        run: where events and checkpoints go.
        write_adapter_files: writes the adapter into a folder.
        accelerator: accelerate's, already made (it owns device, precision and processes).
        progress: who is told.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        train: Examples,
        validation: Examples,
        settings: LoopSettings,
        run: RunDirectory,
        write_adapter_files: Callable[[Path], object],
        accelerator: Any,
        progress: Progress,
    ) -> None:
        self.task, self.train, self.validation = task, train, validation
        self.settings, self.run, self.progress = settings, run, progress
        self.accelerator, self.write_adapter_files = accelerator, write_adapter_files
        self.global_batch_size = settings.batch_size * settings.gradient_accumulation_steps * accelerator.num_processes
        self.steps_per_epoch = math.ceil(len(train) / self.global_batch_size)
        planned = math.ceil(settings.epochs * self.steps_per_epoch)
        self.total_steps = min(planned, settings.max_steps or planned)
        optimizer = build_optimizer(model, lr=settings.lr, head_lr=settings.head_lr, weight_decay=settings.weight_decay)
        self.bare_model = model
        trained = {**adapter_parameters(model), **plain_parameters(model)}
        # Names from before wrapping: a checkpoint must not depend on how many processes wrote it.
        self._names = {id(p): n for n, p in trained.items()}
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.stepper = Stepper(
            self.model,
            self.optimizer,
            accelerator,
            task=task,
            examples=train,
            num_micro=settings.gradient_accumulation_steps,
            max_grad_norm=settings.max_grad_norm,
        )
        self.state = LoopState(num_processes=accelerator.num_processes)
        self._step_seconds: list[float] = []
        self._rows = 0
        self._stop = StopSignals()

    def resume(self) -> None:
        """Continue from the newest checkpoint of the run.

        Raises:
            ConfigError: if it was written by another number of processes.
            VerificationError: if it is damaged.
        """
        steps = self.run.saved_steps()
        if not steps:
            self._on_main(lambda: self.run.rewind_log(0))
            return
        state, tensors = self.run.load_checkpoint(steps[-1])
        if state.num_processes != self.accelerator.num_processes:
            raise ConfigError(
                "--resume",
                f"the checkpoint is of {state.num_processes} processes, this run has {self.accelerator.num_processes}",
                fix=f"Launch {state.num_processes} processes",
            )
        from mirrortune.adapter_file import read_adapter, restore_trained  # noqa: PLC0415

        restore_trained(self.bare_model, read_adapter(self.run.checkpoint(steps[-1])))
        restore_optimizer(self._torch_optimizer, self._names, tensors)
        prefix = f"random.{self.accelerator.process_index}."
        restore_random({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        self.state = state
        self._on_main(lambda: self.run.rewind_log(state.global_step))

    def fit(self) -> FitResult:
        """Run to the last step and publish the best checkpoint's adapter.

        Raises:
            DivergedError: on a loss or gradient that is not finite, before the step is made.
            InterruptedRun: after SIGINT or SIGTERM, once a checkpoint is saved.
            ResourceError: if a checkpoint cannot be written.
        """
        if self.accelerator.is_main_process:
            self.progress.on_start(self.total_steps, self.state.global_step)
        self.model.train()
        with self._stop:
            while self.state.global_step < self.total_steps:
                self._run_epoch()
        best_step, seconds = self.state.best_step, sum(self._step_seconds)
        assert best_step is not None
        assert self.state.best_metrics is not None
        self._on_main(lambda: self.run.publish_adapter(best_step))
        return FitResult(
            metrics=self.state.best_metrics,
            best_step=best_step,
            global_step=self.state.global_step,
            train_seconds=seconds,
            samples_per_second=self._rows / seconds if seconds else 0.0,
            median_step_seconds=statistics.median(self._step_seconds or [0.0]),
        )

    def _run_epoch(self) -> None:
        state = self.state
        batches = epoch_batches(self.train.lengths, self.global_batch_size, self.settings.seed, state.epoch)
        for batch in batches[state.step_in_epoch :]:
            started = time.perf_counter()
            try:
                done = self.stepper.step(batch, state.epoch, self._lr_factor(state.global_step))
            except NotFiniteError as error:
                raise self._diverged(self.state.global_step + 1, f"{error.problem}; the step was not made") from error
            self._step_seconds.append(time.perf_counter() - started)
            self._rows += len(batch)
            state.global_step += 1
            state.step_in_epoch += 1
            state.window_loss += done.loss_sum
            state.window_items += done.num_items
            ends_epoch = state.step_in_epoch == len(batches)
            if ends_epoch:
                state.epoch, state.step_in_epoch = state.epoch + 1, 0
            if self.accelerator.is_main_process:
                self.progress.on_step(state.global_step, done.loss_sum / done.num_items, len(batch))
            self._after_step(done, ends_epoch=ends_epoch)
            if state.global_step >= self.total_steps:
                return

    def _lr_factor(self, step: int) -> float:
        warmup = math.ceil(self.settings.warmup_ratio * self.total_steps)
        return lr_factor(step, total_steps=self.total_steps, warmup_steps=warmup, schedule=self.settings.schedule)

    def _after_step(self, done: StepResult, *, ends_epoch: bool) -> None:
        settings, step = self.settings, self.state.global_step
        is_last = step >= self.total_steps
        if is_last or step % settings.log_every_steps == 0:
            self._log_training(done.grad_norm)
        is_best = False
        if is_last or _is_due(step, settings.eval_every_steps, ends_epoch=ends_epoch):
            is_best = self._evaluate()
        if is_best or is_last or _is_due(step, settings.save_every_steps, ends_epoch=ends_epoch):
            self._save()
        stop_signal = self._agreed_stop_signal()
        if stop_signal and not is_last:
            if not self.run.checkpoint(step).exists():
                self._save()
            raise InterruptedRun(
                str(self.run.path),
                f"{signal.Signals(stop_signal).name} stopped it after step {step} of {self.total_steps}, which is safe",
                signal_number=stop_signal,
                fix="Continue with the same command and --resume",
            )

    def _evaluate(self) -> bool:
        """Score the validation split; whether it is the best so far."""
        state = self.state
        result = evaluate_split(
            self.bare_model,
            self.task,
            self.validation,
            self.accelerator,
            batch_size=self.settings.eval_batch_size,
            source="validation",
            on_batch=self.progress.on_evaluate if self.accelerator.is_main_process else None,
        )
        if not math.isfinite(result.metrics["loss"]):
            raise self._diverged(state.global_step, f"the validation loss is {result.metrics['loss']:g}")
        name = self.task.selection_metric
        value = result.metrics[name]
        sign = 1 if METRICS[name].higher_is_better else -1
        is_best = state.best_metric is None or sign * value > sign * state.best_metric
        if is_best:
            state.best_metric, state.best_step, state.best_metrics = value, state.global_step, result.metrics
        self._log({"event": "evaluate", "split": "validation", **self._position(), **result.metrics})
        return is_best

    def _log_training(self, grad_norm: float) -> None:
        state = self.state
        loss = state.window_loss / max(1, state.window_items)
        state.window_loss, state.window_items = 0.0, 0
        group = max(self.optimizer.param_groups, key=lambda g: float(g["peak_lr"]))  # a peak may be 0
        factor = group["lr"] / (group["peak_lr"] or 1.0)
        rates = {"lr": self.settings.lr * factor, "head_lr": self.settings.head_lr * factor}
        self._log({"event": "train", **self._position(), "loss": loss, **rates, "grad_norm": grad_norm})

    def _position(self) -> dict[str, float]:
        epoch = self.state.epoch + self.state.step_in_epoch / self.steps_per_epoch
        return {"step": self.state.global_step, "epoch": round(epoch, 6)}

    def _log(self, event: dict[str, Any]) -> None:
        def write() -> None:
            self.run.log(event)
            self.progress.on_log(event)

        self._on_main(write)

    def _save(self) -> None:
        states = {f"random.{self.accelerator.process_index}.{k}": v for k, v in random_tensors().items()}
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object  # noqa: PLC0415

            states = dict(gather_object(list(states.items())))
        tensors = {**optimizer_tensors(self._torch_optimizer, self._names), **states}
        self._on_main(lambda: self.run.save_checkpoint(self.state, tensors, self.write_adapter_files))

    def _diverged(self, step: int, problem: str) -> DivergedError:
        steps = self.run.saved_steps()
        good = (
            f"the last good checkpoint is {self.run.checkpoint(steps[-1])}" if steps else "there is no checkpoint yet"
        )
        return DivergedError(
            f"step {step}",
            f"{problem}, and {good}",
            fix="Lower --lr or --head-lr, or look at the rows for broken values; then start again or --resume",
        )

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer:
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        assert isinstance(inner, torch.optim.Optimizer)
        return inner

    def _on_main(self, action: Callable[[], object]) -> None:
        if self.accelerator.is_main_process:
            action()
        self.accelerator.wait_for_everyone()

    def _agreed_stop_signal(self) -> int:
        # A signal may reach one rank only; all must stop after the same step.
        if self.accelerator.num_processes == 1:
            return self._stop.number
        own = torch.tensor([self._stop.number], device=self.accelerator.device)
        return int(self.accelerator.gather(own).max())


def _is_due(step: int, every: int | None, *, ends_epoch: bool) -> bool:
    return ends_epoch if every is None else step % every == 0
