# SPDX-License-Identifier: Apache-2.0
"""image-classification: an image of any mode -> one of C classes. Cross-entropy; accuracy by default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from typing_extensions import override

from mirrortune.data.columns import choose_media_columns
from mirrortune.data.dataset import Split
from mirrortune.data.examples import Batch
from mirrortune.data.files.images import ImageExamples, ImageReader, check_augmentation, encode_images
from mirrortune.data.labels import MISSING, class_names, label_fields, label_remarks
from mirrortune.data.tokenize import Reading
from mirrortune.errors import ConfigError
from mirrortune.models.load import ModelSource
from mirrortune.tasks.classes import OneOfClasses
from mirrortune.tasks.metrics import KINDS_OWN, Scores
from mirrortune.tasks.probes import noise_images


@dataclass(frozen=True, slots=True, kw_only=True)
class Task(OneOfClasses):
    """Classification of images.

    Attributes:
        image_column: column of the images.
        image_size: side of the square input, in pixels; None for the size that the image processor defines.
        augment: name of the augmentation applied to training images.
    """

    image_column: str
    image_size: int | None = None
    augment: str = "none"
    kind: str = "image-classification"
    auto_class: str = "AutoModelForImageClassification"

    @classmethod
    @override
    def from_rows(
        cls, table: pa.Table, source: str, scores: Scores = KINDS_OWN, *,
        image_column: str | None = None, label_column: str | None = None, labels: tuple[str, ...] | None = None,
        image_size: int | None = None, augment: str | None = None,
    ) -> tuple[Task, list[str]]:  # fmt: skip
        """Create the task; class names are ``labels``, else those of the column's features, else its sorted values."""
        check_augmentation(augment or "none")
        image, label, notes = choose_media_columns(table, "image", image_column, label_column, source)
        names = class_names(table, label, source, labels)
        task = cls(
            image_column=image, label_column=label, labels=names, image_size=image_size, augment=augment or "none",
            **scores.fields(("accuracy",), "class", len(names)),
        )  # fmt: skip
        return task, [*notes, *label_remarks(table, label, names)]

    @override
    def columns(self) -> list[tuple[str, str]]:
        return [("image", self.image_column), ("label", self.label_column)]

    @override
    def config_fields(self) -> dict[str, Any]:
        return {**label_fields(self.labels), "problem_type": "single_label_classification"}

    @override
    def load_processor(self, source: ModelSource) -> ImageReader:
        return ImageReader.load(source, self.auto_class, self.image_size)

    @override
    def resolve_length(self, asked: int | None, processor: ImageReader, config: Any) -> None:
        if asked is not None:
            raise ConfigError("data.max_length", f"got {asked}, but images have no tokens", fix="Set data.image_size")

    @override
    def encode(self, split: Split, processor: ImageReader, reading: Reading) -> ImageExamples:
        targets = self.class_targets(split, allow_missing=reading.allow_missing)
        return encode_images(
            split, self.image_column, targets, targets == MISSING, processor, augment=self.augment, seed=reading.seed
        )

    @override
    def probe(self, processor: ImageReader, config: Any) -> Batch:
        return processor.pixels(noise_images(processor.num_channels), "probe")
