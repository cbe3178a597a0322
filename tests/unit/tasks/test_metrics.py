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
        if not {"class", "number"} & set(metric.targets):
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
            "unknown metric 'acuracy'. Did you mean 'accuracy'? Allowed: accuracy, bleu",
        ),
        (["pearson"], "class", 2, None, "'pearson' does not score a class. Allowed: accuracy, f1"),
        (["accuracy"], "number", None, None, "'accuracy' does not score a number. Allowed: pearson, spearmanr, mse"),
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


def test_metrics_that_fit_pass() -> None:
    check_metrics(["accuracy", "f1"], "class", 2, "f1")
    check_metrics(["mse"], "number", selection="mse")
