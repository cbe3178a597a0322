# SPDX-License-Identifier: Apache-2.0
"""Scores of each class, counted by hand."""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import precision_recall_fscore_support

from mirrortune.data.dataset import Split, set_aside
from mirrortune.errors import DataError
from mirrortune.tasks import classes
from mirrortune.tasks.base import task_class, task_from_dict, task_to_dict, without_targets
from mirrortune.tasks.classes import OneOfClasses, class_scores, classes_of, with_outputs
from mirrortune.tasks.metrics import Scores
from mirrortune.tasks.predicting import PredictOptions
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


def test_labels_are_read_once_before_and_after_rows_are_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pa.table({"text": list("abcdefgh"), "label": ["x", "y", "x", "y", "x", "y", "x", None]})
    task, _ = task_class("text-classification").from_rows(rows, "rows.csv")
    assert isinstance(task, OneOfClasses)
    whole = Split(table=rows, source="rows.csv")
    with pytest.raises(DataError, match="1 of 8 rows have no label"):
        task.strata(whole)
    known = whole.take(np.arange(8) < 7)
    monkeypatch.setattr(classes, "class_indices", lambda *_: pytest.fail("the labels are read again"))

    train, validation = set_aside(known, 0.3, 0, task.strata(known))

    read: dict[str, int] = {}
    for part in (train, validation):
        read |= zip(part.table["text"].to_pylist(), task.class_targets(part, allow_missing=False), strict=True)
    assert read == {"a": 0, "b": 1, "c": 0, "d": 1, "e": 0, "f": 1, "g": 0}


