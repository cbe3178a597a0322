# SPDX-License-Identifier: Apache-2.0
"""text-classification: one or two texts -> one of C classes, or any number of them.

With one class per row, the loss is cross-entropy and the default metric accuracy. With several (the label column holds
lists, or ``labels`` names columns of 0 and 1), the loss is the binary cross-entropy of each class and the default
metrics are f1_micro and f1_macro.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from typing_extensions import override

from mirrortune.data.columns import choose_columns
from mirrortune.data.dataset import Split
from mirrortune.data.examples import Batch, Targets, TokenExamples
from mirrortune.data.files.arrow import cells, is_list
from mirrortune.data.labels import (
    MISSING,
    as_name,
    class_names,
    feature_names,
    in_order,
    label_fields,
    label_remarks,
    label_sets,
    refuse_missing,
    refuse_multi_hot,
)
from mirrortune.data.tokenize import Reading, encode_texts
from mirrortune.errors import DataError
from mirrortune.tasks.base import TextTask
from mirrortune.tasks.classes import OneOfClasses, classes_of, data_order
from mirrortune.tasks.metrics import KINDS_OWN, Scores
from mirrortune.tasks.predicting import Predictions, PredictOptions, check_numbers, plain_numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Task(TextTask, OneOfClasses):
    """Classification of one or two texts.

    Attributes:
        multi_label: whether a row may have any number of classes.
    """

    text_columns: tuple[str, ...]
    multi_label: bool = False
    kind: str = "text-classification"
    auto_class: str = "AutoModelForSequenceClassification"
    version: int = 1

    @classmethod
    @override
    def from_rows(
        cls, table: pa.Table, source: str, scores: Scores = KINDS_OWN, *,
        text_columns: tuple[str, ...] | None = None, label_column: str | None = None,
        labels: tuple[str, ...] | None = None,
    ) -> tuple[Task, list[str]]:  # fmt: skip
        """Create the task; class names are ``labels``, else those of the column's features, else its sorted values."""
        as_columns = label_column is None and bool(labels) and set(labels or ()) <= set(table.column_names)
        if as_columns:
            label_column = (labels or ("",))[0]
        text, label, notes = choose_columns(table, text_columns, label_column, source)
        multi_label = as_columns or is_list(table.schema.field(label).type)
        names = _names(table, label, source, labels) if multi_label else class_names(table, label, source, labels)
        own, target = (("f1_micro", "f1_macro"), "labels") if multi_label else (("accuracy",), "class")
        chosen = scores.fields(own, target, len(names))
        task = cls(text_columns=text, label_column=label, labels=names, multi_label=multi_label, **chosen)
        more = ["rows may have several labels"] if multi_label else label_remarks(table, label, names)
        return task, [*notes, *more]

    @override
    def columns(self) -> list[tuple[str, str]]:
        as_columns = self.multi_label and self.label_column in self.labels
        labels = self.labels if as_columns else (self.label_column,)
        return [*(("text", c) for c in self.text_columns), *(("label", c) for c in labels)]

    @override
    def strata(self, split: Split) -> Targets | None:
        """Return the classes; None if rows may have several."""
        targets = self._targets(split, allow_missing=False)[0]
        return None if self.multi_label else targets

    @override
    def config_fields(self) -> dict[str, Any]:
        kind = "multi_label_classification" if self.multi_label else "single_label_classification"
        return {**label_fields(self.labels), "problem_type": kind}

    @override
    def encode(self, split: Split, processor: Any, reading: Reading) -> TokenExamples:
        targets, missing = self._targets(split, allow_missing=reading.allow_missing)
        return encode_texts(split, self.text_columns, targets, missing, processor, reading, self.code)[0]

    @override
    def loss(self, inputs: Batch, outputs: Any, targets: Tensor) -> tuple[Tensor, int]:
        """Return the cross-entropy of logits (B, C) against class indices (B,), summed over rows; or the binary
        cross-entropy against 0 and 1 (B, C), summed over rows and classes.
        """
        if self.multi_label:
            logits = outputs.logits.float()
            return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum"), targets.numel()
        return OneOfClasses.loss(self, inputs, outputs, targets)

    @override
    def training_loss(
        self, outputs: Any, targets: Tensor, *, smoothing: float, weights: Tensor | None = None
    ) -> tuple[Tensor, int]:
        """Return the loss with class weights and label smoothing. With several labels per row, a class weight
        multiplies the loss of the rows that have the class only.
        """
        if not self.multi_label:
            return OneOfClasses.training_loss(self, outputs, targets, smoothing=smoothing, weights=weights)
        logits, wanted = outputs.logits.float(), targets * (1 - smoothing) + smoothing / 2
        loss = F.binary_cross_entropy_with_logits(logits, wanted, pos_weight=weights, reduction="sum")
        return loss, targets.numel()

    @override
    def class_counts(self, examples: Any) -> npt.NDArray[np.int64]:
        if self.multi_label:
            return np.asarray((examples.targets > 0).sum(axis=0))
        return OneOfClasses.class_counts(self, examples)

    @override
    def balanced_weights(self, examples: Any) -> npt.NDArray[np.float32]:
        """Return the balanced weights; with several labels per row, rows without the class over rows with it."""
        if not self.multi_label:
            return OneOfClasses.balanced_weights(self, examples)
        counts = self.class_counts(examples)
        lacking = np.maximum(len(examples) - counts, 1)
        return np.where(counts > 0, lacking / np.maximum(counts, 1), 1.0).astype(np.float32)

    @override
    def answers(self, judged: Sequence[Any], examples: Any) -> tuple[Targets, Targets]:
        """Return predicted and true classes, each (N,), or with several labels per row 0 and 1, each (N, C)."""
        if self.multi_label:
            order = data_order(self)
            return (np.stack(judged)[:, order] > 0).astype(np.int64), examples.targets[:, order]
        return OneOfClasses.answers(self, judged, examples)

    @override
    def probabilities(self, judged: Sequence[Any]) -> npt.NDArray[np.float64]:
        """Return the softmax of the logits; with several labels, the sigmoid of each. Shape (N, C)."""
        if self.multi_label:
            logits = np.stack(judged)[:, data_order(self)]
            return np.asarray(torch.from_numpy(logits).double().sigmoid().numpy())
        return OneOfClasses.probabilities(self, judged)

    @override
    def prediction_options(self) -> tuple[str, ...]:
        return ("threshold",) if self.multi_label else ("top",)

    @override
    def prediction_columns(
        self, judged: Sequence[Any], examples: Any, split: Split, options: PredictOptions
    ) -> Predictions:
        """Return the most probable classes; with several labels per row, lists of the classes whose probability is
        above the threshold (0.5 by default), and of their probabilities.
        """
        if not self.multi_label:
            return OneOfClasses.prediction_columns(self, judged, examples, split, options)
        logits = np.stack(judged)[:, data_order(self)]
        check_numbers(logits, split.places)
        threshold = 0.5 if options.threshold is None else options.threshold
        least = math.log(threshold / (1 - threshold)) if threshold else -math.inf  # 0 for 0.5, without rounding
        found = [np.flatnonzero(row > least) for row in logits.astype(np.float64)]
        shares, names = self.probabilities(judged), classes_of(self)
        return {
            "prediction": [[names[i] for i in chosen] for chosen in found],
            "scores": [plain_numbers(row[chosen]) for row, chosen in zip(shares, found, strict=True)],
        }

    def _targets(self, split: Split, *, allow_missing: bool) -> tuple[Targets, npt.NDArray[np.bool_]]:
        """Return the targets, (N,) or (N, C), and which rows have none, (N,)."""
        table, column, names, places = split.table, self.label_column, self.labels, split.places
        if not self.multi_label:
            targets = self.class_targets(split, allow_missing=allow_missing)
            return targets, targets == MISSING
        sets, missing = label_sets(table, column, names, places)
        if not allow_missing:
            refuse_missing(missing, places, column)
        return sets, missing


def _names(table: pa.Table, label: str, source: str, given: tuple[str, ...] | None) -> tuple[str, ...]:
    if is_list(table.schema.field(label).type):
        refuse_multi_hot(table, label, source)
    found = {name for row in cells(table, label) for name in map(as_name, row or ()) if name} if not given else ()
    names = given or feature_names(table, label) or tuple(in_order(set(found)))
    if len(names) < 2:
        raise DataError(source, f"label column '{label}' has {len(names)} classes", allowed="two classes or more",
                        fix="Name another column with --label-column")  # fmt: skip
    return names
