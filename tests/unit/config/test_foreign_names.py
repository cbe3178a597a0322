# SPDX-License-Identifier: Apache-2.0
"""foreign_names: every name of another tool leads to a setting that exists."""

from __future__ import annotations

import pytest

from mirrortune.config import foreign_names
from mirrortune.config.recipe import flatten
from mirrortune.config.schema import Recipe

KEYS = set(flatten(Recipe()))


@pytest.mark.parametrize("key", foreign_names._OURS)
def test_the_setting_exists(key: str) -> None:
    assert key in KEYS or key.startswith("adapter.options.")


def test_a_name_means_one_thing() -> None:
    names = [name for own in foreign_names._OURS.values() for name in own.split()]
    assert sorted(names) == sorted({*names} - {*foreign_names._ADVICE})
    own = {key.partition(".")[2] for key in KEYS} - {"max_length"}
    assert not own & {*names, *foreign_names._ADVICE}


def test_a_key_in_the_wrong_section_is_found() -> None:
    assert foreign_names.key_of("weight_decay") == "train.weight_decay"
    assert foreign_names.key_of("nonsense") is None
