# SPDX-License-Identifier: Apache-2.0
"""A run's own page, and several runs on one; read from their directories alone, so that it can be made again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mirrortune import __version__
from mirrortune.config.recipe import flatten, read_saved_recipe
from mirrortune.errors import ConfigError
from mirrortune.reports import html
from mirrortune.reports.drawing import svg_for_page, write_figure
from mirrortune.reports.html import Html
from mirrortune.reports.run_figures import History, learning_curves, run_drawings
from mirrortune.system.console import describe_metrics, kilobytes, significant
from mirrortune.system.run_directory import RunDirectory
from mirrortune.system.run_status import describe_status


def write_run_page(run: RunDirectory) -> Path:
    """``report.html`` in the directory of a finished run."""
    path = run.path / "report.html"
    html.write_page(path, run_page([run]))
    return path


def write_curves(run: RunDirectory) -> None:
    """``curves.png`` in the directory of a finished run."""
    write_figure(learning_curves([_Run(run).history]), run.path / "curves.png")


def run_page(runs: Sequence[RunDirectory]) -> str:
    """The page of one run, or of several side by side.

    Raises:
        ConfigError: a folder that is no finished run.
    """
    found = [_Run(run) for run in runs]
    title = found[0].name if len(found) == 1 else f"{len(found)} runs"
    parts = _one(found[0]) if len(found) == 1 else _several(found)
    return html.page(title, f"mirrortune {__version__}", *parts)


class _Run:
    """A run directory, read."""

    def __init__(self, run: RunDirectory) -> None:
        self.run, self.name = run, run.path.name
        if not run.recipe.is_file() or not run.results.is_file():
            problem = "this run has not finished" if run.recipe.is_file() else "it is no run directory"
            if how := describe_status(run):
                problem = f"{problem}: {how}"
            raise ConfigError(str(run.path), problem, fix="Give a folder that train has finished")
        self.results: dict[str, Any] = _json(run.results)
        self.environment: dict[str, Any] = _json(run.path / "environment.json")
        self.validation: dict[str, Any] = _json(run.validation)
        self.merge: dict[str, Any] = _json(run.path / "reports" / "merge.json")
        self.settings = flatten(read_saved_recipe(run.recipe))

    @property
    def history(self) -> History:
        """What is drawn of it."""
        return History(
            name=self.name, metric=self.results["selection_metric"], events=self.run.events(),
            progress=self.run.progress(), validation=self.validation,
        )  # fmt: skip

    def summary(self) -> dict[str, str]:
        """What came out, by name."""
        r = self.results
        per_second = r.get("tokens_per_second")
        tokens = "" if per_second is None else f", {significant(per_second)} tokens per second"
        return {
            "method": str(self.settings["adapter.method"]),
            "validation": describe_metrics(r["metrics"]),
            **({"before training": describe_metrics(r["metrics_before"])} if r.get("metrics_before") else {}),
            **{f"{split} (reported)": describe_metrics(m) for split, m in (r.get("reported") or {}).items()},
            "kept after step": f"{r['best_step']:,}",
            "trained numbers": f"{r['trainable_parameters']:,}"
            + (f", and {r['head_parameters']:,} of the head" if r["head_parameters"] else ""),
            "adapter": kilobytes(r["adapter_bytes"]),
            "training": f"{r['train_seconds']:,.0f} s, {significant(r['samples_per_second'])} rows per second{tokens}",
            "peak memory": f"{r['peak_memory_bytes'] / 2**20:,.0f} MiB",
        }


def _one(run: _Run) -> list[Html]:
    summary = run.summary()
    before = f"Before training: {summary['before training']}. " if "before training" in summary else ""
    parts = [html.box([f"{before}Validation: {summary['validation']}."])]
    parts.append(html.table(("result", ""), list(summary.items()), is_text=True))
    parts += [html.heading("Training"), *_figures([run.history])]
    if run.validation.get("hardest"):
        head = ("row", "loss", "true", "predicted", "text")
        rows = [
            (f"{e['row']}", f"{e['loss']:.3g}", e["reference"], e["prediction"], e["text"])
            for e in run.validation["hardest"]
        ]
        parts += [
            html.heading("The hardest validation rows"),
            html.table(head, rows, caption="By the loss of the kept checkpoint. Look here for wrong labels.",
                        is_text=True),
        ]  # fmt: skip
    if run.validation.get("samples"):
        written = [(f"{e['row']}", e["text"], e["reference"], e["prediction"]) for e in run.validation["samples"]]
        caption = "Rows from all over the validation split; the kept checkpoint writes the likeliest token each time."
        parts += [
            html.heading("What it writes"),
            html.table(("row", "given", "expected", "written"), written, caption=caption, is_text=True),
        ]
    if run.merge:
        parts += [html.heading("Merged"), _merge_table(run.merge)]
    origins = run.environment.get("origins", {})
    settings = [(k, v, origins.get(k, "default")) for k, v in run.settings.items() if v is not None and v != {}]
    about = {k: v for k, v in run.environment.items() if k not in ("origins", "argv")}
    argv = ["mirrortune", *run.environment.get("argv", [])[1:]]
    return [
        *parts,
        html.heading("Settings"),
        html.table(("setting", "value", "from"), settings, is_text=True),
        html.heading("Made with"),
        html.table(("", ""), _flat(about), is_text=True),
        Html(f'<p class="soft"><code>{html.escape(shlex.join(argv))}</code></p>'),
    ]


def _several(runs: Sequence[_Run]) -> list[Html]:
    names = [run.name for run in runs]
    summaries = [run.summary() for run in runs]
    keys = list(dict.fromkeys(key for summary in summaries for key in summary))
    settings = {key: [run.settings.get(key) for run in runs] for run in runs for key in run.settings}
    differing = {k: v for k, v in settings.items() if k != "output_dir" and any(x != v[0] for x in v)}
    return [
        html.heading("Results"),
        html.table(("", *names), [(key, *[s.get(key, "-") for s in summaries]) for key in keys], is_text=True),
        html.heading("Settings that differ"),
        html.table(("", *names), [(k, *v) for k, v in differing.items()], is_text=True),
        html.heading("Training"),
        *_figures([run.history for run in runs]),
    ]


def _figures(histories: Sequence[History]) -> list[Html]:
    return [html.figure(svg_for_page(d), d.caption, width=d.size[0]) for d in run_drawings(histories)]


def _merge_table(merge: dict[str, Any]) -> Html:
    found, outputs = merge["verification"], "not compared"
    if found["max_abs_logit_error"] is not None:
        outputs = f"{found['max_abs_logit_error']:.2e} (allowed {found['tolerance']:.2e})"
    rows = [
        ("folder", merge["output_dir"]),
        ("verified", "yes" if found["passed"] else "no"),
        ("largest difference of an output", outputs),
        ("largest relative difference of a weight",
         f"{found['max_rel_weight_error']:.2e} (allowed {found['weight_tolerance']:.2e})"),
        ("other tensors changed", found["changed_tensors"]),
    ]  # fmt: skip
    return html.table(("", ""), rows, is_text=True)


def _flat(data: dict[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for key, value in data.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        elif value is not None:
            rows.append((f"{prefix}{key}", value))
    return rows


def _json(path: Path) -> dict[str, Any]:
    """The file's object; empty if there is none."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(str(path), f"damaged ({error})", fix="Restore the run directory") from error
    return found if isinstance(found, dict) else {}
