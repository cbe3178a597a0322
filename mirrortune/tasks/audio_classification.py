# SPDX-License-Identifier: Apache-2.0
"""audio-classification: a recording -> one of C classes. Cross-entropy; accuracy unless other metrics are named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mirrortune.columns import choose_audio_column
from mirrortune.data import Split
from mirrortune.errors import ConfigError
from mirrortune.examples import Batch, Targets
from mirrortune.labels import MISSING, class_indices, class_names, label_fields
from mirrortune.metrics import check_metrics
from mirrortune.model import ModelSource
from mirrortune.probes import noise_recordings
from mirrortune.recordings import RecordingExamples, RecordingReader, encode_recordings
from mirrortune.tokens import Reading

_LONGEST = 10.0  # seconds, the default


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """See :class:`mirrortune.tasks.Task`.

    Attributes:
        labels: the class names, in the order of the model's outputs.
        max_seconds: of a recording; longer ones are cut.
    """

    audio_column: str
    label_column: str
    metric_names: tuple[str, ...]
    selection_metric: str
    labels: tuple[str, ...]
    max_seconds: float
    kind: str = "audio-classification"
    auto_class: str = "AutoModelForAudioClassification"

    @classmethod
    def from_rows(
        cls,
        table: pa.Table,
        source: str,
        *,
        audio_column: str | None = None,
        label_column: str | None = None,
        metrics: tuple[str, ...] | None = None,
        selection_metric: str | None = None,
        labels: tuple[str, ...] | None = None,
        max_seconds: float | None = None,
    ) -> tuple[Task, list[str]]:
        """The task with class names from ``labels``, else the column's own features, else the values found, sorted."""
        audio, label, notes = choose_audio_column(table, audio_column, label_column, source)
        names = class_names(table, label, source, labels)
        metric_names = metrics or ("accuracy",)
        check_metrics(metric_names, "class", len(names), selection_metric)
        task = cls(
            audio_column=audio,
            label_column=label,
            metric_names=metric_names,
            selection_metric=selection_metric or metric_names[0],
            labels=names,
            max_seconds=max_seconds or _LONGEST,
        )
        return task, notes

    def columns(self) -> list[tuple[str, str]]:
        """See :class:`mirrortune.tasks.Task`."""
        return [("audio", self.audio_column), ("label", self.label_column)]

    def strata(self, split: Split) -> npt.NDArray[np.int64]:
        """The classes."""
        return class_indices(split.table, self.label_column, self.labels, split.source, allow_missing=False)

    def config_fields(self) -> dict[str, Any]:
        """See :class:`mirrortune.tasks.Task`."""
        return label_fields(self.labels)

    def load_processor(self, source: ModelSource) -> RecordingReader:
        """The feature extractor."""
        return RecordingReader.load(source, self.max_seconds)

    def resolve_length(self, asked: int | None, processor: RecordingReader, config: Any) -> None:
        """None: recordings have no tokens."""
        if asked is not None:
            raise ConfigError("data.max_length", f"got {asked}, but recordings have no tokens",
                              fix="Set data.max_seconds")  # fmt: skip

    def encode(self, split: Split, processor: RecordingReader, reading: Reading) -> RecordingExamples:
        """See :class:`mirrortune.tasks.Task`."""
        targets = class_indices(
            split.table, self.label_column, self.labels, split.source, allow_missing=reading.allow_missing
        )
        return encode_recordings(split, self.audio_column, targets, targets == MISSING, processor, seed=reading.seed)

    def loss(self, outputs: Any, targets: Tensor) -> tuple[Tensor, int]:
        """Cross-entropy of logits (B, C) against class indices (B,), summed."""
        return F.cross_entropy(outputs.logits.float(), targets, reduction="sum"), targets.shape[0]

    def judge(self, model: Any, inputs: Batch, outputs: Any, targets: Tensor) -> npt.NDArray[np.float32]:
        """Logits (B, C)."""
        return np.asarray(outputs.logits.float().cpu().numpy())

    def answers(self, judged: Sequence[Any], examples: Any) -> tuple[Targets, Targets]:
        """The class of the largest logit and the right class, each (N,)."""
        return np.stack(judged).argmax(axis=-1), examples.targets

    def probe(self, processor: RecordingReader, config: Any) -> Batch:
        """See :class:`mirrortune.tasks.Task`."""
        return noise_recordings(processor)
