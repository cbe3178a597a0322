# SPDX-License-Identifier: Apache-2.0
"""Record what the page of a run shows besides the log: speed, plane angles, and predictions of the kept checkpoint.

These go to separate files, ``progress.jsonl`` and ``validation.json``, because they contain times and texts of rows,
while ``metrics.jsonl`` is determined, byte for byte, by the seed and the settings.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from typing_extensions import override

from mirrortune.adapters.inject import spectral_layers
from mirrortune.data.examples import Examples
from mirrortune.errors import cut_after
from mirrortune.runs.job import Job
from mirrortune.system.console import Reporter, digits
from mirrortune.system.devices import memory_bytes, to_float64
from mirrortune.system.distributed.sharding import whole_parameters
from mirrortune.system.run_directory import RunDirectory
from mirrortune.tasks.base import ComparesRows
from mirrortune.tasks.classes import class_scores, classes_of, data_order
from mirrortune.training.evaluate import EvalResult, evaluate_split
from mirrortune.training.settings import Progress
from mirrortune.training.tracking import Track, tracker

_UNITS = {"image-classification": "images", "audio-classification": "recordings"}
_HARDEST = 12
_MOST_CLASSES = 4096  # the confusion matrix has 16 million entries
_LONGEST_TEXT = 400
_MOST_POINTS = 2000
_LENGTH_BINS = 30


class RunRecorder(Progress):
    """An observer of the training loop that writes ``progress.jsonl`` and sends metrics to a tracker.

    Args:
        shown: display to which all calls are forwarded.
        run: run directory.
        model: adapted model, whose plane angles are recorded after every evaluation.
        track: called with every number of the log, or None.
    """

    def __init__(self, shown: Progress, run: RunDirectory, model: nn.Module, track: Track | None = None) -> None:
        self._shown, self._run, self._model, self._track = shown, run, model, track
        self._mark, self._seconds, self._rows = 0.0, 0.0, 0
        self._tokens: int | None = None
        self._total_steps, self._steps, self._all_seconds = 0, 0, 0.0

    @override
    def on_start(self, total_steps: int, done_steps: int) -> None:
        self._total_steps = total_steps
        # Entries after ``done_steps`` will be written again; if it is 0, the run starts over.
        kept = [entry for entry in self._run.progress() if entry["step"] <= done_steps and done_steps]
        self._run.write_lines(self._run.progress_log.name, kept)
        self._shown.on_start(total_steps, done_steps)
        self._mark = time.perf_counter()

    @override
    def on_step(self, step: int, rows: int, tokens: int | None) -> None:
        now = time.perf_counter()
        self._all_seconds += now - self._mark
        self._steps += 1
        self._seconds, self._mark, self._rows = self._seconds + now - self._mark, now, self._rows + rows
        self._tokens = None if tokens is None else (self._tokens or 0) + tokens
        self._shown.on_step(step, rows, tokens)

    @override
    def on_show(self, step: int, epoch: float, loss: float) -> None:
        self._shown.on_show(step, epoch, loss)

    @override
    def on_log(self, event: dict[str, Any]) -> None:
        if event["event"] == "train":
            speeds = {"rows_per_second": self._rows, "tokens_per_second": self._tokens}
            per_second = {k: digits(v / (self._seconds or math.inf)) for k, v in speeds.items() if v is not None}
            left = (self._total_steps - event["step"]) * self._all_seconds / max(1, self._steps)
            entry = {"step": event["step"], **per_second, "seconds_left": digits(left), **memory_bytes()}
            self._run.log_progress(entry)
            self._seconds, self._rows, self._tokens = 0.0, 0, None
        else:
            angles = {name: float(a.square().mean().sqrt()) for name, a in plane_angles(self._model).items()}
            if angles:
                self._run.log_progress({"step": event["step"], "angle_rms": angles})
        if self._track:
            prefix = "train" if event["event"] == "train" else str(event.get("split", "validation"))
            numbers = {k: v for k, v in event.items() if isinstance(v, (int, float)) and k not in ("step", "epoch")}
            self._track({f"{prefix}/{k}": v for k, v in numbers.items()}, event["step"])
        self._shown.on_log(event)
        self._mark = time.perf_counter()  # excludes the time spent on evaluation

    @override
    def on_evaluate(self, rows: int) -> None:
        self._shown.on_evaluate(rows)

    @override
    def on_signal(self, number: int) -> None:
        self._shown.on_signal(number)


@contextmanager
def recording(
    track: str | None,
    settings: dict[str, Any],
    model: nn.Module,
    run: RunDirectory,
    accelerator: Any,
    reporter: Reporter,
) -> Iterator[RunRecorder]:
    """Yield the observer of a run's training loop: display, files of the run, and tracker.

    Args:
        track: name of a tracker, or None.
        settings: settings of the run by dotted key, for the tracker.
        model: adapted model.
        run: run directory.
        accelerator: accelerate's ``Accelerator``.
        reporter: creates the display.
    """
    tracked = tracker(track, run.path, settings, is_main=accelerator.is_main_process)
    unit = _UNITS.get(str(settings.get("task.kind")), "rows")
    with reporter.training(unit) as shown, tracked as log:
        yield RunRecorder(shown, run, model, log)


def plane_angles(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the plane angles of each layer's core in degrees, (T,) or (E, T); empty if no core has planes."""
    found = {name: layer.core.angles() for name, layer in spectral_layers(model).items()}
    return {n: to_float64(a.detach()).rad2deg() for n, a in found.items() if a is not None and a.numel()}


