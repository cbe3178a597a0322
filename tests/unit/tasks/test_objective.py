# SPDX-License-Identifier: Apache-2.0
"""The training loss of unequal classes against torch's own, balanced weights against scikit-learn's, and refusals."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from sklearn.utils.class_weight import compute_class_weight

from mirrortune.data.dataset import Split
from mirrortune.data.tokenize import Reading
from mirrortune.errors import ConfigError
from mirrortune.tasks.base import task_class
from mirrortune.tasks.objective import ClassSettings, Objective, make_objective, setting_problems
from tests.tiny_models import tiny_tokenizer
from tests.tiny_runs import classification, sentences

LOGITS = torch.tensor([[1.0, -0.5, 0.2], [0.3, 2.0, -1.0], [-1.0, 0.0, 1.5], [0.1, 0.2, 0.3]])
THREE = classification(labels=("a", "b", "c"))
WEIGHTS = np.array([0.5, 2.0, 3.0], np.float32)


def out(logits: torch.Tensor = LOGITS) -> Any:
    """The outputs of a model."""
    return SimpleNamespace(logits=logits)


def encoded(kind: str, table: pa.Table) -> tuple[Any, Any]:
    """A task and its examples."""
    task = task_class(kind).from_rows(table, "rows.jsonl")[0]
    return task, task.encode(Split(table=table, source="rows.jsonl"), tiny_tokenizer(), Reading(max_length=32))


def test_without_settings_it_is_the_tasks_own_loss() -> None:
    targets = torch.tensor([0, 1, 2, 1])

    found, items = make_objective(THREE, ClassSettings(), sentences(4)).loss({}, out(), targets)

    assert torch.equal(found, THREE.loss({}, out(), targets)[0])
    assert items == 4


def test_weights_multiply_the_loss_of_rows_and_labels_are_smoothed_as_torch_does() -> None:
    targets = torch.tensor([0, 1, 2, 1])
    each = F.cross_entropy(LOGITS, targets, reduction="none")

    weighted, items = Objective(THREE, weights=WEIGHTS).loss({}, out(), targets)
    smoothed, _ = Objective(THREE, smoothing=0.2).loss({}, out(), targets)

    assert float(weighted) == pytest.approx(float((each * torch.tensor([0.5, 2.0, 3.0, 2.0])).sum()))
    assert items == 4, "a row counts as one, whatever it weighs"
    assert float(smoothed) == pytest.approx(
        float(F.cross_entropy(LOGITS, targets, reduction="sum", label_smoothing=0.2))
    )


def test_balanced_weights_are_scikit_learns() -> None:
    rows = sentences(40)
    counts = np.bincount(rows.targets, minlength=2)
    assert counts[0] != counts[1]

    found = make_objective(classification(), ClassSettings(class_weights="balanced"), rows).weights

    assert found == pytest.approx(compute_class_weight("balanced", classes=np.arange(2), y=rows.targets))
    assert (found * counts).sum() == pytest.approx(40), "the mean weight of a row is 1"
    assert classification(labels=("bad", "good", "none")).balanced_weights(rows)[2] == 1


def test_tags_are_weighed_word_by_word() -> None:
    table = pa.table({"tokens": [["a", "film"], ["the", "plot", "so"]], "tags": [["O", "B-X"], ["O", "B-X", "O"]]})
    task, rows = encoded("token-classification", table)
    assert task.class_counts(rows).tolist() == [2, 3]
    targets = torch.tensor([[-100, 0, 1, -100], [1, 0, 0, -100]])
    logits = torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(0))

    found, items = Objective(task, weights=np.array([3.0, 0.5], np.float32), smoothing=0.1).loss(
        {}, out(logits), targets
    )

    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=0.1)
    factors = torch.tensor([0, 3.0, 0.5, 0, 0.5, 3.0, 3.0, 0])
    assert float(found) == pytest.approx(float((each * factors).sum()))
    assert int(items) == 5


def test_several_labels_weigh_the_rows_that_have_them() -> None:
    table = pa.table({"text": ["a", "b", "c", "d"], "topics": [["x", "y"], ["y"], ["y"], []]})
    task, rows = encoded("text-classification", table)
    weights = make_objective(task, ClassSettings(class_weights="balanced"), rows).weights
    assert weights == pytest.approx([3.0, 1 / 3])
    logits, targets = torch.tensor([[0.3, -0.2]]), torch.tensor([[1.0, 0.0]])

    found, items = Objective(task, weights=weights, smoothing=0.2).loss({}, out(logits), targets)

    each = F.logsigmoid(torch.stack([logits[0], -logits[0]]))  # log p and log (1 - p), of each label
    expected = -(3 * 0.9 * each[0, 0] + 0.1 * each[1, 0] + 0.1 / 3 * each[0, 1] + 0.9 * each[1, 1])
    assert float(found) == pytest.approx(float(expected))
    assert items == 2


def test_a_choice_spreads_over_the_endings_that_a_row_has() -> None:
    table = pa.table({"question": ["a", "b"], "endings": [["c", "d"], ["e", "f", "g"]], "label": [0, 2]})
    task, _ = encoded("multiple-choice", table)
    targets = torch.tensor([[0, 2], [2, 3]])  # the right one, and how many there are

    found, items = Objective(task, smoothing=0.1).loss({}, out(LOGITS[:2]), targets)

    first = F.cross_entropy(LOGITS[:1, :2], torch.tensor([0]), reduction="sum", label_smoothing=0.1)
    second = F.cross_entropy(LOGITS[1:2], torch.tensor([2]), reduction="sum", label_smoothing=0.1)
    assert float(found) == pytest.approx(float(first + second))
    assert items == 2


def test_a_name_that_is_no_class_is_refused_with_all_of_them() -> None:
    weights = {"goood": 2.0, "bat": 1.0, "good": 3.0}

    with pytest.raises(ConfigError) as caught:
        make_objective(classification(), ClassSettings(class_weights=weights), sentences(4))

    assert "train.class_weights: no class is called 'goood'. Did you mean 'good'? Allowed: bad, good" in str(
        caught.value
    )
    assert "no class is called 'bat'. Did you mean 'bad'?" in str(caught.value)
    named = make_objective(classification(), ClassSettings(class_weights={"good": 3.0}), sentences(4))
    assert named.weights is not None
    assert named.weights.tolist() == [1, 3]


def test_rows_of_several_labels_cannot_be_drawn_by_class() -> None:
    task, rows = encoded("text-classification", pa.table({"text": ["a", "b"], "topics": [["x", "y"], []]}))

    with pytest.raises(ConfigError, match=r"train\.balance: rows may have several labels"):
        make_objective(task, ClassSettings(balance=True), rows)


@pytest.mark.parametrize(
    ("settings", "kind", "is_streamed", "says"),
    [
        ({"class_weights": "balanced"}, "regression", False, ["regression has no classes to weigh"]),
        ({"class_weights": {"1": 2.0}}, "multiple-choice", False, ["multiple-choice has no classes to weigh"]),
        ({"label_smoothing": 0.1, "balance": True}, "causal-lm", False, ["no labels to smooth", "no class for each"]),
        ({"balance": True}, "token-classification", False, ["no class for each row"]),
        ({"class_weights": "balanced", "balance": True}, "text-classification", False, ["correct the same twice"]),
        ({"class_weights": "balanced"}, "text-classification", True, ["the classes of a stream are not known"]),
        ({"balance": True}, "text-classification", True, ["the classes of a stream are not known"]),
        ({"class_weights": {"a": 2.0}}, "text-classification", True, []),
        ({"label_smoothing": 0.1}, "multiple-choice", False, []),
    ],
)  # fmt: skip
def test_settings_that_do_nothing_are_refused(
    settings: dict[str, Any], kind: str, is_streamed: bool, says: list[str]
) -> None:
    found = setting_problems(ClassSettings(**settings), kind, is_streamed=is_streamed)

    assert len(found) == len(says)
    assert all(text in str(error) for text, error in zip(says, found, strict=True))
