# SPDX-License-Identifier: Apache-2.0
"""Classification tasks: the loss, with optional class weights and label smoothing, and the scores of each class."""

from __future__ import annotations

import importlib.util
import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from typing_extensions import override

from mirrortune.data.columns import number_of
from mirrortune.data.dataset import Split
from mirrortune.data.examples import Batch, Targets
from mirrortune.data.labels import MISSING, class_indices, refuse_missing
from mirrortune.errors import first_of
from mirrortune.tasks.base import RARE, HasLabels, Task, labels_of
from mirrortune.tasks.predicting import Predictions, PredictOptions, best_answers, check_numbers

_SHOWN = 8


class SmoothsLabels(ABC):
    """A task whose training loss supports label smoothing: a share of each target is spread evenly over all classes."""

    __slots__ = ()

    @abstractmethod
    def training_loss(
        self, outputs: Any, targets: Tensor, *, smoothing: float, weights: Tensor | None = None
    ) -> tuple[Tensor, int | Tensor]:
        """Return the summed loss of a batch and its number of items; see :meth:`mirrortune.tasks.base.Task.loss`.

        Args:
            outputs: outputs of the model.
            targets: targets of the batch.
            smoothing: share of each target that is spread, in [0, 1).
            weights: factor of each class in the loss, (C,) on the device of ``targets``; None for 1 everywhere.
        """


class WeighsClasses(HasLabels, SmoothsLabels):
    """A task whose training loss supports class weights."""

    __slots__ = ()

    @abstractmethod
    def class_counts(self, examples: Any) -> npt.NDArray[np.int64]:
        """Return how many items of ``examples`` have each class, (C,)."""

    def balanced_weights(self, examples: Any) -> npt.NDArray[np.float32]:
        """Return weights (C,) that give all classes an equal share of the loss, with mean 1 over items, as
        scikit-learn's ``class_weight="balanced"`` does. A class without items gets 1.
        """
        counts = self.class_counts(examples)
        even = counts.sum() / max(1, np.count_nonzero(counts))
        return np.where(counts > 0, even / np.maximum(counts, 1), 1.0).astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class OneOfClasses(Task, WeighsClasses):
    """A task that predicts one of C classes.

    Attributes:
        label_column: column that holds the class.
        labels: class names, in the order of the model's outputs.
        data_labels: class names in the order of the data, in which answers are scored and written; empty if it is that
            of the outputs. It decides which class is the second one, which ``f1`` scores.
    """

    label_column: str
    metric_names: tuple[str, ...]
    selection_metric: str
    labels: tuple[str, ...]
    data_labels: tuple[str, ...] = field(default=(), metadata=RARE)

    def class_targets(self, split: Split, *, allow_missing: bool) -> npt.NDArray[np.int64]:
        """Return the class index of each row, (N,); -1 for a missing label, or DataError unless ``allow_missing``."""
        column, names = self.label_column, self.labels
        found = split.once((column, names), lambda rows: class_indices(rows.table, column, names, rows.places))
        if not allow_missing:
            refuse_missing(found == MISSING, split.places, column)
        return found

    @override
    def strata(self, split: Split) -> Targets | None:
        return self.class_targets(split, allow_missing=False)

    @override
    def loss(self, inputs: Batch, outputs: Any, targets: Tensor) -> tuple[Tensor, int]:
        """Return the cross-entropy of logits (B, C) against class indices (B,), summed."""
        return F.cross_entropy(outputs.logits.float(), targets, reduction="sum"), targets.shape[0]

    @override
    def training_loss(
        self, outputs: Any, targets: Tensor, *, smoothing: float, weights: Tensor | None = None
    ) -> tuple[Tensor, int]:
        losses = F.cross_entropy(outputs.logits.float(), targets, reduction="none", label_smoothing=smoothing)
        return (losses if weights is None else losses * weights[targets]).sum(), targets.shape[0]

    @override
    def class_counts(self, examples: Any) -> npt.NDArray[np.int64]:
        return np.bincount(examples.targets[examples.targets >= 0], minlength=len(self.labels))

    @override
    def judge(self, model: Any, inputs: Batch, outputs: Any, targets: Tensor) -> npt.NDArray[np.float32]:
        """Return the logits (B, C)."""
        return np.asarray(outputs.logits.float().cpu().numpy())

    @override
    def answers(self, judged: Sequence[Any], examples: Any) -> tuple[Targets, Targets]:
        """Return the class of the largest logit and the true class, each (N,), in the order of the data."""
        logits = np.stack(judged)[:, data_order(self)]
        return logits.argmax(axis=-1), _in_data_order(examples.targets, self)

    @override
    def probabilities(self, judged: Sequence[Any]) -> npt.NDArray[np.float64]:
        """Return the softmax of the logits, (N, C), with the classes in the order of the data."""
        logits = np.stack(judged)[:, data_order(self)]
        return np.asarray(torch.from_numpy(logits).double().softmax(dim=-1).numpy())

    @override
    def prediction_options(self) -> tuple[str, ...]:
        return ("top",)

    @override
    def prediction_columns(
        self, judged: Sequence[Any], examples: Any, split: Split, options: PredictOptions
    ) -> Predictions:
        """Return the names of the most probable classes, and their probabilities."""
        check_numbers(logits := np.stack(judged), split.places)
        return best_answers(logits, [self.labels] * len(logits), options.top or 1)


