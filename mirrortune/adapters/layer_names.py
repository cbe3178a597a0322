# SPDX-License-Identifier: Apache-2.0
"""Which layers a pattern of the user's means: ``all-linear``, or a regular expression for the name from any dot on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection

from mirrortune.errors import ConfigError


def matches(name: str, pattern: str, where: str) -> bool:
    """Whether ``pattern`` means the layer ``name``; ConfigError at ``where`` if it is no regular expression."""
    if pattern == "all-linear":
        return True
    try:
        # A pattern may start at any dot of the name, so that "query|value" finds encoder.layer.0.attention.self.query.
        return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name) is not None
    except re.error as error:
        raise ConfigError(
            where, f"not a regular expression: {pattern!r} ({error})", allowed="a regex or all-linear"
        ) from error


def no_match(where: str, pattern: str, names: Collection[str]) -> ConfigError:
    """The error for a pattern that means none of the layers ``names``: says the nearest."""
    endings = sorted({name.rsplit(".", 1)[-1] for name in names})
    near = difflib.get_close_matches(pattern, [*endings, *names], n=3, cutoff=0.5)
    hint = f" Nearest: {', '.join(near)}." if near else ""
    return ConfigError(
        where,
        f"'{pattern}' matches none of the {len(names)} linear layers.{hint}",
        allowed=f"all-linear, or a regex for names that end in {', '.join(endings)}",
    )
