# SPDX-License-Identifier: Apache-2.0
"""Rows without labels: what a recipe says stands for none, and what each kind of task answers for them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from mirrortune.data.dataset import Split
from mirrortune.data.labels import without_labels
from mirrortune.data.tokenize import Reading
from mirrortune.errors import DataError
from mirrortune.runs.evaluate import write_predictions
from mirrortune.tasks.base import task_class, with_label_columns
from mirrortune.tasks.kinds.causal_lm import TextReader
from tests.tiny_models import tiny_chat_tokenizer


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([1, -1, None], pa.int64(), [1, None, None]),
        ([0.5, -1.0, -1.5], pa.float32(), [0.5, None, -1.5]),
        (["-1", " -1.000", "1"], pa.string(), [None, None, "1"]),
        (["a", "-1", "a"], pa.dictionary(pa.int32(), pa.string()), ["a", None, "a"]),
        ([True, False, None], pa.bool_(), [True, False, None]),
    ],
)
def test_what_stands_for_no_label_is_null(values: list[Any], kind: pa.DataType, expected: list[Any]) -> None:
    table = pa.table({"label": pa.array(values, kind), "x": [1, 2, 3]}).replace_schema_metadata({"k": "v"})

    found = without_labels(table, "label", "-1")

    assert found.column("label").to_pylist() == expected
    assert found.column("x").to_pylist() == [1, 2, 3]
    assert found.schema.metadata == {b"k": b"v"}


def test_a_prompt_without_its_completion_is_not_learned_as_nothing() -> None:
    rows = pa.table({"prompt": ["a", "b"], "completion": ["c", None]})
    task = task_class("causal-lm").from_rows(rows, "rows")[0]
    reader = TextReader(tokenizer=tiny_chat_tokenizer(), is_chat=False, takes_positions=True)

    with pytest.raises(DataError, match=r"1 of 2 rows have no answer in column 'completion' \(row 2\).*an answer in"):
        task.encode(Split(table=rows, source="rows"), reader, Reading(max_length=16))


def test_an_underscore_is_in_no_number() -> None:
    rows = pa.table({"text": ["a", "b"], "label": ["1", "1_000"]})
    task = task_class("regression").from_rows(rows, "rows", label_column="label")[0]
    with pytest.raises(DataError, match="label '1_000' in column 'label' is not a finite number"):
        task.strata(Split(table=rows, source="rows"))


def test_rows_from_the_cache_of_tokens_have_the_places_of_their_own_split() -> None:
    reader, told = TextReader(tokenizer=tiny_chat_tokenizer(), is_chat=False, takes_positions=True), list[str]()
    rows, blank = [("a film", "1"), ("a plot", "2"), ("the cast", "3")], (" ", " ")

    def encoded(*given: tuple[str, str], **settings: Any) -> Any:
        prompts, answers = zip(*given, strict=True)
        table = pa.table({"prompt": prompts, "completion": answers})
        task = task_class("causal-lm").from_rows(table, "rows", **settings)[0]
        reading = Reading(max_length=16, drop_blank=True, tell=told.append)
        return task.encode(Split(table=table, source="rows"), reader, reading)

    assert encoded(rows[0], blank, *rows[1:]).split_rows.tolist() == [0, 2, 3]
    assert encoded(*rows, blank).split_rows.tolist() == [0, 1, 2]
    assert encoded(*rows).split_rows.tolist() == [0, 1, 2]
    assert encoded(blank, *rows, answer="gsm8k").expected == ("1", "2", "3")
    assert [line.rpartition(": ")[2] for line in told] == ["created for the first time", *["from the cache"] * 3]


def test_several_classes_are_written_side_by_side(tmp_path: Path) -> None:
    write_predictions(tmp_path / "p.tsv", np.array([[1, 0, 1], [0, 0, 0]]), ("a", "b", "c"), None)

    assert (tmp_path / "p.tsv").read_text().splitlines() == ["index\tprediction", "0\ta,c", "1\t"]


def test_lists_and_columns_that_are_not_there_are_left() -> None:
    table = pa.table({"tags": [[-1], [0]]})

    assert without_labels(table, "tags", "-1") is table
    assert without_labels(table, "label", "-1") is table


def test_words_without_tags_are_answered(tokenizer: Any) -> None:
    rows = pa.table({"tokens": [["a", "film"], ["the", "movie"]], "tags": [["O", "B-X"], ["O", "O"]]})
    task = task_class("token-classification").from_rows(rows, "rows")[0]
    hidden = with_label_columns(Split(table=rows.select(["tokens"]), source="hidden"), task)

    examples = task.encode(hidden, tokenizer, Reading(max_length=16, allow_missing=True))
    batch = examples.batch(np.arange(2))
    logits = torch.zeros(*batch["input_ids"].shape, 2)
    logits[..., task.labels.index("B-X")] = 1.0
    judged = task.judge(None, {}, SimpleNamespace(logits=logits), batch["targets"])

    assert examples.num_unlabelled == 2
    assert task.answers(judged, examples)[0] == [["B-X", "B-X"], ["B-X", "B-X"]]


@pytest.mark.parametrize(
    ("kind", "columns", "label"),
    [
        ("text-classification", {"text": ["a", "b"], "label": ["x", "y"]}, "label"),
        ("regression", {"text": ["a", "b"], "label": [0.5, 1.5]}, "label"),
        ("multiple-choice", {"question": ["a", "b"], "choices": [["x", "y"]] * 2, "label": [0, 1]}, "label"),
        ("question-answering", {"question": ["a", "b"], "context": ["c", "d"], "answers": ["c", "d"]}, "answers"),
    ],
)
def test_a_split_may_lack_the_column_of_labels(
    tokenizer: Any, kind: str, columns: dict[str, list[Any]], label: str
) -> None:
    rows = pa.table(columns)
    task = task_class(kind).from_rows(rows, "rows")[0]
    hidden = with_label_columns(Split(table=rows.drop_columns([label]), source="hidden"), task)

    assert task.encode(hidden, tokenizer, Reading(max_length=16, allow_missing=True)).num_unlabelled == 2
