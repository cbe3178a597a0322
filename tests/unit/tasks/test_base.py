# SPDX-License-Identifier: Apache-2.0
"""Kinds of task: from a label column to targets, losses, predictions and metrics."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from mirrortune.data.dataset import Split
from mirrortune.errors import ConfigError, DataError
from mirrortune.tasks.base import task_class, task_from_dict, task_to_dict
from mirrortune.tasks.metrics import Scores, score

FEATURES = json.dumps({"info": {"features": {"label": {"names": ["neg", "pos"], "_type": "ClassLabel"}}}})
HUB = pa.table({"text": ["a", "b", "c"], "label": [1, 0, -1]}).replace_schema_metadata({"huggingface": FEATURES})


def table(labels: list[Any]) -> pa.Table:
    """Rows with these labels."""
    return pa.table({"text": ["x"] * len(labels), "label": labels})


def make(kind: str, rows: pa.Table, **settings: Any) -> Any:
    """A task from rows in rows.csv."""
    return task_class(kind).from_rows(rows, "rows.csv", text_columns=("text",), label_column="label", **settings)[0]


def indices(task: Any, rows: pa.Table, *, allow_missing: bool = False) -> list[int]:
    """The classes of rows in rows.csv."""
    found: list[int] = task.class_targets(rows_of(rows), allow_missing=allow_missing).tolist()
    return found


def outputs(logits: torch.Tensor) -> Any:
    """What a model returns."""
    return SimpleNamespace(logits=logits)


def score_of(task: Any, judged: Any, targets: torch.Tensor) -> dict[str, float]:
    """The task's metrics."""
    return score(task.metric_names, *task.answers(judged, SimpleNamespace(targets=targets.numpy())))


def rows_of(table: pa.Table) -> Split:
    """A split in rows.csv."""
    return Split(table=table, source="rows.csv")


TEXT_KINDS = ("text-classification", "regression")


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_a_task_describes_itself_in_json_and_is_made_again(kind: str) -> None:
    task = make(kind, table([0, 1, 2, 1]))

    again = task_from_dict(json.loads(json.dumps(task_to_dict(task))))

    assert again == task
    assert task.kind == kind
    assert task.selection_metric in task.metric_names
    assert task.config_fields()["num_labels"] == len(task.config_fields()["id2label"])


@pytest.mark.parametrize(
    ("labels", "names", "targets"),
    [
        (["b", "a", "b"], ("a", "b"), [1, 0, 1]),
        ([" yes ", "no", "yes"], ("no", "yes"), [1, 0, 1]),
        (["10", "9", "10"], ("9", "10"), [1, 0, 1]),
        ([10, 9, 10], ("9", "10"), [1, 0, 1]),
        ([1.0, 0.0, 1.0], ("0", "1"), [1, 0, 1]),
        ([True, False, True], ("False", "True"), [1, 0, 1]),
        (["1", "a", "1"], ("1", "a"), [0, 1, 0]),
    ],
)
def test_classes_are_the_values_found_in_order(labels: list[Any], names: tuple[str, ...], targets: list[int]) -> None:
    task = make("text-classification", table(labels))

    assert task.labels == names
    assert indices(task, table(labels)) == targets
    assert task.config_fields()["id2label"] == dict(enumerate(names))
    assert task.config_fields()["label2id"] == {name: i for i, name in enumerate(names)}


def test_class_names_of_a_hub_data_set_are_kept_in_their_order() -> None:
    task = make("text-classification", HUB)

    assert task.labels == ("neg", "pos")
    assert indices(task, HUB, allow_missing=True) == [1, 0, -1]
    with pytest.raises(DataError, match=r"1 of 3 rows have no label in column 'label' \(row 3\)"):
        task.strata(rows_of(HUB))


def test_classes_that_are_named_are_taken_as_they_stand() -> None:
    task = make("text-classification", table(["b", "a"]), labels=("b", "a", "c"))

    assert task.labels == ("b", "a", "c")
    assert indices(task, table(["a", None, ""]), allow_missing=True) == [1, -1, -1]


