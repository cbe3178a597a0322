# SPDX-License-Identifier: Apache-2.0
"""Layers of settings become one checked recipe, and every error names its place."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirrortune.cli.flags import FLAGS, given_flags
from mirrortune.config import strict_yaml
from mirrortune.config.recipe import (
    Layer,
    flag_layer,
    flatten,
    override_layer,
    read_recipe,
    resolve,
    shipped_recipes,
    task_layer,
)
from mirrortune.config.schema import Recipe
from mirrortune.errors import ConfigError
from mirrortune.registry import task_kinds


def written(folder: Path, text: str, name: str = "my.yaml") -> Layer:
    """The layer of a recipe file with that text."""
    (folder / name).write_text(text, encoding="utf-8")
    return read_recipe(str(folder / name))


def refusal(*layers: Layer) -> list[str]:
    """The lines of the error that the layers give."""
    with pytest.raises(ConfigError) as caught:
        resolve(list(layers))
    return str(caught.value).splitlines()


def test_a_later_layer_wins_by_presence_and_says_where_it_came_from(tmp_path: Path) -> None:
    file = written(tmp_path, "train:\n  lr: 2e-4\n  epochs: 5\n  seed: 3\n")
    words = override_layer(["train.epochs=6", "train.head-lr=0"])
    flags = flag_layer({"train.seed": ("--seed", 0), "data.text_columns": ("--text-column", ["a", "b"])})

    resolved = resolve([file, words, flags])

    train = resolved.recipe.train
    assert (train.lr, train.epochs, train.head_lr, train.seed) == (2e-4, 6.0, 0.0, 0)
    assert resolved.recipe.data.text_columns == ("a", "b")
    assert resolved.origins == {
        "train.lr": f"{tmp_path / 'my.yaml'}:2: train.lr",
        "train.epochs": "'train.epochs=6'",
        "train.head_lr": "'train.head-lr=0'",
        "train.seed": "--seed",
        "data.text_columns": "--text-column",
    }


@pytest.mark.parametrize(
    ("path", "words", "config", "revision"),
    [
        ("rows.csv", [], None, None),
        ("other/data", [], None, None),
        ("hf://nyu-mll/glue:ax", [], None, "refs/pr/1"),
        ("hf://nyu-mll/glue", [], "mnli", "refs/pr/1"),
        ("nyu-mll/glue#500", [], "mnli", "refs/pr/1"),
        ("rows.csv", ["data.config=own"], "own", None),  # for whoever reads the data to refuse
    ],
)
def test_a_configuration_is_of_the_data_that_it_was_given_with(
    tmp_path: Path, path: str, words: list[str], config: str | None, revision: str | None
) -> None:
    file = written(tmp_path, "data: {path: nyu-mll/glue, config: mnli, revision: refs/pr/1, max_length: 9}\n")

    data = resolve([file, override_layer(words), flag_layer({"data.path": ("--data", path)})]).recipe.data

    assert (data.path, data.config, data.revision, data.max_length) == (path, config, revision, 9)


def test_a_resolved_recipe_is_read_back_the_same(tmp_path: Path) -> None:
    words = [
        "train.lr=2e-05",
        "task.labels=[no, '1']",
        "adapter.rank=8",
        "adapter.options={side: output}",
        "output_dir=x",
    ]
    recipe = resolve([override_layer(words)]).recipe

    again = resolve([written(tmp_path, recipe.to_yaml())]).recipe

    assert again == recipe
    assert again.task.labels == ("no", "1")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train:\n  lrr: 1\n", ["my.yaml:2: train.lrr: unknown key 'lrr'. Did you mean 'lr'? Allowed: lr, head_lr"]),
        ("trian:\n  lr: 1\n", ["my.yaml:1: trian: unknown key 'trian'. Did you mean 'train'? Allowed: model, task"]),
        ("train:\n  lr: fast\n", ["my.yaml:2: train.lr: got 'fast'. Allowed: number"]),
        ("train:\n  lr: '2e-4'\n", ["my.yaml:2: train.lr: got '2e-4'. Allowed: number"]),
        ("train:\n  lr: .nan\n", ["my.yaml:2: train.lr: got nan. Allowed: a finite number"]),
        ("train:\n  lr: .inf\n", ["my.yaml:2: train.lr: got inf. Allowed: a finite number"]),
        ("train:\n  lr: -1\n", ["my.yaml:2: train.lr: got -1. Allowed: greater than or equal to 0"]),
        ("train:\n  batch_size: 1.5\n", ["my.yaml:2: train.batch_size: got 1.5. Allowed: integer"]),
        ("train:\n  seed: true\n", ["my.yaml:2: train.seed: got True. Allowed: integer"]),
        ("model:\n  trust_remote_code: no\n", ["model.trust_remote_code: got 'no'. Allowed: true or false"]),
        ("train:\n  schedule: liner\n", ["train.schedule: got 'liner'. Did you mean 'linear'? Allowed: 'linear'"]),
        ("adapter:\n  rank: big\n", ["my.yaml:2: adapter.rank: got 'big'. Allowed: 'full' or 'out' or integer"]),
        ("adapter:\n  rank: 0\n", ["my.yaml:2: adapter.rank: got 0. Allowed: 'full' or 'out' or greater than 0"]),
        ("data:\n  text_columns: text\n", ["data.text_columns: got 'text'. Allowed: a list, such as [a, b]"]),
        ("data:\n  text_columns: [a, 1]\n", ["data.text_columns: got 1. Allowed: text in quotes"]),
        ("model: roberta-base\n", ["my.yaml:1: model: got 'roberta-base'. Allowed: a section of settings"]),
        ("data: {validation_fraction: 1}\n", ["my.yaml:1: data.validation_fraction: got 1. Allowed: less than 1"]),
        (
            "train:\n  lr: fast\n  epochs: 0\nadaptr: {}\ntask: {kind: 3}\n",
            ["my.yaml:5: task.kind: got 3", "my.yaml:2: train.lr: got 'fast'", "my.yaml:3: train.epochs: got 0",
             "my.yaml:4: adaptr: unknown key 'adaptr'. Did you mean 'adapter'?"],
        ),
    ],
)  # fmt: skip
def test_errors_name_file_line_key_value_and_what_is_allowed(tmp_path: Path, text: str, says: list[str]) -> None:
    lines = refusal(written(tmp_path, text))

    assert len(lines) == len(says)
    for line, part in zip(lines, says, strict=True):
        assert part in line


def test_errors_of_the_command_line_name_the_word_or_the_flag() -> None:
    words, flags = override_layer(["trian.lr=1", "train.epochs=abc"]), flag_layer({"train.lr": ("--lr", "x")})

    lines = refusal(words, flags)

    assert sorted(line.split(":")[0] for line in lines) == ["'train.epochs=abc'", "'trian.lr=1'", "--lr"]


@pytest.mark.parametrize("words", [["train.lr=1", "train.lr.x=1"], ["train.lr.x=1", "train.lr=1"]])
def test_a_value_and_a_section_of_one_name_exclude_each_other(words: list[str]) -> None:
    with pytest.raises(ConfigError):
        resolve([override_layer(words)])


def test_a_value_where_a_section_belongs_is_not_lost_under_later_layers(tmp_path: Path) -> None:
    file = written(tmp_path, "data: my.csv\n")

    lines = refusal(file, flag_layer({"data.label_column": ("--label-column", "y")}))

    assert "my.yaml:1: data: got 'my.csv'. Allowed: a section, such as data: {label_column: ...}" in lines[0]


def test_a_section_of_comments_is_an_empty_section(tmp_path: Path) -> None:
    assert resolve([written(tmp_path, "train:\n  # lr: 1\ndata:\n")]).recipe == Recipe()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the recipe is empty"),
        ("# a comment\n", "the recipe is empty"),
        ("- a\n", "got a list"),
        ("just text\n", "got a text"),
        ("2\n", "got a number"),
        ("a: [\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        written(tmp_path, text)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("glue/sst", "unknown recipe 'glue/sst'. Did you mean 'glue/sst2'? Allowed: "),
        ("nowhere.yaml", "cannot read nowhere.yaml"),
        ("quikstart", "Did you mean 'quickstart'?"),
    ],
)
def test_a_recipe_that_is_not_there(name: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_recipe(name)

    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a: 1\nb: \xff\n", r"r\.yaml:2: a recipe cannot be read: it is not UTF-8 \(byte 0xff\)\. Save it as UTF-8"),
        ("model: {name: x}".encode("utf-16"), r"r\.yaml:1: .* it is UTF-16\. Save it as UTF-8"),
    ],
)
def test_a_recipe_that_is_not_text(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "r.yaml").write_bytes(content)

    with pytest.raises(ConfigError, match=says):
        read_recipe(str(tmp_path / "r.yaml"))


def test_a_model_beside_a_recipe_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("model", "project/owner/tuned"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "project" / "results").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    for name, found in (
        ("../model", str(tmp_path / "model")),
        ("owner/tuned", str(tmp_path / "project/owner/tuned")),
        ("results", "results"),  # a folder, but no model
        ("../other", "../other"),
        ("owner/name", "owner/name"),
    ):
        (tmp_path / "project" / "r.yaml").write_text(f"model: {{name: {name}}}\n", encoding="utf-8")
        assert read_recipe(str(tmp_path / "project" / "r.yaml")).values["model"]["name"] == found
    (tmp_path / "project" / "r.yaml").write_text(f"model: {{name: {'x' * 5000}}}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="File name too long"):
        read_recipe(str(tmp_path / "project" / "r.yaml"))


def test_data_beside_a_recipe_is_found_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\n", encoding="utf-8")
    (tmp_path / "parts").mkdir()

    for given_path, expected in {
        "rows.csv": str(tmp_path / "rows.csv"), "./rows.csv": str(tmp_path / "rows.csv"),
        "parts": str(tmp_path / "parts"), "other.csv": "other.csv", "owner/set": "owner/set",
        "shipped:data/x": "shipped:data/x", "/abs/rows.csv": "/abs/rows.csv",
    }.items():  # fmt: skip
        layer = written(tmp_path, f"data: {{path: '{given_path}'}}\n")
        assert resolve([layer]).recipe.data.path == expected


def test_task_names_are_kinds_and_shipped_recipes() -> None:
    assert {"regression", "text-classification", "image-classification", "causal-lm"} <= set(task_kinds())
    assert resolve([task_layer("regression", task_kinds())]).recipe.task.kind == "regression"
    assert resolve([task_layer("glue/stsb", task_kinds())]).recipe.task.kind == "regression"
    with pytest.raises(ConfigError, match="Did you mean 'text-classification'"):
        task_layer("text-clasification", task_kinds())


def test_every_flag_sets_a_setting_that_exists() -> None:
    known = flatten(Recipe())

    assert {flag.key for flag in FLAGS} <= set(known)
    assert len({name for flag in FLAGS for name in flag.names}) == sum(len(flag.names) for flag in FLAGS)


def test_flags_that_were_not_given_set_nothing() -> None:
    values = {flag.parameter: [] if flag.kind == list[str] else None for flag in FLAGS}

    assert given_flags(values, []) == {}
    assert given_flags({**values, "train__lr": "0", "adapter__rank": "full", "train__seed": "0"}, []) == {
        "adapter.rank": ("--rank", "full"),
        "train.lr": ("--lr", 0),
        "train.seed": ("--seed", 0),
    }


def test_a_flag_of_an_unset_variable_is_refused() -> None:
    errors: list[ConfigError] = []
    assert given_flags({"train__max_steps": "", "adapter__rank": " "}, errors) == {}
    assert [str(error).split(".")[0] for error in errors] == ["--rank: it has no value", "--max-steps: it has no value"]


KEYS = st.sampled_from([*flatten(Recipe()), "train", "model", "data.pth", "x.y.z", "", "adapter.options.a"])
VALUES = st.sampled_from(
    ["1", "-1", "0", "1e400", "2e-4", "yes", "true", "null", "", "[]", "[a]", "{a: 1}", "full", "'", "\ud800",
     '"\\ud800"', "&a [*a]", "!!int x", "9" * 5000, ".nan", "auto", "a\x00b"]
) | st.text(max_size=12)  # fmt: skip


@settings(max_examples=300)
@given(st.lists(st.tuples(KEYS, VALUES), max_size=5))
def test_no_assignment_raises_anything_but_a_config_error(pairs: list[tuple[str, str]]) -> None:
    with contextlib.suppress(ConfigError):
        resolve([override_layer([f"{key}={value}"]) for key, value in pairs])


@settings(max_examples=200)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3)))  # fmt: skip
def test_no_recipe_file_raises_anything_but_a_config_error(data: Any) -> None:
    values = data if isinstance(data, dict) else {"train": data, "task": {"labels": data}}
    with contextlib.suppress(ConfigError):
        text = strict_yaml.dump(values)
        resolve([Layer(values=strict_yaml.load(text, "fuzz")[0], origin="fuzz")])


def test_shipped_recipes_have_names_without_an_ending() -> None:
    assert {"quickstart", "glue/sst2"} <= set(shipped_recipes())


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("adapter.layers=[-1]", 'got [-1]. Allowed: a list of numbers of blocks, from 0 on, and of "last N"'),
        ("adapter.layers=[]", 'got []. Allowed: a list of numbers of blocks, from 0 on, and of "last N"'),
        ("train.class_weights={up: -2, down: 0}", "got {'up': -2, 'down': 0}. Allowed: balanced, or {NAME: WEIGHT}"),
    ],
)
def test_a_value_of_several_types_is_refused_once_with_its_form(word: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve([override_layer([word])])
    assert str(caught.value).startswith(f"'{word}': {says}")
    assert len(str(caught.value).splitlines()) == 1
