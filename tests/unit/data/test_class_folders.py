# SPDX-License-Identifier: Apache-2.0
"""Class folders: every suffix that is read, what is left out and said, and what systems leave behind."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from mirrortune.data.dataset import Split, load_data
from mirrortune.data.duplicates import rows_in_both
from mirrortune.data.files.class_folders import AUDIO_SUFFIXES, IMAGE_FORMATS, class_folder
from mirrortune.data.files.images import _formats
from mirrortune.data.files.media import FileCells, remarks_on
from mirrortune.data.loose import read_loose_files
from mirrortune.errors import DataError
from mirrortune.system.paths import DataPlace

SYSTEM = (
    ".ipynb_checkpoints/1-checkpoint.png", ".git/1.png", "__MACOSX/1.png", "__MACOSX/._1.png", "._1.png", ".DS_Store",
    "Thumbs.db", "desktop.ini", "@eaDir/1.png", ".Trashes/1.png", "deep/er/.ipynb_checkpoints/1.png",
)  # fmt: skip


def touch(folder: Path, *names: str) -> Path:
    """Write files that hold their own names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def paths(folder: Path) -> list[str]:
    """What is listed of a folder."""
    table = class_folder(folder).table
    return [] if table is None else table.column(0).to_pylist()


@pytest.mark.parametrize("suffix", sorted({*IMAGE_FORMATS} - {".dds", ".icns", ".psd", ".ras", ".j2c", ".jpc"}))
def test_every_image_suffix_is_of_a_format_that_is_opened(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "cat").mkdir()
    kind = IMAGE_FORMATS[suffix]
    picture = Image.new("F" if suffix == ".pfm" else "RGB", (32, 32))
    picture.save(tmp_path / "cat" / f"1{suffix.upper()}", format=kind)
    assert paths(tmp_path) == [f"cat/1{suffix.upper()}"]
    with Image.open(tmp_path / "cat" / f"1{suffix.upper()}", formats=_formats()) as found:
        assert found.size == (32, 32)


@pytest.mark.parametrize("suffix", AUDIO_SUFFIXES)
def test_every_suffix_of_recordings_is_listed(tmp_path: Path, suffix: str) -> None:
    found = class_folder(touch(tmp_path, f"low/1{suffix}"))
    assert found.table is not None
    assert found.table.column_names == ["audio", "label"]


def test_links_to_what_is_not_there_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "in/train/cat/1.png", "in/train/dog/1.png", "in/notes.txt", "loose/1.png")
    lost = ["in/train/cat/deep/2.png", "in/train/red", "in/validation", "loose/2.png"]
    (tmp_path / "in/train/cat/deep").mkdir()
    for name in ("in/train/cat/.2.png", "in/train/cat/2.txt", "loose/2.txt", *lost):  # the first ones are no rows
        (tmp_path / name).symlink_to("/annex/2.png")
    with pytest.raises(DataError, match=r"2 links to what is not there: cat/deep/2\.png, red\. Fetch the files"):
        load_data(DataPlace.parse(str(tmp_path / "in")))
    for name in lost[:2]:
        (tmp_path / name).unlink()
    with pytest.raises(DataError, match=r"1 link to what is not there: validation\. Fetch"):
        load_data(DataPlace.parse(str(tmp_path / "in")))
    with pytest.raises(DataError, match=r"loose: 1 link to what is not there: 2\.png"):
        read_loose_files(DataPlace.parse(str(tmp_path / "loose")))
    touch(tmp_path, "texts/train/note")
    (tmp_path / "texts/latest").symlink_to("/annex/2")
    with pytest.raises(DataError, match="texts") as caught:  # for another reason: it is no folder of images
        load_data(DataPlace.parse(str(tmp_path / "texts")))
    assert "not there" not in str(caught.value)
    for name in lost[2:]:
        (tmp_path / name).unlink()
    assert load_data(DataPlace.parse(str(tmp_path / "in"))).splits["train"].table.num_rows == 2
    assert read_loose_files(DataPlace.parse(str(tmp_path / "loose"))) is not None


