# SPDX-License-Identifier: Apache-2.0
"""Define the interface of the training loop: its settings, its observer, and its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from mirrortune.training.optim import Betas, OptimizerName, OptimizerSettings
from mirrortune.training.schedules import Schedule, whole_steps


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    """Settings of the loop, with the meanings and units of the recipe's ``train`` and ``eval`` sections.

    ``eval_batch_size``, ``eval_max_positions`` and ``eval_before`` depend on the data and the model and are set when
    these are known.
    """

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
    keep: int
    patience: int | None
    num_workers: int
    eval_batch_size: int = 64
    eval_max_positions: int | None = None
    eval_before: bool = False
    warmup_steps: int | None = None
    min_lr_ratio: float = 0.0
    num_cycles: int = 2
    decay_ratio: float = 0.1
    optimizer: OptimizerName = "adamw"
    betas: Betas | None = None
    eps: float | None = None
    momentum: float | None = None
    neftune_alpha: float | None = None
    also_train_lr: float = 1e-4

    @property
    def optimizer_settings(self) -> OptimizerSettings:
        """The optimizer and its hyperparameters."""
        return OptimizerSettings(name=self.optimizer, betas=self.betas, eps=self.eps, momentum=self.momentum)

    def total_steps(self, steps_per_epoch: int | None) -> tuple[int, int]:
        """Return the number of steps of the run and of each epoch.

        The length of a stream is unknown, ``steps_per_epoch`` is None, and all its steps are one epoch.
        """
        if steps_per_epoch is None:
            assert self.max_steps is not None
            return self.max_steps, self.max_steps
        planned = max(1, whole_steps(self.epochs * steps_per_epoch))
        return min(planned, self.max_steps or planned), steps_per_epoch


class Progress(Protocol):
    """An observer of a training loop, called only on the main process."""

    def on_start(self, total_steps: int, done_steps: int) -> None:
        """Called before the first step."""

    def on_step(self, step: int, rows: int, tokens: int | None) -> None:
        """Called when an optimizer step is done, or queued on the device; ``tokens`` is None unless rows are text."""

    def on_show(self, step: int, epoch: float, loss: float) -> None:
        """Called for a step that is not logged but worth showing: the first one, and others if steps are slow.

        ``loss`` is the mean loss of the step.
        """

    def on_log(self, event: dict[str, Any]) -> None:
        """Called after an event was added to the log."""

    def on_evaluate(self, rows: int) -> None:
        """Called after ``rows`` further validation rows were scored."""

    def on_signal(self, number: int) -> None:
        """Called in a separate thread when a signal asks the loop to stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """The result of a finished loop.

    Attributes:
        metrics: metrics of the kept checkpoint on the validation split.
        metrics_before: these metrics before the first step; None if the model was not scored then.
        best_step: step of the kept checkpoint.
        global_step: total number of steps.
        stopped_early: patience ended the loop.
        train_seconds: time that the first process or its GPU spent on optimizer steps, excluding evaluation and saving,
            over all parts of a resumed run.
        samples_per_second: training rows per second of ``train_seconds``, over all ranks.
        tokens_per_second: tokens per second, excluding padding, over all ranks; None for rows that are not text.
        median_step_seconds: median time of the optimizer steps since the last resumption that made any; less sensitive
            to a busy machine than the mean.
        padding_share: share of padding in the first process's input positions; None for rows that are not text.
        skipped_steps: number of steps skipped because gradients overflowed in float16.
    """

    metrics: dict[str, float]
    metrics_before: dict[str, float] | None
    best_step: int
    global_step: int
    stopped_early: bool
    train_seconds: float
    samples_per_second: float
    tokens_per_second: float | None
    median_step_seconds: float
    skipped_steps: int
    padding_share: float | None = None
