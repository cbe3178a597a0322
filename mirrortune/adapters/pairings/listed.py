# SPDX-License-Identifier: Apache-2.0
"""Check pairs listed by a user, and find the list of a layer.

A list holds disjoint pairs of directions, ``[[0, 5], [1, 7]]``, or one such list per round, and applies to every layer.
A mapping gives different lists to layers: by full name, or else by a pattern, or else, under ``all-linear``, for all
other layers.

Shapes: R directions, T pairs in all rounds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mirrortune.adapters.layer_patterns import matches, no_match
from mirrortune.errors import ConfigError

PairList = list[Any]
PairLists = PairList | dict[str, PairList]
_WHERE = "adapter.pairing"
_ALL = "all-linear"
_EXAMPLE = "a list of pairs, such as [[0, 5], [1, 7]]"


def check_lists(given: PairLists, rounds: int) -> None:
    """Check that lists contain disjoint pairs for each of ``rounds`` rounds, before a model is known.

    Raises:
        ConfigError: lists are not valid; the first problem of each is reported, with its key in a mapping.
    """
    errors = []
    for key, listed in _by_key(given).items():
        where = f"{_WHERE}.{key}" if isinstance(given, dict) else _WHERE
        try:
            matches("", key, where)
            _check_list(where, listed, rounds)
        except ConfigError as error:
            errors.append(error)
    if errors or not _by_key(given):
        raise ConfigError.several(
            errors or [ConfigError(_WHERE, f"got {given!r}", allowed=f"{_EXAMPLE}, by layer name")]
        )


def check_fit(given: PairLists, ranks: dict[str, int]) -> None:
    """Check that lists fit the adapted layers, whose ranks R are given by name.

    Raises:
        ConfigError: a key matches no layer (the nearest names are suggested), a layer is matched by no key or by
            several, or a direction exceeds the rank; all problems are reported together.
    """
    lists = _by_key(given)
    keys = {name: _keys(lists, name) for name in ranks}
    unused = [key for key in lists if key not in ranks and not any(matches(name, key, _WHERE) for name in ranks)]
    errors = [no_match(_WHERE, key, ranks) for key in unused]
    if without := [name for name, found in keys.items() if not found]:
        fix = "List pairs for them too, or leave them out with --target-modules"
        errors.append(ConfigError(_WHERE, f"no pairs are listed for {_some(without)}", fix=fix))
    if torn := next((name for name, found in keys.items() if len(found) > 1), None):
        problem = f"layer {torn} matches {' and '.join(map(repr, keys[torn]))}"
        errors.append(
            ConfigError(_WHERE, problem, fix="Give it a list under its full name, which takes precedence over patterns")
        )
    largest = {name: int(as_tensor(lists[found[0]]).max()) for name, found in keys.items() if found}
    if beyond := [name for name, direction in largest.items() if direction >= ranks[name]]:
        first, kept = beyond[0], ranks[beyond[0]]
        problem = f"direction {largest[first]} is listed, and {kept} are kept in {_some(beyond)}"
        errors.append(ConfigError(_WHERE, problem, allowed=f"0 to {kept - 1} in {first}"))
    if errors:
        raise ConfigError.several(errors)


def list_for(given: PairLists, name: str) -> PairList | None:
    """Return the list for the layer ``name``, or None."""
    lists = _by_key(given)
    keys = _keys(lists, name)
    return lists[keys[0]] if keys else None


def as_tensor(listed: PairList) -> Tensor:
    """Return a checked list as pairs (T, 2), int64, with i < j, sorted by i within each round."""
    pairs = [pair for own in _rounds(listed) for pair in sorted(map(sorted, own))]
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


def _by_key(given: PairLists) -> dict[str, PairList]:
    return given if isinstance(given, dict) else {_ALL: given}


def _keys(lists: dict[str, PairList], name: str) -> list[str]:
    """Return the keys that match a layer: its full name, or else patterns, or else all-linear."""
    if name in lists:
        return [name]
    found = [key for key in lists if key != _ALL and matches(name, key, _WHERE)]
    return found or [key for key in lists if key == _ALL]


def _rounds(listed: PairList) -> list[PairList]:
    is_nested = bool(listed) and _is_list(listed[0]) and bool(listed[0]) and _is_list(listed[0][0])
    return listed if is_nested else [listed]


def _check_list(where: str, listed: Any, rounds: int) -> None:
    if not _is_list(listed):
        raise ConfigError(where, f"got {listed!r}", allowed=f"the name of a pairing, or {_EXAMPLE}")
    found = _rounds(listed)
    if len(found) != rounds:
        raise ConfigError(
            where,
            f"pairs for {len(found)} round{'s' * (len(found) > 1)} are listed, got rounds {rounds}",
            allowed=f"{_EXAMPLE}, for one round, or such a list for each round",
            fix=f"Set adapter.options.rounds={len(found)}, or list as many",
        )
    for pairs in found:
        if not _is_list(pairs) or not pairs:
            raise ConfigError(where, f"got {pairs!r}", allowed=_EXAMPLE)
        _check_round(where, pairs)


def _check_round(where: str, pairs: PairList) -> None:
    taken: dict[int, PairList] = {}
    for pair in pairs:
        is_pair = _is_list(pair) and len(pair) == 2 and all(type(end) is int and end >= 0 for end in pair)
        if not is_pair or pair[0] == pair[1]:
            raise ConfigError(
                where, f"got {pair!r} for a pair", allowed="two different directions, numbered from 0, such as [0, 5]"
            )
        for direction in pair:
            if direction in taken:
                raise ConfigError(
                    where,
                    f"direction {direction} is in the pairs {list(taken[direction])} and {list(pair)}",
                    allowed="each direction in one pair of a round",
                )
            taken[direction] = pair


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} other layers"
