# SPDX-License-Identifier: Apache-2.0
"""Rows of several data sets of any kind: joined under the columns of the first, each with its source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mirrortune.config.schema import Recipe
from mirrortune.data.dataset import DataSet, Split
from mirrortune.data.files.arrow import cells
from mirrortune.data.files.media import FileCells
from mirrortune.data.mixture import SOURCE_COLUMN
from mirrortune.errors import DataError
from mirrortune.runs.checks import unpack_for_eval
from mirrortune.runs.rows import evaluation_rows, read_data
from tests.cli.console import reviews, write_table


def read(kind: str, *paths: Any, **data: Any) -> DataSet:
    """The joined rows of several data sets."""
    recipe = {"task": {"kind": kind}, "data": {"path": [str(p) if isinstance(p, Path) else p for p in paths], **data}}
    settings = unpack_for_eval(Recipe.model_validate_json(json.dumps(recipe)))
    return read_data(settings.data, settings.task)


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def train(data: DataSet) -> Split:
    return data.require("train", "test")


def picture(path: Path, shade: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(path)
    return path


def test_class_folders_and_tables_of_images_are_mixed(tmp_path: Path) -> None:
    for shade, name in enumerate(("cat", "dog")):
        picture(tmp_path / f"folders/{name}/{name}.png", shade)
    picture(tmp_path / "table/pictures/a.png", 9)
    table = write_table(tmp_path / "table/rows.csv", [("pictures/a.png", "cat"), ("pictures/a.png", "dog")],
                        header=("file", "animal"))  # fmt: skip
    content = picture(tmp_path / "b.png", 3).read_bytes()
    encoded = tmp_path / "encoded.parquet"
    pq.write_table(pa.table({"image": [{"bytes": content, "path": "b.png"}] * 2, "label": ["cat", "bird"]}), encoded)

    split = train(read("image-classification", tmp_path / "folders", table))
    files = FileCells.of(split, "image", role="image", readable="")
    assert all(Path(str(files.open(row))).is_file() for row in range(4))
    assert list(cells(split.table, "label")) == ["cat", "dog", "cat", "dog"]

    split = train(read("image-classification", tmp_path / "folders", table, encoded))
    files = FileCells.of(split, "image", role="image", readable="")
    assert [isinstance(files.open(row), str) for row in range(6)] == [True] * 4 + [False] * 2
    assert split.table.column(SOURCE_COLUMN).to_pylist() == [0, 0, 1, 1, 2, 2]
    assert not split.remarks


def test_files_outside_of_the_folder_of_their_own_table_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a/one.png", 1)
    picture(tmp_path / "b/two.png", 1)
    one = write_table(tmp_path / "a/rows.csv", [("one.png", "x"), ("one.png", "y")], header=("image", "label"))
    two = write_table(tmp_path / "b/rows.csv", [("two.png", "x"), ("../a/one.png", "y")], header=("image", "label"))
    assert any("outside the folder" in remark for remark in train(read("image-classification", one, two)).remarks)
    with pytest.raises(DataError, match=r"b/rows.csv:3: its image .* lies outside"):
        read("image-classification", one, two, contained=True)


def test_numbers_of_named_classes_and_names_are_one_set(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {"t": datasets.Value("string"), "y": datasets.ClassLabel(names=["pos", "neg", "none"])}
    )
    rows = datasets.Dataset.from_dict({"t": ["a b", "c d", "e f"], "y": [0, 1, 0]}, features=features)
    rows.save_to_disk(str(tmp_path / "saved"))
    table = write_table(tmp_path / "rows.csv", [("g h", "neg"), ("i j", "mixed")])
    data = read("text-classification", tmp_path / "saved", table)
    assert data.task.labels == ("pos", "neg", "none", "mixed")
    assert list(cells(train(data).table, "y")) == ["pos", "neg", "pos", "neg", "mixed"]


def test_tags_and_scores_of_different_types_are_one_column(tmp_path: Path) -> None:
    first = lines(tmp_path / "a.jsonl", {"tokens": ["x", "y"], "ner_tags": [0, 1]})
    second = lines(tmp_path / "b.jsonl", {"words": ["z"], "tags": ["1"]})
    data = read("token-classification", first, second)
    assert data.task.columns() == [("word", "tokens"), ("tag", "ner_tags")]
    assert list(cells(train(data).table, "ner_tags")) == [["0", "1"], ["1"]]
    numbers = lines(tmp_path / "c.jsonl", {"text": "a b c", "score": 0.25}, {"text": "d e f", "score": 3.0})
    texts = write_table(tmp_path / "d.csv", [("g h i", "1.5"), ("j k l", "2")], header=("text", "score"))
    assert [float(v) for v in cells(train(read("regression", numbers, texts)).table, "score")] == [0.25, 3, 1.5, 2]


def test_columns_of_a_source_may_be_those_of_another(tmp_path: Path) -> None:
    """A column that is not read must not be taken for one that is, under its new name."""
    first = write_table(tmp_path / "a.csv", [("one two", "x"), ("three four", "y")], header=("body", "label"))
    second = write_table(tmp_path / "b.csv", [("junk", "five six", "x"), ("junk", "seven", "y")],
                         header=("body", "review", "label"))  # fmt: skip
    item = {"path": str(second), "text_columns": ["review"]}
    assert list(cells(train(read("text-classification", first, item)).table, "body")) == [
        "one two", "three four", "five six", "seven",
    ]  # fmt: skip


def test_rows_set_aside_are_cut_in_the_same_way_again(tmp_path: Path) -> None:
    first, second = (write_table(tmp_path / f"{n}.csv", reviews(20, seed=n)) for n in (1, 2))
    recipe = {
        "task": {"kind": "text-classification"},
        "data": {"path": [str(first), {"path": str(second), "weight": 3}]},
    }
    settings = unpack_for_eval(Recipe.model_validate_json(json.dumps(recipe)))
    data = read_data(settings.data, settings.task)
    parts = {
        name: evaluation_rows(settings.data, data, name, data.task, is_own_data=True)[0]
        for name in ("train", "validation")
    }
    counts = {name: np.bincount(split.table.column(SOURCE_COLUMN).to_numpy()).tolist() for name, split in parts.items()}
    assert counts == {"train": [18, 18], "validation": [2, 2]}
    other = evaluation_rows(settings.data, data, None, data.task, is_own_data=False)
    assert (other[0].table.num_rows, other[1]) == (40, "all")
