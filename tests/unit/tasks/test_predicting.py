# SPDX-License-Identifier: Apache-2.0
"""Predictions as columns: for every kind those of an evaluation, without targets, and with what users ask for."""

from __future__ import annotations

import functools
import json
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from seqeval.metrics.sequence_labeling import get_entities
from torch import nn

from mirrortune.data.dataset import Split
from mirrortune.data.tokenize import Reading
from mirrortune.errors import ConfigError, DataError, VerificationError
from mirrortune.tasks.base import Task, task_class
from mirrortune.tasks.kinds.seq2seq import PairReader
from mirrortune.tasks.kinds.token_classification import entities_of
from mirrortune.tasks.predicting import PredictOptions, best_answers, plain_numbers
from mirrortune.training.evaluate import EvalResult, evaluate_split, judge_split
from tests.tiny_models import tiny_chat_tokenizer, tiny_tokenizer
from tests.tiny_runs import make_accelerator

TEXTS = ["a good film", "it was a dull and very boring plot", "the cast", "not so bad , but not so good", "fun"]
CONTEXTS = ["the old film was good , but the new movie was very very awful and so dull", "a plot", "a loud cast"]
TABLES: dict[str, dict[str, list[Any]]] = {
    "text-classification": {"text": TEXTS, "label": ["b", "a", "c", "a", "b"]},
    "several labels": {"text": TEXTS, "label": [["b"], ["a", "c"], [], ["a"], ["c", "b"]]},
    "regression": {"text": TEXTS, "score": [0.5, 2, 1, 3, 4]},
    "token-classification": {
        "tokens": [text.split() for text in TEXTS],
        "tags": [[["O", "B-X", "I-X", "B-Y", "I-Y"][i % 5] for i in range(len(t.split()))] for t in TEXTS],
    },
    "question-answering": {
        "question": ["was it good ?"] * 3,
        "context": CONTEXTS,
        "answers": [
            {"text": ["very"], "answer_start": [46]},
            {"text": [], "answer_start": []},
            {"text": ["loud"], "answer_start": [2]},
        ],
    },
    "multiple-choice": {
        "question": TEXTS,
        "choices": [["fun", "dull"], ["a", "the", "it"], ["so", "fun"], ["an", "it"], ["a", "the"]],
        "answer": [0, 2, 1, 0, 1],
    },
    "seq2seq": {"text": TEXTS, "target": ["a", "plot", "film", "so", "good"]},
}
TARGETS = {"question-answering": "answers", "multiple-choice": "answer", "seq2seq": "target", "regression": "score",
           "token-classification": "tags"}  # fmt: skip


def bert(task: Task, **sizes: Any) -> nn.Module:
    """A tiny model for a task, with weights that tell rows apart."""
    fields = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
              "vocab_size": 128, "max_position_embeddings": 64}  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(11)
        config = transformers.BertConfig(**{**fields, **task.config_fields(), **sizes})
        model = getattr(transformers, task.auto_class).from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.4)
    return model.eval()  # type: ignore[no-any-return]


