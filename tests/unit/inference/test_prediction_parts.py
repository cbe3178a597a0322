# SPDX-License-Identifier: Apache-2.0
"""Tables of predictions that are not whole: their parts, and what may be replaced or continued."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mirrortune.errors import ConfigError, DataError, ResourceError
from mirrortune.inference.prediction_file import (
    check_united,
    format_of,
    holds_predictions,
    refuse_replacing,
)
from mirrortune.inference.prediction_parts import Parts
from mirrortune.system.atomic import MARKER


def parts_of(output: Path, tables: list[pa.Table]) -> Parts:
    parts, first = Parts(output), 0
    parts.begin({"rows": 3}, overwrite=False)
    for table in tables:
        parts.add(first, table)
        first += table.num_rows
    return parts


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_parts_whose_columns_differ_are_joined(tmp_path: Path, name: str) -> None:
    """A part has what another lacks, and types that the first rows did not show."""
    tables = [
        pa.table({"text": ["a"], "prediction": pa.nulls(1), "error": ["bad"]}),
        pa.table({"text": ["b"], "prediction": ["yes"], "score": [1], "spans": [[{"word": "b", "tag": "X"}]]}),
        pa.table({"text": ["c"], "own": ["d"], "prediction": ["no"], "score": [0.5], "error": pa.nulls(1)}),
    ]
    parts = parts_of(tmp_path / name, tables)
    for output in (name, "another.csv"):
        (tmp_path / f".{output}.mt-ab12cd34.partial").write_text("te")  # a process was killed while it joined them
    assert parts.join(own=["text", "own"], last="error") == 1
    assert {path.name for path in tmp_path.iterdir()} == {name, ".another.csv.mt-ab12cd34.partial"}
    path = tmp_path / name
    rows: list[dict[str, object]]
    if name.endswith("parquet"):
        rows = pq.read_table(path).to_pylist()
    elif name.endswith("jsonl"):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    else:
        rows = [*csv.DictReader(path.read_text(encoding="utf-8").splitlines())]
    assert list(rows[0]) == ["text", "own", "prediction", "score", "spans", "error"]
    empty = "" if name.endswith("csv") else None
    assert [row["prediction"] for row in rows] == [empty, "yes", "no"]
    assert [row["own"] for row in rows] == [empty, empty, "d"]
    assert float(str(rows[2]["score"])) == 0.5


def test_numbers_of_two_types_are_one_column_of_a_parquet_file(tmp_path: Path) -> None:
    tables = [pa.table({"id": [1], "prediction": ["yes"]}), pa.table({"id": [1.5], "prediction": ["no"]})]
    check_united([("a.csv", tables[0].schema), ("b.csv", tables[1].schema)])
    parts_of(tmp_path / "a.parquet", tables).join(own=["id"], last="error")
    assert pq.read_table(tmp_path / "a.parquet").column("id").to_pylist() == [1.0, 1.5]
    tables[0] = pa.table({"id": [2**53 + 1], "prediction": ["yes"]})
    with pytest.raises(DataError, match="column 'id': it cannot be double in all rows"):
        parts_of(tmp_path / "b.parquet", tables).join(own=["id"], last="error")


def test_only_what_predict_wrote_is_replaced(tmp_path: Path) -> None:
    table = pa.table({"text": ["a"], "prediction": ["b"]})
    others = {"csv": b"text,predictions\n", "tsv": b"", "jsonl": b'["prediction"', "parquet": b"PAR1"}
    for kind, content in others.items():
        mine, other = tmp_path / f"mine.{kind}", tmp_path / f"other.{kind}"
        parts_of(mine, [table]).join(own=["text"], last="error")
        other.write_bytes(content)
        assert holds_predictions(mine, kind)
        assert not holds_predictions(other, kind)
        refuse_replacing(mine, kind, overwrite=True)
        for path, overwrite in ((mine, False), (other, True), (other, False)):
            with pytest.raises(ConfigError):
                refuse_replacing(path, kind, overwrite=overwrite)
    assert format_of(Path("A.CSV")) == "csv"


def test_the_folder_of_parts_is_ours_or_left_alone(tmp_path: Path) -> None:
    parts = parts_of(tmp_path / "a.csv", [pa.table({"prediction": ["a", "b"]})])
    assert parts.rows() == 2
    assert {path.name for path in parts.folder.iterdir()} == {
        MARKER, "state.json", "rows-000000000000-000002.arrow",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="holds 2 predicted rows"):
        parts.begin({}, overwrite=False)
    with pytest.raises(ConfigError, match=r"rows \(3 before, 4 now\)"):
        parts.resume({"rows": 4})
    assert parts.resume({"rows": 3}) == 2
    (parts.folder / "notes.txt").write_text("mine")
    parts.discard()
    assert {path.name for path in parts.folder.iterdir()} == {MARKER, "notes.txt"}, "somebody's own file stays"
    (parts.folder / MARKER).unlink()
    with pytest.raises(ConfigError, match="is in the way"):
        parts.begin({}, overwrite=True)


def test_parts_that_were_not_begun_are_begun_again(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "a.csv")
    parts.folder.mkdir()
    (parts.folder / f".{MARKER}.mt-ab12cd34.partial").write_text('{"vers')  # the process was killed there
    parts.begin({}, overwrite=False)

    assert {path.name for path in parts.folder.iterdir()} == {MARKER, "state.json"}
    parts.discard()
    parts.folder.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="is in the way"):
        parts.begin({}, overwrite=True)


def test_what_differs_is_named_in_words(tmp_path: Path) -> None:
    digests = [char * 64 for char in "ab"]
    facts = [
        {"data": {"sha256": {"rows.csv": digest}}, "options": {"top": top}, "encoding": "utf-8"}
        for digest, top in zip(digests, (None, 2), strict=True)
    ]
    parts = Parts(tmp_path / "a.csv")
    parts.begin(facts[0], overwrite=False)

    with pytest.raises(ConfigError) as caught:
        parts.resume(facts[1])
    assert "were made otherwise: data: rows.csv has changed; options: top (not given before, 2 now)." in str(
        caught.value
    )


def test_rows_of_an_earlier_version_are_not_continued(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "a.csv")
    parts.begin({"task": {"kind": "causal-lm", "version": 2}}, overwrite=False)
    with pytest.raises(
        ConfigError,
        match=r"task: another version of mirrortune read the rows \(version 2 of its code before, 3 now\)\. "
        r"Continue with that version, or start over with --overwrite",
    ):
        parts.resume({"task": {"kind": "causal-lm", "version": 3}})
    parts.begin({"version of mirrortune": "0.1"}, overwrite=True)
    with pytest.raises(ConfigError, match=r"version of mirrortune \(0\.1 .*\)\. Continue with that version, or"):
        parts.resume({"version of mirrortune": "0.2"})


def test_parts_that_cannot_be_begun_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise ResourceError("state.json", "cannot be written (the disk is full)")

    monkeypatch.setattr(Parts, "_write_state", full)
    with pytest.raises(ResourceError, match="the disk is full"):
        Parts(tmp_path / "a.csv").begin({}, overwrite=False)
    assert [*tmp_path.iterdir()] == []


def test_rows_after_a_missing_part_do_not_count(tmp_path: Path) -> None:
    table = pa.table({"prediction": ["a", "b"]})
    parts = parts_of(tmp_path / "a.csv", [table, table, table])
    (parts.folder / "rows-000000000002-000002.arrow").unlink()
    assert parts.resume({"rows": 3}) == 2


@pytest.mark.parametrize("kept", [0, 40, -20])
def test_a_damaged_part_is_made_again(tmp_path: Path, kept: int) -> None:
    table = pa.table({"prediction": ["a", "b"]})
    parts = parts_of(tmp_path / "a.csv", [table, table])
    damaged = parts.folder / "rows-000000000002-000002.arrow"
    damaged.write_bytes(damaged.read_bytes()[:kept])

    assert parts.resume({"rows": 3}) == 2

    parts.add(2, table)
    parts.join(own=[], last="error")
    assert (tmp_path / "a.csv").read_text() == "prediction\na\nb\na\nb\n"


def test_a_damaged_record_of_the_parts_is_said(tmp_path: Path) -> None:
    parts = parts_of(tmp_path / "a.csv", [pa.table({"prediction": ["a"]})])
    (parts.folder / "state.json").write_text("{")
    with pytest.raises(ConfigError, match=r"is damaged. Start over with --overwrite"):
        parts.resume({"rows": 3})
    (parts.folder / "state.json").write_text('{"facts": {"bank": [1]}}')
    with pytest.raises(ConfigError, match=r"made otherwise: bank\. "):
        parts.resume({"bank": {"1/adapter.json": ["a"]}})
    parts.begin({"rows": 3}, overwrite=True)


def test_a_full_disk_keeps_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"prediction": ["a"]})
    parts = parts_of(tmp_path / "a.csv", [table])

    def full(*args: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("pyarrow.OSFile", full)
        with pytest.raises(ResourceError, match=r"the disk is full.*continue with --resume") as failure:
            parts.add(1, table)
    assert failure.value.where == str(tmp_path / "a.csv")
    assert parts.resume({"rows": 3}) == 1
    assert sorted(path.name for path in parts.folder.iterdir())[1:] == ["rows-000000000000-000001.arrow", "state.json"]
