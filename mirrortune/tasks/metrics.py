# SPDX-License-Identifier: Apache-2.0
"""Metrics, with the names used by GLUE and its successors; most are computed by scikit-learn or SciPy, offline."""

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
        compute: (predictions, references) -> value; both arguments have one entry per row.
        higher_is_better: whether the best checkpoint has the highest or the lowest value.
        is_share: whether the value is in [0, 1] (or [-1, 1]) and shown as a percentage.
        targets: types of target that the metric can score. ``"class"``: class indices (N,). ``"choice"``: indices (N,)
            of endings, which are not classes. ``"number"``: real values (N,). ``"labels"``: 0 and 1 for each class
            (N, C). ``"tags"``: lists of tag names. ``"answers"``: a text, against several references. ``"text"``: a
            text, against one reference. ``"token"``: loss and number of correct tokens (N, 2), against the number of
            tokens (N,). ``"written"``: as ``"token"``, with a third column that is 1 where the generated answer is
            correct. ``"rank"``: the references are ranks (N,) of the right text among all texts of the split, and the
            predictions are ignored.
        binary: whether the metric is defined for two classes only (class 1 is the positive class).
        requires: an optional module, and the extra of this package that installs it.
        takes_probabilities: whether ``compute`` takes the probability of each class (N, C) instead of predictions.
        fast: computes the same value, but for rounding, fast enough for thousands of resamples; None if ``compute`` is.
        by_row: (predictions, references) -> numbers of each row, (N,) or (N, K), for texts and tags; None if the metric
            cannot be computed from such numbers.
        of_rows: numbers of rows -> value.
    """

    compute: Callable[[Any, Any], float]
    higher_is_better: bool = True
    is_share: bool = True
    targets: tuple[str, ...] = ("class",)
    binary: bool = False
    requires: tuple[str, str] | None = None
    takes_probabilities: bool = False
    fast: Callable[[Any, Any], float] | None = None
    by_row: Callable[[Any, Any], npt.NDArray[np.float64]] | None = None
    of_rows: Callable[[npt.NDArray[np.float64]], float] = lambda numbers: float(numbers.mean())

    def of_ranks(self, ranks: Array, _: Array) -> float:
        """Score ranks alone, for a metric of the target ``"rank"``; the second argument is ignored."""
        return (self.fast or self.compute)(ranks, ranks)


def _f1(predictions: Array, references: Array, *, average: str) -> float:
    from sklearn.metrics import f1_score  # noqa: PLC0415  (scikit-learn takes a second to import)

    return float(f1_score(references, predictions, average=average, zero_division=0.0))


def _matthews(predictions: Array, references: Array) -> float:
    from sklearn.metrics import matthews_corrcoef  # noqa: PLC0415

    with warnings.catch_warnings():  # if only one class is predicted, the result is 0, without a warning
        warnings.simplefilter("ignore")
        return float(matthews_corrcoef(references, predictions))


def _balanced_accuracy(predictions: Array, references: Array) -> float:
    from sklearn.metrics import balanced_accuracy_score  # noqa: PLC0415

    with warnings.catch_warnings():  # predicted classes that no row has count as wrong answers, and have no recall
        warnings.simplefilter("ignore")
        return float(balanced_accuracy_score(references, predictions))


def _counts(predictions: npt.NDArray[Any], references: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return how many rows of each class are right, are predicted and are true, (3, C); the first class is "none"."""
    if references.ndim == 2:
        said, true = (np.pad(values.astype(bool), ((0, 0), (1, 0))) for values in (predictions, references))
        return np.array([(said & true).sum(axis=0), said.sum(axis=0), true.sum(axis=0)], dtype=np.float64)
    size, right = 2 + max(1, predictions.max(), references.max()), predictions[predictions == references]
    found = [np.bincount(values + 1, minlength=size) for values in (right, predictions, references)]
    return np.array(found, dtype=np.float64)


