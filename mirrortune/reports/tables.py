# SPDX-License-Identifier: Apache-2.0
"""Render tables for a terminal, Markdown or a page, and draw sparklines."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from mirrortune.reports.html import Html, escape

_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Table:
    """A table whose first column holds names.

    Attributes:
        head: column headings.
        rows: cells of each row.
        caption: caption; shown in a page only.
        is_text: the other columns hold text, which a page aligns left; numbers are aligned right.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""
    is_text: bool = False

    def lines(self) -> list[str]:
        """Render the table as lines of plain text in aligned columns without borders; headings break at spaces."""
        table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1), collapse_padding=True)
        for place, name in enumerate(self.head):
            table.add_column(name.replace(" ", "\n"), justify="left" if place == 0 else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*map(str, row))
        written = io.StringIO()
        Console(file=written, width=1000, color_system=None, markup=False, highlight=False).print(table)
        return [line.rstrip() for line in written.getvalue().splitlines()]

    def markdown(self, *, has_code: bool = False) -> str:
        """Render the table as Markdown, with the first column as code if ``has_code``."""
        rows = [[_code(row[0]), *row[1:]] if has_code else row for row in self.rows]
        lines = [f"| {' | '.join(map(_in_row, row))} |" for row in (self.head, *rows)]
        return "\n".join([lines[0], "|" + "---|" * len(self.head), *lines[1:]])

    def html(self) -> Html:
        """Render the table as HTML."""
        shown = f"<caption>{escape(self.caption)}</caption>" if self.caption else ""
        top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in self.head)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows)
        kind = ' class="left"' if self.is_text else ""
        return Html(
            f'<div class="wide"><table{kind}>{shown}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
        )


def _code(cell: object) -> str:
    """Mark a cell as code in Markdown."""
    text = str(cell)
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _in_row(cell: object) -> str:
    r"""Escape a cell for a row of a Markdown table, where ``\|`` is a bar in code, too."""
    return " ".join(str(cell).replace("|", r"\|").splitlines())


def sparkline(values: Sequence[float]) -> str:
    """Draw one bar per value, scaled from zero (or the smallest value, if negative) to the largest."""
    low = min(0.0, *values) if values else 0.0
    span = (max(values, default=0.0) - low) or 1.0
    return "".join(_BARS[min(len(_BARS) - 1, int((v - low) / span * len(_BARS)))] for v in values)
