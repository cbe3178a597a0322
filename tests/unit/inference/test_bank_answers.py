# SPDX-License-Identifier: Apache-2.0
"""Rows of several adapters: those that are read in one way share batches."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from mirrortune.data.dataset import Split
from mirrortune.data.files.readers import read_table
from mirrortune.errors import DataError
from mirrortune.inference.bank_answers import BankAnswers, Reader, RowAdapters
from mirrortune.tasks.base import task_class


def test_rows_of_tasks_with_several_formats_are_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = task_class("causal-lm")
    text, prompts = (
        kind.from_rows(pa.table(columns), "rows")[0]
        for columns in ({"text": ["a"]}, {"prompt": ["a"], "completion": ["b"]})
    )
    readers = {
        name: Reader(task=task, max_length=8)
        for name, task in (("a", text.united([prompts])), ("b", text), ("c", text.united([prompts])))
    }
    groups: list[list[int]] = []

    def group(_: Any, reader: Reader, rows: Split, names: list[str], numbers: Any, *others: object) -> dict[str, Any]:
        assert {names[number] for number in numbers} <= {n for n, own in readers.items() if own == reader}
        groups.append(numbers.tolist())
        return {"prediction": numbers.tolist()}

    monkeypatch.setattr(BankAnswers, "_group", group)
    answers = object.__new__(BankAnswers)
    answers._adapters = SimpleNamespace(names_of=lambda _: ["a", "b", "c", "b"], reader=readers.get)  # type: ignore[assignment]

    found = answers._answers(Split(table=pa.table({"text": ["x"] * 4}), source="rows"), 0, lambda _: None)

    assert found == {"prediction": [0, 1, 2, 3]}
    assert groups == [[0, 2], [1, 3]]


def test_a_column_of_adapters_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    """Its cells are null, and the base model would answer rows that name adapters."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"shop": 7, "text": "a"}\n{"shop": "8", "text": "b"}\n', encoding="utf-8")
    adapters = object.__new__(RowAdapters)
    adapters._column, adapters.bank = "shop", SimpleNamespace(names=["7", "8"])  # type: ignore[assignment]
    with pytest.raises(DataError, match=r"rows\.jsonl:2"):
        adapters.names_of(Split(table=read_table(path), source="rows.jsonl"))
