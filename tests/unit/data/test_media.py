# SPDX-License-Identifier: Apache-2.0
"""Files that the rows of a table name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from mirrortune.data.dataset import DataSet, Split
from mirrortune.data.files.media import FileCells, named_files, remarks_on

COLUMNS = [("image", "file"), ("label", "label")]


def named_in(folder: Path, cells: list[object]) -> dict[str, str]:
    """What identifies the files of a table in ``folder``."""
    table = pa.table({"file": cells, "label": ["a"] * len(cells)})
    return named_files(DataSet(splits={"train": Split(table=table, source="rows", folder=folder)}), COLUMNS)


def test_files_of_a_table_are_known_by_their_names_and_sizes(tmp_path: Path) -> None:
    for folder in ("here", "there"):
        for name, size in (("a.png", 8), ("b.png", 12)):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.new("RGB", (size, size)).save(tmp_path / folder / name)
    first = named_in(tmp_path / "here", ["a.png", "b.png"])

    assert first.keys() == {"train"}
    assert named_in(tmp_path / "there", ["a.png", "b.png"]) == first
    assert named_in(tmp_path / "there", [str(tmp_path / "here" / "a.png"), "b.png"]) == first
    assert named_in(tmp_path / "here", ["b.png", "a.png"]) != first
    Image.effect_noise((64, 64), 50).save(tmp_path / "here" / "b.png")
    assert named_in(tmp_path / "here", ["a.png", "b.png"]) != first
    (tmp_path / "here" / "b.png").unlink()
    assert named_in(tmp_path / "here", ["a.png", "b.png"]) != first


def test_names_that_no_file_can_have_are_compared_too(tmp_path: Path) -> None:
    found = [named_in(tmp_path, [name]) for name in ("a" * 5000, "b" * 5000, "a\0b")]
    assert len({own["train"] for own in found}) == 3


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "a\0b/c"])
@pytest.mark.parametrize("is_contained", [False, True])
def test_a_name_that_no_file_can_have_is_a_bad_row(tmp_path: Path, name: str, is_contained: bool) -> None:
    split = Split(table=pa.table({"file": [name]}), source="rows", folder=tmp_path, is_contained=is_contained)
    cells = FileCells.of(split, "file", role="image", readable="")
    assert (cells.outside(), cells.size(0)) == ([], None)
    with pytest.raises((OSError, ValueError)):  # what callers make an error of the row of
        Image.open(cells.open(0))
    assert remarks_on(DataSet(splits={"train": replace(split, is_contained=False)}), COLUMNS) == []


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "https://example.org/a.png",
            "image 'https://example.org/a.png' cannot be read (it is a url; download the file",
        ),
        (
            "iVBORw0KGgo" * 900,
            f"image '{('iVBORw0KGgo' * 20)[:200]}...' cannot be read (no file has this name; content",
        ),
        ("a.png", "its image 'a.png' cannot be read (FileNotFoundError: "),
    ],
)
@pytest.mark.parametrize("key", ["", "path", "bytes"])
def test_a_url_and_content_as_text_are_said_to_be_no_files(tmp_path: Path, name: str, says: str, key: str) -> None:
    cell = {"bytes": None, "path": None, key: name} if key else name  # as json files hold the structs of datasets
    split = Split(table=pa.table({"file": [cell]}), source="rows", folder=tmp_path)
    cells = FileCells.of(split, "file", role="image", readable="png")
    with pytest.raises(OSError, match=r"No such file|name too long") as caught:
        Image.open(cells.open(0))
    said = str(cells.unreadable(0, caught.value))
    assert says in said
    assert len(said) < 500


def test_content_in_the_table_names_no_file(tmp_path: Path) -> None:
    assert named_in(tmp_path, [b"12", b"34"]) == {}
