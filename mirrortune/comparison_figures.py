# SPDX-License-Identifier: Apache-2.0
"""Figures of a comparison: scores per task, scores against trained numbers, curves by method."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

# Tol's muted set: tells apart with any colour vision, also in grey by its markers.
_COLOURS = (
    "#332288",
    "#cc6677",
    "#117733",
    "#ddcc77",
    "#88ccee",
    "#882255",
    "#44aa99",
    "#999933",
    "#aa4499",
    "#666666",
)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")


def draw_per_task(results: dict[str, Any], path: Path) -> None:
    """Every method's mean score with its standard deviation, a panel for each task."""
    tasks = {task: found for task, found in results["tasks"].items() if _finished(found)}
    if not tasks:
        return
    rows = max(len(_finished(found)) for found in tasks.values())
    with _figure(path, 1, len(tasks), (4.6 * len(tasks), 1.2 + 0.32 * rows)) as axes:
        for axis, (task, found) in zip(axes.flat, tasks.items(), strict=True):
            split = found["splits"][-1]
            methods = sorted(_finished(found).items(), key=lambda item: item[1]["reported"][split]["mean"])
            for place, (label, method) in enumerate(methods):
                score = method["reported"][split]
                colour, marker = _style(found, label)
                axis.errorbar(score["mean"], place, xerr=score["std"], fmt=marker, color=colour, capsize=3)
                axis.plot(score["values"], [place] * len(score["values"]), "|", color=colour, alpha=0.6)
            axis.set(yticks=range(len(methods)), yticklabels=[label for label, _ in methods])
            axis.set(xlabel=f"{found['metric']}, {split}", title=task)
            axis.margins(y=0.5 / max(1, len(methods)))


def draw_sizes(results: dict[str, Any], path: Path) -> None:
    """Score against trained numbers besides the head, on a logarithmic axis; methods that train none are a line."""
    tasks = {task: found for task, found in results["tasks"].items() if _finished(found)}
    if not tasks:
        return
    with _figure(path, 1, len(tasks), (5.2 * len(tasks), 3.8)) as axes:
        for axis, (task, found) in zip(axes.flat, tasks.items(), strict=True):
            split = found["splits"][-1]
            for label, method in _finished(found).items():
                score, size = method["reported"][split], method["trainable_parameters"]
                colour, marker = _style(found, label)
                if size == 0:
                    axis.axhline(score["mean"], color=colour, linestyle="--", label=label)
                else:
                    axis.errorbar(
                        size, score["mean"], yerr=score["std"], fmt=marker, color=colour, capsize=3, label=label
                    )
            axis.set(xlabel="trained numbers besides the head", ylabel=f"{found['metric']}, {split}", title=task)
            _by_decades(axis)
            axis.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def _by_decades(axis: Any) -> None:
    """A logarithmic axis of whole decades: within less than one, matplotlib's own labels run into each other."""
    axis.set(xscale="log")
    low, high = axis.get_xlim()
    axis.set_xlim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))


def draw_curves(histories: dict[str, list[list[dict[str, Any]]]], metric: str, path: Path) -> None:
    """Training loss and validation score over epochs, a line for each method: the mean over its seeds.

    Args:
        histories: by method, the events of each seed's run.
        metric: the selection metric.
        path: of the PNG.
    """
    found = {"methods": histories}
    with _figure(path, 1, 2, (11, 4)) as axes:
        left, right = axes.flat
        for label, runs in histories.items():
            if not runs:
                continue
            colour, marker = _style(found, label)
            epochs, losses = _mean_curve(runs, "train", "loss")
            left.plot(epochs, _smooth(losses), color=colour, label=label)
            epochs, scores = _mean_curve(runs, "evaluate", metric)
            right.plot(epochs, scores, color=colour, marker=marker, markersize=4, label=label)
        left.set(xlabel="epoch", ylabel="training loss per item, smoothed", title="Training loss")
        right.set(xlabel="epoch", ylabel=f"{metric} (rows that choose the checkpoint)", title=f"Validation {metric}")
        right.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def _mean_curve(runs: Sequence[Sequence[dict[str, Any]]], event: str, key: str) -> tuple[Any, Any]:
    by_epoch: dict[float, list[float]] = {}
    for run in runs:
        for entry in run:
            if entry["event"] == event and key in entry:
                by_epoch.setdefault(entry["epoch"], []).append(entry[key])
    epochs = sorted(by_epoch)
    return np.array(epochs), np.array([np.mean(by_epoch[e]) for e in epochs])


def _smooth(values: Any, weight: float = 0.8) -> Any:
    smoothed, last = [], None
    for value in values:
        last = value if last is None else weight * last + (1 - weight) * value
        smoothed.append(last)
    return np.array(smoothed)


def _finished(found: dict[str, Any]) -> dict[str, Any]:
    return {label: method for label, method in found["methods"].items() if method["seeds"]}


def _style(found: dict[str, Any], label: str) -> tuple[str, str]:
    """Colour and marker of a method, the same in every figure of a comparison."""
    index = list(found["methods"]).index(label)
    return _COLOURS[index % len(_COLOURS)], _MARKERS[(index + index // len(_COLOURS)) % len(_MARKERS)]


@contextmanager
def _figure(path: Path, rows: int, columns: int, size: tuple[float, float]) -> Iterator[Any]:
    import matplotlib as mpl  # noqa: PLC0415  (slow to import; only needed here)

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    try:
        yield axes
        for axis in axes.flat:
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.25)
        figure.savefig(path, dpi=130, format="png")
    finally:
        plt.close(figure)