def classes_of(task: Task) -> tuple[str, ...]:
    """Return the names of the classes or tags of a task in the order of its answers; empty if it has none."""
    return (task.data_labels if isinstance(task, OneOfClasses) else ()) or labels_of(task)


def data_order(task: Task) -> npt.NDArray[np.int64]:
    """Return the output of each class, (C,), with the classes in the order of the task's answers."""
    labels = labels_of(task)
    return np.array([labels.index(name) for name in classes_of(task)], dtype=np.int64)


def _in_data_order(targets: Targets, task: Task) -> Targets:
    """Return the class indices of ``targets`` (N,), which are those of outputs, in the order of the data."""
    place = np.argsort(data_order(task))
    return np.where(targets == MISSING, MISSING, place[targets])


def output_names(config: Any) -> tuple[str, ...]:
    """Return the classes that a model's configuration names, in the order of its outputs; empty if it names none."""
    id2label = getattr(config, "id2label", None) or {}
    names = tuple(str(id2label[i]) for i in sorted(id2label))
    return () if all(name.upper().startswith("LABEL_") for name in names) else names


def with_outputs(task: Task, config: Any, *, is_given: bool) -> tuple[Task, list[str]]:
    """Return the task with its classes in the order of a model's outputs, and notes on classes that do not match.

    Names that differ are compared without regard to case, and to blanks and underscores between words.

    Args:
        task: task with the classes of the data.
        config: configuration of the model, which names its outputs in ``id2label``. It may name more classes than the
            data has.
        is_given: the user has set the order of the classes, which is kept.
    """
    labels, outputs = labels_of(task), output_names(config)
    if not labels or len(outputs) < len(labels):
        return task, []
    form = str if set(labels) <= set(outputs) else _plain
    ours, theirs = ({form(name): name for name in names} for names in (labels, outputs))
    is_known = set(ours) <= set(theirs) and (len(ours), len(theirs)) == (len(labels), len(outputs))
    if not is_known and len(labels) == len(outputs):
        found, how = labels, "matched by position"
        are_numbers = all(number_of(name) is not None for name in labels)  # stars 1 to 5 may be the outputs 0 to 4
        if not is_given and not are_numbers and len(ours) == len(theirs) == len(labels) and ours.keys() & theirs.keys():
            rest = iter(name for form_of, name in ours.items() if form_of not in theirs)
            found = tuple(ours[name] if name in ours else next(rest) for name in theirs)
            how = "matched by name where they have one, else by position"
        pairs = [f"{theirs} = {ours}" for theirs, ours in zip(outputs, found, strict=True) if theirs != ours]
        shown = first_of(pairs, _SHOWN)
        text = f"the model's classes have other names and are {how}: {shown} (task.labels sets the order)"
        return task if found == labels else _in_order(task, found, labels), [text] if pairs else []
    if not is_known:
        return task, []
    found = tuple(ours.get(name, theirs[name]) for name in theirs)
    data = (*labels, *(name for name in found if name not in labels))
    if found == data:
        return replace(task, labels=found), []  # type: ignore[type-var]
    if is_given:
        return task, [f"task.labels is not the order of the model's classes, which is {', '.join(outputs)}"]
    return _in_order(task, found, data), [f"classes in the order of the model's outputs: {', '.join(found)}"]


