# SPDX-License-Identifier: Apache-2.0
"""errors: several problems in one message, each of them once."""

from __future__ import annotations

from mirrortune.errors import ConfigError


def test_several_problems_are_a_line_each() -> None:
    found = ConfigError.several([ConfigError("a", "wrong"), ConfigError("b", "wrong too", allowed="1")])
    assert str(found) == "a: wrong.\nb: wrong too. Allowed: 1."


def test_one_problem_is_itself() -> None:
    only = ConfigError("a", "wrong")
    assert ConfigError.several([only]) is only


def test_what_is_found_twice_is_said_once() -> None:
    twice = [ConfigError("a", "wrong"), ConfigError("a", "wrong")]
    assert str(ConfigError.several(twice)) == "a: wrong."
    assert str(ConfigError.several([*twice, ConfigError("b", "wrong")])) == "a: wrong.\nb: wrong."


def test_problems_that_stand_for_several_keep_their_lines() -> None:
    inner = ConfigError.several([ConfigError("a", "wrong"), ConfigError("b", "wrong")])
    assert str(ConfigError.several([inner, ConfigError("c", "wrong")])) == "a: wrong.\nb: wrong.\nc: wrong."
