# SPDX-License-Identifier: Apache-2.0
"""Run the training loop: decide when to step, evaluate, save and stop, by the seed and the step alone."""

from __future__ import annotations

import math
import signal
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from mirrortune.adapters.inject import attachment, trained_buffers
from mirrortune.data.draws import SourceDraws
from mirrortune.data.examples import Examples
from mirrortune.data.loader import Feed, StreamedExamples
from mirrortune.errors import DataError, DivergedError, HubError, InterruptedRun, MirrortuneError
from mirrortune.system.distributed import sync
from mirrortune.system.distributed.sharding import whole_parameters
from mirrortune.system.run_directory import LoopState, RunDirectory
from mirrortune.system.signals import StopSignals, ends_as, how_to_go_on
from mirrortune.tasks.base import Task
from mirrortune.tasks.metrics import METRICS
from mirrortune.tasks.objective import Objective
from mirrortune.training.accumulator import StepClock, Tally, Totals
from mirrortune.training.evaluate import EvalResult, EvaluationStoppedError, evaluate_split
from mirrortune.training.neftune import add_noise
from mirrortune.training.optim import averaged_weights, build_optimizer
from mirrortune.training.schedules import lr_factor, whole_steps
from mirrortune.training.settings import FitResult, LoopSettings, Progress
from mirrortune.training.snapshots import (
    FrozenBuffers,
    Snapshots,
    random_states_kept,
    random_tensors,
    restore_random,
)
from mirrortune.training.step import Stepper, StepResult, make_update

_SHOW_AFTER_SECONDS = 10.0
"""Seconds without a logged event after which the latest step is shown."""
_MOST_SKIPPED = 20
"""Consecutive steps with overflowing gradients after which training stops; they divide the loss scale by a million."""


def _optimizer_of(model: nn.Module, settings: LoopSettings) -> Optimizer:
    return build_optimizer(
        model, lr=settings.lr, head_lr=settings.head_lr, weight_decay=settings.weight_decay,
        settings=settings.optimizer_settings, also_train_lr=settings.also_train_lr,
    )  # fmt: skip


