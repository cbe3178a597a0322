# SPDX-License-Identifier: Apache-2.0
"""Tables larger than a limit lie on disk and are the same tables; files are read part by part."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mirrortune.data.files.arrow import refuse_unreadable
from mirrortune.data.files.readers import read_table
from mirrortune.data.files.tables import join_parts, take_rows
from mirrortune.errors import DataError, ResourceError
from mirrortune.system.paths import cache_folder


def parts(count: int, rows: int = 2000) -> Iterator[pa.Table]:
    """Tables of text and numbers, some cells null."""
    for number in range(count):
        texts = [f"row {number * rows + i} " * 8 if i % 7 else None for i in range(rows)]
        yield pa.table({"text": texts, "label": list(range(rows))})


def test_what_is_too_large_for_memory_is_on_disk_and_equal() -> None:
    before = pa.total_allocated_bytes()
    large = join_parts(parts(16), limit=200_000)
    held = pa.total_allocated_bytes() - before

    assert large.equals(join_parts(parts(16)))
    assert large.nbytes > 1_000_000
    assert held < 400_000, "two parts at most are held"
    assert list(cache_folder().iterdir()) == [], "the file has no name"


def test_rows_are_taken_without_holding_them_all() -> None:
    large = join_parts(parts(8), limit=100_000)
    keep = np.random.default_rng(0).random(large.num_rows) < 0.5

    assert take_rows(large, keep, limit=100_000).equals(large.filter(pa.array(keep)))


def test_a_cache_that_cannot_be_written_is_said() -> None:
    cache_folder().parent.mkdir(parents=True, exist_ok=True)
    cache_folder().write_text("in the way")

    with pytest.raises(ResourceError, match="cannot be written"):
        join_parts(parts(3), limit=1000)


def write_lines(path: Path, early: object, late: object, rows: int = 65_537) -> Path:
    """JSON lines, of which the last differs; more than are read at a time."""
    lines = [json.dumps(early)] * (rows - 1) + [json.dumps(late)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("early", "late", "kind"),
    [
        ({"a": None}, {"a": "x"}, pa.string()),
        ({"a": 1}, {"a": 1.5}, pa.float64()),
        ({"a": []}, {"a": ["x"]}, pa.list_(pa.string())),
        ({"b": 1}, {"a": "x", "b": 1}, pa.string()),
        ({"a": {"role": "x"}}, {"a": {"role": "x", "name": "y"}}, None),
    ],
)
def test_a_type_may_show_late(tmp_path: Path, early: object, late: dict[str, object], kind: pa.DataType) -> None:
    table = read_table(write_lines(tmp_path / "a.jsonl", early, late))

    assert table.num_rows == 65_537
    assert table.column("a")[-1].as_py() == late["a"]
    assert kind in (None, table.schema.field("a").type)


@pytest.mark.parametrize(
    ("late", "says"),
    [
        ({"a": "x"}, "a.jsonl: column 'a' mixes types (int64 and string)"),
        ([1], "a.jsonl:65537: got list"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, late: object, says: str) -> None:
    with pytest.raises(DataError) as caught:
        refuse_unreadable(read_table(write_lines(tmp_path / "a.jsonl", {"a": 1}, late)), ["a"])

    assert says in str(caught.value)


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_a_byte_that_is_wrong_far_behind_has_its_place(tmp_path: Path, name: str) -> None:
    import gzip

    good = b"text,label\n" + ("é" * 20 + ",1\n").encode() * 30_000
    path = tmp_path / name
    path.write_bytes(gzip.compress(good + b"\xe9,1\n", 1) if name.endswith(".gz") else good + b"\xe9,1\n")

    with pytest.raises(DataError, match=rf":30002: byte 0xe9 at offset {len(good)} is not utf-8"):
        read_table(path)


def test_long_cells_of_parquet_are_read_some_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "images.parquet"
    draw = np.random.default_rng(0)
    pq.write_table(pa.table({"image": [draw.bytes(1_000_000) for _ in range(40)]}), path)

    table = read_table(path)

    assert max(len(chunk) for chunk in table.column("image").chunks) <= 16
