# SPDX-License-Identifier: Apache-2.0
"""text-classification with any number of classes a row: lists, or a column for each class."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from mirrortune.data.dataset import Split
from mirrortune.data.tokenize import Reading
from mirrortune.errors import ConfigError, DataError
from mirrortune.runs.prepare import split_summary
from mirrortune.tasks.base import task_class, task_from_dict, task_to_dict
from mirrortune.tasks.metrics import Scores, score

KIND = task_class("text-classification")
LISTS = pa.table({"text": ["a film", "the plot", "so long"], "topics": [["b", "a"], [], ["c"]]})
COLUMNS = pa.table({"text": ["a film", "the plot"], "rude": ["1", "0"], "loud": ["0", "0"]})
WANTED = [[1, 1, 0], [0, 0, 0], [0, 0, 1]]


def encode(tokenizer: Any, task: Any, table: pa.Table, **reading: Any) -> Any:
    """The table's examples."""
    return task.encode(Split(table=table, source="rows.jsonl"), tokenizer, Reading(max_length=32, **reading))


def test_lists_of_labels_are_sets_of_classes(tokenizer: Any) -> None:
    task, notes = KIND.from_rows(LISTS, "rows.jsonl", label_column="topics")
    assert task.labels == ("a", "b", "c")
    assert notes[-1] == "rows may have several labels"
    assert encode(tokenizer, task, LISTS).targets.tolist() == WANTED
    assert task.config_fields()["problem_type"] == "multi_label_classification"
    assert task.strata(Split(table=LISTS, source="rows.jsonl")) is None
    assert task_from_dict(json.loads(json.dumps(task_to_dict(task)))) == task


def test_a_column_for_each_class_is_the_same(tokenizer: Any) -> None:
    task, _ = KIND.from_rows(COLUMNS, "toxic.csv", labels=("rude", "loud"))
    assert task.multi_label
    assert task.columns() == [("text", "text"), ("label", "rude"), ("label", "loud")]
    assert encode(tokenizer, task, COLUMNS).targets.tolist() == [[1, 0], [0, 0]]


@pytest.mark.parametrize("rows", [[[1, 0, 0], [0, 1, 1]], [[1.0, 0.0], [0.0, 0.0]], [[True, True], [False, True]]])
def test_vectors_of_0_and_1_are_not_read_as_lists_of_classes(tokenizer: Any, rows: list[list[Any]]) -> None:
    table = pa.table({"text": ["a film", "the plot"], "topics": rows})
    with pytest.raises(DataError, match=r"'topics' holds lists of 0 and 1 for [23] classes, such as \["):
        KIND.from_rows(table, "rows.jsonl", label_column="topics")

    numbers = pa.table({"text": ["x", "y"], "topics": [[0, 1], [1]]})
    task = KIND.from_rows(numbers, "rows.jsonl", label_column="topics")[0]
    assert encode(tokenizer, task, numbers).targets.tolist() == [[1, 1], [0, 1]]
    with pytest.raises(DataError, match="lists of 0 and 1"):
        encode(tokenizer, task, pa.table({"text": ["x", "y"], "topics": [[0, 0], [1, 0]]}))


def test_a_cell_of_one_class_is_a_list_of_it(tokenizer: Any) -> None:
    task = KIND.from_rows(LISTS, "rows.jsonl", label_column="topics")[0]
    one = pa.table({"text": ["x", "y"], "topics": ["a", " c"]})
    assert encode(tokenizer, task, one).targets.tolist() == [[1, 0, 0], [0, 0, 1]]
    with pytest.raises(DataError, match=r"row 1: label 'abc' is not among the classes"):
        encode(tokenizer, task, pa.table({"text": ["x"], "topics": ["abc"]}))

    numbers = pa.table({"text": ["x", "y"], "topics": [[0, 1], [2]]})
    task = KIND.from_rows(numbers, "rows.jsonl", label_column="topics")[0]
    assert encode(tokenizer, task, pa.table({"text": ["x", "y"], "topics": [0, 2]})).targets.tolist() == [
        [1, 0, 0],
        [0, 0, 1],
    ]


def test_the_classes_of_rows_with_several_are_counted(tokenizer: Any) -> None:
    task = KIND.from_rows(LISTS, "rows.jsonl", label_column="topics")[0]
    first = next(split_summary(encode(tokenizer, task, LISTS), task))
    assert first == "classes, several for a row: a 1 (33%), b 1 (33%), c 1 (33%)"


def test_the_loss_is_over_every_class() -> None:
    task = KIND.from_rows(LISTS, "rows.jsonl", label_column="topics")[0]
    logits, targets = torch.tensor([[0.0, 2.0, -1.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    loss, items = task.loss({}, SimpleNamespace(logits=logits), targets)
    odds = 1 / (1 + np.exp(-logits.numpy()))
    assert items == 3
    assert float(loss) == pytest.approx(-np.log(odds[0, 0]) - np.log(odds[0, 1]) - np.log(1 - odds[0, 2]))


def test_classes_of_more_than_even_odds_are_said() -> None:
    task = KIND.from_rows(LISTS, "rows.jsonl", label_column="topics")[0]
    logits = [np.array([3.0, -1.0, -1.0]), np.array([-1.0, -1.0, -1.0]), np.array([-2.0, -2.0, 2.0])]
    predictions, references = task.answers(logits, SimpleNamespace(targets=np.array(WANTED)))
    assert predictions.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 1]]
    assert task.probabilities(logits) == pytest.approx(1 / (1 + np.exp(-np.stack(logits))))
    found = score(("f1_micro", "f1_macro", "subset_accuracy"), predictions, references)
    assert found == pytest.approx({"f1_micro": 0.8, "f1_macro": 2 / 3, "subset_accuracy": 2 / 3})


def test_flags_may_be_whole_numbers_of_any_writing(tokenizer: Any) -> None:
    flags = pa.table({"text": ["x"] * 3, "rude": ["1.0", "0", "true"], "loud": [1.0, 0.0, None]})
    task = KIND.from_rows(flags, "rows.csv", labels=("rude", "loud"))[0]

    assert encode(tokenizer, task, flags).targets.tolist() == [[1, 1], [0, 0], [1, 0]]


def test_what_does_not_fit_is_refused(tokenizer: Any) -> None:
    task = KIND.from_rows(LISTS, "rows.jsonl", label_column="topics")[0]
    other = pa.table({"text": ["x", "y"], "topics": [["a"], ["z"]]})
    with pytest.raises(DataError, match=r"rows\.jsonl row 2: label 'z' is not among the classes"):
        encode(tokenizer, task, other)
    missing = pa.table({"text": ["x", "y"], "topics": [["a"], None]})
    with pytest.raises(DataError, match=r"1 of 2 rows have no label in column 'topics' \(row 2\)"):
        encode(tokenizer, task, missing)
    assert encode(tokenizer, task, missing, allow_missing=True).num_unlabelled == 1
    with pytest.raises(ConfigError, match="'accuracy' does not score several labels"):
        KIND.from_rows(LISTS, "rows.jsonl", Scores(metrics=("accuracy",)), label_column="topics")
    odd = pa.table({"text": ["x"], "rude": ["2"], "loud": ["0"]})
    with pytest.raises(DataError, match=r"row 1: column 'rude' of a class holds '2'\. Allowed: 0 and 1"):
        encode(tokenizer, KIND.from_rows(COLUMNS, "toxic.csv", labels=("rude", "loud"))[0], odd)
