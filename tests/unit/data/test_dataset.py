# SPDX-License-Identifier: Apache-2.0
"""Data sets from files and folders, their hashes, and validation rows set aside."""

from __future__ import annotations

import gzip
import hashlib
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from mirrortune.data.dataset import DataSet, Split, flat, load_data, set_aside
from mirrortune.data.duplicates import rows_in_both
from mirrortune.data.files.arrow import refuse_unreadable
from mirrortune.data.files.splits import matching_files
from mirrortune.data.labels import feature_names, names_in
from mirrortune.data.stream import stream_data
from mirrortune.errors import ConfigError, DataError
from mirrortune.system.paths import DataPlace

CSV = "text,label\na,x\nb,y\n"


def write(path: Path, text: str = CSV) -> Path:
    """A text file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_is_a_training_split_with_its_hash(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv")

    data = load_data(DataPlace.parse(str(path)))

    assert list(data.splits) == ["train"]
    assert data.splits["train"].source == str(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert data.origin == {"path": str(path), "sha256": {"rows.csv": digest}}


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        ("train.csv validation.csv test.csv", {"train": 2, "validation": 2, "test": 2}),
        ("training.tsv dev.jsonl", {"train": 2, "validation": 2}),
        ("Train.CSV val.csv testing.csv notes.csv", {"train": 2, "validation": 2, "test": 2}),
        ("train-00000-of-00002.parquet train-00001-of-00002.parquet valid.csv", {"train": 4, "validation": 2}),
        ("train_1.csv train_2.csv", {"train": 4}),
        ("test.csv", {"test": 2}),
    ],
)
def test_a_folder_has_the_splits_that_its_files_are_named_after(
    tmp_path: Path, files: str, splits: dict[str, int]
) -> None:
    for name in files.split():
        kind = Path(name).suffix.lower()
        if kind == ".parquet":
            pq.write_table(pa.table({"text": ["a", "b"], "label": ["x", "y"]}), tmp_path / name)
        else:
            rows = {".tsv": CSV.replace(",", "\t"), ".jsonl": '{"text": "a", "label": "x"}\n' * 2}.get(kind, CSV)
            write(tmp_path / name, rows)

    data = load_data(DataPlace.parse(str(tmp_path)))

    assert {name: split.table.num_rows for name, split in data.splits.items()} == splits
    assert len(data.origin["sha256"]) == len([n for n in files.split() if n != "notes.csv"])


def test_splits_answer_to_their_usual_other_names(tmp_path: Path) -> None:
    write(tmp_path / "train.csv")
    write(tmp_path / "dev.csv")
    data = load_data(DataPlace.parse(str(tmp_path)))

    assert data.find("validation") is data.splits["validation"]
    assert data.find("test") is None
    with pytest.raises(DataError) as caught:
        data.require("trian", "--split")
    assert str(caught.value) == (
        "--split: there is no split 'trian'. Did you mean 'train'? Allowed: validation, train."
    )


def test_a_folder_without_any_split_says_what_it_holds(tmp_path: Path) -> None:
    write(tmp_path / "rows.csv")

    with pytest.raises(DataError, match=r"no train, validation or test file; it holds rows\.csv.*Rename the files"):
        load_data(DataPlace.parse(str(tmp_path)))


def saved(folder: Path, **splits: dict[str, list[Any]]) -> None:
    """What ``save_to_disk`` of the datasets library writes."""
    import datasets

    parts = {name: datasets.Dataset.from_dict(rows) for name, rows in splits.items()}
    labelled = {n: p.cast_column("label", datasets.ClassLabel(names=["no", "yes"])) for n, p in parts.items()}
    (datasets.DatasetDict(labelled) if len(labelled) > 1 else labelled["train"]).save_to_disk(folder)


def test_what_the_datasets_library_saved_is_read(tmp_path: Path) -> None:
    rows: dict[str, list[Any]] = {"text": ["a", "b", "c"], "label": [0, 1, 1]}
    saved(tmp_path / "one", train=rows)
    saved(tmp_path / "two", train=rows, test={"text": ["d"], "label": [1]})

    one, two = load_data(DataPlace.parse(str(tmp_path / "one"))), load_data(DataPlace.parse(str(tmp_path / "two")))

    assert one.splits["train"].table.to_pydict() == rows
    assert feature_names(one.splits["train"].table, "label") == ("no", "yes")
    assert {name: split.table.num_rows for name, split in two.splits.items()} == {"train": 3, "test": 1}
    assert len(two.origin["sha256"]) == 2
    assert two.splits["test"].places.where(0).endswith("two/test/data-00000-of-00001.arrow row 1")


def test_what_was_saved_and_damaged_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "one", train={"text": ["a"], "label": [0]})
    next((tmp_path / "one").glob("*.arrow")).unlink()
    with pytest.raises(DataError, match=r"one: data-00000-of-00001\.arrow is missing\. Copy the whole folder"):
        load_data(DataPlace.parse(str(tmp_path / "one")))
    for content in ("{", "[" * 100_000):
        (tmp_path / "one" / "state.json").write_text(content)
        with pytest.raises(DataError, match=r"state\.json: it cannot be read"):
            load_data(DataPlace.parse(str(tmp_path / "one")))


def test_files_of_one_split_must_go_together(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), tmp_path / "train-0.parquet")
    pq.write_table(pa.table({"text": ["a"], "label": ["x"]}), tmp_path / "train-1.parquet")

    table = load_data(DataPlace.parse(str(tmp_path))).splits["train"].table

    assert table.column("text").to_pylist() == ["a", "a"]
    with pytest.raises(DataError, match=r"train: column 'label' mixes types \(int64 and string\)"):
        refuse_unreadable(table, ["label"])


@pytest.mark.parametrize("setting", ["config", "revision"])
def test_local_data_has_no_settings_of_the_hub(tmp_path: Path, setting: str) -> None:
    with pytest.raises(ConfigError, match=f"^data.{setting}: local data has none, got 'x'. Remove it"):
        load_data(DataPlace.parse(str(write(tmp_path / "rows.csv"))), **{setting: "x"})


@pytest.mark.parametrize("name", ["nowhere.csv", "./nowhere", "/nowhere/at/all", "~/no-such-folder-of-mine"])
def test_what_can_only_be_a_path_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_data(DataPlace.parse(name))


def rows_of(split: Split) -> list[int]:
    """The numbers of a split's rows."""
    return [int(n) for n in split.table.column("n").to_pylist()]


