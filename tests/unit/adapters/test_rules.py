# SPDX-License-Identifier: Apache-2.0
"""pairings: the pairs that a run's seed and a layer's name give."""

from __future__ import annotations

import pytest
import torch

from mirrortune.adapters.pairings.rules import PAIRINGS
from mirrortune.adapters.spec import AdapterSpec, check_spec, make_pairs
from mirrortune.errors import ConfigError

GIVEN = {
    "mirror": [[0, 6], [1, 5], [2, 4]],
    "neighbor": [[0, 1], [2, 3], [4, 5]],
}


def test_the_registered_pairings() -> None:
    assert PAIRINGS.names() == ["adaptive", "explicit", "mirror", "neighbor", "random"]


@pytest.mark.parametrize("name", GIVEN)
def test_an_odd_rank_leaves_one_direction(name: str) -> None:
    assert make_pairs(AdapterSpec(method=name), 7, "layer").tolist() == GIVEN[name]


@pytest.mark.parametrize("name", GIVEN)
def test_fixed_pairings_depend_on_nothing_but_the_rank(name: str) -> None:
    first = make_pairs(AdapterSpec(method=name, seed=0), 9, "a")
    assert torch.equal(first, make_pairs(AdapterSpec(method=name, seed=1), 9, "b"))


def test_random_pairs_depend_on_seed_and_layer() -> None:
    def drawn(seed: int, name: str) -> list[list[int]]:
        found: list[list[int]] = make_pairs(AdapterSpec(method="random", seed=seed), 32, name).tolist()
        return found

    assert drawn(0, "layer.0") == drawn(0, "layer.0")
    assert drawn(0, "layer.0") != drawn(1, "layer.0")
    assert drawn(0, "layer.0") != drawn(0, "layer.1")


def test_random_pairs_are_the_same_on_every_machine() -> None:
    # A golden value: another one would pair the directions of every new random run differently.
    assert make_pairs(AdapterSpec(method="random", seed=0), 8, "layer").tolist() == [
        [0, 1],
        [2, 4],
        [3, 6],
        [5, 7],
    ]


def test_the_pairing_overrides_the_methods_own() -> None:
    assert make_pairs(AdapterSpec(method="mirror", pairing="neighbor"), 4, "layer").tolist() == [[0, 1], [2, 3]]


def test_an_unknown_pairing_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown pairing 'miror'\. Did you mean 'mirror'\?"):
        PAIRINGS.get("miror", "adapter.pairing")


def test_a_pairing_that_knows_no_rounds_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PAIRINGS, "_items", dict(PAIRINGS._items))

    @PAIRINGS.register("alone")
    def alone(rank: int, generator: torch.Generator) -> torch.Tensor:
        return torch.tensor([[0, 1]])

    check_spec(AdapterSpec(pairing="alone"))
    assert make_pairs(AdapterSpec(pairing="alone"), 4, "layer").tolist() == [[0, 1]]
    with pytest.raises(ConfigError, match=r"rounds: pairing 'alone' has one round, got 2\. Allowed: 1"):
        check_spec(AdapterSpec(pairing="alone", options={"rounds": 2}))


def test_random_rounds_are_the_same_on_every_machine() -> None:
    spec = AdapterSpec(method="random", seed=0, options={"rounds": 2})
    assert make_pairs(spec, 8, "layer").tolist()[:4] == make_pairs(AdapterSpec(method="random"), 8, "layer").tolist()
    assert torch.equal(make_pairs(spec, 8, "layer"), make_pairs(spec, 8, "layer"))
