# SPDX-License-Identifier: Apache-2.0
"""token-classification: which piece of a word carries its tag, and what is scored."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from mirrortune.data.dataset import Split
from mirrortune.data.tokenize import Reading
from mirrortune.errors import DataError
from mirrortune.tasks.base import task_class, task_from_dict, task_to_dict
from mirrortune.tasks.metrics import score
from mirrortune.tasks.predicting import PredictOptions

KIND = task_class("token-classification")
ROWS = {
    "tokens": [["the", "Xu", "movie"], ["a", "film"]],
    "ner_tags": [["O", "B-PER", "I-PER"], ["O", "B-ORG"]],
}


def split_of(rows: dict[str, list[Any]]) -> Split:
    """A split in rows.jsonl."""
    return Split(table=pa.table(rows), source="rows.jsonl")


def make(rows: dict[str, list[Any]] = ROWS, **settings: Any) -> Any:
    """The task of the rows."""
    return KIND.from_rows(pa.table(rows), "rows.jsonl", **settings)[0]


def judged(task: Any, examples: Any, tags: list[list[int]]) -> list[list[int]]:
    """What a model that gives every word of the rows these tags is judged to say."""
    batch = examples.batch(np.arange(len(examples)))
    logits = torch.zeros(*batch["input_ids"].shape, len(task.labels))
    for row, wanted in enumerate(batch["targets"] != -100):
        logits[row, wanted.nonzero()[:, 0], torch.tensor(tags[row])] = 9.0
    return task.judge(None, {}, SimpleNamespace(logits=logits), batch["targets"])


def test_the_first_piece_of_a_word_carries_its_tag(tokenizer: Any) -> None:
    task = make()
    found = task.encode(split_of(ROWS), tokenizer, Reading(max_length=32))
    batch = found.batch(np.array([0]))
    # [CLS] the x ##u movie [SEP]
    assert tokenizer.convert_ids_to_tokens(batch["input_ids"][0]) == ["[CLS]", "the", "x", "##u", "movie", "[SEP]"]
    o, begin, inside = (task.labels.index(t) for t in ("O", "B-PER", "I-PER"))
    assert batch["targets"][0].tolist() == [-100, o, begin, -100, inside, -100]
    loss, items = task.loss({}, SimpleNamespace(logits=torch.zeros(1, 6, 4)), batch["targets"])
    assert items == 3
    assert float(loss) == pytest.approx(3 * np.log(4))


def test_a_missing_word_is_empty_and_not_the_word_none(tokenizer: Any) -> None:
    rows = {"tokens": [["the", None, "movie"]], "ner_tags": [["O", "B-PER", "B-PER"]]}
    task = make(rows)
    found = task.encode(split_of(rows), tokenizer, Reading(max_length=32))
    assert tokenizer.convert_ids_to_tokens(found.input_ids(0)) == ["[CLS]", "the", "movie", "[SEP]"]

    said = judged(task, found, [[task.labels.index("O"), task.labels.index("B-PER")]])
    columns = task.prediction_columns(said, found, split_of(rows), PredictOptions())
    assert [(entity["text"], entity["start"]) for entity in columns["prediction"][0]] == [("movie", 2)]


def test_whole_entities_are_scored(tokenizer: Any) -> None:
    task = make()
    found = task.encode(split_of(ROWS), tokenizer, Reading(max_length=32))
    names = [["O", "B-PER", "I-PER"], ["O", "B-PER"]]
    said = judged(task, found, [[task.labels.index(t) for t in row] for row in names])
    predictions, references = task.answers(said, found)
    assert predictions == names
    assert references == ROWS["ner_tags"]
    assert task.metric_names == ("entity_f1", "tag_accuracy")
    scores = score(("entity_f1", "entity_precision", "entity_recall", "tag_accuracy"), predictions, references)
    assert scores == pytest.approx(
        {"entity_f1": 0.5, "entity_precision": 0.5, "entity_recall": 0.5, "tag_accuracy": 0.8}
    )


def test_words_that_were_cut_off_are_wrong_and_not_forgotten(tokenizer: Any) -> None:
    task = make()
    found = task.encode(split_of(ROWS), tokenizer, Reading(max_length=4))  # [CLS] the x [SEP]
    assert found.num_truncated == 1
    said = judged(task, found, [[task.labels.index(t) for t in row] for row in (["O", "B-PER"], ["O", "B-ORG"])])
    assert task.answers(said, found)[0] == [["O", "B-PER", "O"], ["O", "B-ORG"]]


def test_words_without_pieces_do_not_move_the_others(tokenizer: Any) -> None:
    rows = {"tokens": [["the", "", "film"]], "ner_tags": [["O", "B-PER", "B-ORG"]]}
    task = make(rows)
    found = task.encode(split_of(rows), tokenizer, Reading(max_length=32))
    said = judged(task, found, [[task.labels.index("O"), task.labels.index("B-ORG")]])
    assert task.answers(said, found)[0] == [["O", "O", "B-ORG"]]


def test_tag_names_of_a_hub_table_are_kept(tokenizer: Any) -> None:
    features = {"tags": {"feature": {"names": ["O", "B-X"], "_type": "ClassLabel"}, "_type": "List"}}
    table = pa.table({"words": [["a", "film"]], "tags": [[0, 1]]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    task, notes = KIND.from_rows(table, "hub")
    assert task.labels == ("O", "B-X")
    assert notes == ["text column 'words' (detected; --text-column to change)",
                     "label column 'tags' (detected; --label-column to change)"]  # fmt: skip
    found = task.encode(Split(table=table, source="hub"), tokenizer, Reading(max_length=32))
    assert found.batch(np.array([0]))["targets"].tolist() == [[-100, 0, 1, -100]]


def test_tags_that_are_no_entities_are_scored_one_by_one() -> None:
    task = make({"tokens": [["a", "film"]], "pos_tags": [["DET", "NOUN"]]})
    assert task.metric_names == ("tag_accuracy",)
    assert task_from_dict(json.loads(json.dumps(task_to_dict(task)))) == task


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ({"tokens": [["a", "b"]], "tags": [["O"]]}, "rows.jsonl row 1: 2 words and 1 tags"),
        ({"tokens": [["a", "b"]], "tags": [[None, "B-Y"]]}, "rows.jsonl row 1: word 1 has no tag"),
        ({"tokens": [["a", "b"]], "tags": [["O", None]]}, "rows.jsonl row 1: word 2 has no tag"),
        ({"tokens": [["a"]], "tags": [["X"]]}, "row 1: tag 'X' is not among the tags"),
        ({"tokens": [["a"], ["a"]], "tags": [None, ["O"]]}, "1 of 2 rows have no tag in column 'tags' (row 1)"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tokenizer: Any, rows: dict[str, list[Any]], says: str) -> None:
    task = make({"tokens": [["a", "b"]], "tags": [["O", "B-X"]]})
    with pytest.raises(DataError) as caught:
        task.encode(split_of(rows), tokenizer, Reading(max_length=32))
    assert says in str(caught.value)


def test_a_table_without_lists_is_refused() -> None:
    with pytest.raises(
        DataError,
        match=r"no two columns are lists of words and of tags; the columns are text, label.*convert spans of char",
    ):
        make({"text": ["a"], "label": ["O"]})
