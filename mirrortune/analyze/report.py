# SPDX-License-Identifier: Apache-2.0
"""Report an analysis on a terminal and as a page."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mirrortune import __version__
from mirrortune.analyze.analyze import Analysis
from mirrortune.analyze.figures import NAMES, drawings
from mirrortune.analyze.spectra.summary import Analysed, MatrixGroup
from mirrortune.analyze.spectra.verdict import BUDGETS
from mirrortune.errors import ConfigError
from mirrortune.reports import html
from mirrortune.reports.drawing import write_figures
from mirrortune.reports.html import Html
from mirrortune.reports.tables import Table, sparkline
from mirrortune.system.atomic import discard
from mirrortune.system.claims import claimed
from mirrortune.system.outputs import FIGURES, Input, Marker, check_place, read_marker, write_marker

_GROUP_HEAD = ("changed", "change %", "amplified %", "re-oriented %", "new %", "top σ %", "tail σ %", "turned °",
               "stable rank", "× chance", "new dir.")  # fmt: skip
_GROUPS = ("top", "tail")


def terminal_lines(analysis: Analysis) -> list[str]:
    """Return the summary for a terminal, about 120 columns wide."""
    lines = [f"{analysis.base} -> {analysis.tuned}", "", *analysis.verdict, ""]
    lines += _group_table(analysis).lines()
    depths = {d: g for d, g in analysis.by_depth.items() if d != "outside"}
    if len(depths) > 1:
        lines += ["", *_depth_lines(depths)]
    if analysis.claims:
        lines += ["", "Published findings for full fine-tuning (arXiv 2505.23099), tested here:"]
        for claim in analysis.claims:
            lines += [f"  {_holds(claim.holds)}: {claim.text} ({_percent(claim.agreeing)} of matrices)",
                      f"      {claim.evidence}"]  # fmt: skip
    if analysis.curves:
        lines += ["", "Largest share of the change that each method could reproduce, by trainable parameters:"]
        lines += _method_table(analysis).lines()
    return [*lines, *_left_out(analysis)]


def write_drawings(analysis: Analysis, folder: Path) -> list[Path]:
    """Write all figures as PNG and SVG files, and list them in the folder's marker."""
    _check_figures(folder)  # again, since the analysis may have taken hours
    found = drawings(analysis)
    before = read_marker(folder)
    names = frozenset(f"{drawing.name}.{suffix}" for drawing in found for suffix in ("png", "svg"))
    folder.mkdir(parents=True, exist_ok=True)
    write_marker(folder, Marker(FIGURES.name, names | (before.files if before else frozenset())))
    return write_figures(found, folder)


@contextmanager
def figures_folder(folder: Path, inputs: Sequence[Input]) -> Iterator[None]:
    """Claim a folder for figures while the block runs; it may hold other files under other names.

    Raises:
        ConfigError: a file with the name of a figure was not written by an earlier analysis, the folder is another
            output of mirrortune, or another process writes it.
    """
    check_place(folder, inputs)
    with claimed(folder):
        _check_figures(folder)
        is_new = not folder.exists()
        try:
            yield
        except BaseException:
            if is_new:
                discard(folder, is_ours=(read_marker(folder) or Marker(FIGURES.name, frozenset())).owns)
            raise


def _check_figures(folder: Path) -> None:
    marker = read_marker(folder)
    if marker is not None and marker.kind != FIGURES.name:
        fix = f"Name a folder in it, such as {folder / 'figures'}"
        raise ConfigError("--figures", f"{folder} is a {marker.kind}", fix=fix)
    listed = marker.files if marker else frozenset()
    names = [f"{name}.{suffix}" for name in NAMES for suffix in ("png", "svg")]
    if theirs := [name for name in names if name not in listed and os.path.lexists(folder / name)]:
        problem = f"{', '.join(theirs)} in {folder} is not from an earlier analysis and is left alone"
        raise ConfigError("--figures", problem, fix="Move it elsewhere, or choose another folder")


def analysis_page(analysis: Analysis, command: str) -> str:
    """Build the page of an analysis, which ends with the command line ``command``."""
    parts = [html.box(analysis.verdict)]
    if analysis.claims:
        parts += [
            html.heading("Findings for full fine-tuning, tested here"),
            html.paragraph(
                "The four findings of “Weight Spectra Induced Efficient Model Adaptation” (arXiv 2505.23099). A "
                "finding holds if it is true of at least three quarters of the matrices; the criteria are ours."
            ),
            Table(
                ("finding", "here", "of matrices", "numbers", "counts as true of a matrix if"),
                [(c.text, _holds(c.holds), _percent(c.agreeing), c.evidence, c.criterion) for c in analysis.claims],
                is_text=True,
            ).html(),
        ]
    parts += [html.heading("By kind"), _group_table(analysis).html()]
    for drawing in drawings(analysis):
        parts.append(html.figure(drawing))
        if drawing.name == "captured_by_method":
            parts.append(_method_table(analysis).html())
    parts += [html.heading("Every matrix"), _matrix_table(analysis.matrices), *_page_notes(analysis, command)]
    title = f"What changed from {analysis.base} to {analysis.tuned}"
    return html.page(title, f"mirrortune analyze {__version__}", *parts)


_NOTE = (
    "Change: norm of the change relative to the weight's. Amplified, re-oriented, new: shares of the change's energy. "
    "σ: change of the sum of singular values in the top and the tail, median over matrices. Turned: angle of "
    "the top singular vectors. Stable rank: of the change. × chance: energy of the change in the base's top directions "
    "against a change without preference. New dir.: directions along which the base did less than half."
)


