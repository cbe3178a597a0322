# SPDX-License-Identifier: Apache-2.0
"""Columns of the rows to predict: those of the training, or others that are found in their place."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from mirrortune.data.dataset import DataSet, Split
from mirrortune.data.files.media import FileCells
from mirrortune.errors import DataError
from mirrortune.inference.prediction_rows import PredictionRows, RowRequest, rows_of_request
from mirrortune.runs.target import detect_columns
from mirrortune.system.console import Reporter
from mirrortune.tasks.base import Task, task_class


def trained(kind: str, table: pa.Table, **given: Any) -> Task:
    return task_class(kind).from_rows(table, "rows", **given)[0]


def rows_of(table: pa.Table) -> PredictionRows:
    return PredictionRows(data=DataSet(splits={"test": Split(table=table, source="rows.csv")}, origin={}))


def tagger() -> Task:
    return trained("token-classification", pa.table({"tokens": [["a", "b"]], "tags": [["X", "Y"]]}))


def test_a_text_stands_for_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    """Csv has no lists, and a text is split at white space."""
    table = pa.table({"id": [1], "text": ["a b"]})

    _, task = rows_of(table).fitted(tagger(), Reporter(), are_named=False)

    assert task.columns()[0] == ("word", "text")
    assert "text column 'text' (detected" in capsys.readouterr().err


def test_lists_written_as_text_are_no_words() -> None:
    with pytest.raises(DataError, match="it has no word column 'tokens'"):
        rows_of(pa.table({"text": ["['a', 'b']"] * 4})).fitted(tagger(), Reporter(), are_named=False)


def test_a_loss_is_no_news_of_rows_to_answer() -> None:
    rows = Split(table=pa.table({"text": ["a b"]}), source="rows.csv")
    task = trained("causal-lm", pa.table({"body": ["a b"]}))

    found, notes = detect_columns(task, rows)

    assert found.columns()[0][1] == "text"
    assert notes == ["text column 'text' (detected; --text-column to change)"]


def test_a_single_file_lies_in_no_row_of_a_table() -> None:
    (split,) = rows_of_request(RowRequest(image="a.png")).data.splits.values()
    cells = FileCells.of(split, "image", role="image", readable="PNG")

    assert str(cells.unreadable(0, "it is damaged")) == (
        "--image: a.png cannot be read (it is damaged). Allowed: PNG. Give another file."
    )
