# SPDX-License-Identifier: Apache-2.0
"""regression: one or two texts -> one real number. Squared error; Pearson and Spearman correlation unless others are
named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from torch import Tensor

from mirrortune.data.columns import choose_columns
from mirrortune.data.dataset import Split
from mirrortune.data.examples import Batch, Targets, TokenExamples
from mirrortune.data.files.row_chunks import cells
from mirrortune.data.labels import label_fields, refuse_missing
from mirrortune.data.tokenize import Reading, encode_texts, resolve_max_length
from mirrortune.errors import DataError
from mirrortune.models.load import ModelSource, load_tokenizer
from mirrortune.tasks.metrics import KINDS_OWN, Scores
from mirrortune.tasks.probes import text_probe

_LARGEST = float(np.finfo(np.float32).max)  # targets are float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """See :class:`mirrortune.tasks.base.Task`. Targets are used as they stand, neither centred nor scaled."""

    text_columns: tuple[str, ...]
    label_column: str
    metric_names: tuple[str, ...]
    selection_metric: str
    kind: str = "regression"
    auto_class: str = "AutoModelForSequenceClassification"
    version: int = 1

    @classmethod
    def from_rows(
        cls, table: pa.Table, source: str, scores: Scores = KINDS_OWN, *,
        text_columns: tuple[str, ...] | None = None, label_column: str | None = None,
    ) -> tuple[Task, list[str]]:  # fmt: skip
        """The task; DataError if the label column is not made of finite numbers or is constant."""
        text, label, notes = choose_columns(table, text_columns, label_column, source, numbers=True)
        task = cls(text_columns=text, label_column=label, **scores.fields(("pearson", "spearmanr"), "number"))
        # Cells that hold no numbers are refused with their rows where splits are checked.
        values = np.array([_number(value) for value in cells(table, label)], dtype=np.float64)
        known = values[~np.isnan(values)]
        if len(known) and np.isfinite(known).all() and np.ptp(known) == 0:
            raise DataError(
                source,
                f"label column '{label}' holds one value only ({known[0]:g})",
                allowed="numbers that differ",
                fix="Name another column with --label-column",
            )
        return task, notes

    def columns(self) -> list[tuple[str, str]]:
        """See :class:`mirrortune.tasks.base.Task`."""
        return [*(("text", c) for c in self.text_columns), ("label", self.label_column)]

    def targets(self, split: Split) -> npt.NDArray[np.float32]:
        """Numbers (N,), float32; NaN where there is none."""
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

    def strata(self, split: Split) -> None:
        """None: rows are split at random."""
        self._complete_targets(split)

    def config_fields(self) -> dict[str, Any]:
        """See :class:`mirrortune.tasks.base.Task`."""
        return {**label_fields([self.label_column]), "problem_type": "regression"}

    def load_processor(self, source: ModelSource) -> Any:
        """The tokenizer."""
        return load_tokenizer(source)

    def resolve_length(self, asked: int | None, processor: Any, config: Any) -> int:
        """See :class:`mirrortune.tasks.base.Task`."""
        return resolve_max_length(asked, processor, config)

    def encode(self, split: Split, processor: Any, reading: Reading) -> TokenExamples:
        """See :class:`mirrortune.tasks.base.Task`."""
        values = self.targets(split) if reading.allow_missing else self._complete_targets(split)
        facts = (self.kind, self.version)
        return encode_texts(split, self.text_columns, values, np.isnan(values), processor, reading, facts)[0]

    def loss(self, outputs: Any, targets: Tensor) -> tuple[Tensor, int]:
        """Squared error of logits (B, 1) against numbers (B,), summed."""
        return (outputs.logits.float().squeeze(-1) - targets).square().sum(), targets.shape[0]

    def judge(self, model: Any, inputs: Batch, outputs: Any, targets: Tensor) -> npt.NDArray[np.float32]:
        """Predictions (B,)."""
        return np.asarray(outputs.logits[:, 0].float().cpu().numpy())

    def answers(self, judged: Sequence[Any], examples: Any) -> tuple[Targets, Targets]:
        """The single output and the right number, each (N,)."""
        return np.array(judged), examples.targets

    def probe(self, processor: Any, config: Any) -> Batch:
        """See :class:`mirrortune.tasks.base.Task`."""
        return text_probe(processor, config, num_texts=len(self.text_columns))

    def _complete_targets(self, split: Split) -> npt.NDArray[np.float32]:
        values = self.targets(split)
        refuse_missing(np.isnan(values), split.places, self.label_column, "number")
        return values


def _number(value: Any) -> float:
    """The number that a cell holds; NaN for none, infinity for what is no number."""
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "nan")):
        return float("nan")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return float("inf")
