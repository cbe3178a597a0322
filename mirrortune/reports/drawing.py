# SPDX-License-Identifier: Apache-2.0
"""Draw figures in one style, as PNG and SVG files or inside a page with a light or dark theme.

Figures start from matplotlib's default settings and do without pyplot and its global state; matplotlib is imported when
the first figure is drawn. Colours are Paul Tol's "bright" scheme (SRON/EPS/TN/09-002), which can be
told apart with colour-blindness and on white or black; lines also differ in dash pattern or marker.
"""

from __future__ import annotations

import html
import importlib
import importlib.util
import io
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirrortune.system.atomic import write_atomically

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#999999")
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
# Placeholder colours. In a page they become CSS variables, which follow the reader's theme.
_INK, _FAINT = "#010203", "#040506"
_ON_PAPER = {_INK: "#1a1a1a", _FAINT: "#d9d9d9"}
_ON_PAGE = {_INK: "var(--ink)", _FAINT: "var(--faint)"}

_RAISED = str.maketrans("-\N{MINUS SIGN}0123456789", "⁻⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ud800-\udfff]")  # characters that XML cannot hold

# matplotlib settings that belong to the process, not to a figure.
_OF_PROCESS = ("backend", "backend_fallback", "interactive", "toolbar", "timezone", "webagg.open_in_browser")

Draw = Callable[[Any], None]
"""Draws into an empty matplotlib Figure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """A figure to draw.

    Attributes:
        name: file name without its suffix; unique within a page.
        caption: what the figure shows and how to read it.
        size: width and height in inches.
        draw: function that draws into an empty matplotlib figure.
    """

    name: str
    caption: str
    size: tuple[float, float]
    draw: Draw


def svg_for_page(drawing: Drawing) -> str:
    """Render a drawing as an SVG element in the page's colours, with ids prefixed by the drawing's name."""
    found = _coloured(_render(drawing, "svg").decode(), _ON_PAGE)
    found = found[found.index("<svg") :]
    found = re.sub(r"<metadata>.*?</metadata>", "", found, flags=re.DOTALL)
    found = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{drawing.name}-", found)
    return found.replace("<svg ", f'<svg role="img" aria-label="{html.escape(drawing.caption)}" ', 1)


def write_figure(drawing: Drawing, path: Path) -> None:
    """Write a figure to ``path`` in the format of its suffix, ``.png`` or ``.svg``."""
    kind = path.suffix.removeprefix(".")
    data = _render(drawing, kind)
    if kind == "svg":
        data = _coloured(data.decode(), _ON_PAPER).encode()
    write_atomically(path, lambda file: file.write_bytes(data))


def write_figures(drawings: Iterable[Drawing], folder: Path) -> list[Path]:
    """Write each figure to ``folder`` as PNG and as SVG and return the paths of the files."""
    paths = [(drawing, folder / f"{drawing.name}.{kind}") for drawing in drawings for kind in ("png", "svg")]
    for drawing, path in paths:
        write_figure(drawing, path)
    return [path for _, path in paths]


def tidy(axes: Any, *, grid: str = "both") -> None:
    """Remove the box around axes and put a faint grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis=grid)


def by_decades(axis: Any) -> None:
    """Make the x axis logarithmic with limits at powers of ten; on a shorter axis, matplotlib's labels overlap."""
    axis.set(xscale="log")
    low, high = axis.get_xlim()
    axis.set_xlim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))


def legend_beside(axes: Any) -> None:
    """Put the legend to the right of the axes."""
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)