def test_a_table_of_metadata_names_the_files_beside_it(tmp_path: Path) -> None:
    touch(tmp_path, "one/1.wav", "two/train/1.png", "two/Test/1.png")
    (tmp_path / "one" / "metadata.csv").write_text("file_name,label\n1.wav,low\n")
    (tmp_path / "two" / "train" / "metadata.jsonl").write_text('{"file_name": "1.png", "label": "red"}\n')
    (tmp_path / "two" / "Test" / "metadata.csv").write_text("file_name,label\n1.png,blue\n")
    (found,) = load_data(DataPlace.parse(str(tmp_path / "one"))).splits.items()
    assert (found[0], found[1].folder, found[1].remarks) == ("train", tmp_path / "one", ())
    data = load_data(DataPlace.parse(str(tmp_path / "two")))
    assert {name: split.table.to_pylist() for name, split in data.splits.items()} == {
        "train": [{"file_name": "1.png", "label": "red"}],
        "test": [{"file_name": "1.png", "label": "blue"}],
    }
    assert data.splits["test"].folder == tmp_path / "two" / "Test"
    (tmp_path / "two" / "metadata.csv").write_text("file_name,label\ntrain/1.png,red\nTest/1.png,blue\n")
    assert load_data(DataPlace.parse(str(tmp_path / "two"))).splits.keys() == {"train", "test"}
    # One folder of files is no class if a table beside it names them; a split without a table is named.
    touch(tmp_path, "three/wavs/1.wav", "three/wavs/2.wav", "four/train/1.png", "four/test/1.png")
    (tmp_path / "three" / "metadata.csv").write_text("file_name,label\nwavs/1.wav,low\nwavs/2.wav,high\n")
    (found,) = load_data(DataPlace.parse(str(tmp_path / "three"))).splits.values()
    assert found.table.column("label").to_pylist() == ["low", "high"]
    (tmp_path / "four" / "train" / "metadata.csv").write_text("file_name,label\n1.png,red\n")
    (found,) = load_data(DataPlace.parse(str(tmp_path / "four"))).splits.values()
    assert [remark.split(":")[0] for remark in found.remarks] == ["test"]


