# SPDX-License-Identifier: Apache-2.0
"""Files that nobody would write on purpose: they are read or refused by an error of ours, and nothing else happens."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mirrortune.config.recipe import flatten, override_layer, read_recipe, resolve
from mirrortune.config.schema import Recipe
from mirrortune.data.files.readers import read_table
from mirrortune.errors import MirrortuneError
from mirrortune.runs.checks import unpack
from mirrortune.system.paths import TABLE_SUFFIXES
from mirrortune.tasks.base import task_class

KEYS = [key.split(".") for key in flatten(Recipe())]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12),
    st.sampled_from(["full", "mirror", "none", "auto", "1e-3", "glue/sst2", "[", "~", "2001-01-01"]),
)  # fmt: skip
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=6), v, max_size=3))
SETTINGS = settings(max_examples=120)


def refusal(work: Callable[[], object]) -> MirrortuneError | None:
    """The error of ours that ``work`` ends with, if any; all others are bugs and go on."""
    try:
        work()
    except MirrortuneError as error:
        return error
    return None


def names_a_place(error: MirrortuneError, *places: str) -> bool:
    """Whether every line of an error begins with where it is: a file, a flag, or a key such as ``train.lr``."""
    keys = tuple(".".join(key[:end]) for key in KEYS for end in (1, 2))
    lines = str(error).split("\n")
    return bool(lines) and all(line.lstrip("'").startswith((*places, *keys, "--")) for line in lines)


def assert_taken_or_refused(path: Path) -> None:
    """Load, resolve and check. A recipe that is taken means the same when it is written out and read again; one that is
    refused is refused by exit code 2, with the place of everything that is wrong.
    """
    found: list[Recipe] = []

    def work() -> None:
        loaded = resolve([read_recipe(str(path))]).recipe
        unpack(loaded)
        found.append(loaded)

    error = refusal(work)
    if error is None:
        again = path.with_name("again.yaml")
        again.write_text(found[0].to_yaml(), encoding="utf-8")
        assert resolve([read_recipe(str(again))]).recipe == found[0]
    else:
        assert error.exit_code == 2
        assert names_a_place(error, str(path), "RECIPE", "target_modules"), str(error)


@SETTINGS
@given(entries=st.lists(st.tuples(st.sampled_from(KEYS), VALUES), max_size=6))
def test_any_value_of_any_setting(tmp_path: Path, entries: list[tuple[list[str], Any]]) -> None:
    data: dict[str, Any] = {"model": {"name": "x"}, "data": {"path": "y"}, "task": {"kind": "text-classification"}}
    for key, value in entries:
        if len(key) == 1:
            data[key[0]] = value
        else:
            data.setdefault(key[0], {})
            if isinstance(data[key[0]], dict):
                data[key[0]][key[1]] = value
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    assert_taken_or_refused(tmp_path / "a.yaml")


@SETTINGS
@given(content=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda t: t.encode("utf-8", "ignore"))))
def test_any_bytes_for_a_recipe(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.yaml").write_bytes(content)
    assert_taken_or_refused(tmp_path / "a.yaml")


@SETTINGS
@given(cut=st.integers(0, 400), extra=st.text(max_size=20), where=st.integers(0, 400))
def test_a_real_recipe_with_pieces_missing_or_added(tmp_path: Path, cut: int, extra: str, where: int) -> None:
    text = Recipe().to_yaml() + "data:\n  path: a\n  text_columns: [x]\ntrain: {lr: 1e-3}\n"
    changed = (text[:where] + extra + text[where:])[: max(1, len(text) - cut)]
    (tmp_path / "a.yaml").write_bytes(changed.encode("utf-8", "ignore"))
    assert_taken_or_refused(tmp_path / "a.yaml")


@SETTINGS
@given(word=st.tuples(st.sampled_from([".".join(k) for k in KEYS]), st.text(max_size=20)).map("=".join))
def test_any_word_of_the_command_line(word: str) -> None:
    found: list[Recipe] = []
    error = refusal(lambda: found.append(resolve([override_layer([word])]).recipe))
    if error is None:
        key, _, text = word.partition("=")
        assert flatten(found[0]).keys() == flatten(Recipe()).keys()
        assert text or flatten(found[0])[key] in (None, "", flatten(Recipe())[key]), "an empty word sets nothing"
    else:
        assert error.exit_code == 2
        assert names_a_place(error, "command line"), str(error)


@pytest.mark.parametrize("suffix", [*TABLE_SUFFIXES, ".csv.gz"])
@settings(max_examples=60)
@given(
    content=st.one_of(
        st.binary(max_size=120),
        st.text(alphabet="ab,;\"'\n\r\t[]{}:0\ufeff\x00é", max_size=120).map(str.encode),
        st.lists(st.dictionaries(st.sampled_from("ab"), VALUES, max_size=2), max_size=4).map(
            lambda rows: "\n".join(json.dumps(row) for row in rows).encode("utf-8", "ignore")
        ),
    ),
    pack=st.booleans(),
)
def test_any_bytes_for_a_table(tmp_path: Path, suffix: str, content: bytes, pack: bool) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(content) if pack and suffix.endswith(".gz") else content)
    found = []
    error = refusal(lambda: found.append(read_table(path)))
    if error is not None:
        assert error.exit_code == 3
        assert names_a_place(error, str(path)), str(error)
        return
    assert found[0].num_rows > 0
    for kind in ("text-classification", "regression", "causal-lm"):
        tasks: list[Any] = []
        error = refusal(lambda kind=kind, tasks=tasks: tasks.append(task_class(kind).from_rows(found[0], "a")[0]))  # type: ignore[misc]
        if error is None:
            assert {column for _, column in tasks[0].columns()} <= set(found[0].column_names)
        else:
            assert error.exit_code in (2, 3)
            assert error.where.startswith(("a", str(path))), str(error)