def _in_order(task: Task, outputs: tuple[str, ...], data: tuple[str, ...]) -> Task:
    """Return the task with its classes in the order of the outputs, and answers in the order of the data."""
    own = {"data_labels": data} if isinstance(task, OneOfClasses) else {}
    return replace(task, labels=outputs, **own)  # type: ignore[type-var]


def _plain(name: str) -> str:
    return re.sub(r"[\s_]+", " ", name.casefold()).strip() or name


def class_scores(task: Task, predictions: Any, references: Any) -> list[dict[str, Any]]:
    """Score each class separately.

    Args:
        task: the task, with its class names.
        predictions: as :meth:`mirrortune.tasks.base.Task.answers` returns them.
        references: as for ``predictions``.

    Returns:
        One entry for each class, in their order, with ``class``, ``precision``, ``recall``, ``f1`` and ``count`` (the
        number of references of the class); empty for tasks without classes. A score with denominator 0 is 0.
    """
    has_class_of_row = isinstance(task, OneOfClasses)
    if not isinstance(task, WeighsClasses):
        return []
    names: list[str] = list(classes_of(task))
    parts: Sequence[Any]
    if has_class_of_row:
        parts = _counted_scores(np.asarray(predictions), np.asarray(references), len(names))
    elif "entity_f1" in task.metric_names and importlib.util.find_spec("seqeval") is not None:
        from seqeval.metrics import sequence_labeling  # noqa: PLC0415

        both = (sequence_labeling.get_entities(rows) for rows in (references, predictions))
        names = sorted({found[0] for entities in both for found in entities})
        parts = sequence_labeling.precision_recall_fscore_support(
            references, predictions, average=None, zero_division=0
        )
    else:
        numbers = {name: number for number, name in enumerate(names)}
        said, right = (
            np.array([numbers.get(tag, len(names)) for tag in itertools.chain.from_iterable(rows)], dtype=np.int64)
            for rows in (predictions, references)
        )
        parts = _counted_scores(said, right, len(names))
    keys = ("precision", "recall", "f1", "count")
    columns = [np.asarray(part).tolist() for part in parts]
    return [
        {"class": name, **dict(zip(keys, values, strict=True))} for name, *values in zip(names, *columns, strict=True)
    ]


def _counted_scores(predictions: Any, references: Any, count: int) -> tuple[npt.NDArray[Any], ...]:
    """Return precision, recall, F1 and the number of references of each of ``count`` classes.

    The results equal those of scikit-learn, whose import would take a tenth of a short run. Predictions and references
    are class indices (N,), or 0 and 1 for each class (N, C).
    """
    if references.ndim == 2:
        said_rows, right_rows = predictions.astype(bool), references.astype(bool)  # a file may hold 0.0 and 1.0
        found = tuple(rows.sum(axis=0) for rows in (said_rows & right_rows, said_rows, right_rows))
    else:
        classes = (references[references == predictions], predictions, references)
        found = tuple(np.bincount(own, minlength=count)[:count] for own in classes)
    hits, said, right = found
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall, f1 = (np.nan_to_num(hits / whole) for whole in (said, right, (said + right) / 2))
    return precision, recall, f1, right
