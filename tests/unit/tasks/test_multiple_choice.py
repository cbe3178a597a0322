# SPDX-License-Identifier: Apache-2.0
"""multiple-choice: endings side by side, and choices that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from mirrortune.data.dataset import Split, load_data
from mirrortune.data.tokenize import Reading
from mirrortune.errors import DataError
from mirrortune.system.paths import DataPlace
from mirrortune.tasks.base import task_class, task_from_dict, task_to_dict
from mirrortune.tasks.predicting import PredictOptions

CHOICE = task_class("multiple-choice")
SWAG = pa.table({
    "sent1": ["the film is long", "a movie"], "sent2": ["it", "the plot"], "ending0": ["is dull", "was good"],
    "ending1": ["was fun", "was bad and very dull"], "label": [1, 0],
})  # fmt: skip


def split_of(table: pa.Table) -> Split:
    """A split in rows.jsonl."""
    return Split(table=table, source="rows.jsonl")


def choices(tokenizer: Any, table: pa.Table = SWAG, **reading: Any) -> tuple[Any, Any]:
    """The task and its examples."""
    task = CHOICE.from_rows(table, "rows.jsonl")[0]
    return task, task.encode(split_of(table), tokenizer, Reading(max_length=32, **reading))


def test_every_ending_stands_behind_its_context(tokenizer: Any) -> None:
    task, found = choices(tokenizer)
    assert task.text_columns == ("sent1", "sent2")
    assert task.choice_columns == ("ending0", "ending1")
    batch = found.batch(np.array([1, 0]))
    assert batch["input_ids"].shape[:2] == (2, 2)
    texts = [[tokenizer.decode(ids, skip_special_tokens=True) for ids in row] for row in batch["input_ids"]]
    assert texts[0] == ["a movie the plot was good", "a movie the plot was bad and very dull"]
    assert texts[1][1] == "the film is long it was fun"
    assert batch["token_type_ids"][1, 0].unique().tolist() == [0, 1]
    assert batch["targets"].tolist() == [[0, 2], [1, 2]]


def test_numbered_endings_are_in_the_order_of_their_numbers() -> None:
    names = [f"option{number}" for number in range(1, 12)]
    table = pa.table({"question": ["a"], **{name: [name] for name in reversed(names)}, "label": [1]})
    assert CHOICE.from_rows(table, "rows.jsonl")[0].choice_columns == tuple(names)


def test_rows_may_have_different_numbers_of_endings(tokenizer: Any) -> None:
    table = pa.table({
        "question": ["a", "the"],
        "choices": [{"text": ["x", "y", "z"], "label": ["A", "B", "C"]}, {"text": ["x", "y"], "label": ["1", "2"]}],
        "answerKey": ["C", "2"],
    })  # fmt: skip
    task, found = choices(tokenizer, table)
    batch = found.batch(np.array([0, 1]))
    assert batch["input_ids"].shape[:2] == (2, 3)
    assert batch["targets"].tolist() == [[2, 3], [1, 2]]
    outputs = SimpleNamespace(logits=torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 9.0]]))
    judged = task.judge(None, {}, outputs, batch["targets"])
    assert [len(row) for row in judged] == [3, 2]
    assert task.answers(judged, found)[0].tolist() == [0, 0], "the copy is never chosen"
    loss, items = task.loss({}, outputs, batch["targets"])
    assert items == 2
    assert float(loss) == pytest.approx(np.log(3) + np.log(1 + np.e))
    assert task_from_dict(json.loads(json.dumps(task_to_dict(task)))) == task


def test_choices_that_do_not_fit_are_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"row 2: label 7 is not one of its 2 endings\. Allowed: 0 to 1, or A to B"):
        choices(tokenizer, SWAG.set_column(4, "label", [[0, 7]]))
    with pytest.raises(DataError, match=r"1 of 2 rows have no label in column 'label' \(row 2\)"):
        choices(tokenizer, SWAG.set_column(4, "label", [[0, -1]]))
    with pytest.raises(DataError, match="no columns of contexts, endings and labels; the columns are text"):
        CHOICE.from_rows(pa.table({"text": ["a"]}), "rows.jsonl")
    with pytest.raises(DataError, match=r"row 1: its endings are .*Allowed: two texts or more"):
        choices(tokenizer, pa.table({"question": ["a"], "choices": [["x"]], "label": [0]}))


SHORT = {
    "a.csv": "context,ending0,ending1,ending2,label\na,x,y,z,2\nb,x,y,,1\n",
    "a.jsonl": '''{"context": "a", "ending0": "x", "ending1": "y", "ending2": "z", "label": 2}
                   {"context": "b", "ending0": "x", "ending1": "y", "ending2": " ", "label": 1}''',
    "b.jsonl": '''{"context": "a", "ending0": "x", "ending1": "y", "ending2": "z", "label": 2}
                   {"context": "b", "ending0": "x", "ending1": "y", "label": 1}''',
    "c.jsonl": '''{"context": "a", "endings": ["x", "y", "z"], "label": 2}
                   {"context": "b", "endings": ["x", "y", "", null], "label": 1}''',
    "d.jsonl": '''{"context": "a", "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}, "label": "C"}
                   {"context": "b", "choices": {"text": ["x", "y", ""], "label": ["A", "B", "C"]}, "label": "B"}''',
}  # fmt: skip


@pytest.mark.parametrize("name", SHORT)
def test_empty_endings_behind_others_are_none(tokenizer: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(SHORT[name].replace("  {", "{"), encoding="utf-8")
    split = load_data(DataPlace.parse(str(tmp_path / name))).splits["train"]
    task = CHOICE.from_rows(split.table, split.source)[0]
    found = task.encode(split, tokenizer, Reading(max_length=32))
    assert found.batch(np.array([0, 1]))["targets"].tolist() == [[2, 3], [1, 2]]
    judged = [np.array([0.0, 1.0, 0.0]), np.array([0.0, 1.0])]
    told = task.prediction_columns(judged, found, split, PredictOptions())
    assert told["choice"] == ["y", "y"]


@pytest.mark.parametrize("empty", ["", " ", None])
def test_an_empty_ending_before_another_is_refused(tokenizer: Any, empty: str | None) -> None:
    texts = [["x", "y", "z"], ["x", empty, "z"]]
    columns = {f"ending{i}": [row[i] for row in texts] for i in range(3)}
    for given in ({"choices": texts}, columns):
        with pytest.raises(DataError, match=r"row 2: ending 2 is empty and ending 3 is not\. Allowed: .* Fill it, or"):
            choices(tokenizer, pa.table({"question": ["a", "b"], **given, "label": [0, 0]}))
    table = pa.table({"question": ["a", "b"], "choices": [["x", "y", "z"], ["x", "y", empty]], "label": [0, 2]})
    with pytest.raises(DataError, match="row 2: label 2 is not one of its 2 endings"):
        choices(tokenizer, table)