def _f1_of_counts(predictions: Array, references: Array, *, average: str) -> float:
    """Return the value of :func:`_f1`; of single classes, those that are neither predicted nor true do not count."""
    found = _counts(predictions, references)
    found = {"binary": found[:, 2:3], "micro": found.sum(axis=1, keepdims=True), "macro": found}[average]
    right, base = found[0], found[1] + found[2]
    count = found.shape[1] - 1 if average == "macro" and references.ndim == 2 else np.count_nonzero(base)
    return float((2 * right[base > 0] / base[base > 0]).sum() / count) if count else 0.0


def _matthews_of_counts(predictions: Array, references: Array) -> float:
    right, said, true = _counts(predictions, references)
    size = true.sum()
    base = (size**2 - said @ said) * (size**2 - true @ true)
    return float((right.sum() * size - said @ true) / np.sqrt(base)) if base else 0.0


def _balanced_accuracy_of_counts(predictions: Array, references: Array) -> float:
    right, _, true = _counts(predictions, references)
    return float((right[true > 0] / true[true > 0]).mean())


def _log_loss(probabilities: Array, references: Array) -> float:
    from sklearn.metrics import log_loss  # noqa: PLC0415

    return float(log_loss(references, probabilities, labels=range(probabilities.shape[1])))


def _log_loss_by_row(probabilities: npt.NDArray[Any], references: Array) -> float:
    """Return the value of :func:`_log_loss` for one class per row."""
    smallest = np.finfo(probabilities.dtype).eps
    right = probabilities[np.arange(len(references)), references.astype(np.int64)]
    return float(-np.log(right.clip(smallest, 1 - smallest)).mean())


def _roc_auc(probabilities: Array, references: Array) -> float:
    """Return the area under the ROC curve: of class 1 if there are two classes, else the one-vs-rest mean over classes.

    Classes that no row or every row has are left out; if no class remains, the area is 0.5.
    """
    from sklearn.metrics import roc_auc_score  # noqa: PLC0415

    truth, scored = _of_each_class(probabilities, references)
    areas = [roc_auc_score(truth[:, c], probabilities[:, c]) for c in scored if 0 < truth[:, c].sum() < len(truth)]
    return float(np.mean(areas)) if areas else 0.5


def _roc_auc_by_pairs(probabilities: Array, references: Array) -> float:
    """Return the value of :func:`_roc_auc` as the share of pairs that are in order, half of those of equal rank."""
    truth, scored = _of_each_class(probabilities, references)
    areas = []
    for c in scored:
        right = truth[:, c].astype(bool)
        above, below = probabilities[right, c], np.sort(probabilities[~right, c])
        if len(above) and len(below):
            twice = below.searchsorted(above, "left") + below.searchsorted(above, "right")
            areas.append(twice.sum() / (2 * len(above) * len(below)))
    return float(np.mean(areas)) if areas else 0.5


def _of_each_class(probabilities: Array, references: Array) -> tuple[npt.NDArray[Any], range]:
    """Return whether each class is right (N, C), and the classes to score."""
    size = probabilities.shape[1]
    truth = references if references.ndim == 2 else references[:, None] == np.arange(size)
    return truth, range(1 if references.ndim == 1 and size == 2 else 0, size)


def _r2(predictions: Array, references: Array) -> float:
    from sklearn.metrics import r2_score  # noqa: PLC0415

    if not np.isfinite(predictions).all():  # scikit-learn refuses them, but evaluation must still report the loss
        return math.nan
    own, true = predictions.astype(np.float64), references.astype(np.float64)
    return float(r2_score(true, own)) if len(references) > 1 else 0.0


def _correlation(predictions: Array, references: Array, *, name: str) -> float:
    import scipy.stats  # noqa: PLC0415

    if len(predictions) < 2 or np.ptp(predictions) == 0 or np.ptp(references) == 0:
        return 0.0  # the correlation with a constant is undefined
    predictions, references = predictions.astype(np.float64), references.astype(np.float64)
    with warnings.catch_warnings():  # nearly constant values, such as those before training, are valid
        warnings.simplefilter("ignore")
        return float(getattr(scipy.stats, name)(predictions, references).statistic)


def _accuracy(predictions: Array, references: Array) -> float:
    return float(np.mean(predictions == references))


def _subset_accuracy(predictions: Array, references: Array) -> float:
    return float(np.mean((predictions == references).all(axis=1)))


