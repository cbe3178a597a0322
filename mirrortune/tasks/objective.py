# SPDX-License-Identifier: Apache-2.0
"""The loss that training minimises: the task's loss, with optional class weights and label smoothing.

Evaluation always uses the unweighted loss of the task, so that runs with different weights can be compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mirrortune.data.examples import Batch, Examples
from mirrortune.errors import ConfigError, did_you_mean, first_of
from mirrortune.registry import task_kinds
from mirrortune.tasks.base import Task, labels_of, task_class
from mirrortune.tasks.classes import OneOfClasses, SmoothsLabels, WeighsClasses

Weights = Literal["balanced"] | Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassSettings:
    """Settings for imbalanced classes: ``train.class_weights``, ``label_smoothing`` and ``balance`` of a recipe."""

    class_weights: Weights | None = None
    label_smoothing: float = 0.0
    balance: bool = False


class Objective:
    """The training loss of a task.

    Args:
        task: defines the loss.
        weights: class weights in the loss, shape (C,); None for an unweighted loss.
        smoothing: share of each target that is spread evenly over all classes.
        classes: class of each training row, shape (N,), to draw every epoch evenly from; None to use each row once.
    """

    def __init__(
        self,
        task: Task,
        *,
        weights: npt.NDArray[np.float32] | None = None,
        smoothing: float = 0.0,
        classes: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self.task, self.weights, self.smoothing, self.classes = task, weights, smoothing, classes
        self._on_device: Tensor | None = None

    def loss(self, inputs: Batch, outputs: Any, targets: Tensor) -> tuple[Tensor, int | Tensor]:
        """Return the summed loss of a batch and the number of items, as :meth:`mirrortune.tasks.base.Task.loss` does.

        A weight multiplies the loss of an item and not the number of items: a batch without rare rows has a small loss.
        """
        if self.weights is None and not self.smoothing:
            return self.task.loss(inputs, outputs, targets)
        assert isinstance(self.task, SmoothsLabels)
        if self.weights is not None and (self._on_device is None or self._on_device.device != targets.device):
            self._on_device = torch.from_numpy(self.weights).to(targets.device)
        return self.task.training_loss(outputs, targets, smoothing=self.smoothing, weights=self._on_device)

    def notes(self) -> Iterable[str]:
        """Yield a line on the weights of classes and one on even draws, where there are any."""
        if self.weights is not None:
            names = labels_of(self.task)
            weighed = (f"{names[i]} {self.weights[i]:.3g}" for i in np.argsort(-self.weights, kind="stable"))
            yield f"  class weights: {first_of(weighed, _SHOWN)}"
        if self.classes is not None:
            counts = np.bincount(self.classes)
            each = len(self.classes) // np.count_nonzero(counts)
            low, high = counts[counts > 0].min(), counts.max()
            yield f"  balance: an epoch draws about {each:,} rows of each class, which have {low:,} to {high:,}"


_SHOWN = 8


def setting_problems(settings: ClassSettings, kind: str | None, *, is_streamed: bool) -> list[ConfigError]:
    """Return an error for each setting that the kind of task, or streamed data, does not support."""
    weights, found = settings.class_weights, []
    if weights == "balanced" and settings.balance:
        found.append(ConfigError("train.class_weights", "balanced and train.balance correct the same twice",
                                 fix="Keep one of them"))  # fmt: skip
    needs = [
        ("train.class_weights", weights is not None, WeighsClasses, "no classes to weigh"),
        ("train.label_smoothing", settings.label_smoothing > 0, SmoothsLabels, "no labels to smooth"),
        ("train.balance", settings.balance, OneOfClasses, "no class for each row"),
    ]
    if kind is not None and kind in task_kinds():
        found += [
            ConfigError(key, f"{kind} has {lacks}", allowed=", ".join(_kinds(need)), fix="Remove it")
            for key, is_set, need, lacks in needs
            if is_set and not issubclass(task_class(kind), need)
        ]
    if is_streamed:
        counting = {"train.class_weights": weights == "balanced", "train.balance": settings.balance}
        found += [
            ConfigError(key, "the classes of a stream are not known before its end",
                        fix="Give weights as {NAME: WEIGHT}, or remove it")
            for key, is_set in counting.items() if is_set
        ]  # fmt: skip
    return found


def make_objective(task: Task, settings: ClassSettings, train: Examples) -> Objective:
    """Make the training loss of a task.

    Args:
        task: defines the loss and the classes.
        settings: settings for imbalanced classes.
        train: training examples.

    Raises:
        ConfigError: a weight is for an unknown class, or even draws are asked for rows with several classes.
    """
    weights = None
    if settings.class_weights is not None:
        assert isinstance(task, WeighsClasses)
        if settings.class_weights == "balanced":
            weights = task.balanced_weights(train)
        else:
            weights = _named(settings.class_weights, labels_of(task))
    classes = getattr(train, "targets", None) if settings.balance else None
    if settings.balance and (not isinstance(classes, np.ndarray) or classes.ndim != 1):
        raise ConfigError("train.balance", "rows may have several labels, and are not drawn by class",
                          fix="Use train.class_weights=balanced")  # fmt: skip
    return Objective(task, weights=weights, smoothing=settings.label_smoothing, classes=classes)


def _named(weights: Mapping[str, float], labels: tuple[str, ...]) -> npt.NDArray[np.float32]:
    """Return the weight of each class, 1 by default."""
    if unknown := [name for name in weights if name not in labels]:
        shown = ", ".join(labels[:_MOST_LISTED]) + (", ..." if len(labels) > _MOST_LISTED else "")
        raise ConfigError.several([
            ConfigError("train.class_weights", f"no class is called '{name}'.{did_you_mean(name, labels)}",
                        allowed=shown)
            for name in unknown
        ])  # fmt: skip
    return np.array([weights.get(name, 1.0) for name in labels], dtype=np.float32)


_MOST_LISTED = 40


def _kinds(need: type) -> list[str]:
    return [kind for kind in task_kinds() if issubclass(task_class(kind), need)]
