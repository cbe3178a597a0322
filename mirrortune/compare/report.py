# SPDX-License-Identifier: Apache-2.0
"""Report a comparison from its run directories: ``results.json``, Markdown tables, figures and a page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from mirrortune.compare.figures import comparison_drawings
from mirrortune.compare.grid import Cell, Contender, Grid, Score, choose, shown_lr
from mirrortune.compare.run import Comparison, comparable, comparison_folder, default_jobs
from mirrortune.compare.significance import Sample, compare_with_reference
from mirrortune.config.schema import Recipe
from mirrortune.data.dataset import may_be_same_split
from mirrortune.errors import ConfigError, counted
from mirrortune.reports import html
from mirrortune.reports.drawing import Drawing, write_figure
from mirrortune.reports.finished_run import read_json
from mirrortune.reports.tables import Table
from mirrortune.system.atomic import write_files_atomically
from mirrortune.system.console import Reporter, kilobytes, significant
from mirrortune.system.outputs import Input
from mirrortune.system.run_directory import RunDirectory
from mirrortune.tasks.metrics import METRICS, Metric

# Taken from the first reported run, since they are nearly the same for all seeds.
_SIZES = ("trainable_parameters", "head_parameters", "adapter_bytes")
_COSTS = ("median_step_seconds", "peak_memory_bytes", "train_seconds", "pairing_seconds")
_CHOSEN_ON_IT = " (chosen on it)"
_ON_FEW_SEEDS = (
    "`not significant` does not mean equal: with few seeds and many methods, the corrected t-test has little power"
)


def compare(
    root: Path,
    grid: Grid,
    recipes: dict[str, Recipe],
    reporter: Reporter,
    *,
    inputs: Sequence[Input],
    jobs: int | None,
    report_only: bool,
    command: str,
) -> dict[str, Any]:
    """Run the missing cells of a comparison, write the report, and return the content of ``results.json``.

    Args:
        root: folder of the comparison; finished runs in it are kept.
        grid: grid of the comparison.
        recipes: recipe of each task.
        reporter: prints progress.
        inputs: all files and folders that the recipes read.
        jobs: number of runs at a time; None for one per GPU.
        report_only: write the report without training.
        command: command line to show in the report.
    """
    shared = {name: comparable(recipe) for name, recipe in recipes.items()}
    comparison = Comparison(root=root, grid=grid, recipes=shared, reporter=reporter)
    with comparison_folder(root, inputs):
        comparison.prepare(report_only=report_only)
        try:
            if not report_only:
                comparison.run(jobs or default_jobs())
        finally:  # also report the finished runs of an interrupted comparison
            results = write_report(comparison, command)
    return results


def write_report(comparison: Comparison, command: str) -> dict[str, Any]:
    """Write ``results.json``, ``table.md``, the figures and ``report.html``; return the results.

    Methods with missing runs are reported for the seeds that have finished, but are not tested.
    """
    tasks = {task: _task(comparison, task) for task in comparison.grid.tasks}
    results = {
        "command": command,
        "environment": _environment(comparison),
        "seeds": list(comparison.grid.seeds),
        "tune_seeds": list(comparison.grid.tune_seeds),
        "choose_by": comparison.grid.choose_by,
        "tasks": tasks,
    }
    root = comparison.root
    texts = {"results.json": json.dumps(results, indent=2) + "\n", "table.md": markdown(results)}
    write_files_atomically(root, {name: text.encode() for name, text in texts.items()})
    histories = {
        task: {label: _histories(comparison, task, label, method) for label, method in found["methods"].items()}
        for task, found in tasks.items()
    }
    drawings = comparison_drawings(results, histories)
    for drawing in drawings:
        write_figure(drawing, root / f"{drawing.name}.png")
    html.write_page(root / "report.html", comparison_page(results, drawings))
    return results


def markdown(results: dict[str, Any]) -> str:
    """Render the tables of all tasks as Markdown."""
    parts = []
    for task, found in _begun(results):
        scores = [_scores_table(found).markdown(has_code=True), ""] if found["splits"] else []
        rates = _rates_table(found).markdown(has_code=True)
        parts.append("\n".join([
            f"### {task}", "", *scores, _caption(results, found), "", rates, "", _rates_caption(results, found), "",
        ]))  # fmt: skip
    return "\n".join(parts)


def comparison_page(results: dict[str, Any], drawings: Sequence[Drawing]) -> str:
    """Build the page with the tables of all tasks and the figures."""
    parts = []
    for task, found in _begun(results):
        caption = _caption(results, found).replace("`", "")
        parts += [html.heading(task), *([_scores_table(found).html()] if found["splits"] else [])]
        parts += [html.paragraph(caption)]
        parts += [_rates_table(found).html(), html.paragraph(_rates_caption(results, found))]
    parts += [html.heading("Figures"), *map(html.figure, drawings)]
    return html.page("A comparison of methods", results["command"], *parts)


def _begun(results: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the tasks that have finished or diverged runs, also if no learning rate has been chosen yet."""
    tasks = results["tasks"].items()
    return [(task, found) for task, found in tasks if any(m["tuning"] for m in found["methods"].values())]


