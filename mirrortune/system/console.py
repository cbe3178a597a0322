# SPDX-License-Identifier: Apache-2.0
"""Print results to stdout, and progress and notes to stderr. No other module prints."""

from __future__ import annotations

import datetime
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout, suppress
from types import TracebackType
from typing import IO, Any, TextIO, cast

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from mirrortune.errors import DataError, ResourceError, on_one_line
from mirrortune.system.signals import describe_stop

_PROMPT = "> "
# Verbosity with -q, by default, and with -v.
_QUIET, _NORMAL, _VERBOSE = -1, 0, 1


# Control characters except line feed and tab; bidirectional marks; surrogates, which stand for bytes of a path that are
# not UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Escape control characters as ``\x1b``: names of files, columns and classes are untrusted."""
    return _UNPRINTABLE.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte that Python could not decode (surrogateescape)
        return f"\\x{code & 0xFF:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def keep_standard_files() -> None:
    """Open the null device in place of closed standard files, and let standard error fail without an exception.

    The next opened file would get the number of a closed one, and libraries would write their warnings into a
    checkpoint.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    if sys.stderr is not None:
        lossy: Any = _Lossy(sys.stderr)
        sys.stderr = cast(TextIO, lossy)


class _Lossy:
    """A text file in which what cannot be written is lost.

    A full disk of its log, a terminal that is gone or a ``tee`` that has ended must not end a run of days, whose log is
    in its folder. Every write is tried, because there may be space again.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self.is_losing = False  # some of the last text was not written

    def write(self, text: str) -> int:
        """Write a text, or lose it."""
        self.is_losing = False
        try:
            return self._file.write(text)
        except OSError:
            self.is_losing = True
            return len(text)

    def flush(self) -> None:
        """Flush the file, if it can be written."""
        try:
            self._file.flush()
        except OSError:
            self.is_losing = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _drop_unwritten(file: Any) -> None:
    """Redirect a file that cannot be written to the null device: Python would try, and fail, again at exit."""
    with suppress(OSError, ValueError), open(os.devnull, "w", encoding="utf-8") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), file.fileno())


def _console(*, stderr: bool = False) -> Console:
    console = Console(stderr=stderr, highlight=False, soft_wrap=True, emoji=False)
    if console.width < 1:  # with COLUMNS=0 nothing would be shown
        console.width = 80
    return console


def _say(console: Console, text: str) -> None:
    """Print lines with control characters escaped."""
    console.print(printable(text), markup=False)


def chatter_to_stderr() -> AbstractContextManager[Any]:
    """Redirect stdout to stderr while libraries run: stdout is reserved for the result of the command."""
    return redirect_stdout(sys.stderr)


@contextmanager
def _written_out() -> Iterator[None]:
    """Flush standard output when the block ends.

    Raises:
        ResourceError: it is closed, or cannot be written.
    """
    if sys.stdout is None:  # closed before Python started
        raise ResourceError("standard output", "it is closed, so the result cannot be written", fix="Leave it open")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop_unwritten(sys.stdout)
        problem = f"the result cannot be written ({error.strerror})"
        fix = "Free space on its disk, or send it elsewhere"
        raise ResourceError("standard output", problem, fix=fix) from error


def end_if_unwritten() -> None:
    """End the command with an error if standard output does not take what was printed, such as the help of a command.

    Results of commands have this error from their :class:`Reporter`. Only another write shows whether one has failed.
    """
    if sys.stdout is None:
        return
    try:
        with _written_out():
            sys.stdout.write("\n")
    except ResourceError as error:
        Reporter().error(str(error))
        raise SystemExit(error.exit_code) from None


