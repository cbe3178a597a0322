# SPDX-License-Identifier: Apache-2.0
"""Paths and Hub ids, the folders of mirrortune itself, and the environment of child processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mirrortune.adapters.files.find import adapter_to_score
from mirrortune.errors import ConfigError
from mirrortune.system.paths import (
    DataPlace,
    ModelPlace,
    cache_folder,
    child_environment,
    hub_place,
    json_object_or_none,
    looks_like_path,
    package_folder,
    read_json_object,
    shell_word,
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


@pytest.mark.parametrize(
    ("text", "name", "rows", "config", "split"),
    [
        ("hf://nyu-mll/glue:sst2:train#9", "nyu-mll/glue", 9, "sst2", "train"),
        ("hf://datasets/imdb::test", "imdb", None, None, "test"),
        ("hf://imdb", "imdb", None, None, None),
        ("imdb#9", "imdb", 9, None, None),
    ],
)
def test_an_address_of_the_hub_has_parts(
    text: str, name: str, rows: int | None, config: str | None, split: str | None
) -> None:
    place = DataPlace.parse(text)
    assert (place.text, place.name, place.rows, place.config, place.split) == (text, name, rows, config, split)
    assert not place.is_local


@pytest.mark.parametrize("text", ["hf://", "hf://a/b:c:d:e", "hf://:c"])
def test_an_address_has_no_other_parts(text: str) -> None:
    with pytest.raises(ConfigError, match="hf://owner/name, :config and :split"):
        DataPlace.parse(text)


def version(folder: Path, *flags: str, **more: str) -> subprocess.CompletedProcess[str]:
    """``python -m mirrortune --version`` in a folder, as compare and --num-processes start it."""
    env = {**os.environ, **child_environment(), **more}
    command = [sys.executable, *flags, "-m", "mirrortune", "--version"]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("flags", [(), ("-P",)])
def test_a_module_beside_the_data_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    for name in ("typer", "torch", "rich", "mirrortune"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit(9)")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", os.environ.get("PYTHONPATH", "")]))  # "" is the folder too
    done = version(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("mirrortune ")
    assert not (tmp_path / "ran").exists()


def test_what_the_user_put_on_the_path_is_still_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "sitecustomize.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "own"), os.environ.get("PYTHONPATH", "")]))
    assert version(tmp_path).returncode == 0
    assert (tmp_path / "ran").exists()


def test_suggested_commands_name_folders_that_look_like_options() -> None:
    found = [shell_word(path) for path in ("runs/a", "-r1", "two words", "-a b")]
    assert found == ["runs/a", "./-r1", "'two words'", "'./-a b'"]


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"\xff", b'{"a":' * 100_000])
def test_a_damaged_file_holds_no_object(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    assert json_object_or_none(tmp_path / "a.json") is None
    with pytest.raises((OSError, ValueError, TypeError)):
        read_json_object(tmp_path / "a.json")


def test_no_pipe_is_opened_for_an_object(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    assert json_object_or_none(tmp_path / "a.json") is None
