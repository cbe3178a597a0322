# SPDX-License-Identifier: Apache-2.0
"""Which rows eval scores, which flags it takes, and that a merge keeps its base's sharding."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mirrortune.data.dataset import DataSet, load_data
from mirrortune.system.paths import DataPlace
from tests.cli.console import mirrortune, reviews, write_table


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A run on ``reviews.csv`` (60 rows) beside it, of which training set 6 aside; nobody writes into it."""
    folder = tmp_path_factory.mktemp("run")
    rows = write_table(folder / "reviews.csv", reviews(60))
    words = ["-m", tiny_model_dir, "-t", "text-classification", "-d", rows, "--max-steps", 2]
    assert mirrortune("train", *words, "-o", folder / "run").exit_code == 0
    return folder / "run"


def test_the_protocol_is_named_in_the_results(run: Path, desk: Path, tiny_model_dir: Path) -> None:
    write_table(desk / "parts" / "train.csv", reviews(16))
    write_table(desk / "parts" / "validation.csv", reviews(12))
    words = ["-m", tiny_model_dir, "-t", "text-classification", "-d", "parts", "-o", "halves", "--max-steps", 1]

    assert mirrortune("train", *words, "eval.protocol=split-dev").exit_code == 0

    found = [json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in (run, desk / "halves")]
    assert [results["protocol"] for results in found] == ["dev-best", "split-dev"]
    assert [list(results["reported"]) for results in found] == [[], ["held-out half"]]
    assert found[1]["reported"]["held-out half"].keys() == {"accuracy", "loss"}


def test_rows_set_aside_are_scored_and_not_counted_as_training_rows(run: Path, desk: Path) -> None:
    validation = mirrortune("eval", run, "--json").data
    assert (validation["split"], validation["rows"]) == ("validation", 6)
    train = mirrortune("eval", run, "--split", "train", "--json").data
    assert (train["split"], train["rows"]) == ("train", 54)
    by_name = mirrortune("eval", run, "-d", run.parent / "reviews.csv", "--json").data
    assert by_name == validation


def test_rows_set_aside_of_data_that_has_changed_are_scored_with_a_warning(desk: Path, tiny_model_dir: Path) -> None:
    words = ["-m", tiny_model_dir, "-t", "text-classification", "-d", "reviews.csv", "--max-steps", 1, "-o", "run"]
    assert mirrortune("train", *words).exit_code == 0
    assert "the data is not that of the run" not in mirrortune("eval", "run").said
    write_table(desk / "reviews.csv", reviews(70))

    scored, answered = mirrortune("eval", "run"), mirrortune("predict", "run", "--split", "validation")

    for outcome in (scored, answered):
        assert outcome.exit_code == 0
        assert "warning: the data is not that of the run (reviews.csv has changed), so other rows" in outcome.said
    write_table(desk / "new.csv", reviews(35))
    for words in (["eval", "run", "-d", "new.csv"], ["predict", "run", "-d", "reviews.csv"]):
        assert "the data is not that of the run" not in mirrortune(*words).said


def test_other_splits_may_change_without_a_warning(desk: Path, tiny_model_dir: Path) -> None:
    write_table(desk / "parts" / "train.csv", reviews(40))
    write_table(desk / "parts" / "test.csv", reviews(12))
    words = ["-m", tiny_model_dir, "-t", "text-classification", "-d", "parts", "--max-steps", 1, "-o", "run"]
    assert mirrortune("train", *words).exit_code == 0
    write_table(desk / "parts" / "test.csv", reviews(20))

    for words in (["eval", "run"], ["predict", "run", "--split", "validation"]):
        assert "the data is not that of the run" not in mirrortune(*words).said
    write_table(desk / "parts" / "train.csv", reviews(50))
    assert "the data is not that of the run (train.csv has changed)" in mirrortune("eval", "run").said


def test_a_run_whose_data_is_not_known_is_scored(desk: Path, run: Path) -> None:
    shutil.copytree(run, desk / "copy")
    (desk / "copy" / "environment.json").write_text("{", encoding="utf-8")
    assert mirrortune("eval", "copy").exit_code == 0


def test_rows_of_a_validation_split_that_was_trained_on_are_not_scored_as_validation(
    desk: Path, tiny_model_dir: Path
) -> None:
    write_table(desk / "parts" / "validation.csv", reviews(40))
    words = ["-m", tiny_model_dir, "-t", "text-classification", "-d", "parts", "data.train_split=validation"]

    trained = mirrortune("train", *words, "-o", "learned", "--max-steps", 1, "--json").data
    scored = mirrortune("eval", "learned", "--json").data

    assert (scored["split"], scored["rows"]) == ("validation", 4)
    assert scored["metrics"] == pytest.approx(trained["metrics"], abs=1e-5)


def test_training_rows_in_other_data_are_counted(run: Path, desk: Path) -> None:
    """A copy of the file of the run, of whose 60 rows 6 were set aside, and a row that nobody has seen."""
    shutil.copy(run.parent / "reviews.csv", desk / "copy.csv")
    said = mirrortune("eval", run, "-d", "copy.csv").said
    found = re.search(r"(\d+) rows are also among the training rows", said)
    assert found is not None
    assert 54 <= int(found[1]) <= 60  # equal sentences

    (desk / "part.csv").write_text("text,label\nthis one is new,positive\n", encoding="utf-8")
    assert "among the training rows" not in mirrortune("eval", run, "-d", "part.csv").said
    assert "among the training rows" not in mirrortune("eval", run, "--split", "train").said