@pytest.mark.parametrize(
    ("labels", "settings", "names", "targets"),
    [
        (["roti", "nan", "roti"], {}, ("nan", "roti"), [1, 0, 1]),
        (["None", "null", "NA"], {}, ("NA", "None", "null"), [1, 2, 0]),
        (["1", "0", "nan"], {}, ("0", "1"), [1, 0, -1]),
        (["1", "0", "nan"], {"labels": ("0", "1", "nan")}, ("0", "1", "nan"), [1, 0, 2]),
        ([1.0, 0.0, float("nan")], {}, ("0", "1"), [1, 0, -1]),
        (["a", "", None], {"labels": ("", "a")}, ("", "a"), [1, 0, 0]),
        (["3.9", "3.10"] * 4, {}, ("3.10", "3.9"), [1, 0] * 4),
        (["1.0", "0.0"], {"labels": ("0", "1")}, ("0", "1"), [1, 0]),
        (["1.00", "0.0", "10.0"], {}, ("0", "1", "10"), [1, 0, 2]),
        ([1, 0], {"labels": ("0.0", "1.0")}, ("0.0", "1.0"), [1, 0]),
    ],
)
def test_text_is_text_and_numbers_are_numbers(
    labels: list[Any], settings: dict[str, Any], names: tuple[str, ...], targets: list[int]
) -> None:
    task = make("text-classification", table(labels), **settings)

    assert task.labels == names
    assert indices(task, table(labels), allow_missing=True) == targets


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (["1", "0", "nan"], "1 nan among numbers, read as no label"),
        (["3.9", "3.10"] * 4, "holds numbers, such as 3.10, each of which is one class"),
        (["['a']", "['a', 'b']"], "holds lists written as text, such as \"['a', 'b']\", each of which is one class"),
    ],
)
def test_labels_that_may_be_meant_otherwise_are_said(labels: list[Any], says: str) -> None:
    notes = task_class("text-classification").from_rows(table(labels), "rows.csv", label_column="label")[1]

    assert says in " ".join(notes)


@pytest.mark.parametrize(
    ("kind", "columns", "says"),
    [
        (
            "text-classification",
            {"a film": ["b", "c"], "neg": ["neg", "pos"]},
            "'neg' is called like one of its classes",
        ),
        ("regression", {"a film": ["b", "c"], "2.5": ["1", "3"]}, "'2.5' is called like a number"),
        ("text-classification", {"text": ["b", "c"], "label": ["neg", "pos"]}, ""),
        ("regression", {"0": ["b", "c"], "1": ["1", "3"]}, ""),  # the names that pandas gives
    ],
)
def test_a_first_row_in_place_of_the_header_is_noticed(kind: str, columns: dict[str, list[str]], says: str) -> None:
    text, label = columns
    found = task_class(kind).from_rows(pa.table(columns), "rows.csv", text_columns=(text,), label_column=label)[1]
    assert (says in " ".join(found)) if says else ("called like" not in " ".join(found))


def test_real_numbers_name_the_way_to_classes() -> None:
    with pytest.raises(DataError, match=r'list them as text: task\.labels=\["0\.5", "1\.5", \.\.\.\]'):
        make("text-classification", table([0.5, 1.5]))


@pytest.mark.parametrize(
    ("kind", "columns", "settings"),
    [
        ("token-classification", {"tokens": ["['a', 'b']"], "tags": ["['O', 'O']"]}, {}),
        ("question-answering", {"question": ["a"], "context": ["b"], "answers": ["{'text': ['b']}"]}, {}),
        ("multiple-choice", {"question": ["a"], "choices": ["['x', 'y']"], "label": ["0"]}, {}),
        ("causal-lm", {"messages": ["[{'role': 'user', 'content': 'a'}]"]}, {}),
    ],
)
def test_lists_that_are_written_as_text_are_no_lists(
    kind: str, columns: dict[str, list[Any]], settings: dict[str, Any]
) -> None:
    with pytest.raises(DataError, match=r"holds lists or objects written as text, such as.*Write the rows as jsonl"):
        task_class(kind).from_rows(pa.table(columns), "rows.csv", **settings)


