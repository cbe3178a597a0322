# SPDX-License-Identifier: Apache-2.0
"""audio-classification: a recording -> one of C classes. Cross-entropy; accuracy by default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from typing_extensions import override

from mirrortune.data.columns import choose_media_columns
from mirrortune.data.dataset import Split
from mirrortune.data.examples import Batch
from mirrortune.data.files.audio import AudioExamples, AudioReader, encode_audio
from mirrortune.data.labels import MISSING, class_names, label_fields, label_remarks
from mirrortune.data.tokenize import Reading
from mirrortune.errors import ConfigError
from mirrortune.models.load import ModelSource
from mirrortune.tasks.classes import OneOfClasses
from mirrortune.tasks.metrics import KINDS_OWN, Scores
from mirrortune.tasks.probes import noise_audio

_LONGEST = 10.0  # default maximum length of a recording, in seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Task(OneOfClasses):
    """Classification of recordings.

    Attributes:
        audio_column: column of the recordings.
        max_seconds: maximum length of a recording; longer ones are truncated.
    """

    audio_column: str
    max_seconds: float
    kind: str = "audio-classification"
    auto_class: str = "AutoModelForAudioClassification"

    @classmethod
    @override
    def from_rows(
        cls, table: pa.Table, source: str, scores: Scores = KINDS_OWN, *,
        audio_column: str | None = None, label_column: str | None = None, labels: tuple[str, ...] | None = None,
        max_seconds: float | None = None,
    ) -> tuple[Task, list[str]]:  # fmt: skip
        """Create the task; class names are ``labels``, else those of the column's features, else its sorted values."""
        audio, label, notes = choose_media_columns(table, "audio", audio_column, label_column, source)
        names = class_names(table, label, source, labels)
        chosen = scores.fields(("accuracy",), "class", len(names))
        longest = max_seconds or _LONGEST
        task = cls(audio_column=audio, label_column=label, labels=names, max_seconds=longest, **chosen)
        return task, [*notes, *label_remarks(table, label, names)]

    @override
    def columns(self) -> list[tuple[str, str]]:
        return [("audio", self.audio_column), ("label", self.label_column)]

    @override
    def config_fields(self) -> dict[str, Any]:
        return label_fields(self.labels)

    @override
    def load_processor(self, source: ModelSource) -> AudioReader:
        return AudioReader.load(source, self.max_seconds)

    @override
    def resolve_length(self, asked: int | None, processor: AudioReader, config: Any) -> None:
        if asked is not None:
            raise ConfigError("data.max_length", f"got {asked}, but recordings have no tokens",
                              fix="Set data.max_seconds")  # fmt: skip

    @override
    def encode(self, split: Split, processor: AudioReader, reading: Reading) -> AudioExamples:
        targets = self.class_targets(split, allow_missing=reading.allow_missing)
        return encode_audio(split, self.audio_column, targets, targets == MISSING, processor, seed=reading.seed)

    @override
    def probe(self, processor: AudioReader, config: Any) -> Batch:
        return noise_audio(processor)