@pytest.mark.parametrize(("kind", "texts"), [("regression", ["text"]), ("sentence-similarity", ["text", "other"])])
def test_numbers_are_read_once(kind: str, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pa.table({name: list("abcdefgh") for name in texts} | {"score": [0.1 * i for i in range(8)]})
    task, _ = task_class(kind).from_rows(rows, "rows.csv", text_columns=tuple(texts), label_column="score")  # type: ignore[call-arg]
    whole = Split(table=rows, source="rows.csv")
    assert task.strata(whole) is None
    module = importlib.import_module(type(task).__module__)
    monkeypatch.setattr(module, "cells", lambda *_: pytest.fail("the numbers are read again"))

    train, validation = set_aside(whole, 0.3, 0, None)

    assert task.strata(train) is task.strata(validation) is None


def test_rows_with_other_labels_are_read_anew() -> None:
    rows = pa.table({"text": ["a", "b"], "label": ["x", "y"]})
    task, _ = task_class("text-classification").from_rows(rows, "rows.csv")
    assert isinstance(task, OneOfClasses)
    split = Split(table=rows, source="rows.csv")
    assert task.class_targets(split, allow_missing=True).tolist() == [0, 1]
    assert replace(task, labels=("y", "x")).class_targets(split, allow_missing=True).tolist() == [1, 0]
    assert task.class_targets(without_targets(split, task), allow_missing=True).tolist() == [-1, -1]


def _named(*outputs: str) -> SimpleNamespace:
    return SimpleNamespace(id2label=dict(enumerate(outputs)))


@pytest.mark.parametrize(
    ("outputs", "labels", "data_labels"),
    [
        (("b", "a"), ("b", "a"), ("a", "b")),
        (("a", "b"), ("a", "b"), ()),
        (("B", " a "), ("b", "a"), ("a", "b")),
        (("LABEL_0", "LABEL_1"), ("a", "b"), ()),
        (("c", "b", "a"), ("c", "b", "a"), ("a", "b", "c")),  # more than the rows have
        (("x", "a"), ("b", "a"), ("a", "b")),  # the output of a is that of a, so x is the other one
        (("x", "B"), ("a", "b"), ()),
        (("x", "y"), ("a", "b"), ()),
        (("a", "A"), ("a", "b"), ()),
        (("b",), ("a", "b"), ()),
        (("a b", "A_B"), ("a", "b"), ()),
    ],
)
def test_classes_take_the_order_of_the_outputs(
    outputs: tuple[str, ...], labels: tuple[str, ...], data_labels: tuple[str, ...]
) -> None:
    task, _ = with_outputs(classification(labels=("a", "b")), _named(*outputs), is_given=False)

    assert (task.labels, task.data_labels) == (labels, data_labels)  # type: ignore[attr-defined]
    assert task_from_dict(task_to_dict(task)) == task


def test_classes_that_are_other_numbers_are_matched_by_position() -> None:
    stars = classification(labels=("1", "2", "3"))
    task, notes = with_outputs(stars, _named("0", "1", "2"), is_given=False)
    assert (task, len(notes)) == (stars, 1)


def test_classes_that_the_model_has_keep_their_outputs_beside_new_ones() -> None:
    given, named = classification(labels=("mixed", "neg", "pos")), _named("neg", "neu", "Pos")

    found, notes = with_outputs(given, named, is_given=False)
    kept, said = with_outputs(given, named, is_given=True)

    assert (found.labels, classes_of(found)) == (("neg", "mixed", "pos"), given.labels)  # type: ignore[attr-defined]
    assert notes == [
        "the model's classes have other names and are matched by name where they have one, else by position: "
        "neu = mixed, Pos = pos (task.labels sets the order)"
    ]
    assert kept == given
    assert "matched by position: neg = mixed, neu = neg, Pos = pos" in said[0]


def test_answers_are_in_the_order_of_the_data() -> None:
    task, _ = with_outputs(classification(labels=("a", "b", "c")), _named("c", "a", "b"), is_given=False)
    assert isinstance(task, OneOfClasses)
    logits = np.array([[3.0, 1, 0], [0, 3, 1], [1, 0, 3]], dtype=np.float32)  # c, a, b

    predictions, references = task.answers(list(logits), SimpleNamespace(targets=np.array([0, 2, -1])))

    assert predictions.tolist() == [2, 0, 1]
    assert references.tolist() == [2, 1, -1]
    assert task.probabilities(list(logits)).argmax(axis=-1).tolist() == [2, 0, 1]
    assert [each["class"] for each in class_scores(task, predictions[:2], references[:2])] == ["a", "b", "c"]


def test_several_labels_are_in_the_order_of_the_data() -> None:
    task, _ = with_outputs(classification(labels=("a", "b"), multi_label=True), _named("b", "a"), is_given=False)
    logits, examples = [np.array([2.0, -1])], SimpleNamespace(targets=np.array([[1.0, 0]]))
    split = Split(table=pa.table({"text": ["x"]}), source="rows.csv")

    found = [part.tolist() for part in task.answers(logits, examples)]
    columns = task.prediction_columns(logits, examples, split, PredictOptions())

    assert found == [[[0, 1]], [[0, 1]]]
    assert columns["prediction"] == [["b"]]
    assert columns["scores"][0] == pytest.approx([1 / (1 + np.exp(-2.0))])


def test_tags_take_the_order_of_the_outputs() -> None:
    task, _ = task_class("token-classification").from_rows(TAGS, "rows.jsonl")

    found, notes = with_outputs(task, _named("O", "B-PER", "B-LOC"), is_given=False)

    assert classes_of(found) == ("O", "B-PER", "B-LOC")
    assert notes == ["classes in the order of the model's outputs: O, B-PER, B-LOC"]


@pytest.mark.parametrize("names", [("-1", "1"), ("C", "C++", "C#"), ("A+", "A-")])
def test_names_that_differ_in_signs_are_told_apart(names: tuple[str, ...]) -> None:
    given = classification(labels=names)

    turned, notes = with_outputs(given, _named(*reversed(names)), is_given=False)
    more, _ = with_outputs(given, _named("0", *names), is_given=False)

    assert turned.labels == names[::-1]  # type: ignore[attr-defined]
    assert notes == [f"classes in the order of the model's outputs: {', '.join(reversed(names))}"]
    assert more.labels == ("0", *names)  # type: ignore[attr-defined]
