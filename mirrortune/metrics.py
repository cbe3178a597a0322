# SPDX-License-Identifier: Apache-2.0
"""Metrics by the names that GLUE and its successors use, computed by scikit-learn and SciPy; nothing is fetched at run
time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mirrortune.errors import ConfigError, unknown_name

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One score of predictions against references.

    Attributes:
        compute: (predictions, references) -> value; both one a row, shape (N,) for classes and numbers; for tokens,
            the row's summed loss and right tokens (N, 2), and its number of tokens (N,).
        higher_is_better: the direction in which the best checkpoint is chosen.
        target: what it scores: ``"class"`` indices, real ``"number"`` values, ``"token"`` sums.
        binary: defined for two classes only (class 1 is the positive one).
    """

    compute: Callable[[Array, Array], float]
    higher_is_better: bool = True
    target: str = "class"
    binary: bool = False


def _f1(average: str) -> Callable[[Array, Array], float]:
    def compute(predictions: Array, references: Array) -> float:
        from sklearn.metrics import f1_score  # noqa: PLC0415  (scikit-learn takes a second to import)

        return float(f1_score(references, predictions, average=average, zero_division=0.0))

    return compute


def _matthews(predictions: Array, references: Array) -> float:
    from sklearn.metrics import matthews_corrcoef  # noqa: PLC0415

    with warnings.catch_warnings():  # a single predicted class is a valid, if poor, result: 0
        warnings.simplefilter("ignore")
        return float(matthews_corrcoef(references, predictions))


def _correlation(name: str) -> Callable[[Array, Array], float]:
    def compute(predictions: Array, references: Array) -> float:
        import scipy.stats  # noqa: PLC0415

        if len(predictions) < 2 or np.ptp(predictions) == 0 or np.ptp(references) == 0:
            return 0.0  # a constant carries no order: the correlation is undefined, and no evidence of any
        return float(getattr(scipy.stats, name)(predictions, references).statistic)

    return compute


def _accuracy(predictions: Array, references: Array) -> float:
    return float(np.mean(predictions == references))


def _error(power: int) -> Callable[[Array, Array], float]:
    def compute(predictions: Array, references: Array) -> float:
        distance = np.abs(predictions.astype(np.float64) - references.astype(np.float64))
        return float(np.mean(distance**power))

    return compute


def _perplexity(predictions: Array, references: Array) -> float:
    return float(np.exp(predictions[:, 0].sum() / max(1.0, references.sum())))


def _token_accuracy(predictions: Array, references: Array) -> float:
    return float(predictions[:, 1].sum() / max(1.0, references.sum()))


METRICS: dict[str, Metric] = {
    "accuracy": Metric(compute=_accuracy),
    "f1": Metric(compute=_f1("binary"), binary=True),
    "f1_macro": Metric(compute=_f1("macro")),
    "f1_micro": Metric(compute=_f1("micro")),
    "matthews_correlation": Metric(compute=_matthews),
    "pearson": Metric(compute=_correlation("pearsonr"), target="number"),
    "spearmanr": Metric(compute=_correlation("spearmanr"), target="number"),
    "mse": Metric(compute=_error(2), higher_is_better=False, target="number"),
    "mae": Metric(compute=_error(1), higher_is_better=False, target="number"),
    "perplexity": Metric(compute=_perplexity, higher_is_better=False, target="token"),
    "token_accuracy": Metric(compute=_token_accuracy, target="token"),
}


def check_metrics(
    names: Sequence[str], target: str, num_classes: int | None = None, selection: str | None = None
) -> None:
    """Refuse metric names that do not exist or do not fit, before any training.

    Args:
        names: metric names asked for, at least one.
        selection: the one that chooses the best checkpoint, if it was named.
        target: ``"class"`` or ``"number"``.
        num_classes: number of classes, where known.

    Raises:
        ConfigError: with the nearest name, or the metrics that fit.
    """
    fitting = [n for n, m in METRICS.items() if m.target == target]
    for name in names:
        if name not in METRICS:
            raise unknown_name("task.metrics", "metric", name, METRICS)
        metric = METRICS[name]
        if metric.target != target:
            raise ConfigError("task.metrics", f"'{name}' does not score a {target}", allowed=", ".join(fitting))
        if metric.binary and num_classes not in (None, 2):
            raise ConfigError(
                "task.metrics", f"'{name}' needs two classes, got {num_classes}", allowed="f1_macro, f1_micro, accuracy"
            )
    if selection not in (None, *names):
        raise ConfigError("task.selection_metric", f"'{selection}' is not computed", allowed=", ".join(names))


def score(names: Sequence[str], predictions: Array, references: Array) -> dict[str, float]:
    """Each named metric of ``predictions`` against ``references``, both of shape (N,)."""
    return {name: METRICS[name].compute(predictions, references) for name in names}
