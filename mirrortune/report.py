# SPDX-License-Identifier: Apache-2.0
"""The only module that prints. Results go to stdout, progress and notes to stderr; plain lines off a
terminal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, redirect_stdout
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

# Levels of verbosity: -q, neither, -v.
_QUIET, _NORMAL, _VERBOSE = -1, 0, 1


def chatter_to_stderr() -> AbstractContextManager[Any]:
    """While it is open, what libraries print goes to stderr: standard output belongs to the command's result."""
    return redirect_stdout(sys.stderr)


class Reporter:
    """Says what happens.

    Args:
        verbosity: -1 results only, 0 normal, 1 everything.
        as_json: results as one JSON object on stdout.
        is_main: whether this process speaks at all (one rank does).
    """

    def __init__(self, *, verbosity: int = 0, as_json: bool = False, is_main: bool = True) -> None:
        self.verbosity, self.as_json, self.is_main = verbosity, as_json, is_main
        self._out = Console(highlight=False, soft_wrap=True, emoji=False)
        self._err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)

    def result(self, data: dict[str, Any], lines: Sequence[str]) -> None:
        """The command's result: ``data`` with --json, ``lines`` otherwise."""
        if not self.is_main:
            return
        if self.as_json:
            sys.stdout.write(json.dumps(data) + "\n")
            sys.stdout.flush()
        else:
            self._out.print("\n".join(lines), markup=False)

    def note(self, text: str, *, level: int = _NORMAL) -> None:
        """A line on stderr, if ``level`` is at most the verbosity."""
        if self.is_main and level <= self.verbosity:
            self._err.print(text, markup=False)

    def detail(self, text: str) -> None:
        """A line for ``-v``."""
        self.note(text, level=_VERBOSE)

    def error(self, text: str) -> None:
        """An error on stderr, by every rank that has one."""
        self._err.print(Text("error: ", style="bold red") + Text(text))

    def bar(self, label: str, total: int) -> Bar:
        """A progress bar over ``total`` units; off a terminal a single line at the end."""
        return Bar(self._err, label, total, is_shown=self.is_main and self.verbosity > _QUIET)

    def training(self) -> TrainingProgress:
        """The display of a training loop."""
        return TrainingProgress(self._err, is_shown=self.is_main and self.verbosity > _QUIET)


class Bar:
    """Progress over a known number of units; a context manager."""

    def __init__(self, console: Console, label: str, total: int, *, is_shown: bool) -> None:
        self._console, self._label, self._total, self._done = console, label, total, 0
        self._is_shown, self._live = is_shown, is_shown and console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=console, disable=not self._live, transient=True,
        )  # fmt: skip
        self._task = self._progress.add_task(label, total=total)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._progress.stop()

    def advance(self, unit: str = "") -> None:
        """One unit more is done."""
        self.advance_by(1)

    def advance_by(self, count: int) -> None:
        """``count`` units more are done; off a terminal the last one is worth a line."""
        self._done += count
        self._progress.advance(self._task, count)
        if self._is_shown and not self._live and self._done == self._total:
            self._console.print(f"{self._label}: {self._total} done", markup=False)


class _SpeedColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.fields.get('speed', 0.0):.0f} rows/s")


class TrainingProgress:
    """Shows a training loop: a live bar on a terminal, one line per event of the log elsewhere."""

    def __init__(self, console: Console, *, is_shown: bool) -> None:
        self._console, self._is_shown = console, is_shown
        self._live = is_shown and console.is_terminal
        self._progress = Progress(
            TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[metric]}"), _SpeedColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(),
            console=console, disable=not self._live,
        )  # fmt: skip
        self._task: TaskID | None = None
        self._rows = self._total = 0

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._progress.stop()

    def on_start(self, total_steps: int, done_steps: int) -> None:
        """See :class:`mirrortune.loop.Progress`."""
        self._total = total_steps
        self._task = self._progress.add_task(
            "train", total=total_steps, completed=done_steps, loss="-", metric="", speed=0.0
        )
        self._progress.start()

    def on_step(self, step: int, rows: int) -> None:
        """See :class:`mirrortune.loop.Progress`."""
        self._rows += rows
        if self._live and self._task is not None:
            elapsed = self._progress.tasks[0].elapsed or 1e-9
            self._progress.update(self._task, completed=step, speed=self._rows / elapsed)

    def on_log(self, event: dict[str, Any]) -> None:
        """See :class:`mirrortune.loop.Progress`."""
        is_evaluation = event["event"] == "evaluate"
        numbers = {k: v for k, v in event.items() if k not in ("event", "split", "step", "epoch")}
        text = "  ".join(f"{k} {_format(v)}" for k, v in numbers.items())
        line = f"step {event['step']}/{self._total}  epoch {event['epoch']:.2f}  "
        if is_evaluation:
            shown = next((f"{k} {v:.4f}" for k, v in numbers.items() if k != "loss"), "")
            if self._task is not None:
                self._progress.update(self._task, metric=shown)
            if self._is_shown:
                self._progress.console.print(f"{line}validation: {text}", markup=False)
        elif self._live and self._task is not None:
            self._progress.update(self._task, loss=f"{event['loss']:.4f}")
        elif self._is_shown:
            self._console.print(line + text, markup=False)

    def on_evaluate(self, rows: int) -> None:
        """See :class:`mirrortune.loop.Progress`; evaluations are short beside epochs, so nothing moves."""


def describe_metrics(metrics: dict[str, float]) -> str:
    """Metrics in one line, the loss last."""
    ordered = [k for k in metrics if k != "loss"] + [k for k in metrics if k == "loss"]
    return "  ".join(f"{k} {metrics[k]:.4f}" for k in ordered)


def kilobytes(num_bytes: int) -> str:
    """A size in kB (1000 bytes), one digit after the point."""
    return f"{num_bytes / 1000:,.1f} kB"


def _format(value: float) -> str:
    return f"{value:.4f}" if abs(value) >= 1e-2 or value == 0 else f"{value:.2e}"