@pytest.mark.parametrize(
    ("kind", "labels", "settings", "says"),
    [
        ("text-classification", ["a", "a"], {}, "label column 'label' has one class only ('a'). Allowed: two classes"),
        ("text-classification", [None, None], {}, "has one class only ('no value')"),
        ("text-classification", [0.5, 1.5], {}, "holds real numbers (such as 0.5), not classes. Allowed: classes"),
        ("text-classification", ["0.5", "1"], {}, "Use --task regression"),
        ("text-classification", [[1], [1]], {}, "label column 'label' has 1 classes. Allowed: two classes or more"),
        ("text-classification", [{"a": 1}, {"a": 0}], {}, "label column 'label' holds struct<"),
        ("text-classification", [str(i) for i in range(60)], {}, "has 60 different values in 60 rows"),
        ("regression", ["high", "low"], {}, "rows.csv row 1: label 'high' in column 'label' is not a finite number. "
         "Correct the row, or use --task text-classification"),
        ("regression", [1.0, float("inf")], {}, "rows.csv row 2: label inf"),
        ("regression", [1.0, 1e39], {}, "rows.csv row 2: label 1e+39"),
        ("regression", [2, 2], {}, "holds one value only (2). Allowed: numbers that differ"),
        ("regression", [1e9, 1e9 + 0.5], {}, "(around 1e+09) differ by 0.5 at most, which float32 cannot tell apart"),
        ("regression", [2**60, 2**60 + 1], {}, "holds one value only (1.15292e+18)"),
    ],
)  # fmt: skip
def test_labels_that_do_not_fit_the_kind_are_refused(
    kind: str, labels: list[Any], settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(DataError) as caught:
        make(kind, table(labels), **settings).strata(rows_of(table(labels)))

    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            [1000.0, 3000.0],
            "warning: the numbers in 'label' (mean 2e+03, standard deviation 1e+03) are learned as they are",
        ),
        ([-900.0, 900.0], "(mean 0, standard deviation 900)"),
        ([0.0, 5.0], ""),
        ([float("inf"), 1e9], ""),  # refused later, by its row
    ],
)
def test_numbers_far_from_zero_are_warned_of(values: list[float], says: str) -> None:
    _, notes = task_class("regression").from_rows(table(values), "rows.csv")
    found = [note for note in notes if "learned as they are" in note]
    assert says in found[0] if says else not found


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_a_selection_metric_must_be_computed(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"task\.selection_metric: 'mae' is not computed"):
        make(kind, table([1, 2]), scores=Scores(selection_metric="mae"))


def test_missing_numbers_are_counted() -> None:
    task = make("regression", table([1.5, None, float("nan"), 2]))
    rows = table(["1.5", "", "nan", "2"])

    found = task.targets(rows_of(rows))

    assert found.dtype == np.float32
    assert np.isnan(found).tolist() == [False, True, True, False]
    with pytest.raises(DataError, match=r"2 of 4 rows have no number in column 'label' \(rows 2, 3\)"):
        task.strata(rows_of(rows))


def test_only_classes_are_kept_in_proportion() -> None:
    rows = table([1, 0, 1])
    assert make("text-classification", rows).strata(rows_of(rows)).tolist() == [1, 0, 1]
    assert make("regression", rows).strata(rows_of(rows)) is None


def test_the_loss_of_classes_is_a_sum_over_rows() -> None:
    task = make("text-classification", table([0, 1, 2]))
    logits, targets = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), torch.tensor([0, 2])

    loss, items = task.loss({}, outputs(logits), targets)

    assert items == 2
    assert float(loss) == pytest.approx(-np.log(np.e**2 / (np.e**2 + 2)) + np.log(3))
    judged = task.judge(None, {}, outputs(logits), targets)
    assert score_of(task, judged, targets) == {"accuracy": 0.5}


def test_the_loss_of_numbers_is_a_sum_over_rows() -> None:
    task = make("regression", table([0, 1, 2]), scores=Scores(metrics=("mse", "pearson")))
    logits, targets = torch.tensor([[1.0], [2.0]]), torch.tensor([0.0, 4.0])

    loss, items = task.loss({}, outputs(logits), targets)

    assert (float(loss), items) == (5.0, 2)
    judged = task.judge(None, {}, outputs(logits), targets)
    assert judged.tolist() == [1.0, 2.0]
    assert score_of(task, judged, targets) == pytest.approx({"mse": 2.5, "pearson": 1.0})
    assert task.config_fields() == {
        "num_labels": 1, "id2label": {0: "label"}, "label2id": {"label": 0}, "problem_type": "regression",
    }  # fmt: skip


def test_losses_are_taken_in_float32_whatever_the_model_computes_in() -> None:
    for kind, targets in (("text-classification", torch.tensor([1])), ("regression", torch.tensor([1.0]))):
        task = make(kind, table([0, 1, 2]))
        logits = torch.randn(1, task.config_fields()["num_labels"], dtype=torch.bfloat16)
        assert task.loss({}, outputs(logits), targets)[0].dtype == torch.float32


def test_an_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"^task\.kind: unknown kind of task 'regresion'\. Did you mean 'regression'\?"
    ):
        task_class("regresion")


def test_a_task_of_an_earlier_version_is_read_by_the_present_code() -> None:
    task = make("text-classification", table(["a", "b"]))
    assert task_from_dict({**json.loads(json.dumps(task_to_dict(task))), "version": 0}) == task