def _tags(predictions: Array, references: Array, *, name: str) -> float:
    """Return a seqeval score of entities; an entity is correct if its boundaries and its type are correct."""
    import seqeval.metrics  # noqa: PLC0415

    return float(getattr(seqeval.metrics, name)(references, predictions, zero_division=0))


def _entities_by_row(predictions: Any, references: Any) -> npt.NDArray[np.float64]:
    """Return the numbers of correct, of predicted and of true entities, (N, 3)."""
    from seqeval.metrics.sequence_labeling import get_entities  # noqa: PLC0415

    pairs = [(set(get_entities(p)), set(get_entities(r))) for p, r in zip(predictions, references, strict=True)]
    return np.array([[len(p & r), len(p), len(r)] for p, r in pairs], dtype=np.float64).reshape(-1, 3)


def _of_entities(numbers: npt.NDArray[np.float64], *, name: str) -> float:
    correct, predicted, true = numbers.sum(axis=0)
    base = {"precision_score": predicted, "recall_score": true, "f1_score": (predicted + true) / 2}[name]
    return float(correct / base) if base else 0.0


def _tags_by_row(predictions: Any, references: Any) -> npt.NDArray[np.float64]:
    """Return the numbers of correct tags and of all tags, (N, 2)."""
    pairs = zip(predictions, references, strict=True)
    found = [[sum(a == b for a, b in zip(p, r, strict=True)), len(r)] for p, r in pairs]
    return np.array(found, dtype=np.float64).reshape(-1, 2)


def _share(numbers: npt.NDArray[np.float64]) -> float:
    right, count = numbers.sum(axis=0)
    return float(right / count) if count else 0.0


def _tag_accuracy(predictions: Any, references: Any) -> float:
    right = [
        p == r for row, truth in zip(predictions, references, strict=True) for p, r in zip(row, truth, strict=True)
    ]
    return float(np.mean(right)) if right else 0.0


def _plain(text: str) -> str:
    """Normalise text as SQuAD does: lower case, no punctuation, no articles, single spaces (Rajpurkar et al. 2016)."""
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
    return float(np.mean(_best_answers(predictions, references, compare=compare)))


def _best_answers(
    predictions: Any, references: Any, *, compare: Callable[[str, str], float]
) -> npt.NDArray[np.float64]:
    """Return the best score of each question against any true answer, (N,); "" is correct if there is none.

    As in the official script of SQuAD 2.0, an answer of only articles and punctuation counts as no answer.
    """
    rights = ([truth for truth in right if _plain(truth)] or [""] for right in references)
    pairs = zip(predictions, rights, strict=True)
    return np.array([max(compare(answer, truth) for truth in right) for answer, right in pairs])


def _exact_match(predictions: Any, references: Any) -> float:
    """Return the share of correct answers. Generated answers are compared before; spans are compared as in SQuAD."""
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
    """Return the mean NDCG at k, with one relevant text per query: 0 for a query whose rank is above k."""
    from sklearn.metrics import ndcg_score  # noqa: PLC0415

    places = np.arange(1, k + 1)
    return float(ndcg_score(ranks[:, None] == places, np.broadcast_to(-places, (len(ranks), k)), k=k))


def _ndcg_of_ranks(_: Array, ranks: npt.NDArray[np.int64], *, k: int) -> float:
    return float(np.mean(np.where(ranks <= k, 1 / np.log2(1 + ranks), 0.0)))


def _root_error(predictions: Array, references: Array) -> float:
    return float(np.sqrt(_error(predictions, references, power=2)))


def _perplexity(predictions: Array, references: Array) -> float:
    return float(np.exp(predictions[:, 0].sum() / max(1.0, references.sum())))


def _token_accuracy(predictions: Array, references: Array) -> float:
    return float(predictions[:, 1].sum() / max(1.0, references.sum()))


def _rouge(predictions: Any, references: Any, *, name: str) -> float:
    return float(np.mean(_rouge_by_row(predictions, references, name=name)))


def _rouge_by_row(predictions: Any, references: Any, *, name: str) -> npt.NDArray[np.float64]:
    from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415

    scorer = RougeScorer([name], use_stemmer=True)
    # rougeLsum treats lines as sentences.
    pairs = zip(predictions, references, strict=True)
    return np.array([scorer.score(truth, text)[name].fmeasure for text, truth in pairs])


