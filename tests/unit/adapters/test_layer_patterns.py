# SPDX-License-Identifier: Apache-2.0
"""layer_patterns: patterns that would take years."""

from __future__ import annotations

import pytest

from mirrortune.adapters.layer_patterns import fits, matches
from mirrortune.adapters.peft_bridge.options import spelt_out
from mirrortune.errors import ConfigError

NAME = "bert.encoder.layer.0.attention.self.query.weight"
ENDLESS = "".join(f"(?P<g{i}>.*)" for i in range(8)) + "".join(f"(?P=g{i})" for i in range(7)) + "[0-9]"
NESTED = "(([a-z.]+)+)+X"  # re takes years for it, regex none


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less to wait for; the pattern takes years in any case."""
    monkeypatch.setattr("mirrortune.adapters.layer_patterns._SECONDS", 0.05)


@pytest.mark.parametrize("where", ["adapter.target_modules", "adapter.split"])
def test_a_pattern_without_end_is_refused(where: str) -> None:
    with pytest.raises(ConfigError, match=f"{where}: .* takes over 0.05 s on '{NAME}'"):
        matches(NAME, ENDLESS, where)


@pytest.mark.parametrize("described", [{"rank_pattern": {ENDLESS: 4}}, {"feedforward_modules": ENDLESS}])
def test_so_is_one_in_the_options_of_a_tuner(described: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="takes over"):
        spelt_out(described, [NAME])


def test_other_patterns_match_as_before() -> None:
    assert matches(NAME, "value|query.weight", "x")
    assert matches(NAME, r"layer\.\d+\..*", "x")
    assert fits(r"(.*\.)?(query\.weight)", NAME, "x")
    assert not matches(NAME, "query", "x")
    assert not matches(NAME, NESTED, "x")
    with pytest.raises(ConfigError, match="not a regular expression"):
        matches(NAME, "(", "x")
