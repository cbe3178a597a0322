# SPDX-License-Identifier: Apache-2.0
"""Precision, recall and F1 of each class, label, tag or type of entity."""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import numpy as np

from mirrortune.tasks.base import OneOfClasses, Task, WeighsClasses, labels_of


def class_scores(task: Task, predictions: Any, references: Any) -> list[dict[str, Any]]:
    """Score each class on its own.

    Args:
        task: whose classes are scored.
        predictions: as :meth:`mirrortune.tasks.base.Task.answers` returns them.
        references: the same.

    Returns:
        ``class``, ``precision``, ``recall``, ``f1`` and ``count``, the number of references of the class, in the order
        of the classes; empty for kinds of task without classes. A score whose denominator is 0 is 0.
    """
    has_class_of_row = isinstance(task, OneOfClasses)
    if not isinstance(task, WeighsClasses):
        return []
    from sklearn.metrics import precision_recall_fscore_support  # noqa: PLC0415  (scikit-learn takes a second to import)

    names: list[str] = list(labels_of(task))
    if has_class_of_row:
        parts = precision_recall_fscore_support(
            references, predictions, labels=range(len(names)), average=None, zero_division=0.0
        )
    elif "entity_f1" in task.metric_names and importlib.util.find_spec("seqeval") is not None:
        from seqeval.metrics import sequence_labeling  # noqa: PLC0415

        both = (sequence_labeling.get_entities(rows) for rows in (references, predictions))
        names = sorted({found[0] for entities in both for found in entities})
        parts = sequence_labeling.precision_recall_fscore_support(
            references, predictions, average=None, zero_division=0
        )
    else:
        flat = [list(itertools.chain.from_iterable(rows)) for rows in (references, predictions)]
        parts = precision_recall_fscore_support(*flat, labels=names, average=None, zero_division=0.0)
    keys = ("precision", "recall", "f1", "count")
    columns = [np.asarray(part).tolist() for part in parts]
    return [
        {"class": name, **dict(zip(keys, values, strict=True))} for name, *values in zip(names, *columns, strict=True)
    ]
