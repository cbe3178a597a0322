# SPDX-License-Identifier: Apache-2.0
"""Messages name the lines of the file, whatever was set aside, left out or joined before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mirrortune.data.dataset import Split, load_data, set_aside, take_subset
from mirrortune.data.files.row_places import FileRows, RowPlaces
from mirrortune.errors import DataError
from mirrortune.system.paths import DataPlace
from mirrortune.tasks.base import task_class

NAMES = ("a.csv", "a.jsonl", "a.json", "a.txt", "a.parquet")


def write(folder: Path, name: str, texts: list[str]) -> Path:
    """Rows with these texts and labels, among what moves the lines: blank ones, and line breaks in cells."""
    path = folder / name
    objects = [{"text": text, "label": str(i % 2)} for i, text in enumerate(texts)]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(objects), path)
    elif path.suffix == ".csv":
        path.write_text("text,label\n\n" + "".join(f'"{t}\nmore",{i % 2}\n' for i, t in enumerate(texts)))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in objects))
    elif path.suffix == ".txt":
        path.write_text("\n".join(["", *texts]))
    else:
        path.write_text(json.dumps(objects))
    return path


@pytest.mark.parametrize(
    ("name", "places"),
    list(
        zip(NAMES, [(":3", ":11"), (":1", ":9"), (" row 1", " row 5"), (":2", ":6"), (" row 1", " row 5")], strict=True)
    ),
)
def test_a_row_has_the_number_that_its_file_gives_it(tmp_path: Path, name: str, places: tuple[str, str]) -> None:
    path = write(tmp_path, name, list("abcde"))

    split = load_data(DataPlace.parse(str(path))).splits["train"]

    assert [split.places.where(row) for row in (0, 4)] == [f"{path}{place}" for place in places]


def test_the_number_stays_when_rows_are_set_aside_and_left_out(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(50)]
    split = load_data(DataPlace.parse(str(write(tmp_path, "a.jsonl", texts)))).splits["train"]

    for part in (*set_aside(split, 0.3, 1, None), take_subset(set_aside(split, 0.3, 1, None)[0], 7, 0)):
        for row, text in enumerate(part.table.column("text").to_pylist()):
            assert part.places.where(row) == f"{tmp_path}/a.jsonl:{2 * texts.index(text) + 1}"
    sampled = load_data(DataPlace.parse(f"{tmp_path}/a.jsonl#9")).splits["train"]
    assert [sampled.places.where(i).rpartition(":")[2] for i in range(9)] == [
        str(2 * texts.index(text) + 1) for text in sampled.table.column("text").to_pylist()
    ]


def test_rows_of_several_files_name_theirs(tmp_path: Path) -> None:
    for name in ("a.csv", "b.parquet", "c.jsonl"):
        write(tmp_path, name, ["x", "y"])

    split = load_data(DataPlace.parse(f"{tmp_path}/?.*")).splits["train"]

    assert [split.places.where(row).removeprefix(f"{tmp_path}/") for row in range(6)] == [
        "a.csv:3", "a.csv:5", "b.parquet row 1", "b.parquet row 2", "c.jsonl:1", "c.jsonl:3",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "kept", "says"),
    [
        ([0], None, "line 2"),
        ([0, 1], None, "lines 2, 5"),
        ([0, 1], [1, 2], "x.csv:5, y.parquet row 1"),
        ([1], [1, 2], "row 1 of y.parquet"),
        ([0, 1, 2, 3, 4, 5], [2, 3, 4, 5, 6, 7], "rows 1, 2, 3, 4, 5, ... of y.parquet"),
    ],
)
def test_rows_are_listed_in_words(rows: list[int], kept: list[int] | None, says: str) -> None:
    files = (
        FileRows(name="x.csv", count=2, lines=np.array([2, 5])),
        FileRows(name="y.parquet", count=6),
    )
    own = RowPlaces(source="s", files=files if kept else files[:1], kept=np.array(kept) if kept else None)

    assert own.listed(rows) == says


def test_rows_without_files_are_numbered() -> None:
    assert RowPlaces(source="hub train").where(4) == "hub train row 5"
    assert RowPlaces(source="hub train").listed([0]) == "row 1"


def rows(kind: str, bad: Any) -> list[dict[str, Any]]:
    """Twenty good rows of a kind, of which the tenth has ``bad`` for a label."""
    good: dict[str, dict[str, Any]] = {
        "text-classification": {"text": "a film", "label": "x"},
        "regression": {"text": "a film", "label": 0.5},
        "token-classification": {"tokens": ["a", "b"], "tags": ["O", "B-X"]},
        "multiple-choice": {"question": "a", "choices": ["x", "y"], "label": 1},
        "question-answering": {"question": "a", "context": "b", "answers": {"text": ["b"], "answer_start": [0]}},
        "seq2seq": {"source": "a", "target": "b"},
    }
    found = [dict(good[kind]) for _ in range(20)]
    if kind in ("text-classification", "regression"):
        found[::2] = [{"text": "a film", "label": "y" if kind == "text-classification" else 1.5}] * 10
    found[9] = dict(found[9]) | {list(found[9])[-1]: bad}
    return found


@pytest.mark.parametrize(
    ("kind", "bad", "says"),
    [
        ("text-classification", None, r"\(line 19\)"),
        ("regression", None, r"\(line 19\)"),
        ("regression", 1e300, r"a\.jsonl:19: label 1e\+300"),
        ("token-classification", None, r"\(line 19\)"),
        ("multiple-choice", 7, r"a\.jsonl:19: label 7 is not one"),
        ("question-answering", None, r"\(line 19\)"),
        ("seq2seq", None, r"\(line 19\)"),
    ],
)
def test_every_kind_names_the_line_behind_rows_that_were_set_aside(
    tmp_path: Path, kind: str, bad: Any, says: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows(kind, bad)))
    split = load_data(DataPlace.parse(str(path))).splits["train"]
    task = task_class(kind).from_rows(split.table, split.source)[0]
    keep = np.arange(20) > 4

    with pytest.raises(DataError, match=says):
        task.strata(split.take(keep))


def test_what_a_column_holds_is_checked_only_if_it_is_used(tmp_path: Path) -> None:
    """A split of a file with broken columns is as good as one without."""
    path = tmp_path / "a.jsonl"
    rows = [{"text": f"a {i}", "label": i % 2, "meta": {"id": i if i % 2 else "x"}, "n": 10**30} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    split = load_data(DataPlace.parse(str(path))).splits["train"]

    task = task_class("text-classification").from_rows(split.table, split.source)[0]

    assert isinstance(split, Split)
    assert task.columns() == [("text", "text"), ("label", "label")]
    assert list(task.strata(split)) == [0, 1] * 3
