# SPDX-License-Identifier: Apache-2.0
"""Draw figures of one or several runs: learning curves, predictions, data and plane angles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mirrortune.reports.drawing import COLOURS, DASHES, MARKERS, Drawing, heat_map, legend_beside, tidy
from mirrortune.reports.finished_run import FinishedRun

_BINS = 41
_MOST_ROWS = 60
_MOST_CLASSES = 40


def angle_drawing(angles: dict[str, list[float]]) -> Drawing:
    """Plot histograms of an adapter's plane angles: one of all angles, and a heat map with one row per layer.

    Args:
        angles: angles in degrees by layer or weight; at least one in total.
    """

    def draw(figure: Any) -> None:
        import numpy as np  # noqa: PLC0415

        every = np.concatenate([np.asarray(part) for part in angles.values()])
        largest = float(np.abs(every).max()) or 1.0
        bins = np.linspace(-largest, largest, _BINS + 1)
        left, right = figure.subplots(1, 2, width_ratios=(2, 3))
        left.hist(every, bins=bins, color=COLOURS[0])
        left.set(xlabel="angle (degrees)", ylabel="planes", title="All layers")
        tidy(left)
        shares = [100 * np.histogram(part, bins)[0] / max(1, len(part)) for part in angles.values()]
        mesh = right.pcolormesh(bins, range(len(angles) + 1), shares, cmap="cividis", edgecolors="face", linewidth=0.3)
        right.invert_yaxis()
        right.set(xlabel="angle (degrees)", title="By layer")
        step = -(-len(angles) // _MOST_ROWS)
        names = [name.removesuffix(".weight") for name in angles]
        right.set_yticks([i + 0.5 for i in range(0, len(names), step)], names[::step], fontsize=6)
        figure.colorbar(mesh, ax=right, label="planes of the layer (%)").outline.set_visible(False)

    return Drawing(
        name="plane_angles",
        caption="Angles by which the adapter rotates its planes. How much a rotation changes the weight also depends "
        "on the singular values of its two directions.",
        size=(10, max(3.0, 1 + 0.13 * min(len(angles), _MOST_ROWS))),
        draw=draw,
    )


def run_drawings(runs: Sequence[FinishedRun]) -> list[Drawing]:
    """Return the learning curves of all runs; for a single run, its other figures as well."""
    found = [learning_curves(runs)] if any(r.events for r in runs) else []
    if len(runs) > 1:
        return found
    run = runs[0]
    makers = (_confusion, _scatter, _data, _angles, _angles_over_time)
    return found + [drawing for make in makers if (drawing := make(run)) is not None]


def learning_curves(runs: Sequence[FinishedRun]) -> Drawing:
    """Plot loss, metric, learning rate, gradient norm and speed over optimizer steps."""
    metric = " or ".join(dict.fromkeys(run.metric for run in runs))

    def draw(figure: Any) -> None:
        loss, score, rate, norm, speed, validation = figure.subplots(2, 3).flat
        for place, run in enumerate(runs):
            few = len(run.series("train", "loss")[0]) < 3
            style: dict[str, Any] = {"marker": "o" if few else None, "markersize": 4, "label": run.name}
            style |= {"color": COLOURS[place % len(COLOURS)], "linestyle": DASHES[place // len(COLOURS) % len(DASHES)]}
            dots = {**style, "marker": MARKERS[place % len(MARKERS)], "markersize": 4}
            loss.plot(*run.series("train", "loss"), **style)
            score.plot(*run.series("evaluate", run.metric), **dots)
            rate.plot(*run.series("train", "lr"), **style)
            norm.plot(*run.series("train", "grad_norm"), **style)
            timed = [(p["step"], p["rows_per_second"]) for p in run.progress if "rows_per_second" in p]
            speed.plot([s for s, _ in timed], [v for _, v in timed], **style)
            validation.plot(*run.series("evaluate", "loss"), **dots)
        labels = {loss: "training loss per item", score: f"validation {metric}", rate: "learning rate of the adapter",
                  norm: "norm of the gradient", speed: "training speed (rows per second)",
                  validation: "validation loss per item"}  # fmt: skip
        for axes, label in labels.items():
            axes.set(xlabel="optimizer step", ylabel=label)
            tidy(axes)
        speed.set_ylim(bottom=0)
        if len(runs) > 1:
            figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)

    return Drawing(
        name="learning_curves",
        caption="Above: loss of the training rows since the last point, score on the validation rows, learning rate. "
        "Below: gradient norm before clipping, speed without evaluation (a point after a checkpoint includes the time "
        "to save it), loss on the validation rows.",
        size=(10, 5.2 + 0.2 * (len(runs) // 2)),
        draw=draw,
    )


def _confusion(run: FinishedRun) -> Drawing | None:
    counts, labels = run.validation.get("confusion"), run.validation.get("labels", [])
    if not counts or len(labels) > _MOST_CLASSES:
        return None
    shares = [[100 * c / (sum(row) or 1) for c in row] for row in counts]
    size = 1.6 + 0.4 * max(len(labels), 3)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        heat_map(figure, axes, shares, label="share of the true class (%)")
        axes.set(xlabel="predicted", ylabel="true")
        places = [i + 0.5 for i in range(len(labels))]
        axes.set_xticks(
            places, labels, rotation=35 if len(labels) > 3 else 0, ha="right" if len(labels) > 3 else "center"
        )
        axes.set_yticks(places, [f"{name} ({sum(row):,})" for name, row in zip(labels, counts, strict=True)])

    return Drawing(
        name="confusion",
        caption="Predictions of the kept checkpoint on the validation rows: for each true class (rows, with their "
        "number of examples), the share that was predicted as each class.",
        size=(size + 2.4, size),
        draw=draw,
    )


def _scatter(run: FinishedRun) -> Drawing | None:
    pairs = run.validation.get("pairs")
    if not pairs:
        return None

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot([p[0] for p in pairs], [p[1] for p in pairs], "o", color=COLOURS[0], markersize=3, alpha=0.5)
        ends = [min(p[0] for p in pairs), max(p[0] for p in pairs)]
        axes.plot(ends, ends, color=COLOURS[6], linestyle="--", label="equal")
        axes.set(xlabel="true value", ylabel="predicted value")
        tidy(axes)
        axes.legend(frameon=False)

    caption = "Predictions of the kept checkpoint on the validation rows."
    return Drawing(name="scatter", caption=caption, size=(5.2, 4.2), draw=draw)


def _data(run: FinishedRun) -> Drawing | None:
    lengths, classes = run.validation.get("lengths") or {}, run.validation.get("classes") or {}
    known = {split: counts for split, counts in classes.items() if counts}
    labels = run.validation.get("labels", [])
    has_classes = bool(known) and len(labels) <= _MOST_CLASSES
    panels = int(bool(lengths)) + int(has_classes)
    if not panels:
        return None

    def draw(figure: Any) -> None:
        axes = list(figure.subplots(1, panels, squeeze=False).flat)
        splits = [name for name in ("train", "validation") if name in lengths]
        if lengths:
            for split, colour, dash in zip(splits, COLOURS, DASHES, strict=False):
                axes[0].stairs([100 * v for v in lengths[split]], lengths["edges"], color=colour, linestyle=dash,
                               label=split)  # fmt: skip
            axes[0].set(xlabel="length of a row (tokens or patches)", ylabel="rows of the split (%)", title="Lengths")
            axes[0].legend(frameon=False)
        if has_classes:
            height = 0.8 / len(known)
            for place, (split, counts) in enumerate(known.items()):
                where = [i + (place - (len(known) - 1) / 2) * height for i in range(len(labels))]
                axes[-1].barh(where, [100 * c / (sum(counts) or 1) for c in counts], height, color=COLOURS[place],
                              hatch="//" * place, edgecolor="white", label=split)  # fmt: skip
            axes[-1].set_yticks(range(len(labels)), labels)
            axes[-1].set(xlabel="rows of the split (%)", title="Classes")
            axes[-1].legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
        for panel in axes:
            tidy(panel)

    return Drawing(
        name="data",
        caption="The training rows, and the rows that selected the checkpoint.",
        size=(4.6 * panels, max(2.8, 1 + 0.22 * len(labels) * has_classes)),
        draw=draw,
    )


def _angles(run: FinishedRun) -> Drawing | None:
    angles = run.validation.get("angles")
    return angle_drawing(angles) if angles else None


def _angles_over_time(run: FinishedRun) -> Drawing | None:
    entries = [p for p in run.progress if "angle_rms" in p]
    if len(entries) < 2:
        return None
    layers = list(entries[0]["angle_rms"])

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for place, layer in enumerate(layers):
            axes.plot([e["step"] for e in entries], [e["angle_rms"][layer] for e in entries], linewidth=1,
                      color=COLOURS[place % len(COLOURS)], linestyle=DASHES[place // len(COLOURS) % len(DASHES)],
                      label=layer)  # fmt: skip
        axes.set(xlabel="optimizer step", ylabel="root mean square angle (degrees)")
        tidy(axes)
        if len(layers) <= 16:
            legend_beside(axes)

    return Drawing(name="angles_over_time", caption="How far each layer's planes had rotated at every evaluation.",
                   size=(8, 3.6), draw=draw)  # fmt: skip