GROUPS = st.lists(st.integers(0, 3), min_size=2, max_size=60)


@given(GROUPS, st.floats(0.01, 0.99), st.integers(0, 2**32 - 1))
def test_rows_set_aside_are_the_same_for_a_seed_and_in_proportion(groups: list[int], share: float, seed: int) -> None:
    split = Split(table=pa.table({"n": list(range(len(groups)))}), source="rows")
    strata = np.array(groups)

    train, validation = set_aside(split, share, seed, strata)

    assert rows_of(train) == sorted(rows_of(train))
    assert rows_of(validation) == sorted(rows_of(validation))
    assert sorted(rows_of(train) + rows_of(validation)) == list(range(len(groups)))
    assert rows_of(train)
    assert rows_of(validation)
    again = set_aside(split, share, seed, strata)
    assert [rows_of(part) for part in again] == [rows_of(train), rows_of(validation)]
    for group in np.unique(strata):
        members = int((strata == group).sum())
        held = int((strata[rows_of(validation)] == group).sum())
        if members >= 2:
            assert 1 <= held < members
            assert abs(held - members * share) <= 1


def test_another_seed_sets_other_rows_aside() -> None:
    split = Split(table=pa.table({"n": list(range(200))}), source="rows")

    drawn = {tuple(rows_of(set_aside(split, 0.1, seed, None)[1])) for seed in range(5)}

    assert len(drawn) == 5
    assert {len(rows) for rows in drawn} == {20}


def test_one_row_cannot_be_split() -> None:
    with pytest.raises(DataError, match="rows: 1 row cannot be split"):
        set_aside(Split(table=pa.table({"n": [0]}), source="rows"), 0.1, 0, None)


@pytest.mark.parametrize(
    ("cells", "count"),
    [
        (["a film", "a plot", "None", None], 2),
        ([["a", "film"], ["a", "plot"], ["None"], None], 2),
        ([{"role": "a"}, {"role": "b"}, {"role": "None"}, {"role": None}], 2),
        ([1, 2, 3, None], 2),
    ],
)
def test_rows_that_are_in_both_splits_are_counted_whatever_they_hold(cells: list[Any], count: int) -> None:
    table = pa.table({"x": cells, "y": ["same"] * 4})
    first = Split(table=table.slice(0, 2), source="first")
    last = Split(table=pa.concat_tables([table.slice(1, 1), table.slice(3, 1), table.slice(0, 1)]), source="last")

    assert rows_in_both(first, last, [("text", "x"), ("text", "y")]) == count
    assert rows_in_both(first, last, []) == 0


