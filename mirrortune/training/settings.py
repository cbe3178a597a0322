# SPDX-License-Identifier: Apache-2.0
"""The interface of the training loop: its settings, the observer of its progress, and its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from mirrortune.training.optim import Betas, OptimizerName, OptimizerSettings
from mirrortune.training.schedules import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    """Settings of the loop, with the meanings and units of the recipe's ``train`` and ``eval`` sections.

    The three of evaluations depend on the data and the model, and are set once these are known.
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

    @property
    def optimizer_settings(self) -> OptimizerSettings:
        """The optimizer and its numbers."""
        return OptimizerSettings(name=self.optimizer, betas=self.betas, eps=self.eps, momentum=self.momentum)


class Progress(Protocol):
    """Observer of a training loop; called on the main process only."""

    def on_start(self, total_steps: int, done_steps: int) -> None:
        """Called before the first step."""

    def on_step(self, step: int, rows: int, tokens: int | None) -> None:
        """Called when an optimizer step is done or queued on the device; ``tokens`` is None unless rows are text."""

    def on_show(self, step: int, epoch: float, loss: float) -> None:
        """Called for a step to be shown between lines of the log: the first one, and others where steps are slow.

        ``loss`` is the mean loss of that step.
        """

    def on_log(self, event: dict[str, Any]) -> None:
        """Called when an event was added to the log."""

    def on_evaluate(self, rows: int) -> None:
        """Called when ``rows`` more validation rows were scored."""

    def on_signal(self, number: int) -> None:
        """Called in a separate thread as soon as a signal asks the loop to stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """The result of a finished loop.

    Attributes:
        metrics: metrics of the kept checkpoint on the validation split.
        metrics_before: the same metrics before the first step; None if the model was not scored then.
        best_step, global_step: step of the kept checkpoint, and number of steps in all.
        stopped_early: whether patience ended the loop.
        train_seconds: time of this process (or its GPU) in optimizer steps, without evaluation and saving.
        samples_per_second: training rows per second of ``train_seconds``, over all ranks.
        tokens_per_second: tokens per second without padding, over all ranks; None for rows that are not text.
        median_step_seconds: median time of an optimizer step of this process; a busy machine disturbs it less than
            the mean.
        padding_share: share of the input positions of this process that were padding; None for rows that are not text.
        skipped_steps: steps that were left out because gradients overflowed in float16.
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
