# SPDX-License-Identifier: Apache-2.0
"""Files as people keep them (compressed, in parts, sampled), and small ones that expand to more than a disk holds."""

from __future__ import annotations

import gzip
import io
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from mirrortune.data.dataset import Split, load_data
from mirrortune.data.files import json_files, tables, text_files
from mirrortune.data.files.audio import AudioReader, encode_audio, read_part, resample
from mirrortune.data.files.readers import read_table
from mirrortune.errors import DataError, ResourceError
from mirrortune.models.load import find_model
from mirrortune.system.paths import DataPlace, split_sample
from tests.tiny_models import write_tiny_audio

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
    data = load_data(DataPlace.parse(str(tmp_path)))
    assert {name: split.table.num_rows for name, split in data.splits.items()} == {"train": 4, "validation": 2}


def test_a_pattern_is_all_its_files_in_order(tmp_path: Path) -> None:
    for name, word in (("b", "second"), ("a", "first")):
        (tmp_path / f"rows-{name}.csv").write_text(f"text,label\n{word},up\n", encoding="utf-8")
    data = load_data(DataPlace.parse(str(tmp_path / "rows-*.csv")))
    train = data.require("train", "test")
    assert train.table.column("text").to_pylist() == ["first", "second"]
    assert len(data.origin["sha256"]) == 2


def test_a_number_behind_it_takes_that_many_training_rows(tmp_path: Path) -> None:
    lines = "".join(f"film {i},up\n" for i in range(50))
    for name in ("train.csv", "validation.csv"):
        (tmp_path / name).write_text(f"text,label\n{lines}", encoding="utf-8")

    def rows(number: Any) -> list[str]:
        data = load_data(DataPlace.parse(f"{tmp_path}#{number}"))
        assert data.require("validation", "test").table.num_rows == 50
        return list(data.require("train", "test").table.column("text").to_pylist())

    assert len(rows(12)) == 12
    assert rows(12) == rows(12)
    assert len(rows(500)) == 50
    assert split_sample("a#b") == ("a#b", None)


def wav(samples: np.ndarray, rate: int) -> io.BytesIO:
    """A recording in memory."""
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format="WAV", subtype="FLOAT")
    stream.seek(0)
    return stream


@pytest.mark.parametrize("rate", [16000, 8000, 44100, 22050, 11025, 1000, 1, 16001])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_part_is_the_part_of_the_whole(rate: int, channels: int) -> None:
    seconds = 40.0 if rate <= 1000 else 3.0
    noise = np.random.default_rng(0).normal(size=(round(seconds * rate), channels)).astype(np.float32)
    whole = resample(noise.mean(axis=1), rate, 16000)
    for first, count in ((0, 1000), (777, 16000), (len(whole) - 1600, 1600), (len(whole) - 10, 100), (0, 10**9)):
        with soundfile.SoundFile(wav(noise, rate)) as file:
            part = read_part(file, first, count, 16000)
        np.testing.assert_allclose(part, whole[first : first + count], atol=2e-5)


def test_a_recording_of_1_hertz_is_cut_before_it_is_resampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = AudioReader.load(find_model(str(write_tiny_audio(tmp_path / "audio"))), 0.5)
    slow = wav(np.random.default_rng(0).normal(size=100_000), 1).getvalue()  # 28 hours; 6 GB at the model's rate
    rows = Split(table=pa.table({"audio": [slow]}), source="rows.parquet")
    targets = np.zeros(1, dtype=np.int64)
    found = encode_audio(rows, "audio", targets, targets < 0, reader, seed=0)
    resampled: list[int] = []
    monkeypatch.setattr(
        "mirrortune.data.files.audio.resample", lambda s, *rates: resampled.append(len(s)) or resample(s, *rates)
    )
    for epoch in (None, 0):
        assert found.batch(np.array([0]), epoch)["input_values"].shape == (1, 8000)
    assert max(resampled) < 50
    assert found.num_truncated == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (wav(np.zeros(10), 2_000_000).getvalue(), r"it has 2,000,000 samples a second, allowed are 1 to 1,000,000"),
        (b"RIFF" + bytes(60), "cannot be read"),
        (wav(np.zeros(0), 16000).getvalue(), "it has no samples"),
    ],
)
def test_odd_recordings_name_their_row(tmp_path: Path, content: bytes, says: str) -> None:
    reader = AudioReader.load(find_model(str(write_tiny_audio(tmp_path / "audio"))), 0.5)
    rows = Split(table=pa.table({"audio": [content]}), source="rows.parquet")
    targets = np.zeros(1, dtype=np.int64)
    with pytest.raises(DataError, match=rf"rows\.parquet row 1: .*{says}"):
        encode_audio(rows, "audio", targets, targets < 0, reader, seed=0).batch(np.array([0]))


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk of 100 GB of which 0.5 GB are free."""
    usage = SimpleNamespace(total=100 * 10**9, free=5 * 10**8)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("suffix", [".parquet.gz", ".arrow.gz"])
def test_what_an_archive_unpacks_to_does_not_fill_the_disk(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(3):
            file.write(bytes(1 << 24))
    assert path.stat().st_size < 1 << 18
    with pytest.raises(ResourceError, match=rf"477 MiB are left, and what .*rows{suffix} unpacks to would go on"):
        read_table(path)


@pytest.mark.usefixtures("full_disk")
def test_small_archives_and_rows_that_go_to_disk(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b"]})
    stream = io.BytesIO()
    pq.write_table(table, stream)
    (tmp_path / "rows.parquet.gz").write_bytes(gzip.compress(stream.getvalue()))
    assert read_table(tmp_path / "rows.parquet.gz").equals(table)
    with pytest.raises(ResourceError, match="the data that is being read would go on to fill it"):
        tables.join_parts([table, table], limit=1)


@pytest.mark.parametrize("name", ["rows.csv.gz", "rows.txt.gz", "rows.jsonl.gz"])
def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(text_files, "_LONGEST", 1 << 16)
    (tmp_path / name).write_bytes(gzip.compress(b"1\n" + b"x" * (1 << 17)))
    with pytest.raises(DataError, match=rf"{name}:2: a line of more than 65,536 characters"):
        read_table(tmp_path / name)


def test_a_json_array_too_large_to_parse_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "_LARGEST_ARRAY", 1 << 16)
    (tmp_path / "my rows.json.gz").write_bytes(gzip.compress(b'[{"text": "' + b"x" * (1 << 24)))
    says = r"a JSON array of more than 65,536 characters\. .*: gzip -dc 'my rows\.json\.gz' \| jq -c '\.\[\]'"
    with pytest.raises(DataError, match=says):
        read_table(tmp_path / "my rows.json.gz")
