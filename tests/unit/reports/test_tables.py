# SPDX-License-Identifier: Apache-2.0
"""Tables and sparklines that a log can hold."""

from __future__ import annotations

from mirrortune.reports.tables import Table, sparkline


def test_columns_are_aligned_and_headings_break() -> None:
    assert Table(["kind", "change %", "x"], [["query [bold]", "1.5", 3], ["key", "10", "-"]]).lines() == [
        "              change",
        "kind               %  x",
        "───────────────────────",
        "query [bold]     1.5  3",
        "key               10  -",
    ]


def test_a_table_is_the_same_in_markdown_and_in_a_page() -> None:
    table = Table(["name", "a"], [["<x>", 1], ["y", "-"]], "By name.")
    assert table.markdown() == "| name | a |\n|---|---|\n| <x> | 1 |\n| y | - |"
    assert table.markdown(has_code=True).endswith("| `<x>` | 1 |\n| `y` | - |")
    assert table.html() == (
        '<div class="wide"><table><caption>By name.</caption>'
        '<thead><tr><th scope="col">name</th><th scope="col">a</th></tr></thead>'
        "<tbody><tr><td>&lt;x&gt;</td><td>1</td></tr><tr><td>y</td><td>-</td></tr></tbody></table></div>"
    )


def test_a_sparkline_starts_at_zero() -> None:
    assert sparkline([0, 1, 2, 4, 8]) == "▁▂▃▅█"
    assert sparkline([5, 5]) == "██"
    assert sparkline([-1, 0, 1]) == "▁▅█"
    assert sparkline([0, 0]) == "▁▁"
    assert sparkline([]) == ""
