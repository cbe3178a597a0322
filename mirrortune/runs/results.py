# SPDX-License-Identifier: Apache-2.0
"""Write the files of a run directory besides checkpoints: recipe, environment, results, curves, model card and page."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import nn

from mirrortune import __version__
from mirrortune.adapters.files.adapter_file import read_adapter
from mirrortune.config.data_paths import short_name
from mirrortune.config.recipe import Resolved, flatten, read_saved_recipe, shown_value
from mirrortune.config.schema import Recipe
from mirrortune.errors import ConfigError, MirrortuneError, VerificationError, counted
from mirrortune.reports import html, model_card
from mirrortune.reports.drawing import write_figure
from mirrortune.reports.finished_run import FinishedRun, damage, read_json, regular_file
from mirrortune.reports.run_figures import learning_curves
from mirrortune.reports.run_page import run_page
from mirrortune.runs.adapted_base import base_identity
from mirrortune.runs.checks import RunSettings
from mirrortune.runs.job import Job
from mirrortune.system.console import Reporter, describe_metrics
from mirrortune.system.devices import peak_resident_bytes, resolve_precision, uses_cuda
from mirrortune.system.distributed.sharding import Sharding, whole_parameters
from mirrortune.system.paths import PACKAGE_SCHEME, ModelPlace, json_object_or_none
from mirrortune.system.run_directory import RunDirectory
from mirrortune.tasks.base import Task, task_to_dict
from mirrortune.tasks.metrics import METRICS
from mirrortune.training.evaluate import EvalResult, evaluate_split, nan_problem
from mirrortune.training.settings import FitResult

_ENVIRONMENT = "environment.json"
_UNSET = (None, "auto")  # settings that a default replaces


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult(FitResult):
    """The result of a run, the content of ``results.json``.

    Attributes:
        run_dir: run directory.
        trainable_parameters: number of trainable parameters, excluding the task head.
        head_parameters: number of trained parameters of the head.
        adapter_bytes: size of the adapter's files.
        peak_memory_bytes: peak memory allocated on the GPU, or of the process without a GPU.
        peak_reserved_bytes: peak memory reserved by the GPU's allocator, including its cache; None without a GPU.
        reported: metrics of the kept checkpoint on further splits, by name.
        pairing_seconds: time spent on measuring pairs or bases; 0 if none were measured.
        protocol: ``eval.protocol`` of the recipe.
        selection_metric: name of the metric by which the checkpoint was selected.
        sources: path, weight and rows of each data set, where there are several.
    """

    SUMMARY: ClassVar = (
        "run_dir", "metrics", "trainable_parameters", "head_parameters", "adapter_bytes", "train_seconds",
        "samples_per_second", "tokens_per_second", "metrics_before", "peak_memory_bytes", "peak_reserved_bytes",
        "padding_share",
    )  # fmt: skip
    """Fields of the ``--json`` object of ``train``."""

    run_dir: str
    trainable_parameters: int
    head_parameters: int
    adapter_bytes: int
    peak_memory_bytes: int
    reported: dict[str, dict[str, float]]
    pairing_seconds: float
    protocol: str
    selection_metric: str
    peak_reserved_bytes: int | None = None
    sources: list[dict[str, Any]] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Return the ``--json`` object of ``train``."""
        return {name: getattr(self, name) for name in self.SUMMARY}


# Settings that a resumed run may change, because no trained parameter and no checkpoint selection depends on them. They
# concern permission to run code, output, logging, loading and batching of rows, and scoring after training. Settings
# that only affect rounding (train.compile, adapter.strategy, model.attention) are not included, so that a resumed run
# ends with exactly the parameters of an uninterrupted one.
_FREE = (
    "output_dir", "model.trust_remote_code", "data.contained", "data.test_split", "adapter.form", "train.keep",
    "train.save_every_steps", "train.log_every_steps", "train.track", "train.num_workers", "eval.batch_size",
    "eval.before", "eval.samples", "eval.report_splits", "eval.prediction_labels", "eval.prediction_bounds",
    "eval.prediction_files",
)  # fmt: skip


