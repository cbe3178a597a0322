# SPDX-License-Identifier: Apache-2.0
"""Files of strangers, and what is sent to others: attacks end as they should, a bystander's folder stays as it was."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.cli.console import REPOSITORY, Outcome, finish, mirrortune, reviews, start, write_table
from tests.cli.test_own_images import write_folders
from tests.tiny_models import write_tiny_model, write_tiny_vision

pytestmark = pytest.mark.figures
EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 20 20
%%EndComments
(owned) (w) file closefile showpage
%%EOF
"""
CONTROL = "a\x1b]0;owned\x07\x1b[2Jb"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny text model, a tiny vision model, and a merged run of the first."""
    folder = tmp_path_factory.mktemp("models")
    base = write_tiny_model(folder / "base")
    write_tiny_vision(folder / "dino")
    write_table(folder / "reviews.csv", reviews(24))
    words = ["-m", base, "-t", "text-classification", "-d", folder / "reviews.csv", "--max-steps", 1, "-q"]
    assert mirrortune("train", *words, "-o", folder / "run", cache=folder / "cache").exit_code == 0
    assert mirrortune("merge", folder / "run", "-o", folder / "merged", "-q", cache=folder / "cache").exit_code == 0
    return folder


def tree_hash(folder: Path) -> str:
    """Of every name, mode, link and byte below a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(f"{path.relative_to(folder)} {path.lstat().st_mode} {path.lstat().st_mtime_ns}".encode())
        if path.is_symlink():
            digest.update(str(path.readlink()).encode())
        elif path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


@pytest.fixture
def bystander(tmp_path: Path) -> Path:
    """A folder that no command has any business with."""
    folder = tmp_path / "bystander"
    (folder / ".ssh").mkdir(parents=True)
    (folder / ".ssh" / "id_ed25519").write_text("PRIVATE KEY")
    (folder / "thesis.txt").write_text("chapter one")
    Image.new("RGB", (8, 8)).save(folder / "face.png")
    (folder / "link").symlink_to(folder / "thesis.txt")
    return folder


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Ghostscript on the path; the file that it makes when it is run."""
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/gs-ran\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "gs-ran"


def images(models: Path, data: object, *words: object) -> Outcome:
    """Read images as far as making batches of them."""
    return mirrortune(
        "prepare", "-m", models / "dino", "-t", "image-classification", "-d", data, "--dry-run", "--show", 3, *words
    )


def texts(models: Path, data: object, *words: object) -> Outcome:
    """Read texts."""
    return mirrortune("prepare", "-m", models / "base", "-t", "text-classification", "-d", data, "--dry-run", *words)


def postscript(desk: Path, models: Path, bystander: Path) -> Outcome:
    """PostScript under the name of an image, and a Ghostscript that would run."""
    write_folders(desk / "pictures", train=2)
    (desk / "pictures" / "train" / "left" / "000.png").write_bytes(EPS)
    return images(models, "pictures")


def bomb(desk: Path, models: Path, bystander: Path) -> Outcome:
    """A small file of 400 million pixels."""
    write_folders(desk / "pictures", train=2)
    Image.new("1", (20000, 20000)).save(desk / "pictures" / "train" / "left" / "000.png")
    return images(models, "pictures")


def bomb_in_a_table(desk: Path, models: Path, bystander: Path) -> Outcome:
    """The same inside a parquet file."""
    stream = io.BytesIO()
    Image.new("1", (20000, 20000)).save(stream, "PNG")
    small = io.BytesIO()
    Image.new("RGB", (8, 8)).save(small, "PNG")
    cells = [small.getvalue(), small.getvalue(), stream.getvalue(), small.getvalue()]
    pq.write_table(pa.table({"image": cells, "label": ["a", "b", "a", "b"]}), desk / "rows.parquet")
    return images(models, "rows.parquet")


def image_table(desk: Path, place: object) -> Path:
    """A table of three images of its own folder, and one wherever it says."""
    for name in ("1.png", "2.png", "3.png"):
        Image.fromarray(np.full((8, 8, 3), 9, np.uint8)).save(desk / name)
    return write_table(
        desk / "rows.csv", [("1.png", "a"), ("2.png", "b"), (place, "a"), ("3.png", "b")], ("image", "label")
    )


def pipe(desk: Path, models: Path, bystander: Path) -> Outcome:
    """A path to a pipe, on which reading would wait for ever."""
    os.mkfifo(desk / "pipe.png")
    return images(models, image_table(desk, "pipe.png"))


def device(desk: Path, models: Path, bystander: Path) -> Outcome:
    """A path to a device without end."""
    return images(models, image_table(desk, "/dev/zero"))


def path_out(desk: Path, models: Path, bystander: Path) -> Outcome:
    """A path to somebody's picture, which the user has not forbidden: said."""
    return images(models, image_table(desk, bystander / "face.png"))


