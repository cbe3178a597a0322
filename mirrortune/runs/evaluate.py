# SPDX-License-Identifier: Apache-2.0
"""Score a model on a split, and write its predictions in the format of the GLUE server (the ``eval`` command)."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mirrortune.config.recipe import read_target_recipe, resolve
from mirrortune.config.schema import Recipe
from mirrortune.data.dataset import DataSet, Split, take_subset
from mirrortune.data.examples import Examples
from mirrortune.data.files.media import remarks_on
from mirrortune.data.tokenize import Reading
from mirrortune.errors import ConfigError, MirrortuneError, VerificationError
from mirrortune.runs.checks import EvalSettings, EvaluationSettings, unpack_for_eval
from mirrortune.runs.results import data_changes
from mirrortune.runs.rows import describe_trained_on, evaluation_rows, num_trained_on, read_data
from mirrortune.runs.target import Evaluable, check_indices, eval_batch, find_target, load_target
from mirrortune.system.atomic import clear_leftovers, write_text_atomically
from mirrortune.system.claims import claimed
from mirrortune.system.console import Reporter
from mirrortune.system.distributed import sync
from mirrortune.system.distributed.processes import make_accelerator
from mirrortune.system.outputs import Input, check_file
from mirrortune.system.paths import PLAIN_NAME, DataPlace, is_plain_name
from mirrortune.system.run_directory import run_of
from mirrortune.tasks.base import TARGET_ROLES, Answers, Task, check_columns, reading_like, with_label_columns
from mirrortune.tasks.classes import classes_of
from mirrortune.training.evaluate import evaluate_split, nan_problem

_OTHER_FORMATS = (".csv", ".json", ".jsonl", ".parquet", ".xls", ".xlsx")
_MOST_TRAINING_BYTES = 1 << 28  # of training data that is read to count the rows that were trained on
_HEADER = "index\tprediction"
# Control characters, line and paragraph separators, and surrogates, which UTF-8 cannot encode.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateResult:
    """The ``--json`` object of ``eval``; ``predictions`` is the path of the predictions, or None."""

    metrics: dict[str, float]
    split: str
    rows: int
    predictions: str | None = None


def evaluate(
    target: str,
    recipe: Recipe,
    reporter: Reporter,
    *,
    split: str | None = None,
    is_own_data: bool = True,
    predictions: Path | None = None,
    inputs: Sequence[Input] = (),
    makes_folder: bool = False,
    overwrite: bool = False,
    force_base: bool = False,
) -> EvaluateResult:
    """Score a run directory, an adapter folder, a merged folder or any plain model on a split.

    Args:
        target: folder, or ``owner/name@revision:subfolder`` on the Hub.
        recipe: data and batch size and, for a plain model, the task. For a run or a merged folder, this is its saved
            recipe with command-line flags applied.
        reporter: prints notes and progress.
        split: ``train``, ``validation``, ``test``, or the data set's name of a split. By default the validation rows,
            or all rows if other data than that of the recipe has no validation split.
        is_own_data: the data is that of the target's saved recipe.
        predictions: file to which predictions are written, or folder in which the recipe names the file of the split.
            Rows without a label are predicted as well; then nothing is scored.
        inputs: files that are read and that predictions must not replace.
        makes_folder: create the folder ``predictions`` if missing; it is removed again if nothing is written.
        overwrite: replace earlier predictions.
        force_base: score an adapter on a base with different weights, and print the mismatches.
    """
    with ExitStack() as held:

        def claim(file: Path) -> None:
            held.enter_context(predictions_output(file, inputs, overwrite=overwrite))

        if predictions is not None and not predictions.is_dir():
            check_file(predictions, inputs, "--predictions")
            if makes_folder and not predictions.exists():
                predictions.mkdir(parents=True, exist_ok=True)  # other processes of the run create it as well
                held.callback(_remove_if_empty, predictions)
            else:
                prediction_file(predictions, "", {})
        return _evaluate(
            target, unpack_for_eval(recipe), reporter, claim, split=split, is_own_data=is_own_data,
            predictions=predictions, overwrite=overwrite, force_base=force_base,
        )  # fmt: skip


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _evaluate(
    target: str,
    settings: EvaluationSettings,
    reporter: Reporter,
    claim: Callable[[Path], None],
    *,
    split: str | None,
    is_own_data: bool,
    predictions: Path | None,
    overwrite: bool,
    force_base: bool,
) -> EvaluateResult:
    accelerator = make_accelerator(settings.model.precision)
    reporter.is_main = accelerator.is_main_process
    adapter_folder = find_target(target, settings, force_base=force_base)
    data = read_data(settings.data, settings.task)
    found = load_target(target, adapter_folder, settings, data, reporter, force_base=force_base)
    if data.task is not None:
        found = replace(found, task=reading_like(found.task, data.task))
    for note in remarks_on(data, found.task.columns()):
        reporter.note(note)
    rows, name = evaluation_rows(settings.data, data, split, found.task, is_own_data=is_own_data)
    warn_of_changed_data(adapter_folder if is_own_data else None, data, [rows], reporter)
    if not is_own_data and adapter_folder is not None and (count := _num_trained_on(adapter_folder, rows, found.task)):
        reporter.note(describe_trained_on(count, "row" if name == "all" else f"{name} row"))
    if predictions is not None:
        own = next((key for key, known in data.splits.items() if known is rows), name)  # name in the data set
        rows, predictions = _to_be_answered(rows, own, found.task, settings.eval, predictions)
        sync.from_main(accelerator, functools.partial(claim, predictions))
    examples = _encoded(found, rows, target, name)
    if (count := examples.num_unlabelled) and predictions is not None:
        reporter.note(f"{name}: {count:,} of {len(examples):,} rows have no label: nothing is scored")
    found.model.to(accelerator.device)
    with reporter.bar(f"evaluate {name}", len(examples)) as bar:
        outcome = evaluate_split(
            found.model, found.task, examples, accelerator, **eval_batch(found, settings.eval), source=rows.source,
            num_workers=settings.eval.num_workers, on_batch=bar.advance_by, allow_missing=predictions is not None,
        )  # fmt: skip
    if problem := nan_problem(outcome):
        fix = "Set train.precision=fp32, or use a checkpoint that did not diverge"
        error = VerificationError(rows.source, f"{problem}, so there is nothing to score", fix=fix)
        raise sync.told_once(accelerator, error)
    if predictions is not None and accelerator.is_main_process:
        check_replaceable(predictions, overwrite=overwrite)  # again, since scoring may have taken hours
        names, bounds = _answer_names(found.task, settings.eval), settings.eval.prediction_bounds
        write_predictions(predictions, outcome.predictions, names, bounds)
    written = None if predictions is None else str(predictions)
    return EvaluateResult(metrics=outcome.metrics, split=name, rows=outcome.rows, predictions=written)


def warn_of_changed_data(
    adapter_folder: Path | None, data: DataSet, chosen: Iterable[Split], reporter: Reporter
) -> None:
    """Print a warning if ``chosen`` holds a part of a split that training divided, and not the part of training.

    The division depends on the rows, so if these have changed, validation rows may have been trained on.

    Args:
        adapter_folder: adapter of a run on this data, or None for others, of which nothing is known.
        data: the run's data as it is now.
        chosen: splits of ``data``, or parts of them.
        reporter: prints the warning.
    """
    run = None if adapter_folder is None else run_of(adapter_folder)
    parts = [rows.source for rows in chosen if all(known is not rows for known in data.splits.values())]
    others = {name: split for name, split in data.splits.items() if split.source not in parts}
    beside = {*others, *(file.name for split in others.values() for file in split.files)}
    changes = data_changes(run, data.origin, beside) if run is not None and parts else []
    if changes:
        reporter.note(
            f"warning: the data is not that of the run ({'; '.join(changes)}), so other rows are set aside than in "
            "training: some of these rows may have been trained on"
        )


def _num_trained_on(adapter_folder: Path, rows: Split, task: Task) -> int:
    """Return how many of ``rows`` an adapter was trained on; 0 unless its data is unchanged local files of small size.

    Counting must neither download anything nor take longer than the evaluation.
    """
    run = run_of(adapter_folder)
    if run is None:
        return 0
    with suppress(MirrortuneError, OSError, ValueError):
        settings = unpack_for_eval(resolve([read_target_recipe(run.recipe)[0]]).recipe)
        own = settings.data
        places = [*(source.place for source in own.sources), *filter(None, [own.validation_place])]
        files = [_files_of(place) for place in places]
        size = sum(file.stat().st_size for found in files for file in found)
        if own.streaming or not all(files) or size > _MOST_TRAINING_BYTES:
            return 0
        data = read_data(own, settings.task)
        if data_changes(run, data.origin):
            return 0
        train = evaluation_rows(own, data, "train", task, is_own_data=True)[0]
        inputs = {column for role, column in task.columns() if role not in TARGET_ROLES}
        if inputs & {*rows.table.column_names} <= {*train.table.column_names}:  # columns may have been renamed
            return num_trained_on(take_subset(train, own.max_train_rows, own.seed), rows, task)
    return 0


def _files_of(place: DataPlace) -> list[Path]:
    """Return the files of data that is a table, or a folder of tables without subfolders; none for other data."""
    if place.kind not in ("path", "shipped"):
        return []
    found = sorted(place.path().iterdir()) if place.path().is_dir() else [place.path()]
    return found if all(file.is_file() for file in found) else []


def _encoded(found: Evaluable, rows: Split, target: str, split: str) -> Examples:
    """Encode the rows and check their indices against the model's embedding tables."""
    check_columns(rows, found.task)
    examples = found.task.encode(rows, found.processor, Reading(max_length=found.max_length, allow_missing=True))
    check_indices(found, examples, target, f"the {split} rows")
    return examples


