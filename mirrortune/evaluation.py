# SPDX-License-Identifier: Apache-2.0
"""One pass over a split: every row once, on any number of processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from mirrortune.batching import forward
from mirrortune.errors import DataError
from mirrortune.examples import Examples
from mirrortune.metrics import score
from mirrortune.tasks import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """Scores of a split.

    Attributes:
        metrics: the task's metrics, and ``loss``, the mean over its items.
        rows: rows scored, each once.
        judged: what the task kept of the model's outputs for each row, in the split's order.
        predictions, references: what the metrics compared.
    """

    metrics: dict[str, float]
    rows: int
    judged: list[Any]
    predictions: Any
    references: Any


@torch.no_grad()
def evaluate_split(
    model: nn.Module,
    task: Task,
    examples: Examples,
    accelerator: Any,
    *,
    batch_size: int,
    source: str,
    on_batch: Callable[[int], None] | None = None,
) -> EvalResult:
    """Score every row of ``examples``.

    Args:
        model: on the accelerator's device, not wrapped for distribution: ranks may have unequal numbers of batches.
        task: metrics, loss and predictions.
        examples: the rows.
        accelerator: accelerate's; says which rank this is.
        batch_size: rows per process and batch.
        source: the split's name, for messages.
        on_batch: called with the number of rows after each batch.

    Raises:
        DataError: if no row has a target.
    """
    if examples.num_unlabelled:
        raise DataError(
            source,
            f"{examples.num_unlabelled} of {len(examples)} rows have no label, so there is nothing to score",
            fix="Evaluate a labelled split with --split (the Hub's GLUE test sets are unlabelled)",
        )
    was_training = model.training
    model.eval()
    # Longest first: if a batch does not fit into memory, it is the first one.
    order = np.argsort(-examples.lengths, kind="stable")[accelerator.process_index :: accelerator.num_processes]
    found: list[tuple[Any, list[Any], float, int]] = []
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        with accelerator.autocast():
            inputs, outputs, targets = forward(model, examples.batch(rows), accelerator.device)
            judged = task.judge(model, inputs, outputs, targets)
        loss, items = task.loss(outputs, targets)
        found.append((rows, list(judged), float(loss), items))
        if on_batch:
            on_batch(len(rows))
    model.train(was_training)
    return _collect(found, task, examples, accelerator)


def _collect(
    found: list[tuple[Any, list[Any], float, int]], task: Task, examples: Examples, accelerator: Any
) -> EvalResult:
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object  # noqa: PLC0415

        found = gather_object(found)
    by_row = {int(row): value for rows, judged, _, _ in found for row, value in zip(rows, judged, strict=True)}
    assert sum(len(part[0]) for part in found) == len(by_row) == len(examples)
    in_order = [by_row[row] for row in range(len(examples))]
    loss = sum(part[2] for part in found) / max(1, sum(part[3] for part in found))
    predictions, references = task.answers(in_order, examples)
    return EvalResult(
        metrics={**score(task.metric_names, predictions, references), "loss": loss},
        rows=len(predictions),
        judged=in_order,
        predictions=predictions,
        references=references,
    )
