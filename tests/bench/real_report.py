# SPDX-License-Identifier: Apache-2.0
"""Tables and figures of ``tests/bench/real.py``, from the results of its comparisons."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from mirrortune.compare.grid import lr_folder, slug
from mirrortune.reports.drawing import COLOURS, DASHES, MARKERS, Drawing, by_decades, legend_beside, svg_for_page, tidy
from mirrortune.system.run_directory import RunDirectory

Found = dict[str, dict[str, Any]]
"""By task: metric, splits, methods and tests as in a comparison's ``results.json``."""
_THEMES = {"light": ("#1a1a1a", "#d9d9d9"), "dark": ("#e6e6e6", "#4d4d4d")}
_METRICS = {"matthews_correlation": "Matthews corr."}
SEEDS = 3
COMPARED = ("mirror", "mirror-scale", "svft", "lora:rank=8", "none")
"""The methods that a task needs to count in the means, and that the summary shows."""
PAIRINGS = ("mirror", "neighbor", "random", "adaptive")


def write_report(found: Found, folder: Path, output: Path) -> None:
    """Write ``results.json``, ``table.md``, ``summary.md`` and the figures; nothing if no run has finished.

    Args:
        found: finished comparisons.
        folder: of the comparisons, for the curves of their runs.
        output: folder.
    """
    if not found:
        return
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (output / "table.md").write_text(table(found), encoding="utf-8")
    (output / "summary.md").write_text(summary(found), encoding="utf-8")
    for drawing in drawings(found, folder):
        text = svg_for_page(drawing)
        for theme, (ink, faint) in _THEMES.items():
            coloured = text.replace("var(--ink)", ink).replace("var(--faint)", faint)
            (output / f"{drawing.name}-{theme}.svg").write_text(coloured, encoding="utf-8")


def methods_of(found: Found) -> list[str]:
    """Return the methods in the order of the comparisons."""
    return list(dict.fromkeys(label for task in found.values() for label in task["methods"]))


def score(task: dict[str, Any], method: str) -> dict[str, Any] | None:
    """Return mean, deviation and values of a method on the rows that are reported; test rows where they have labels."""
    own = task["methods"].get(method)
    return None if own is None else own["reported"][task["splits"][-1]]


def complete_tasks(found: Found, model: str) -> list[str]:
    """Return the tasks of a model that all of ``COMPARED`` have finished, one seed or more of each."""
    wanted = [method for method in COMPARED if method in methods_of(found)]
    return [name for name, task in found.items()
            if task["model"] == model and all(score(task, method) for method in wanted)]  # fmt: skip


def averages(found: Found, model: str) -> dict[str, tuple[int, float]]:
    """Return (trainable parameters, mean score) of the methods that have finished every complete task of a model."""
    tasks = [found[name] for name in complete_tasks(found, model)]
    made = {}
    for method in methods_of(found):
        scores = [score(task, method) for task in tasks]
        if tasks and all(scores):
            numbers = tasks[0]["methods"][method]["trainable_parameters"]
            made[method] = (numbers, fmean(own["mean"] for own in scores if own))
    return made


