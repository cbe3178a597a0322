# SPDX-License-Identifier: Apache-2.0
"""Scores a finished run's kept checkpoint on the rows that chose nothing: half of the validation rows, a test split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from torch import nn

from mirrortune.adapters.files.adapter_file import read_adapter, restore_trained
from mirrortune.errors import counted
from mirrortune.runs.job import Job
from mirrortune.system.console import Reporter, describe_metrics
from mirrortune.system.distributed.sharding import whole_parameters
from mirrortune.system.run_directory import RunDirectory
from mirrortune.training.evaluate import evaluate_split


def score_kept(
    job: Job, model: nn.Module, run: RunDirectory, accelerator: Any, reporter: Reporter
) -> dict[str, dict[str, float]]:
    """Metrics of the kept checkpoint on every split of ``job.reported``, by the split's name.

    Predictions and references that are numbers go to ``predictions.safetensors`` (``<split>.predictions`` and
    ``<split>.references``, one row each in the split's order), so that runs can be compared row by row.

    Args:
        job: what to score on.
        model: as training left it; given the kept checkpoint's numbers.
        run: finished.
        accelerator: accelerate's.
        reporter: is told.
    """
    if not job.reported:
        return {}
    with whole_parameters(model, write_back=True):
        restore_trained(model, read_adapter(run.adapter))
    found: dict[str, dict[str, float]] = {}
    arrays: dict[str, Any] = {}
    for name, rows in job.reported.items():
        outcome = evaluate_split(
            model, job.task, rows, accelerator,
            batch_size=job.eval_batch_size, max_positions=job.eval_max_positions, source=name,
            num_workers=job.recipe.train.num_workers,
        )  # fmt: skip
        found[name] = outcome.metrics
        for what, values in (("predictions", outcome.predictions), ("references", outcome.references)):
            if isinstance(values, np.ndarray):
                arrays[f"{name}.{what}"] = np.ascontiguousarray(values)
        reporter.note(f"{name}: {describe_metrics(outcome.metrics)}  ({counted(outcome.rows, 'row')})")

    def write(path: Path) -> None:
        save_file(arrays, path)

    if accelerator.is_main_process:
        run.write_file("predictions.safetensors", write)
    return found
