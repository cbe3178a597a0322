# SPDX-License-Identifier: Apache-2.0
"""What kinds of task share that choose one of C classes for each row, whatever the row is: targets, loss, answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mirrortune.data.dataset import Split
from mirrortune.data.examples import Batch, Targets
from mirrortune.data.labels import class_indices


@dataclass(frozen=True, slots=True, kw_only=True)
class OneOfClasses:
    """Part of a task, see :class:`mirrortune.tasks.base.Task`.

    Attributes:
        label_column: the column of classes.
        metric_names: of class indices.
        selection_metric: one of them.
        labels: the class names, in the order of the model's outputs.
    """

    label_column: str
    metric_names: tuple[str, ...]
    selection_metric: str
    labels: tuple[str, ...]

    def class_targets(self, split: Split, *, allow_missing: bool) -> npt.NDArray[np.int64]:
        """The class of every row (N,), -1 where there is none; DataError if there is none and must be."""
        return class_indices(split.table, self.label_column, self.labels, split.places, allow_missing=allow_missing)

    def strata(self, split: Split) -> Targets | None:
        """The classes."""
        return self.class_targets(split, allow_missing=False)

    def loss(self, outputs: Any, targets: Tensor) -> tuple[Tensor, int]:
        """Cross-entropy of logits (B, C) against class indices (B,), summed."""
        return F.cross_entropy(outputs.logits.float(), targets, reduction="sum"), targets.shape[0]

    def judge(self, model: Any, inputs: Batch, outputs: Any, targets: Tensor) -> npt.NDArray[np.float32]:
        """Logits (B, C)."""
        return np.asarray(outputs.logits.float().cpu().numpy())

    def answers(self, judged: Sequence[Any], examples: Any) -> tuple[Targets, Targets]:
        """The class of the largest logit and the right class, each (N,)."""
        return np.stack(judged).argmax(axis=-1), examples.targets