def front(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the points that no other one beats with as few numbers, by numbers."""
    kept: list[tuple[int, float]] = []
    for numbers, mean in sorted(points, key=lambda point: (point[0], -point[1])):
        if not kept or mean > kept[-1][1]:
            kept.append((numbers, mean))
    return kept


def table(found: Found) -> str:
    """Return the table of all tasks in Markdown, and what it was measured by."""
    heads = [f"{name}, {_METRICS.get(task['metric'], task['metric'])}" for name, task in found.items()]
    means = {model: averages(found, model) for model in ("text", "images")}
    shown = [model for model, own in means.items() if own]
    lines = [f"| method | trainable parameters | {' | '.join([*heads, *(f'mean, {model}' for model in shown)])} |",
             "|" + "---|" * (2 + len(heads) + len(shown))]  # fmt: skip
    for method in methods_of(found):
        cells = [_cell(task, method) for task in found.values()]
        cells += [f"{100 * means[m][method][1]:.1f}" if method in means[m] else "" for m in shown]
        lines.append(f"| `{method}` | {_numbers(found, method)} | {' | '.join(cells)} |")
    lines += ["", "Scores times 100: mean ± standard deviation over 3 seeds, or over (n) where fewer have run. + or -: "
              "better or worse than the first method, by both a paired t-test over seeds (Holm, p < 0.05) and a "
              "95% interval over seeds and rows. No mark: not significant, or not tested; with few seeds and "
              "many methods, the corrected t-test has little power."]  # fmt: skip
    lines += [f"Mean, {model}: over {', '.join(complete_tasks(found, model))}." for model in shown]
    lines += ["", "| task | rows scored | device, torch |", "|---|---|---|"]
    for name, task in found.items():
        rows = ", ".join(f"{count:,} of {split}" for split, count in task["rows"].items())
        lines.append(f"| {name} | {rows} | {_machine(task)} |")
    for task in found.values():
        lines += ["", f"`{task['command']}`"]
    return "\n".join(lines) + "\n"


def summary(found: Found) -> str:
    """Return the rows of ``COMPARED`` and the tasks that all of them have finished, in Markdown."""
    names = [name for model in ("text", "images") for name in complete_tasks(found, model)]
    heads = [f"{name}, {_METRICS.get(found[name]['metric'], found[name]['metric'])}" for name in names]
    models = {found[name]["model"] for name in names}
    numbers = "trainable parameters" if len(models) == 1 else "trainable parameters, text and images"
    lines = [f"| method | {numbers} | {' | '.join(heads)} |", "|" + "---|" * (2 + len(heads))]
    for method in (own for own in COMPARED if own in methods_of(found)):
        cells = [_cell(found[name], method) for name in names]
        lines.append(f"| `{method}` | {_numbers(found, method)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _machine(task: dict[str, Any]) -> str:
    return f"{task['environment'].get('device')}, {task['environment'].get('torch')}"


def _numbers(found: Found, method: str) -> str:
    kinds = {task["model"]: task["methods"][method]["trainable_parameters"]
             for task in found.values() if method in task["methods"]}  # fmt: skip
    return ", ".join(f"{count:,}" for count in dict.fromkeys(kinds.values()))


def _cell(task: dict[str, Any], method: str) -> str:
    own = score(task, method)
    if own is None:
        return ""
    tests = task["tests"].get(task["splits"][-1], [])
    verdict = next((test["verdict"] for test in tests if test["label"] == method), "")
    mark = {"better": " +", "worse": " -"}.get(verdict, "")
    count = len(own["values"])
    spread = f" ± {100 * own['std']:.1f}" if count > 1 else ""
    return f"{100 * own['mean']:.1f}{spread}{mark}{f' ({count})' if count < SEEDS else ''}"


def drawings(found: Found, folder: Path) -> list[Drawing]:
    """Return the figures that the finished runs allow."""
    made = [_by_task(found)]
    for model in ("text", "images"):
        if means := averages(found, model):
            made.append(_by_size(model, means, complete_tasks(found, model)))
    for task, event, key in (("rte", "train", "loss"), ("dtd", "evaluate", "accuracy")):
        curves = pairing_curves(found, folder, task, event, key)
        made += [_curves(task, key, curves)] if curves else []
    return made


def _by_task(found: Found) -> Drawing:
    methods = methods_of(found)
    columns = min(3, len(found))
    rows = math.ceil(len(found) / columns)

    def draw(figure: Any) -> None:
        panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for axes in panels.flat[len(found) :]:
            axes.set_visible(False)
        for axes, (name, task) in zip(panels.flat, found.items(), strict=False):
            scores = [(place, own) for place, method in enumerate(methods) if (own := score(task, method))]
            for place, own in scores:
                style = _style(place)
                axes.errorbar(100 * own["mean"], place, xerr=100 * (own["std"] or 0), capsize=2, markersize=5, **style)
                axes.plot([100 * v for v in own["values"]], [place] * len(own["values"]), "|", color=style["color"])
            low = _lowest_shown([own for place, own in scores if methods[place] != "none"])
            for place, own in scores:
                if low is not None and 100 * own["mean"] < low:
                    axes.annotate(f"\N{LEFTWARDS ARROW} {100 * own['mean']:.1f}", (low, place), fontsize=8, va="center")
            axes.set(yticks=range(len(methods)), yticklabels=methods, title=name)
            axes.set(xlabel=f"{_METRICS.get(task['metric'], task['metric'])}, times 100")
            axes.set_xlim(left=low)
            tidy(axes)
        panels.flat[0].set_ylim(len(methods) - 0.4, -0.6)

    caption = (
        "Score of every method on every task: mean, standard deviation and each seed; an arrow marks a score beyond "
        "the left end of the axis."
    )
    return Drawing(name="score-by-task", caption=caption, size=(2 + 2.8 * columns, rows * (1 + 0.2 * len(methods))),
                   draw=draw)  # fmt: skip


def _lowest_shown(scores: Sequence[dict[str, Any]]) -> float | None:
    """Return where an axis starts that shows the differences between adapters; the head alone may lie far below."""
    if not scores:
        return None
    values = [100 * value for own in scores for value in (*own["values"], own["mean"] - (own["std"] or 0))]
    return min(values) - 0.15 * (max(values) - min(values)) - 0.5


def _by_size(model: str, means: dict[str, tuple[int, float]], tasks: Sequence[str]) -> Drawing:
    def draw(figure: Any) -> None:
        axes = figure.subplots()
        best = front([point for point in means.values() if point[0]])
        axes.step([n for n, _ in best], [100 * mean for _, mean in best], where="post", color="#999999", zorder=0)
        axes.set(xlabel="trainable parameters, task head excluded", ylabel="mean score, times 100")
        for index, (method, (numbers, mean)) in enumerate(means.items()):
            if numbers:
                axes.plot(numbers, 100 * mean, linestyle="", label=method, **_style(index))
        low, high = axes.get_ylim()
        for index, (method, (numbers, mean)) in enumerate(means.items()):
            if not numbers and 100 * mean > low - (high - low):
                axes.axhline(100 * mean, linestyle="--", color=_style(index)["color"], label=method)
            elif not numbers:  # far below the others: a line there would leave no room for their differences
                axes.plot([], [], linestyle="", label=f"{method}: {100 * mean:.1f}, below")
        axes.set(title=", ".join(tasks))
        by_decades(axes)
        legend_beside(axes)
        tidy(axes)

    caption = (
        "Mean score over the tasks against trainable parameters; the line marks the best score among methods of that "
        "size or smaller."
    )
    return Drawing(name=f"score-by-size-{model}", caption=caption, size=(7, 4), draw=draw)


def pairing_curves(found: Found, folder: Path, task: str, event: str, key: str) -> dict[str, list[tuple[float, float]]]:
    """Return (epoch, mean over seeds) of a number in the logs of the pairings' runs."""
    made = {}
    for method in PAIRINGS:
        own = found.get(task, {}).get("methods", {}).get(method)
        if own is None:
            continue
        by_epoch: dict[float, list[float]] = {}
        for run in sorted((folder / task / "cells").glob(f"*/{slug(own['label'])}/{lr_folder(own['lr'])}/seed-*")):
            for entry in RunDirectory(run).events():
                if entry["event"] == event and key in entry:
                    by_epoch.setdefault(entry["epoch"], []).append(entry[key])
        if by_epoch:
            made[method] = [(epoch, fmean(values)) for epoch, values in sorted(by_epoch.items())]
    return made


def _curves(task: str, key: str, curves: dict[str, list[tuple[float, float]]]) -> Drawing:
    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for index, (method, points) in enumerate(curves.items()):
            axes.plot([e for e, _ in points], [value for _, value in points], DASHES[index], label=method,
                      color=COLOURS[index])  # fmt: skip
        axes.set(xlabel="epoch", ylabel=f"{'training' if key == 'loss' else 'validation'} {key}", title=task)
        legend_beside(axes)
        tidy(axes)

    caption = f"{key.capitalize()} on {task} by epoch for each pairing, the mean over seeds."
    return Drawing(name=f"pairings-{task}", caption=caption, size=(6, 4), draw=draw)


def _style(index: int) -> dict[str, str]:
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[(index + index // 7) % len(MARKERS)]}