def _corpus(predictions: Any, references: Any, *, name: str) -> float:
    import sacrebleu  # noqa: PLC0415

    return float(getattr(sacrebleu, name)(list(predictions), [list(references)]).score)


_SEQEVAL, _ROUGE, _BLEU = ("seqeval", "tags"), ("rouge_score", "generation"), ("sacrebleu", "generation")

METRICS: dict[str, Metric] = {
    "accuracy": Metric(compute=_accuracy, targets=("class", "choice")),
    "f1": Metric(compute=partial(_f1, average="binary"), fast=partial(_f1_of_counts, average="binary"), binary=True),
    **{
        f"f1_{average}": Metric(
            compute=partial(_f1, average=average),
            targets=("class", "choice", "labels"),
            fast=partial(_f1_of_counts, average=average),
        )
        for average in ("macro", "micro")
    },
    "balanced_accuracy": Metric(
        compute=_balanced_accuracy, targets=("class", "choice"), fast=_balanced_accuracy_of_counts
    ),
    "subset_accuracy": Metric(compute=_subset_accuracy, targets=("labels",)),
    "matthews_correlation": Metric(compute=_matthews, targets=("class", "choice"), fast=_matthews_of_counts),
    "mcc": Metric(compute=_matthews, targets=("class", "choice"), fast=_matthews_of_counts),
    "roc_auc": Metric(compute=_roc_auc, targets=("class", "labels"), takes_probabilities=True, fast=_roc_auc_by_pairs),
    "log_loss": Metric(
        compute=_log_loss, higher_is_better=False, is_share=False, takes_probabilities=True, fast=_log_loss_by_row
    ),
    "pearson": Metric(compute=partial(_correlation, name="pearsonr"), targets=("number",)),
    "spearmanr": Metric(compute=partial(_correlation, name="spearmanr"), targets=("number",)),
    "mse": Metric(compute=partial(_error, power=2), higher_is_better=False, is_share=False, targets=("number",)),
    "mae": Metric(compute=partial(_error, power=1), higher_is_better=False, is_share=False, targets=("number",)),
    "rmse": Metric(compute=_root_error, higher_is_better=False, is_share=False, targets=("number",)),
    "r2": Metric(compute=_r2, is_share=False, targets=("number",)),
    **{
        f"entity_{own}": Metric(
            compute=partial(_tags, name=f"{own}_score"),
            targets=("tags",),
            requires=_SEQEVAL,
            by_row=_entities_by_row,
            of_rows=partial(_of_entities, name=f"{own}_score"),
        )
        for own in ("f1", "precision", "recall")
    },
    "tag_accuracy": Metric(compute=_tag_accuracy, targets=("tags",), by_row=_tags_by_row, of_rows=_share),
    "exact_match": Metric(
        compute=_exact_match, targets=("answers", "written"), by_row=partial(_best_answers, compare=_exact)
    ),
    "squad_f1": Metric(
        compute=partial(_best_answer, compare=_overlap),
        targets=("answers",),
        by_row=partial(_best_answers, compare=_overlap),
    ),
    **{
        name: Metric(
            compute=partial(_rouge, name=name),
            targets=("text",),
            requires=_ROUGE,
            by_row=partial(_rouge_by_row, name=name),
        )
        for name in ("rouge1", "rouge2", "rougeL", "rougeLsum")
    },
    "bleu": Metric(compute=partial(_corpus, name="corpus_bleu"), targets=("text",), is_share=False, requires=_BLEU),
    "chrf": Metric(compute=partial(_corpus, name="corpus_chrf"), targets=("text",), is_share=False, requires=_BLEU),
    "perplexity": Metric(compute=_perplexity, higher_is_better=False, is_share=False, targets=("token", "written")),
    "token_accuracy": Metric(compute=_token_accuracy, targets=("token", "written")),
    "recall_at_1": Metric(compute=partial(_recall, k=1), targets=("rank",)),
    "recall_at_10": Metric(compute=partial(_recall, k=10), targets=("rank",)),
    "mrr_at_10": Metric(compute=partial(_mrr, k=10), targets=("rank",)),
    "ndcg_at_10": Metric(compute=partial(_ndcg, k=10), targets=("rank",), fast=partial(_ndcg_of_ranks, k=10)),
}

