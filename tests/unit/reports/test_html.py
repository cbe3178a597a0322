# SPDX-License-Identifier: Apache-2.0
"""html: texts of strangers in a page."""

from __future__ import annotations

from mirrortune.reports.html import escape


def test_control_characters_and_halves_of_characters_are_shown_as_text() -> None:
    assert escape("a\x1b[2J<b>\ud800\n\t\u00e9") == "a\\x1b[2J&lt;b&gt;\\ud800\n\t\u00e9"