def _scores_table(found: dict[str, Any]) -> Table:
    splits, reference = found["splits"], found["reference"]
    head = ["method", "lr", *[f"{found['metric']}, {s}" for s in splits], f"against {reference}, {splits[-1]}",
            "trainable parameters", "adapter", "step", "peak memory"]  # fmt: skip
    return Table(head, [_row(label, m, found, splits) for label, m in found["methods"].items() if m["seeds"]])


def _row(label: str, method: dict[str, Any], found: dict[str, Any], splits: Sequence[str]) -> list[str]:
    lacks = _lacking(method)
    scores = [f"{_mean(method['reported'][name], found)}{f' ({lacks})' if lacks else ''}" for name in splits]
    test = next((t for t in found["tests"].get(splits[-1], []) if t["label"] == label), None)
    against = "-" if label == found["reference"] else "not tested"
    if test is not None:
        low, high, difference = (
            "" if test[key] is None else _score(test[key], found, signed=True) for key in ("low", "high", "difference")
        )
        against = f"{difference}{f' [{low}, {high}]' if low else ''} {test['verdict']}"
    return [
        label,
        f"{shown_lr(method['lr'])}{' (edge of the grid)' if method['is_at_edge'] else ''}",
        *scores,
        against,
        f"{method['trainable_parameters']:,}",
        kilobytes(method["adapter_bytes"]),
        f"{1000 * method['median_step_seconds']:.0f} ms",
        f"{method['peak_memory_bytes'] / 2**20:,.0f} MiB",
    ]


def _mean(spread: dict[str, Any], found: dict[str, Any]) -> str:
    """Format a mean and, for several seeds, its standard deviation."""
    deviation = "" if spread["std"] is None else f" ± {_score(spread['std'], found)}"
    return f"{_score(spread['mean'], found)}{deviation}"


def _lacking(method: dict[str, Any]) -> str:
    """Describe which seeds a method lacks, such as ``3 of 5 seeds, 2 diverged``; empty if it lacks none."""
    done, diverged, unfinished = (len(method[key]) for key in ("seeds", "diverged", "unfinished"))
    if not diverged + unfinished:
        return ""
    why = [f"{count} {what}" for count, what in ((diverged, "diverged"), (unfinished, "not finished")) if count]
    return ", ".join([f"{done} of {counted(done + diverged + unfinished, 'seed')}", *why])


def _rates_table(found: dict[str, Any]) -> Table:
    methods = {label: m["tuning"] for label, m in found["methods"].items() if m["tuning"]}
    rates = sorted({rate for tuning in methods.values() for rate in tuning}, key=float)
    rows = []
    for label, tuning in methods.items():
        chosen = found["methods"][label]["lr"]
        cells = []
        for rate in rates:
            if rate not in tuning:
                cells.append("")
            elif tuning[rate] is None:
                cells.append("diverged")
            else:
                mark = " *" if chosen is not None and shown_lr(chosen) == rate else ""
                cells.append(f"{_score(tuning[rate]['score'], found)} ({tuning[rate]['loss']:.3f}){mark}")
        rows.append([label, *cells])
    return Table(["method, by learning rate", *rates], rows)


