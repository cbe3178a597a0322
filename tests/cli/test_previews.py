# SPDX-License-Identifier: Apache-2.0
"""What the model will see, shown before it is trained; and its answers, written to a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.console import mirrortune, reviews, write_lines, write_table
from tests.tiny_models import write_tiny_causal, write_tiny_vision

PREPARE = ("prepare", "-t", "text-classification", "--dry-run")


def test_the_test_split_is_checked_before_training(desk: Path, tiny_model_dir: Path) -> None:
    for name in ("train", "validation"):
        write_table(desk / "parts" / f"{name}.csv", [("the film was good", "up"), ("a bad plot", "down")])
    words = (*PREPARE, "-m", tiny_model_dir, "-d", "parts", "--json")

    write_table(desk / "parts" / "test.csv", [("fun", "up"), ("great", "")])
    outcome = mirrortune(*words)
    assert outcome.data["rows"] == {"train": 2, "validation": 2, "test": 2}
    assert "1 without a label" in outcome.stderr

    write_table(desk / "parts" / "test.csv", [("fun", "up"), ("great", "upp")])
    outcome = mirrortune(*words)
    assert outcome.exit_code == 3
    assert "test.csv:3: label 'upp' is not among the classes. Did you mean 'up'?" in outcome.stderr

    write_table(desk / "parts" / "test.csv", [("fun", "up")], ("text", "lable"))
    outcome = mirrortune(*words)
    assert outcome.exit_code == 3
    assert "it has no label column 'label'. Did you mean 'lable'?" in outcome.stderr

    write_table(desk / "parts" / "test.csv", [("fun", "7")], ("text", "number"))  # rows to be answered
    assert mirrortune(*words).data["rows"]["test"] == 1


def test_rows_are_shown_as_the_model_gets_them(desk: Path, tiny_model_dir: Path) -> None:
    write_table(desk / "parts" / "train.csv", [("the film was good", "up"), ("a bad plot", "down"), ("fun", "up")])
    write_table(desk / "parts" / "validation.csv", [("a bad plot", "down"), ("great", "up")])
    write_table(desk / "parts" / "test.csv", [("the film was good", "up"), ("fun", "up"), ("great", "up")])

    outcome = mirrortune(*PREPARE, "-m", tiny_model_dir, "-d", "parts", "--show", 2, "--json", "-v", "--rank", 4)

    assert outcome.data["duplicated_rows"] == 1
    lines = outcome.stderr.splitlines()
    assert "as a LoRA: rank 8" in lines, "the least that servers take of 4 and more"
    assert "  tokens of parts/train.csv (training rows): created for the first time" in lines
    assert "  1 validation row is also among the training rows" in lines
    assert "  2 test rows are also among the training rows" in lines
    assert "train classes: up 2 (67%), down 1 (33%)" in lines
    assert "train lengths: 3 █▁▁█▁█ 6" in lines or any(line.startswith("train lengths: 3 ") for line in lines)
    start = lines.index("example 1 of 3")
    assert lines[start + 1] == "  text: [CLS] the film was good [SEP]"
    assert [line.split(":")[0].strip() for line in lines[start + 2 : start + 5]] == [
        "input_ids", "token_type_ids", "attention_mask",
    ]  # fmt: skip
    assert lines[start + 4] == "  attention_mask: 1 1 1 1 1 1"
    assert lines[start + 5] == "  label: 1 (up)"
    assert "example 2 of 3" in lines
    assert "row 3 of 3" not in lines


def test_a_class_with_a_line_break_is_shown_in_one_line(desk: Path, tiny_model_dir: Path) -> None:
    rows = [{"text": f"film {i}", "label": "up\nhill" if i % 2 else "down"} for i in range(12)]
    (desk / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    lines = mirrortune(*PREPARE, "-m", tiny_model_dir, "-d", "rows.jsonl", "--show", 12).stderr.splitlines()
    assert r"  label: 1 (up\nhill)" in lines
    assert not any(line.startswith("hill") for line in lines)


def test_of_a_language_model_what_is_learned_is_shown(desk: Path, tmp_path: Path) -> None:
    model = write_tiny_causal(tmp_path / "chat")
    rows = [{"prompt": f"Say {i}: ", "completion": f"number {i}"} for i in range(20)]
    write_lines(desk / "rows.jsonl", rows)

    outcome = mirrortune(
        "prepare", "-t", "causal-lm", "-m", model, "-d", "rows.jsonl", "task.format=text", "--dry-run", "--show", 1
    )

    assert "text: Say " in outcome.stderr
    assert "learned: number " in outcome.stderr
    assert "labels: -100 -100" in outcome.stderr


def test_of_images_size_and_range_are_shown(desk: Path, tmp_path: Path) -> None:
    from PIL import Image

    model = write_tiny_vision(tmp_path / "vision")
    for i in range(8):
        folder = desk / "photos" / ("cat", "dog")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (i * 20, 0, 0)).save(folder / f"{i}.png")

    outcome = mirrortune("prepare", "-t", "image-classification", "-m", model, "-d", "photos", "--dry-run", "--show", 1)

    assert "pixel_values: 3 x 16 x 16, -2 to " in outcome.stderr
    assert "label: 0 (cat)" in outcome.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A run on reviews."""
    folder = tmp_path_factory.mktemp("predictions")
    write_table(folder / "reviews.csv", reviews(40))
    words = ["-m", tiny_model_dir, "-t", "text-classification", "-d", folder / "reviews.csv", "-o", folder / "run"]
    assert mirrortune("train", *words, "--max-steps", 1).exit_code == 0
    return folder / "run"


