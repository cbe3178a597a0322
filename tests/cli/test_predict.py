# SPDX-License-Identifier: Apache-2.0
"""``predict`` answers every row of what a user has, and keeps what was answered whatever happens."""

from __future__ import annotations

import csv
import io
import json
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from mirrortune.cli.app import app
from mirrortune.inference.prediction_parts import Parts
from tests.cli.console import Outcome, finish, mirrortune, reviews, start, write_lines, write_table
from tests.tiny_models import write_tiny_model, write_tiny_vision


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run on reviews, in a folder with its model."""
    folder = tmp_path_factory.mktemp("predict")
    model = write_tiny_model(folder / "model")
    data = write_table(folder / "reviews.csv", reviews(60))
    words = ("-m", model, "-t", "text-classification", "-d", data, "-o", folder / "run", "--epochs", 4, "--lr", "3e-2")
    outcome = mirrortune("train", *words, "--batch-size", 8, "-q")
    assert outcome.exit_code == 0, outcome.stderr
    return folder / "run"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def texts(count: int) -> list[str]:
    return [text for text, _ in reviews(count, seed=3)]


def table_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def predict_with_input(run: Path, content: bytes, *words: object) -> Outcome:
    result = CliRunner().invoke(app, ["predict", str(run), *map(str, words)], input=content, catch_exceptions=False)
    return Outcome(result.exit_code, result.stdout, result.stderr)


def test_the_answers_are_those_of_eval_in_every_format(run: Path, place: Path) -> None:
    rows = [{"id": number, "note": None, "text": text} for number, text in enumerate(texts(150))]
    write_table(place / "rows.csv", [[row["id"], "", row["text"]] for row in rows], ("id", "note", "text"))
    write_lines(place / "rows.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), place / "rows.parquet")

    scored = mirrortune("eval", run, "-d", "rows.csv", "--predictions", "answers.txt")
    assert scored.exit_code == 0, scored.stderr
    expected = [line.split("\t")[1] for line in (place / "answers.txt").read_text().splitlines()[1:]]
    assert {*expected} == {"positive", "negative"}
    for name in ("csv", "tsv", "jsonl", "parquet"):
        done = mirrortune("predict", run, "-d", "rows.jsonl" if name == "jsonl" else "rows.csv", "-o", f"a.{name}")
        assert done.exit_code == 0, done.stderr
    as_csv = table_of((place / "a.csv").read_text(encoding="utf-8"))
    as_tsv = list(csv.DictReader((place / "a.tsv").read_text(encoding="utf-8").splitlines(), delimiter="\t"))
    as_json = [json.loads(line) for line in (place / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    as_table = pq.read_table(place / "a.parquet").to_pylist()
    assert as_csv == as_tsv
    assert list(as_csv[0]) == ["id", "note", "text", "prediction", "score"]
    for found in (as_csv, as_json, as_table):
        assert [row["prediction"] for row in found] == expected
        assert [row["text"] for row in found] == [row["text"] for row in rows]
        assert [float(row["score"]) for row in found] == [float(row["score"]) for row in as_csv]
    assert [row["id"] for row in as_json] == list(range(150))
    assert [row["note"] for row in as_table] == [None] * 150
    assert not [path for path in place.iterdir() if path.name.startswith(".")], "nothing is left beside the outputs"


def test_one_row_and_standard_input_go_to_standard_output(run: Path, place: Path) -> None:
    one = mirrortune("predict", run, "--text", "the movie was good")
    assert one.exit_code == 0, one.stderr
    (row,) = table_of(one.stdout)
    assert list(row) == ["text", "prediction", "score"]

    lines = predict_with_input(run, b"the movie was good\n\nthe plot is bad\n", "-d", "-")
    assert [found["text"] for found in table_of(lines.stdout)] == ["the movie was good", "", "the plot is bad"]
    assert table_of(lines.stdout)[0]["prediction"] == row["prediction"]
    assert "warning: 1 row without a text got the answer of an empty one" in lines.said

    objects = b'{"id": 7, "text": "the movie was good", "more": {"a": [1]}}\n'
    parsed = predict_with_input(run, objects, "-d", "-", "--format", "jsonl", "--top", 2)
    (found,) = [json.loads(line) for line in parsed.stdout.splitlines()]
    assert {"id": 7, "more": {"a": [1]}}.items() <= found.items()
    assert [found["prediction"], found["prediction_2"]] == [row["prediction"], {"positive": "negative"}.get(
        row["prediction"], "positive")]  # fmt: skip

    broken = predict_with_input(run, b'{"text": "a"}\n{"text": \n', "-d", "-")
    assert broken.exit_code == 3
    assert "standard input:2: not valid JSON" in broken.said
    assert predict_with_input(run, b"", "-d", "-").exit_code == 3


def fail_at(number: int, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Raise at the ``number``-th part that is written."""
    written = iter(range(1, 1000))
    add = Parts.add

    def failing(self: Parts, first: int, table: pa.Table) -> None:
        if next(written) == number:
            raise error
        add(self, first, table)

    monkeypatch.setattr(Parts, "add", failing)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_a_killed_command_goes_on_and_ends_with_the_same_bytes(
    run: Path, place: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write_table(place / "rows.csv", [[text] for text in texts(200)], ("text",))  # blocks of 64 rows
    assert mirrortune("predict", run, "-d", "rows.csv", "-o", f"whole-{name}").exit_code == 0
    words = ("predict", run, "-d", "rows.csv", "-o", name)
    with monkeypatch.context() as broken:
        fail_at(3, broken, KeyboardInterrupt())
        stopped = mirrortune(*words)
    assert stopped.exit_code == 130
    assert "kept 128 predicted rows" in stopped.said
    assert not (place / name).exists()

    again = mirrortune(*words)
    assert again.exit_code == 2
    assert "holds 128 predicted rows" in again.said
    for more, told in (
        (("--top", 2), "options: top (not given before, 2 now)"), (("--max-length", 8), "length (64 before, 8 now)"),
        (("--precision", "bf16"), "precision"), (("data.encoding=latin-1",), "encoding"),
    ):  # fmt: skip
        changed = mirrortune(*words, *more, "--resume")
        assert changed.exit_code == 2
        assert told in changed.said
    resumed = mirrortune(*words, "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert "continuing after 128 rows" in resumed.said
    assert (place / name).read_bytes() == (place / f"whole-{name}").read_bytes()
    assert not list(place.glob(".*"))
    nothing = mirrortune(*words, "--resume")
    assert nothing.exit_code == 2


def test_changed_rows_are_not_continued(run: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_table(place / "rows.csv", [[text] for text in texts(200)], ("text",))
    words = ("predict", run, "-d", "rows.csv", "-o", "a.csv")
    with monkeypatch.context() as broken:
        fail_at(2, broken, KeyboardInterrupt())
        mirrortune(*words)
    write_table(place / "rows.csv", [[text] for text in texts(201)], ("text",))
    changed = mirrortune(*words, "--resume")
    assert changed.exit_code == 2
    assert "data" in changed.said
    assert mirrortune(*words, "--overwrite").exit_code == 0
    assert len(table_of((place / "a.csv").read_text())) == 201


def test_another_file_is_not_replaced_by_what_is_continued(
    run: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table(place / "rows.csv", [[text] for text in texts(200)], ("text",))
    words = ("predict", run, "-d", "rows.csv", "-o", "a.csv")
    (place / "a.csv").write_text("text,prediction\n", encoding="utf-8")
    with monkeypatch.context() as broken:
        fail_at(2, broken, KeyboardInterrupt())
        mirrortune(*words, "--overwrite")
    (place / "a.csv").write_text("thesis\n", encoding="utf-8")
    with monkeypatch.context() as early:
        early.setattr("mirrortune.inference.predict.load_target", None)  # nothing is loaded before it is refused
        refused = mirrortune(*words, "--resume")
    assert (refused.exit_code, "has no column 'prediction'" in refused.said) == (2, True), refused.stderr
    assert (place / "a.csv").read_text(encoding="utf-8") == "thesis\n"
    (place / "a.csv").unlink()
    add = Parts.add

    def add_and_save(self: Parts, first: int, table: pa.Table) -> None:
        add(self, first, table)
        self.output.write_text("thesis\n", encoding="utf-8")

    with monkeypatch.context() as late:  # saved while the rows are predicted
        late.setattr(Parts, "add", add_and_save)
        assert mirrortune(*words, "--resume").exit_code == 2
    assert (place / "a.csv").read_text(encoding="utf-8") == "thesis\n"


def test_a_command_killed_after_its_output_was_renamed_is_done(
    run: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table(place / "rows.csv", [[text] for text in texts(70)], ("text",))
    words = ("predict", run, "-d", "rows.csv", "-o", "a.csv")
    with monkeypatch.context() as broken:
        broken.setattr(Parts, "discard", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        assert mirrortune(*words).exit_code == 130
    whole = (place / "a.csv").read_bytes()
    assert mirrortune(*words).exit_code == 2
    done = mirrortune(*words, "--resume")
    assert done.exit_code == 0, done.stderr
    assert (place / "a.csv").read_bytes() == whole
    assert not list(place.glob(".*"))


def test_bad_rows_get_the_reason_or_stop_the_command_with_what_was_done_kept(
    place: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from PIL import Image

    home = tmp_path_factory.mktemp("images")
    write_tiny_vision(home / "vision")
    (place / "new").mkdir()
    for name, light in (("dark", 20), ("light", 230)):
        (home / "pics" / name).mkdir(parents=True)
        for more in range(6):
            Image.fromarray(np.full((16, 16, 3), light + more, np.uint8)).save(home / "pics" / name / f"{more}.png")
    words = ("-m", home / "vision", "-t", "image-classification", "-d", home / "pics", "-o", home / "run")
    assert mirrortune("train", *words, "--epochs", 1, "-q").exit_code == 0
    whole = (home / "pics" / "dark" / "1.png").read_bytes()
    for number in range(66):
        (place / "new" / f"{number:02}.png").write_bytes(whole)
    (place / "new" / "64.png").write_bytes(b"no image")
    (place / "new" / "65.png").write_bytes(whole[: len(whole) // 2])  # opens, and cannot be decoded

    command = ("predict", home / "run", "-d", "new", "-o", "a.csv")
    stopped = mirrortune(*command)
    assert stopped.exit_code == 3
    assert "its image '64.png' cannot be read" in stopped.said
    assert "kept 64 predicted rows" in stopped.said
    done = mirrortune(*command, "--resume", "--on-error", "skip", "--json")
    assert done.data == {"output": "a.csv", "rows": 66, "errors": 2}
    rows = table_of((place / "a.csv").read_text(encoding="utf-8"))
    assert list(rows[0]) == ["image", "prediction", "score", "error"]
    assert [row["image"] for row in rows] == [f"{number:02}.png" for number in range(66)]
    assert [bool(row["prediction"]) for row in rows] == [True] * 64 + [False] * 2
    assert ["cannot be read" in row["error"] for row in rows] == [False] * 64 + [True] * 2
    one = mirrortune("predict", home / "run", "--image", "new/00.png")
    assert table_of(one.stdout)[0]["prediction"] == rows[0]["prediction"]
    assert mirrortune("predict", home / "run", "--text", "a").exit_code == 2


ROWS = {
    "bom.csv": ('\ufefftext;n\nthe film is good;1,5\n"a; ""b""\nc";2\n', ["the film is good", 'a; "b"\nc']),
    "crlf.csv": ("n,text\r\n1,good\r\n", ["good"]),
    "odd-labels.csv": ("text,label\ngood,surprising\nbad,\n", ["good", "bad"]),
    "blank.csv": ("text,n\n,1\ngood,2\n", ["", "good"]),
    "other-name.csv": ("id,review\n1,the film is good\n", None),
}


@pytest.mark.parametrize("name", ROWS)
def test_odd_tables_are_answered_and_their_cells_kept(run: Path, place: Path, name: str) -> None:
    content, wanted = ROWS[name]
    (place / name).write_text(content, encoding="utf-8", newline="")
    done = mirrortune("predict", run, "-d", name, "--format", "jsonl")
    assert done.exit_code == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(row["prediction"] in ("positive", "negative") for row in rows)
    if wanted is None:
        assert "text column 'review' (detected" in done.said
    else:
        assert [row["text"] or "" for row in rows] == wanted


def test_names_that_are_taken_and_columns_that_cannot_be_kept_are_said(run: Path, place: Path) -> None:
    (place / "rows.csv").write_text("text,a,a,prediction\ngood,1,2,mine\n", encoding="utf-8")
    done = mirrortune("predict", run, "-d", "rows.csv")
    (row,) = table_of(done.stdout)
    assert list(row) == ["text", "prediction", "new_prediction", "score"]
    assert row["prediction"] == "mine"
    assert "column 'a' is left out of the output: rows.csv:1: column name 'a' appears twice" in done.said


def test_all_splits_are_answered_and_named(run: Path, place: Path) -> None:
    write_table(place / "rows" / "train.csv", [["good", "positive"]])
    write_table(place / "rows" / "test.csv", [["bad"]], ("text",))
    rows = table_of(mirrortune("predict", run, "-d", "rows").stdout)
    assert {(row["text"], row["label"], row["split"]) for row in rows} == {
        ("good", "positive", "train"), ("bad", "", "test"),
    }  # fmt: skip
    assert len(table_of(mirrortune("predict", run, "-d", "rows", "--split", "test").stdout)) == 1


@pytest.fixture
def several(place: Path) -> tuple[object, ...]:
    """Three data sets with columns of their own, as arguments."""
    write_table(place / "a.csv", [[number, text] for number, text in enumerate(texts(70))], ("id", "text"))
    write_table(place / "b" / "train.csv", [["x", text] for text in texts(3)], ("id", "text"))
    write_table(place / "b" / "test.csv", [["good"]], ("text",))
    lines = [json.dumps({"id": number, "review": text}) + "\n" for number, text in enumerate(texts(75))]
    (place / "c.jsonl").write_text("".join(lines), encoding="utf-8")
    return ("-d", "a.csv", "-d", "b", "-d", "c.jsonl")


def test_several_data_sets_are_answered_in_order_each_by_its_own_columns(
    run: Path, place: Path, several: tuple[object, ...]
) -> None:
    done = mirrortune("predict", run, *several)
    assert done.exit_code == 0, done.stderr
    assert "c.jsonl: the data has no column 'text'" in done.stderr
    rows = table_of(done.stdout)
    assert list(rows[0]) == ["id", "text", "review", "prediction", "score", "source", "split"]
    alone = [table_of(mirrortune("predict", run, "-d", name).stdout) for name in several[1::2]]
    expected = [{**row, "source": str(name)} for name, own in zip(several[1::2], alone, strict=True) for row in own]
    assert [row["source"] for row in rows] == [row["source"] for row in expected]
    for row, own in zip(rows, expected, strict=True):
        assert float(row["score"]) == pytest.approx(float(own["score"]), rel=1e-5)
        given = {key: row.get(key) or "" for key in ("id", "text", "review", "prediction")}
        assert given == {key: own.get(key) or "" for key in given}
    assert [row["split"] for row in rows] == [
        "train" if row["source"] == "a.csv" else row.get("split", "train") for row in expected
    ]


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv"])
def test_several_data_sets_are_continued_and_compared(
    run: Path, place: Path, several: tuple[object, ...], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert mirrortune("predict", run, *several, "-o", f"whole-{name}").exit_code == 0
    words = ("predict", run, *several, "-o", name)
    with monkeypatch.context() as broken:
        fail_at(5, broken, KeyboardInterrupt())  # in the last
        assert mirrortune(*words).exit_code == 130
    content = (place / "b" / "test.csv").read_bytes()
    (place / "b" / "test.csv").write_bytes(content + b"bad\n")
    changed = mirrortune(*words, "--resume")
    assert (changed.exit_code, "data: 2 (b): test.csv has changed" in changed.said) == (2, True), changed.said
    (place / "b" / "test.csv").write_bytes(content)
    resumed = mirrortune(*words, "--resume")
    assert "continuing after 74 rows" in resumed.said
    assert (place / name).read_bytes() == (place / f"whole-{name}").read_bytes()


def test_several_data_sets_that_do_not_fit_are_named(run: Path, place: Path, several: tuple[object, ...]) -> None:
    refused = mirrortune("predict", run, *several, "-o", "out.parquet")
    assert refused.exit_code == 3
    assert "a.csv and c.jsonl: column 'id' holds string in one, int64 in the other" in refused.said
    (place / "d.jsonl").write_text('{"text": ["good"]}\n')
    broken = mirrortune("predict", run, "-d", "a.csv", "-d", "d.jsonl")
    assert (broken.exit_code, "d.jsonl" in broken.said) == (3, True)
    piped = predict_with_input(run, b"bad\ngood\n", "-d", "a.csv", "-d", "-", "-o", "out.parquet")
    assert piped.exit_code == 0, piped.stderr
    assert pq.read_table(place / "out.parquet").column("source").to_pylist() == ["a.csv"] * 70 + ["-"] * 2
    assert mirrortune("predict", run, *several, "--bank", place, "--adapter-column", "id").exit_code == 2


def test_the_data_that_a_run_names_is_printed(run: Path, place: Path) -> None:
    done = mirrortune("predict", run, "--split", "validation")
    assert done.exit_code == 0, done.stderr
    assert f"data named by {run}/recipe.yaml: path " in done.stderr


def test_streamed_rows_are_answered_in_their_order(run: Path, place: Path) -> None:
    lines = [json.dumps({"text": text}) + "\n" for text in texts(1200)]  # more than a stream's first rows
    (place / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    done = mirrortune("predict", run, "-d", "rows.jsonl", "-o", "a.csv", "data.streaming=true")
    assert done.exit_code == 0, done.stderr
    assert [row["text"] for row in table_of((place / "a.csv").read_text())] == texts(1200)


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ((), 2, "no rows are named"),
        (("-d", "rows.csv", "--text", "a"), 2, "rows are named more than once"),
        (("--text", "a", "--text", "b"), 2, "2 values a row, and the task reads text 'text'"),
        (("--image", "a.png"), 2, "the task text-classification reads text"),
        (("-d", "rows.csv", "--threshold", "0.2"), 2, "does not use it"),
        (("-d", "rows.csv", "-o", "a.txt"), 2, ".csv, .tsv, .jsonl, .parquet"),
        (("-d", "rows.csv", "-o", "rows.csv", "--overwrite"), 2, "it is the data that is read"),
        (("-d", "rows.csv", "-o", "mine.csv"), 2, "already exists"),
        (("-d", "rows.csv", "-o", "mine.csv", "--overwrite"), 2, "so predict did not write it"),
        (("-d", "rows.csv", "-o", "a.csv", "--format", "jsonl"), 2, "--format: got jsonl, and a.csv is csv. Keep one"),
        (
            ("-d", "photo.PNG"),
            3,
            "not a table. Give it as --image photo.PNG",
        ),
        (("-d", "rows.csv", "--json"), 2, "answers go to standard output"),
        (("-d", "rows.csv", "--resume"), 2, "answers go to standard output"),
        (("-d", "rows.csv", "-o", "a.csv", "--resume"), 2, "no unfinished predictions"),
        (("-d", "rows.csv", "-o", "a.csv", "--resume", "--overwrite"), 2, "it excludes --overwrite"),
        (("-d", "rows.csv", "--text-column", "txt"), 3, "Did you mean 'text'?"),
        (("-d", "lists.jsonl"), 3, "column 'text' holds list"),
        (("-d", "empty.csv"), 3, "the file is empty"),
        (("-d", "rows.csv", "--split", "test"), 3, "no split 'test'"),
    ],
)
def test_what_cannot_be_meant_is_refused(run: Path, place: Path, words: tuple[str, ...], code: int, told: str) -> None:
    write_table(place / "rows.csv", [["good"]], ("text",))
    (place / "mine.csv").write_text("a,b\n1,2\n")
    (place / "lists.jsonl").write_text('{"text": ["good"]}\n')
    (place / "empty.csv").touch()
    (place / "photo.PNG").touch()
    done = mirrortune("predict", run, *words)
    assert (done.exit_code, told in done.said) == (code, True), done.stderr
    assert (place / "mine.csv").read_text() == "a,b\n1,2\n"
    assert not list(place.glob(".*"))


def test_a_merged_model_answers_rows_without_labels(run: Path, place: Path) -> None:
    assert mirrortune("merge", run, "-o", "merged", "-q").exit_code == 0
    write_table(place / "rows.csv", [[text] for text in texts(30)], ("review",))
    for target in (run, "merged"):
        assert mirrortune("predict", target, "-d", "rows.csv", "-o", f"{Path(target).name}.csv").exit_code == 0
    by_run, by_merged = (table_of((place / name).read_text()) for name in ("run.csv", "merged.csv"))
    assert [row["prediction"] for row in by_run] == [row["prediction"] for row in by_merged]
    assert table_of(mirrortune("predict", "merged", "--text", "good").stdout)[0]["text"] == "good"


@pytest.mark.slow
def test_several_processes_write_the_file_of_one(run: Path, place: Path) -> None:
    write_table(place / "rows.csv", [[text] for text in texts(400)], ("text",))
    assert mirrortune("predict", run, "-d", "rows.csv", "-o", "one.csv").exit_code == 0
    done = finish(start("predict", run, "-d", "rows.csv", "-o", "two.csv", "--num-processes", 2))
    assert done.exit_code == 0, done.stderr
    assert (place / "two.csv").read_bytes() == (place / "one.csv").read_bytes()
    (place / "rows.csv").write_text("text,n\n" + "good,1\n" * 100 + "bad\n", encoding="utf-8")
    broken = finish(start("predict", run, "-d", "rows.csv", "--num-processes", 2))
    assert broken.exit_code == 3, broken.stderr


@pytest.mark.slow
def test_a_command_that_was_killed_goes_on_to_the_same_bytes(run: Path, place: Path) -> None:
    write_table(place / "rows.csv", [[text] for text in texts(40_000)], ("text",))
    assert mirrortune("predict", run, "-d", "rows.csv", "-o", "whole.csv").exit_code == 0
    killed = start("predict", run, "-d", "rows.csv", "-o", "a.csv")
    while killed.poll() is None and len([*place.glob(".a.csv.parts/rows-*")]) < 2:
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert not (place / "a.csv").exists()
    resumed = mirrortune("predict", run, "-d", "rows.csv", "-o", "a.csv", "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert "continuing after" in resumed.said
    assert (place / "a.csv").read_bytes() == (place / "whole.csv").read_bytes()
    assert not list(place.glob(".*"))