def _rates_caption(results: dict[str, Any], found: dict[str, Any]) -> str:
    count = len(results["tune_seeds"])
    if not found["metric"]:  # all runs diverged
        return ""
    return (
        f"Choice of the learning rate (* marks the chosen one): {found['metric']}, and the loss in parentheses, on the "
        f"rows used for choosing; mean over {counted(count, 'seed')}."
    )


def _score(value: float, found: dict[str, Any], *, signed: bool = False) -> str:
    """Format a score: proportions in percent, other metrics (an error, a perplexity) unchanged."""
    sign = "+" if signed else ""
    return f"{100 * value:{sign}.1f}" if METRICS[found["metric"]].is_share else f"{value:{sign}.4g}"


def _caption(results: dict[str, Any], found: dict[str, Any]) -> str:
    env, seeds = results["environment"], len(results["seeds"])
    lost = [f"`{label}` ({_lacking(m)})" for label, m in found["methods"].items() if m["diverged"] and not m["seeds"]]
    waiting = [f"`{label}`" for label, m in found["methods"].items() if m["lr"] is None]
    left_out = [
        *([f"Left out: {', '.join(lost)}"] if lost else []),
        *([f"Left out until their learning rates are chosen, which takes more runs: {', '.join(waiting)}"]
          if waiting else []),
    ]  # fmt: skip
    if not found["splits"]:
        return " ".join(f"{sentence}." for sentence in left_out)
    what = "Score of one seed" if seeds == 1 else f"Mean and standard deviation over {seeds} seeds"
    times = ", times 100" if METRICS[found["metric"]].is_share else ""
    by = " by the loss" if results["choose_by"] == "loss" else ""
    both = ", ".join(name.removesuffix(_CHOSEN_ON_IT) for name in found["chosen_on"])
    on = f"rows that are also reported ({both})" if both else "rows that are not reported"
    rows = ", ".join(f"{counted(n, 'row')} of {name}" for name, n in found["rows"].items() if n)
    sentences = [
        f"{what}{times}; learning rates chosen with {counted(len(results['tune_seeds']), 'seed')}{by} on {on}"
        f"{f'; scored on {rows}' if rows else ''}",
        *left_out,
        *([_tested(found, seeds)] if len(found["methods"]) > 1 else []),
        *_measured(found),
        f"{env.get('device', '?')}, {env.get('mixed_precision', '?')} mixed precision, torch {env.get('torch', '?')}",
    ]
    return " ".join(f"{sentence}." for sentence in sentences)


def _measured(found: dict[str, Any]) -> list[str]:
    """Describe the time of methods that measure pairs or bases before they train, which is in no step time."""
    seconds = {label: m["pairing_seconds"] for label, m in found["methods"].items() if m.get("pairing_seconds")}
    named = ", ".join(f"`{label}` {significant(taken)} s" for label, taken in seconds.items())
    return [f"Measured on training rows before the first step, besides the step times: {named}"] if named else []


def _tested(found: dict[str, Any], seeds: int) -> str:
    """Describe how the methods are tested against the reference."""
    if seeds == 1:
        return f"Difference from `{found['reference']}`, not tested: that takes more than one seed"
    if found["splits"][-1] not in found["tests"]:
        return f"No method is tested against `{found['reference']}`, which lacks results of some seeds"
    t_test, tests = "a paired t-test over seeds (Holm, p < 0.05)", found["tests"].get(found["splits"][-1], [])
    if tests and all(test["low"] is None for test in tests):
        return (
            f"Difference from `{found['reference']}`; a method counts as better or worse if {t_test} is significant. "
            "The test covers the variance between seeds but not between rows, which are not resampled because these "
            f"runs keep no predictions; {_ON_FEW_SEEDS}"
        )
    return (
        f"Difference from `{found['reference']}` with its 95% interval over seeds and rows; a method counts "
        f"as better or worse only if the interval excludes zero and {t_test} is significant; {_ON_FEW_SEEDS}"
    )