def streamed(place: str) -> DataSet:
    """A data set whose training rows are streamed."""
    return stream_data(
        DataPlace.parse(place), config=None, revision=None, encoding="utf-8", train_split="train", max_eval_rows=None
    )


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (ValueError("Data files don't belong to evil/rows. Make sure ..."), "names files outside of the repository"),
        (ImportError('HTTPFileSystem requires "requests"'), "cannot be read"),
        (zipfile.BadZipFile("File is not a zip file"), "File is not a zip file"),
        (RuntimeError("Dataset scripts are no longer supported, but found rows.py"), "it is a loading script"),
        (StopIteration(), "one of its splits has no rows"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_what_a_data_set_of_the_hub_does_wrong_is_said(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, said: str, *, is_streamed: bool
) -> None:
    def load(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr("mirrortune.data.dataset.resolve_commit", lambda *_: "0" * 40)
    settings: Any = {"config": None, "revision": None, "encoding": "utf-8"}
    streaming = {"train_split": "train", "max_eval_rows": None}
    load_it = partial(stream_data, **settings, **streaming) if is_streamed else partial(load_data, **settings)

    with pytest.raises(DataError, match=said):
        load_it(DataPlace.parse("evil/rows"))


@pytest.mark.parametrize("raised", [pa.ArrowInvalid("no Parquet file"), KeyError("label")], ids=["file", "column"])
def test_a_broken_file_of_a_streamed_data_set_of_the_hub_is_a_data_error(
    monkeypatch: pytest.MonkeyPatch, raised: Exception
) -> None:
    class Broken:
        def with_format(self, _: str) -> None:
            raise raised

    monkeypatch.setattr("mirrortune.data.stream.open_hub", lambda *_, **__: ({"train": Broken()}, {}))
    with pytest.raises(DataError, match=r"data set 'some/rows': a row or file cannot be read"):
        streamed("some/rows")


def test_the_split_in_an_address_of_the_hub_is_the_one_that_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {name: Dataset.from_dict({"text": [name]}).to_iterable_dataset() for name in ("train", "dev")}
    monkeypatch.setattr("mirrortune.data.stream.open_hub", lambda *_, **__: (rows, {"commit": "0"}))

    found = streamed("hf://some/rows:default:validation")
    assert found.splits["train"].table.to_pylist() == [{"text": "dev"}]
    assert found.origin == {"commit": "0", "split": "validation", "streamed": True}
    with pytest.raises(DataError, match=r"there is no split 'trian'.*Did you mean 'train'"):
        streamed("hf://some/rows:default:trian")


@pytest.mark.parametrize("entries", ["5", "[5]", '{"filename": "x"}'])
def test_a_saved_data_set_with_an_odd_list_of_files_is_refused(tmp_path: Path, entries: str) -> None:
    write(tmp_path / "state.json", f'{{"_data_files": {entries}}}')
    write(tmp_path / "dataset_info.json", "{}")

    with pytest.raises(DataError, match="not a list of files"):
        load_data(DataPlace.parse(str(tmp_path)))


def test_a_header_of_thousands_of_columns_is_read(tmp_path: Path) -> None:
    names = [f"column{i}" for i in range(12_500)]
    path = write(tmp_path / "wide.csv", ",".join(names) + "\n" + ",".join(["a"] * 12_500) + "\n")

    assert load_data(DataPlace.parse(str(path))).splits["train"].table.column_names == names


@pytest.mark.parametrize("pattern", ["/**/*.csv", "/*/**", "/*/*/*/*.csv"])
def test_a_pattern_over_the_whole_machine_is_refused(pattern: str) -> None:
    with pytest.raises(DataError, match="searches every folder"):
        matching_files(pattern)


def test_a_split_in_two_formats_is_not_read_twice(tmp_path: Path) -> None:
    write(tmp_path / "train.csv")
    (tmp_path / "train.csv.gz").write_bytes(gzip.compress(CSV.encode()))
    with pytest.raises(DataError, match=r"train\.csv and train\.csv\.gz have one name"):
        load_data(DataPlace.parse(str(tmp_path)))
    (tmp_path / "train.csv.gz").unlink()
    write(tmp_path / "train-1.csv")
    write(tmp_path / "dev.csv")
    assert {name: split.table.num_rows for name, split in load_data(DataPlace.parse(str(tmp_path))).splits.items()} == {
        "train": 4, "validation": 2,
    }  # fmt: skip


def test_labels_of_different_types_in_a_stream_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": "x"}\n')
    labels = streamed(str(path)).splits["train"].table.column("label")
    with pytest.raises(DataError, match="label column 'label' holds values of different types"):
        names_in(labels, "rows.jsonl", "label")


def test_a_part_of_an_object_does_not_take_the_name_of_a_column() -> None:
    table = pa.table({"a": [{"b": "x"}], "a.b": ["y"], "c": [{"d": "z"}]})
    found = flat(table)
    assert found.to_pylist() == [{"a": {"b": "x"}, "a.b": "y", "c.d": "z"}]
