# SPDX-License-Identifier: Apache-2.0
"""Metrics, under the names of GLUE and its successors; computed by scikit-learn and SciPy, nothing is downloaded."""

from __future__ import annotations

import importlib.util
import math
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from mirrortune.errors import ConfigError, unknown_name

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A score of predictions against references.

    Attributes:
        compute: (predictions, references) -> value, both with an entry for each row.
        higher_is_better: whether the best checkpoint has the highest or the lowest value.
        is_share: whether the value is in [0, 1] (or [-1, 1]) and shown as a percentage.
        targets: what it can score: ``"class"`` indices (N,); the index (N,) of a ``"choice"`` among endings, which have
            no classes; real ``"number"`` values (N,); sets of ``"labels"`` (N, C) of 0 and 1; ``"tags"``, lists of
            names; ``"answers"``, a text against several; ``"text"`` against one; ``"token"`` sums: loss and number of
            correct tokens (N, 2), and number of tokens (N,); ``"written"``, the same with a third column, 1 where a
            generated answer is correct; the ``"rank"`` (N,) of the right text among all of a split, as references,
            whatever the predictions (N,).
        binary: whether it is defined for two classes only (class 1 is the positive one).
        requires: an optional module, and the extra of this package that installs it.
        takes_probabilities: whether ``compute`` takes the probability of each class (N, C) instead of predictions.
    """

    compute: Callable[[Any, Any], float]
    higher_is_better: bool = True
    is_share: bool = True
    targets: tuple[str, ...] = ("class",)
    binary: bool = False
    requires: tuple[str, str] | None = None
    takes_probabilities: bool = False


def _f1(predictions: Array, references: Array, *, average: str) -> float:
    from sklearn.metrics import f1_score  # noqa: PLC0415  (scikit-learn takes a second to import)

    return float(f1_score(references, predictions, average=average, zero_division=0.0))


def _matthews(predictions: Array, references: Array) -> float:
    from sklearn.metrics import matthews_corrcoef  # noqa: PLC0415

    with warnings.catch_warnings():  # a single predicted class is a valid, if poor, result: 0
        warnings.simplefilter("ignore")
        return float(matthews_corrcoef(references, predictions))


def _balanced_accuracy(predictions: Array, references: Array) -> float:
    from sklearn.metrics import balanced_accuracy_score  # noqa: PLC0415

    with warnings.catch_warnings():  # predicted classes that no row has count as wrong answers, and have no recall
        warnings.simplefilter("ignore")
        return float(balanced_accuracy_score(references, predictions))


def _log_loss(probabilities: Array, references: Array) -> float:
    from sklearn.metrics import log_loss  # noqa: PLC0415

    return float(log_loss(references, probabilities, labels=range(probabilities.shape[1])))


def _roc_auc(probabilities: Array, references: Array) -> float:
    """Return the area under the ROC curve: of class 1 of two, else the mean over classes, each against the rest.

    Classes that no row has, or that all rows have, are left out; without any other class the area is 0.5.
    """
    from sklearn.metrics import roc_auc_score  # noqa: PLC0415

    size = probabilities.shape[1]
    truth = references if references.ndim == 2 else references[:, None] == np.arange(size)
    scored = range(1 if references.ndim == 1 and size == 2 else 0, size)
    areas = [roc_auc_score(truth[:, c], probabilities[:, c]) for c in scored if 0 < truth[:, c].sum() < len(truth)]
    return float(np.mean(areas)) if areas else 0.5


def _r2(predictions: Array, references: Array) -> float:
    from sklearn.metrics import r2_score  # noqa: PLC0415

    if not np.isfinite(predictions).all():  # scikit-learn refuses them, and whoever trains has to see the loss
        return math.nan
    return float(r2_score(references, predictions)) if len(references) > 1 else 0.0


def _correlation(predictions: Array, references: Array, *, name: str) -> float:
    import scipy.stats  # noqa: PLC0415

    if len(predictions) < 2 or np.ptp(predictions) == 0 or np.ptp(references) == 0:
        return 0.0  # the correlation with a constant is undefined, and no evidence of any
    return float(getattr(scipy.stats, name)(predictions, references).statistic)


def _accuracy(predictions: Array, references: Array) -> float:
    return float(np.mean(predictions == references))


def _subset_accuracy(predictions: Array, references: Array) -> float:
    return float(np.mean((predictions == references).all(axis=1)))


def _tags(predictions: Array, references: Array, *, name: str) -> float:
    """Return a seqeval score of whole entities; an entity counts if its boundaries and its type are correct."""
    import seqeval.metrics  # noqa: PLC0415

    return float(getattr(seqeval.metrics, name)(references, predictions, zero_division=0))


def _tag_accuracy(predictions: Any, references: Any) -> float:
    right = [
        p == r for row, truth in zip(predictions, references, strict=True) for p, r in zip(row, truth, strict=True)
    ]
    return float(np.mean(right)) if right else 0.0


def _plain(text: str) -> str:
    """Normalise as SQuAD does: lower case, no punctuation, no articles, single spaces (Rajpurkar et al. 2016)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _exact(answer: str, truth: str) -> float:
    return float(_plain(answer) == _plain(truth))


