# SPDX-License-Identifier: Apache-2.0
"""pair_lists: which lists of pairs are taken, and which layer gets which."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mirrortune.adapters.files.adapter_file import read_adapter
from mirrortune.adapters.files.load import stored_pairs
from mirrortune.adapters.inject import attach, find_targets, spectral_layers, trainable_parameters
from mirrortune.adapters.pairings.listed import as_tensor, check_fit, check_lists, list_for
from mirrortune.adapters.spec import AdapterSpec, build_core, check_spec, make_pairs
from mirrortune.errors import ConfigError
from tests.tiny_models import tiny_bert
from tests.tiny_runs import adapt

RANKS = {"encoder.0.query": 32, "encoder.0.key": 32, "encoder.1.query": 8}


def refusal(call: Callable[..., object], *arguments: Any) -> str:
    """The message of the configuration error that a call raises."""
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("given", "rounds"),
    [
        ([[0, 5], [1, 7]], 1),
        (((0, 5), (1, 7)), 1),
        ([[[0, 5], [1, 7]]], 1),
        ([[[0, 5]], [[0, 5], [1, 7]]], 2),
        ({"query|value": [[0, 1]], "all-linear": [[2, 0]]}, 1),
    ],
)
def test_lists_that_are_taken(given: Any, rounds: int) -> None:
    check_lists(given, rounds)
    check_spec(AdapterSpec(pairing=given, options={"rounds": rounds}))


@pytest.mark.parametrize(
    ("given", "rounds", "message"),
    [
        (3, 1, "adapter.pairing: got 3. Allowed: the name of a pairing, or a list of pairs, such as [[0, 5], [1, 7]]."),
        ([], 1, "adapter.pairing: got []. Allowed: a list of pairs"),
        ({}, 1, "adapter.pairing: got {}. Allowed: a list of pairs, such as [[0, 5], [1, 7]], by layer name."),
        ([[0, 1], 2], 1, "got 2 for a pair. Allowed: two different directions, numbered from 0, such as [0, 5]."),
        ([0, 1], 1, "got 0 for a pair."),
        ([[0, 1, 2]], 1, "got [0, 1, 2] for a pair."),
        ([[0]], 1, "got [0] for a pair."),
        ([[]], 1, "got [] for a pair."),
        ([[4, 4]], 1, "got [4, 4] for a pair."),
        ([[0, -1]], 1, "got [0, -1] for a pair."),
        ([[0, 1.0]], 1, "got [0, 1.0] for a pair."),
        ([[0, True]], 1, "got [0, True] for a pair."),
        (["01"], 1, "got '01' for a pair."),
        ([[0, 1], [2, 3], [3, 0]], 1, "direction 3 is in the pairs [2, 3] and [3, 0]. Allowed: each direction in"),
        ([[0, 1], [0, 1]], 1, "direction 0 is in the pairs [0, 1] and [0, 1]."),
        ([[[0, 1]], []], 2, "adapter.pairing: got []. Allowed: a list of pairs"),
        ([[[0, 1]], 5], 2, "adapter.pairing: got 5. Allowed: a list of pairs"),
        ([[0, 1]], 2, "pairs for 1 round are listed, got rounds 2."),
        ([[[0, 1]], [[1, 2]]], 1, "pairs for 2 rounds are listed, got rounds 1."),
        ({"query(": [[0, 1]]}, 1, "adapter.pairing.query(: not a regular expression"),
        ({"query": [[1, 1]]}, 1, "adapter.pairing.query: got [1, 1] for a pair."),
        ({"query": "mirror"}, 1, "adapter.pairing.query: got 'mirror'."),
    ],
)  # fmt: skip
def test_lists_that_are_refused(given: Any, rounds: int, message: str) -> None:
    assert message in refusal(check_lists, given, rounds)


def test_every_list_of_a_mapping_is_checked_at_once() -> None:
    message = refusal(check_lists, {"query": [[1, 1]], "key": [[0, 1]], "value": [[0, 2], [2, 3]]}, 1)
    assert [line.split(":")[0] for line in message.splitlines()] == ["adapter.pairing.query", "adapter.pairing.value"]


def test_a_whole_name_goes_before_patterns_and_these_before_all_linear() -> None:
    given = {"query": [[0, 1]], "encoder.1.query": [[2, 3]], "all-linear": [[4, 5]]}
    check_fit(given, RANKS)
    assert [list_for(given, name) for name in RANKS] == [[[0, 1]], [[4, 5]], [[2, 3]]]
    assert list_for({"query": [[0, 1]]}, "encoder.0.value") is None
    assert list_for([[0, 1]], "anything") == [[0, 1]]


@pytest.mark.parametrize(
    ("given", "messages"),
    [
        ({"all-linear": [[0, 1]], "querry": [[0, 1]]}, ["'querry' matches none of the 3 linear layers. Nearest: "]),
        ({"query": [[0, 1]]}, ["no pairs are listed for encoder.0.key. List pairs for them too"]),
        ({"key": [[0, 1]]}, ["no pairs are listed for encoder.0.query and 1 other layers."]),
        (
            {"query": [[0, 1]], "0.*": [[0, 1]]},
            ["layer encoder.0.query matches 'query' and '0.*'. Give it a list under its full name"],
        ),
        ([[0, 8]], ["direction 8 is listed, and 8 are kept in encoder.1.query. Allowed: 0 to 7 in encoder.1.query."]),
        ([[0, 32]], ["direction 32 is listed, and 32 are kept in encoder.0.query and 2 other layers. Allowed: "]),
        ({"query": [[0, 32]], "kee": [[0, 1]]}, ["Nearest: key", "no pairs are listed for", "direction 32"]),
    ],
)  # fmt: skip
def test_lists_that_do_not_fit_the_layers(given: Any, messages: list[str]) -> None:
    lines = refusal(check_fit, given, RANKS).splitlines()
    assert len(lines) == len(messages)
    assert all(message in line for message, line in zip(messages, lines, strict=True))


def test_a_shadowed_pattern_is_no_mistake() -> None:
    check_fit({"query": [[0, 1]], "key": [[0, 1]], "encoder.0.query": [[0, 2]], "encoder.1.query": [[0, 3]]}, RANKS)


def test_pairs_are_put_in_order_round_after_round() -> None:
    assert as_tensor([[7, 1], [5, 0]]).tolist() == [[0, 5], [1, 7]]
    assert as_tensor([[[7, 1], [5, 0]], [[2, 0]]]).tolist() == [[0, 5], [1, 7], [0, 2]]


def test_a_list_means_every_layer_and_leaves_the_other_directions() -> None:
    model = attach(tiny_bert(), AdapterSpec(method="givens", pairing=[[9, 2], [0, 31]]))
    assert {tuple(map(tuple, m.core.pairs.tolist())) for m in spectral_layers(model).values()} == {((0, 31), (2, 9))}
    assert trainable_parameters(model) == 13 * 2


def test_what_does_not_fit_is_found_before_the_model_is_touched() -> None:
    model = tiny_bert()
    for pairing in ([[0, 32]], {"querry": [[0, 1]], "all-linear": [[0, 1]]}, {"query": [[0, 1]]}):
        spec = AdapterSpec(pairing=pairing)
        assert refusal(find_targets, model, spec) == refusal(attach, model, spec)
    assert not spectral_layers(model)


def test_the_file_holds_the_pairs_and_not_the_list(tmp_path: Path) -> None:
    pairing = {"query|key|value": [[[4, 1]], [[1, 0]]], "all-linear": [[[0, 1]], [[1, 2]]]}
    adapted = adapt(AdapterSpec(pairing=pairing, options={"rounds": 2}))
    found = read_adapter(adapted.save(tmp_path / "adapter"))
    assert found.spec == AdapterSpec(pairing="explicit", options={"rounds": 2}).settled()
    pairs = stored_pairs(found)
    assert pairs.keys() == spectral_layers(adapted.model).keys()
    assert pairs["bert.encoder.layer.0.attention.self.query"].tolist() == [[1, 4], [0, 1]]


def test_explicit_pairs_without_a_list_are_refused() -> None:
    spec = AdapterSpec(pairing="explicit")
    assert "'explicit' takes pairs that you list, and there are none here" in refusal(make_pairs, spec, 4, "layer")
    assert "adapter.pairing=[[0, 5], [1, 7]]" in refusal(attach, tiny_bert(), spec)


def test_a_method_that_pairs_nothing_takes_no_list() -> None:
    assert "method 'psoft' pairs nothing" in refusal(check_spec, AdapterSpec(method="psoft", pairing=[[0, 1]]))
    assert "'none' has no pairing" in refusal(check_spec, AdapterSpec(method="none", pairing=[[0, 1]]))


@pytest.mark.parametrize(
    ("rounds", "allowed"),
    [(0, "1 or more"), (-2, "1 or more"), (10**9, "up to 10000"), (1.5, "a whole number"), (True, "a whole number")],
)
def test_a_wrong_number_of_rounds_is_refused(rounds: Any, allowed: str) -> None:
    message = refusal(check_spec, AdapterSpec(options={"rounds": rounds}))
    assert message.startswith(f"adapter.options.rounds: got {rounds}")
    assert allowed in message


def test_pairs_that_a_core_cannot_turn_are_refused() -> None:
    for pairs, message in (
        (
            [[0, 1], [1, 2]],
            "adapter.options.rounds: got 1, and the pairs overlap: they take 2 rounds. Allowed: 2 or more",
        ),
        ([[0, 4]], "adapter.pairing: pairs i, j must have i < j, and name directions that are kept. Allowed: 0 to 3"),
        ([[2, 1]], "must have i < j"),
        ([[-1, 1]], "Allowed: 0 to 3"),
    ):
        found = refusal(build_core, AdapterSpec(), torch.ones(4), "layer", (4, 4), torch.tensor(pairs))
        assert message in found