def test_what_systems_and_notebooks_leave_is_skipped_at_every_depth(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.png", "cat/deep/er/2.png", *(f"cat/{name}" for name in SYSTEM), "__MACOSX/cat/1.png")
    touch(tmp_path, ".git/objects/1.png", ".ipynb_checkpoints/1.png", "Thumbs.db")
    assert paths(tmp_path) == ["cat/1.png", "cat/deep/er/2.png"]
    assert class_folder(tmp_path).remarks == ()
    touch(tmp_path / "tables", "train.csv", "._train.csv", "__MACOSX/._train.csv", "sub/__MACOSX/a.csv", "sub/b.csv")
    for file in (tmp_path / "tables").rglob("*.csv"):
        file.write_text("text,label\na,b\n")
    assert load_data(DataPlace.parse(str(tmp_path / "tables"))).splits["train"].table.num_rows == 1
    assert load_data(DataPlace.parse(str(tmp_path / "tables" / "**" / "*.csv"))).splits["train"].table.num_rows == 2


def test_what_is_left_out_is_counted_and_named(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.png", "cat/2.heic", "cat/3.HEIC", "cat/4.wav", "dog/1.png", "dog/note", "0.png", "meta.csv")
    (tmp_path / "empty").mkdir()
    (tmp_path / "dog" / "link").symlink_to(tmp_path / "cat")
    assert class_folder(tmp_path).remarks == (
        "left out, as they are not images of a known suffix: 2 .heic, 1 .wav, 1 links to folders, 1 files without "
        "suffix in cat (2 .heic, 1 .wav), dog (1 links to folders, 1 files without suffix)",
        "folders without a file: empty",
        "left out, beside the class folders: 0.png, meta.csv",
    )
    assert load_data(DataPlace.parse(str(tmp_path))).splits["train"].remarks == class_folder(tmp_path).remarks


def test_a_class_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.png", "dog/1.heic", "dog/2.heic", "fox/1.wav")
    with pytest.raises(DataError, match=r"no file of class 'dog' \(2 \.heic\), class 'fox' \(1 \.wav\) can be read"):
        class_folder(tmp_path)
    with pytest.raises(DataError, match=r"it holds cat; left out, as they are not images of a known suffix: 1 \.heic"):
        load_data(DataPlace.parse(str(touch(tmp_path / "all", "cat/1.heic"))))


def test_splits_of_class_folders_do_not_vanish_in_silence(tmp_path: Path) -> None:
    touch(tmp_path, "train/cat/1.png", "val/readme.md", "dev/cat/1.png", "extra/cat/1.png")
    assert load_data(DataPlace.parse(str(tmp_path))).splits["train"].remarks == (
        f"validation: {tmp_path / 'val'} has no folder of images or recordings for each class",
        "left out, as they are not splits: dev, extra",
    )


def test_a_class_may_have_the_name_of_a_split(tmp_path: Path) -> None:
    split = load_data(DataPlace.parse(str(touch(tmp_path, "bus/1.png", "Train/1.png", "Train/2.png")))).splits["train"]
    paths = ["Train/1.png", "Train/2.png", "bus/1.png"]
    assert split.table.to_pydict() == {"image": paths, "label": ["Train", "Train", "bus"]}
    assert split.folder == tmp_path
    assert split.remarks == ("'Train' is read as a class, not as a split, as it holds no folders",)
    splits = load_data(DataPlace.parse(str(touch(tmp_path, "Train/cat/1.png")))).splits
    assert splits["train"].table["label"].to_pylist() == ["cat"]
    assert splits["train"].remarks[-1] == "left out, as they are not splits: bus"


@pytest.mark.parametrize("names", [["train/1.png", "test/1.png", "bus/1.png"], ["train/1.png", "docs/readme.md"]])
def test_splits_without_classes_are_refused(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(DataError, match=r"train: .* has no folder of images or recordings for each class.* left out"):
        load_data(DataPlace.parse(str(touch(tmp_path, *names))))


def test_tables_of_a_folder_do_not_vanish_in_silence(tmp_path: Path) -> None:
    touch(tmp_path, "train.csv", "train.xlsx", "more.csv", "notes.md", "train.py")
    (tmp_path / "train.csv").write_text("text,label\na,b\n")
    data = load_data(DataPlace.parse(str(tmp_path)))
    assert remarks_on(data, []) == ["left out, as they are not of a split: more.csv, train.xlsx"]
    (tmp_path / "train.old.csv").write_text("text,label\na,b\n")
    assert remarks_on(load_data(DataPlace.parse(str(tmp_path))), []) == [
        "read as train: train.csv, train.old.csv", "left out, as they are not of a split: more.csv, train.xlsx"
    ]  # fmt: skip
    touch(tmp_path, "validation.xlsx", "test.jsonl.zst")
    with pytest.raises(DataError, match=r"unknown file type: test\.jsonl\.zst, validation\.xlsx"):
        load_data(DataPlace.parse(str(tmp_path)))


def test_names_that_are_not_utf_8_are_named(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/cat/\xff.png")).touch()
    with pytest.raises(DataError, match=r"1 file name not in UTF-8: cat/\\xff\.png\. Rename them"):
        class_folder(tmp_path)


def split(folder: Path, **columns: list[object]) -> Split:
    """Rows of a table in ``folder``."""
    return Split(table=pa.table(columns), source="rows.csv", folder=folder)


def test_validation_rows_are_compared_by_what_their_files_hold(tmp_path: Path) -> None:
    long = "x" * 200_000
    (touch(tmp_path, "train/a.png", "train/b.png", "train/c.png") / "train" / "c.png").write_text(long + "c")
    touch(tmp_path, "other/a.png", "other/b.png", "other/c.png", "other/d.png")
    for name, text in (("a", "no"), ("b", "train/a.png"), ("c", long + "c"), ("d", long + "d")):
        (tmp_path / "other" / f"{name}.png").write_text(text)
    train = split(tmp_path / "train", image=["a.png", "b.png", "c.png"], text=["1", "2", "3"])
    other = split(tmp_path / "other", image=["a.png", "b.png", "c.png", "d.png"], text=["1", "2", "3", "4"])
    assert rows_in_both(train, other, [("image", "image")]) == 2  # b and c, under other names and in another folder
    assert rows_in_both(train, other, [("image", "image"), ("text", "text")]) == 1
    inside = split(tmp_path, image=[{"bytes": b"train/a.png", "path": None}, {"bytes": b"q", "path": "a.png"}])
    assert rows_in_both(train, inside, [("image", "image")]) == 1
    assert rows_in_both(split(tmp_path, audio=[b"1", b"2"]), split(tmp_path, audio=[b"2"]), [("audio", "audio")]) == 1


def test_files_outside_the_folder_are_said_once_and_refused_when_asked(tmp_path: Path) -> None:
    touch(tmp_path, "data/in.png", "out.png")
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "out.png")
    (tmp_path / "data" / "linked").symlink_to(tmp_path)
    names: list[object] = ["in.png", "../out.png", str(tmp_path / "out.png"), "link.png", "linked/out.png"]
    rows = split(tmp_path / "data", image=names)
    cells = FileCells.of(rows, "image", role="image", readable="")
    assert cells.outside() == [1, 2, 3, 4]
    from mirrortune.data.dataset import DataSet

    (said,) = remarks_on(DataSet(splits={"train": rows}), [("image", "image"), ("label", "label")])
    assert said.startswith("4 files lie outside the folder of the data (rows.csv row 2: ")
    assert said.endswith("data.contained=true refuses them")
    from dataclasses import replace

    held = FileCells.of(replace(rows, is_contained=True), "image", role="image", readable="")
    assert held.open(0) == str(tmp_path / "data" / "in.png")
    for row in range(1, 5):
        with pytest.raises(DataError, match=rf"rows\.csv row {row + 1}: its image .* lies outside the folder"):
            held.open(row)


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    cells = FileCells.of(split(tmp_path, image=["pipe.png", "/dev/zero"]), "image", role="image", readable="")
    for row in range(2):
        with pytest.raises(ValueError, match="not a regular file"):
            cells.open(row)