def check_same_recipe(recipe: Recipe, run: RunDirectory) -> None:
    """Check that a run is resumed with the same recipe.

    Raises:
        ConfigError: settings differ that a resumed run may not change; the error names all of them.
    """
    if not run.recipe.is_file():
        raise ConfigError("--resume", f"{run.path} holds no run", fix="Start it without --resume")
    regular_file(run.path, run.recipe.name)  # otherwise the page and the card could not be written at the end
    before, now = as_started(read_saved_recipe(run.recipe), run), as_started(recipe, run)
    differing = [
        ConfigError(f"--resume: {key}", f"the run was started with {old}, got {new}", fix="Use the same settings")
        for key, old, new in changed_settings(before, now, _FREE)
    ]
    if differing:
        raise ConfigError.several(differing)


def as_started(recipe: Recipe, run: RunDirectory) -> Recipe:
    """Return the recipe of a resumed run, with the defaults that the run was started with.

    The present ones may be others: a later version of mirrortune, or another device, chooses them.

    Raises:
        VerificationError: the recorded defaults are damaged.
    """
    path = run.settled / _ENVIRONMENT
    used = (json_object_or_none(path) or {}).get("defaults", {})
    sections = recipe.model_dump(mode="json")
    with damage(str(path)):
        for key, value in used.items():
            section, _, name = key.partition(".")
            own = sections[section][name]
            if isinstance(value, dict):
                sections[section][name] = {**value, **own}
            elif own in _UNSET:
                sections[section][name] = value
        return Recipe.model_validate_json(json.dumps(sections))


def _defaults(job: Job, recipe: Recipe) -> dict[str, Any]:
    """Return the values that a run uses for settings without one, by dotted key; see :func:`as_started`."""
    given, settings, task = flatten(recipe), job.settings, job.task
    spec = settings.adapter
    settled = spec.settled()
    used = {
        "model.dtype": str(job.dtype).removeprefix("torch."),
        "task.metrics": task.metric_names,
        "task.selection_metric": task.selection_metric,
        "data.max_length": job.max_length,
        "adapter.pairing": settled.pairing,
        "train.lr": settings.loop.lr,
        "train.precision": resolve_precision(settings.model.precision),
    }
    of_task = {key: getattr(task, key.partition(".")[2], None) for key in given}
    used |= {key: value for key, value in of_task.items() if type(value) in (int, float)}
    options = {key: value for key, value in settled.options.items() if key not in spec.options}
    found = {key: value for key, value in used.items() if value is not None and given[key] in _UNSET}
    return {**found, "adapter.options": options}


_CHOOSE_DEFAULTS = ("adapter.method", "model.name", "task.kind")


def other_defaults(job: Job, resolved: Resolved) -> Iterator[str]:
    """Yield a remark on a saved recipe that is run again with other defaults than those of its run (:func:`_defaults`).

    Another method, model or task than those of the saved recipe has other defaults on purpose.
    """
    given = flatten(resolved.recipe)
    for file in resolved.files:
        run = RunDirectory(file.parent)
        used = (json_object_or_none(run.path / _ENVIRONMENT) or {}).get("defaults")
        if file.name != run.recipe.name or not isinstance(used, dict):
            continue
        saved = flatten(read_saved_recipe(file))
        if any(saved[key] != given[key] for key in _CHOOSE_DEFAULTS):
            continue
        before, now = _one_by_one(used), _one_by_one(json.loads(json.dumps(_defaults(job, resolved.recipe))))
        changed = {key: before[key] for key in sorted(before.keys() & now.keys()) if before[key] != now[key]}
        words = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in changed.items()]
        if words:
            yield f"{file} was run with other defaults than there are here; to repeat that run, add {shlex.join(words)}"


