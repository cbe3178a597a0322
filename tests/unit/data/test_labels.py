# SPDX-License-Identifier: Apache-2.0
"""Class labels as exports write them: names that look alike, and names as bytes."""

from __future__ import annotations

import pyarrow as pa
import pytest

from mirrortune.data.files.row_places import FileRows, RowPlaces
from mirrortune.data.labels import class_indices, class_names, feature_names, label_remarks


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (("Spam", "ham", "spam"), "'Spam', 'spam'"),
        (("a", "a\u200b", "b"), r"'a', 'a\u200b'"),
        (("caf\u00e9", "cafe\u0301", "tea"), "'caf\u00e9', 'cafe\\u0301'"),
        (("new  york", "new york", "rome"), "'new  york', 'new york'"),
    ],
)
def test_classes_that_look_alike_are_warned_of(names: tuple[str, ...], shown: str) -> None:
    table = pa.table({"text": ["x"] * len(names), "label": names})
    assert label_remarks(table, "label", names) == [f"warning: classes that differ but look alike: {shown}"]


def test_many_classes_that_look_alike_are_warned_of_in_one_line() -> None:
    names = tuple("ABCDEFabcdef")  # handwritten letters
    (note,) = label_remarks(pa.table({"text": ["x"] * len(names), "label": names}), "label", names)
    assert note.endswith("look alike: 'A', 'a'; 'B', 'b'; 'C', 'c'; 'D', 'd' and 2 more")


@pytest.mark.parametrize("names", [("a", "b"), ("C", "C#", "C++"), ("1", "01"), ("x2", "x\u00b2")])
def test_other_classes_are_not_warned_of(names: tuple[str, ...]) -> None:
    table = pa.table({"text": ["x"] * len(names), "label": names})
    assert not label_remarks(table, "label", names)


def test_bytes_are_the_text_that_they_hold() -> None:
    table = pa.table({"text": ["x", "y", "z"], "label": [b"down", "h\u00f6her".encode(), b"down"]})
    names = class_names(table, "label", "rows.parquet", None)
    assert names == ("down", "h\u00f6her")
    places = RowPlaces(source="rows.parquet", files=(FileRows(name="rows.parquet", count=3),))
    assert class_indices(table, "label", names, places).tolist() == [0, 1, 0]
    as_text = table.set_column(1, "label", pa.array(["h\u00f6her", "down", "down"]))
    assert class_indices(as_text, "label", names, places).tolist() == [1, 0, 0]


@pytest.mark.parametrize("values", [["true", "FALSE", "False"], [True, False, False]])
@pytest.mark.parametrize("names", [("False", "True"), ("false", "true"), ("FALSE", "TRUE")])
def test_true_and_false_are_one_class_in_every_format(values: list[object], names: tuple[str, ...]) -> None:
    table = pa.table({"text": ["x", "y", "z"], "label": values})
    assert class_indices(table, "label", names, RowPlaces(source="rows")).tolist() == [1, 0, 0]


def test_spellings_of_true_that_are_classes_stay_apart() -> None:
    table = pa.table({"text": ["x", "y", "z"], "label": ["True", "true", "no"]})
    assert class_indices(table, "label", ("True", "no", "true"), RowPlaces(source="rows")).tolist() == [0, 2, 1]


@pytest.mark.parametrize(
    "stored",
    ["[" * 100_000, "{", "[]", '{"info": []}', '{"info": {"features": {"label": {"names": "ab"}}}}',
     '{"info": {"features": {"label": {"names": [1, null]}}}}'],
)  # fmt: skip
def test_metadata_of_another_program_hold_no_classes(stored: str) -> None:
    table = pa.table({"label": ["x"]}).replace_schema_metadata({"huggingface": stored})
    assert feature_names(table, "label") is None
