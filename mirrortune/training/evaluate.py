# SPDX-License-Identifier: Apache-2.0
"""Score every row of a split once, on any number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any, Required, TypedDict, Unpack

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mirrortune.adapters.inject import weights_kept
from mirrortune.data.examples import Batch, Examples, Rows
from mirrortune.data.loader import forward, made_ahead, pinned
from mirrortune.errors import DataError, counted
from mirrortune.system.devices import as_computed, evaluating
from mirrortune.system.distributed import sync
from mirrortune.system.distributed.sharding import Sharding
from mirrortune.tasks.answered_rows import AnsweredExamples
from mirrortune.tasks.base import ComparesRows, Generates, Task, scores_vocabulary
from mirrortune.tasks.metrics import score
from mirrortune.tasks.prompts import Around, PromptExamples, unchanged

_Scored = tuple[Rows, list[Any], float, int]
"""Row indices, the result of ``Task.judge`` for each row, the summed loss, and its number of items."""


class EvaluationStoppedError(Exception):
    """Raised if ``should_stop`` returns a true value; nothing is scored then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """The scores of a split.

    Attributes:
        metrics: metrics of the task and ``loss``, the mean over items; empty if rows lack targets.
        rows: number of rows.
        judged: result of ``Task.judge`` for each row, in the order of the split.
        predictions, references: inputs of the metrics.
    """

    metrics: dict[str, float]
    rows: int
    judged: list[Any]
    predictions: Any
    references: Any


def nan_problem(outcome: EvalResult) -> str | None:
    """Describe outputs or a loss of a split that are NaN; None if there are none.

    They must not be scored: an argmax makes a class of NaN.
    """
    count = sum(map(_holds_nan, outcome.judged))
    if not count and not math.isnan(outcome.metrics.get("loss", 0.0)):
        return None
    where = f"for {count:,} of {counted(len(outcome.judged), 'row')}" if count else "for some rows"
    return f"the model's output is not a number (NaN) {where}"


def _holds_nan(judged: Any) -> bool:
    """Return whether a result of ``Task.judge`` for a row holds NaN."""
    if isinstance(judged, tuple):
        return any(map(_holds_nan, judged))
    numbers = np.asarray(judged)
    return numbers.dtype.kind == "f" and bool(np.isnan(numbers).any())


class Scoring(TypedDict, total=False):
    """How the rows of a split are run through a model.

    Attributes:
        batch_size: maximum number of rows per process and batch; required.
        max_positions: maximum number of positions (tokens including padding) per batch; a single row may be longer.
        num_workers: number of threads that prepare batches in advance.
        on_batch: called with the number of rows after each batch.
        should_stop: called before each batch; must return the same on all ranks.
        around: makes a context manager that is entered while the model computes a batch.
    """

    batch_size: Required[int]
    max_positions: int | None
    num_workers: int
    on_batch: Callable[[int], None] | None
    should_stop: Callable[[], object] | None
    around: Around


def evaluate_split(
    model: nn.Module,
    task: Task,
    examples: Examples,
    accelerator: Any,
    *,
    source: str,
    allow_missing: bool = False,
    **how: Unpack[Scoring],
) -> EvalResult:
    """Score every row of ``examples``.

    Args:
        model: model on the accelerator's device.
        task: metrics, loss and predictions.
        examples: encoded rows.
        accelerator: accelerate's ``Accelerator``.
        source: name of the split in errors.
        allow_missing: also predict rows without a target; nothing is scored then.
        how: see :class:`Scoring`.

    Raises:
        DataError: a row has no target, and ``allow_missing`` is False.
        EvaluationStoppedError: ``should_stop`` returned a true value.
    """
    if examples.num_unlabelled and not allow_missing:
        raise DataError(
            source,
            f"{examples.num_unlabelled} of {len(examples)} rows have no label, so there is nothing to score",
            fix="Name a labelled split with --split, or give --predictions FILE for the answers alone",
        )
    return _collect(_scored(model, task, examples, accelerator, **how), task, examples)


def judge_split(
    model: nn.Module, task: Task, examples: Examples, accelerator: Any, **how: Unpack[Scoring]
) -> list[Any]:
    """Return the result of ``Task.judge`` for every row, in the order of ``examples``; the same on all ranks.

    The arguments are those of :func:`evaluate_split`, except that ``examples`` come from ``Task.encode_to_predict``.

    Raises:
        EvaluationStoppedError: ``should_stop`` returned a true value.
    """
    return _in_order(_scored(model, task, examples, accelerator, **how), examples)


def generates(task: Task, examples: Examples) -> bool:
    """Return whether scoring the rows calls the model for one token at a time."""
    return isinstance(examples, (AnsweredExamples, PromptExamples)) or isinstance(task, Generates)