def path_out_contained(desk: Path, models: Path, bystander: Path) -> Outcome:
    """The same, forbidden."""
    return images(models, image_table(desk, "../bystander/face.png"), "data.contained=true")


def link_out_contained(desk: Path, models: Path, bystander: Path) -> Outcome:
    """Through a link."""
    (desk / "own.png").symlink_to(bystander / "face.png")
    return images(models, image_table(desk, "own.png"), "data.contained=true")


def control_characters(desk: Path, models: Path, bystander: Path) -> Outcome:
    """A column's name, a class and a file name that would drive the terminal."""
    rows = [("good film", CONTROL), ("bad film", "b"), ("good plot", CONTROL), ("bad plot", "b")]
    return texts(models, write_table(desk / f"{CONTROL}.csv", rows, ("text", "label")), "--show", 2)


def control_characters_in_an_error(desk: Path, models: Path, bystander: Path) -> Outcome:
    """The same where the file is refused."""
    (desk / "rows.csv").write_text(f"text,{CONTROL}\na,b\nc\n")
    return texts(models, desk / "rows.csv")


def path_that_is_not_utf_8(desk: Path, models: Path, bystander: Path) -> Outcome:
    """A file from a system with another encoding."""
    name = os.fsdecode(b"caf\xe9.csv")
    shutil.copy(desk / "reviews.csv", desk / name)
    return texts(models, name)


def name_that_is_not_utf_8(desk: Path, models: Path, bystander: Path) -> Outcome:
    """The same in a class folder."""
    write_folders(desk / "pictures", train=2)
    place = os.fsencode(desk / "pictures" / "train" / "left")
    Path(os.fsdecode(place + b"/000.png")).rename(os.fsdecode(place + b"/caf\xe9.png"))
    return images(models, "pictures")


def class_that_vanishes(desk: Path, models: Path, bystander: Path) -> Outcome:
    """A class of files that are not read."""
    write_folders(desk / "pictures", train=2)
    for file in (desk / "pictures" / "train" / "left").iterdir():
        file.rename(file.with_suffix(".heic"))
    return images(models, "pictures")


def split_that_vanishes(desk: Path, models: Path, bystander: Path) -> Outcome:
    """A split in a format that is not read."""
    (desk / "data").mkdir()
    shutil.copy(desk / "reviews.csv", desk / "data" / "train.csv")
    (desk / "data" / "validation.xlsx").write_bytes(b"PK")
    return texts(models, "data")


def predictions_on_a_pipe(desk: Path, models: Path, bystander: Path) -> Outcome:
    """A place for answers that nobody reads."""
    os.mkfifo(desk / "pipe")
    return mirrortune("eval", models / "run", "--predictions", "pipe")


def pairs_on_a_pipe(desk: Path, models: Path, bystander: Path) -> Outcome:
    """A file of pairs that never ends."""
    os.mkfifo(desk / "pairs.json")
    words = ["-m", models / "base", "-t", "text-classification", "-d", "reviews.csv", "--pairing", "pairs.json"]
    return mirrortune("prepare", *words, "--dry-run")


def label_that_is_a_formula(desk: Path, models: Path, bystander: Path) -> Outcome:
    """A class that would be a broken formula in the figures of the run."""
    rows = [(text, r"$\foo$" if label == "positive" else "5$") for text, label in reviews(24)]
    write_table(desk / "rows.csv", rows)
    words = ["-m", models / "base", "-t", "text-classification", "-d", "rows.csv", "--max-steps", 1, "-o", "out"]
    done = mirrortune("train", *words)
    assert (desk / "out" / "curves.png").is_file()
    assert r"$\foo$" in (desk / "out" / "report.html").read_text()
    return done


def push_of_a_link(desk: Path, models: Path, bystander: Path) -> Outcome:
    """A file of a merged model that is a link to a key."""
    shutil.copytree(models / "merged", desk / "merged")
    (desk / "merged" / "tokenizer.json").unlink()
    (desk / "merged" / "tokenizer.json").symlink_to(bystander / ".ssh" / "id_ed25519")
    return mirrortune("push", "merged", "me/x")


