# SPDX-License-Identifier: Apache-2.0
"""sentence-similarity: which columns are pairs, and its losses and ranks against plain loops."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.metrics import ndcg_score
from torch import Tensor

from mirrortune.data.dataset import Split
from mirrortune.data.tokenize import Reading
from mirrortune.errors import ConfigError, DataError
from mirrortune.models.pooling import SentenceModules
from mirrortune.runs.prepare import show_rows
from mirrortune.tasks.base import task_class, task_from_dict, task_to_dict, with_label_columns
from mirrortune.tasks.kinds.sentence_similarity import EmbeddingReader
from mirrortune.tasks.metrics import Scores, score
from mirrortune.tasks.predicting import PredictOptions

KIND = task_class("sentence-similarity")
MEAN = SentenceModules(
    modes=("mean",), is_normalised=False, max_length=None, lowercase=False, prompt="", files={}, notes=()
)
PAIRS = {"sentence1": ["good", "a film", "dull"], "sentence2": ["fun", "the movie", "long plot"]}


def made(tokenizer: Any, columns: dict[str, Any], modules: SentenceModules = MEAN, **reading: Any) -> tuple[Any, Any]:
    """The task of some columns and its examples."""
    table = pa.table(columns)
    task, _ = KIND.from_rows(table, "rows")
    reader = EmbeddingReader(tokenizer=tokenizer, modules=modules)
    return task, task.encode(Split(table=table, source="rows"), reader, Reading(max_length=16, **reading))


def embedded(vectors: Tensor) -> Any:
    """Outputs of a model for texts of one token each, whose embeddings are ``vectors`` (B * T, D)."""
    return SimpleNamespace(last_hidden_state=vectors[:, None])


def inputs(vectors: Tensor) -> dict[str, Tensor]:
    """Inputs of these texts."""
    return {"attention_mask": torch.ones(len(vectors), 1, dtype=torch.long)}


@pytest.mark.parametrize(
    ("columns", "text", "label"),
    [
        ({**PAIRS, "score": [0.5, 1.0, 0.0]}, ("sentence1", "sentence2"), "score"),
        ({**PAIRS, "label": [5, 1, 0]}, ("sentence1", "sentence2"), "label"),
        ({**PAIRS, "label": ["x", "y", "x"]}, ("sentence1", "sentence2"), None),
        (PAIRS, ("sentence1", "sentence2"), None),
        ({"Query": ["a"], "positive": ["b"], "negative_2": ["d"], "negative_1": ["c"]},
         ("Query", "positive", "negative_2", "negative_1"), None),
        ({"anchor": ["a"], "positive": ["b"], "score": [1.0]}, ("anchor", "positive"), None),
        ({"question": ["a"], "answer": ["b"]}, ("question", "answer"), None),
    ],
)  # fmt: skip
def test_pairs_are_found_by_their_names(columns: dict[str, Any], text: tuple[str, ...], label: str | None) -> None:
    task, notes = KIND.from_rows(pa.table(columns), "rows")
    assert isinstance(task, KIND)
    assert (task.text_columns, task.label_column) == (text, label)
    assert task.selection_metric == ("spearmanr" if label else "ndcg_at_10")
    assert any("no score: learning which" in note for note in notes) == (label is None)
    assert task_from_dict(json.loads(json.dumps(task_to_dict(task)))) == task


@pytest.mark.parametrize(
    ("columns", "settings"),
    [
        ({"text": ["a"], "label": [1]}, {}),
        ({"a": ["x"], "b": ["y"]}, {"text_columns": ("a",)}),
        ({"a": ["x"], "b": ["y"], "c": ["z"], "s": [1]}, {"text_columns": ("a", "b", "c"), "label_column": "s"}),
    ],
)
def test_rows_that_are_no_pairs_are_refused(columns: dict[str, Any], settings: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="no columns of pairs of texts"):
        KIND.from_rows(pa.table(columns), "rows", **settings)


def test_metrics_are_those_of_the_rows() -> None:
    with pytest.raises(ConfigError, match=r"'spearmanr' does not score ranks\. Allowed: recall_at_1"):
        KIND.from_rows(pa.table(PAIRS), "rows", Scores(metrics=("spearmanr",)))


def test_the_texts_of_a_row_follow_each_other(tokenizer: Any) -> None:
    task, examples = made(tokenizer, {**PAIRS, "score": [0.5, 1.0, 0.0]})
    batch = examples.batch(np.array([2, 0]))
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in batch["input_ids"]]
    assert texts == ["dull", "long plot", "good", "fun"]
    assert batch["targets"].tolist() == [0.0, 0.5]
    assert examples.lengths.tolist() == [6, 8, 8], "two texts, padded to the longer one"
    assert examples.num_tokens.sum() == sum(map(len, examples.token_ids())) < examples.lengths.sum()
    assert task.columns() == [("text", "sentence1"), ("text", "sentence2"), ("label", "score")]
    assert examples.describe() == "3 rows of 2 texts: 3 tokens (median), 4 at most"


def test_texts_are_prepared_as_the_folder_says(tokenizer: Any) -> None:
    modules = SentenceModules(
        modes=("mean",), is_normalised=False, max_length=7, lowercase=True, prompt="The ", files={}, notes=()
    )
    reader = EmbeddingReader(tokenizer=tokenizer, modules=modules)
    assert reader.prepared("Film") == "the film"
    task, examples = made(tokenizer, PAIRS, modules)
    assert tokenizer.decode(examples.batch(np.array([0]))["input_ids"][0], skip_special_tokens=True) == "the good"
    config = SimpleNamespace(max_position_embeddings=64)
    assert task.resolve_length(None, reader, config) == 7
    assert task.resolve_length(20, reader, config) == 20


def test_blank_texts_and_missing_scores(tokenizer: Any) -> None:
    columns = {**PAIRS, "sentence2": ["fun", " ", "x"], "score": [1.0, 0.0, None]}
    with pytest.raises(DataError, match=r"1 of 3 rows have no score in column 'score' \(row 3\)"):
        made(tokenizer, columns)
    _, examples = made(tokenizer, columns, drop_blank=True, allow_missing=True)
    assert (len(examples), examples.num_dropped, examples.num_unlabelled) == (2, 1, 1)
    task, _ = KIND.from_rows(pa.table({**PAIRS, "score": [1.0, 0.0, 0.5]}), "rows")
    written = Split(table=pa.table({**PAIRS, "score": ["high", "1", "2"]}), source="rows")
    with pytest.raises(DataError, match=r"row 1: score 'high' in column 'score' is not a number"):
        task.strata(written)


def test_cosent_sums_over_pairs_in_order(tokenizer: Any) -> None:
    scores = [0.5, 1.0, 0.5, 0.0]
    task, examples = made(tokenizer, {"text1": list("abcd"), "text2": list("efgh"), "score": scores})
    vectors = torch.randn(8, 5, requires_grad=True)
    cosines = torch.cosine_similarity(vectors[::2], vectors[1::2]).detach()
    terms = [20 * float(cosines[j] - cosines[i]) for i in range(4) for j in range(4) if scores[i] > scores[j]]
    expected = math.log(1 + sum(map(math.exp, terms)))
    targets = examples.batch(np.arange(4))["targets"]
    loss, items = task.loss(inputs(vectors), embedded(vectors), targets)
    assert (float(loss.detach()) / items, items) == (pytest.approx(expected, rel=1e-5), 4)
    loss.backward()
    assert vectors.grad is not None
    assert torch.isfinite(vectors.grad).all()
    judged = list(task.judge(None, inputs(vectors), embedded(vectors.detach()), targets))
    assert task.loss_of_split(judged, examples) == pytest.approx(expected, rel=1e-5)
    predictions, references = task.answers(judged, examples)
    np.testing.assert_allclose(predictions, cosines, rtol=1e-5)
    assert references.tolist() == scores


def ranking_loss(vectors: Tensor, left_out: dict[int, set[int]]) -> float:
    """The mean loss of anchors among all texts (row by row), but for those that are left out of each."""
    unit = torch.nn.functional.normalize(vectors, dim=-1).double()
    anchors, others = unit[:, 0], unit[:, 1:].flatten(0, 1)
    total, per_row = 0.0, vectors.shape[1] - 1
    for row, anchor in enumerate(anchors):
        own = row * per_row
        logits = [20 * float(anchor @ o) for i, o in enumerate(others) if i not in left_out.get(row, ()) or i == own]
        total += math.log(sum(map(math.exp, logits))) - 20 * float(anchor @ others[own])
    return total / len(anchors)


def test_negatives_are_all_texts_that_do_not_belong_to_the_anchor(tokenizer: Any) -> None:
    columns = {
        "anchor": ["good", "bad", "good", "dull"], "positive": ["fun", "awful", "lovely", "bad"],
        "negative": ["dull", "fun", None, "long"],
    }  # fmt: skip
    task, examples = made(tokenizer, columns)
    vectors = torch.randn(4, 3, 5)
    flat = vectors.flatten(0, 1)
    # texts: 0 fun, 1 dull, 2 awful, 3 fun, 4 lovely, 5 -, 6 bad, 7 long
    left_out = {0: {3, 4, 5}, 1: {5, 6}, 2: {0, 5}, 3: {1, 5}}
    loss, items = task.loss(inputs(flat), embedded(flat), examples.batch(np.arange(4))["targets"])
    assert float(loss) / items == pytest.approx(ranking_loss(vectors, left_out), rel=1e-5)


def test_equal_batches_give_the_loss_of_sentence_transformers(tokenizer: Any) -> None:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    vectors = torch.randn(6, 5)
    task, examples = made(tokenizer, {"anchor": list("abc"), "positive": list("xyz")})
    loss, items = task.loss(inputs(vectors), embedded(vectors), examples.batch(np.arange(3))["targets"])
    theirs = losses.MultipleNegativesRankingLoss(None).compute_loss_from_embeddings([vectors[::2], vectors[1::2]], None)
    assert float(loss) / items == pytest.approx(float(theirs), rel=1e-5)
    scores = torch.tensor([0.5, 1.0, 0.25])
    task, examples = made(tokenizer, {**PAIRS, "score": scores.tolist()})
    loss, items = task.loss(inputs(vectors), embedded(vectors), scores)
    theirs = losses.CoSENTLoss(None).compute_loss_from_embeddings([vectors[::2], vectors[1::2]], scores)
    assert float(loss) / items == pytest.approx(float(theirs), rel=1e-5)


def test_a_text_is_ranked_among_all_of_the_split(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 40
    anchors = [f"anchor {i % 35}" for i in range(count)]  # five have two texts
    positives = [f"text {i % 38}" for i in range(count)]  # two texts belong to two anchors
    task, examples = made(tokenizer, {"anchor": anchors, "positive": positives})
    judged = list(np.random.default_rng(0).normal(size=(count, 2, 6)).astype(np.float32))
    for row in (38, 39):
        judged[row][1] = judged[row - 38][1]
    whole = task.answers(judged, examples), task.loss_of_split(judged, examples)
    monkeypatch.setattr("mirrortune.tasks.kinds.sentence_similarity._BLOCK", 100)
    cosines, ranks = task.answers(judged, examples)
    np.testing.assert_array_equal(ranks, whole[0][1])
    assert task.loss_of_split(judged, examples) == pytest.approx(whole[1])
    unit = np.stack(judged) / np.linalg.norm(np.stack(judged), axis=-1, keepdims=True)
    table, expected = unit[:38, 1], np.zeros(count)
    truth, scores = np.zeros((count, 38)), unit[:, 0] @ table.T
    for row in range(count):
        others = {i % 38 for i in range(count) if anchors[i] == anchors[row]} - {row % 38}
        scores[row, list(others)] = -2
        truth[row, row % 38] = 1
        expected[row] = 1 + sum(scores[row] > scores[row, row % 38])
    assert ranks.tolist() == expected.tolist()
    np.testing.assert_allclose(cosines, (unit[:, 0] * unit[:, 1]).sum(axis=-1), rtol=1e-5)
    found = score(("ndcg_at_10", "recall_at_1", "recall_at_10", "mrr_at_10"), cosines, ranks)
    assert found["ndcg_at_10"] == pytest.approx(ndcg_score(truth, scores, k=10))
    assert found["recall_at_10"] == pytest.approx(np.mean(expected <= 10))


def test_equal_and_broken_embeddings_rank_last(tokenizer: Any) -> None:
    task, examples = made(tokenizer, {"anchor": list("abc"), "positive": list("xyz")})
    assert task.answers([np.ones((2, 4), np.float32)] * 3, examples)[1].tolist() == [3, 3, 3]
    assert task.answers([np.full((2, 4), np.nan, np.float32)] * 3, examples)[1].min() >= 3


def test_predictions_are_embeddings(tokenizer: Any) -> None:
    whole, _ = KIND.from_rows(pa.table({**PAIRS, "score": [0.5, 1.0, 0.0]}), "rows")
    reader = EmbeddingReader(tokenizer=tokenizer, modules=MEAN)
    for columns, num_texts in ((PAIRS, 2), ({"sentence1": ["good", "a"]}, 1), ({"sentence2": ["good"]}, 1)):
        split, task = Split(table=pa.table(columns), source="rows"), whole.narrowed(columns)
        examples = task.encode_to_predict(split, reader, Reading(max_length=16), PredictOptions())
        batch = examples.batch(np.arange(len(examples)))
        vectors = torch.randn(*batch["input_ids"].shape, 4)
        judged = list(task.judge(None, batch, SimpleNamespace(last_hidden_state=vectors), batch["targets"]))
        found = task.prediction_columns(judged, examples, split, PredictOptions())
        if num_texts == 1:
            assert list(found) == ["prediction"]
            np.testing.assert_allclose(found["prediction"], np.stack(judged)[:, 0], rtol=1e-6)
        else:
            assert list(found) == ["prediction", "embedding_1", "embedding_2"]
            first, second = (np.array(found[name][0]) for name in ("embedding_1", "embedding_2"))
            cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
            assert found["prediction"][0] == pytest.approx(cosine, abs=1e-6)


def test_rows_without_a_score_are_answered(tokenizer: Any) -> None:
    task, _ = KIND.from_rows(pa.table({**PAIRS, "score": [0.5, 1.0, 0.0]}), "rows")
    hidden = with_label_columns(Split(table=pa.table(PAIRS), source="hidden"), task)
    reader = EmbeddingReader(tokenizer=tokenizer, modules=MEAN)
    assert task.encode(hidden, reader, Reading(max_length=16, allow_missing=True)).num_unlabelled == 3


def test_the_hardest_rows_stand_where_they_should_not(tokenizer: Any) -> None:
    ranking, _ = KIND.from_rows(pa.table(PAIRS), "rows")
    assert ranking.difficulty(np.array([0.9, 0.1]), np.array([3, 1])).tolist() == [3.0, 1.0]
    scored, examples = made(tokenizer, {**PAIRS, "score": [5.0, 1.0, 0.0]})
    assert scored.difficulty(np.array([0.9, 0.2, 0.1]), examples.targets).tolist() == [0.0, 0.0, 0.0]
    assert scored.difficulty(np.array([0.1, 0.2, 0.9]), examples.targets).argmin() == 1
    text = tokenizer.decode(examples.input_ids(1), skip_special_tokens=True)
    assert text == "a film the movie"


def test_all_texts_of_a_row_are_shown(tokenizer: Any) -> None:
    task, examples = made(tokenizer, {"anchor": ["good"], "positive": ["fun"], "negative": ["dull film"]})
    lines = list(show_rows(examples, task, tokenizer, 1))
    assert [line.strip() for line in lines if "text:" in line] == [
        "text: [CLS] good [SEP] [PAD] (text 1)", "text: [CLS] fun [SEP] [PAD] (text 2)",
        "text: [CLS] dull film [SEP] (text 3)",
    ]  # fmt: skip
    assert not any("learned" in line or "labels" in line for line in lines)


VERDICTS = ["entailment", "neutral", "contradiction"]
CLASSES = {"info": {"features": {"label": {"names": VERDICTS, "_type": "ClassLabel"}}}}


@pytest.mark.parametrize(
    "table",
    [
        pa.table({**PAIRS, "label": VERDICTS}),
        # Their indices are no scores: an entailment would have the lowest.
        pa.table({**PAIRS, "label": [0, 1, 2]}).replace_schema_metadata({"huggingface": json.dumps(CLASSES)}),
    ],
)
def test_pairs_that_contradict_each_other_are_warned_of(table: pa.Table) -> None:
    task, notes = KIND.from_rows(table, "rows")
    _, of_others = KIND.from_rows(pa.table({**PAIRS, "label": ["x", "y", "x"]}), "rows")

    assert task.label_column is None
    assert [note for note in notes if note.startswith("warning: column 'label' marks rows of contradiction, which are")]
    assert not [note for note in of_others if note.startswith("warning")]


@pytest.mark.parametrize("scores", [[[0.1, 0.2]] * 3, [{"a": 1}] * 3, [None] * 3])
def test_a_column_of_lists_is_no_score_and_no_verdict(scores: list[Any]) -> None:
    task, _ = KIND.from_rows(pa.table({**PAIRS, "score": scores}), "rows")
    assert task.label_column is None


@pytest.mark.parametrize("name", ["score", "Similarity", "is_duplicate"])
@pytest.mark.parametrize("values", [["4,2", "0,4", "3"], ["90%", "5%", "10%"], ["yes", "no", "yes"]])
def test_scores_that_are_no_numbers_are_refused_and_not_left_out(name: str, values: list[Any]) -> None:
    table = pa.table({**PAIRS, name: values})
    task, _ = KIND.from_rows(table, "rows")
    assert task.label_column == name
    with pytest.raises(DataError, match=rf"row 1: score .* in column '{name}' is not a number"):
        task.strata(Split(table=table, source="rows"))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("is_duplicate", [True, False, True]),
        ("is_duplicate", ["True", "False", "TRUE"]),
        ("label", [True, False, True]),
    ],
)
def test_true_and_false_are_scores(name: str, values: list[Any]) -> None:
    table = pa.table({**PAIRS, name: values})
    task, _ = KIND.from_rows(table, "rows")
    assert task._targets(Split(table=table, source="rows"), allow_missing=False).tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("columns", [{"score": [1, 1, 1]}, {"sentence2": ["fun", "fun", "fun"]}])
def test_rows_without_anything_to_compare_are_remarked_on(columns: dict[str, Any]) -> None:
    _, notes = KIND.from_rows(pa.table({**PAIRS, **columns}), "rows")
    _, of_others = KIND.from_rows(pa.table(PAIRS), "rows")

    assert [note for note in notes if note.endswith("has the same value in every row: there is nothing to learn")]
    assert not [note for note in of_others if note.startswith("warning")]
