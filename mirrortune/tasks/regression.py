# SPDX-License-Identifier: Apache-2.0
"""regression: one or two texts -> one real number. Squared error; Pearson and Spearman correlation unless others are
named.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from torch import Tensor

from mirrortune.errors import DataError
from mirrortune.metrics import check_metrics, score

_LARGEST = float(np.finfo(np.float32).max)  # targets are float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """See :class:`mirrortune.tasks.Task`. Targets are used as they stand, neither centred nor scaled."""

    text_columns: tuple[str, ...]
    label_column: str
    metric_names: tuple[str, ...]
    selection_metric: str
    kind: str = "regression"
    auto_class: str = "AutoModelForSequenceClassification"
    version: int = 1

    @classmethod
    def from_rows(
        cls,
        table: pa.Table,
        source: str,
        *,
        text_columns: tuple[str, ...],
        label_column: str,
        metrics: tuple[str, ...] | None = None,
        selection_metric: str | None = None,
        labels: tuple[str, ...] | None = None,
    ) -> Task:
        """The task; DataError if the label column is not made of finite numbers or is constant."""
        if labels is not None:
            raise DataError(source, "task.labels are class names, and regression has none", fix="Remove task.labels")
        metric_names = metrics or ("pearson", "spearmanr")
        check_metrics(metric_names, "number", selection=selection_metric)
        task = cls(
            text_columns=text_columns,
            label_column=label_column,
            metric_names=metric_names,
            selection_metric=selection_metric or metric_names[0],
        )
        values = task.targets(table, source, allow_missing=True)
        known = values[~np.isnan(values)]
        if len(known) and np.ptp(known) == 0:
            raise DataError(
                source,
                f"label column '{label_column}' holds one value only ({known[0]:g})",
                allowed="numbers that differ",
                fix="Name another column with --label-column",
            )
        return task

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Task:
        """See :class:`mirrortune.tasks.Task`."""
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """See :class:`mirrortune.tasks.Task`."""
        return asdict(self)

    def targets(self, table: pa.Table, source: str, *, allow_missing: bool) -> npt.NDArray[np.float32]:
        """Numbers (N,), float32; NaN where there is none."""
        values = [self._parse(v, source, i) for i, v in enumerate(table.column(self.label_column).to_pylist())]
        found = np.array(values, dtype=np.float32)
        count = int(np.isnan(found).sum())
        if count and not allow_missing:
            first = ", ".join(str(i + 1) for i in np.flatnonzero(np.isnan(found))[:5])
            raise DataError(
                source,
                f"{count} of {len(found)} rows have no number in column '{self.label_column}' (rows {first})",
                allowed="a finite number in every row used for training or validation",
                fix="Fill or remove these rows",
            )
        return found

    def strata(self, targets: npt.NDArray[np.generic]) -> npt.NDArray[np.generic] | None:
        """None: rows are split at random."""
        return None

    def is_missing(self, targets: npt.NDArray[np.generic]) -> npt.NDArray[np.bool_]:
        """See :class:`mirrortune.tasks.Task`."""
        return np.isnan(targets.astype(np.float32))

    def config_fields(self) -> dict[str, Any]:
        """See :class:`mirrortune.tasks.Task`."""
        return {
            "num_labels": 1,
            "id2label": {0: self.label_column},
            "label2id": {self.label_column: 0},
            "problem_type": "regression",
        }

    def loss(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        """Squared error of logits (N, 1) against numbers (N,), summed."""
        return (logits.float().squeeze(-1) - targets).square().sum(), targets.shape[0]

    def predict(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The single output."""
        return logits[:, 0]

    def metrics(self, predictions: npt.NDArray[np.generic], references: npt.NDArray[np.generic]) -> dict[str, float]:
        """See :class:`mirrortune.tasks.Task`."""
        return score(self.metric_names, predictions, references)

    def _parse(self, value: Any, source: str, row: int) -> float:
        if value is None or (isinstance(value, str) and value.strip().lower() in ("", "nan")):
            return float("nan")
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("inf")
        if abs(number) > _LARGEST:
            raise DataError(
                f"{source} row {row + 1}",
                f"label {value!r} in column '{self.label_column}' is not a finite number",
                fix="Correct the row, or use --task text-classification for classes",
            )
        return number