def record_validation(
    job: Job, model: nn.Module, run: RunDirectory, accelerator: Any, outcome: EvalResult | None
) -> None:
    """Write predictions of the kept checkpoint on the validation rows to ``validation.json``.

    Args:
        job: job of the run.
        model: adapted model with the parameters of the kept checkpoint.
        run: run directory.
        accelerator: accelerate's ``Accelerator``.
        outcome: evaluation of that checkpoint, or None to evaluate it again.
    """
    with whole_parameters(model):
        angles = {name: [round(a, 4) for a in part.flatten().tolist()] for name, part in plane_angles(model).items()}
    if outcome is None:
        outcome = evaluate_split(
            model, job.task, job.validation, accelerator,
            batch_size=job.eval_batch_size, max_positions=job.eval_max_positions, source="validation",
        )  # fmt: skip
    details = validation_details(job, outcome)
    if accelerator.is_main_process:
        run.write_json(run.validation.name, {**details, "angles": angles})


def validation_details(job: Job, outcome: EvalResult) -> dict[str, Any]:
    """Return the content of ``validation.json`` as JSON data.

    It holds the confusion matrix or pairs of true and predicted values, the scores of each class, the hardest rows, and
    the lengths and class counts of both splits.
    """
    references, predictions = outcome.references, outcome.predictions
    labels = classes_of(job.task)
    found: dict[str, Any] = {"lengths": _lengths(job)}
    if each := class_scores(job.task, predictions, references):
        found["per_class"] = each
    if not isinstance(predictions, np.ndarray) or predictions.ndim != 1 or np.shape(references) != predictions.shape:
        return found
    if labels and np.issubdtype(predictions.dtype, np.integer):
        size, order = len(labels), data_order(job.task)
        losses = _surprise(np.stack(outcome.judged)[:, order], references)
        counts = {"train": _counts(job.train, order), "validation": np.bincount(references, minlength=size).tolist()}
        answers = [(labels[r], labels[p]) for r, p in zip(references.tolist(), predictions.tolist(), strict=True)]
        found |= {"labels": list(labels), "classes": counts}
        if size <= _MOST_CLASSES:
            confusion = np.bincount(references * size + predictions, minlength=size * size).reshape(size, size)
            found["confusion"] = confusion.tolist()
    else:
        losses = (
            job.task.difficulty(predictions, references)
            if isinstance(job.task, ComparesRows)
            else np.square(predictions.astype(np.float64) - references)
        )
        pairs = list(zip(references.tolist(), predictions.tolist(), strict=True))
        answers = [(f"{r:.4g}", f"{p:.4g}") for r, p in pairs]
        found["pairs"] = pairs[:: -(-len(pairs) // _MOST_POINTS)]
    hardest = np.argsort(-losses, kind="stable")[:_HARDEST].tolist()
    found["hardest"] = [
        {"row": row + 1, "loss": float(losses[row]), "reference": answers[row][0], "prediction": answers[row][1],
         "text": _text(job, row)}
        for row in hardest
    ]  # fmt: skip
    return found


def _surprise(logits: npt.NDArray[Any], references: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the cross-entropy of each row, shape (N,), from logits (N, C)."""
    losses = nn.functional.cross_entropy(
        torch.from_numpy(logits).double(), torch.from_numpy(references), reduction="none"
    )
    return np.asarray(losses.numpy())


def _counts(examples: Examples, order: npt.NDArray[np.int64]) -> list[int] | None:
    targets = getattr(examples, "targets", None)
    return None if targets is None else np.bincount(targets, minlength=len(order))[order].tolist()


def _lengths(job: Job) -> dict[str, Any]:
    """Return histograms of row lengths with common bins, or an empty dict if all rows have the same length."""
    splits = {"train": job.train.lengths, "validation": job.validation.lengths}
    longest, shortest = (f(f(v) for v in splits.values()) for f in (max, min))
    if longest == shortest:
        return {}
    width = -(-int(longest - shortest + 1) // _LENGTH_BINS)  # an integer, so that every bin covers as many lengths
    edges = np.arange(shortest, longest + width + 1, width)
    shares = {name: (np.histogram(v, edges)[0] / len(v)).tolist() for name, v in splits.items()}
    return {"edges": edges.tolist(), **shares}


def _text(job: Job, row: int) -> str:
    """Return a validation row as text without special tokens, or an empty string for rows that are not text."""
    ids = job.validation.input_ids(row)
    if ids is None:
        return ""
    tokenizer = getattr(job.processor, "tokenizer", job.processor)
    return cut_after(str(tokenizer.decode(ids.tolist(), skip_special_tokens=True)), _LONGEST_TEXT)