def heat_map(
    figure: Any, axes: Any, values: Sequence[Sequence[float]], *, label: str, zero_centred: bool = False
) -> None:
    """Draw a matrix as coloured cells, with the values written into them if there are at most 160.

    Args:
        figure: figure that gets the colour bar.
        axes: axes to draw into.
        values: rows of equal length, drawn from the top; NaN leaves a cell empty.
        label: label of the colour bar, with the unit.
        zero_centred: use a diverging colour scale around zero.
    """
    import numpy as np  # noqa: PLC0415

    array = np.ma.masked_invalid(np.array(values, dtype=float))
    top = float(abs(array).max()) if array.count() else 1.0
    limits = {"vmin": -top, "vmax": top, "cmap": "PuOr"} if zero_centred else {"cmap": "cividis"}
    mesh = axes.pcolormesh(array, edgecolors="face", linewidth=0.3, **limits)
    axes.invert_yaxis()
    bar = figure.colorbar(mesh, ax=axes, label=label)
    bar.outline.set_visible(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if array.size <= 160:
        for (row, column), value in np.ndenumerate(array):
            if value is not np.ma.masked:
                red, green, blue, _ = mesh.cmap(mesh.norm(value))
                is_light = 0.3 * red + 0.6 * green + 0.1 * blue > 0.5
                axes.text(column + 0.5, row + 0.5, _short(value), ha="center", va="center", fontsize=7,
                          color="black" if is_light else "white")  # fmt: skip


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.2g}"


def _render(drawing: Drawing, kind: str) -> bytes:
    mpl = _matplotlib()
    from matplotlib.figure import Figure  # noqa: PLC0415  (slow to import; only needed here)

    ink, faint = (_ON_PAPER[_INK], _ON_PAPER[_FAINT]) if kind == "png" else (_INK, _FAINT)
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    style: Any = {
        **{key: value for key, value in dict.items(mpl.rcParamsDefault) if key not in _OF_PROCESS},
        **dict.fromkeys(inked, ink),
        "grid.color": faint, "grid.linewidth": 0.8, "axes.facecolor": "none", "figure.facecolor": "none",
        "axes.titlesize": 10, "axes.titleweight": "bold",
        "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8, "font.size": 9,
        "svg.fonttype": "none", "svg.hashsalt": "mirrortune", "font.family": "sans-serif",
        "text.parse_math": False, "text.usetex": False,  # names of classes and runs may contain "$"
    }  # fmt: skip
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ ")  # characters that the font lacks are drawn as boxes
        warnings.filterwarnings("ignore", message="constrained_layout not applied")  # names longer than the figure
        figure = Figure(figsize=drawing.size, layout="constrained")
        drawing.draw(figure)
        _write_powers_plainly(figure)
        data = _saved(figure, kind)
    return data if kind == "png" else _NO_XML.sub("", data.decode()).encode()


def _saved(figure: Any, kind: str) -> bytes:
    buffer = io.BytesIO()
    options = {"metadata": {"Date": None}} if kind == "svg" else {"dpi": 130, "facecolor": "white"}
    figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()


def _matplotlib() -> Any:
    """Import matplotlib without the ``matplotlibrc`` of the working directory.

    matplotlib reads that file before any other, and the working directory may hold files from other people.
    """
    if "matplotlib" not in sys.modules:
        spec = importlib.util.find_spec("matplotlib")
        own = Path(spec.origin or "").parent / "mpl-data" if spec else Path()
        try:
            before = Path.cwd()
        except FileNotFoundError:  # the working directory was deleted, so it holds no matplotlibrc
            return importlib.import_module("matplotlib")
        os.chdir(own)  # no setting prevents it: the working directory comes before even MATPLOTLIBRC
        try:
            importlib.import_module("matplotlib")
        finally:
            os.chdir(before)
    return sys.modules["matplotlib"]


def _write_powers_plainly(figure: Any) -> None:
    """Label logarithmic axes with ``10²`` instead of mathtext, which is switched off."""
    from matplotlib.ticker import LogFormatterSciNotation  # noqa: PLC0415

    class Plain(LogFormatterSciNotation):
        def __call__(self, x: float, pos: int | None = None) -> str:
            found = re.sub(r"\$\\mathdefault\{(.*)\}\$", r"\1", super().__call__(x, pos)).replace(r"\times", "×")
            return re.sub(r"\^\{(.*?)\}", lambda power: power[1].translate(_RAISED), found)

    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        for kind in ("major", "minor"):
            formatter = getattr(axis, f"get_{kind}_formatter")()
            if type(formatter) is LogFormatterSciNotation:
                plain = Plain(labelOnlyBase=formatter.labelOnlyBase)
                getattr(axis, f"set_{kind}_formatter")(plain)


def _coloured(svg: str, colours: dict[str, str]) -> str:
    for placeholder, colour in colours.items():
        svg = svg.replace(placeholder, colour)
    return svg