def push_of_what_a_report_lists(desk: Path, models: Path, bystander: Path) -> Outcome:
    """A merge.json that lists a key."""
    shutil.copytree(models / "merged", desk / "merged")
    report = json.loads((desk / "merged" / "merge.json").read_text())
    report["files"].append("../../bystander/.ssh/id_ed25519")
    (desk / "merged" / "merge.json").write_text(json.dumps(report))
    return mirrortune("push", "merged", "me/x")


def settings_of_figures(desk: Path, models: Path, bystander: Path) -> Outcome:
    """A file beside the data from which matplotlib takes its settings when it is imported."""
    shutil.copytree(models / "run", desk / "run")
    (desk / "matplotlibrc").write_bytes(b"savefig.pad_inches: 100000\n\xff\xfe")
    return finish(start("report", "run", env={**os.environ, "PYTHONPATH": str(REPOSITORY)}))


ATTACKS: list[tuple[Callable[[Path, Path, Path], Outcome], int, str]] = [
    (postscript, 3, "pictures/train row 1: its image 'left/000.png' cannot be read (UnidentifiedImageError"),
    (bomb, 3, "its image 'left/000.png' cannot be read (it has 400,000,000 pixels, allowed are 178,956,970)"),
    (bomb_in_a_table, 3, "its image cannot be read (it has 400,000,000 pixels"),
    (pipe, 3, "its image 'pipe.png' cannot be read (ValueError: it is not a regular file)"),
    (device, 3, "its image '/dev/zero' cannot be read (ValueError: it is not a regular file)"),
    (path_out, 0, "a file lies outside the folder of the data ("),
    (path_out_contained, 3, "face.png' lies outside the folder of the data, which data.contained forbids"),
    (link_out_contained, 3, "own.png' lies outside the folder of the data, which data.contained forbids"),
    (control_characters, 0, r"a\x1b]0;owned\x07\x1b[2Jb.csv"),
    (control_characters_in_an_error, 3, "rows.csv:3: 1 cell in a row of a table with 2 columns"),
    (path_that_is_not_utf_8, 2, r"command line: 'caf\xe9.csv' is not UTF-8. Rename the file or folder"),
    (name_that_is_not_utf_8, 3, r"1 file name not in UTF-8: left/caf\xe9.png. Rename them"),
    (class_that_vanishes, 3, "no file of class 'left' (2 .heic) can be read"),
    (split_that_vanishes, 3, "data: unknown file type: validation.xlsx"),
    (predictions_on_a_pipe, 2, "--predictions: pipe is not a regular file. Give another name"),
    (pairs_on_a_pipe, 2, "pairs.json is a pipe. Allowed: a file"),
    (label_that_is_a_formula, 0, ""),
    (settings_of_figures, 0, ""),
    (push_of_a_link, 5, "tokenizer.json: it is a link or not a regular file, and is not sent"),
    (push_of_what_a_report_lists, 5, "it lists '../../bystander/.ssh/id_ed25519', which is not a file of a model"),
]


@pytest.mark.parametrize(("attack", "code", "says"), ATTACKS, ids=lambda value: getattr(value, "__name__", ""))
def test_attacks_end_as_they_should(
    desk: Path, models: Path, bystander: Path, ghostscript: Path, attack: Callable[..., Outcome], code: int, says: str
) -> None:
    before = tree_hash(bystander)
    done = attack(desk, models, bystander)
    assert done.exit_code == code, done.stderr
    assert says in done.said
    assert not {"\x1b", "\x07"} & {*done.stdout, *done.stderr}
    assert "Traceback" not in done.stderr
    assert tree_hash(bystander) == before
    assert not ghostscript.exists()


def test_a_matrix_of_very_many_classes_is_left_out(desk: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mirrortune.runs.recorder._MOST_CLASSES", 1)
    words = ["-m", models / "base", "-t", "text-classification", "-d", "reviews.csv", "--max-steps", 1, "-q"]
    done = mirrortune("train", *words, "-o", "out", cache=models / "cache")
    assert done.exit_code == 0, done.stderr
    found = json.loads((desk / "out" / "validation.json").read_text())
    assert "confusion" not in found
    assert len(found["classes"]["validation"]) == 2
    assert (desk / "out" / "report.html").is_file()


@pytest.mark.parametrize(
    ("setting", "code", "says"),
    [
        ("train.gradient_accumulation_steps=999999999999", 2, "less than or equal to 1000000"),
        ('data.encoding="utf\\08"', 3, "unknown encoding"),
    ],
)
def test_settings_without_measure_are_refused(desk: Path, models: Path, setting: str, code: int, says: str) -> None:
    done = texts(models, "reviews.csv", setting)
    assert (done.exit_code, says in done.said) == (code, True), done.stderr