def test_answers_are_written_as_glue_takes_them(desk: Path, run: Path) -> None:
    write_table(desk / "hidden" / "test.csv", [(text, "") for text, _ in reviews(9)])

    words = ["eval", run, "-d", "hidden", "--split", "test", "--predictions", "SST-2.tsv"]
    refused = mirrortune(*words[:-2])
    outcome = mirrortune(*words, "--json")

    assert refused.exit_code == 3
    assert "9 of 9 rows have no label, so there is nothing to score" in refused.said
    assert outcome.data == {"metrics": {}, "split": "test", "rows": 9, "predictions": "SST-2.tsv"}
    lines = (desk / "SST-2.tsv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "index\tprediction"
    assert [line.split("\t")[0] for line in lines[1:]] == [str(i) for i in range(9)]
    names = [line.split("\t")[1] for line in lines[1:]]
    assert set(names) <= {"negative", "positive"}
    again = mirrortune(*words, "--overwrite", "eval.prediction_labels=indices", "data.test_split=test_matched")
    assert "no labels, nothing scored" in again.stdout
    indices = [line.split("\t")[1] for line in (desk / "SST-2.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    assert indices == [{"negative": "0", "positive": "1"}[name] for name in names]
    (desk / "hidden" / "test.csv").write_text("text\n" + "".join(f"{text}\n" for text, _ in reviews(9)))
    (desk / "answers").mkdir()
    named = ["eval.prediction_files={test: GOOD.tsv}", "eval.prediction_labels=indices"]
    without = mirrortune(*words[:-1], "answers", *named, "--json")
    assert without.data["predictions"] == "answers/GOOD.tsv", "no column of labels at all"
    assert (desk / "answers" / "GOOD.tsv").read_bytes() == (desk / "SST-2.tsv").read_bytes()


def test_labelled_rows_are_scored_and_written(desk: Path, run: Path) -> None:
    outcome = mirrortune("eval", run, "-d", "reviews.csv", "--predictions", "all.tsv", "--json")

    lines = (desk / "all.tsv").read_text(encoding="utf-8").splitlines()[1:]
    right = [line.split("\t")[1] == label for line, (_, label) in zip(lines, reviews(60), strict=True)]
    assert sum(right) / len(right) == pytest.approx(outcome.data["metrics"]["accuracy"])


def test_another_file_is_not_replaced(desk: Path, run: Path) -> None:
    (desk / "mine.tsv").write_text("mine", encoding="utf-8")
    for words in ([], ["--overwrite"]):
        outcome = mirrortune("eval", run, "-d", "reviews.csv", "--predictions", "mine.tsv", *words)
        assert outcome.exit_code == 2
        assert "--predictions: mine.tsv is there and holds no predictions. Give another name." in outcome.said
    assert (desk / "mine.tsv").read_text(encoding="utf-8") == "mine"
