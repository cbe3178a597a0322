# SPDX-License-Identifier: Apache-2.0
"""What a run directory says of its run besides checkpoints: the recipe that repeats it, results, curves, card."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

from mirrortune.config.recipe import flatten, read_saved_recipe, with_absolute_paths
from mirrortune.config.schema import Recipe
from mirrortune.errors import ConfigError, VerificationError
from mirrortune.reports import model_card
from mirrortune.reports.run_page import write_curves, write_run_page
from mirrortune.runs.job import Job
from mirrortune.runs.load import base_identity
from mirrortune.system.run_directory import RunDirectory
from mirrortune.tasks.base import task_to_dict


def pin_paths(recipe: Recipe, run: RunDirectory) -> Recipe:
    """The recipe with local paths made absolute, so that it repeats the run from any folder."""
    return with_absolute_paths(recipe).model_copy(update={"output_dir": str(run.path)})


# Settings that a continued run may change: no trained number and no choice of a checkpoint depends on them. They say
# who may run code, where things are written, what is told to whom and when, how rows are fed and put together for
# scoring, and what is scored once training is over. Not among them are settings that change results by rounding alone
# (train.compile, adapter.strategy, model.attention): a run that is continued ends with the numbers of one that was not.
_FREE = (
    "output_dir", "model.trust_remote_code", "data.contained", "data.test_split", "adapter.form", "train.keep",
    "train.save_every_steps", "train.log_every_steps", "train.track", "train.num_workers", "eval.batch_size",
    "eval.before", "eval.report_splits", "eval.prediction_labels", "eval.prediction_bounds", "eval.prediction_files",
)  # fmt: skip


def check_same_recipe(recipe: Recipe, run: RunDirectory) -> None:
    """Refuse to continue a run under another recipe; names every setting that differs."""
    if not run.recipe.is_file():
        raise ConfigError("--resume", f"{run.path} holds no run", fix="Start it without --resume")
    before, now = flatten(read_saved_recipe(run.recipe)), flatten(recipe)
    differing = [
        ConfigError(
            f"--resume: {key}",
            f"the run was started with {_brief(before.get(key))}, got {_brief(now.get(key))}",
            fix="Use the same settings",
        )
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and key not in _FREE
    ]
    if differing:
        raise ConfigError.several(differing)


def _brief(value: Any) -> str:
    return textwrap.shorten(repr(value), 200, placeholder=" ...")  # pairs come by the thousand


def write_results(run: RunDirectory, job: Job, result: dict[str, Any]) -> None:
    """The files of a finished run: results, history in the Trainer's form, curves and model card."""
    events = run.events()
    if not events:
        fix = "Restore the file from a copy, or start again with --overwrite"
        raise VerificationError(str(run.metrics), "the events of the run are gone", fix=fix)
    data = {**result, "protocol": job.recipe.eval.protocol, "selection_metric": job.task.selection_metric}
    run.write_json(run.results.name, data)
    state = {
        "global_step": events[-1]["step"],
        "epoch": events[-1]["epoch"],
        "best_metric": result["metrics"][job.task.selection_metric],
        "best_model_checkpoint": str(run.checkpoint(result["best_step"])),
        "log_history": events,
    }
    run.write_json("trainer_state.json", state)
    write_curves(run)
    card = model_card.run_card(
        run.path.name, base_identity(job), job.spec.method, task_to_dict(job.task), data, job.recipe.to_yaml()
    )
    run.write_text("README.md", card)
    write_run_page(run)


def run_name(recipe: Recipe, recipe_name: str | None) -> str:
    """``TASK-MODEL-METHOD``: the recipe's last name (or the data's), the model's last name, the method."""
    task = recipe_name or Path(recipe.data.path or "run").stem
    model = (recipe.model.name or "model").removeprefix("package:").rstrip("/")
    parts = model.split("/")
    model_name = parts[0] if recipe.model.name and recipe.model.name.startswith("package:") else parts[-1]
    words = (task.rsplit("/", 1)[-1], model_name, recipe.adapter.method)
    return re.sub(r"[^A-Za-z0-9.-]+", "-", "-".join(words)).strip("-").lower()