def _to_be_answered(rows: Split, name: str, task: Task, settings: EvalSettings, place: Path) -> tuple[Split, Path]:
    """Return the rows to predict, which need no targets, and the file of predictions.

    Raises:
        ConfigError: the predictions cannot be written; raised before anything is scored.
    """
    if isinstance(task, Answers):
        raise ConfigError("--predictions", f"the answers of {task.kind} are texts, which eval does not write",
                          fix="Write them with mirrortune predict")  # fmt: skip
    check_labels(_answer_names(task, settings) or ())
    return with_label_columns(rows, task), prediction_file(place, name, settings.prediction_files)


def _answer_names(task: Task, settings: EvalSettings) -> tuple[str, ...] | None:
    """Return the class names to write, or None to write indices."""
    return classes_of(task) or None if settings.prediction_labels == "names" else None


def prediction_file(path: Path, split: str, names: dict[str, str]) -> Path:
    """Return the file of predictions of a split: ``path`` itself or, if it is a folder, the file that ``names`` gives.

    Raises:
        ConfigError: the file exists and holds no predictions, its name is that of another format, or ``names`` gives a
            name with a folder in it.
    """
    if not path.is_dir():
        if path.suffix.lower() in _OTHER_FORMATS:
            raise ConfigError(
                "--predictions",
                f"predictions are tab-separated, as GLUE's server takes them, and {path.name} has another suffix",
                fix=f"Name the file {path.stem}.tsv, or run predict -o {path.name}",
            )
        return _checked(path)
    name = names.get(split, f"{split}.tsv")
    if not is_plain_name(name):  # may come from an untrusted recipe in the target
        raise ConfigError(
            "eval.prediction_files", f"got {name!r} for split '{split}'", allowed=PLAIN_NAME,
            fix="Give a file to --predictions",
        )  # fmt: skip
    return _checked(path / name)


