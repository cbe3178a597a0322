# SPDX-License-Identifier: Apache-2.0
"""data.path: one path, or a list of paths and of mappings."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirrortune.config.data_paths import (
    absolute_paths,
    anchored_paths,
    bare_names,
    is_same_data,
    named_paths,
    short_name,
    walks_far,
    with_paths,
)
from mirrortune.config.recipe import flag_layer, flatten, override_layer, resolve
from mirrortune.config.schema import Recipe, SourceSection

LIST = ["a.csv#9", {"path": "hf://owner/name:sst2", "weight": 2}, SourceSection(path="b.csv")]


def test_the_paths_of_all_forms_are_found_and_changed() -> None:
    assert named_paths(LIST) == ["a.csv#9", "hf://owner/name:sst2", "b.csv"]
    assert named_paths("a.csv") == ["a.csv"]
    assert named_paths(None) == named_paths([3, {"weight": 2}]) == []
    assert bare_names(LIST) == ["a.csv", "owner/name:sst2", "b.csv"]
    changed = with_paths(LIST, str.upper)
    assert named_paths(changed) == ["A.CSV#9", "HF://OWNER/NAME:SST2", "B.CSV"]
    assert changed[1]["weight"] == 2


@pytest.mark.parametrize(
    ("value", "name"),
    [(None, ""), ("rows/a.csv", "a"), (["a.csv", "b.jsonl"], "a-b"), (["a.csv", "b.csv", "c.csv"], "a-and-2-more")],
)
def test_a_short_name(value: object, name: str) -> None:
    assert short_name(value) == name


def test_the_same_data_is_the_same_files_in_the_same_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_same_data(["a.csv", "b.csv"], [str(tmp_path / "a.csv"), {"path": "b.csv", "weight": 2}])
    assert not is_same_data(["a.csv", "b.csv"], ["b.csv", "a.csv"])
    assert not is_same_data("a.csv", ["a.csv", "b.csv"])
    assert not is_same_data(None, None)


def test_paths_of_a_list_are_anchored_and_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.csv").touch()
    given = ["a.csv#9", {"path": "a.csv"}, "gone.csv", "shipped:a.csv", "owner/name"]
    found = anchored_paths(given, tmp_path)
    assert found == [f"{tmp_path / 'a.csv'}#9", {"path": str(tmp_path / "a.csv")}, *given[2:]]
    monkeypatch.chdir(tmp_path)
    assert absolute_paths(given)[:2] == found[:2]


def test_a_pattern_that_walks_every_disk_is_seen_in_a_list() -> None:
    assert walks_far(["a.csv", {"path": "/**/*.csv"}])
    assert not walks_far(["a.csv", "rows/*.csv"])


def test_an_item_of_a_list_is_shown_without_what_is_not_set() -> None:
    recipe = resolve([override_layer(["data.path=[a.csv, {path: b.csv, weight: 2}]"])]).recipe
    assert flatten(recipe)["data.path"] == ["a.csv", {"path": "b.csv", "weight": 2.0}]
    assert [str(item) for item in recipe.data.path or ()] == ["a.csv", "b.csv (weight 2)"]
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_another_list_leaves_the_settings_of_the_first_data_set_behind() -> None:
    layers = [override_layer(["data.path=owner/name", "data.validation_path=rows.csv"])]
    layers[0] = layers[0].__class__(values=layers[0].values, origin="recipe.yaml")  # as a file, not typed
    kept = resolve([*layers, flag_layer({"data.path": ("--data", ["owner/name"])})]).recipe.data
    left = resolve([*layers, flag_layer({"data.path": ("--data", ["owner/name", "b.csv"])})]).recipe.data
    assert (kept.validation_path, left.validation_path) == ("rows.csv", None)