def t5(task: Task) -> nn.Module:
    """A tiny model that writes."""
    sizes = {"vocab_size": 272, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(11)
        config = transformers.T5Config(**sizes, decoder_start_token_id=256, eos_token_id=258, pad_token_id=256)
        model = transformers.T5ForConditionalGeneration(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.4)
    return model.eval()  # type: ignore[no-any-return]


@functools.cache
def case(name: str) -> tuple[Task, Any, nn.Module, pa.Table]:
    """A task, its processor, its model and its rows."""
    kind, table = "text-classification" if name == "several labels" else name, pa.table(TABLES[name])
    named = {"label_column": "score"} if kind == "regression" else {}
    named = {"max_target_length": 6} if kind == "seq2seq" else named
    task = task_class(kind).from_rows(table, "rows", **named)[0]
    if kind != "seq2seq":
        return task, tiny_tokenizer(), bert(task), table
    tokenizer = tiny_chat_tokenizer(None)
    tokenizer.pad_token = "<|end|>"
    return task, PairReader(tokenizer=tokenizer, start_id=256, switches={"use_cache": False}), t5(task), table


def predicted(name: str, table: pa.Table, batch_size: int = 2, **options: Any) -> dict[str, list[Any]]:
    """The predictions of rows."""
    task, processor, model, _ = case(name)
    asked, split = PredictOptions(**options), Split(table=table, source="rows")
    examples = task.encode_to_predict(split, processor, Reading(max_length=32), asked)
    judged = judge_split(model, task, examples, make_accelerator(), batch_size=batch_size)
    columns = task.prediction_columns(judged, examples, split, asked)
    assert {len(values) for values in columns.values()} == {table.num_rows}
    assert next(iter(columns)) == "prediction"
    assert json.loads(json.dumps(columns)) == columns, "not JSON data"
    return columns


def evaluated(name: str) -> EvalResult:
    """The evaluation of the case's rows."""
    task, processor, model, table = case(name)
    examples = task.encode(Split(table=table, source="rows"), processor, Reading(max_length=32))
    return evaluate_split(model, task, examples, make_accelerator(), batch_size=2, source="rows")


def answers_of(name: str) -> list[Any]:
    """The answers of an evaluation in the form of predictions."""
    task, found = case(name)[0], evaluated(name).predictions
    if name == "text-classification":
        return [task.labels[i] for i in found]  # type: ignore[attr-defined]
    if name == "several labels":
        return [[task.labels[i] for i in np.flatnonzero(row)] for row in found]  # type: ignore[attr-defined]
    if name == "token-classification":
        return [[(tag, first, last + 1) for tag, first, last in get_entities(tags)] for tags in found]
    return list(found.tolist() if isinstance(found, np.ndarray) else found)


@pytest.mark.parametrize("name", TABLES)
def test_predictions_are_those_of_an_evaluation_whatever_the_targets(name: str) -> None:
    table, target = case(name)[3], TARGETS.get(name, "label")
    answers = answers_of(name)
    assert len({str(answer) for answer in answers}) > 1, "the model does not tell rows apart"
    nonsense = table.drop_columns([target]).append_column(target, pa.array(["?"] * table.num_rows))
    for rows in (table, table.drop_columns([target]), nonsense):
        columns = predicted(name, rows)
        found = columns["prediction"]
        if name == "token-classification":
            found = [[(span["tag"], span["start"], span["end"]) for span in row] for row in found]
        assert found == (pytest.approx(answers) if name == "regression" else answers)


@pytest.mark.parametrize("name", TABLES)
def test_a_row_is_predicted_the_same_alone_and_in_any_order(name: str) -> None:
    table = case(name)[3]
    together = predicted(name, table)
    alone = [predicted(name, table.slice(row, 1)) for row in range(table.num_rows)]
    for column, values in together.items():
        for row, value in enumerate(values):
            found = alone[row][column][0]
            assert found == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value) or isinstance(
                value, list
            )


def test_the_best_classes_and_their_probabilities() -> None:
    columns = predicted("text-classification", case("text-classification")[3], top=2)
    assert list(columns) == ["prediction", "score", "prediction_2", "score_2"]
    logits = np.stack(evaluated("text-classification").judged).astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert columns["score"] == pytest.approx(shares.max(axis=1).tolist(), rel=1e-5)
    assert columns["score_2"] == pytest.approx(np.sort(shares)[:, -2].tolist(), rel=1e-5)
    most = predicted("text-classification", case("text-classification")[3], top=9)
    assert list(most)[-2:] == ["prediction_3", "score_3"], "there are three classes"
    assert {most[f"prediction{place}"][0] for place in ("", "_2", "_3")} == {"a", "b", "c"}


def test_of_equal_classes_the_first_is_predicted_as_by_argmax() -> None:
    columns = best_answers(np.array([[0.0, 1.0, 1.0]], dtype=np.float32), ["abc"], 2)
    assert (columns["prediction"], columns["prediction_2"]) == (["b"], ["c"])


def test_a_row_may_have_fewer_answers_than_are_asked_for() -> None:
    columns = predicted("multiple-choice", case("multiple-choice")[3], top=3)
    assert [score is None for score in columns["score_3"]] == [True, False, True, True, True]
    assert columns["prediction_3"][0] is None
    sums = [sum(columns[f"score{place}"][row] or 0 for place in ("", "_2", "_3")) for row in range(5)]
    assert sums == pytest.approx([1] * 5)
    endings = case("multiple-choice")[3]["choices"].to_pylist()
    assert columns["choice"] == [own[best] for own, best in zip(endings, columns["prediction"], strict=True)]


def test_a_choice_is_named_as_its_row_names_it() -> None:
    choices = [{"text": ["fun", "dull"], "label": ["A", "B"]}, {"text": ["so", "a", "the"], "label": ["1", "2", "3"]}]
    table = pa.table({"question": TEXTS[:2], "choices": choices})
    rows = zip(predicted("multiple-choice", table)["prediction"], choices, strict=True)
    assert all(found in row["label"] for found, row in rows)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.9])