def check_labels(labels: Sequence[str]) -> None:
    """Check that class names have no control characters, which would break lines of the file or affect a terminal.

    Raises:
        ConfigError: a name has one.
    """
    if broken := next((label for label in labels if _CONTROL.search(label)), None):
        raise ConfigError(
            "--predictions", f"class name {broken!r} holds a line break, a tab or another control character",
            allowed="names of one line", fix="Write indices: eval.prediction_labels=indices",
        )  # fmt: skip


def _checked(path: Path) -> Path:
    if path.is_dir():
        raise ConfigError("--predictions", f"{path} is a folder", fix="Give another name")
    if path.exists() and not path.is_file():  # a pipe, a device, ...
        raise ConfigError("--predictions", f"{path} is not a regular file", fix="Give another name")
    if path.exists() and not _holds_predictions(path):
        raise ConfigError("--predictions", f"{path} is there and holds no predictions", fix="Give another name")
    return path


@contextmanager
def predictions_output(path: Path, inputs: Sequence[Input], *, overwrite: bool) -> Iterator[None]:
    """Claim the file of predictions while the block runs.

    Raises:
        ConfigError: the path cannot be written (:func:`mirrortune.system.outputs.check_file`), the file may not be
            replaced, or another process writes it.
    """
    check_file(path, inputs, "--predictions")
    with claimed(path):
        check_replaceable(path, overwrite=overwrite)
        clear_leftovers(path.parent, {path.name}.__contains__)  # of a process that was killed while it wrote the file
        yield