class Trainer:
    """Fine-tunes an adapted model.

    Args:
        model: adapted model on any device; ``accelerator`` moves and wraps it.
        task: task, which defines loss and metrics.
        train: training rows.
        validation: validation rows.
        settings: settings of the loop.
        run: directory of events and checkpoints.
        write_adapter_files: writes the adapter into a folder.
        accelerator: accelerate's ``Accelerator``, which determines device, precision and processes.
        progress: observer.
        objective: training loss; that of the task by default.
        sample: called on all ranks with the step at each evaluation, to record what the model generates.
        draws: what an epoch draws from each source of a mixture.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        train: Examples | StreamedExamples,
        validation: Examples,
        settings: LoopSettings,
        run: RunDirectory,
        write_adapter_files: Callable[[Path], object],
        accelerator: Any,
        progress: Progress,
        objective: Objective | None = None,
        sample: Callable[[int], object] | None = None,
        draws: SourceDraws | None = None,
    ) -> None:
        self.task, self.train, self.validation = task, train, validation
        self.settings, self.run, self.progress = settings, run, progress
        objective = objective or Objective(task)
        self.accelerator, self.sample = accelerator, sample
        self.feed = Feed(
            train, accelerator, batch_size=settings.batch_size, num_micro=settings.gradient_accumulation_steps,
            num_workers=settings.num_workers, seed=settings.seed, classes=objective.classes,
            draws=draws,
        )  # fmt: skip
        self.total_steps, self.steps_per_epoch = settings.total_steps(self.feed.steps_per_epoch)
        self.tally, self.clock = Tally(accelerator.device), StepClock(accelerator.device)
        optimizer = _optimizer_of(model, settings)
        if settings.neftune_alpha is not None:
            add_noise(model, settings.neftune_alpha)
        self.bare_model, self.has_head = model, bool(attachment(model).targets.head)
        self.model, self.optimizer, self.update = make_update(
            model, optimizer, accelerator, self.tally,
            max_grad_norm=settings.max_grad_norm, num_micro=settings.gradient_accumulation_steps,
        )  # fmt: skip
        self.frozen = FrozenBuffers(model)
        self.snapshots = Snapshots(
            model, self.optimizer.optimizer, accelerator, run=run, write_adapter_files=write_adapter_files,
            keep=settings.keep, update=self.update,
        )  # fmt: skip
        self.stepper = Stepper(
            self.model, self.optimizer, self.update, accelerator, objective=objective, tally=self.tally,
            num_micro=settings.gradient_accumulation_steps, batch_size=settings.batch_size,
        )  # fmt: skip
        self.state = LoopState(num_processes=accelerator.num_processes)
        self.best_result: EvalResult | None = None  # None also if the best evaluation precedes the resumption
        self._seconds_before = 0.0  # of the steps before the resumption
        self._shown_at = -math.inf
        self._signals = StopSignals(progress.on_signal if accelerator.is_main_process else None)
        self._vote = sync.StopVote(accelerator, self._signals)

    def resume(self) -> None:
        """Continue from the newest checkpoint of the run, or start from the beginning if there is none.

        Raises:
            ConfigError: the checkpoint was written by a different number of processes.
            VerificationError: the checkpoint is damaged.
        """
        self.state = self.snapshots.restore() or self.state
        self.tally.open_window(self.state.window_loss, self.state.window_items)
        self._seconds_before = self.state.train_seconds
        self.feed.num_tokens, self.feed.num_positions = self.state.num_tokens, self.state.num_positions
        if self.state.places is not None:
            self.feed.place = self.state.places[self.accelerator.process_index]

    def fit(self) -> FitResult:
        """Train to the last step or until patience is exhausted, and publish the adapter of the best checkpoint.

        Raises:
            DivergedError: a loss or gradient was not finite; that step was not applied.
            InterruptedRun: a signal asked to stop; a checkpoint was saved.
            ResourceError: a checkpoint cannot be written.
        """
        state = self.state
        if self.accelerator.is_main_process:
            self.progress.on_start(self.total_steps, state.global_step)
        self.model.train()
        with self._signals:
            if self.settings.eval_before and state.global_step == 0:
                self._evaluate_before()
            if state.owes_evaluation:
                self._finish_step()
            if not self._is_done():
                self._run_steps()
        self._vote.close()
        self._measure()
        best_step, seconds = state.best_step, state.train_seconds
        assert best_step is not None
        assert state.best_metrics is not None
        sync.from_main(self.accelerator, lambda: self.run.publish_adapter(best_step))
        return FitResult(
            metrics=state.best_metrics,
            metrics_before=sync.from_main(self.accelerator, self._metrics_before),
            best_step=best_step,
            global_step=state.global_step,
            stopped_early=state.global_step < self.total_steps,
            train_seconds=seconds,
            samples_per_second=state.rows / seconds if seconds else 0.0,
            tokens_per_second=state.tokens / seconds if state.tokens is not None and seconds else None,
            padding_share=1 - self.feed.num_tokens / self.feed.num_positions if self.feed.num_positions else None,
            median_step_seconds=state.median_step_seconds,
            skipped_steps=state.skipped_steps,
        )

    def _is_done(self) -> bool:
        return self.state.global_step >= self.total_steps or self._is_out_of_patience()

    def _is_out_of_patience(self) -> bool:
        patience = self.settings.patience
        return patience is not None and self.state.evaluations_since_best >= patience

    def _run_steps(self) -> None:
        state = self.state
        left = self.total_steps - state.global_step
        with closing(self.feed.micro_batches(state.epoch, state.step_in_epoch, left)) as micro_batches:
            while not self._is_done():
                self.clock.start()
                # Skipped steps do not advance the schedule.
                factor = self._lr_factor(state.global_step - state.skipped_steps)
                undo = self._undo()
                try:
                    done = self.stepper.step(state.global_step + 1, micro_batches, factor)
                except (DataError, HubError) as error:
                    undo()
                    self._save_before_failure(error)
                    raise
                self.frozen.restore()
                self.clock.stop()
                state.global_step += 1
                state.step_in_epoch += 1
                if state.step_in_epoch == self.steps_per_epoch:
                    state.epoch, state.step_in_epoch = state.epoch + 1, 0
                self._count(done)
                if state.global_step >= self.total_steps or state.global_step % self.settings.log_every_steps == 0:
                    self._log_training()
                elif self.accelerator.is_main_process:
                    self._show_if_due()
                self._finish_step()

    def _count(self, done: StepResult) -> None:
        """Count the rows and tokens of a step, and whether it was skipped.

        Raises:
            DivergedError: gradients overflow at every loss scale.
        """
        state = self.state
        state.rows += done.rows
        state.tokens = None if done.tokens is None else (state.tokens or 0) + done.tokens
        state.skipped_steps += not done.is_made
        state.skipped_in_a_row = 0 if done.is_made else state.skipped_in_a_row + 1
        if self.accelerator.is_main_process:
            self.progress.on_step(state.global_step, done.rows, done.tokens)
        if state.skipped_in_a_row >= _MOST_SKIPPED:
            problem = f"gradients overflowed in float16 in {_MOST_SKIPPED} steps in a row, down to a scale of"
            raise self._diverged(state.global_step, f"{problem} {self.update.scale:g}")

    def _show_if_due(self) -> None:
        """Show the latest step if nothing was logged for a while; the log itself must not depend on time."""
        if time.monotonic() - self._shown_at < _SHOW_AFTER_SECONDS:
            return
        reading = self.tally.read()
        if reading.is_finite:  # otherwise the next logged event raises on all processes
            self.progress.on_show(self.state.global_step, self._position()["epoch"], reading.loss)
        self._shown_at = time.monotonic()

    def _lr_factor(self, step: int) -> float:
        settings, warmup = self.settings, self.settings.warmup_steps
        if warmup is None:
            warmup = whole_steps(settings.warmup_ratio * self.total_steps)
        return lr_factor(
            step, total_steps=self.total_steps, warmup_steps=warmup, schedule=settings.schedule,
            min_lr_ratio=settings.min_lr_ratio, num_cycles=settings.num_cycles, decay_ratio=settings.decay_ratio,
        )  # fmt: skip

    def _finish_step(self) -> None:
        """Evaluate, save and stop if due. A run that was interrupted during an evaluation resumes here."""
        settings, state = self.settings, self.state
        is_last = state.global_step >= self.total_steps
        is_best = False
        if is_last or self._is_due(settings.eval_every_steps):
            try:
                is_best = self._evaluate()
            except EvaluationStoppedError:
                state.owes_evaluation = True
                self._stop()
            except (DataError, HubError) as error:
                state.owes_evaluation = True
                self._save_before_failure(error)
                raise
        if is_last or is_best or self._is_out_of_patience() or self._is_due(settings.save_every_steps):
            self._save()
        if not self._is_done() and self._vote.poll():
            self._stop()

    def _is_due(self, every: int | None) -> bool:
        ends_epoch = self.state.step_in_epoch == 0
        return ends_epoch if every is None else self.state.global_step % every == 0

    def _stop(self) -> None:
        step = self.state.global_step
        if self.snapshots.last_step != step:
            self._save(is_interim=True)
        number = self._vote.number
        where = f"after step {step} of {self.total_steps}, which is safe" if step else "before its first step"
        fix = how_to_go_on(number)
        if self.run.is_pending:  # there is no checkpoint, so --resume would continue the earlier run
            where += ", and the run that it would have replaced is kept"
            fix = "Start again with the same command"
        error = InterruptedRun(
            str(self.run.path),
            f"{signal.Signals(number).name} stopped it {where}",
            signal_number=ends_as(number),
            fix=fix,
            step=step,
        )
        raise sync.told_once(self.accelerator, error)

    def _undo(self) -> Callable[[], None]:
        """Return a function that takes back what an unfinished step has moved: the place in the rows, their counts and,
        if it has run some of its micro-batches, random states and running statistics.
        """
        feed, is_alone = self.feed, self.stepper.num_micro == 1
        place, counts = feed.place, (feed.num_tokens, feed.num_positions)
        drawn = {} if is_alone else random_tensors()
        buffers = [] if is_alone else list(trained_buffers(self.bare_model).values())
        values = [buffer.clone() for buffer in buffers]

        def undo() -> None:
            feed.num_tokens, feed.num_positions = counts
            if place is not None:
                feed.place = place
            if drawn:
                restore_random(drawn)
            for buffer, value in zip(buffers, values, strict=True):
                buffer.copy_(value)

        return undo

    def _save_before_failure(self, error: MirrortuneError) -> None:
        """Save the last complete step when the rows after it cannot be read, and name the checkpoint in the message.

        With several processes nothing is saved, as the others wait for this one in the middle of a step.
        """
        step = self.state.global_step
        if self.accelerator.num_processes > 1 or not step:
            return
        if self.snapshots.last_step != step:
            self._save(is_interim=True)
        advice = ": continue with the same command and --resume" if isinstance(error, HubError) else ""
        error.args = (f"{error} Step {step} is saved in {self.run.checkpoint(step)}{advice}.",)

    def _evaluate(self) -> bool:
        """Score the validation split, and return whether the result is the best so far.

        Raises:
            EvaluationStoppedError: a signal asked to stop.
        """
        state = self.state
        self._read_tally()
        result = self._score_validation()
        name = self.task.selection_metric
        value = result.metrics[name]
        sign = 1 if METRICS[name].higher_is_better else -1
        is_best = state.best_metric is None or sign * value > sign * state.best_metric
        if is_best:
            state.best_metric, state.best_step, state.best_metrics = value, state.global_step, result.metrics
            self.best_result = result
        state.evaluations_since_best = 0 if is_best else state.evaluations_since_best + 1
        state.owes_evaluation = False
        self._log_evaluation(result)
        return is_best

    def _evaluate_before(self) -> None:
        """Score the model before its first step, without changing the training that follows."""
        try:
            with random_states_kept():
                self._log_evaluation(self._score_validation())
        except EvaluationStoppedError:
            self._stop()

    def _score_validation(self) -> EvalResult:
        # Processes see other rows; the adapter that is saved has the statistics of the main one.
        sync.copy_from_main(self.accelerator, trained_buffers(self.bare_model).values())
        with averaged_weights(self.optimizer.optimizer):
            result = evaluate_split(
                self.bare_model,
                self.task,
                self.validation,
                self.accelerator,
                batch_size=self.settings.eval_batch_size,
                max_positions=self.settings.eval_max_positions,
                source="validation",
                num_workers=self.settings.num_workers,
                on_batch=self.progress.on_evaluate if self.accelerator.is_main_process else None,
                should_stop=self._vote.poll,
            )
        if not math.isfinite(result.metrics["loss"]):
            raise self._diverged(self.state.global_step, f"the validation loss is {result.metrics['loss']:g}")
        return result

    def _log_evaluation(self, result: EvalResult) -> None:
        with averaged_weights(self.optimizer.optimizer):
            if self.sample is not None:
                with random_states_kept():
                    self.sample(self.state.global_step)
            with whole_parameters(self.bare_model):  # for observers that read the angles of the cores
                self._log({"event": "evaluate", "split": "validation", **self._position(), **result.metrics})

    def _metrics_before(self) -> dict[str, float] | None:
        """Read the metrics before training from the log, since a resumed run may have measured them earlier."""
        found = next((e for e in self.run.events() if e["event"] == "evaluate"), None)
        if found is None or found["step"] > 0:
            return None
        return {name: value for name, value in found.items() if name not in ("event", "split", "step", "epoch")}

    def _log_training(self) -> None:
        reading = self._read_tally()
        if not reading.num_items:  # float16, and no loss in the window was finite
            return
        loss = reading.loss_sum / reading.num_items
        group = max(self.optimizer.param_groups, key=lambda g: float(g["peak_lr"]))  # a peak may be 0
        factor = group["lr"] / (group["peak_lr"] or 1.0)
        rates = {"lr": self.settings.lr * factor}
        if self.has_head:
            rates["head_lr"] = self.settings.head_lr * factor
        scaled: dict[str, float] = {}
        if self.update.scale is not None:
            scaled = {"loss_scale": self.update.scale, "skipped_steps": self.state.skipped_steps}
        self._log(
            {"event": "train", **self._position(), "loss": loss, **rates, "grad_norm": reading.grad_norm, **scaled}
        )
        self.tally.open_window()
        self._shown_at = time.monotonic()

    def _read_tally(self) -> Totals:
        """Return the sums of the steps so far; raise DivergedError if a step was not finite."""
        reading = self.tally.read()
        self.clock.drain()
        if not reading.is_finite:
            loss, norm = f"{reading.loss:g}", f"{reading.grad_norm:g}"
            raise self._diverged(
                reading.step, f"the training loss is {loss} and the gradient norm {norm}; the step was not taken"
            )
        return reading

    def _measure(self) -> None:
        """Bring the durations and the padding in the state up to date, waiting for the device."""
        state, seconds = self.state, self.clock.seconds()
        state.train_seconds = self._seconds_before + sum(seconds)
        state.median_step_seconds = statistics.median(seconds) if seconds else state.median_step_seconds
        state.num_tokens, state.num_positions = self.feed.num_tokens, self.feed.num_positions

    def _save(self, *, is_interim: bool = False) -> None:
        reading = self._read_tally()
        self._measure()
        sync.copy_from_main(self.accelerator, trained_buffers(self.bare_model).values())
        self.state.window_loss, self.state.window_items = reading.loss_sum, reading.num_items
        if self.feed.place is not None:
            self.state.places = sync.gather_lists(self.accelerator, [self.feed.place])
        self.snapshots.save(self.state, is_interim=is_interim)

    def _position(self) -> dict[str, float]:
        epoch = self.state.epoch + self.state.step_in_epoch / self.steps_per_epoch
        return {"step": self.state.global_step, "epoch": round(epoch, 6)}

    def _log(self, event: dict[str, Any]) -> None:
        def write() -> None:
            self.run.log(event)
            self.progress.on_log(event)

        sync.from_main(self.accelerator, write)

    def _diverged(self, step: int, problem: str) -> MirrortuneError:
        steps = self.run.saved_steps()
        good = (
            f"the last good checkpoint is {self.run.checkpoint(steps[-1])}" if steps else "there is no checkpoint yet"
        )
        fix = "Lower --lr or --head-lr, or look at the rows for broken values; then start again"
        if self.update.scale is not None:
            fix = f"Use --precision fp32 if the model's own numbers exceed float16's. {fix}"
        error = DivergedError(step, f"{problem}, and {good}", fix=fix)
        return sync.told_once(self.accelerator, error)