def _overlap(answer: str, truth: str) -> float:
    said, right = _plain(answer).split(), _plain(truth).split()
    common = sum((Counter(said) & Counter(right)).values())
    if not said or not right:
        return float(said == right)
    return 2 * common / (len(said) + len(right))


def _best_answer(predictions: Any, references: Any, *, compare: Callable[[str, str], float]) -> float:
    """Return the mean over questions of the best comparison with any true answer; without one, "" is correct.

    As in the official script of SQuAD 2.0, an answer of only articles and punctuation counts as none.
    """
    rights = ([truth for truth in right if _plain(truth)] or [""] for right in references)
    pairs = zip(predictions, rights, strict=True)
    return float(np.mean([max(compare(answer, truth) for truth in right) for answer, right in pairs]))


def _exact_match(predictions: Any, references: Any) -> float:
    """Return the share of correct answers: generated ones were compared already, spans are compared as SQuAD does."""
    if isinstance(predictions, np.ndarray):
        return float(predictions[:, 2].mean())
    return _best_answer(predictions, references, compare=_exact)


def _error(predictions: Array, references: Array, *, power: int) -> float:
    distance = np.abs(predictions.astype(np.float64) - references.astype(np.float64))
    return float(np.mean(distance**power))


def _recall(_: Array, ranks: npt.NDArray[np.int64], *, k: int) -> float:
    return float(np.mean(ranks <= k))


def _mrr(_: Array, ranks: npt.NDArray[np.int64], *, k: int) -> float:
    return float(np.mean(np.where(ranks <= k, 1 / ranks, 0.0)))


def _ndcg(_: Array, ranks: npt.NDArray[np.int64], *, k: int) -> float:
    """Return the mean NDCG of lists of k places, of which the right text takes one, or none if its rank is above k."""
    from sklearn.metrics import ndcg_score  # noqa: PLC0415

    places = np.arange(1, k + 1)
    return float(ndcg_score(ranks[:, None] == places, np.broadcast_to(-places, (len(ranks), k)), k=k))


def _root_error(predictions: Array, references: Array) -> float:
    return float(np.sqrt(_error(predictions, references, power=2)))


def _perplexity(predictions: Array, references: Array) -> float:
    return float(np.exp(predictions[:, 0].sum() / max(1.0, references.sum())))


def _token_accuracy(predictions: Array, references: Array) -> float:
    return float(predictions[:, 1].sum() / max(1.0, references.sum()))


def _rouge(predictions: Any, references: Any, *, name: str) -> float:
    from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415

    scorer = RougeScorer([name], use_stemmer=True)
    # rougeLsum treats lines as sentences.
    pairs = zip(predictions, references, strict=True)
    return float(np.mean([scorer.score(truth, text)[name].fmeasure for text, truth in pairs]))


def _corpus(predictions: Any, references: Any, *, name: str) -> float:
    import sacrebleu  # noqa: PLC0415

    return float(getattr(sacrebleu, name)(list(predictions), [list(references)]).score)


_SEQEVAL, _ROUGE, _BLEU = ("seqeval", "tags"), ("rouge_score", "generation"), ("sacrebleu", "generation")