def check_replaceable(path: Path, *, overwrite: bool) -> None:
    """Raise ConfigError if a file exists, unless it holds predictions and ``overwrite`` is set."""
    _checked(path)
    if path.exists() and not overwrite:
        fix = "Give another name, or replace it with --overwrite"
        raise ConfigError("--predictions", f"{path} already exists", fix=fix)


def _holds_predictions(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_HEADER)) == _HEADER.encode()


def write_predictions(
    path: Path, predictions: Any, labels: tuple[str, ...] | None, bounds: tuple[float, float] | None
) -> None:
    """Write predictions, one line per row.

    Args:
        path: file to create or replace.
        predictions: class indices (N,), numbers (N,), 0 or 1 for each of C classes (N, C), or N texts.
        labels: class names to write instead of indices, or None.
        bounds: interval to which numbers are clipped, rounded to three decimals, or None to write all digits.

    Raises:
        ConfigError: there are several real numbers per row, or the format cannot represent a class name.
    """
    check_labels(labels or ())
    is_array = isinstance(predictions, np.ndarray)
    if is_array and predictions.ndim != 1 and predictions.dtype.kind == "f":
        raise ConfigError("--predictions", "this kind of task has several numbers a row, and the format one")
    if is_array and predictions.ndim != 1:
        chosen = ([labels[i] if labels else str(i) for i in np.flatnonzero(row)] for row in predictions)
        answers = [",".join(names) for names in chosen]
    elif is_array and predictions.dtype.kind == "f":
        # Bounds are those of a submission to GLUE, which has three decimals; cosines, for one, may differ in the fifth.
        answers = (
            [f"{x:.3f}" for x in np.clip(predictions, *bounds).tolist()] if bounds else list(map(str, predictions))
        )
    elif is_array:
        answers = [labels[i] if labels else str(i) for i in predictions.tolist()]
    else:
        answers = [_one_line(answer) for answer in predictions]
    lines = [_HEADER, *(f"{index}\t{answer}" for index, answer in enumerate(answers))]
    write_text_atomically(path, "\n".join(lines) + "\n")


def _one_line(answer: Any) -> str:
    text = answer if isinstance(answer, str) else " ".join(map(str, answer))
    return " ".join(_CONTROL.sub(" ", text).split())
