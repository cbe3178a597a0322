# SPDX-License-Identifier: Apache-2.0
"""What the training loop is told and what it tells: its settings, who watches it, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from mirrortune.training.optim import Schedule


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
    keep: int
    patience: int | None
    num_workers: int
    eval_batch_size: int = 64
    eval_max_positions: int | None = None
    eval_before: bool = False


class Progress(Protocol):
    """Who is told how the loop goes (``report.py``); called on the main process only."""

    def on_start(self, total_steps: int, done_steps: int) -> None:
        """The first step is about to run."""

    def on_step(self, step: int, rows: int, tokens: int | None) -> None:
        """An optimizer step of ``rows`` rows was made, or is waiting in the device's queue; ``tokens`` of text."""

    def on_show(self, step: int, epoch: float, loss: float) -> None:
        """A step that the log has no line for is worth showing: the first one, and one now and then where steps are
        slow. ``loss`` is its own mean.
        """

    def on_log(self, event: dict[str, Any]) -> None:
        """An event was added to the log."""

    def on_evaluate(self, rows: int) -> None:
        """``rows`` more validation rows were scored."""

    def on_signal(self, number: int) -> None:
        """A signal asks the loop to stop; called in a thread of its own, as soon as it arrives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """What a finished loop achieved.

    Attributes:
        metrics: of the kept checkpoint, on the validation split.
        metrics_before: the same of the model before its first step; None if it was not scored.
        best_step, global_step: steps of the kept checkpoint, and in all.
        stopped_early: whether patience ended the loop.
        train_seconds: this process's (or its GPU's) time in optimizer steps, without evaluation and saving.
        samples_per_second: training rows a second over ``train_seconds``, all ranks together.
        tokens_per_second: the same of tokens without padding; None for rows that are not text.
        median_step_seconds: of this process's optimizer steps, which a busy machine disturbs less than their mean.
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
