# SPDX-License-Identifier: Apache-2.0
"""Where the benches leave what they found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_and_print(folder: Path | None, found: dict[str, Any] | list[Any], table: str) -> None:
    """Write ``results.json`` and ``table.md`` to ``folder``, if there is one, and print the table."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        (folder / "table.md").write_text(table, encoding="utf-8")
    print(table, end="")  # noqa: T201
