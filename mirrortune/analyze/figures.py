# SPDX-License-Identifier: Apache-2.0
"""Draw the figures of an analysis.

Each figure is a function that returns a drawing for an :class:`Analysis`, or None if the analysis lacks its data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from mirrortune.analyze.analyze import Analysis
from mirrortune.analyze.spectra.spectra import MatrixComparison
from mirrortune.analyze.spectra.summary import SHARES, Analysed, by, mean_turn, top_energy
from mirrortune.reports.drawing import COLOURS, DASHES, MARKERS, Drawing, heat_map, legend_beside, tidy
from mirrortune.reports.run_figures import angle_drawing

_SHARE_NAMES = {"amplification": "amplification", "reorientation": "re-orientation", "new": "new directions"}
_HATCHES = {"amplification": "", "reorientation": "//", "new": ".."}
_MOST_PANELS = 9


NAMES = (
    "shares", "by_layer_and_kind", "spectra", "singular_value_change", "captured_by_method", "leading_subspaces",
    "overlap_of_leading_directions", "plane_angles",
)  # fmt: skip
"""Names of all figures."""


def drawings(analysis: Analysis) -> list[Drawing]:
    """Return all figures for which the analysis has data, in the order of the page."""
    makers = (_shares, _heat_maps, _spectra, _value_change, _captured, _subspaces, _overlaps, _angles)
    if not any(m.comparison for m in analysis.matrices):
        return []
    return [found for make in makers if (found := make(analysis)) is not None]


def _compared(matrices: Sequence[Analysed]) -> list[tuple[Analysed, MatrixComparison]]:
    return [(m, m.comparison) for m in matrices if m.comparison is not None]


def _kinds(analysis: Analysis) -> dict[str, list[tuple[Analysed, MatrixComparison]]]:
    """Group the changed matrices by kind, the most frequent kind first."""
    groups = {kind: _compared(part) for kind, part in by(analysis.matrices, lambda m: m.kind).items()}
    known = {kind: part for kind, part in groups.items() if part}
    return dict(sorted(known.items(), key=lambda item: -len(item[1])))


def _shares(analysis: Analysis) -> Drawing:
    groups = {k: g for k, g in analysis.by_kind.items() if g.shares}

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        left = [0.0] * len(groups)
        for share, colour in zip(SHARES, COLOURS, strict=False):
            values = [100 * g.shares[share] for g in groups.values() if g.shares]
            axes.barh(range(len(groups)), values, left=left, color=colour, label=_SHARE_NAMES[share],
                      hatch=_HATCHES[share], edgecolor="white", linewidth=0.5, height=0.7)  # fmt: skip
            left = [a + b for a, b in zip(left, values, strict=True)]
        axes.set(xlabel="share of the change's energy (%)", xlim=(0, 100))
        axes.set_yticks(range(len(groups)), list(groups))
        axes.invert_yaxis()
        tidy(axes, grid="x")
        legend_beside(axes)

    return Drawing(
        name="shares",
        caption="What the change consists of, by kind of matrix: old directions made stronger or weaker, old strengths "
        "in turned directions, and directions along which the base did little or nothing.",
        size=(8.6, 1.1 + 0.32 * len(groups)),
        draw=draw,
    )


_MAPS: tuple[tuple[str, Callable[[MatrixComparison], float], bool], ...] = (
    ("norm of the change (% of the weight's)", lambda c: 100 * c.norms["relative"], False),
    ("top singular values (%)", lambda c: 100 * c.value_change.get("top", math.nan), True),
    ("tail singular values (%)", lambda c: 100 * c.value_change.get("tail", math.nan), True),
    ("top vectors turned (degrees)", mean_turn, False),
    ("energy in top directions (times chance)", top_energy, False),
    ("stable rank of the change", lambda c: c.delta["stable_rank"], False),
)


def _heat_maps(analysis: Analysis) -> Drawing | None:
    layered = [m for m in analysis.matrices if m.depth is not None]
    kinds = list(dict.fromkeys(m.kind for m in layered))[:16]
    depths = sorted({m.depth for m in layered if m.depth is not None})
    if len(depths) < 2 or not _compared(layered):
        return None
    found: dict[tuple[int | None, str], list[MatrixComparison]] = {}
    for matrix, comparison in _compared(layered):
        found.setdefault((matrix.depth, matrix.kind), []).append(comparison)

    def draw(figure: Any) -> None:
        for axes, (label, number, is_signed) in zip(figure.subplots(3, 2).flat, _MAPS, strict=True):
            cells = [[median(map(number, found[d, k])) if (d, k) in found else math.nan for k in kinds] for d in depths]
            heat_map(figure, axes, cells, label="", zero_centred=is_signed)
            axes.set(title=label, ylabel="layer")
            axes.set_xticks([i + 0.5 for i in range(len(kinds))], kinds, rotation=35, ha="right")
            step = max(1, len(depths) // 16)
            axes.set_yticks([i + 0.5 for i in range(0, len(depths), step)], depths[::step])

    return Drawing(
        name="by_layer_and_kind",
        caption="By layer and kind (medians where a layer has several). Top: the leading directions, at most "
        f"{analysis.top_k}; tail: the weaker half. Energy in top directions: how much of the change lies in the "
        "base's leading output and input directions, against a change without preference.",
        size=(10, 3 * (1.4 + 0.2 * min(len(depths), 24))),
        draw=draw,
    )


def _panels(figure: Any, count: int) -> list[Any]:
    columns = min(3, count)
    axes = list(figure.subplots(-(-count // columns), columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.set_visible(False)
    return axes[:count]


def _panel_size(count: int, height: float = 2.6) -> tuple[float, float]:
    columns = min(3, count)
    return 3.4 * columns + 0.2, height * -(-count // columns)


def _most_changed(analysis: Analysis) -> dict[str, tuple[Analysed, MatrixComparison]]:
    kinds = dict(list(_kinds(analysis).items())[:_MOST_PANELS])
    return {k: max(part, key=lambda item: item[1].norms["relative"] or 0.0) for k, part in kinds.items()}


def _spectra(analysis: Analysis) -> Drawing:
    chosen = _most_changed(analysis)

    def draw(figure: Any) -> None:
        for axes, (matrix, c) in zip(_panels(figure, len(chosen)), chosen.values(), strict=True):
            axes.plot(c.positions, c.base_spectrum, color=COLOURS[0], label="before")
            axes.plot(c.positions, c.tuned_spectrum, color=COLOURS[1], linestyle="--", label="after")
            axes.plot(c.positions, c.delta_spectrum, color=COLOURS[2], linestyle=":", label="the change itself")
            axes.set(xscale="log", yscale="log", xlabel="rank position", ylabel="singular value", title=_title(matrix))
            tidy(axes)
        figure.axes[0].legend(frameon=False, fontsize=7)

    return Drawing(
        name="spectra",
        caption="Singular values before and after (in the weight's own unit), of the matrix of each kind that changed "
        "most relative to its norm.",
        size=_panel_size(len(chosen)),
        draw=draw,
    )


def _value_change(analysis: Analysis) -> Drawing:
    kinds = dict(list(_kinds(analysis).items())[:_MOST_PANELS])

    def draw(figure: Any) -> None:
        for axes, (kind, part) in zip(_panels(figure, len(kinds)), kinds.items(), strict=True):
            curves: dict[int, list[float]] = {}
            for _, c in part:
                pairs = zip(c.base_spectrum, c.tuned_spectrum, strict=True)
                change = [100 * (after / before - 1) if before > 0 else math.nan for before, after in pairs]
                axes.plot(c.positions, change, color=COLOURS[4], linewidth=0.7, alpha=0.7)
                for position, value in zip(c.positions, change, strict=True):
                    curves.setdefault(position, []).append(value)
            positions = sorted(p for p, values in curves.items() if len(values) == len(part))
            axes.plot(positions, [median(curves[p]) for p in positions], color=COLOURS[1], linewidth=1.8)
            axes.axhline(0, color=COLOURS[6], linewidth=0.8)
            steady = [v for p, values in curves.items() if p <= 0.95 * max(curves) for v in values if math.isfinite(v)]
            edge = 1.2 * max(map(abs, steady), default=1.0) or 1.0
            axes.set_ylim(-edge, edge)
            axes.set(xscale="log", xlabel="rank position", ylabel="change of the singular value (%)", title=kind)
            tidy(axes)

    return Drawing(
        name="singular_value_change",
        caption="Relative change of singular values by rank position: every matrix of a kind (thin) and their median "
        "(thick). The weakest twentieth, whose values may be next to nothing, may leave the frame.",
        size=_panel_size(len(kinds)),
        draw=draw,
    )


def _captured(analysis: Analysis) -> Drawing:
    shown = {n: c for n, c in analysis.curves.items() if n != "full"}

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for place, (name, curve) in enumerate(shown.items()):
            axes.plot(
                curve.parameters, [100 * v for v in curve.captured], label=name, marker=MARKERS[place % len(MARKERS)],
                color=COLOURS[place % len(COLOURS)], linestyle=DASHES[place // len(COLOURS)], markersize=4,
            )  # fmt: skip
        axes.set(xscale="log", xlabel="trainable parameters, all matrices together")
        best = max(max(c.captured) for c in shown.values())
        axes.set(yscale="log", ylim=(max(0.01, 100 * min(max(c.captured) for c in shown.values()) / 30), 130 * best))
        axes.set(ylabel="share of the change's energy captured (%)")
        tidy(axes)
        legend_beside(axes)

    return Drawing(
        name="captured_by_method",
        caption="How much of this change the best adapter of each method and size could have made. A size is a rank, a "
        "number of directions or of bands, the same for every matrix. It says what can be reached, not what training "
        "would find, nor what the task needs.",
        size=(9, 4.2),
        draw=draw,
    )


def _subspaces(analysis: Analysis) -> Drawing:
    found = [c for _, c in _compared(analysis.matrices)]
    sizes = sorted({k for c in found for k in c.subspace_energy})

    def middle(side: str, size: int) -> float:
        return 100 * median(c.subspace_energy[size][side] for c in found if size in c.subspace_energy)

    def angle(side: str, size: int) -> float:
        return median(c.principal_angles[size][side] for c in found if size in c.principal_angles)

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for side, colour, marker in (("output", COLOURS[0], "o"), ("input", COLOURS[1], "s")):
            left.plot(sizes, [middle(side, k) for k in sizes], color=colour, marker=marker, label=side)
            left.plot(sizes, [middle(f"{side}_chance", k) for k in sizes], color=colour, linestyle=":",
                      label=f"{side}, by chance")  # fmt: skip
            right.plot(sizes, [angle(f"{side}_mean", k) for k in sizes], color=colour, marker=marker,
                       label=f"{side}, mean")  # fmt: skip
            right.plot(sizes, [angle(f"{side}_largest", k) for k in sizes], color=colour, marker=marker,
                       linestyle="--", label=f"{side}, largest")  # fmt: skip
        left.set(xscale="log", yscale="log", ylabel="share of the change's energy (%)", title="Where the change lies")
        right.set(xscale="log", ylabel="principal angle (degrees)", title="How far the subspaces turned")
        for axes in (left, right):
            axes.set_xlabel("leading directions of the base")
            axes.set_xticks(sizes, sizes)
            axes.set_xticks([], minor=True)  # not those of y, the only labels of an axis within a decade
            tidy(axes)
            axes.legend(frameon=False, fontsize=7)

    return Drawing(
        name="leading_subspaces",
        caption="Left: how much of the change lies in the base's leading output and input directions, and how much "
        "would by chance. Right: angles between the leading subspaces before and after. Medians over matrices.",
        size=(9, 3.4),
        draw=draw,
    )


def _overlaps(analysis: Analysis) -> Drawing:
    chosen = _most_changed(analysis)

    def draw(figure: Any) -> None:
        for axes, (matrix, c) in zip(_panels(figure, len(chosen)), chosen.values(), strict=True):
            mesh = axes.pcolormesh(c.overlap_output, vmin=0, vmax=1, cmap="cividis", edgecolors="face", linewidth=0.3)
            axes.invert_yaxis()
            axes.set(xlabel="direction after (rank)", ylabel="direction before (rank)", title=_title(matrix))
            ticks = sorted({0, c.top_k // 2, c.top_k - 1})
            axes.set_xticks([t + 0.5 for t in ticks], [t + 1 for t in ticks])
            axes.set_yticks([t + 0.5 for t in ticks], [t + 1 for t in ticks])
            axes.set_aspect("equal")
            figure.colorbar(mesh, ax=axes, label="|cosine|").outline.set_visible(False)

    return Drawing(
        name="overlap_of_leading_directions",
        caption="Overlap of the leading output directions before and after, in the matrices that changed most: a "
        "bright diagonal has stayed, bright cells beside it have changed places, dark columns are new.",
        size=_panel_size(len(chosen), 2.9),
        draw=draw,
    )


def _angles(analysis: Analysis) -> Drawing | None:
    turning = [m for m in analysis.matrices if m.angles]
    if not turning:
        return None
    return angle_drawing({m.name: m.angles for m in turning if m.angles})


def _title(matrix: Analysed) -> str:
    return matrix.kind if matrix.depth is None else f"{matrix.kind}, layer {matrix.depth}"