def test_labels_above_the_threshold_are_predicted(threshold: float) -> None:
    task, _, _, table = case("several labels")
    columns = predicted("several labels", table, threshold=threshold)
    logits = np.stack(evaluated("several labels").judged).astype(np.float64)
    for row, names, scores in zip(logits, columns["prediction"], columns["scores"], strict=True):
        shares = [1 / (1 + math.exp(-value)) for value in row]
        wanted = {name: share for name, share in zip(task.labels, shares, strict=True) if share > threshold}  # type: ignore[attr-defined]
        assert names == list(wanted)
        assert scores == pytest.approx(list(wanted.values()), rel=1e-5)


def test_entities_hold_the_words_of_the_row() -> None:
    table = case("token-classification")[3]
    columns = predicted("token-classification", table)
    assert any(columns["prediction"])
    for words, spans, tags in zip(table["tokens"].to_pylist(), columns["prediction"], columns["tags"], strict=True):
        assert len(tags) == len(words)
        for span in spans:
            assert span["text"] == " ".join(words[span["start"] : span["end"]])
            assert 0 < span["score"] <= 1


@pytest.mark.parametrize(("tags", "spans"), [
    ("B-X I-X O B-Y", [("X", 0, 2), ("Y", 3, 4)]),
    ("I-X I-X I-Y", [("X", 0, 2), ("Y", 2, 3)]),
    ("B-X B-X", [("X", 0, 1), ("X", 1, 2)]),
    ("B-X E-X S-X", [("X", 0, 2), ("X", 2, 3)]),
    ("B-X L-X U-X", [("X", 0, 2), ("X", 2, 3)]),
    ("O O", []),
])  # fmt: skip
def test_tags_make_entities_as_seqeval_reads_them(tags: str, spans: list[tuple[str, int, int]]) -> None:
    words = "abcd"[: len(tags.split())]
    found = entities_of(tags.split(), [0.5, None, 0.5, 0.25][: len(words)], list(words))
    assert [(span["tag"], span["start"], span["end"]) for span in found] == spans
    assert [span["text"] for span in found] == [" ".join(words[start:end]) for _, start, end in spans]


def test_entities_are_those_of_seqeval() -> None:
    draw = random.Random(0)
    for _ in range(300):
        tags = [draw.choice(("O", "B-X", "I-X", "B-Y", "I-Y", "E-X", "S-Y")) for _ in range(draw.randrange(1, 9))]
        found = entities_of(tags, [0.5] * len(tags), ["a"] * len(tags))
        assert [(span["tag"], span["start"], span["end"] - 1) for span in found] == get_entities(tags)


