# SPDX-License-Identifier: Apache-2.0
"""Rows of several adapters: those that are read in one way share batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from mirrortune.data.dataset import Split
from mirrortune.inference.bank_answers import BankAnswers, Reader
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