def _task(comparison: Comparison, task: str) -> dict[str, Any]:
    methods = {who.label: _method(comparison, task, who) for who in comparison.grid.contenders}
    finished = {label: m for label, m in methods.items() if m["seeds"]}
    _check_alike(task, {label: (m["metric"], tuple(m["reported"])) for label, m in finished.items()})
    any_result = next((m for m in finished.values()), None)
    metric = any_result["metric"] if any_result else _tuned_metric(comparison, task)
    splits = list(any_result["reported"]) if any_result else []
    reference = comparison.grid.contenders[0].label
    complete = [label for label, m in finished.items() if m["seeds"] == list(comparison.grid.seeds)]
    tests: dict[str, list[dict[str, Any]]] = {}
    rows: dict[str, int] = {}
    for split in splits:
        samples = {label: _sample(comparison, task, label, m, split) for label, m in finished.items()}
        rows[split] = next((len(s.references[0]) for s in samples.values() if s.references), 0)
        samples = {label: samples[label] for label in complete}
        compute = _metric_of(METRICS[metric], samples[reference].kind if reference in samples else "")
        if "rank" in METRICS[metric].targets:  # references that each model gave, which is what is tested then
            samples = {label: sample.by_ranks() for label, sample in samples.items()}
            compute = METRICS[metric].of_ranks
        if reference in complete:
            if len(complete) > 1:  # may take minutes
                comparison.reporter.note(f"task {task}: testing differences to {reference} in {metric} on {split}")
            paired = compare_with_reference(
                samples, reference, compute, higher_is_better=METRICS[metric].higher_is_better
            )
            tests[split] = [asdict(p) for p in paired]
    validation = comparison.recipes[task].data.validation_split
    chosen_on = [n for n in splits if n.endswith(_CHOSEN_ON_IT) or may_be_same_split(n, validation)]
    found = {"metric": metric, "reference": reference, "splits": splits, "rows": rows, "chosen_on": chosen_on}
    return {**found, "methods": methods, "tests": tests}


def _method(comparison: Comparison, task: str, who: Contender) -> dict[str, Any]:
    state = choose(comparison.grid, task, who, comparison.score)
    found: dict[str, Any] = {
        "settings": who.settings,
        "lr_key": who.lr_key,
        "lr": state.lr,
        "is_at_edge": state.is_at_edge,
        "tuning": {shown_lr(lr): _tuned(comparison, task, who.label, lr, score) for lr, score in state.scores.items()},
        "seeds": [],
        "diverged": [],
        "unfinished": list(comparison.grid.seeds),
    }
    if state.lr is None:
        return found
    cells = [Cell(task, who.label, state.lr, seed) for seed in comparison.grid.seeds]
    results = {cell.seed: r for cell in cells if (r := comparison.result(cell)) is not None}
    diverged = [cell.seed for cell in cells if cell.seed not in results and comparison.has_diverged(cell)]
    unfinished = [cell.seed for cell in cells if cell.seed not in (*results, *diverged)]
    found |= {"diverged": diverged, "unfinished": unfinished}
    if not results:
        return found
    _check_alike(
        f"{task}, {who.label}",
        {f"seed {seed}": (r["selection_metric"], tuple(r["reported"])) for seed, r in results.items()},
    )
    first = next(iter(results.values()))
    metric = first["selection_metric"]
    # Under the protocol dev-best, the rows that select the checkpoint are the only ones to report on.
    per_split = {name: [r["reported"][name][metric] for r in results.values()] for name in first["reported"]}
    per_split = per_split or {f"validation{_CHOSEN_ON_IT}": [r["metrics"][metric] for r in results.values()]}
    return {
        **found,
        "seeds": sorted(results),
        "metric": metric,
        "reported": {name: _spread(values) for name, values in per_split.items()},
        "selection": _spread([r["metrics"][metric] for r in results.values()]),
        **{key: first[key] for key in _SIZES},
        **{key: float(np.median([r[key] for r in results.values()])) for key in _COSTS},
    }


