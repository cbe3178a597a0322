# SPDX-License-Identifier: Apache-2.0
"""The share of transformers' registry that passes, and every exception with its reason: what docs/models.md quotes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "results.md"
Results = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Model type -> head -> what ``walk.check`` found."""


def page(results: Results, versions: str) -> str:
    """The share in one sentence, then a row for every head that did not pass."""
    odd = [(t, h, f) for t, heads in results.items() for h, f in heads.items() if f["status"] != "passed"]
    runs = {t: heads for t, heads in results.items() if any(f["status"] != "not run" for f in heads.values())}
    passed = [t for t, heads in runs.items() if all(f["status"] != "failed" for f in heads.values())]
    heads = sum(f["status"] == "passed" for found in results.values() for f in found.values())
    sentence = (
        f"{len(passed)} of the {len(runs)} model types that can be built from a small configuration and run pass "
        f"({100 * len(passed) / max(1, len(runs)):.1f}%), with {heads} heads in all; {len(results) - len(runs)} of the "
        f"{len(results)} types with a supported head cannot ({versions})."
    )
    rows = [f"| `{t}` | {h} | {f['status']} | {f['reason'].replace('|', '/')} |" for t, h, f in odd]
    kinds = sorted({kind for found in results.values() for f in found.values() for kind in f.get("kinds", {})})
    return "\n".join(
        [
            "Written by `python -m tests.matrix.walk`. Not run: transformers alone does not build, run or reopen it "
            "in the small form that the walk makes of its configuration.",
            "", sentence, "", f"Kinds of layers met: {', '.join(kinds)}.", "",
            "| type | head | | reason |", "|---|---|---|---|", *rows, "",
        ]
    )  # fmt: skip


def sentence_of(text: str) -> str:
    """The share that a page states."""
    return text.split("\n\n")[1]


def exceptions(text: str) -> dict[tuple[str, str], str]:
    """(type, head) -> ``failed`` or ``not run``, of a page."""
    return {(t, h): status for t, h, status in re.findall(r"^\| `([^`]+)` \| ([^|]+) \| (\w[\w ]*\w) \|", text, re.M)}
