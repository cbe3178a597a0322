# SPDX-License-Identifier: Apache-2.0
"""seq2seq: decoder inputs, cut targets, and scores against other libraries."""

from __future__ import annotations

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
from mirrortune.tasks.base import task_class
from mirrortune.tasks.kinds.seq2seq import PairReader
from mirrortune.tasks.metrics import score

PAIR = task_class("seq2seq")


def split_of(table: pa.Table) -> Split:
    """A split in rows.jsonl."""
    return Split(table=table, source="rows.jsonl")


def pairs(tokenizer: Any, table: pa.Table, **settings: Any) -> tuple[Any, Any]:
    """The task and its examples."""
    task = PAIR.from_rows(table, "rows.jsonl", **settings)[0]
    reader = PairReader(tokenizer=tokenizer, start_id=7)
    return task, task.encode(split_of(table), reader, Reading(max_length=16, drop_blank=True))


ARTICLES = pa.table({"document": ["the film was very good", " ", "a plot"], "summary": ["good film", "x", "plot"]})


def test_the_decoder_reads_what_it_has_written(tokenizer: Any) -> None:
    task, found = pairs(tokenizer, ARTICLES, prefix="so : ")
    assert len(found) == 2
    batch = found.batch(np.array([0, 1]))
    assert tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True).startswith("so")
    targets, decoder = batch["targets"], batch["decoder_input_ids"]
    assert targets[0].tolist() == tokenizer("good film")["input_ids"]
    assert targets[1].tolist() == [*tokenizer("plot")["input_ids"], -100]
    assert decoder[:, 0].tolist() == [7, 7]
    assert decoder[0, 1:].tolist() == targets[0, :-1].tolist()
    assert decoder.min() >= 0
    loss, items = task.loss({}, SimpleNamespace(logits=torch.zeros(2, 4, 10)), targets.clamp(max=9))
    assert items == 7
    assert float(loss) == pytest.approx(7 * np.log(10))


def test_long_targets_are_cut_and_counted(tokenizer: Any) -> None:
    _, found = pairs(tokenizer, pa.table({"text": ["a"], "summary": ["the film was good"]}), max_target_length=4)
    assert found.num_cut == 1
    assert "1 cut" in found.describe()
    assert len(found.targets) == 4


def test_texts_are_scored_as_the_libraries_do() -> None:
    found = score(("rouge1", "rougeL", "bleu"), ["the film is good", "a plot"], ["the film was good", "a plot"])
    assert found["rouge1"] == pytest.approx((0.75 + 1) / 2)
    assert found["rougeL"] == pytest.approx((0.75 + 1) / 2)
    assert 0 < found["bleu"] < 100
    assert score(("bleu", "chrf"), ["the old film was good"], ["the old film was good"]) == pytest.approx(
        {"bleu": 100.0, "chrf": 100.0}
    )


def test_translations_in_structs_are_columns(tmp_path: Any) -> None:
    path = tmp_path / "wmt.jsonl"
    path.write_text('{"translation": {"en": "good", "ro": "bun"}}\n{"translation": {"en": "film", "ro": "film"}}\n')
    table = load_data(DataPlace.parse(str(path))).require("train", "here").table
    assert table.column_names == ["translation.en", "translation.ro"]
    task, _ = PAIR.from_rows(table, "wmt", text_columns=("translation.en",), label_column="translation.ro")
    assert task.columns() == [("text", "translation.en"), ("target", "translation.ro")]


def test_tables_without_pairs_are_refused() -> None:
    with pytest.raises(DataError, match="no columns of source and target texts; the columns are text, n"):
        PAIR.from_rows(pa.table({"text": ["a"], "n": [1]}), "rows.jsonl")