def _tuned(comparison: Comparison, task: str, label: str, lr: float, score: Score) -> dict[str, float] | None:
    """Return the mean metric and loss of a learning rate's tuning runs, or None if one diverged."""
    found = [comparison.result(Cell(task, label, lr, seed)) for seed in comparison.grid.tune_seeds]
    results = [r for r in found if r is not None]
    if not all(map(math.isfinite, score)):
        return None
    metrics = [r["metrics"] for r in results]
    selected = results[0]["selection_metric"]
    return {
        "score": float(np.mean([m[selected] for m in metrics])),
        "loss": float(np.mean([m["loss"] for m in metrics])),
    }


def _tuned_metric(comparison: Comparison, task: str) -> str:
    """Return the metric of a task of which no learning rate has been chosen; empty if no run has finished."""
    grid = comparison.grid
    cells = (
        Cell(task, who.label, lr, seed)
        for who in grid.contenders
        for lr in who.first_lrs(task)
        for seed in grid.tune_seeds
    )
    return next((r["selection_metric"] for cell in cells if (r := comparison.result(cell)) is not None), "")


def _check_alike(where: str, scored: dict[str, tuple[str, tuple[str, ...]]]) -> None:
    """Check that runs were scored by the same metric on the same splits.

    Args:
        where: what the runs belong to, for the message.
        scored: metric and names of the splits of each run or method.

    Raises:
        ConfigError: they differ.
    """
    first, expected = next(iter(scored.items()), ("", ("", ())))
    for name, own in scored.items():
        if own != expected:
            got, other = (f"by {metric} on {', '.join(splits) or 'validation'}" for metric, splits in (own, expected))
            raise ConfigError(
                where, f"{name} was scored {got}, {first} {other}", fix="Compare in another folder with -o"
            )  # fmt: skip


def _spread(values: list[float]) -> dict[str, Any]:
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": deviation, "values": values}


def _sample(comparison: Comparison, task: str, label: str, method: dict[str, Any], split: str) -> Sample:
    values = tuple(method["reported"][split]["values"])
    kind = "probabilities" if METRICS[method["metric"]].takes_probabilities else "predictions"
    predictions, references = [], []
    for seed in method["seeds"]:
        path = Cell(task, label, method["lr"], seed).folder(comparison.root) / "predictions.safetensors"
        arrays = load_file(path) if path.is_file() else {}
        kind = "scores" if f"{split}.scores" in arrays else kind
        if not {f"{split}.references", f"{split}.{kind}"} <= arrays.keys():
            return Sample(values=values)
        references.append(arrays[f"{split}.references"])
        predictions.append(arrays[f"{split}.{kind}"])
    return Sample(values=values, predictions=tuple(predictions), references=tuple(references), kind=kind)


def _metric_of(metric: Metric, kind: str) -> Callable[[Any, Any], float]:
    """Return the function of (:attr:`Sample.predictions`, :attr:`Sample.references`) that computes a metric."""
    if kind == "scores":
        return lambda scores, _: metric.of_rows(scores)
    return metric.fast or metric.compute


def _histories(comparison: Comparison, task: str, label: str, method: dict[str, Any]) -> list[list[dict[str, Any]]]:
    cells = [Cell(task, label, method["lr"], seed) for seed in method["seeds"]]
    return [RunDirectory(cell.folder(comparison.root)).events() for cell in cells]


def _environment(comparison: Comparison) -> dict[str, Any]:
    for path in filter(Path.is_file, sorted(comparison.root.glob("cells/**/environment.json"))):  # a pipe would block
        found = read_json(path)
        kept = {key: found.get(key) for key in ("mirrortune", "python", "platform", "device", "mixed_precision")}
        return {**kept, "torch": found.get("packages", {}).get("torch"), "packages": found.get("packages")}
    return {}
