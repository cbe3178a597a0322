# SPDX-License-Identifier: Apache-2.0
"""The command line that the benches share, and where they leave what they found."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def command_line(doc: str | None, *, has_folder: bool = False, output: str | None = None) -> argparse.ArgumentParser:
    """A parser of a bench's words: ``-o``, and a folder to work in where it has one.

    Args:
        doc: docstring of the bench.
        has_folder: whether the first word is a folder.
        output: help of ``-o``.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if has_folder:
        parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--output", type=Path, help=output)
    return parser


def write_and_print(folder: Path | None, found: dict[str, Any] | list[Any], table: str) -> None:
    """Write ``results.json`` and ``table.md`` to ``folder``, if there is one, and print the table."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        (folder / "table.md").write_text(table, encoding="utf-8")
    print(table, end="")  # noqa: T201
