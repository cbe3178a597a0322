# SPDX-License-Identifier: Apache-2.0
"""Recipes' YAML: scalars as people mean them, the line of every key, and no exception but ConfigError."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mirrortune.config import strict_yaml
from mirrortune.errors import ConfigError

SCALARS: dict[str, Any] = {
    "2e-4": 2e-4, "1E5": 1e5, "1.5": 1.5, ".5": 0.5, "5.": 5.0, "-3": -3, "010": 10, "+3": 3, "0": 0,
    "-.inf": -math.inf,
    "true": True, "False": False, "null": None, "~": None,
    # YAML 1.1 would make these False, True, 750, 10 and a date (and 010, above, 8):
    "no": "no", "on": "on", "12:30": "12:30", "1_0": "1_0", "2024-01-01": "2024-01-01",
    "0x10": "0x10", "=": "=", "<<": "<<", '"1"': "1", "[a, 1]": ["a", 1], "{a: 2e-4}": {"a": 2e-4},
}  # fmt: skip


@pytest.mark.parametrize("text", SCALARS)
def test_a_scalar_is_what_it_looks_like(text: str) -> None:
    found = strict_yaml.parse_scalar(text, "here")

    assert found == SCALARS[text]
    assert type(found) is type(SCALARS[text])


def test_every_key_has_its_line() -> None:
    text = "# a comment\nmodel:\n  name: x\n\ntrain: {lr: 1,\n  epochs: 2}\nlist:\n- a: 1\n"

    data, lines = strict_yaml.load(text, "r.yaml")

    assert data == {"model": {"name": "x"}, "train": {"lr": 1, "epochs": 2}, "list": [{"a": 1}]}
    assert lines == {
        ("model",): 2, ("model", "name"): 3, ("train",): 5, ("train", "lr"): 5, ("train", "epochs"): 6,
        ("list",): 7, ("list", "0", "a"): 8,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3\n", "r.yaml:3: key 'a' appears twice (first on line 1)"),
        ("a:\n  b: 1\n  b: 2\n", "r.yaml:3: key 'a.b' appears twice (first on line 2)"),
        ("a: [1\n", "r.yaml:2: not valid YAML"),
        ("a:\n\tb: 1\n", "r.yaml:2: not valid YAML"),
        ("a: 1\nb: \x07\n", "r.yaml:2: not valid YAML: character"),
        ("1: a\n", "r.yaml:1: a key must be text, got '1'"),
        ("true: a\n", "r.yaml:1: a key must be text"),
        ("? [a]\n: 1\n", "r.yaml:1: a key must be text"),
        ("a: 1\n---\nb: 1\n", "r.yaml:2: not valid YAML"),
        ("a: &x [*x]\n", "r.yaml:1: '&x' is a YAML anchor or alias"),
        ("a: 1\nb: {c: *x}\n", "r.yaml:2: '*x' is a YAML anchor or alias"),
        ("a: &lol [lol]\nb: &lol2 [*lol, *lol]\n", "r.yaml:1: '&lol' is a YAML anchor or alias"),
        ("a: " + "[" * 1200, "nested without end"),
        ("a: " + "1" * 5000, "r.yaml: not valid YAML"),
        ("a: 1\nb: !!python/object:os.system x\n", "r.yaml:2: 'x' tagged as python/object:os.system"),
        ("a: !!timestamp 2001-01-01\n", "r.yaml:1: '2001-01-01' tagged as timestamp"),
        ("a: !!binary aGk=\n", "r.yaml:1: 'aGk=' tagged as binary"),
        ("a: !!int one\n", "r.yaml:1: 'one' tagged as int"),
        ("a: !!float one\n", "r.yaml:1: 'one' tagged as float"),
        ("a: !!set {b}\n", "tagged as set"),
    ],
)
def test_what_is_no_recipe_is_refused_with_its_line(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        strict_yaml.load(text, "r.yaml")

    assert says in str(caught.value)
    assert len(str(caught.value)) < 6000


def test_the_line_of_a_bad_character_counts_from_one() -> None:
    with pytest.raises(ConfigError, match=r"^r\.yaml:1: "):
        strict_yaml.load("\x07", "r.yaml")


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(PLAIN)
@example({"a": "no", "b": "1e3", "c": "0x1", "d": "2024-01-01", "e": "", "f": " x ", "g": "a: b #c", "h": 1e300})
@example({"": [[], {}], "null": None, "1": "1", "~": "~", "<<": "=", "k": 2e-5, "z": -0.0})
def test_what_is_dumped_is_read_back(data: Any) -> None:
    read, _ = strict_yaml.load(strict_yaml.dump(data), "dumped")

    assert read == data
    assert repr(read) == repr(data)  # 1 is not 1.0 and not True


@settings(max_examples=400)
@given(st.text(alphabet=st.sampled_from([*"{}[]:,-#&*!|>'\"%@`?ab1.e \n\t~<=", "\x07", "\ud800", "é", "\u2028"])))
@example("&a *a")
@example("!!omap [a: 1]")
@example("!!pairs [a]")
@example("!!null x")
@example("!!bool maybe")
@example("!<tag:yaml.org,2002:str> 1")
@example("! 1")
@example("- &x\n- *x")
@example('"\\ud800"')
def test_no_text_raises_anything_but_a_config_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        strict_yaml.load(text, "fuzz")


@pytest.mark.parametrize(
    "text",
    ["a: 2e-4\nb: no\nc: 12:30\nd: 010\ne: [x, 'ä', null, .5]\n", "a: 1\na: 2\n", "a: &x 1\nb: *x\n", "a: !!binary x\n",
     "1: a\n", "a:\n  b: {c: true, d: ~}\n"],
)  # fmt: skip
def test_long_texts_are_read_by_the_same_rules(text: str) -> None:
    """They go through libyaml, which is faster."""

    def outcome(text: str) -> object:
        try:
            return strict_yaml.load(text, "r.yaml")
        except ConfigError as error:
            return str(error)

    assert outcome(text + "# a comment\n" * 10_000) == outcome(text)
