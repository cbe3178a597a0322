# SPDX-License-Identifier: Apache-2.0
"""Rows of several sources in one table or stream: their columns, labels, lines and places."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mirrortune.data.dataset import DataSet, Split
from mirrortune.data.files.arrow import json_array, python_values
from mirrortune.data.files.row_places import FileRows
from mirrortune.data.mixture import (
    SOURCE_COLUMN,
    Adjustment,
    LabelValues,
    MixedStream,
    check_labels_match,
    joined_data,
    joined_splits,
    label_notes,
    strata_of_sources,
    united_names,
)
from mirrortune.data.row_stream import Place, RowStream
from mirrortune.data.stream import stream_data
from mirrortune.errors import DataError
from mirrortune.system.paths import DataPlace


def part(number: int, **columns: object) -> Split:
    table = Adjustment(number=number).table(pa.table(columns))
    rows = FileRows(name=f"{number}.csv", count=table.num_rows, lines=np.arange(table.num_rows) + 2)
    return Split(table=table, source=f"{number}.csv", files=(rows,))


def test_joined_rows_know_their_source_and_their_line() -> None:
    first, second = part(0, text=["a", "b", "c"]), part(1, text=["d", "e"], extra=[1, 2])
    joined = joined_splits([first.take(np.array([True, False, True])), second])
    assert joined.table.column(SOURCE_COLUMN).to_pylist() == [0, 0, 1, 1]
    assert joined.table.column("extra").to_pylist() == [None, None, 1, 2]
    assert [joined.places.where(row) for row in range(4)] == ["0.csv:2", "0.csv:4", "1.csv:2", "1.csv:3"]
    assert joined.take(np.array([False, True, False, True])).places.listed([0, 1]) == "0.csv:4, 1.csv:3"


def test_objects_of_different_forms_keep_their_own_keys() -> None:
    tools = [[{"name": "clock", "parameters": {"zone": "text"}}], [{"name": "sum", "parameters": {"of": ["number"]}}]]
    lists = part(0, tools=pa.array([[{"name": "clock", "parameters": {"zone": "text"}}]]))
    objects, texts = part(1, tools=json_array([tools[1]])), part(2, tools=['[{"name": "x"}]'])
    joined = joined_splits([lists, objects, texts])
    assert python_values(joined.table.column("tools")) == [*tools, '[{"name": "x"}]']


def test_numbers_of_classes_become_their_names() -> None:
    change = Adjustment(number=0, names={"sentiment": "label"}, features={"label": ("neg", "pos")})
    found = change.table(pa.table({"sentiment": [1, 0, -1]}))
    assert found.column("label").to_pylist() == ["pos", "neg", None]
    tags = change.table(pa.table({"sentiment": [[1, 0], [], [-1, -1]]}))
    assert tags.column("label").to_pylist() == [["pos", "neg"], [], None]


def labels(name: str, values: list[object], features: tuple[str, ...] | None = None) -> LabelValues:
    found = LabelValues.of(pa.table({"label": values}), "label", name)
    return found if features is None else replace(found, features=features, names=features, kind="text")


def test_labels_of_two_types_are_refused_with_both_sources() -> None:
    with pytest.raises(DataError, match=r"a.csv and b.csv: the labels of one are text \(neg, pos; column 'label'\)"):
        check_labels_match([labels("a.csv", ["pos", "neg"]), labels("b.csv", ["0", "1"])])
    with pytest.raises(DataError, match="those of the other lists"):
        check_labels_match([labels("a.csv", ["pos", "neg"]), labels("b.csv", [["pos"], []])])
    check_labels_match([labels("a.csv", ["0", "1"]), labels("b.csv", [1, 2]), labels("c.csv", [None])])


def test_classes_are_united_and_said() -> None:
    known = [labels("a", ["pos", "neg"]), labels("b", ["pos", "neutral"])]
    assert united_names(known) is None
    said = "classes united: 2 of a (neg, pos); 2 of b (neutral, pos); 3 together, 1 in all of them"
    assert label_notes(known) == [said]
    assert label_notes(known[:1] * 2) == []
    # The order of a data set's own list is kept, and its classes without rows are, too.
    assert united_names([labels("a", ["x", "pos"]), labels("b", [], ("pos", "neg"))]) == ("pos", "neg", "x")


def test_groups_are_of_a_source_and_a_class() -> None:
    table = pa.table({SOURCE_COLUMN: [0, 0, 1, 1]})
    found = strata_of_sources(table, np.array([5, 7, 5, 5]))
    assert found is not None
    assert len(set(found.tolist())) == 3
    assert found[2] == found[3]
    assert strata_of_sources(pa.table({"text": ["a"]}), None) is None


def streamed(folder: Path, name: str, rows: int, number: int) -> RowStream:
    """A stream of two files of rows that say their source."""
    place = folder / name
    place.mkdir()
    texts = [{"text": f"{name}{row}"} for row in range(rows)]
    for file, own in (("train-0", texts[: rows // 2]), ("train-1", texts[rows // 2 :])):
        (place / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own), encoding="utf-8")
    given = {"config": None, "revision": None, "encoding": "utf-8", "train_split": "train", "max_eval_rows": None}
    stream = stream_data(DataPlace.parse(str(place)), **given).require("train", "test").stream  # type: ignore[arg-type]
    assert stream is not None
    return replace(stream, flatten=Adjustment(number=number).table)


def blocks(stream: RowStream, count: int, start: Place = Place(), **ranks: int) -> list[tuple[Place, list[str]]]:  # noqa: B008
    known = {"rank": 0, "num_ranks": 1, **ranks}
    found = stream.blocks(size=6, seed=3, start=start, **known)
    return [(place, table.column("text").to_pylist()) for place, table in itertools.islice(found, count)]


def test_a_block_of_mixed_streams_has_its_share_of_each_and_begins_again_anywhere(tmp_path: Path) -> None:
    mixed = MixedStream.of([streamed(tmp_path, "a", 7, 0), streamed(tmp_path, "b", 30, 1)], (2, 1))
    found = blocks(mixed, 12)
    for _, texts in found:
        assert [text[0] for text in texts] == ["a"] * 4 + ["b"] * 2
    assert sorted(text for _, texts in found[:7] for text in texts[:4])[::4] == sorted(f"a{i}" for i in range(7))
    for number in (1, 4, 9):
        place = Place.from_dict(json.loads(json.dumps(found[number][0].to_dict())))
        assert blocks(mixed, 3, place) == found[number : number + 3]
    seeds = {place.seed(0) for place, _ in found}
    assert len(seeds) == len(found)


def test_processes_share_the_rows_of_mixed_streams(tmp_path: Path) -> None:
    mixed = MixedStream.of([streamed(tmp_path, "a", 8, 0), streamed(tmp_path, "b", 12, 1)], (1, 1))
    for ranks in (2, 3):  # files of its own for each process; every n-th row of all
        shares = [blocks(mixed, 1, rank=rank, num_ranks=ranks)[0][1] for rank in range(ranks)]
        assert len({text for share in shares for text in share}) == 6 * ranks - (ranks == 3)


def test_the_place_in_a_single_stream_is_written_as_before() -> None:
    assert Place(epoch=1, row=2).to_dict() == {"epoch": 1, "piece": 0, "row": 2, "batch": 0}
    assert Place.from_dict({"epoch": 1, "piece": 0, "row": 2, "batch": 0}) == Place(epoch=1, row=2)


@pytest.mark.parametrize(
    ("first", "second", "joint"),
    [
        (["train", "validation"], ["training", "dev"], {"train": 2, "validation": 2}),
        (["train", "dev"], ["train", "dev"], {"train": 2, "dev": 2}),
        (["train", "validation", "dev"], ["train", "dev"], {"train": 2, "validation": 1, "dev": 2}),
    ],
)
def test_splits_of_one_meaning_are_joined(first: list[str], second: list[str], joint: dict[str, int]) -> None:
    parts = [
        DataSet(splits={name: Split(table=pa.table({"text": [name]}), source=f"{part} {name}") for name in names})
        for part, names in (("a", first), ("b", second))
    ]
    found = joined_data(parts, [lambda split: split] * 2, [1.0, 1.0], None)
    assert {name: split.table.num_rows for name, split in found.splits.items()} == joint
    for name in {*first, *second}:
        wanted = found.find(name)
        assert wanted is not None
        assert name in wanted.table.column("text").to_pylist()
