# SPDX-License-Identifier: Apache-2.0
"""Predictions as columns of a table: the options of ``predict``, and what the kinds of task share in answering rows."""

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
    """What a user asks of predictions; None leaves an option to the task.

    Attributes:
        top: number of answers for each row, the best first.
        threshold: probability above which a class of several is predicted, at least 0 and below 1.
        max_new_tokens: longest text that is generated, in tokens.
        temperature: of sampling; 0 to generate greedily.
        top_p: sample from the most probable tokens whose probabilities add up to this; above 0, at most 1.
        seed: of sampling. What is sampled for a row depends on it, on the number of the row, and on nothing else.
        first_row: number of the first row of the split among all rows that are predicted, from 0.
    """

    top: int | None = None
    threshold: float | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    first_row: int = 0

    def check(self, kind: str, used: Sequence[str]) -> None:
        """Check the options for a task.

        Args:
            kind: of the task, for messages.
            used: names of the options that it uses, besides seed.

        Raises:
            ConfigError: for every option out of its range, or that the task does not use.
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
    """Return float32 numbers (N,) as the Python numbers with the fewest digits that round to them."""
    return [float(text) for text in values.astype(np.float32).astype(str)]


def probabilities(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the softmax of logits over their last dimension; minus infinity gives 0."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


def refuse_no_tokens(lengths: npt.NDArray[Any], places: RowPlaces) -> None:
    """Raise a DataError if rows at ``places`` have no tokens (``lengths`` (N,) are 0): no model can answer them."""
    if len(empty := np.flatnonzero(lengths == 0)):
        problem = f"{len(empty)} of {len(lengths)} rows have no text to answer ({places.listed(empty)})"
        raise DataError(places.source, problem, fix="Fill or remove them")


def check_numbers(numbers: npt.NDArray[Any], places: RowPlaces) -> None:
    """Raise a VerificationError if a model's outputs (N, ...) for the rows at ``places`` contain NaN."""
    refuse_nan(np.flatnonzero(np.isnan(numbers).reshape(len(numbers), -1).any(axis=1)), places)


def refuse_nan(rows: Sequence[int] | npt.NDArray[np.int64], places: RowPlaces) -> None:
    """Raise a VerificationError for ``rows`` whose outputs contain NaN, if there are any: no answer follows from it."""
    if len(rows):
        raise VerificationError(
            places.source, f"the model's output is not a number (NaN) for {counted(len(rows), 'row')} "
            f"({places.listed(rows)}), so that it has no prediction",
            fix="Set train.precision=fp32, or use a checkpoint that did not diverge",
        )  # fmt: skip


def best_answers(logits: npt.NDArray[Any], names: Sequence[Sequence[Any]], top: int) -> Predictions:
    """Return the most probable answers of rows, and their probabilities.

    Args:
        logits: shape (N, C); minus infinity for answers that a row does not have.
        names: of the answers of each row, C at most.
        top: number of answers, at most C.

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