def test_rows_that_the_run_left_out_are_not_counted(desk: Path, tiny_model_dir: Path) -> None:
    rows = [(f"the film {'a ' * number}", "the plot", ("bad", "good")[number % 2]) for number in range(30)]
    write_table(desk / "reviews.csv", rows, ("text", "more", "label"))
    words = ["-m", tiny_model_dir, "-t", "text-classification", "-d", "reviews.csv", "--max-steps", 1, "-o", "run"]
    words += ["data.text_columns=[text, more]", "data.max_train_rows=5"]
    assert mirrortune("train", *words).exit_code == 0

    shutil.copy("reviews.csv", "copy.csv")
    assert re.search(r"\b5 rows are also among the training rows", mirrortune("eval", "run", "-d", "copy.csv").said)
    write_table(desk / "renamed.csv", rows, ("text", "rest", "label"))  # one column alone says nothing of a pair
    words = ["eval", "run", "-d", "renamed.csv", "data.text_columns=[text, rest]"]
    assert "among the training rows" not in mirrortune(*words).said


@pytest.mark.parametrize("data", [{"path": ["reviews.csv", "owner/name"]}, {"validation_path": "owner/name"}])
def test_a_data_set_of_the_hub_is_not_opened_to_count(
    run: Path, desk: Path, data: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(run, desk / "run"))
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text(encoding="utf-8"))
    (copy / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "data": {**recipe["data"], **data}}), encoding="utf-8")
    shutil.copy("reviews.csv", "copy.csv")
    opened: list[str] = []

    def load(place: DataPlace, *words: Any, **named: Any) -> DataSet:
        opened.append(place.kind)
        return load_data(place, *words, **named)

    monkeypatch.setattr("mirrortune.runs.rows.load_data", load)
    assert mirrortune("eval", "run", "-d", "copy.csv").exit_code == 0
    assert opened == ["path"]


def test_other_data_is_scored_whole(run: Path, desk: Path) -> None:
    write_table(desk / "new.csv", reviews(35))
    found = mirrortune("eval", run, "-d", "new.csv", "--json").data
    assert (found["split"], found["rows"]) == ("all", 35)
    assert mirrortune("eval", run, "-d", "new.csv", "--split", "train", "--json").data["rows"] == 35
    outcome = mirrortune("eval", run, "-d", "new.csv", "--split", "validation")
    assert outcome.exit_code == 3
    assert "there is no split 'validation'" in outcome.said


def test_the_model_of_a_tasks_recipe_is_not_that_of_a_run(run: Path) -> None:
    scored = mirrortune("eval", run, "-t", "imdb", "-d", run.parent / "reviews.csv", "data.max_length=32")

    assert scored.exit_code == 0, scored.stderr  # and not: roberta-base cannot be reached


def test_other_columns_are_read_when_named(run: Path, desk: Path) -> None:
    rows = [(i, text, label) for i, (text, label) in enumerate(reviews(12))]
    write_table(desk / "renamed.csv", rows, header=("id", "body", "verdict"))
    words = ("--text-column", "body", "--label-column", "verdict")
    assert mirrortune("eval", run, "-d", "renamed.csv", *words, "--json").data["rows"] == 12


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--lr", "1"), "No such option"),
        (("--method", "full"), "No such option"),
        (("-t", "regression"), "the run was trained for text-classification, got regression"),
        (("--text-column", "text", "--text-column", "label"), "the run reads 1 texts, got 2"),
        (("--batch-size", "0"), "--batch-size: got 0. Allowed: greater than 0"),
        (("--max-length", "100000"), "the model takes at most"),
    ],
)
def test_a_flag_that_cannot_apply_is_refused(run: Path, words: tuple[str, ...], says: str) -> None:
    outcome = mirrortune("eval", run, *words)
    assert outcome.exit_code == 2
    assert says in outcome.said


def test_a_merge_keeps_the_sharding_of_its_base(tiny_model_dir: Path, desk: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir)
    base.save_pretrained("sharded", max_shard_size="20KB")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained("sharded")
    largest = max(f.stat().st_size for f in Path("sharded").glob("model-*.safetensors"))
    words = ["-m", "sharded", "-t", "text-classification", "-d", "reviews.csv", "--max-steps", 1]
    assert mirrortune("train", *words, "-o", "run").exit_code == 0
    assert mirrortune("merge", "run", "-o", "merged").exit_code == 0
    shards = [f.stat().st_size for f in Path("merged").glob("model-*.safetensors")]
    assert len(shards) > 1
    assert max(shards) <= largest


@pytest.mark.parametrize("written", [[], ["--predictions", "answers.tsv"]])
def test_outputs_that_are_no_numbers_have_no_score(run: Path, desk: Path, written: list[str]) -> None:
    """An argmax takes NaN for the first class, so half of such rows would be right."""
    assert mirrortune("merge", run, "-o", "merged").exit_code == 0
    tensors = load_file(desk / "merged" / "model.safetensors")
    tensors["classifier.bias"][1] = float("nan")
    save_file(tensors, desk / "merged" / "model.safetensors", {"format": "pt"})
    words = ["-t", "text-classification", "-d", run.parent / "reviews.csv"]
    found = mirrortune("eval", "merged", *words, *written)
    assert found.exit_code == 5
    assert "the model's output is not a number (NaN) for 6 of 6 rows, so there is nothing to score" in found.said
    assert "accuracy" not in found.stdout
    assert not (desk / "answers.tsv").exists()
