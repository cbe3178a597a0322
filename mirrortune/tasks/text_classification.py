# SPDX-License-Identifier: Apache-2.0
"""text-classification: one or two texts -> one of C classes. Cross-entropy; accuracy unless other metrics are named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mirrortune.columns import choose_columns
from mirrortune.data import Split
from mirrortune.examples import Batch, Targets, TokenExamples
from mirrortune.labels import MISSING, class_indices, class_names, label_fields
from mirrortune.metrics import check_metrics
from mirrortune.model import ModelSource, load_tokenizer
from mirrortune.probes import text_probe
from mirrortune.tokens import Reading, encode_texts, resolve_max_length


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
        text_columns: tuple[str, ...] | None = None,
        label_column: str | None = None,
        metrics: tuple[str, ...] | None = None,
        selection_metric: str | None = None,
        labels: tuple[str, ...] | None = None,
    ) -> tuple[Task, list[str]]:
        """The task with class names from ``labels``, else the column's own features, else the values found, sorted."""
        text, label, notes = choose_columns(table, text_columns, label_column, source)
        names = class_names(table, label, source, labels)
        metric_names = metrics or ("accuracy",)
        check_metrics(metric_names, "class", len(names), selection_metric)
        task = cls(
            text_columns=text,
            label_column=label,
            metric_names=metric_names,
            selection_metric=selection_metric or metric_names[0],
            labels=names,
        )
        return task, notes

    def columns(self) -> list[tuple[str, str]]:
        """See :class:`mirrortune.tasks.Task`."""
        return [*(("text", c) for c in self.text_columns), ("label", self.label_column)]

    def strata(self, split: Split) -> npt.NDArray[np.int64]:
        """The classes."""
        return class_indices(split.table, self.label_column, self.labels, split.source, allow_missing=False)

    def config_fields(self) -> dict[str, Any]:
        """See :class:`mirrortune.tasks.Task`."""
        return {**label_fields(self.labels), "problem_type": "single_label_classification"}

    def load_processor(self, source: ModelSource) -> Any:
        """The tokenizer."""
        return load_tokenizer(source)

    def resolve_length(self, asked: int | None, processor: Any, config: Any) -> int:
        """See :class:`mirrortune.tasks.Task`."""
        return resolve_max_length(asked, processor, config)

    def encode(self, split: Split, processor: Any, reading: Reading) -> TokenExamples:
        """See :class:`mirrortune.tasks.Task`."""
        targets = class_indices(
            split.table, self.label_column, self.labels, split.source, allow_missing=reading.allow_missing
        )
        facts = [self.kind, self.version]
        return encode_texts(split, self.text_columns, targets, targets == MISSING, processor, reading, facts)

    def loss(self, outputs: Any, targets: Tensor) -> tuple[Tensor, int]:
        """Cross-entropy of logits (B, C) against class indices (B,), summed."""
        return F.cross_entropy(outputs.logits.float(), targets, reduction="sum"), targets.shape[0]

    def judge(self, model: Any, inputs: Batch, outputs: Any, targets: Tensor) -> npt.NDArray[np.float32]:
        """Logits (B, C)."""
        return np.asarray(outputs.logits.float().cpu().numpy())

    def answers(self, judged: Sequence[Any], examples: Any) -> tuple[Targets, Targets]:
        """The class of the largest logit and the right class, each (N,)."""
        return np.stack(judged).argmax(axis=-1), examples.targets

    def probe(self, processor: Any, config: Any) -> Batch:
        """See :class:`mirrortune.tasks.Task`."""
        return text_probe(processor, config, num_texts=len(self.text_columns))
