# SPDX-License-Identifier: Apache-2.0
"""Several data sets: ``--data`` given twice, or ``data.path`` as a list of paths with weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from mirrortune.config.recipe import read_target_recipe, with_absolute_paths
from mirrortune.config.schema import Recipe
from mirrortune.merging.redaction import Redaction
from tests.cli.console import mirrortune, reviews, write_lines, write_table
from tests.laws.test_training_laws import differences
from tests.tiny_models import write_tiny_model

KIND = ["-t", "text-classification"]


@pytest.fixture
def other(desk: Path) -> Path:
    """30 rows beside ``reviews.csv``, whose columns have other names; two of its texts are there too."""
    rows = [*reviews(28, seed=5), *reviews(60)[:2]]
    return write_lines(desk / "other.jsonl", [{"sentence": t, "verdict": v, "number": 1} for t, v in rows])


def prepare(model: Path, *words: object) -> Any:
    return mirrortune("prepare", "-m", model, *KIND, *words, "--dry-run", "--json")


@pytest.mark.usefixtures("other")
def test_data_given_twice_is_mixed_by_the_columns_of_each(desk: Path, tiny_model_dir: Path) -> None:
    found = prepare(tiny_model_dir, "-d", "reviews.csv", "-d", "other.jsonl")
    assert found.data["rows"] == {"train": 81, "validation": 9}
    assert [(s["path"], s["rows"], s["weight"]) for s in found.data["sources"]] == [
        ("reviews.csv", 54, 1.0), ("other.jsonl", 27, 1.0),
    ]  # fmt: skip
    assert "other.jsonl: text column 'sentence' (detected" in found.stderr
    assert "9 rows set aside for validation (seed 0, stratified)" in found.stderr
    alone = prepare(tiny_model_dir, "-d", "reviews.csv")
    assert "sources" not in alone.data


@pytest.mark.usefixtures("other")
def test_weights_columns_and_repeated_rows_of_a_list(desk: Path, tiny_model_dir: Path) -> None:
    (desk / "mine.yaml").write_text(
        f"model: {{name: {tiny_model_dir}}}\n"
        "task: {kind: text-classification}\n"
        "data:\n"
        "  path:\n"
        "    - reviews.csv#40\n"
        "    - {path: other.jsonl, weight: 0.5, text_columns: [sentence], label_column: verdict}\n"
        "  validation_path: reviews.csv\n",
        encoding="utf-8",
    )
    found = mirrortune("prepare", "mine.yaml", "--dry-run", "--json")
    first, second = found.data["sources"]
    assert (first["rows"], first["rows_per_epoch"]) == (40, 40)
    assert (second["rows"], second["rows_per_epoch"]) == (30, 15)
    assert first["repeated"] == 0
    assert second["repeated"] >= 1
    assert f"source {desk / 'other.jsonl'}: 30 rows, weight 0.5: 15 an epoch" in found.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("other")
def test_a_run_on_several_data_sets_goes_on_bit_for_bit_and_is_scored(desk: Path, tiny_model_dir: Path) -> None:
    path = "data.path=[reviews.csv, {path: other.jsonl, weight: 1.5}]"
    words = ["train", "-m", tiny_model_dir, *KIND, path, "--batch-size", 8, "--epochs", 2, "train.save_every_steps=4"]
    trained = mirrortune(*words, "--keep", 9, "-o", "whole", "--json")
    assert trained.exit_code == 0, trained.stderr
    shutil.copytree("whole", "cut")
    for folder in Path("cut/checkpoints").iterdir():
        if int(folder.name[5:]) > 16:
            shutil.rmtree(folder)
    shutil.rmtree("cut/adapter")
    Path("cut/results.json").unlink()
    again = mirrortune(*words, "--keep", 9, "-o", "cut", "--resume", "--json")
    assert again.data["metrics"] == trained.data["metrics"]
    assert differences(desk / "whole", desk / "cut") == []

    results = json.loads(Path("whole/results.json").read_text(encoding="utf-8"))
    assert [s["rows_per_epoch"] for s in results["sources"]] == [54, 41]
    assert yaml.safe_load(Path("whole/recipe.yaml").read_text(encoding="utf-8"))["data"]["path"] == [
        str(desk / "reviews.csv"), {"path": str(desk / "other.jsonl"), "weight": 1.5},
    ]  # fmt: skip
    assert "Data sets" in Path("whole/report.html").read_text(encoding="utf-8")
    scored = mirrortune("eval", "whole", "--json")
    assert (scored.data["rows"], scored.data["metrics"]) == (9, pytest.approx(trained.data["metrics"]))
    assert mirrortune("eval", "whole", "--split", "train", "--json").data["rows"] == 81
    assert mirrortune("eval", "whole", "-d", "reviews.csv", "--json").data["rows"] == 60
    assert mirrortune("eval", "whole", "-d", "other.jsonl", "-d", "reviews.csv", "--json").data["rows"] == 90
    predicted = mirrortune("predict", "whole", "--split", "validation")
    assert len(predicted.stdout.splitlines()) == 10
    assert "mirrortune.source" not in predicted.stdout
    both = mirrortune("predict", "whole", "-d", "reviews.csv", "-d", "other.jsonl", "-o", "both.csv", "--json")
    assert both.data["rows"] == 90


def test_classes_are_united_and_labels_of_another_type_refused(desk: Path, tiny_model_dir: Path) -> None:
    write_table(desk / "third.csv", [(text, "mixed") for text, _ in reviews(8, seed=2)])
    united = prepare(tiny_model_dir, "-d", "reviews.csv", "-d", "third.csv")
    assert united.exit_code == 0, united.stderr
    assert "classes united: 2 of reviews.csv" in united.stderr
    assert "3 together, no class is in all of them" in united.stderr
    write_table(desk / "numbers.csv", [(text, str(row % 2)) for row, (text, _) in enumerate(reviews(8, seed=2))])
    refused = prepare(tiny_model_dir, "-d", "reviews.csv", "-d", "numbers.csv")
    assert refused.exit_code == 3
    assert "reviews.csv and numbers.csv: the labels of one are text" in refused.said
    write_table(desk / "pairs.csv", [("a b", "c d", "x"), ("e f", "g h", "y")] * 4, header=("text1", "text2", "label"))
    refused = prepare(tiny_model_dir, "-d", "reviews.csv", "-d", "pairs.csv")
    assert refused.exit_code == 3
    assert "reviews.csv and pairs.csv: their rows differ" in refused.said


def test_a_source_with_validation_rows_keeps_them_and_others_set_some_aside(
    desk: Path, tiny_model_dir: Path, other: Path
) -> None:
    folder = desk / "split"
    folder.mkdir()
    write_table(folder / "train.csv", reviews(20, seed=7))
    write_table(folder / "validation.csv", reviews(6, seed=8))
    found = prepare(tiny_model_dir, "-d", "split", "-d", other)
    assert found.data["rows"] == {"train": 47, "validation": 9}
    assert f"no split 'validation' in {other}: 3 rows set aside (seed 0)" in found.stderr
    halves = prepare(tiny_model_dir, "-d", "split", "-d", other, "eval.protocol=split-dev")
    assert sum(count for name, count in halves.data["rows"].items() if name != "train") == 9


@pytest.mark.parametrize(
    ("path", "exit_code", "says"),
    [
        ("[]", 2, "data.path"),
        ("[{path: reviews.csv, wieght: 2}]", 2, "unknown key 'wieght'. Did you mean 'weight'?"),
        ("[{path: reviews.csv, weight: 0}]", 2, "a path or Hub id, or a list of these and of {path: PATH, weight: 2}"),
        ("[{weight: 2}]", 2, "a list of these and of {path: PATH, weight: 2}"),
        ("[reviews.csv, nowhere.csv]", 3, "nowhere.csv"),
        (
            "[reviews.csv, {path: reviews.csv, label_column: text}]",
            3,
            "column 'text' has 56 different values in",
        ),
    ],
)
@pytest.mark.usefixtures("desk")
def test_lists_that_are_refused(tiny_model_dir: Path, path: str, exit_code: int, says: str) -> None:
    outcome = prepare(tiny_model_dir, f"data.path={path}")
    assert (outcome.exit_code, says in outcome.said) == (exit_code, True), outcome.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data.config=sst2"], "data.config: there is a list of data sets, got 'sst2'"),
        (["train.balance=true"], "train.balance: weights of data.path draw rows of some sources more often"),
        (["--class-weights", "balanced"], "train.class_weights: weights of data.path draw"),
    ],
)
@pytest.mark.usefixtures("desk")
def test_settings_that_a_list_cannot_have(tiny_model_dir: Path, words: list[object], says: str) -> None:
    outcome = prepare(tiny_model_dir, "data.path=[reviews.csv, {path: reviews.csv, weight: 2}]", *words)
    assert (outcome.exit_code, says in outcome.said) == (2, True), outcome.stderr


def test_the_recipe_of_a_target_walks_no_disk_by_a_list(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {path: [a.csv, {path: '/**/*.csv'}], label_column: x}\n", encoding="utf-8")
    layer, ignored = read_target_recipe(recipe)
    assert ignored == ["data.path"]
    assert layer.values["data"] == {"label_column": "x"}


@pytest.mark.usefixtures("other")
def test_paths_of_a_list_are_made_absolute_and_cut_when_pushed(desk: Path) -> None:
    recipe = Recipe.model_validate_json('{"data": {"path": ["reviews.csv#9", {"path": "other.jsonl"}, "owner/name"]}}')
    found = with_absolute_paths(recipe).data.path
    assert isinstance(found, tuple)
    assert [str(item) for item in found] == [f"{desk / 'reviews.csv'}#9", str(desk / "other.jsonl"), "owner/name"]
    text = Redaction().recipe(with_absolute_paths(recipe).to_yaml(), "recipe.yaml")
    assert str(desk) not in text
    results = {"run_dir": "x", "sources": [{"path": f"{desk}/my own/a.csv", "weight": 1.0}, {"path": "owner/name"}]}
    cut = json.loads(Redaction().results(json.dumps(results), "results.json"))
    assert [source["path"] for source in cut["sources"]] == ["./a.csv", "owner/name"]
    assert "owner/name" in text


@pytest.mark.slow
def test_mixed_streams_go_on_bit_for_bit(tmp_path: Path) -> None:
    model, data = write_tiny_model(tmp_path / "model", dropout=0.2), []
    for name, columns in (("one", ("text", "label")), ("two", ("sentence", "verdict"))):
        (tmp_path / name).mkdir()
        for seed, piece in enumerate(("train-0", "train-1", "validation")):
            rows = [dict(zip(columns, row, strict=True)) for row in reviews(12, seed)]
            write_lines(tmp_path / name / f"{piece}.jsonl", rows)
        data.append(str(tmp_path / name))
    words = ["train", "-m", model, *KIND, f"data.path=[{data[0]}, {{path: {data[1]}, weight: 2}}]", "--max-steps", 14]
    words += ["data.streaming=true", "data.shuffle_buffer=12", "--batch-size", 4, "train.save_every_steps=5"]
    whole = mirrortune(*words, "--keep", 9, "-o", tmp_path / "whole", "--json")
    assert whole.exit_code == 0, whole.stderr
    run = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", run)
    for folder in (run / "checkpoints").iterdir():
        if int(folder.name[5:]) > 5:
            shutil.rmtree(folder)
    shutil.rmtree(run / "adapter")
    (run / "results.json").unlink()
    again = mirrortune(*words, "--keep", 9, "-o", run, "--resume", "--json")
    assert again.data["metrics"] == whole.data["metrics"]
    assert differences(tmp_path / "whole", run) == []
    sources = json.loads((run / "results.json").read_text(encoding="utf-8"))["sources"]
    assert [source["share"] for source in sources] == [0.333333, 0.666667]
    assert mirrortune("eval", run, "--json").data["rows"] == 24
