# SPDX-License-Identifier: Apache-2.0
"""text-classification: one or two texts -> one of C classes. Cross-entropy; accuracy unless other metrics are named."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mirrortune.errors import DataError, did_you_mean
from mirrortune.metrics import check_metrics, score

MISSING = -1
# More classes than this, in more than half of the rows each its own, is a text or an id and not a label.
_MANY_CLASSES = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """See :class:`mirrortune.tasks.Task`. ``labels`` are the class names, in the order of the model's outputs."""

    text_columns: tuple[str, ...]
    label_column: str
    metric_names: tuple[str, ...]
    selection_metric: str
    labels: tuple[str, ...]
    kind: str = "text-classification"
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
        """The task with class names from ``labels``, else the column's own features, else the values found, sorted."""
        column = table.column(label_column)
        names = labels or _feature_names(table, label_column) or _names_in(column, source, label_column)
        if len(names) < 2:
            raise DataError(
                source,
                f"label column '{label_column}' has one class only ({names[0] if names else 'no value'!r})",
                allowed="two classes or more",
                fix="Add rows of another class, or name another column with --label-column",
            )
        metric_names = metrics or ("accuracy",)
        check_metrics(metric_names, "class", len(names), selection_metric)
        return cls(
            text_columns=text_columns,
            label_column=label_column,
            metric_names=metric_names,
            selection_metric=selection_metric or metric_names[0],
            labels=names,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Task:
        """See :class:`mirrortune.tasks.Task`."""
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """See :class:`mirrortune.tasks.Task`."""
        return asdict(self)

    def targets(self, table: pa.Table, source: str, *, allow_missing: bool) -> npt.NDArray[np.int64]:
        """Class indices (N,); -1 where there is none."""
        column = table.column(self.label_column)
        features = _feature_names(table, self.label_column)
        values = [_indexed(v, features) for v in column.to_pylist()]
        index = {name: i for i, name in enumerate(self.labels)}
        unknown = sorted({v for v in values if v is not None and v not in index})
        if unknown:
            row = next(i for i, v in enumerate(values) if v == unknown[0])
            raise DataError(
                f"{source} row {row + 1}",
                f"label {unknown[0]!r} is not among the classes.{did_you_mean(unknown[0], self.labels)}",
                allowed=", ".join(self.labels),
                fix="Correct the rows, or list every class in task.labels",
            )
        found = np.array([MISSING if v is None else index[v] for v in values], dtype=np.int64)
        _refuse_missing(found == MISSING, source, self.label_column, allow_missing=allow_missing)
        return found

    def strata(self, targets: npt.NDArray[np.generic]) -> npt.NDArray[np.generic] | None:
        """The classes themselves."""
        return targets

    def is_missing(self, targets: npt.NDArray[np.generic]) -> npt.NDArray[np.bool_]:
        """See :class:`mirrortune.tasks.Task`."""
        return np.asarray(targets == MISSING)

    def config_fields(self) -> dict[str, Any]:
        """See :class:`mirrortune.tasks.Task`."""
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {name: i for i, name in enumerate(self.labels)},
            "problem_type": "single_label_classification",
        }

    def loss(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        """Cross-entropy of logits (N, C) against class indices (N,), summed."""
        return F.cross_entropy(logits.float(), targets, reduction="sum"), targets.shape[0]

    def predict(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """The class of the largest logit."""
        return np.asarray(logits.argmax(axis=-1), dtype=np.int64)

    def metrics(self, predictions: npt.NDArray[np.generic], references: npt.NDArray[np.generic]) -> dict[str, float]:
        """See :class:`mirrortune.tasks.Task`."""
        return score(self.metric_names, predictions, references)


def _refuse_missing(missing: npt.NDArray[np.bool_], source: str, column: str, *, allow_missing: bool) -> None:
    count = int(missing.sum())
    if count and not allow_missing:
        first = ", ".join(str(i + 1) for i in np.flatnonzero(missing)[:5]) + (", ..." if count > 5 else "")
        raise DataError(
            source,
            f"{count} of {len(missing)} rows have no label in column '{column}' (rows {first})",
            allowed="a label in every row used for training or validation",
            fix="Fill or remove these rows",
        )


def _feature_names(table: pa.Table, column: str) -> tuple[str, ...] | None:
    """Class names that the datasets library stored with the column (ClassLabel), or None."""
    stored = (table.schema.metadata or {}).get(b"huggingface")
    features = json.loads(stored).get("info", {}).get("features", {}) if stored else {}
    names = features.get(column, {}).get("names") if isinstance(features.get(column), dict) else None
    return tuple(names) if names else None


def _indexed(value: Any, features: tuple[str, ...] | None) -> str | None:
    if features is not None and isinstance(value, int) and not isinstance(value, bool):
        return features[value] if 0 <= value < len(features) else None
    return _as_name(value)


def _as_name(value: Any) -> str | None:
    """A class name for one label value: text stripped, 1.0 the same class as 1; None where there is no label."""
    if value is None or (isinstance(value, float) and value != value):  # noqa: PLR0124  (NaN)
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    name = str(value).strip()
    return name if name and name.lower() != "nan" else None


def _names_in(column: pa.ChunkedArray, source: str, name: str) -> tuple[str, ...]:
    kind = column.type
    if pa.types.is_nested(kind):
        raise DataError(
            source, f"label column '{name}' holds {kind}", allowed="one class a row, as text or a whole number"
        )
    found = sorted({v for v in map(_as_name, column.to_pylist()) if v is not None})
    numbers = [_number(v) for v in found]
    is_fraction = any(n is not None and not n.is_integer() for n in numbers)
    if found and all(n is not None for n in numbers) and is_fraction:
        raise DataError(
            source, f"label column '{name}' holds real numbers (such as {found[0]}), not classes",
            allowed="classes as text or whole numbers", fix="Use --task regression, or another --label-column",
        )  # fmt: skip
    if len(found) > _MANY_CLASSES and len(found) > 0.5 * len(column):
        raise DataError(
            source, f"label column '{name}' has {len(found)} different values in {len(column)} rows",
            allowed="classes that repeat", fix="Name another column with --label-column, or use --task regression",
        )  # fmt: skip
    if found and all(n is not None for n in numbers):
        found.sort(key=float)  # "10" after "9"
    return tuple(found)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
