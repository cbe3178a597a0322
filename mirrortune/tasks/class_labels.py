# SPDX-License-Identifier: Apache-2.0
"""What the kinds of task share that predict one of C classes for a row: targets, loss, answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from typing_extensions import override

from mirrortune.data.dataset import Split
from mirrortune.data.examples import Batch, Targets
from mirrortune.data.labels import class_indices
from mirrortune.tasks.base import HasLabels, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class OneOfClasses(Task, HasLabels):
    """A task that predicts one of C classes.

    Attributes:
        label_column: the column of classes.
        labels: the class names, in the order of the model's outputs.
    """

    label_column: str
    metric_names: tuple[str, ...]
    selection_metric: str
    labels: tuple[str, ...]

    def class_targets(self, split: Split, *, allow_missing: bool) -> npt.NDArray[np.int64]:
        """Return the class of every row (N,), -1 where there is none; DataError for that unless ``allow_missing``."""
        return class_indices(split.table, self.label_column, self.labels, split.places, allow_missing=allow_missing)

    @override
    def strata(self, split: Split) -> Targets | None:
        return self.class_targets(split, allow_missing=False)

    @override
    def loss(self, outputs: Any, targets: Tensor) -> tuple[Tensor, int]:
        """Return the cross-entropy of logits (B, C) against class indices (B,), summed."""
        return F.cross_entropy(outputs.logits.float(), targets, reduction="sum"), targets.shape[0]

    @override
    def judge(self, model: Any, inputs: Batch, outputs: Any, targets: Tensor) -> npt.NDArray[np.float32]:
        """Return the logits (B, C)."""
        return np.asarray(outputs.logits.float().cpu().numpy())

    @override
    def answers(self, judged: Sequence[Any], examples: Any) -> tuple[Targets, Targets]:
        """Return the class of the largest logit and the true class, each (N,)."""
        return np.stack(judged).argmax(axis=-1), examples.targets