_SCORED = {
    "labels": "several labels", "tags": "tags", "answers": "answers", "token": "tokens", "written": "generated answers",
    "rank": "ranks",
}  # fmt: skip
"""How messages name the types of target; any other is named with its article."""


def check_metrics(
    names: Sequence[str], target: str, num_classes: int | None = None, selection: str | None = None
) -> None:
    """Check that metrics exist and fit the task.

    Args:
        names: names of the metrics, at least one.
        target: type of target that is scored; see :class:`Metric`.
        num_classes: number of classes, if known.
        selection: metric that selects the best checkpoint, if one was named.

    Raises:
        ConfigError: a metric is unknown or does not fit; the fix gives the nearest name, or the metrics that fit.
    """
    fitting = [n for n, m in METRICS.items() if target in m.targets]
    for name in names:
        if name not in METRICS:
            raise unknown_name("task.metrics", "metric", name, METRICS)
        metric = METRICS[name]
        if target not in metric.targets:
            fix = "Set task.answer" if target == "token" and "written" in metric.targets else None
            problem = f"'{name}' does not score {_SCORED.get(target, f'a {target}')}"
            raise ConfigError("task.metrics", problem, allowed=", ".join(fitting), fix=fix)
        if metric.requires and importlib.util.find_spec(metric.requires[0]) is None:
            module, extra = metric.requires
            raise ConfigError("task.metrics", f"'{name}' needs {module}", fix=f"pip install 'mirrortune[{extra}]'")
        if metric.binary and num_classes not in (None, 2):
            raise ConfigError(
                "task.metrics", f"'{name}' needs two classes, got {num_classes}", allowed="f1_macro, f1_micro, accuracy"
            )
    if selection not in (None, *names):
        # The logged loss depends on smoothing and weights of classes, so it is not a metric.
        fix = "Use log_loss, and list it in task.metrics" if selection == "loss" and "log_loss" in fitting else None
        problem = f"'{selection}' is not computed" if selection != "loss" else "the loss is only logged"
        raise ConfigError("task.selection_metric", problem, allowed=", ".join(names), fix=fix)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The metrics named in a recipe.

    Attributes:
        metrics: names of the metrics; None for the defaults of the kind of task.
        selection_metric: metric that selects the best checkpoint; None for the first one.
    """

    metrics: tuple[str, ...] | None = None
    selection_metric: str | None = None

    def fields(self, own: tuple[str, ...], target: str, num_classes: int | None = None) -> dict[str, Any]:
        """Return the fields ``metric_names`` and ``selection_metric`` of a task.

        ``own`` are the default metrics of its kind; see :func:`check_metrics` for the other arguments and the errors.
        """
        names = self.metrics or own
        check_metrics(names, target, num_classes, self.selection_metric)
        return {"metric_names": names, "selection_metric": self.selection_metric or names[0]}


KINDS_OWN = Scores()
"""The defaults of the kind of task."""


def score(
    names: Sequence[str], predictions: Any, references: Any, probabilities: Callable[[], Array | None] = lambda: None
) -> dict[str, float]:
    """Compute metrics of ``predictions`` against ``references``; both have one entry per row.

    Args:
        names: names of the metrics.
        predictions: as the type of target requires; see :class:`Metric`.
        references: as for ``predictions``.
        probabilities: returns the probability of each class (N, C), or None if the kind of task has none; called only
            if a metric needs them.

    Raises:
        ConfigError: a metric needs probabilities, but there are none.
    """
    found: dict[str, float] = {}
    for name in names:
        given = probabilities() if METRICS[name].takes_probabilities else predictions
        if given is None:
            raise ConfigError("task.metrics", f"'{name}' needs probabilities, which this kind of task does not have")
        is_broken = METRICS[name].takes_probabilities and not np.isfinite(given).all()
        found[name] = math.nan if is_broken else METRICS[name].compute(given, references)
    return found
