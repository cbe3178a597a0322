# SPDX-License-Identifier: Apache-2.0
"""row_stream, stream, loader: every row of an epoch once, from any place on, by any number of processes."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mirrortune.data.dataset import load_data
from mirrortune.data.files.readers import read_rows
from mirrortune.data.loader import Feed, StreamedExamples
from mirrortune.data.row_stream import Place, RowStream
from mirrortune.data.stream import stream_data
from mirrortune.errors import ConfigError, DataError, NoRowsError
from mirrortune.system.paths import DataPlace
from tests.tiny_models import tiny_tokenizer
from tests.tiny_runs import as_examples

ROWS = [{"text": f"row {i}", "label": None if i % 7 == 0 else str(i % 3)} for i in range(25)]


def write(folder: Path, ending: str, rows: list[dict[str, Any]], pieces: int = 1) -> Path:
    """Tables train-0, train-1, ... of neighbouring rows in a new folder, and one for validation."""
    folder.mkdir()
    bounds = np.linspace(0, len(rows), pieces + 1).astype(int)
    parts = [rows[a:b] for a, b in itertools.pairwise(bounds)]
    for name, part in [*((f"train-{i}", part) for i, part in enumerate(parts)), ("validation", rows[:3])]:
        path, table = folder / f"{name}{ending}", pa.Table.from_pylist(part)
        if ending == ".parquet":
            pq.write_table(table, path, row_group_size=4)
        elif ending == ".arrow":
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
        elif ending == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
        elif ending == ".txt":
            path.write_text("".join(row["text"] + "\n" for row in part), encoding="utf-8")
        else:
            with gzip.open(path, "wt") if ending.endswith(".gz") else path.open("w", newline="") as file:
                writer = csv.writer(file, delimiter="\t" if ".tsv" in ending else ";")
                writer.writerow(["text", "label"])
                writer.writerows([row["text"], row["label"]] for row in part)
    return folder


def opened(path: Path, **settings: Any) -> RowStream:
    """The training split of a folder or file as a stream."""
    given = {"config": None, "revision": None, "encoding": "utf-8", "train_split": "train", "max_eval_rows": None}
    stream = stream_data(DataPlace.parse(str(path)), **{**given, **settings}).require("train", "test").stream
    assert stream is not None
    return stream


def blocks(stream: RowStream, start: Place | None = None, **settings: Any) -> Iterator[tuple[Place, list[str]]]:
    """Places and texts of the blocks of the only process."""
    given = {"rank": 0, "num_ranks": 1, "size": 4, "seed": 5, **settings}
    for place, table in stream.blocks(start=start or Place(), **given):
        yield place, table.column("text").to_pylist()


def epoch(stream: RowStream, number: int = 0, **settings: Any) -> list[str]:
    """Texts of one epoch."""
    found = itertools.takewhile(lambda b: b[0].epoch <= number, blocks(stream, **settings))
    return [text for place, texts in found if place.epoch == number for text in texts]


@pytest.mark.parametrize("ending", [".parquet", ".arrow", ".jsonl", ".csv", ".tsv", ".csv.gz", ".txt"])
def test_a_stream_holds_the_rows_that_reading_gives(tmp_path: Path, ending: str) -> None:
    folder = write(tmp_path / "data", ending, ROWS, pieces=2)
    whole = load_data(DataPlace.parse(str(folder))).require("train", "test").table
    assert opened(folder).head(100).to_pylist() == whole.to_pylist()
    assert opened(folder).head(11).to_pylist() == whole.slice(0, 11).to_pylist()
    assert sorted(epoch(opened(folder))) == sorted(row["text"] for row in ROWS)


def test_a_table_that_is_called_txt_is_not_streamed_as_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text\tlabel\n" + "good\tup\n" * 9, encoding="utf-16")
    with pytest.raises(DataError, match="2 cells separated by tabs"):
        opened(tmp_path / "a.txt", encoding="utf-16")


@pytest.mark.parametrize(("pieces", "num_ranks"), [(1, 1), (3, 1), (1, 2), (4, 2), (3, 2), (2, 5)])
@pytest.mark.parametrize("size", [1, 4, 100])
def test_processes_share_every_row_of_an_epoch_once(tmp_path: Path, pieces: int, num_ranks: int, size: int) -> None:
    stream = opened(write(tmp_path / "data", ".jsonl", ROWS, pieces))
    assert stream.shares_pieces(num_ranks) == (pieces % num_ranks == 0)
    for number in (0, 1):
        found = [epoch(stream, number, rank=rank, num_ranks=num_ranks, size=size) for rank in range(num_ranks)]
        assert sorted(itertools.chain(*found)) == sorted(row["text"] for row in ROWS)


def test_pieces_come_in_another_order_each_epoch_and_by_the_seed(tmp_path: Path) -> None:
    stream = opened(write(tmp_path / "data", ".jsonl", ROWS, pieces=8))
    orders = [epoch(stream, 0), epoch(stream, 1), epoch(stream, 0, seed=6)]
    assert epoch(stream, 0) == orders[0]
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize(("pieces", "num_ranks"), [(1, 1), (3, 1), (4, 2), (3, 2)])
def test_a_stream_goes_on_at_any_block(tmp_path: Path, pieces: int, num_ranks: int) -> None:
    stream = opened(write(tmp_path / "data", ".parquet", ROWS, pieces))
    settings = {"rank": num_ranks - 1, "num_ranks": num_ranks}
    whole = list(itertools.islice(blocks(stream, **settings), 20))
    for done, (place, _) in enumerate(whole):
        rest = list(itertools.islice(blocks(stream, place, **settings), 20 - done))
        assert rest == whole[done:]


def test_what_cannot_be_streamed_is_refused_by_name(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", ".jsonl", ROWS)
    with pytest.raises(ConfigError, match="a stream is not sampled"):
        opened(Path(f"{folder}#5"))
    with pytest.raises(ConfigError, match=r"data\.config: local data has none"):
        opened(folder, config="en")
    with pytest.raises(DataError, match="no file to stream"):
        opened(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="there is no split 'training set'"):
        opened(folder, train_split="training set")
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="a folder of images for each class cannot be streamed"):
        opened(tmp_path / "photos")
    (folder / "train-1.csv").write_text("text\nrow\n")
    with pytest.raises(DataError, match="not of one kind of table"):
        opened(folder)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".jsonl.gz", ".parquet", ".arrow", ".csv", ".txt"])
def test_files_without_rows_are_passed_over_unless_no_other_is_there(tmp_path: Path, ending: str) -> None:
    kind = ".jsonl" if "json" in ending else ending
    folder, texts = write(tmp_path / "data", kind, ROWS), sorted(row["text"] for row in ROWS)
    empty, table = tmp_path / f"train-0{ending}", pa.Table.from_pylist(ROWS[:2]).slice(2)
    empty.write_bytes({".csv": b"text;label\n", ".jsonl.gz": gzip.compress(b"")}.get(ending, b""))
    if ending == ".parquet":
        pq.write_table(table, empty)
    elif ending == ".arrow":
        with pa.OSFile(str(empty), "wb") as sink, pa.ipc.new_stream(sink, table.schema):
            pass
    (folder / f"train-0{kind}").rename(folder / f"train-1{kind}")
    for name in ("train-0", "train-2"):  # the first file determines the columns
        copy = folder / f"{name}{ending}"
        copy.write_bytes(empty.read_bytes())
        assert sorted(epoch(opened(folder))) == texts
        copy.unlink()
    with pytest.raises(DataError, match=f"train-0{ending}: it has no rows"):
        opened(empty)


def test_a_broken_row_is_a_data_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n' * 3 + '{"text": \n')
    with pytest.raises(DataError, match=r"rows\.jsonl: a row or file cannot be read .*without data\.streaming its"):
        list(itertools.islice(blocks(opened(path)), 3))
    assert caplog.text == ""  # datasets would log the same before


@pytest.mark.parametrize(
    "text",
    [
        ",text,label\n0,aa,1\n1,bb,0\n",  # as pandas writes its index
        "text , label\naa,1\n",
        "sep=;\n;text;\n0;aa;5\n",
        "text,label\naa,1,\nbb,2,\n",  # empty cells of spreadsheets
    ],
)
def test_the_columns_of_a_csv_stream_are_those_of_reading(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text)
    assert opened(path).head(9).to_pylist() == read_rows(path)[0].to_pylist()


def test_no_cell_of_a_csv_stream_changes_its_column(tmp_path: Path) -> None:
    folder = tmp_path / "rows[1]"
    folder.mkdir()
    (folder / "train-1.csv").write_text("text,label\naa,1,2\n")
    with pytest.raises(DataError, match="a row has more cells than the header"):
        opened(folder)
    (folder / "train-1.csv").write_text("text,label\naa,1\n")
    (folder / "train-2.csv").write_text("text\nbb\n")
    with pytest.raises(DataError, match=r"train-2\.csv: its header is not that of"):
        opened(folder)
    (folder / "train-1.csv").write_text(",text\n0,aa\n")
    (folder / "train-2.csv").write_text("text,\nbb,1\n")
    with pytest.raises(DataError, match=r"train-2\.csv: its header is not that of"):
        opened(folder)
    (folder / "train-2.csv").write_text("x,label,text\n0,1,bb\n")
    (folder / "train-1.csv").write_text("text,label\naa,1\n")
    assert opened(folder).head(9).to_pylist() == [{"text": "aa", "label": "1"}, {"text": "bb", "label": "1"}]
    (folder / "train-2.csv").unlink()
    (folder / "train-1.csv").write_text("text,x,x\naa,1,2\n")
    assert opened(folder).head(9).column_names == ["text"]


def test_a_stream_is_of_the_named_file_and_of_no_other_that_the_name_would_match(tmp_path: Path) -> None:
    for name, text in (("rows[1].csv", "right"), ("rows1.csv", "wrong")):
        (tmp_path / name).write_text(f"text\n{text}\n")
    assert opened(tmp_path / "rows[1].csv").head(9).to_pylist() == [{"text": "right"}]


def lengths(table: pa.Table, seed: int) -> Any:
    """Examples of as many tokens as the number of the row says, less those of multiples of five; the seed is kept."""
    numbers = [int(text.split()[1]) for text in table.column("text").to_pylist()]
    kept = [number for number in numbers if number % 5]
    if not kept:
        raise NoRowsError("rows", "none is left")
    return as_examples([[5 + number] * (number + 1) for number in kept], tokenizer=tiny_tokenizer())


def feed(stream: RowStream, rank: int = 0, num_ranks: int = 1, **settings: Any) -> Feed:
    """Four rows a step in two micro-batches."""
    accelerator = SimpleNamespace(num_processes=num_ranks, process_index=rank, device=torch.device("cpu"))
    rows = StreamedExamples(stream=stream, encode=lengths, block_rows=settings.pop("block_rows", 8))
    options: dict[str, Any] = {"batch_size": 2, "num_micro": 2, "num_workers": 0, "seed": 3, **settings}
    return Feed(rows, accelerator, **options)


def taken(source: Feed, steps: int) -> list[tuple[list[list[int]], dict[str, int] | None]]:
    """The ids of each micro-batch, and the place behind it."""
    found = []
    for part in source.micro_batches(0, 0, steps):
        found.append(([] if part.is_empty else part.batch["input_ids"].tolist(), source.place))
    return found


def test_batches_of_a_stream_do_not_depend_on_who_makes_them(tmp_path: Path) -> None:
    stream = opened(write(tmp_path / "data", ".jsonl", ROWS, pieces=3))
    assert taken(feed(stream, num_workers=3), 15) == taken(feed(stream), 15)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_feed_of_a_stream_goes_on_behind_any_step(tmp_path: Path, num_ranks: int) -> None:
    stream = opened(write(tmp_path / "data", ".jsonl", ROWS, pieces=3))
    whole = taken(feed(stream, num_ranks - 1, num_ranks), 16)
    for done in range(1, 16):
        rest = feed(stream, num_ranks - 1, num_ranks)
        rest.place = whole[2 * done - 1][1]
        assert taken(rest, 16 - done) == whole[2 * done :]


def test_every_row_that_is_left_is_learned_once_an_epoch(tmp_path: Path) -> None:
    """The block of the rows 20 to 24 alone would not do as a test: here blocks of one row hold nothing at all."""
    stream = opened(write(tmp_path / "data", ".jsonl", ROWS, pieces=3))
    for options in ({"block_rows": 8}, {"block_rows": 1, "batch_size": 1, "num_micro": 1}):
        found: list[int] = []
        for parts, place in taken(feed(stream, **options), 40):
            assert place is not None
            if place["epoch"]:
                break
            found += [row[0] - 5 for row in parts]
        assert sorted(found) == [i for i in range(25) if i % 5]


def test_a_stream_of_nothing_ends(tmp_path: Path) -> None:
    stream = opened(write(tmp_path / "data", ".jsonl", [{"text": "row 5"}]))
    with pytest.raises(DataError, match="blocks in a row hold no usable row"):
        taken(feed(stream), 1)
