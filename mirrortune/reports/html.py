# SPDX-License-Identifier: Apache-2.0
"""Build self-contained HTML pages: one file without scripts or external resources, in the reader's light or dark theme.

Text enters a page only through :func:`escape`; markup has the type :class:`Html`.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NewType

from mirrortune import __version__
from mirrortune.errors import ConfigError
from mirrortune.reports.drawing import Drawing, svg_for_page
from mirrortune.system.atomic import write_text_atomically
from mirrortune.system.claims import claimed
from mirrortune.system.console import printable
from mirrortune.system.outputs import Input, check_file

Html = NewType("Html", str)
"""Markup, as opposed to text that must still be escaped."""

_GENERATOR = '<meta name="generator" content="mirrortune'
_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #5a5a5a; --faint: #d9d9d9; --paper: #ffffff; --panel: #f4f4f2;
  --mark: #2b5f93; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e6; --soft: #a8a8a4; --faint: #3c3c3a; --paper: #161615;
  --panel: #222220; --mark: #8fb8e0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; border-bottom: 1px solid var(--faint); padding-bottom: .25rem; }
p { max-width: 60rem; margin: .5rem 0; } .soft, figcaption, caption { color: var(--soft); font-size: .87rem; }
code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .88em; overflow-wrap: anywhere; }
.box { background: var(--panel); border-left: 4px solid var(--mark); padding: .6rem 1rem; margin: 1rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .87rem; margin: .5rem 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .25rem; }
th, td { padding: .2rem .7rem .2rem 0; text-align: right; vertical-align: top; border-bottom: 1px solid var(--faint); }
th { font-weight: 600; } th:first-child, td:first-child, .left th, .left td { text-align: left; }
.left td { overflow-wrap: break-word; } .left td:last-child { overflow-wrap: anywhere; min-width: 12rem; }
figure { margin: 1rem 0 1.5rem; } figure svg { width: 100%; height: auto; max-width: var(--width); display: block; }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif !important; }
details { margin: .75rem 0; } summary { cursor: pointer; color: var(--mark); }
@media print { :root { --ink: #000; --soft: #333; --faint: #bbb; --paper: #fff; --panel: #fff; --mark: #000; }
  body { max-width: none; padding: 0; font-size: 10pt; } figure, tr, .box { break-inside: avoid; }
  h2 { break-after: avoid; } .wide { overflow: visible; } }
"""


def escape(text: object) -> Html:
    """Escape ``text`` for HTML and make control characters visible, so that a terminal does not obey them."""
    return Html(html.escape(printable(str(text))))


def page(title: str, subtitle: str, *parts: Html) -> str:
    """Build an HTML document."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
{_GENERATOR} {__version__}">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p class="soft">{escape(subtitle)}</p>
{"".join(f"{part}{chr(10)}" for part in parts)}</body>
</html>
"""


def heading(text: str) -> Html:
    """Build the heading of a section."""
    return Html(f"<h2>{escape(text)}</h2>")


def paragraph(text: str) -> Html:
    """Build a paragraph of plain text."""
    return Html(f"<p>{escape(text)}</p>")


def box(lines: Sequence[str]) -> Html:
    """Build a highlighted box with a paragraph for each line."""
    return Html('<div class="box">' + "".join(f"<p>{escape(line)}</p>" for line in lines) + "</div>")


def command(text: str) -> Html:
    """Build a paragraph with a command line."""
    return Html(f'<p class="soft"><code>{escape(text)}</code></p>')


def figure(drawing: Drawing) -> Html:
    """Build a figure with its caption, no wider than the drawing."""
    svg, width = svg_for_page(drawing), drawing.size[0] * 96
    caption = escape(drawing.caption)
    return Html(f'<figure style="--width: {width:.0f}px">{svg}<figcaption>{caption}</figcaption></figure>')


def details(summary: str, *parts: Html) -> Html:
    """Build a section that is collapsed until the reader opens it."""
    return Html(f"<details><summary>{escape(summary)}</summary>{''.join(parts)}</details>")


@contextmanager
def page_output(path: Path, inputs: Sequence[Input], where: str = "-o") -> Iterator[Callable[[str], None]]:
    """Claim the output file of a page while the block runs, and yield the function that writes the page.

    Raises:
        ConfigError: the path cannot be written (:func:`mirrortune.system.outputs.check_file`), holds a file that
            mirrortune did not write, or is claimed by another process.
    """

    def check() -> None:
        check_file(path, inputs, where)
        if path.exists():
            with path.open(encoding="utf-8", errors="replace") as file:
                if _GENERATOR not in file.read(1000):
                    problem = f"{path} was not written by mirrortune and is left alone"
                    raise ConfigError(where, problem, fix="Choose another name")

    def put(text: str) -> None:
        check()
        write_page(path, text)

    check()
    with claimed(path):
        yield put


def write_page(path: Path, text: str) -> None:
    """Write a page atomically."""
    write_text_atomically(path, text)
