# SPDX-License-Identifier: Apache-2.0
"""Answers as a file, in the format that GLUE's server takes: a row's index (from 0) and its answer, tab-separated."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mirrortune.errors import ConfigError
from mirrortune.system.atomic import write_atomically
from mirrortune.system.claims import claimed
from mirrortune.system.outputs import Input, check_file
from mirrortune.system.paths import PLAIN_NAME, is_plain_name

_HEADER = "index\tprediction"
# Control characters, line and paragraph separators, and halves of characters, which UTF-8 cannot write.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def prediction_file(path: Path, split: str, names: dict[str, str]) -> Path:
    """The file that ``path`` means for a split: itself, or the one in a folder that ``names`` has for it.

    Raises:
        ConfigError: a file that is there and is none of predictions, or a name that is no plain one.
    """
    if not path.is_dir():
        return _checked(path)
    name = names.get(split, f"{split}.tsv")
    if not is_plain_name(name):  # it may come from a recipe that lies in the target
        raise ConfigError(
            "eval.prediction_files", f"got {name!r} for split '{split}'", allowed=PLAIN_NAME,
            fix="Give a file to --predictions",
        )  # fmt: skip
    return _checked(path / name)


def check_labels(labels: Sequence[str]) -> None:
    """Refuse class names that would break the lines of the file, or act on the terminal that shows it.

    Raises:
        ConfigError: with the name.
    """
    if broken := next((label for label in labels if _CONTROL.search(label)), None):
        raise ConfigError(
            "--predictions", f"class name {broken!r} holds a line break, a tab or another control character",
            allowed="names of one line", fix="Write indices: eval.prediction_labels=indices",
        )  # fmt: skip


def _checked(path: Path) -> Path:
    if path.is_dir():
        raise ConfigError("--predictions", f"{path} is a folder", fix="Give another name")
    if path.exists() and not path.is_file():  # a pipe has nothing to be read, and a device is no place for a file
        raise ConfigError("--predictions", f"{path} is no regular file", fix="Give another name")
    if path.exists() and not _holds_predictions(path):
        raise ConfigError("--predictions", f"{path} is there and holds no predictions", fix="Give another name")
    return path


@contextmanager
def predictions_output(path: Path, inputs: Sequence[Input], *, overwrite: bool) -> Iterator[None]:
    """Claim the file of predictions while the block runs.

    Raises:
        ConfigError: no place for a file (:func:`mirrortune.system.outputs.check_file`), a file that may not be
            replaced, or another process writes there.
    """
    check_file(path, inputs, "--predictions")
    with claimed(path):
        check_replaceable(path, overwrite=overwrite)
        yield


def check_replaceable(path: Path, *, overwrite: bool) -> None:
    """Refuse to replace a file, unless it holds predictions and ``overwrite``."""
    _checked(path)
    if path.exists() and not overwrite:
        fix = "Give another name, or replace it with --overwrite"
        raise ConfigError("--predictions", f"{path} is there already", fix=fix)


def _holds_predictions(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_HEADER)) == _HEADER.encode()


def write_predictions(
    path: Path, predictions: Any, labels: tuple[str, ...] | None, bounds: tuple[float, float] | None
) -> None:
    """Write one line for each row.

    Args:
        path: is replaced.
        predictions: class indices (N,), numbers (N,), 0 and 1 for each of several classes (N, C), or texts.
        labels: names to write in place of class indices, or None.
        bounds: numbers are brought between these.

    Raises:
        ConfigError: several real numbers a row, or names that the format cannot hold.
    """
    check_labels(labels or ())
    is_array = isinstance(predictions, np.ndarray)
    if is_array and predictions.ndim != 1 and predictions.dtype.kind == "f":
        raise ConfigError("--predictions", "this kind of task has several numbers a row, and the format one")
    if is_array and predictions.ndim != 1:
        chosen = ([labels[i] if labels else str(i) for i in np.flatnonzero(row)] for row in predictions)
        answers = [",".join(names) for names in chosen]
    elif is_array and predictions.dtype.kind == "f":
        numbers = np.clip(predictions, *bounds) if bounds else predictions
        answers = [f"{number:.3f}" for number in numbers.tolist()]
    elif is_array:
        answers = [labels[i] if labels else str(i) for i in predictions.tolist()]
    else:
        answers = [_one_line(answer) for answer in predictions]
    lines = [_HEADER, *(f"{index}\t{answer}" for index, answer in enumerate(answers))]

    def write(file: Path) -> None:
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")

    write_atomically(path, write)


def _one_line(answer: Any) -> str:
    text = answer if isinstance(answer, str) else " ".join(map(str, answer))
    return " ".join(_CONTROL.sub(" ", text).split())