class Reporter:
    """Prints the results, notes and progress of a command.

    Args:
        verbosity: -1 for results only, 0 for notes as well, 1 for details as well.
        as_json: print the result as one JSON object.
        is_main: print at all; only one rank does.
    """

    def __init__(self, *, verbosity: int = 0, as_json: bool = False, is_main: bool = True) -> None:
        self.verbosity, self.as_json, self.is_main = verbosity, as_json, is_main
        self._out, self._err = _console(), _console(stderr=True)

    def result(self, data: dict[str, Any], lines: Sequence[str]) -> None:
        """Print the result of the command: ``data`` with ``--json``, else ``lines``, whose line breaks are escaped."""
        if not self.is_main:
            return
        with _written_out():
            if self.as_json:
                sys.stdout.write(json.dumps(data) + "\n")
            else:
                _say(self._out, "\n".join(line.replace("\n", r"\n") for line in lines))

    def data(self, content: bytes) -> None:
        """Write UTF-8 text to stdout unchanged; control characters are escaped on a terminal only."""
        with _written_out():
            if sys.stdout.isatty():
                content = printable(content.decode()).encode()
            sys.stdout.buffer.write(content)

    def note(self, text: str, *, level: int = _NORMAL, has_lines: bool = False) -> None:
        """Print a line to stderr if ``level`` is at most the verbosity.

        Line breaks are escaped and overlong text is cut, unless ``has_lines`` says that the text is shown as it is.
        """
        if self.is_main and level <= self.verbosity:
            _say(self._err, text if has_lines else on_one_line(text))

    def detail(self, text: str) -> None:
        """Print a line with ``-v``."""
        self.note(text, level=_VERBOSE)

    def error(self, text: str) -> None:
        """Print an error to stderr, on every rank; if that cannot be written, to stdout, if it is a terminal."""
        message = Text("error: ", style="bold red") + Text(printable(text))
        self._err.print(message)
        if getattr(sys.stderr, "is_losing", False) and sys.stdout is not None and sys.stdout.isatty():
            with suppress(OSError):
                self._out.print(message)

    def piece(self, text: str) -> None:
        """Print part of a result immediately, with control characters escaped and no newline added."""
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        with _written_out():
            sys.stdout.write(printable(text).encode(encoding, "backslashreplace").decode(encoding))

    def bar(self, label: str, total: int | None, *, done: int = 0, unit: str | None = None) -> Bar:
        """Return a progress bar over ``total`` units; without a terminal it prints one line at the end.

        Args:
            label: description of the work.
            total: number of units, or None if unknown.
            done: units already done.
            unit: name of a unit; if given, units per second are shown.
        """
        return Bar(self._err, label, total, done=done, unit=unit, is_shown=self.is_main and self.verbosity > _QUIET)

    def training(self, unit: str = "rows") -> TrainingProgress:
        """Return the progress display of a training loop; ``unit`` is the word it uses for rows."""
        return TrainingProgress(self._err, is_shown=self.is_main and self.verbosity > _QUIET, unit=unit)


def announce(text: str) -> None:
    """Print a line to stderr on the first process, even with ``-q``."""
    Reporter(is_main=os.environ.get("RANK", "0") == "0").note(text, level=_QUIET)


class Bar:
    """A progress bar over a number of units, used as a context manager."""

    def __init__(
        self, console: Console, label: str, total: int | None, *, is_shown: bool, done: int = 0,
        unit: str | None = None,
    ) -> None:  # fmt: skip
        self._console, self._label, self._total, self._done = console, printable(label), total, done
        self._is_shown, self._live = is_shown, is_shown and console.is_terminal
        self._unit, self._before, self._start = unit, done, time.perf_counter()
        speed = [TextColumn("{task.fields[speed]}")] if unit else []
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *speed, TimeRemainingColumn(),
            console=console, disable=not self._live, transient=True,
        )  # fmt: skip
        self._task = self._progress.add_task(escape(self._label), total=total, completed=done, speed="")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._progress.stop()
        if self._total is None and error is None:
            self._say_done()

    def advance(self, unit: str = "") -> None:
        """Advance by one unit."""
        self.advance_by(1)

    def advance_by(self, count: int) -> None:
        """Advance by ``count`` units; without a terminal the last one prints a line."""
        self._done += count
        self._progress.update(self._task, advance=count, speed=self._speed())
        if count and self._done == self._total:
            self._say_done()

    def advance_to(self, done: int) -> None:
        """Set the number of units done to ``done``."""
        self.advance_by(done - self._done)

    def _say_done(self) -> None:
        if self._is_shown and not self._live:
            speed = f", {self._speed()}" if self._unit else ""
            _say(self._console, f"{self._label}: {self._done} done{speed}")

    def _speed(self) -> str:
        if self._unit is None:
            return ""
        seconds = time.perf_counter() - self._start
        return f"{significant((self._done - self._before) / max(seconds, 1e-9))} {self._unit}/s"


