# SPDX-License-Identifier: Apache-2.0
"""Files as people keep them: compressed, in several parts, sampled, with the marks and signs of other programs."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mirrortune.data.dataset import load_data
from mirrortune.data.files.readers import read_table
from mirrortune.system.paths import split_sample

TABLE = pa.table({"text": ["a good film", "a bad plot"], "label": ["up", "down"]})
CSV = "text,label\na good film,up\na bad plot,down\n"
JSONL = '{"text": "a good film", "label": "up"}\n{"text": "a bad plot", "label": "down"}\n'


def write_arrow(path: Path, *, stream: bool) -> Path:
    """An Arrow file, in one of its two forms."""
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(path, TABLE.schema) as writer:
        writer.write_table(TABLE)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv.gz", gzip.compress(CSV.encode())),
        ("rows.TSV.GZ", gzip.compress(CSV.replace(",", "\t").encode())),
        ("rows.jsonl.gz", gzip.compress(JSONL.encode())),
        ("rows.csv", b"\xef\xbb\xbf" + CSV.encode()),
        ("rows.csv", CSV.replace("text,label", " text , label ").encode()),
        ("rows.csv", CSV.replace(",", ";").encode()),
        ("rows.csv", CSV.replace(",", "|").replace("\n", "\r\n").encode()),
    ],
)
def test_all_forms_of_a_table_are_the_same(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_table(tmp_path / name).to_pydict() == TABLE.to_pydict()


@pytest.mark.parametrize("stream", [False, True])
def test_arrow_files_of_both_forms(tmp_path: Path, stream: bool) -> None:
    assert read_table(write_arrow(tmp_path / "rows.arrow", stream=stream)).equals(TABLE)


def test_lines_of_text_are_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("one\n\ntwo, and more\n", encoding="utf-8")
    assert read_table(tmp_path / "rows.txt").to_pydict() == {"text": ["one", "two, and more"]}


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "cp1252"])
def test_other_encodings(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "rows.csv").write_bytes("text,label\ncafé,up\n".encode(encoding))
    assert read_table(tmp_path / "rows.csv", encoding).to_pydict() == {"text": ["café"], "label": ["up"]}


def test_a_folder_of_compressed_parts_has_its_splits(tmp_path: Path) -> None:
    for part in range(2):
        (tmp_path / f"train-0000{part}-of-00002.csv.gz").write_bytes(gzip.compress(CSV.encode()))
    (tmp_path / "dev.jsonl.gz").write_bytes(gzip.compress(JSONL.encode()))
    data = load_data(str(tmp_path))
    assert {name: split.table.num_rows for name, split in data.splits.items()} == {"train": 4, "validation": 2}


def test_a_pattern_is_all_its_files_in_order(tmp_path: Path) -> None:
    for name, word in (("b", "second"), ("a", "first")):
        (tmp_path / f"rows-{name}.csv").write_text(f"text,label\n{word},up\n", encoding="utf-8")
    data = load_data(str(tmp_path / "rows-*.csv"))
    train = data.require("train", "test")
    assert train.table.column("text").to_pylist() == ["first", "second"]
    assert len(data.origin["sha256"]) == 2


def test_a_number_behind_it_takes_that_many_training_rows(tmp_path: Path) -> None:
    lines = "".join(f"film {i},up\n" for i in range(50))
    for name in ("train.csv", "validation.csv"):
        (tmp_path / name).write_text(f"text,label\n{lines}", encoding="utf-8")

    def rows(number: Any) -> list[str]:
        data = load_data(f"{tmp_path}#{number}")
        assert data.require("validation", "test").table.num_rows == 50
        return list(data.require("train", "test").table.column("text").to_pylist())

    assert len(rows(12)) == 12
    assert rows(12) == rows(12)
    assert len(rows(500)) == 50
    assert split_sample("a#b") == ("a#b", None)
