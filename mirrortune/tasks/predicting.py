# SPDX-License-Identifier: Apache-2.0
"""Predictions as columns of a table: the options of ``predict``, and helpers that the kinds of task share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mirrortune.data.files.row_places import RowPlaces
from mirrortune.errors import ConfigError, DataError, VerificationError, counted

Predictions = dict[str, list[Any]]
"""Values of new columns by name, one for each row: text, numbers, booleans, None, or lists and objects of these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictOptions:
    """Options of predictions; None uses the task's default.

    Attributes:
        top: number of answers for each row, the best first.
        threshold: probability above which a class is predicted if a row may have several, in [0, 1).
        max_new_tokens: maximum length of a generated text, in tokens.
        temperature: temperature of sampling; 0 to generate greedily.
        top_p: sample from the most probable tokens whose probabilities add up to this, in (0, 1].
        seed: seed of sampling. The random numbers of a row depend only on the seed and on the index of the row.
        first_row: index of the split's first row among all predicted rows.
    """

    top: int | None = None
    threshold: float | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    first_row: int = 0

    def check(self, kind: str, used: Sequence[str]) -> None:
        """Check the options against a task.

        Args:
            kind: kind of the task, for messages.
            used: names of the options that the task uses, except ``seed``.

        Raises:
            ConfigError: options are out of their ranges or not used by the task; all are reported together.
        """
        errors = [] if self.seed >= 0 else [ConfigError("--seed", f"got {self.seed}", allowed="0 or more")]
        for name, (allowed, fits) in _RANGES.items():
            value, flag = getattr(self, name), "--" + name.replace("_", "-")
            if value is None:
                continue
            if name not in used:
                flags = ", ".join("--" + other.replace("_", "-") for other in used) or "none of these options"
                errors.append(ConfigError(flag, f"{kind} does not use it", allowed=flags, fix="Remove it"))
            elif not fits(value):
                errors.append(ConfigError(flag, f"got {value}", allowed=allowed))
        if errors:
            raise ConfigError.several(errors)

    @property
    def is_sampled(self) -> bool:
        """Whether text is sampled rather than generated greedily."""
        return self.temperature != 0 and (self.temperature is not None or self.top_p is not None)


_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "top": ("1 or more", lambda value: value >= 1),
    "threshold": ("at least 0 and below 1", lambda value: 0 <= value < 1),
    "max_new_tokens": ("1 or more", lambda value: value >= 1),
    "temperature": ("0 (greedy) or more", lambda value: 0 <= value < float("inf")),
    "top_p": ("above 0, at most 1", lambda value: 0 < value <= 1),
}
GENERATION = ("max_new_tokens", "temperature", "top_p")
"""Options of tasks that generate text."""


def plain_numbers(values: npt.NDArray[Any]) -> list[float]:
    """Convert float32 values (N,) to the Python floats with the fewest digits that round to them."""
    return [float(text) for text in values.astype(np.float32).astype(str)]


def probabilities(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the softmax of logits over the last dimension; minus infinity gives 0."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


def refuse_no_tokens(lengths: npt.NDArray[Any], places: RowPlaces) -> None:
    """Raise a DataError if rows at ``places`` have no tokens (``lengths`` (N,) is 0), which no model can process."""
    if len(empty := np.flatnonzero(lengths == 0)):
        problem = f"{len(empty)} of {len(lengths)} rows have no text to answer ({places.listed(empty)})"
        raise DataError(places.source, problem, fix="Fill or remove them")


def check_numbers(numbers: npt.NDArray[Any], places: RowPlaces) -> None:
    """Raise a VerificationError if a model's outputs (N, ...) for the rows at ``places`` contain NaN."""
    refuse_nan(np.flatnonzero(np.isnan(numbers).reshape(len(numbers), -1).any(axis=1)), places)


def refuse_nan(rows: Sequence[int] | npt.NDArray[np.int64], places: RowPlaces) -> None:
    """Raise a VerificationError unless ``rows``, the rows whose outputs contain NaN, is empty."""
    if len(rows):
        raise VerificationError(
            places.source, f"the model's output is not a number (NaN) for {counted(len(rows), 'row')} "
            f"({places.listed(rows)}), so that it has no prediction",
            fix="Set train.precision=fp32, or use a checkpoint that did not diverge",
        )  # fmt: skip


def best_answers(logits: npt.NDArray[Any], names: Sequence[Sequence[Any]], top: int) -> Predictions:
    """Return the most probable answers of each row, and their probabilities.

    Args:
        logits: shape (N, C); minus infinity where a row has fewer than C possible answers.
        names: names of the possible answers of each row, at most C.
        top: number of answers to return, at most C.

    Returns:
        Columns ``prediction`` and ``score``, then ``prediction_2``, ``score_2``, ...; None where a row has fewer
        answers.
    """
    order = np.argsort(-logits, axis=1, kind="stable")[:, :top]  # the first of equal ones, as argmax
    scores = np.take_along_axis(probabilities(logits), order, axis=1)
    columns: Predictions = {}
    for place in range(order.shape[1]):
        suffix, best = f"_{place + 1}" if place else "", order[:, place].tolist()
        is_there = [i < len(own) for i, own in zip(best, names, strict=True)]
        columns[f"prediction{suffix}"] = [own[i] if i < len(own) else None for i, own in zip(best, names, strict=True)]
        shares = plain_numbers(scores[:, place])
        columns[f"score{suffix}"] = [share if has else None for share, has in zip(shares, is_there, strict=True)]
    return columns
