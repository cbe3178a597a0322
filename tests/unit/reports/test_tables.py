# SPDX-License-Identifier: Apache-2.0
"""Tables and sparklines that a log can hold."""

from __future__ import annotations

from mirrortune.reports.tables import sparkline, text_table


def test_columns_are_aligned_and_headings_break() -> None:
    assert text_table(["kind", "change %", "x"], [["query [bold]", "1.5", "3"], ["key", "10", "-"]]) == [
        "              change",
        "kind               %  x",
        "───────────────────────",
        "query [bold]     1.5  3",
        "key               10  -",
    ]


def test_a_sparkline_starts_at_zero() -> None:
    assert sparkline([0, 1, 2, 4, 8]) == "▁▂▃▅█"
    assert sparkline([5, 5]) == "██"
    assert sparkline([-1, 0, 1]) == "▁▅█"
    assert sparkline([0, 0]) == "▁▁"
    assert sparkline([]) == ""
