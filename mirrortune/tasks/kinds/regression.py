# SPDX-License-Identifier: Apache-2.0
"""regression: one or two texts -> a real number. Squared error; Pearson and Spearman correlation by default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from torch import Tensor
from typing_extensions import override

from mirrortune.data.columns import choose_columns, number_of
from mirrortune.data.dataset import Split
from mirrortune.data.examples import Batch, Targets, TokenExamples
from mirrortune.data.files.arrow import cells
from mirrortune.data.labels import headless, label_fields, refuse_missing
from mirrortune.data.tokenize import Reading, encode_texts
from mirrortune.errors import DataError
from mirrortune.tasks.base import TextTask
from mirrortune.tasks.metrics import KINDS_OWN, Scores
from mirrortune.tasks.predicting import Predictions, PredictOptions, check_numbers, plain_numbers

_FAR = 100.0  # mean or deviation from which targets are far from the answers of a new head
_LARGEST = float(np.finfo(np.float32).max)  # targets are float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Task(TextTask):
    """Prediction of a number. Targets are neither centred nor scaled."""

    text_columns: tuple[str, ...]
    label_column: str
    metric_names: tuple[str, ...]
    selection_metric: str
    kind: str = "regression"
    auto_class: str = "AutoModelForSequenceClassification"
    version: int = 1

    @classmethod
    @override
    def from_rows(
        cls, table: pa.Table, source: str, scores: Scores = KINDS_OWN, *,
        text_columns: tuple[str, ...] | None = None, label_column: str | None = None,
    ) -> tuple[Task, list[str]]:  # fmt: skip
        """Create the task; raise a DataError if all labels are equal."""
        text, label, notes = choose_columns(table, text_columns, label_column, source, numbers=True)
        task = cls(text_columns=text, label_column=label, **scores.fields(("pearson", "spearmanr"), "number"))
        # Cells that are not numbers are reported by strata, with their rows.
        values = np.array([_number(value) for value in cells(table, label)], dtype=np.float64)
        known = values[~np.isnan(values)]
        if len(known) and (np.abs(known) <= _LARGEST).all():
            _refuse_equal(known, label, source)
            mean, spread = float(known.mean()), float(known.std())
            if max(abs(mean), spread) > _FAR:
                notes.append(
                    f"warning: the numbers in '{label}' (mean {mean:.3g}, standard deviation {spread:.3g}) are learned "
                    "as they are, and a new head begins near 0: divide them, or take their logarithm"
                )
        is_value = number_of(label) is not None and all(number_of(name) is None for name in text)
        return task, [*notes, headless(label, "a number")] if is_value else notes

    @override
    def columns(self) -> list[tuple[str, str]]:
        return [*(("text", c) for c in self.text_columns), ("label", self.label_column)]

    def targets(self, split: Split) -> npt.NDArray[np.float32]:
        """Return the targets, (N,) float32, NaN if missing; raise a DataError for cells that are not numbers."""
        return split.once((self.label_column, "numbers"), self._numbers)

    def _numbers(self, split: Split) -> npt.NDArray[np.float32]:
        found = np.empty(split.table.num_rows, dtype=np.float32)
        for row, value in enumerate(cells(split.table, self.label_column)):
            number = _number(value)
            if abs(number) > _LARGEST:
                raise DataError(
                    split.places.where(row),
                    f"label {value!r} in column '{self.label_column}' is not a finite number",
                    fix="Correct the row, or use --task text-classification for classes",
                )
            found[row] = number
        return found

    @override
    def strata(self, split: Split) -> None:
        self._complete_targets(split)

    @override
    def config_fields(self) -> dict[str, Any]:
        return {**label_fields([self.label_column]), "problem_type": "regression"}

    @override
    def encode(self, split: Split, processor: Any, reading: Reading) -> TokenExamples:
        values = self.targets(split) if reading.allow_missing else self._complete_targets(split)
        return encode_texts(split, self.text_columns, values, np.isnan(values), processor, reading, self.code)[0]

    @override
    def loss(self, inputs: Batch, outputs: Any, targets: Tensor) -> tuple[Tensor, int]:
        """Return the squared error of logits (B, 1) against targets (B,), summed."""
        return (outputs.logits.float().squeeze(-1) - targets).square().sum(), targets.shape[0]

    @override
    def judge(self, model: Any, inputs: Batch, outputs: Any, targets: Tensor) -> npt.NDArray[np.float32]:
        return np.asarray(outputs.logits[:, 0].float().cpu().numpy())

    @override
    def answers(self, judged: Sequence[Any], examples: Any) -> tuple[Targets, Targets]:
        return np.array(judged), examples.targets

    @override
    def prediction_columns(
        self, judged: Sequence[Any], examples: Any, split: Split, options: PredictOptions
    ) -> Predictions:
        """Return the predicted numbers."""
        check_numbers(np.array(judged), split.places)
        return {"prediction": plain_numbers(np.array(judged))}

    def _complete_targets(self, split: Split) -> npt.NDArray[np.float32]:
        values = self.targets(split)
        refuse_missing(np.isnan(values), split.places, self.label_column, "number")
        return values


def _refuse_equal(values: npt.NDArray[np.float64], label: str, source: str) -> None:
    """Raise a DataError if the values (N,) are all equal, or are so in float32."""
    if np.ptp(values) == 0:
        raise DataError(
            source, f"label column '{label}' holds one value only ({values[0]:g})", allowed="numbers that differ",
            fix="Name another column with --label-column",
        )  # fmt: skip
    if np.ptp(values.astype(np.float32)) == 0:
        raise DataError(
            source, f"the numbers in label column '{label}' (around {values[0]:g}) differ by {np.ptp(values):.3g} at "
            "most, which float32 cannot tell apart", allowed="numbers that differ in their first seven digits",
            fix="Subtract their mean",
        )  # fmt: skip


def _number(value: Any) -> float:
    """Return the number in a cell; NaN for an empty cell, infinity for a value that is not a number."""
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "nan")):
        return float("nan")
    try:
        return float("inf") if isinstance(value, str) and "_" in value else float(value)  # Python's 1_000
    except (TypeError, ValueError, OverflowError):
        return float("inf")