def test_an_answer_is_a_span_of_its_context_or_none() -> None:
    columns = predicted("question-answering", case("question-answering")[3], top=3)
    assert list(columns)[:5] == ["prediction", "score", "start", "end", "prediction_2"]
    for row, context in enumerate(CONTEXTS):
        scores = [columns[f"score{place}"][row] for place in ("", "_2", "_3")]
        assert scores == sorted(scores, reverse=True)
        for place in ("", "_2", "_3"):
            start, end = columns[f"start{place}"][row], columns[f"end{place}"][row]
            assert columns[f"prediction{place}"][row] == ("" if start is None else context[start:end])
    assert sum(columns["score"][row] for row in range(3)) < 3


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("text-classification", {"threshold": 0.5}, "--threshold: text-classification does not use it. Allowed: --top"),
        ("several labels", {"top": 2}, "--top: text-classification does not use it. Allowed: --threshold"),
        ("several labels", {"threshold": 1.0}, "--threshold: got 1.0. Allowed: at least 0 and below 1"),
        ("regression", {"top": 2}, "--top: regression does not use it. Allowed: none of these options"),
        ("question-answering", {"top": 0}, "--top: got 0. Allowed: 1 or more"),
        ("seq2seq", {"top_p": 1.5}, "--top-p: got 1.5. Allowed: above 0, at most 1"),
        ("seq2seq", {"temperature": -1.0}, "--temperature: got -1.0. Allowed: 0 (greedy) or more"),
        ("seq2seq", {"seed": -1}, "--seed: got -1. Allowed: 0 or more"),
        ("regression", {"max_new_tokens": 4}, "--max-new-tokens: regression does not use it"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused_by_their_flags(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        predicted(name, case(name)[3], **options)
    assert said in str(refused.value)


def test_all_options_that_do_not_fit_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        PredictOptions(top=2, temperature=1.0).check("regression", ())
    assert "--top" in str(refused.value)
    assert "--temperature" in str(refused.value)


@pytest.mark.parametrize("name", [*TABLES][:-1])
def test_a_model_that_answers_nan_has_no_prediction(name: str) -> None:
    task, processor, _, table = case(name)
    split, asked = Split(table=table, source="rows"), PredictOptions()
    examples = task.encode_to_predict(split, processor, Reading(max_length=32), asked)
    judged = list(evaluated(name).judged)
    broken = np.float32("nan")
    judged[1] = (judged[1][0], judged[1][1] * broken) if isinstance(judged[1], tuple) else judged[1] * broken
    with pytest.raises(VerificationError, match=r"not a number \(NaN\) for 1 row \(row 2\)"):
        task.prediction_columns(judged, examples, split, asked)


def test_numbers_have_the_digits_that_the_model_computes() -> None:
    assert plain_numbers(np.array([0.1, 1e-9, 3, 123456.78], dtype=np.float32)) == [0.1, 1e-9, 3.0, 123456.78]


def test_without_entities_the_tags_and_their_probabilities_are_predicted() -> None:
    table = pa.table({"tokens": [["a", "film"], ["the"]], "pos": [["DET", "NOUN"], ["DET"]]})
    task = task_class("token-classification").from_rows(table, "rows")[0]
    examples = task.encode_to_predict(
        Split(table=table, source="rows"), tiny_tokenizer(), Reading(max_length=3), PredictOptions()
    )
    judged = judge_split(bert(task), task, examples, make_accelerator(), batch_size=2)
    columns = task.prediction_columns(judged, examples, Split(table=table, source="rows"), PredictOptions())
    assert [len(tags) for tags in columns["prediction"]] == [2, 1]
    assert {tag for tags in columns["prediction"] for tag in tags} <= {"DET", "NOUN"}
    assert columns["prediction"][0][1] == "DET", "a word that was cut off has the first tag"
    assert [[score is None for score in scores] for scores in columns["scores"]] == [[False, True], [False]]


@pytest.mark.parametrize(("name", "column", "value"), [
    ("text-classification", "text", 7), ("regression", "text", ["a"]), ("question-answering", "context", 7),
    ("multiple-choice", "question", 7), ("seq2seq", "text", 7), ("token-classification", "tokens", "a film"),
])  # fmt: skip
def test_a_column_of_another_type_is_refused(name: str, column: str, value: Any) -> None:
    table = case(name)[3]
    wrong = table.set_column(table.column_names.index(column), column, pa.array([value] * table.num_rows))
    with pytest.raises(DataError, match=f"column '{column}' holds .*, not (text|words)"):
        predicted(name, wrong)


def test_rows_without_a_token_are_named() -> None:
    with pytest.raises(DataError, match=r"1 of 2 rows have no text to answer \(row 2\)"):
        predicted("seq2seq", pa.table({"text": ["a", ""]}))


def test_a_missing_input_column_is_named() -> None:
    with pytest.raises(DataError, match="no text column 'text'"):
        predicted("text-classification", pa.table({"texts": TEXTS}))


def test_texts_are_as_long_as_asked_and_say_whether_they_ended() -> None:
    table = case("seq2seq")[3]
    short, long = (predicted("seq2seq", table, max_new_tokens=most) for most in (1, 12))
    assert all(len(a) <= len(b) for a, b in zip(short["prediction"], long["prediction"], strict=True))
    assert not any(short["finished"])


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"top_p": 0.8}, {"temperature": 0.7, "top_p": 0.9}])
def test_what_is_sampled_for_a_row_depends_on_its_number_and_the_seed_alone(options: dict[str, float]) -> None:
    table = case("seq2seq")[3]
    sample: Callable[..., Any] = functools.partial(predicted, "seq2seq", **options)
    first = sample(table, seed=1)["prediction"]
    assert sample(table, batch_size=5, seed=1)["prediction"] == first
    parts = [sample(table.slice(row, 1), seed=1, first_row=row)["prediction"][0] for row in range(5)]
    assert parts == first
    assert sample(table, seed=2)["prediction"] != first
    assert predicted("seq2seq", table)["prediction"] != first
    again = pa.table({"text": [TEXTS[0]] * 4})
    assert len(set(sample(again, seed=1)["prediction"])) > 1, "equal rows are drawn apart"


def test_sampling_without_temperature_is_greedy() -> None:
    table = case("seq2seq")[3]
    greedy = predicted("seq2seq", table)
    assert predicted("seq2seq", table, temperature=0.0, top_p=0.5) == greedy
    assert predicted("seq2seq", table, top_p=1e-9) == greedy
    assert predicted("seq2seq", table, temperature=1e-4) == greedy