def _group_table(analysis: Analysis) -> Table:
    groups = {**analysis.by_kind, "all": analysis.overall}
    return Table(("kind", *_GROUP_HEAD), [(name, *_group_row(g)) for name, g in groups.items()], _NOTE)


def _group_row(group: MatrixGroup) -> list[str]:
    if group.shares is None or group.value_change is None:
        return [f"0/{group.matrices}", *["-"] * (len(_GROUP_HEAD) - 1)]
    values = [group.value_change.get(name, math.nan) for name in _GROUPS]
    return [
        f"{group.changed}/{group.matrices}",
        _number(100 * group.relative),
        *[f"{100 * share:.1f}" for share in group.shares.values()],
        *[_number(100 * value, signed=True) for value in values],
        _number(group.turned),
        _number(group.stable_rank),
        _number(group.top_energy),
        f"{group.num_new:,}",
    ]


def _depth_lines(depths: dict[str, MatrixGroup]) -> list[str]:
    shown = {
        "norm of the change": [100 * g.relative for g in depths.values()],
        "top vectors turned": [g.turned or 0.0 for g in depths.values()],
        "amplified": [100 * g.shares["amplification"] if g.shares else 0.0 for g in depths.values()],
    }
    units = {"top vectors turned": "degrees"}
    first, last = next(iter(depths)), list(depths)[-1]
    width = max(map(len, shown))
    lines = [f"From layer {first} to {last}:"]
    for name, values in shown.items():
        limits = f"{_number(min(values))} to {_number(max(values))} {units.get(name, '%')}"
        lines.append(f"  {name:{width}}  {sparkline(values)}  {limits}")
    return lines


def _method_table(analysis: Analysis) -> Table:
    """Build the table of methods: the percentage that each captures at each budget, and the size that captures 90%."""
    budgets = [share * analysis.num_weights for share in BUDGETS]
    sizes = [f"{b:,.0f} ({100 * s:g}%)" for b, s in zip(budgets, BUDGETS, strict=True)]
    head = ["method", *sizes, "its most", "90% at"]
    rows = []
    for name, curve in analysis.curves.items():
        found = [curve.at(budget) for budget in budgets]
        best = max(range(len(curve.sizes)), key=lambda i: (curve.captured[i], -curve.parameters[i]))
        enough = [p for p, c in zip(curve.parameters, curve.captured, strict=True) if c >= 0.9]
        rows.append([
            name, *["-" if f is None else f"{100 * f[1]:.1f}" for f in found],
            f"{100 * curve.captured[best]:.1f} ({curve.parameters[best]:,})",
            f"{min(enough):,}" if enough else "never",
        ])  # fmt: skip
    order = sorted(rows, key=lambda row: [-float(v) if v != "-" else 0.0 for v in row[-3:0:-1]])
    return Table(head, order, "The same in numbers: the best result with at most that many trainable parameters.")


def _matrix_table(matrices: Sequence[Analysed]) -> Html:
    head = ("weight", "shape", "change %", "amplified %", "re-oriented %", "new %", "top σ %", "tail σ %", "turned °",
            "stable rank", "90% rank", "effective rank", "crossings", "new dir.", "outside %")  # fmt: skip
    rows: list[list[object]] = []
    for m in matrices:
        c = m.comparison
        row: list[object] = [m.name.removesuffix(".weight"), f"{m.shape[0]} × {m.shape[1]}"]
        if c is None:
            rows.append([*row, "unchanged", *["-"] * (len(head) - 3)])
            continue
        turned = [*c.turned["output"], *c.turned["input"]]
        rows.append([
            *row, _number(100 * c.norms["relative"]), *[f"{100 * share:.1f}" for share in c.shares.values()],
            *[_number(100 * c.value_change.get(name, math.nan), signed=True) for name in ("top", "tail")],
            _number(sum(turned) / len(turned)), _number(c.delta["stable_rank"]), f"{c.delta['rank_90']:.0f}",
            _number(c.delta["effective_rank"]), c.crossings, c.num_new, _number(100 * c.outside),
        ])  # fmt: skip
    return html.details(f"{len(rows)} matrices", Table(head, rows).html())


def _page_notes(analysis: Analysis, command: str) -> list[Html]:
    return [
        html.heading("How it was made"),
        html.paragraph(
            "Every matrix is decomposed in float64 before and after. Directions are matched by the overlap of both "
            "their vectors, not by their place in the order. “New” counts directions after, along which the base did "
            "less than half of what is done now, and not even in the same direction; “amplified” is what giving the "
            "base's own directions their new strengths explains; “re-oriented” is the rest. The three sum to the whole "
            "change."
        ),
        *[html.paragraph(line) for line in _left_out(analysis)],
        html.command(command),
    ]


def _left_out(analysis: Analysis) -> list[str]:
    parts = {
        f"only in {analysis.base}": analysis.base_only,
        f"only in {analysis.tuned}": analysis.tuned_only,
        "of another shape": analysis.resized,
    }
    said = [f"{what}: {', '.join(names[:3])}{', ...' * (len(names) > 3)}" for what, names in parts.items() if names]
    return ["", f"Not compared: {'; '.join(said)}."] if said else []


def _holds(holds: bool | None) -> str:  # noqa: FBT001  (a verdict)
    return {True: "holds", False: "does not hold", None: "cannot be told"}[holds]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}%"


def _number(value: float | None, *, signed: bool = False) -> str:
    """Format a number with about three significant digits."""
    if value is None or not math.isfinite(value):
        return "-"
    sign = "+" if signed else ""
    if signed and abs(value) < 1000:
        return f"{value:+.2f}"
    if value == 0 or 0.01 <= abs(value) < 1000:
        digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
        return f"{value:{sign}.{digits}f}"
    return f"{value:{sign}.1e}"
