# SPDX-License-Identifier: Apache-2.0
"""Rows become tokens once: the cache is a function of everything that the tokens depend on, and of nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from transformers import ByT5Tokenizer

from mirrortune.data.dataset import Split
from mirrortune.data.duplicates import rows_in_both
from mirrortune.data.examples import TokenExamples
from mirrortune.data.files import arrow
from mirrortune.data.tokenize import Reading, pieces, resolve_max_length
from mirrortune.errors import ConfigError, DataError
from mirrortune.system.paths import cache_folder
from mirrortune.tasks.base import check_columns
from mirrortune.tasks.kinds.text_classification import Task
from tests.tiny_models import tiny_tokenizer

TASK = Task(
    text_columns=("text",), label_column="label", metric_names=("accuracy",), selection_metric="accuracy",
    labels=("bad", "good"),
)  # fmt: skip
PAIR = replace(TASK, text_columns=("text", "other"))
ROWS = [("the film", "good"), ("", "bad"), ("a very very very long film", "bad"), (" \n", "good"), (None, "good")]


def split_of(rows: list[tuple[str | None, str | None]], **columns: list[Any]) -> Split:
    """A split with a text and a label column, and more."""
    table = {"text": [t for t, _ in rows], "label": [label for _, label in rows], **columns}
    return Split(table=pa.table(table), source="rows.csv")


def encode(tokenizer: Any, split: Split, task: Task = TASK, **options: Any) -> TokenExamples:
    """The split's tokens, blank rows left out unless told otherwise."""
    check_columns(split, task)
    return task.encode(split, tokenizer, Reading(**{"max_length": 32, "drop_blank": True, **options}))


def entries() -> list[Path]:
    """Files in the token cache."""
    return sorted(p for p in (cache_folder() / "tokens").rglob("*.safetensors"))


def tokens(encoded: TokenExamples) -> list[list[int]]:
    """Token ids of every row."""
    ids = encoded.features["input_ids"]
    return [ids[a:b].tolist() for a, b in zip(encoded.offsets, encoded.offsets[1:], strict=False)]


def test_rows_keep_their_order_tokens_and_labels(tokenizer: Any) -> None:
    found = encode(tokenizer, split_of(ROWS))

    assert tokens(found) == [tokenizer("the film")["input_ids"], tokenizer("a very very very long film")["input_ids"]]
    assert found.targets.tolist() == [1, 0]
    assert found.lengths.tolist() == [4, 8]
    assert (found.num_empty, found.num_dropped, found.num_truncated) == (3, 3, 0)
    assert set(found.features) == {"input_ids", "token_type_ids"}


def test_blank_rows_are_kept_where_every_row_is_scored(tokenizer: Any) -> None:
    found = encode(tokenizer, split_of(ROWS), drop_blank=False)

    assert len(found) == 5
    assert (found.num_empty, found.num_dropped) == (3, 0)
    assert found.lengths.tolist() == [4, 2, 8, 2, 2]


def test_long_rows_are_cut_and_counted(tokenizer: Any) -> None:
    found = encode(tokenizer, split_of(ROWS), max_length=5)

    assert found.lengths.tolist() == [4, 5]
    assert found.num_truncated == 1
    assert tokens(found)[1][-1] == tokenizer.sep_token_id


