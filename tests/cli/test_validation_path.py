# SPDX-License-Identifier: Apache-2.0
"""data.validation_path: validation rows of another data set, with that set's columns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mirrortune.config.recipe import flag_layer, override_layer, read_recipe, resolve
from mirrortune.config.schema import Recipe
from tests.cli.console import mirrortune, reviews, write_table

COLUMNS = "data.validation_column_names={text: sentence, label: verdict}"
KIND = ["-t", "text-classification"]


@pytest.fixture
def other(desk: Path) -> Path:
    """A file of 7 rows in the folder of ``reviews.csv``, whose columns have other names."""
    return write_table(desk / "other.csv", reviews(7, seed=3), header=("sentence", "verdict"))


@pytest.mark.usefixtures("other")
def test_a_run_is_scored_on_the_other_rows_and_so_is_eval(desk: Path, tiny_model_dir: Path) -> None:
    words = ["-m", tiny_model_dir, *KIND, "-d", "reviews.csv", "data.validation_path=other.csv", COLUMNS]
    trained = mirrortune("train", *words, "-o", "run", "--max-steps", 1, "--json")

    assert f"validation rows: {desk / 'other.csv'}, 7 rows" in trained.stderr
    scored = mirrortune("eval", "run", "--json")
    assert (scored.data["rows"], scored.data["metrics"]) == (7, pytest.approx(trained.data["metrics"]))
    assert "validation_path" in scored.stderr
    assert mirrortune("eval", "run", "-d", write_table(desk / "new.csv", reviews(5)), "--json").data["rows"] == 5
    origin = json.loads((desk / "run" / "environment.json").read_text(encoding="utf-8"))["data"]
    assert origin["validation"]["path"] == str(desk / "other.csv")


def test_rows_named_by_a_far_reaching_pattern_are_not_replaced_by_others(desk: Path, tiny_model_dir: Path) -> None:
    """The pattern in a run's recipe is not followed, since the recipe may be anybody's."""
    write_table(desk / "val" / "a" / "x.csv", reviews(7, seed=3))
    words = ["-m", tiny_model_dir, *KIND, "-d", "reviews.csv", "data.validation_path=val/**/*.csv"]
    assert mirrortune("train", *words, "-o", "run", "--max-steps", 1).exit_code == 0

    for command in ("eval", "predict"):
        outcome = mirrortune(command, "run", "--split", "validation")
        assert outcome.exit_code == 2, outcome.stderr
        assert "recipe.yaml" in outcome.said
        assert "give 'data.validation_path=val/**/*.csv'" in outcome.said
    assert mirrortune("eval", "run", "data.validation_path=val/**/*.csv", "--json").data["rows"] == 7
    assert mirrortune("eval", "run", "-d", write_table(desk / "new.csv", reviews(5)), "--json").data["rows"] == 5


def test_a_recipe_names_it_beside_itself(desk: Path, other: Path, tiny_model_dir: Path) -> None:
    folder = desk / "recipes"
    folder.mkdir()
    other.rename(folder / "other.csv")
    (folder / "mine.yaml").write_text(
        "task: {kind: text-classification}\n"
        "data: {validation_path: other.csv, validation_column_names: {text: sentence, label: verdict}}\n",
        encoding="utf-8",
    )
    words = ["prepare", folder / "mine.yaml", "-m", tiny_model_dir, "data.path=reviews.csv", "--dry-run", "--json"]
    assert mirrortune(*words).data["rows"] == {"train": 60, "validation": 7}


@pytest.mark.usefixtures("other")
@pytest.mark.parametrize(
    ("words", "exit_code", "says"),
    [
        ([COLUMNS], 2, "data.validation_column_names: no other data set has the validation rows"),
        (["data.validation_path=other.csv"], 3, "it has no text column 'text'"),
        (["data.validation_path=other.csv", "data.validation_column_names={text: sentences}"], 3,
         "other.csv: it has no column 'sentences'. Did you mean 'sentence'?"),
        (["data.validation_path=nowhere.csv"], 3, "nowhere.csv"),
        (["data.validation_path=other.csv#0"], 2, "data.validation_path: got #0. Allowed: #1 or more."),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(tiny_model_dir: Path, words: list[str], exit_code: int, says: str) -> None:
    outcome = mirrortune("prepare", "-m", tiny_model_dir, *KIND, "-d", "reviews.csv", "--dry-run", *words)

    assert outcome.exit_code == exit_code, outcome.stderr
    assert says in outcome.said


def test_other_training_rows_bring_their_own_validation_rows() -> None:
    def of(*layers: tuple[str, str]) -> Recipe:
        over = [flag_layer({"data.path": (flag, value)}) for flag, value in layers if flag == "--data"]
        over += [override_layer([f"{key}={value}"]) for key, value in layers if key != "--data"]
        return resolve([read_recipe("llm/metamath"), *over]).recipe

    shipped = of().data
    assert shipped.validation_path == "hf://openai/gsm8k:main:test"
    assert of(("--data", "meta-math/MetaMathQA#500")).data.validation_path == shipped.validation_path
    changed = of(("--data", "mine.jsonl")).data
    assert (changed.validation_path, changed.validation_column_names) == (None, {})
