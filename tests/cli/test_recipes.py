# SPDX-License-Identifier: Apache-2.0
"""The recipes in the package, found, read and copied from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mirrortune.config.recipe import read_recipe, shipped_recipes
from mirrortune.system.paths import shipped_folder
from tests.cli.console import mirrortune


def test_all_are_listed_and_any_word_finds_some(desk: Path) -> None:
    names = [recipe["name"] for recipe in mirrortune("recipes", "ls", "--json").data["recipes"]]
    assert names == shipped_recipes()

    listed = mirrortune("recipes", "ls").stdout.splitlines()
    assert [line.split()[0] for line in listed] == names
    assert all(len(line.split()) > 3 for line in listed), "every one is described"
    found = mirrortune("recipes", "ls", "image-classification", "CIFAR")
    assert [line.split()[0] for line in found.stdout.splitlines()] == ["vision/cifar10", "vision/cifar100"]
    nothing = mirrortune("recipes", "ls", "cifar", "bert")
    assert nothing.exit_code == 2
    assert "no recipe holds these words" in nothing.said


def test_a_recipe_is_printed_as_it_is(desk: Path) -> None:
    assert mirrortune("recipes", "cat", "glue/mnli").stdout == (shipped_folder() / "glue" / "mnli.yaml").read_text(
        encoding="utf-8"
    )
    unknown = mirrortune("recipes", "cat", "glue/mnly")
    assert unknown.exit_code == 2
    assert "unknown recipe 'glue/mnly'. Did you mean 'glue/mnli'?" in unknown.said


def test_a_copy_runs_and_knows_its_schema(desk: Path, tiny_model_dir: Path) -> None:
    first = mirrortune("recipes", "cp", "quickstart", "mine/quick.yaml")
    path = Path("mine/quick.yaml")
    assert "$schema" not in path.read_text(encoding="utf-8"), "it would be found on this machine alone"
    assert "mirrortune recipes schema > mine/recipe.schema.json" in first.stdout
    schema = desk / "mine" / "recipe.schema.json"
    schema.write_text(mirrortune("recipes", "schema").stdout, encoding="utf-8")
    assert json.loads(schema.read_text(encoding="utf-8"))["title"] == "mirrortune recipe"
    copied = mirrortune("recipes", "cp", "quickstart", "mine/quick.yaml", "--overwrite", "--json").data
    assert Path(copied["path"]) == path
    line = path.read_text(encoding="utf-8").splitlines()[1]
    assert line == "# yaml-language-server: $schema=recipe.schema.json"
    assert read_recipe(str(path)).values == read_recipe("quickstart").values

    planned = mirrortune("train", path, "-m", tiny_model_dir, "--max-length", 64, "--dry-run", "--json")
    assert planned.data["rows"] == {"train": 6400, "validation": 1056, "test": 1056}


@pytest.mark.parametrize(
    ("target", "says"),
    [("taken.yaml", "it already exists. Give another name, or --overwrite."), ("mine.yml.txt", "ends in .yaml")],
)
def test_nothing_is_overwritten_unasked(desk: Path, target: str, says: str) -> None:
    (desk / "taken.yaml").write_text("mine", encoding="utf-8")

    outcome = mirrortune("recipes", "cp", "quickstart", target)

    assert outcome.exit_code == 2
    assert says in outcome.said
    assert (desk / "taken.yaml").read_text(encoding="utf-8") == "mine"
    assert mirrortune("recipes", "cp", "quickstart", "taken.yaml", "--overwrite").exit_code == 0
    assert mirrortune("recipes", "cp", "glue/rte", desk).exit_code == 0
    assert (desk / "rte.yaml").is_file()
