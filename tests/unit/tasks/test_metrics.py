# SPDX-License-Identifier: Apache-2.0
"""Metrics against numbers worked out by hand, at their edges, and against reference implementations."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import sacrebleu
import scipy.stats
import seqeval.metrics
import sklearn.metrics
from rouge_score.rouge_scorer import RougeScorer

from mirrortune.config.recipe import read_recipe, resolve
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


@pytest.mark.parametrize("name", ["pearson", "r2"])
def test_scores_of_numbers_are_computed_in_float64(name: str) -> None:
    """In float32, an offset of the targets takes the last digits of their variance."""
    noise = np.random.default_rng(0).normal(size=(2, 500))
    references = (1e4 + noise[0]).astype(np.float32)
    predictions = (1e4 + noise[0] + noise[1]).astype(np.float32)
    expected = METRICS[name].compute(predictions.astype(np.float64), references.astype(np.float64))
    assert METRICS[name].compute(predictions, references) == expected


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
        (["rougeL"], "written", None, None, "'rougeL' does not score generated answers. Allowed: exact_match"),
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


# Predictions and references of 16 rows: two classes, three classes, numbers.
TWO = np.array([[1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 0, 1, 0, 0, 1, 1], [1, 0, 0, 1, 0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 1, 1]])
THREE = np.array([[0, 2, 1, 1, 0, 2, 1, 0, 2, 1, 0, 1, 2, 0, 1, 1], [0, 2, 0, 1, 0, 1, 1, 0, 2, 2, 0, 1, 2, 1, 1, 0]])
RECORDED = np.array(
    [[3.2, 1.1, 4.7, 0.2, 2.9, 3.3, 4.1, 1.8, 0.9, 2.2, 3.8, 4.4, 1.2, 0.4, 2.7, 3.1],
     [3.0, 1.4, 5.0, 0.0, 2.5, 3.8, 4.2, 2.0, 0.6, 2.2, 3.2, 4.8, 1.0, 1.0, 3.0, 2.8]], np.float32
)  # fmt: skip
LABELS = (
    np.array([[1, 0, 1], [0, 0, 1], [1, 1, 0], [0, 0, 0]]),
    np.array([[1, 0, 0], [0, 1, 1], [1, 1, 0], [0, 0, 0]]),
)
TAGS = (
    [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG", "I-ORG"], ["B-LOC", "O", "I-LOC"]],
    [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG", "O"], ["B-LOC", "O", "O"]],
)
# Probabilities of 16 rows for two classes, for three, and of three labels that a row may have together.
_DRAWN = np.random.default_rng(5)
ODDS_2 = _DRAWN.dirichlet([1, 1], 16)
ODDS_3 = _DRAWN.dirichlet([1, 1, 1], 16)
ODDS_LABELS = _DRAWN.random((4, 3))
# Similarities of 40 texts to 40 others; that of the right one, on the diagonal, is raised.
COSINES = _DRAWN.random((40, 40)) + 0.5 * np.eye(40)
RANKS = (np.diag(COSINES)[:, None] <= COSINES).sum(axis=1)
RANKED = (np.zeros(40), RANKS)
TEXTS = (
    ["a cat sat on the mat.", "The film runs for two hours", "there is no summary here"],
    ["the cat sat on the mat.", "the film ran for almost two hours", "nothing of it is the same"],
)
ANSWERS = [
    ("Denver Broncos", ["Denver Broncos", "Broncos"]), ("the Denver Broncos!", ["Denver Broncos"]),
    ("Broncos", ["Denver Broncos", "The Denver Broncos"]), ("1066", ["1066", "in 1066"]),
    ("in the year 1066", ["1066", "in 1066"]), ("", []), ("the", ["a"]),
    ("golden anniversary of the Super Bowl", ['"golden anniversary"', "gold-themed"]), ("", ["the", "film"]),
    ("Santa Clara, California", ["Santa Clara", "Levi's Stadium"]), ("don't know", []), ("a a b", ["b a"]),
]  # fmt: skip
# What the official script of SQuAD 2.0 says of ANSWERS, and that of SQuAD 1.1 of the rows that its data could have.
SQUAD_2, SQUAD_1 = (50.0, 73.65079365079366), (50.0, 85.47619047619047)
WITH_ANSWERS = [0, 1, 2, 3, 4, 7, 9, 11]
# GLUE's keys and what huggingface/evaluate's metrics/glue computes under them.
GLUE: dict[str, Any] = {
    "accuracy": lambda p, r: (p == r).mean(),
    "f1": lambda p, r: sklearn.metrics.f1_score(y_true=r, y_pred=p),
    "matthews_correlation": lambda p, r: sklearn.metrics.matthews_corrcoef(r, p),
    "pearson": lambda p, r: scipy.stats.pearsonr(p, r)[0],
    "spearmanr": lambda p, r: scipy.stats.spearmanr(p, r)[0],
}
GLUE_KEYS = {
    "cola": ["matthews_correlation"], "sst2": ["accuracy"], "mrpc": ["accuracy", "f1"], "qqp": ["accuracy", "f1"],
    "stsb": ["pearson", "spearmanr"], "mnli": ["accuracy"], "qnli": ["accuracy"], "rte": ["accuracy"],
    "wnli": ["accuracy"],
}  # fmt: skip


def rouge(name: str) -> float:
    """The mean F-measure, with the stemmer that summarisation papers use."""
    scorer = RougeScorer([name], use_stemmer=True)
    return float(np.mean([scorer.score(r, p)[name].fmeasure for p, r in zip(*TEXTS, strict=True)]))


REFERENCES: dict[str, tuple[Any, float]] = {
    "accuracy": (THREE, sklearn.metrics.accuracy_score(THREE[1], THREE[0])),
    "f1": (TWO, sklearn.metrics.f1_score(TWO[1], TWO[0])),
    "f1_macro": (THREE, sklearn.metrics.f1_score(THREE[1], THREE[0], average="macro")),
    "f1_micro": (LABELS, sklearn.metrics.f1_score(LABELS[1], LABELS[0], average="micro")),
    "subset_accuracy": (LABELS, sklearn.metrics.accuracy_score(LABELS[1], LABELS[0])),
    "matthews_correlation": (TWO, sklearn.metrics.matthews_corrcoef(TWO[1], TWO[0])),
    "pearson": (RECORDED, scipy.stats.pearsonr(*RECORDED).statistic),
    "spearmanr": (RECORDED, scipy.stats.spearmanr(*RECORDED).statistic),
    "mse": (RECORDED, sklearn.metrics.mean_squared_error(RECORDED[1], RECORDED[0])),
    "mae": (RECORDED, sklearn.metrics.mean_absolute_error(RECORDED[1], RECORDED[0])),
    "rmse": (RECORDED, sklearn.metrics.root_mean_squared_error(RECORDED[1], RECORDED[0])),
    "r2": (RECORDED, sklearn.metrics.r2_score(RECORDED[1], RECORDED[0])),
    "balanced_accuracy": (THREE, sklearn.metrics.balanced_accuracy_score(THREE[1], THREE[0])),
    "mcc": (THREE, sklearn.metrics.matthews_corrcoef(THREE[1], THREE[0])),
    "roc_auc": ((ODDS_2, TWO[1]), sklearn.metrics.roc_auc_score(TWO[1], ODDS_2[:, 1])),
    "log_loss": ((ODDS_2, TWO[1]), sklearn.metrics.log_loss(TWO[1], ODDS_2)),
    "recall_at_1": (RANKED, sklearn.metrics.top_k_accuracy_score(range(40), COSINES, k=1)),
    "recall_at_10": (RANKED, sklearn.metrics.top_k_accuracy_score(range(40), COSINES, k=10)),
    "mrr_at_10": (RANKED, sum(1 / rank for rank in RANKS if rank <= 10) / 40),
    "ndcg_at_10": (RANKED, sklearn.metrics.ndcg_score(np.eye(40), COSINES, k=10)),
    "entity_f1": (TAGS, seqeval.metrics.f1_score(TAGS[1], TAGS[0])),
    "entity_precision": (TAGS, seqeval.metrics.precision_score(TAGS[1], TAGS[0])),
    "entity_recall": (TAGS, seqeval.metrics.recall_score(TAGS[1], TAGS[0])),
    "tag_accuracy": (TAGS, seqeval.metrics.accuracy_score(TAGS[1], TAGS[0])),
    "exact_match": (tuple(zip(*ANSWERS, strict=True)), SQUAD_2[0] / 100),
    "squad_f1": (tuple(zip(*ANSWERS, strict=True)), SQUAD_2[1] / 100),
    "rouge1": (TEXTS, rouge("rouge1")),
    "rouge2": (TEXTS, rouge("rouge2")),
    "rougeL": (TEXTS, rouge("rougeL")),
    "rougeLsum": (TEXTS, rouge("rougeLsum")),
    "bleu": (TEXTS, sacrebleu.corpus_bleu(TEXTS[0], [TEXTS[1]]).score),
    "chrf": (TEXTS, sacrebleu.corpus_chrf(TEXTS[0], [TEXTS[1]]).score),
}


@pytest.mark.parametrize("name", [n for n in METRICS if n not in ("perplexity", "token_accuracy")])
def test_a_metric_is_its_librarys(name: str) -> None:
    (predictions, references), expected = REFERENCES[name]

    found = score([name], predictions, references, lambda: predictions)[name]

    assert found == pytest.approx(expected, rel=1e-6)
    assert 0 < found < {"bleu": 100, "chrf": 100, "log_loss": 2}.get(name, 1), "neither the best nor the worst"


def test_probabilities_of_several_classes_and_labels() -> None:
    auc, log_loss = sklearn.metrics.roc_auc_score, sklearn.metrics.log_loss
    three, several = THREE[1], LABELS[1]

    assert score(["roc_auc", "log_loss"], THREE[0], three, lambda: ODDS_3) == pytest.approx(
        {"roc_auc": auc(three, ODDS_3, multi_class="ovr"), "log_loss": log_loss(three, ODDS_3)}
    )
    assert score(["roc_auc"], LABELS[0], several, lambda: ODDS_LABELS)["roc_auc"] == pytest.approx(
        auc(several, ODDS_LABELS, average="macro")
    )


def test_answers_of_squad_1_are_scored_as_its_own_script_scores_them() -> None:
    said, right = zip(*(ANSWERS[i] for i in WITH_ANSWERS), strict=True)

    found = score(["exact_match", "squad_f1"], said, right)

    assert found == pytest.approx({"exact_match": SQUAD_1[0] / 100, "squad_f1": SQUAD_1[1] / 100})


@pytest.mark.parametrize("task", GLUE_KEYS)
def test_glues_keys_and_numbers(task: str) -> None:
    names = resolve([read_recipe(f"glue/{task}")]).recipe.task.metrics
    assert names is not None
    predictions, references = RECORDED if task == "stsb" else THREE if task == "mnli" else TWO

    found = score(names, predictions, references)

    assert list(found) == GLUE_KEYS[task]
    assert found == pytest.approx({key: GLUE[key](predictions, references) for key in GLUE_KEYS[task]}, rel=1e-6)


def test_nearly_constant_values_raise_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = METRICS["pearson"].compute(np.array([1.0, 1.0 + 1e-15, 1.0]), np.array([1.0, 2.0, 3.0]))
    assert -1 <= found <= 1


@pytest.mark.parametrize("kind", ["two", "several", "labels"])
def test_the_area_by_pairs_is_that_under_the_curve(kind: str) -> None:
    random, metric = np.random.default_rng(0), METRICS["roc_auc"]
    classes = 2 if kind == "two" else 5
    odds = random.integers(12, size=(60, classes)) / 12  # with ties
    truth = random.integers(2, size=odds.shape) if kind == "labels" else random.integers(classes - 1, size=60)
    truth[:3] += kind == "two"
    assert metric.fast is not None
    assert metric.fast(odds, truth) == pytest.approx(metric.compute(odds, truth), abs=1e-12)
    assert metric.fast(odds, np.zeros_like(truth)) == metric.compute(odds, np.zeros_like(truth)) == 0.5


@pytest.mark.parametrize(
    "name", ["f1", "f1_macro", "f1_micro", "balanced_accuracy", "matthews_correlation", "mcc", "ndcg_at_10"]
)
def test_fast_values_are_those_of_scikit_learn(name: str) -> None:
    random, metric = np.random.default_rng(0), METRICS[name]
    cases = [(random.integers(k, size=n), random.integers(k - (k > 2), size=n)) for k in (2, 6) for n in (1, 2, 3, 70)]
    cases += [(np.full(5, own), np.full(5, true)) for own in (0, 1) for true in (0, 1)]
    if metric.binary:
        cases = [(own, true) for own, true in cases if max(own.max(), true.max()) < 2]
    if "labels" in metric.targets:
        cases += [(random.integers(2, size=(n, 4)), random.integers(2, size=(n, 4)) * [1, 1, 1, 0]) for n in (1, 2, 50)]
        cases.append((np.zeros((3, 2), int), np.zeros((3, 2), int)))
    if "rank" in metric.targets:
        cases = [(ranks, ranks) for ranks in (np.arange(1, 15), np.array([11]), np.array([1]))]
    assert metric.fast is not None
    for own, true in cases:
        assert metric.fast(own, true) == pytest.approx(metric.compute(own, true), abs=1e-12), (own, true)


def test_the_log_loss_by_row_is_that_of_scikit_learn() -> None:
    random, metric = np.random.default_rng(0), METRICS["log_loss"]
    odds, truth = random.dirichlet([1.0] * 4, size=50), random.integers(4, size=50)
    odds[0] = np.eye(4)[(truth[0] + 1) % 4]  # certain, and wrong
    assert metric.fast is not None
    assert metric.fast(odds, truth) == pytest.approx(metric.compute(odds, truth), abs=1e-12)


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.by_row is not None])
def test_values_of_rows_are_those_of_all(name: str) -> None:
    metric = METRICS[name]
    if "tags" in metric.targets:
        given = [["B-A", "I-A", "O", "B-B"], ["O", "O"], ["B-A"], ["I-B", "B-A"]]
        right = [["B-A", "I-A", "O", "B-A"], ["O", "B-B"], ["B-A"], ["B-B", "B-A"]]
    else:
        given = ["the red fox", "a dog", "", "cats"]
        right = ["a red fox ran", "two dogs", "none", "cats"]
    references = [[text] for text in right] if "answers" in metric.targets else right
    assert metric.by_row is not None
    numbers = metric.by_row(given, references)
    assert len(numbers) == 4
    assert metric.of_rows(numbers) == pytest.approx(metric.compute(given, references), abs=1e-12)
    assert 0 < metric.of_rows(numbers) < 1
    rows = [1, 1, 3]
    again = metric.compute([given[row] for row in rows], [references[row] for row in rows])
    assert metric.of_rows(numbers[rows]) == pytest.approx(again, abs=1e-12)


def test_rows_without_entities_have_a_value() -> None:
    metric = METRICS["entity_f1"]
    assert metric.by_row is not None
    assert metric.of_rows(metric.by_row([["O"], []], [["O"], []])) == 0.0
