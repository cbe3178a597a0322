# SPDX-License-Identifier: Apache-2.0
"""Scores of each class, counted by hand."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import precision_recall_fscore_support

from mirrortune.tasks.base import task_class
from mirrortune.tasks.classes import class_scores
from mirrortune.tasks.metrics import Scores
from tests.tiny_runs import classification

TAGS = pa.table({"tokens": [["a", "b", "c"]], "tags": [["B-PER", "O", "B-LOC"]]})


def test_each_class() -> None:
    task = classification(labels=("a", "b", "c"))

    found = class_scores(task, np.array([0, 0, 1, 0]), np.array([0, 1, 1, 1]))

    assert found == [
        {"class": "a", "precision": pytest.approx(1 / 3), "recall": 1.0, "f1": pytest.approx(0.5), "count": 1},
        {"class": "b", "precision": 1.0, "recall": pytest.approx(1 / 3), "f1": pytest.approx(0.5), "count": 3},
        {"class": "c", "precision": 0.0, "recall": 0.0, "f1": 0.0, "count": 0},
    ]


def test_each_label() -> None:
    task = classification(labels=("a", "b"), multi_label=True)

    found = class_scores(task, np.array([[1, 0], [1, 1]]), np.array([[1, 1], [0, 1]]))

    assert [(s["precision"], s["recall"], s["count"]) for s in found] == [(0.5, 1.0, 1), (1.0, 0.5, 2)]


@pytest.mark.parametrize("multi_label", [False, True])
def test_they_are_those_of_scikit_learn(*, multi_label: bool) -> None:
    task = classification(labels=("a", "b", "c", "d"), multi_label=multi_label)
    draw = np.random.default_rng(0)
    said, right = draw.integers(0, 2, (2, 50, 4)) if multi_label else draw.integers(0, 3, (2, 50))

    given = right.astype(np.float32) if multi_label else right  # as the labels of a batch are

    found = class_scores(task, said, given)

    expected = precision_recall_fscore_support(right, said, labels=range(4), average=None, zero_division=0.0)
    for name, values in zip(("precision", "recall", "f1", "count"), expected, strict=True):
        np.testing.assert_allclose([scores[name] for scores in found], values, rtol=1e-12)


def test_each_type_of_entity_and_each_tag() -> None:
    kind = task_class("token-classification")
    entities = kind.from_rows(TAGS, "rows")[0]
    words = kind.from_rows(TAGS, "rows", Scores(metrics=("tag_accuracy",)))[0]
    said, right = [["B-PER", "O", "O"]], [["B-PER", "O", "B-LOC"]]

    assert [(s["class"], s["recall"], s["count"]) for s in class_scores(entities, said, right)] == [
        ("LOC", 0.0, 1), ("PER", 1.0, 1)
    ]  # fmt: skip
    assert [(s["class"], s["precision"], s["recall"]) for s in class_scores(words, said, right)] == [
        ("B-LOC", 0.0, 0.0), ("B-PER", 1.0, 1.0), ("O", 0.5, 1.0)
    ]  # fmt: skip


def test_numbers_have_no_classes() -> None:
    task = task_class("regression").from_rows(pa.table({"text": ["a", "b"], "score": [0.5, 1.5]}), "rows")[0]

    assert class_scores(task, np.array([0.1]), np.array([0.5])) == []