def _one_by_one(defaults: dict[str, Any]) -> dict[str, Any]:
    """Return recorded defaults with every option of the method under a key of its own."""
    found: dict[str, Any] = {}
    for key, value in defaults.items():
        found |= {f"{key}.{name}": each for name, each in value.items()} if isinstance(value, dict) else {key: value}
    return found


def changed_settings(before: Recipe, now: Recipe, free: Collection[str]) -> Iterator[tuple[str, str, str]]:
    """Yield the settings in which two recipes differ, except those in ``free``, each with both values as text."""
    old, new = flatten(before), flatten(now)
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key) and key not in free:
            yield key, shown_value(old.get(key)), shown_value(new.get(key))


_ANEW = "start over with --overwrite"


def check_same_data(
    job: Job, run: RunDirectory, reporter: Reporter, *, where: str = "--resume", otherwise: str = _ANEW
) -> None:
    """Check that a run is resumed on the data that it was started with; note another version of mirrortune.

    Args:
        job: job of the command.
        run: run that is resumed, or kept as a part of a comparison.
        reporter: prints the notes.
        where: flag or path to name in the error.
        otherwise: what the error advises if the data cannot be restored.

    Raises:
        ConfigError: files or the commit differ; the error names all of them.
    """
    known = read_json(run.path / _ENVIRONMENT)
    if "data" not in known:
        reporter.note(f"warning: {_ENVIRONMENT} does not say what the run was started on: data and base not compared")
        return
    if (version := known.get("mirrortune")) != __version__:
        reporter.note(f"the run was started with mirrortune {version}, this is {__version__}")
    before, now = dict(_leaves(known["data"])), dict(_leaves(json.loads(json.dumps(job.data_origin))))
    changes = [_change(key, before, now) for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if changes:
        fix = f"Restore the data, or {otherwise}"
        raise ConfigError(where, f"the data is not that of the run: {'; '.join(changes)}", fix=fix)


def data_changes(run: RunDirectory, origin: dict[str, Any], others: Collection[str] = ()) -> list[str]:
    """Return the files of a run's data that have changed since; none if the run does not say what it was trained on.

    Args:
        run: trained run.
        origin: origin of the same data as it is now.
        others: files (by path) and splits (by name) that are not compared.
    """
    try:
        known = read_json(run.path / _ENVIRONMENT).get("data")
    except MirrortuneError:  # a damaged file; it is of no other use here
        return []
    before, now = (
        {key: value for key, value in _leaves(json.loads(json.dumps(each))) if _is_of_rows(key)}
        for each in (known if isinstance(known, dict) else {}, origin)
    )
    changed = (key for key in sorted({*before, *now}) if before and before.get(key) != now.get(key))
    return [_change(key, before, now) for key in changed if not any(f"/{o}".endswith(f"/{key[-1]}") for o in others)]


def _is_of_rows(key: tuple[str, ...]) -> bool:
    """Return whether a part of an origin identifies rows, among which training and validation rows are drawn."""
    return key[0] not in ("media", "validation") and any("sha256" in part or part == "commit" for part in key)


def check_same_base(
    digests: dict[str, str], run: RunDirectory, *, where: str = "--resume", otherwise: str = _ANEW
) -> None:
    """Check that a run is resumed on the base that it was started with, by some or all digests of its weights.

    The arguments are those of :func:`check_same_data`.

    Raises:
        ConfigError: its weights differ.
    """
    known = read_json(run.path / _ENVIRONMENT)
    model = known.get("model")
    model = model if isinstance(model, dict) else {}
    weights = model.get("weights", digests)  # nothing is compared if the file is missing
    if any(weights.get(name) != digest for name, digest in digests.items()):
        raise ConfigError(
            where, f"the weights of '{model.get('name')}' are not those that the run was started with",
            fix=f"Restore the model, or {otherwise}",
        )  # fmt: skip


def _leaves(value: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the values of nested JSON data by their keys, without paths, which do not say what the data is."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if key != "path":
                yield from _leaves(inner, *path, str(key))
    else:
        yield path, value


def _change(key: tuple[str, ...], before: dict[tuple[str, ...], Any], now: dict[tuple[str, ...], Any]) -> str:
    if not any("sha256" in part for part in key):
        return f"{'.'.join(key)} was {shown_value(before.get(key))}, is {shown_value(now.get(key))}"
    number, key_of_file = (f"data set {int(key[1]) + 1}: ", key[2:]) if key[0] == "sources" else ("", key)
    name = number + (".".join(part for part in key_of_file if "sha256" not in part) or "a file")
    return f"{name} {'is new' if key not in before else 'is gone' if key not in now else 'has changed'}"


def write_results(run: RunDirectory, job: Job, recipe: Recipe, result: RunResult) -> None:
    """Write the files of a finished run: results, ``trainer_state.json``, curves, model card and page."""
    events = run.events()
    if not events:
        fix = "Restore the file from a copy, or start over with --overwrite"
        raise VerificationError(str(run.metrics), "the events of the run are gone", fix=fix)
    data = {name: value for name, value in asdict(result).items() if name != "sources" or value}
    run.write_json(run.results.name, data)
    state = {
        "global_step": events[-1]["step"],
        "epoch": events[-1]["epoch"],
        "best_metric": result.metrics[result.selection_metric],
        "best_model_checkpoint": str(run.checkpoint(result.best_step)),
        "log_history": [*map(_as_trainer_logs, events)],
    }
    run.write_json("trainer_state.json", state)
    finished = FinishedRun(run)
    write_figure(learning_curves([finished]), run.path / "curves.png")
    card = model_card.run_card(
        run.path.name, base_identity(job), job.spec.method, task_to_dict(job.task), data, recipe.to_yaml()
    )
    # A link may lead to a card of a person.
    if model_card.own_card(run.path) is None and not (run.path / "README.md").is_symlink():
        run.write_text("README.md", model_card.signed(card))
    html.write_page(run.path / "report.html", run_page([finished]))


def _as_trainer_logs(event: Mapping[str, Any]) -> dict[str, Any]:
    """Return an event with the names of transformers' Trainer: ``loss`` is that of training rows, ``eval_loss`` that of
    validation rows.
    """
    place = {"step": event["step"], "epoch": event["epoch"]}
    values = {name: value for name, value in event.items() if name not in ("event", "split", *place)}
    if event["event"] == "evaluate":
        return {**place, **{f"eval_{name}": value for name, value in values.items()}}
    return {**place, **{{"lr": "learning_rate"}.get(name, name): value for name, value in values.items()}}


def run_name(settings: RunSettings, recipe_name: str | None) -> str:
    """Return ``TASK-MODEL-METHOD``: the last parts of the names of the recipe (or data) and model, and the method."""
    task = recipe_name or short_name([source.name for source in settings.data.sources]) or "run"
    model = ModelPlace.parse(settings.model.name or "model")
    parts = model.name.removeprefix(PACKAGE_SCHEME).rstrip("/").split("/")
    model_name = parts[0 if model.kind == "package" else -1]
    words = (task.rsplit("/", 1)[-1], model_name, settings.adapter.method)
    return re.sub(r"[^A-Za-z0-9.-]+", "-", "-".join(words)).strip("-").lower()


def restore_kept(model: nn.Module, run: RunDirectory) -> None:
    """Load the parameters of the run's kept checkpoint into a trained model."""
    with whole_parameters(model, write_back=True):
        read_adapter(run.adapter).restore(model)


def score_reported(
    job: Job, model: nn.Module, run: RunDirectory, accelerator: Any, reporter: Reporter
) -> dict[str, dict[str, float]]:
    """Score the kept checkpoint on every split of ``job.reported``; return metrics by the name of the split, NaN for
    one with outputs that are NaN.

    Numeric predictions and references are written to ``predictions.safetensors`` as ``<split>.predictions`` and
    ``<split>.references``, in the order of the split's rows, so that runs can be compared row by row; see
    :func:`_kept_of_rows` for texts and probabilities.

    Args:
        job: job of the run.
        model: adapted model with the parameters of the kept checkpoint.
        run: run directory.
        accelerator: accelerate's ``Accelerator``.
        reporter: prints the metrics.
    """
    if not job.reported:
        return {}
    found: dict[str, dict[str, float]] = {}
    arrays: dict[str, Any] = {}
    for name, rows in job.reported.items():
        outcome = evaluate_split(
            model, job.task, rows, accelerator,
            batch_size=job.eval_batch_size, max_positions=job.eval_max_positions, source=name,
            num_workers=job.settings.loop.num_workers,
        )  # fmt: skip
        if problem := nan_problem(outcome):  # the run is kept, whose adapter may be of use in another precision
            reporter.note(f"warning: {name}: {problem}, so it is not scored; train.precision=fp32 may help")
            found[name] = dict.fromkeys(outcome.metrics, math.nan)
            continue
        found[name] = outcome.metrics
        kept = _kept_of_rows(job.task, outcome)
        for what, values in kept.items():
            if isinstance(values, np.ndarray):
                arrays[f"{name}.{what}"] = np.ascontiguousarray(values)
        reporter.note(f"{name}: {describe_metrics(outcome.metrics)}  ({counted(outcome.rows, 'row')})")

    def write(path: Path) -> None:
        save_file(arrays, path)

    if accelerator.is_main_process:
        run.write_file("predictions.safetensors", write)
    return found


def _kept_of_rows(task: Task, outcome: EvalResult) -> dict[str, Any]:
    """Return what a comparison by the selection metric needs of each row: predictions and references, and probabilities
    if the metric takes them; instead of texts and tags, the metric's numbers of each row, and digests of references.
    """
    metric = METRICS[task.selection_metric]
    predictions, references = outcome.predictions, outcome.references
    if metric.by_row is not None and not isinstance(predictions, np.ndarray):
        return {"scores": metric.by_row(predictions, references), "references": np.array([*map(_digest, references)])}
    odds = task.probabilities(outcome.judged) if metric.takes_probabilities else None
    return {"predictions": predictions, "references": references, "probabilities": odds}


def _digest(reference: Any) -> int:
    """Return an integer that is equal for equal texts or lists of texts."""
    text = json.dumps(reference).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def environment(
    job: Job, resolved: Resolved, accelerator: Any, strategies: dict[str, list[str]], weights: dict[str, str]
) -> dict[str, Any]:
    """Return the content of ``environment.json``: everything besides the recipe that is needed to repeat a run.

    Args:
        job: assembled job.
        resolved: recipe with the origins of its values.
        accelerator: accelerate's ``Accelerator``.
        strategies: layer names by strategy.
        weights: digests of the base.
    """
    precision = resolve_precision(job.settings.model.precision)
    packages = ["torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "numpy"]
    packages += ["peft"] if job.spec.preset.peft else []
    packages += ["deepspeed"] if Sharding.of(accelerator).stage else []
    return {
        "mirrortune": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: metadata.version(name) for name in packages},
        "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type,
        "num_processes": accelerator.num_processes,
        "mixed_precision": {"fp32": "no"}.get(precision, precision),
        "strategies": strategies,
        "seed": job.settings.loop.seed,
        "model": {
            "name": job.source.name,
            "revision": job.source.revision,
            "commit": job.source.commit,
            "weights": weights,
        },
        "data": job.data_origin,
        "argv": sys.argv,
        "origins": resolved.origins,
        "defaults": _defaults(job, resolved.recipe),
    }


def peak_memory_bytes() -> int:
    """Return the peak memory in bytes so far: allocated on the GPU, or of this process without a GPU."""
    if uses_cuda():
        return int(torch.cuda.max_memory_allocated())
    return peak_resident_bytes()


def peak_reserved_bytes() -> int | None:
    """Return the peak memory in bytes that the GPU's allocator has reserved so far, or None without a GPU."""
    return int(torch.cuda.max_memory_reserved()) if uses_cuda() else None