METRICS: dict[str, Metric] = {
    "accuracy": Metric(compute=_accuracy, targets=("class", "choice")),
    "f1": Metric(compute=partial(_f1, average="binary"), binary=True),
    "f1_macro": Metric(compute=partial(_f1, average="macro"), targets=("class", "choice", "labels")),
    "f1_micro": Metric(compute=partial(_f1, average="micro"), targets=("class", "choice", "labels")),
    "balanced_accuracy": Metric(compute=_balanced_accuracy, targets=("class", "choice")),
    "subset_accuracy": Metric(compute=_subset_accuracy, targets=("labels",)),
    "matthews_correlation": Metric(compute=_matthews, targets=("class", "choice")),
    "mcc": Metric(compute=_matthews, targets=("class", "choice")),
    "roc_auc": Metric(compute=_roc_auc, targets=("class", "labels"), takes_probabilities=True),
    "log_loss": Metric(compute=_log_loss, higher_is_better=False, is_share=False, takes_probabilities=True),
    "pearson": Metric(compute=partial(_correlation, name="pearsonr"), targets=("number",)),
    "spearmanr": Metric(compute=partial(_correlation, name="spearmanr"), targets=("number",)),
    "mse": Metric(compute=partial(_error, power=2), higher_is_better=False, is_share=False, targets=("number",)),
    "mae": Metric(compute=partial(_error, power=1), higher_is_better=False, is_share=False, targets=("number",)),
    "rmse": Metric(compute=_root_error, higher_is_better=False, is_share=False, targets=("number",)),
    "r2": Metric(compute=_r2, is_share=False, targets=("number",)),
    "entity_f1": Metric(compute=partial(_tags, name="f1_score"), targets=("tags",), requires=_SEQEVAL),
    "entity_precision": Metric(compute=partial(_tags, name="precision_score"), targets=("tags",), requires=_SEQEVAL),
    "entity_recall": Metric(compute=partial(_tags, name="recall_score"), targets=("tags",), requires=_SEQEVAL),
    "tag_accuracy": Metric(compute=_tag_accuracy, targets=("tags",)),
    "exact_match": Metric(compute=_exact_match, targets=("answers", "written")),
    "squad_f1": Metric(compute=partial(_best_answer, compare=_overlap), targets=("answers",)),
    "rouge1": Metric(compute=partial(_rouge, name="rouge1"), targets=("text",), requires=_ROUGE),
    "rouge2": Metric(compute=partial(_rouge, name="rouge2"), targets=("text",), requires=_ROUGE),
    "rougeL": Metric(compute=partial(_rouge, name="rougeL"), targets=("text",), requires=_ROUGE),
    "rougeLsum": Metric(compute=partial(_rouge, name="rougeLsum"), targets=("text",), requires=_ROUGE),
    "bleu": Metric(compute=partial(_corpus, name="corpus_bleu"), targets=("text",), is_share=False, requires=_BLEU),
    "chrf": Metric(compute=partial(_corpus, name="corpus_chrf"), targets=("text",), is_share=False, requires=_BLEU),
    "perplexity": Metric(compute=_perplexity, higher_is_better=False, is_share=False, targets=("token", "written")),
    "token_accuracy": Metric(compute=_token_accuracy, targets=("token", "written")),
    "recall_at_1": Metric(compute=partial(_recall, k=1), targets=("rank",)),
    "recall_at_10": Metric(compute=partial(_recall, k=10), targets=("rank",)),
    "mrr_at_10": Metric(compute=partial(_mrr, k=10), targets=("rank",)),
    "ndcg_at_10": Metric(compute=partial(_ndcg, k=10), targets=("rank",)),
}


def check_metrics(
    names: Sequence[str], target: str, num_classes: int | None = None, selection: str | None = None
) -> None:
    """Check that metrics exist and fit the task, before any training.

    Args:
        names: names of metrics, at least one.
        target: what is scored; see :class:`Metric`.
        num_classes: number of classes, if known.
        selection: the metric that chooses the best checkpoint, if it was named.

    Raises:
        ConfigError: with the nearest name, or the metrics that fit.
    """
    fitting = [n for n, m in METRICS.items() if target in m.targets]
    for name in names:
        if name not in METRICS:
            raise unknown_name("task.metrics", "metric", name, METRICS)
        metric = METRICS[name]
        if target not in metric.targets:
            raise ConfigError("task.metrics", f"'{name}' does not score a {target}", allowed=", ".join(fitting))
        if metric.requires and importlib.util.find_spec(metric.requires[0]) is None:
            module, extra = metric.requires
            raise ConfigError("task.metrics", f"'{name}' needs {module}", fix=f"pip install 'mirrortune[{extra}]'")
        if metric.binary and num_classes not in (None, 2):
            raise ConfigError(
                "task.metrics", f"'{name}' needs two classes, got {num_classes}", allowed="f1_macro, f1_micro, accuracy"
            )
    if selection not in (None, *names):
        raise ConfigError("task.selection_metric", f"'{selection}' is not computed", allowed=", ".join(names))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The metrics that a recipe asks for.

    Attributes:
        metrics: names, or None for the defaults of the kind of task.
        selection_metric: the one that chooses the best checkpoint, or None for the first.
    """

    metrics: tuple[str, ...] | None = None
    selection_metric: str | None = None

    def fields(self, own: tuple[str, ...], target: str, num_classes: int | None = None) -> dict[str, Any]:
        """Return ``metric_names`` and ``selection_metric`` of a task whose kind has the default metrics ``own``; see
        :func:`check_metrics` for the other arguments and the errors.
        """
        names = self.metrics or own
        check_metrics(names, target, num_classes, self.selection_metric)
        return {"metric_names": names, "selection_metric": self.selection_metric or names[0]}


KINDS_OWN = Scores()
"""The defaults of the kind of task."""


def score(
    names: Sequence[str], predictions: Any, references: Any, probabilities: Callable[[], Array | None] = lambda: None
) -> dict[str, float]:
    """Compute each named metric of ``predictions`` against ``references``, both with an entry for each row.

    Args:
        names: of the metrics.
        predictions: as the metrics' targets take them.
        references: the same.
        probabilities: returns the probability of each class (N, C), None where the kind of task has none; called only
            if a metric needs them.

    Raises:
        ConfigError: a metric needs probabilities, and there are none.
    """
    found: dict[str, float] = {}
    for name in names:
        given = probabilities() if METRICS[name].takes_probabilities else predictions
        if given is None:
            raise ConfigError("task.metrics", f"'{name}' needs probabilities, which this kind of task does not have")
        is_broken = METRICS[name].takes_probabilities and not np.isfinite(given).all()
        found[name] = math.nan if is_broken else METRICS[name].compute(given, references)
    return found
