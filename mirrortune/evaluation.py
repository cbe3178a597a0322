# SPDX-License-Identifier: Apache-2.0
"""One pass over a split: every row once, on any number of processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mirrortune.batching import collate
from mirrortune.errors import DataError
from mirrortune.precision import autocast
from mirrortune.tasks import Task
from mirrortune.tokens import Encoded


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """Scores of a split.

    Attributes:
        metrics: the task's metrics, and ``loss``, the mean over its items.
        rows: rows scored, each once.
        logits: shape (rows, outputs), float32, in the split's order.
    """

    metrics: dict[str, float]
    rows: int
    logits: npt.NDArray[np.float32]


@torch.no_grad()
def evaluate_split(
    model: nn.Module,
    task: Task,
    encoded: Encoded,
    tokenizer: Any,
    accelerator: Any,
    *,
    batch_size: int,
    source: str,
    on_batch: Callable[[int], None] | None = None,
) -> EvalResult:
    """Score every row of ``encoded``.

    Args:
        model: on the accelerator's device, not wrapped for distribution: ranks may have unequal numbers of batches.
        task: metrics, loss and predictions.
        encoded: the rows.
        tokenizer: pads batches.
        accelerator: accelerate's; says which rank this is.
        batch_size: rows per process and batch.
        source: the split's name, for messages.
        on_batch: called with the number of rows after each batch.

    Raises:
        DataError: if no row has a target.
    """
    missing = task.is_missing(encoded.targets)
    if missing.any():
        raise DataError(
            source,
            f"{int(missing.sum())} of {len(encoded)} rows have no label, so there is nothing to score",
            fix="Evaluate a labelled split with --split (the Hub's GLUE test sets are unlabelled)",
        )
    was_training = model.training
    model.eval()
    # Longest first: if a batch does not fit into memory, it is the first one.
    order = np.argsort(-encoded.lengths, kind="stable")[accelerator.process_index :: accelerator.num_processes]
    found: list[tuple[Any, Any, float]] = []
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = {k: v.to(accelerator.device) for k, v in collate(encoded, rows, tokenizer).items()}
        targets = batch.pop("targets")
        with accelerator.autocast(), autocast(model):
            logits = model(**batch).logits
        loss, _ = task.loss(logits, targets)
        found.append((rows, logits.float().cpu().numpy(), float(loss)))
        if on_batch:
            on_batch(len(rows))
    model.train(was_training)
    return _collect(found, task, encoded, accelerator)


def _collect(found: list[tuple[Any, Any, float]], task: Task, encoded: Encoded, accelerator: Any) -> EvalResult:
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object  # noqa: PLC0415

        found = gather_object(found)
    rows = np.concatenate([part[0] for part in found])
    assert len(np.unique(rows)) == len(rows) == len(encoded)
    logits = np.concatenate([part[1] for part in found])[np.argsort(rows)]
    loss = sum(part[2] for part in found) / len(encoded)
    metrics = task.metrics(task.predict(logits), encoded.targets)
    return EvalResult(metrics={**metrics, "loss": loss}, rows=len(encoded), logits=logits)