@torch.no_grad()
def _scored(
    model: nn.Module, task: Task, examples: Examples, accelerator: Any, **how: Unpack[Scoring]
) -> list[_Scored]:
    """Run the model on all rows and gather the results of all ranks."""
    on_batch, should_stop, around = how.get("on_batch"), how.get("should_stop"), how.get("around", unchanged)
    found: list[_Scored] = []
    is_kept = generates(task, examples) and not Sharding.of(accelerator).shards_weights
    kept = weights_kept(model) if is_kept else nullcontext()
    with evaluating(model), kept:
        slices = _slices(examples.lengths, accelerator.num_processes, how["batch_size"], how.get("max_positions"))
        with closing(_batches(examples, accelerator, slices, how.get("num_workers", 0))) as batches:
            for rows, batch in batches:
                if should_stop is not None and should_stop():
                    raise EvaluationStoppedError
                scored = _score(model, task, examples, rows, batch, accelerator, around)
                if len(rows):
                    found.append((rows, *scored))
                if on_batch:
                    on_batch(len(rows))
    return sync.gather_lists(accelerator, found)


def _slices(
    lengths: npt.NDArray[Any], num_processes: int, batch_size: int, max_positions: int | None
) -> Iterator[Rows]:
    """Yield the rows that all ranks score together, longest first, so that a lack of memory shows at once."""
    order, start = np.argsort(-lengths, kind="stable"), 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        rows = batch_size if max_positions is None else max(1, min(batch_size, max_positions // longest))
        yield order[start : start + rows * num_processes]
        start += rows * num_processes


def _batches(
    examples: Examples, accelerator: Any, slices: Iterator[Rows], num_workers: int
) -> Generator[tuple[Rows, Batch], None, None]:
    """Yield this rank's rows of each slice and their batch.

    A rank without rows gets a batch of an arbitrary row, because the ranks of a sharded model wait for each other.
    """

    def make(rows: Rows) -> tuple[Rows, Batch]:
        own = rows[accelerator.process_index :: accelerator.num_processes]
        return own, pinned(examples.batch(own if len(own) else rows[:1]), accelerator.device)

    return made_ahead(slices, make, num_workers)


def _score(
    model: nn.Module, task: Task, examples: Examples, rows: Rows, batch: Batch, accelerator: Any, around: Around
) -> tuple[list[Any], float, int]:
    # The task converts logits over a vocabulary to float32 piece by piece, to save memory.
    unconverted = as_computed(model) if scores_vocabulary(task) else nullcontext()
    sharding = Sharding.of(accelerator)
    # The ranks of a sharded model must generate together: equally often, and even those without rows.
    own, at_once = rows if len(rows) else np.zeros(1, dtype=np.int64), sharding.shards_weights
    with unconverted, sharding.autocast():
        if isinstance(examples, PromptExamples):
            return examples.generate(model, own, around, at_once=at_once), 0.0, 0
        with around(rows, next(len(v) for k, v in batch.items() if isinstance(v, Tensor) and k != "targets")):
            inputs, outputs, targets = forward(model, batch, accelerator.device)
        judged = list(task.judge(model, inputs, outputs, targets))
        if isinstance(examples, AnsweredExamples):
            written = examples.generate(model, own, at_once=at_once)
            judged = list(zip(judged, written, strict=True))
    if examples.num_unlabelled or isinstance(task, ComparesRows):
        return judged, 0.0, 0
    loss, items = task.loss(inputs, outputs, targets)
    return judged, float(loss), int(items)


def _in_order(found: list[_Scored], examples: Examples) -> list[Any]:
    by_row = {int(row): value for rows, judged, _, _ in found for row, value in zip(rows, judged, strict=True)}
    assert sum(len(part[0]) for part in found) == len(by_row) == len(examples)
    return [by_row[row] for row in range(len(examples))]


def _collect(found: list[_Scored], task: Task, examples: Examples) -> EvalResult:
    in_order = _in_order(found, examples)
    loss = sum(part[2] for part in found) / max(1, sum(part[3] for part in found))
    predictions, references = task.answers(in_order, examples)
    metrics: dict[str, float] = {}
    if not examples.num_unlabelled:
        loss = task.loss_of_split(in_order, examples) if isinstance(task, ComparesRows) else loss
        found_scores = score(task.metric_names, predictions, references, lambda: task.probabilities(in_order))
        metrics = {**found_scores, "loss": loss}
    rows = len(predictions)
    return EvalResult(metrics=metrics, rows=rows, judged=in_order, predictions=predictions, references=references)
