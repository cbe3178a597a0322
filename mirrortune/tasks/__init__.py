# SPDX-License-Identifier: Apache-2.0
"""Kinds of task. A kind is one file in this folder, named like the kind, with a class ``Task``; a dataset is one YAML
recipe.

The file's name is its registration: ``text_classification.py`` is ``text-classification``.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from torch import Tensor

from mirrortune.errors import unknown_name
from mirrortune.recipe import task_kinds

Targets = npt.NDArray[np.generic]


class Task(Protocol):
    """What the data, the loop, the evaluation and the files require of a kind of task; made once the columns are known.

    Attributes:
        kind: the kind's name.
        auto_class: name of the transformers class that loads a model for it.
        text_columns: one or two columns.
        label_column: the target's column.
        metric_names: metrics of every evaluation; the first one is not special.
        selection_metric: the metric (one of them) by which the best checkpoint is kept.
        version: raised when the features made from a row change; part of the token cache's key.
    """

    kind: str
    auto_class: str
    text_columns: tuple[str, ...]
    label_column: str
    metric_names: tuple[str, ...]
    selection_metric: str
    version: int

    @classmethod
    def from_rows(cls, table: pa.Table, source: str, **settings: Any) -> Task:
        """The task with its label space read from the training rows; DataError if they do not fit the kind."""

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Task:
        """The task that :meth:`to_dict` described."""

    def to_dict(self) -> dict[str, Any]:
        """Everything needed to evaluate again, as JSON data."""

    def targets(self, table: pa.Table, source: str, *, allow_missing: bool) -> Targets:
        """One target a row, shape (N,); missing ones (-1 or NaN) only if allowed. DataError with the row otherwise."""

    def strata(self, targets: Targets) -> Targets | None:
        """The groups that a split must keep in proportion, shape (N,), or None."""

    def is_missing(self, targets: Targets) -> npt.NDArray[np.bool_]:
        """Which targets are absent, shape (N,)."""

    def config_fields(self) -> dict[str, Any]:
        """Fields of the transformers config that fix the head's size and labels."""

    def loss(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        """Sum of the losses of all items, and how many items it sums over."""

    def predict(self, logits: npt.NDArray[np.float32]) -> Targets:
        """Predictions, shape (N,), from logits (N, outputs)."""

    def metrics(self, predictions: Targets, references: Targets) -> dict[str, float]:
        """Every metric of ``metric_names``."""


def task_class(kind: str, where: str = "task.kind") -> type[Task]:
    """The class of a kind; ConfigError with the nearest name otherwise."""
    if kind not in task_kinds():
        raise unknown_name(where, "kind of task", kind, task_kinds())
    module = importlib.import_module(f"{__name__}.{kind.replace('-', '_')}")
    return module.Task  # type: ignore[no-any-return]
