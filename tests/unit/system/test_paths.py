# SPDX-License-Identifier: Apache-2.0
"""What is a path and what a Hub id, and where our own things are."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirrortune.adapters.files.find import adapter_to_score
from mirrortune.errors import ConfigError
from mirrortune.system.paths import (
    DataPlace,
    ModelPlace,
    cache_folder,
    hub_place,
    looks_like_path,
    package_folder,
    shipped_folder,
)


@pytest.mark.parametrize(
    ("name", "is_path"),
    [
        ("roberta-base", False), ("owner/model", False), ("nyu-mll/glue", False), ("gpt2", False),
        ("./model", True), ("../model", True), ("/model", True), ("~/model", True), ("a/b/c", True), (".", True),
        ("rows.csv", True), ("folder/rows.JSONL", True), ("model.v2", False), ("owner/model-1.5", False),
        ("C:\\models\\x", True),
    ],
)  # fmt: skip
def test_paths_and_hub_ids_are_told_apart(name: str, *, is_path: bool) -> None:
    assert looks_like_path(name) is is_path
    assert ModelPlace.parse(name).is_local is is_path


def test_what_exists_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not looks_like_path("model")
    (tmp_path / "model").mkdir()
    assert looks_like_path("model")


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIRRORTUNE_CACHE", str(tmp_path / "ours"))
    assert cache_folder() == tmp_path / "ours"
    monkeypatch.delenv("MIRRORTUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "mirrortune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "mirrortune"


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("me/x", ("me/x", None, None)), ("me/x@v1", ("me/x", "v1", None)), ("me/x:a/b", ("me/x", None, "a/b")),
        ("me/x@refs/pr/1:a", ("me/x", "refs/pr/1", "a")), ("x", ("x", None, None)),
        ("package:weights/model", ("package:weights/model", None, None)), ("./me@v1", ("./me@v1", None, None)),
        ("C:\\models", ("C:\\models", None, None)), ("me/x:/a", ("me/x:/a", None, None)),
    ],
)  # fmt: skip
def test_a_place_on_the_hub_has_a_revision_and_a_subfolder(
    name: str, place: tuple[str, str | None, str | None]
) -> None:
    assert hub_place(name) == place


def test_what_is_here_is_never_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "x@v1").mkdir(parents=True)
    assert hub_place("me/x@v1") == ("me/x@v1", None, None)
    for name in ("me/x@v1", "me/y@v1", "package:weights/model", "./x", "roberta-base"):
        assert adapter_to_score(name) is None


def test_a_folder_inside_a_package_is_found_without_running_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "weights_of_ours"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))

    assert package_folder("package:weights_of_ours/model") == package / "model"
    assert ModelPlace.parse("package:weights_of_ours/model").path() == package / "model"
    with pytest.raises(ConfigError, match="package 'weights_of_ours' has no folder 'modle'"):
        package_folder("package:weights_of_ours/modle")


@pytest.mark.parametrize(
    "name", ["package:no_such_package/model", "package:", "package:/x", "package:a.b/c", "package:json/x"]
)
def test_a_package_that_is_not_there(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        package_folder(name)

    assert caught.value.where == "model.name"


def test_recipes_are_shipped() -> None:
    assert (shipped_folder() / "quickstart.yaml").is_file()


@pytest.mark.parametrize("name", ["/tmp/rows.csv", "../../rows.csv", "data/../../x"])
def test_shipped_data_does_not_lead_elsewhere(name: str) -> None:
    with pytest.raises(ConfigError, match="leads out of the shipped data"):
        DataPlace.parse(f"shipped:{name}")
