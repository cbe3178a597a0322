# SPDX-License-Identifier: Apache-2.0
"""Build the page of a run, or of several runs side by side, from their directories alone.

A page can therefore be rebuilt at any time.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np

from mirrortune import __version__
from mirrortune.reports import html
from mirrortune.reports.finished_run import FinishedRun
from mirrortune.reports.html import Html
from mirrortune.reports.run_figures import run_drawings
from mirrortune.reports.tables import Table

_MOST_CLASSES = 200
"""Most classes shown in a table; those with the fewest rows are left out."""
_MOST_EVALUATIONS = 12
"""Most evaluations shown in a table of samples."""


def run_page(runs: Sequence[FinishedRun]) -> str:
    """Build the page of one run, or of several side by side."""
    _tell_apart(runs)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    parts = _one(runs[0]) if len(runs) == 1 else _several(runs)
    return html.page(title, f"mirrortune {__version__}", *parts)


def _tell_apart(runs: Sequence[FinishedRun]) -> None:
    """Name runs whose directories have the same name by as many folders above as it takes."""
    places = [run.directory.path.resolve().parts for run in runs]
    deepest = max(map(len, places))
    depth = next(d for d in range(1, deepest + 1) if d == deepest or len({p[-d:] for p in places}) == len(runs))
    if depth > 1:
        for run, parts in zip(runs, places, strict=True):
            run.name = "/".join(parts[-depth:])


def _one(run: FinishedRun) -> list[Html]:
    summary = run.summary()
    before = f"Before training: {summary['before training']}. " if "before training" in summary else ""
    parts = [html.box([f"{before}Validation: {summary['validation']}."])]
    parts.append(_table(("result", ""), list(summary.items())))
    if run.results.get("sources"):
        parts += [html.heading("Data sets"), _source_table(run.results["sources"])]
    parts += [html.heading("Training"), *map(html.figure, run_drawings([run]))]
    if run.validation.get("per_class"):
        parts += [html.heading("Each class"), _class_table(run.validation["per_class"])]
    if run.validation.get("hardest"):
        head = ("row", "loss", "true", "predicted", "text")
        rows = [
            (f"{e['row']}", f"{e['loss']:.3g}", e["reference"], e["prediction"], e["text"])
            for e in run.validation["hardest"]
        ]
        parts += [
            html.heading("The hardest validation rows"),
            _table(head, rows, "By the loss of the kept checkpoint. Look here for wrong labels."),
        ]
    if run.samples:
        parts += [html.heading("What it writes"), *_samples(run)]
    if run.merge:
        parts += [html.heading("Merged"), _merge_table(run.merge)]
    origins = run.environment.get("origins", {})
    settings = [(k, v, origins.get(k, "default")) for k, v in run.settings.items() if v is not None and v != {}]
    about = {k: v for k, v in run.environment.items() if k not in ("origins", "argv")}
    argv = ["mirrortune", *run.environment.get("argv", [])[1:]]
    return [
        *parts,
        html.heading("Settings"),
        _table(("setting", "value", "from"), settings),
        html.heading("Made with"),
        _table(("", ""), _flat(about)),
        html.command(shlex.join(argv)),
    ]


def _several(runs: Sequence[FinishedRun]) -> list[Html]:
    names = [run.name for run in runs]
    summaries = [run.summary() for run in runs]
    keys = list(dict.fromkeys(key for summary in summaries for key in summary))
    settings = {key: [run.settings.get(key) for run in runs] for run in runs for key in run.settings}
    differing = {k: v for k, v in settings.items() if k != "output_dir" and any(x != v[0] for x in v)}
    return [
        html.heading("Results"),
        _table(("", *names), [(key, *[s.get(key, "-") for s in summaries]) for key in keys]),
        html.heading("Settings that differ"),
        _table(("", *names), [(k, *v) for k, v in differing.items()]),
        html.heading("Training"),
        *map(html.figure, run_drawings(runs)),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> Html:
    return Table(head, rows, caption, is_text=True).html()


def _source_table(sources: Sequence[dict[str, Any]]) -> Html:
    """Build the table of the data sets that were learned from."""
    if any("share" in source for source in sources):
        rows = [(s["path"], f"{s['weight']:g}", f"{s['share']:.1%}") for s in sources]
        return _table(("data set", "weight", "of the rows"), rows, "Streamed together.")
    keys = ("rows", "used", "rows_per_epoch", "repeated")
    lines = [(s["path"], f"{s['weight']:g}", *(f"{s[key]:,}" for key in keys)) for s in sources]
    head = ("data set", "weight", "training rows", "used", "an epoch", "repeated")
    return _table(head, lines, "Repeated rows are also in a data set before.")


def _class_table(scores: Sequence[dict[str, Any]]) -> Html:
    """Build the table of scores per class, the most frequent classes first."""
    ordered = sorted(scores, key=lambda s: -s["count"])[:_MOST_CLASSES]
    rows = [
        (s["class"], *(f"{s[key]:.3f}" for key in ("precision", "recall", "f1")), f"{s['count']:,}") for s in ordered
    ]
    caption = "The kept checkpoint on the validation rows."
    if len(scores) > len(ordered):
        caption += f" The {len(ordered)} most frequent of {len(scores):,}."
    return _table(("class", "precision", "recall", "F1", "true"), rows, caption)


def _samples(run: FinishedRun) -> list[Html]:
    """Build a table for each prompt in ``samples.jsonl``: the reference, then the model's answer at each evaluation."""
    steps = sorted({entry["step"] for entry in run.samples})
    shown = {steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, _MOST_EVALUATIONS).astype(int))}
    tables: list[Html] = []
    for row in sorted({entry["row"] for entry in run.samples}):
        own = [entry for entry in run.samples if entry["row"] == row]
        lines = [("given", own[-1]["prompt"]), ("expected", own[-1]["expected"])]
        for entry in (e for e in own if e["step"] in shown):
            cut = "" if entry["finished"] else " ..."
            lines.append((f"step {entry['step']:,}" if entry["step"] else "before training", entry["answer"] + cut))
        caption = 'The likeliest token each time; "..." where the answer was cut.' if not tables else ""
        tables.append(_table((f"validation row {row}", "text"), lines, caption))
    return tables


def _merge_table(merge: dict[str, Any]) -> Html:
    found, outputs = merge["verification"], "not compared"
    if found["max_abs_logit_error"] is not None:
        outputs = f"{found['max_abs_logit_error']:.2e} (allowed {found['tolerance']:.2e})"
    if (error := found.get("max_abs_logit_error_unrounded")) is not None:
        outputs = f"{error:.2e} before rounding to 16 bits (allowed {found['tolerance_unrounded']:.2e}), "
        outputs += f"{found['max_abs_logit_error']:.2e} after it"
    rows = [
        ("folder", merge["output_dir"]),
        ("verified", "yes" if found["passed"] else "no"),
        ("largest difference of an output", outputs),
        ("largest relative difference of a weight",
         f"{found['max_rel_weight_error']:.2e} (allowed {found['weight_tolerance']:.2e})"),
        ("other tensors changed", found["changed_tensors"]),
    ]  # fmt: skip
    return _table(("", ""), rows)


def _flat(data: dict[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for key, value in data.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        elif value is not None:
            rows.append((f"{prefix}{key}", value))
    return rows
