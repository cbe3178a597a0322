# SPDX-License-Identifier: Apache-2.0
"""Match layer names with a user's pattern: ``all-linear``, ``all-layers``, or a regular expression.

A regular expression may match from any dot of the name on.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence

import regex

from mirrortune.errors import ConfigError

_SECONDS = 2.0  # time limit for one name; sensible patterns take microseconds
ALL_LINEAR, ALL_LAYERS = "all-linear", "all-layers"


def matches(name: str, pattern: str, where: str) -> bool:
    """Return whether ``pattern`` matches a layer name; raise ConfigError at ``where`` for an invalid expression."""
    if pattern in (ALL_LINEAR, ALL_LAYERS):
        return True
    try:
        # A pattern may start at any dot of the name, so that "query|value" finds encoder.layer.0.attention.self.query.
        re.compile(pattern)
        return fits(rf"(?:.*\.)?(?:{pattern})", name, where)
    except re.error as error:
        raise ConfigError(
            where, f"not a regular expression: {pattern!r} ({error})", allowed="a regex, all-linear or all-layers"
        ) from error


def layers_named(names: Mapping[str, Sequence[str]], pattern: str, where: str) -> set[str]:
    """Return the layers that ``pattern`` matches, by their first names or, if it matches none of these, by the others.

    Args:
        names: the names of each layer; that of a tied weight has several.
        pattern: see :func:`matches`.
        where: see :func:`matches`.
    """
    found = {layer for layer, own in names.items() if matches(own[0], pattern, where)}
    return found or {layer for layer, own in names.items() if any(matches(name, pattern, where) for name in own[1:])}


def fits(expression: str, name: str, where: str) -> bool:
    """Return whether a regular expression matches a layer name completely.

    Raises:
        ConfigError: matching takes longer than ``_SECONDS``; nested repetitions such as ``(a+)+`` could take years.
        re.error: the expression is not valid.
    """
    try:
        return regex.fullmatch(expression, name, timeout=_SECONDS) is not None
    except regex.error as error:
        raise re.error(str(error)) from error
    except TimeoutError as error:
        raise ConfigError(
            where, f"'{expression[:200]}' takes over {_SECONDS:g} s on '{name}'",
            fix="Write it without nested repetitions",
        ) from error  # fmt: skip


def in_blocks(names: Collection[str], blocks: Mapping[str, int], wanted: Sequence[int | str]) -> set[str]:
    """Return the layers that lie in the wanted blocks of a model, such as its transformer layers.

    Args:
        names: names of layers.
        blocks: number of blocks in each list of blocks, by its name; a layer belongs to the outermost list that
            contains it.
        wanted: numbers of blocks from 0, and ``last N``; in an encoder-decoder, they apply to both parts.

    Raises:
        ConfigError: no list of blocks has a wanted block.
    """
    of_lists: dict[str, dict[str, int]] = {}
    for name in names:
        outer = next((n for n in sorted(blocks, key=len) if name.startswith(f"{n}.")), None)
        if outer is not None and (index := name.removeprefix(f"{outer}.").partition(".")[0]).isdecimal():
            of_lists.setdefault(outer, {})[name] = int(index)
    found: set[str] = set()
    most = max((blocks[outer] for outer in of_lists), default=0)
    for entry in wanted:
        number = int(str(entry).removeprefix("last "))
        if number >= most + isinstance(entry, str):
            allowed = f"0 to {most - 1}, or up to last {most}" if most else None
            raise ConfigError("adapter.layers", f"got {entry!r}, the model has {most} blocks", allowed=allowed)
        for outer, layers in of_lists.items():
            first = blocks[outer] - number if isinstance(entry, str) else number
            last = blocks[outer] - 1 if isinstance(entry, str) else number
            found |= {name for name, index in layers.items() if first <= index <= last}
    return found


def alternatives(pattern: str) -> list[str]:
    """Split a pattern such as ``query|value`` into its alternatives, unless they are in brackets."""
    parts = pattern.split("|")
    return parts if len(parts) > 1 and all(_is_regex(part) for part in parts) else [pattern]


def no_match(
    where: str, pattern: str, names: Collection[str], others: Collection[str] = (), of: str = ""
) -> ConfigError:
    """Return the error for a pattern that matches no layer, with the nearest names.

    Args:
        where: setting to name in the error.
        pattern: pattern that matches nothing.
        names: names of the layers that the user most likely meant.
        others: names of all other layers.
        of: complete pattern, if ``pattern`` is one of its alternatives.
    """
    endings = sorted({name.rsplit(".", 1)[-1] for name in names})
    near = difflib.get_close_matches(pattern, [*endings, *names, *others], n=3, cutoff=0.5)
    hint = f" Nearest: {', '.join(dict.fromkeys(near))}." if near else ""
    is_part = bool(of) and of != pattern
    whole = f" (an alternative of '{of}')" if is_part else ""
    return ConfigError(
        where,
        f"'{pattern}'{whole} matches none of the {len(names)} linear layers.{hint}",
        allowed=f"all-linear, or a regex for names that end in {', '.join(endings)}",
        fix="Put alternatives that may be absent in brackets: (a|b)" if is_part else "",
    )


def _is_regex(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return bool(pattern)
