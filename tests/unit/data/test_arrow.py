# SPDX-License-Identifier: Apache-2.0
"""Arrays are those that Arrow itself makes; rows are read in chunks that fit into memory, the same however a table is
stored, for every kind of task that reads text.
"""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirrortune.data.dataset import Split
from mirrortune.data.examples import Examples
from mirrortune.data.files.arrow import cells, flag_array, nulls, row_chunks, text_array
from mirrortune.data.tokenize import Reading
from mirrortune.tasks.base import task_class
from mirrortune.tasks.kinds.causal_lm import TextReader
from mirrortune.tasks.kinds.seq2seq import PairReader
from tests.tiny_models import tiny_tokenizer

WORDS = ("the", "film", "was", "good", "a", "movie", "bad", "dull", "plot", "very", "old", "new")


@dataclass(frozen=True)
class Case:
    """A kind of task and how one of its rows looks."""

    kind: str
    columns: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)


def words(row: int, count: int) -> list[str]:
    """A few words that tell rows apart."""
    return [WORDS[(row * 7 + i * (row % 5 + 1)) % len(WORDS)] for i in range(count)]


def text(count: int) -> Any:
    """A text of some words for each row."""
    return lambda row: " ".join(words(row, count + row % 3))


CASES = {
    case.kind: case
    for case in (
        Case("text-classification", {"text": text(6), "label": lambda row: ("good", "bad")[row % 2]}),
        Case("regression", {"text": text(6), "label": float}),
        Case(
            "token-classification",
            {
                "tokens": lambda row: words(row, 4 + row % 3),
                "tags": lambda row: ["O" if word != "film" else "B-X" for word in words(row, 4 + row % 3)],
            },
        ),
        Case(
            "question-answering",
            {
                "question": text(3),
                "context": text(9),
                "answers": lambda row: {"text": words(row, 2)[:1] if row % 4 else [], "answer_start": [0][: row % 4]},
            },
            {"stride": 2},
        ),
        Case(
            "multiple-choice",
            {
                "question": text(3),
                "choices": lambda row: [" ".join(words(row + i, 3)) for i in range(2 + row % 2)],
                "label": lambda row: row % 2,
            },
        ),
        Case("seq2seq", {"document": text(6), "summary": text(2)}, {"prefix": "so : "}),
        Case("causal-lm", {"prompt": text(4), "completion": text(3)}),
    )
}


def table_of(case: Case, rows: int) -> pa.Table:
    """So many rows; made batch by batch, so that making them does not hold them all."""
    parts = [
        pa.table({name: [make(row) for row in range(start, min(start + 512, rows))] for name, make in
                  case.columns.items()})
        for start in range(0, rows, 512)
    ]  # fmt: skip
    return pa.concat_tables(parts, promote_options="permissive")


def encode(case: Case, table: pa.Table, tokenizer: Any) -> tuple[Any, Examples]:
    """The task and its examples."""
    task = task_class(case.kind).from_rows(table, "rows", **case.settings)[0]
    readers = {
        "seq2seq": PairReader(tokenizer=tokenizer, start_id=1),
        "causal-lm": TextReader(tokenizer=tokenizer, is_chat=False, takes_positions=True),
    }
    tokenizer.eos_token = "[SEP]"
    split = Split(table=table, source="rows")
    return task, task.encode(split, readers.get(case.kind, tokenizer), Reading(max_length=16))


def same(one: Any, other: Any) -> bool:
    """Whether two batches hold the same."""
    return all(np.array_equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("kind", CASES)
def test_every_kind_reads_the_same_rows_however_they_are_stored(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, table = tiny_tokenizer(), table_of(CASES[kind], 23)
    task, whole = encode(CASES[kind], table.combine_chunks(), tokenizer)
    parts = pa.concat_tables([table.slice(0, 3), table.slice(3, 1), table.slice(4, 12), table.slice(16)])

    monkeypatch.setenv("MIRRORTUNE_CACHE", str(tmp_path / "elsewhere"))  # the key is the same
    other = encode(CASES[kind], parts, tokenizer)[1]

    rows = np.arange(len(whole))
    assert len(other) == len(whole) >= 23
    assert same(whole.batch(rows), other.batch(rows))
    references = [getattr(examples, "references", None) for examples in (whole, other)]
    if callable(references[0]):
        assert list(references[0]()) == list(references[1]())
    elif hasattr(references[0], "questions"):
        assert list(references[0].questions()) == list(references[1].questions())
    del task


@pytest.mark.parametrize("kind", CASES)
def test_no_kind_holds_all_rows_while_it_makes_their_tokens(kind: str) -> None:
    tokenizer, peaks = tiny_tokenizer(), []
    for rows in (1024, 4 * 1024):
        table = table_of(CASES[kind], rows)
        tracemalloc.start()
        encode(CASES[kind], table, tokenizer)
        peaks.append(tracemalloc.get_traced_memory()[1] / 1e6)
        tracemalloc.stop()

    # Four times the rows: as many Python values at a time, and only what is a few numbers a row grows.
    assert peaks[1] < 2 * peaks[0], f"{peaks[0]:.1f} MB, then {peaks[1]:.1f} MB"


def test_chunks_have_fewer_rows_where_they_are_long_and_forget_none() -> None:
    texts = [("x" * 1_000_000 if row % 3 else "y") if row != 5 else None for row in range(40)] + ["short"] * 5000
    table = pa.concat_tables([pa.table({"text": texts[:40]}), pa.table({"text": texts[40:]})])
    keep = np.arange(5040) % 7 > 0

    sizes = [len(chunk[0]) for chunk in row_chunks(table, ["text"])]

    assert max(sizes[:7]) <= 8
    assert max(sizes) == 1024
    assert list(cells(table, "text")) == texts
    assert list(cells(table, "text", keep)) == [t for t, use in zip(texts, keep, strict=True) if use]
    assert np.flatnonzero(nulls(table, "text")).tolist() == [5]


CELLS = st.lists(st.none() | st.text(st.characters(exclude_categories=["Cs"])), max_size=40)


@given(CELLS)
def test_arrays_are_arrows_own(cells: list[str | None]) -> None:
    found = text_array(cells)

    found.validate(full=True)
    assert found.equals(pa.array(cells, pa.string()))


@given(st.lists(st.booleans(), max_size=40))
def test_flags_are_arrows_own(flags: list[bool]) -> None:
    found = flag_array(np.array(flags, np.bool_))

    found.validate(full=True)
    assert found.equals(pa.array(flags, pa.bool_()))


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(UnicodeEncodeError):
        text_array(["\ud800"])
