# SPDX-License-Identifier: Apache-2.0
"""Metrics against numbers worked out by hand, at their edges, and the refusal of those that do not fit."""

from __future__ import annotations

import numpy as np
import pytest

from mirrortune.errors import ConfigError
from mirrortune.tasks.metrics import METRICS, check_metrics, score

# 3 true positives, 1 false positive, 2 false negatives, 4 true negatives.
PREDICTED = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
TRUE = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
NUMBERS, WANTED = np.array([1.0, 2.0, 4.0, 3.0], np.float32), np.array([1.0, 2.0, 3.0, 4.0], np.float32)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accuracy", 0.7),
        ("f1", 2 * 3 / (2 * 3 + 1 + 2)),
        ("f1_macro", (2 / 3 + 8 / 11) / 2),
        ("f1_micro", 0.7),
        ("matthews_correlation", (3 * 4 - 1 * 2) / np.sqrt((3 + 1) * (3 + 2) * (4 + 1) * (4 + 2))),
    ],
)
def test_metrics_of_classes(name: str, value: float) -> None:
    assert score([name], PREDICTED, TRUE)[name] == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(("name", "value"), [("pearson", 0.8), ("spearmanr", 0.8), ("mse", 0.5), ("mae", 0.5)])
def test_metrics_of_numbers(name: str, value: float) -> None:
    assert score([name], NUMBERS, WANTED)[name] == pytest.approx(value, abs=1e-6)


def test_a_perfect_and_a_constant_answer() -> None:
    for name, metric in METRICS.items():
        if not {"class", "number"} & set(metric.targets) or metric.takes_probabilities:
            continue
        reference = TRUE if "class" in metric.targets else WANTED
        perfect = score([name], reference, reference)[name]
        constant = score([name], np.zeros_like(reference), reference)[name]
        assert perfect == pytest.approx(1.0 if metric.higher_is_better else 0.0)
        assert np.isfinite(constant)
        assert constant < perfect if metric.higher_is_better else constant > perfect
    assert score(["matthews_correlation", "f1"], np.zeros_like(TRUE), TRUE) == {"matthews_correlation": 0, "f1": 0}
    assert score(["pearson"], np.array([1.0]), np.array([2.0])) == {"pearson": 0.0}


@pytest.mark.parametrize(
    ("names", "target", "classes", "selection", "says"),
    [
        (
            ["acuracy"],
            "class",
            2,
            None,
            "unknown metric 'acuracy'. Did you mean 'accuracy'? Allowed: accuracy, balanced_accuracy, bleu",
        ),
        (["pearson"], "class", 2, None, "'pearson' does not score a class. Allowed: accuracy, f1"),
        (["accuracy"], "number", None, None, "'accuracy' does not score a number. Allowed: pearson, spearmanr, mse"),
        (["roc_auc"], "choice", None, None, "'roc_auc' does not score a choice. Allowed: accuracy, f1_macro"),
        (["f1"], "choice", None, None, "'f1' does not score a choice"),
        (["f1"], "class", 3, None, "'f1' needs two classes, got 3. Allowed: f1_macro"),
        (["accuracy"], "class", 2, "f1", "task.selection_metric: 'f1' is not computed. Allowed: accuracy"),
    ],
)
def test_metrics_that_do_not_fit_are_refused(
    names: list[str], target: str, classes: int | None, selection: str | None, says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_metrics(names, target, classes, selection)

    assert says in str(caught.value)


def test_classes_without_rows_have_no_area_and_no_recall() -> None:
    odds = np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.4, 0.3, 0.3], [0.2, 0.5, 0.3]])
    truth = np.array([0, 1, 0, 1])

    found = score(["roc_auc", "log_loss", "balanced_accuracy"], np.array([0, 1, 2, 1]), truth, lambda: odds)

    assert found == pytest.approx(
        {"roc_auc": 1.0, "log_loss": -np.log([0.7, 0.6, 0.4, 0.5]).mean(), "balanced_accuracy": 0.75}
    )
    assert score(["roc_auc"], truth, np.zeros(4, int), lambda: odds) == {"roc_auc": 0.5}


def test_broken_outputs_give_no_number_and_no_exception() -> None:
    broken = np.array([[np.nan, np.nan], [0.5, 0.5]])

    found = score(["roc_auc", "log_loss"], np.array([0, 1]), np.array([0, 1]), lambda: broken)

    assert np.isnan(list(found.values())).all()
    assert np.isnan(score(["r2"], np.array([np.nan, 1.0]), np.array([0.0, 1.0]))["r2"])


def test_a_kind_without_probabilities_says_so() -> None:
    with pytest.raises(ConfigError, match=r"task\.metrics: 'log_loss' needs probabilities"):
        score(["log_loss"], np.array([0]), np.array([0]))


def test_metrics_that_fit_pass() -> None:
    check_metrics(["accuracy", "f1"], "class", 2, "f1")
    check_metrics(["mse"], "number", selection="mse")
