# SPDX-License-Identifier: Apache-2.0
"""Metrics on recorded predictions against the libraries and scripts that the field quotes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sacrebleu
import scipy.stats
import seqeval.metrics
import sklearn.metrics
from rouge_score.rouge_scorer import RougeScorer

from mirrortune.config.recipe import read_recipe, resolve
from mirrortune.tasks.metrics import METRICS, score

# Predictions and references of 16 rows: two classes, three classes, numbers.
TWO = np.array([[1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 0, 1, 0, 0, 1, 1], [1, 0, 0, 1, 0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 1, 1]])
THREE = np.array([[0, 2, 1, 1, 0, 2, 1, 0, 2, 1, 0, 1, 2, 0, 1, 1], [0, 2, 0, 1, 0, 1, 1, 0, 2, 2, 0, 1, 2, 1, 1, 0]])
NUMBERS = np.array(
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
    "pearson": (NUMBERS, scipy.stats.pearsonr(*NUMBERS).statistic),
    "spearmanr": (NUMBERS, scipy.stats.spearmanr(*NUMBERS).statistic),
    "mse": (NUMBERS, sklearn.metrics.mean_squared_error(NUMBERS[1], NUMBERS[0])),
    "mae": (NUMBERS, sklearn.metrics.mean_absolute_error(NUMBERS[1], NUMBERS[0])),
    "rmse": (NUMBERS, sklearn.metrics.root_mean_squared_error(NUMBERS[1], NUMBERS[0])),
    "r2": (NUMBERS, sklearn.metrics.r2_score(NUMBERS[1], NUMBERS[0])),
    "balanced_accuracy": (THREE, sklearn.metrics.balanced_accuracy_score(THREE[1], THREE[0])),
    "mcc": (THREE, sklearn.metrics.matthews_corrcoef(THREE[1], THREE[0])),
    "roc_auc": ((ODDS_2, TWO[1]), sklearn.metrics.roc_auc_score(TWO[1], ODDS_2[:, 1])),
    "log_loss": ((ODDS_2, TWO[1]), sklearn.metrics.log_loss(TWO[1], ODDS_2)),
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
    predictions, references = NUMBERS if task == "stsb" else THREE if task == "mnli" else TWO

    found = score(names, predictions, references)

    assert list(found) == GLUE_KEYS[task]
    assert found == pytest.approx({key: GLUE[key](predictions, references) for key in GLUE_KEYS[task]}, rel=1e-6)
