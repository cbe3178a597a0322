# SPDX-License-Identifier: Apache-2.0
"""Small tables and sparklines as lines of text, the same on a terminal and in a log."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

_BARS = "▁▂▃▄▅▆▇█"


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns without borders: the first to the left, the others, numbers, to the right. Headings break at
    spaces.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1), collapse_padding=True)
    for place, name in enumerate(head):
        table.add_column(name.replace(" ", "\n"), justify="left" if place == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    written = io.StringIO()
    Console(file=written, width=1000, color_system=None, markup=False, highlight=False).print(table)
    return [line.rstrip() for line in written.getvalue().splitlines()]


def sparkline(values: Sequence[float]) -> str:
    """One bar a value, from zero (or the smallest, if that is negative) to the largest."""
    low = min(0.0, *values) if values else 0.0
    span = (max(values, default=0.0) - low) or 1.0
    return "".join(_BARS[min(len(_BARS) - 1, int((v - low) / span * len(_BARS)))] for v in values)