class TrainingProgress:
    """The progress display of a training loop; implements ``training.settings.Progress``.

    On a terminal it is a live bar. Elsewhere it prints a line for each logged event, and for some steps in between if
    steps are slow.
    """

    def __init__(self, console: Console, *, is_shown: bool, unit: str = "rows") -> None:
        self._console, self._is_shown, self._unit = console, is_shown, unit
        self._live = is_shown and console.is_terminal
        self._progress = Progress(
            TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[metric]}"), TextColumn("{task.fields[speed]}"), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(),
            console=console, disable=not self._live,
        )  # fmt: skip
        self._task: TaskID | None = None
        self._rows = self._steps = self._total = 0
        self._tokens: int | None = None
        self._seconds = self._mark = 0.0

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._progress.stop()

    def on_start(self, total_steps: int, done_steps: int) -> None:
        """Start the bar."""
        self._total = total_steps
        self._task = self._progress.add_task(
            "train", total=total_steps, completed=done_steps, loss="-", metric="", speed=""
        )
        self._progress.start()
        self._mark = time.perf_counter()

    def on_step(self, step: int, rows: int, tokens: int | None) -> None:
        """Advance by one step and update the speed."""
        now = time.perf_counter()
        self._seconds, self._mark = self._seconds + now - self._mark, now
        self._steps, self._rows = self._steps + 1, self._rows + rows
        self._tokens = None if tokens is None else (self._tokens or 0) + tokens
        if self._live and self._task is not None:
            self._progress.update(self._task, completed=step, speed=self._speed())

    def on_show(self, step: int, epoch: float, loss: float) -> None:
        """Show a step that is not logged."""
        if self._live and self._task is not None:
            self._progress.update(self._task, loss=_format(loss))
        elif self._is_shown:
            line = f"step {step}/{self._total}  epoch {epoch:.2f}  loss {_format(loss)}"
            self._console.print(f"{line}  {self._pace(step)}", markup=False)

    def on_log(self, event: dict[str, Any]) -> None:
        """Show a logged event."""
        is_evaluation = event["event"] == "evaluate"
        numbers = {k: v for k, v in event.items() if k not in ("event", "split", "step", "epoch")}
        text = "  ".join(f"{k} {_format(v)}" for k, v in numbers.items())
        line = f"step {event['step']}/{self._total}  epoch {event['epoch']:.2f}  "
        if is_evaluation:
            line = line if event["step"] else "before training  "
            shown = next((f"{k} {v:.4f}" for k, v in numbers.items() if k != "loss"), "")
            if self._task is not None:
                self._progress.update(self._task, metric=shown)
            if self._is_shown:
                _say(self._console, f"{line}validation: {text}")
        elif self._live and self._task is not None:
            self._progress.update(self._task, loss=f"{event['loss']:.4f}")
        elif self._is_shown:
            _say(self._console, f"{line}{text}  {self._pace(event['step'])}")
        self._mark = time.perf_counter()  # excludes the time spent on evaluation and logging

    def on_evaluate(self, rows: int) -> None:
        """Show nothing: evaluations are short compared to epochs."""

    def on_signal(self, number: int) -> None:
        """Announce that the run will stop."""
        if self._is_shown:
            with suppress(OSError):  # the terminal may have been closed
                self._progress.console.print(describe_stop(number), markup=False)

    def _speed(self) -> str:
        """Format rows per second since the loop began and, for text, tokens per second."""
        seconds = self._seconds or 1e-9
        tokens = "" if self._tokens is None else f"  {significant(self._tokens / seconds)} tokens/s"
        return f"{significant(self._rows / seconds)} {self._unit}/s{tokens}"

    def _pace(self, step: int) -> str:
        """Format the speed and the remaining time."""
        if not self._steps or step >= self._total:
            return self._speed()
        left = round((self._total - step) * self._seconds / self._steps)
        return f"{self._speed()}  {datetime.timedelta(seconds=left)} left"


def is_interactive() -> bool:
    """Return whether standard input is a terminal."""
    return sys.stdin is not None and sys.stdin.isatty()


def typed_lines() -> Iterator[str]:
    """Yield lines typed at a prompt until Ctrl-D or Ctrl-C, with readline's editing if Python has it."""
    with suppress(ImportError):
        import readline  # noqa: F401, PLC0415  (input() uses it once it is imported)
    while True:
        if not sys.stdout.isatty():  # stdout is redirected and must hold the results only
            sys.stderr.write(_PROMPT)
            sys.stderr.flush()
        try:
            line = input(_PROMPT if sys.stdout.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            sys.stderr.write("\n")
            return
        except UnicodeDecodeError:
            line = "\udcff"
        yield line


def piped_lines() -> Iterator[str]:
    """Yield the lines of standard input as they arrive.

    Raises:
        DataError: a line is not UTF-8.
    """
    for number, line in enumerate(sys.stdin.buffer if sys.stdin is not None else (), 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            problem = f"line {number} is not UTF-8 ({error.reason} at byte {error.start + 1})"
            raise DataError("standard input", problem, fix="Convert it: iconv -f latin1 -t utf-8") from error


def digits(value: float) -> float:
    """Round a measured value to four significant digits for storage."""
    return float(f"{value:.4g}")


def significant(value: float) -> str:
    """Format a number with three significant digits, but never round its integer part: 1,234; 12.3; 0.0123."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def describe_metrics(metrics: dict[str, float]) -> str:
    """Format metrics on one line, the loss last."""
    ordered = [k for k in metrics if k != "loss"] + [k for k in metrics if k == "loss"]
    return "  ".join(f"{k} {metrics[k]:.4f}" for k in ordered)


def kilobytes(num_bytes: int) -> str:
    """Format a size in kB (1000 bytes) with one decimal."""
    return f"{num_bytes / 1000:,.1f} kB"


def _format(value: float) -> str:
    if isinstance(value, int):  # a count
        return f"{value:,}"
    return f"{value:.4f}" if abs(value) >= 1e-2 or value == 0 else f"{value:.2e}"