def test_rows_that_are_cut_are_tokenised_once(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    call = type(tokenizer).__call__

    def counted(self: Any, texts: list[str], *others: Any, **options: Any) -> Any:
        given.extend(texts)
        return call(self, texts, *others, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", counted)
    assert encode(tokenizer, split_of(ROWS), max_length=5).num_truncated == 1
    assert given == ["the film", "a very very very long film"]


def test_a_tokenizer_written_in_python_cuts_rows_alike() -> None:
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    texts = ["abc", "abcdefgh", "abcd"]

    arrays, counts = pieces([texts], tokenizer, 5)

    expected = [tokenizer(text, truncation=True, max_length=5)["input_ids"] for text in texts]
    assert [list(row) for row in np.split(arrays["input_ids"], arrays["offsets"][1:-1])] == expected
    assert counts == {"num_truncated": 1}


def test_a_pass_that_finds_blank_rows_and_their_digest_serves_to_find_duplicates(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, other = split_of(ROWS), split_of([("the film", "bad"), ("a film", "bad"), (None, "good"), ("", "good")])
    train, other = (split.with_columns(["note"]) for split in (train, other))
    for split in (train, other, train.with_columns(["text"])):  # from the cache the third time
        encode(tokenizer, split)
    monkeypatch.setattr(arrow, "python_values", lambda column: pytest.fail("the rows are read again"))

    assert rows_in_both(train, other, [("text", "text")]) == 3
    changed = replace(other, table=pa.table({"text": ["a very very very long film"]}))
    monkeypatch.undo()
    assert rows_in_both(train, changed, [("text", "text")]) == 1
    assert rows_in_both(train, other, [("text", "text"), ("label", "label")]) == 1


def test_pairs_are_encoded_together_and_blank_only_if_both_are(tokenizer: Any) -> None:
    split = split_of([("the film", "good"), ("", "bad"), ("", "bad")], other=["a movie", "a movie", " "])

    found = encode(tokenizer, split, PAIR)

    assert tokens(found)[0] == tokenizer("the film", "a movie")["input_ids"]
    assert found.features["token_type_ids"].tolist()[: found.lengths[0]] == [0, 0, 0, 0, 1, 1, 1]
    assert (len(found), found.num_empty) == (2, 1)


def test_the_second_time_the_tokens_come_from_the_cache(tokenizer: Any) -> None:
    first = encode(tokenizer, split_of(ROWS), max_length=5)
    before = {path: path.stat().st_mtime_ns for path in entries()}

    again = encode(tiny_tokenizer(), split_of(ROWS), max_length=5)

    assert len(before) == 1
    assert {path: path.stat().st_mtime_ns for path in entries()} == before
    assert again.num_truncated == 1
    for name, values in first.features.items():
        np.testing.assert_array_equal(again.features[name], values)
    np.testing.assert_array_equal(again.offsets, first.offsets)


def test_other_labels_are_other_targets_of_the_same_tokens(tokenizer: Any) -> None:
    encode(tokenizer, split_of([("the film", "good"), ("a movie", "bad")]))
    found = encode(tokenizer, split_of([("the film", "bad"), ("a movie", "good")]))

    assert len(entries()) == 1
    assert found.targets.tolist() == [0, 1]


def test_how_the_tokenizer_was_last_called_does_not_matter(tokenizer: Any) -> None:
    encode(tokenizer, split_of(ROWS))
    tokenizer(["the", "the film"], padding=True, truncation=True, max_length=3)
    encode(tokenizer, split_of(ROWS))

    assert len(entries()) == 1


@pytest.mark.parametrize("change", ["text", "order", "border", "max_length", "tokenizer", "version", "columns"])
def test_whatever_changes_the_tokens_changes_the_key(tokenizer: Any, change: str) -> None:
    split = split_of([("the film", "good"), ("a movie", "bad")])
    encode(tokenizer, split)

    if change == "text":
        split = split_of([("the film", "good"), ("a movies", "bad")])
    elif change == "order":
        split = split_of([("a movie", "bad"), ("the film", "good")])
    elif change == "border":  # the same letters end to end
        split = split_of([("the film a", "good"), (" movie", "bad")])
    elif change == "tokenizer":
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["movies"])
    task = {"version": replace(TASK, version=2), "columns": PAIR}.get(change, TASK)
    split = split_of([("the film", "good"), ("a movie", "bad")], other=["", ""]) if change == "columns" else split
    encode(tokenizer, split, task, max_length=31 if change == "max_length" else 32)

    assert len(entries()) == 2


@pytest.mark.parametrize("damage", [b"", b"not safetensors", None])
def test_a_damaged_cache_entry_is_made_anew(tokenizer: Any, damage: bytes | None) -> None:
    first = encode(tokenizer, split_of(ROWS))
    (entry,) = entries()
    entry.write_bytes(entry.read_bytes()[:-8] if damage is None else damage)

    again = encode(tokenizer, split_of(ROWS))

    assert tokens(again) == tokens(first)
    assert tokens(encode(tokenizer, split_of(ROWS))) == tokens(first)


@pytest.mark.parametrize(
    ("split", "task", "says"),
    [
        (split_of([("", "good"), (" ", "bad")]), TASK, "rows.csv: all 2 rows are blank"),
        (split_of([("a", "good")]), PAIR, "rows.csv: it has no text column 'other'. Allowed: text, label"),
        (
            split_of([("a", "good")]),
            replace(TASK, label_column="y"),
            "rows.csv: it has no label column 'y'. Allowed: text",
        ),
        (
            split_of([("a", None), ("b", "good")]),
            TASK,
            "rows.csv: 1 of 2 rows have no label in column 'label' (row 1)",
        ),
        (split_of([("a", "god")]), TASK, "rows.csv row 1: label 'god' is not among the classes. Did you mean 'good'?"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(tokenizer: Any, split: Split, task: Task, says: str) -> None:
    with pytest.raises(DataError) as caught:
        encode(tokenizer, split, task)

    assert says in str(caught.value)


def test_rows_without_a_label_may_be_encoded_for_evaluation(tokenizer: Any) -> None:
    found = encode(tokenizer, split_of([("a", None), ("b", "good")]), allow_missing=True)

    assert found.targets.tolist() == [-1, 1]


@pytest.mark.parametrize(
    ("asked", "stated", "positions", "length"),
    [
        (None, 64, 512, 64), (None, 4096, 4096, 512), (None, 10**30, 66, 66), (None, 10**30, None, 512),
        (64, 64, 512, 64), (4, 64, 512, 4), (2048, 10**30, None, 2048), (1024, 4096, 4096, 1024),
    ],
)  # fmt: skip
def test_the_length_is_what_was_asked_or_what_the_model_takes(
    asked: int | None, stated: int, positions: int | None, length: int
) -> None:
    tokenizer, config = SimpleNamespace(model_max_length=stated), SimpleNamespace(max_position_embeddings=positions)

    assert resolve_max_length(asked, tokenizer, config) == length


def test_a_length_above_the_models_is_refused(tokenizer: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"^data\.max_length: got 65, the model takes at most 64 tokens\. Allowed: 4 to 64"
    ):
        resolve_max_length(65, tokenizer, SimpleNamespace(max_position_embeddings=512))
