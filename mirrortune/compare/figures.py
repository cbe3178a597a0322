# SPDX-License-Identifier: Apache-2.0
"""Draw the figures of a comparison: scores by task and by number of trained parameters, and curves by method."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from mirrortune.compare.grid import slug
from mirrortune.reports.drawing import MARKERS, Drawing, by_decades, legend_beside, tidy
from mirrortune.tasks.metrics import METRICS

# More colours than the figures of a run need, from Paul Tol's schemes, which can be told apart with colour-blindness.
# In greyscale, markers distinguish the methods.
_COLOURS = (
    "#4477aa", "#cc6677", "#117733", "#ccbb44", "#66ccee", "#aa3377", "#44aa99", "#999933", "#aa4499", "#888888",
)  # fmt: skip


def comparison_drawings(
    results: dict[str, Any], histories: dict[str, dict[str, list[list[dict[str, Any]]]]]
) -> list[Drawing]:
    """Return the figures of all tasks that have finished runs.

    Args:
        results: content of ``results.json``.
        histories: logged events of the run of each seed, by task and method.
    """
    tasks = {task: found for task, found in results["tasks"].items() if _finished(found)}
    found = [_per_task(tasks), _by_size(tasks)] if tasks else []
    for task, runs in histories.items():
        if any(runs.values()):
            found.append(_curves(task, runs, results["tasks"][task]["metric"]))
    return found


def _per_task(tasks: dict[str, Any]) -> Drawing:
    rows = max(len(_finished(found)) for found in tasks.values())

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, len(tasks), squeeze=False).flat
        for axis, (task, found) in zip(panels, tasks.items(), strict=True):
            split = found["splits"][-1]
            sign = 1 if METRICS[found["metric"]].higher_is_better else -1
            methods = sorted(_finished(found).items(), key=lambda item: sign * item[1]["reported"][split]["mean"])
            for place, (label, method) in enumerate(methods):
                score = method["reported"][split]
                colour, marker = _style(found, label)
                axis.errorbar(score["mean"], place, xerr=score["std"], fmt=marker, color=colour, capsize=3)
                axis.plot(score["values"], [place] * len(score["values"]), "|", color=colour, alpha=0.6)
            axis.set(yticks=range(len(methods)), yticklabels=[label for label, _ in methods])
            axis.set(xlabel=f"{found['metric']}, {split}", title=task)
            axis.margins(y=0.5 / max(1, len(methods)))
            tidy(axis)

    caption = (
        "Score of every method, the best on top: mean and standard deviation over its seeds, and a mark for each seed."
    )
    size = (1.5 + 4.5 * len(tasks), 1.2 + 0.32 * rows)
    return Drawing(name="score_per_task", caption=caption, size=size, draw=draw)


def _by_size(tasks: dict[str, Any]) -> Drawing:
    def draw(figure: Any) -> None:
        panels = figure.subplots(1, len(tasks), squeeze=False).flat
        for axis, (task, found) in zip(panels, tasks.items(), strict=True):
            split = found["splits"][-1]
            for label, method in _finished(found).items():
                score, size = method["reported"][split], method["trainable_parameters"]
                colour, marker = _style(found, label)
                style = {"color": colour, "label": label}
                if size == 0:
                    axis.axhline(score["mean"], linestyle="--", **style)
                else:
                    axis.errorbar(size, score["mean"], yerr=score["std"], fmt=marker, capsize=3, **style)
            axis.set(
                xlabel="trainable parameters, task head excluded", ylabel=f"{found['metric']}, {split}", title=task
            )
            by_decades(axis)
            legend_beside(axis)
            tidy(axis)

    caption = (
        "Score (mean and standard deviation) against trainable parameters, task head excluded, on a logarithmic axis; "
        "a method that trains only the head is a dashed line."
    )
    return Drawing(name="score_by_trained_numbers", caption=caption, size=(6.2 * len(tasks), 3.8), draw=draw)


def _curves(task: str, histories: dict[str, list[list[dict[str, Any]]]], metric: str) -> Drawing:
    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for label, runs in histories.items():
            if not runs:
                continue
            colour, marker = _style({"methods": histories}, label)
            epochs, losses = _mean_curve(runs, "train", "loss")
            left.plot(epochs, _smooth(losses), color=colour, label=label)
            epochs, scores = _mean_curve(runs, "evaluate", metric)
            right.plot(epochs, scores, color=colour, marker=marker, markersize=4, label=label)
        left.set(xlabel="epoch", ylabel="training loss per item, smoothed", title="Training loss")
        right.set(xlabel="epoch", ylabel=f"{metric} (rows that choose the checkpoint)", title=f"Validation {metric}")
        legend_beside(right)
        tidy(left)
        tidy(right)

    caption = (
        f"Training loss and validation score on {task} by epoch, the mean over the seeds of each method, up to the "
        "last epoch that all of them reached."
    )
    return Drawing(name=f"curves-{slug(task)}", caption=caption, size=(11, 4), draw=draw)


def _mean_curve(runs: Sequence[Sequence[dict[str, Any]]], event: str, key: str) -> tuple[list[float], list[float]]:
    """Return mean epochs and mean values of the first, the second, ... event of all ``runs``. Later events of some runs
    only, where patience ended the others, are left out, since the mean would jump to that of the runs that are left.
    """
    logged = [[(e["epoch"], e[key]) for e in run if e["event"] == event and key in e] for run in runs]
    means = [tuple(map(fmean, zip(*point, strict=True))) for point in zip(*logged, strict=False)]
    return [epoch for epoch, _ in means], [value for _, value in means]


def _smooth(values: Sequence[float]) -> list[float]:
    """Return the mean around each value, over a tenth of them. The window is symmetric even at the ends, where it is
    narrower: any other lags behind a falling loss.
    """
    reaches = [min(len(values) // 20, i, len(values) - 1 - i) for i in range(len(values))]
    return [fmean(values[i - reach : i + reach + 1]) for i, reach in enumerate(reaches)]


def _finished(found: dict[str, Any]) -> dict[str, Any]:
    return {label: method for label, method in found["methods"].items() if method["seeds"]}


def _style(found: dict[str, Any], label: str) -> tuple[str, str]:
    """Return the colour and marker of a method, the same in every figure of a comparison."""
    index = list(found["methods"]).index(label)
    return _COLOURS[index % len(_COLOURS)], MARKERS[(index + index // len(_COLOURS)) % len(MARKERS)]
