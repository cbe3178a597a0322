# SPDX-License-Identifier: Apache-2.0
"""What is printed where: results on stdout, the rest on stderr; lines in a log, a live bar on a terminal."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mirrortune.errors import ResourceError
from mirrortune.system.console import (
    Bar,
    Reporter,
    TrainingProgress,
    describe_metrics,
    kilobytes,
    printable,
    significant,
)

TRAIN = {"event": "train", "step": 10, "epoch": 0.5, "loss": 0.25, "lr": 3e-3, "head_lr": 0.0, "grad_norm": 1.5}
BEFORE = {"event": "evaluate", "split": "validation", "step": 0, "epoch": 0.0, "accuracy": 0.5, "loss": 0.75}
SCORE = {"event": "evaluate", "split": "validation", "step": 20, "epoch": 1.0, "accuracy": 0.75, "loss": 0.5}


def terminal() -> tuple[Console, io.StringIO]:
    """A console that believes to be a terminal, and what is written to it."""
    written = io.StringIO()
    return Console(file=written, force_terminal=True, width=120, highlight=False), written


@pytest.fixture(autouse=True)
def quarters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by a quarter of a second whenever it is looked at."""
    ticks = itertools.count()
    monkeypatch.setattr("mirrortune.system.console.time.perf_counter", lambda: next(ticks) / 4)


def test_a_name_with_a_line_break_stays_on_its_line_of_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    Reporter().result({}, ["merged into a\nerror: b", "score it"])
    assert capsys.readouterr().out == "merged into a\\nerror: b\nscore it\n"


def show(progress: TrainingProgress, tokens: int | None = 250) -> None:
    """A training loop of 20 steps, as it is reported."""
    with progress:
        progress.on_start(20, 0)
        progress.on_log(BEFORE)
        for step in range(1, 21):
            progress.on_step(step, 8, tokens)
            if step == 1:
                progress.on_show(1, 0.05, 0.7)
            if step == 10:
                progress.on_log(TRAIN)
        progress.on_evaluate(40)
        progress.on_log(SCORE)


def test_results_go_to_stdout_and_notes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter()
    reporter.note("a note [with brackets]")
    reporter.detail("only with -v")
    reporter.result({"a": 1}, ["first [bold]line", "second"])

    assert capsys.readouterr() == ("first [bold]line\nsecond\n", "a note [with brackets]\n")


def test_json_is_one_line_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    Reporter(as_json=True).result({"a": [1, "ü\n"]}, ["words"])

    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {"a": [1, "ü\n"]}


@pytest.mark.parametrize(("verbosity", "lines"), [(-1, []), (0, ["note"]), (1, ["note", "detail"])])
def test_verbosity(capsys: pytest.CaptureFixture[str], verbosity: int, lines: list[str]) -> None:
    reporter = Reporter(verbosity=verbosity)
    reporter.note("note")
    reporter.detail("detail")

    assert capsys.readouterr().err.splitlines() == lines


def test_long_lines_are_not_broken(capsys: pytest.CaptureFixture[str]) -> None:
    Reporter().note("word " * 100)

    assert capsys.readouterr().err.count("\n") == 1


def test_one_rank_speaks_but_every_rank_may_complain(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(is_main=False)
    reporter.note("note")
    reporter.result({}, ["result"])
    with reporter.bar("bar", 1) as bar:
        bar.advance()
    show(reporter.training())
    reporter.error("went [wrong]")

    assert capsys.readouterr() == ("", "error: went [wrong]\n")


def test_a_log_gets_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter().bar("layers", 3) as bar:
        for _ in range(3):
            bar.advance("a layer")
    show(Reporter().training())

    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "layers: 3 done",
        "before training  validation: accuracy 0.5000  loss 0.7500",
        "step 1/20  epoch 0.05  loss 0.7000  32.0 rows/s  1,000 tokens/s  0:00:05 left",
        "step 10/20  epoch 0.50  loss 0.2500  lr 3.00e-03  head_lr 0.0000  grad_norm 1.5000  "
        "32.0 rows/s  1,000 tokens/s  0:00:02 left",
        "step 20/20  epoch 1.00  validation: accuracy 0.7500  loss 0.5000",
    ]


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(verbosity=-1)
    with reporter.bar("layers", 1) as bar:
        bar.advance()
    show(reporter.training())

    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_live_bar_with_loss_speed_and_metric() -> None:
    console, written = terminal()
    show(TrainingProgress(console, is_shown=True))

    last = written.getvalue()
    assert "20/20" in last
    assert "loss 0.2500" in last
    assert "accuracy 0.7500" in last
    assert "rows/s" in last
    assert "validation: accuracy 0.7500" in last
    assert "grad_norm" not in last, "training events are what the bar shows already"


def test_a_terminals_bar_is_gone_when_it_is_done() -> None:
    console, written = terminal()
    with Bar(console, "layers", 2, is_shown=True) as bar:
        bar.advance_by(2)

    assert "layers" in written.getvalue()
    assert "2 done" not in written.getvalue()


def test_colour_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[1;31m" in complain(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "31m" not in complain(monkeypatch)


def complain(monkeypatch: pytest.MonkeyPatch) -> str:
    """What an error looks like on a terminal."""
    written: Any = io.StringIO()
    written.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", written)
    Reporter().error("wrong")
    return str(written.getvalue())


def test_numbers_in_words() -> None:
    assert describe_metrics({"loss": 0.5, "f1": 0.25}) == "f1 0.2500  loss 0.5000"
    assert kilobytes(12_345) == "12.3 kB"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.000123, "0.000123"), (0.0408, "0.0408"), (1.5, "1.50"), (12.34, "12.3"), (1234.5, "1,234"),
     (math.inf, "inf")],
)  # fmt: skip
def test_a_speed_has_as_many_digits_as_it_takes(value: float, text: str) -> None:
    assert significant(value) == text


def test_a_slow_run_on_a_terminal_has_a_speed_too() -> None:
    console, written = terminal()
    progress = TrainingProgress(console, is_shown=True)
    with progress:
        progress.on_start(20, 0)
        for _ in range(400):
            progress._seconds += 0.25  # a hundred seconds more
        progress.on_step(1, 1, None)
    assert "0.00998 rows/s" in written.getvalue()


def test_a_signal_is_answered_on_a_terminal_and_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter().training() as progress:
        progress.on_start(20, 0)
        progress.on_signal(signal.SIGINT)
        progress.on_signal(signal.SIGTERM)
    assert capsys.readouterr().err.splitlines() == [
        "SIGINT: stopping after this step, with a checkpoint; press Ctrl-C again to stop now",
        "SIGTERM: stopping after this step, with a checkpoint",
    ]
    console, written = terminal()
    with TrainingProgress(console, is_shown=True) as progress:
        progress.on_start(20, 0)
        progress.on_signal(signal.SIGINT)
    assert "press Ctrl-C again to stop now" in written.getvalue()


@pytest.mark.parametrize("as_json", [False, True])
def test_a_result_that_cannot_be_written_is_said(*, as_json: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:  # noqa: PTH123
        monkeypatch.setattr("sys.stdout", full)
        with pytest.raises(ResourceError, match="standard output: the result cannot be written"):
            Reporter(as_json=as_json).result({"a": 1}, ["a 1"])


# What a command writes to a standard error that fails, and how it ends. Size limits stand for full disks.
PROGRAM = """
import io, resource, signal, sys
from mirrortune.system.console import Reporter, keep_standard_files
keep_standard_files()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
reporter = Reporter()
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
if sys.argv[1] == "full for a while":
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    reporter.note("a lost note\\n" * 9000, has_lines=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
reporter.note("a note")
with reporter.training() as progress:
    progress.on_start(2, 0)
    progress.on_log({"event": "train", "step": 1, "epoch": 0.5, "loss": 1.0})
with reporter.bar("rows", 1) as bar:
    bar.advance()
reporter.error("an error")
sys.exit(3)
"""


@pytest.mark.parametrize("place", ["full", "broken pipe"])
def test_notes_that_cannot_be_written_do_not_end_a_run(place: str) -> None:
    """The disk of a log is full, or the ``tee`` of a run has ended."""
    reading, writing = os.pipe()
    os.close(reading)
    with open("/dev/full" if place == "full" else writing, "w", encoding="utf-8") as file:  # noqa: PTH123
        words = [sys.executable, "-c", PROGRAM, place]
        outcome = subprocess.run(words, stdout=subprocess.PIPE, stderr=file, cwd=Path(__file__).parents[3], check=False)
    assert (outcome.returncode, outcome.stdout) == (3, b"")


def test_notes_are_written_again_once_there_is_space(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as file:
        words = [sys.executable, "-c", PROGRAM, "full for a while"]
        outcome = subprocess.run(words, stderr=file, cwd=Path(__file__).parents[3], check=False)
    assert outcome.returncode == 3
    said = log.read_text(encoding="utf-8")
    assert "\na note\n" in f"\n{said}"
    assert said.endswith("rows: 1 done\nerror: an error\n")


def test_an_error_is_shown_on_the_terminal_if_the_log_is_full() -> None:
    leader, terminal_of_it = os.openpty()
    with open("/dev/full", "w", encoding="utf-8") as full:  # noqa: PTH123
        words = [sys.executable, "-c", PROGRAM, "full"]
        outcome = subprocess.run(words, stdout=terminal_of_it, stderr=full, cwd=Path(__file__).parents[3], check=False)
    os.set_blocking(leader, False)
    assert outcome.returncode == 3
    assert b"an error" in os.read(leader, 4096)
    os.close(terminal_of_it)
    os.close(leader)


@pytest.mark.parametrize("words", [["nothing"], ["train", "--nope"], ["merge"], ["train", "--batch-size"]])
def test_a_usage_error_that_cannot_be_shown_has_its_exit_code(words: list[str]) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:  # noqa: PTH123
        command = [sys.executable, "-m", "mirrortune", *words]
        assert subprocess.run(command, stderr=full, cwd=Path(__file__).parents[3], check=False).returncode == 2


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"], ["recipes", "ls"]])
def test_a_help_that_cannot_be_written_is_said(words: list[str]) -> None:
    command, root = [sys.executable, "-m", "mirrortune", *words], Path(__file__).parents[3]
    with open("/dev/full", "w", encoding="utf-8") as full:  # noqa: PTH123
        outcome = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, cwd=root, check=False)
    assert outcome.returncode == 4
    assert re.fullmatch(rb"error: standard output: the result cannot be written .*\n", outcome.stderr)


def test_a_version_for_nobody_is_no_error() -> None:
    command = ["sh", "-c", 'exec "$0" -m mirrortune --version >&-', sys.executable]
    outcome = subprocess.run(command, stderr=subprocess.PIPE, cwd=Path(__file__).parents[3], check=False)
    assert (outcome.returncode, outcome.stderr) == (0, b"")


def test_files_never_get_the_number_of_a_closed_standard_file(tmp_path: Path) -> None:
    """Libraries write their warnings to file 2, whatever it is."""
    opened = tmp_path / "opened"
    program = (
        "from mirrortune.system.console import keep_standard_files\nkeep_standard_files()\n"
        f"file = open({str(opened)!r}, 'w')\nfile.write(str(file.fileno()))"
    )
    subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, program],
        check=True,
        cwd=Path(__file__).parents[3],
    )
    assert int(opened.read_text(encoding="utf-8")) > 2


def test_a_terminal_without_columns_shows_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "0")
    Reporter().result({}, ["accuracy 0.5"])
    assert capsys.readouterr().out == "accuracy 0.5\n"


HOSTILE = "a\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202etxt\x00\udcff[red]"


def test_what_a_terminal_would_obey_is_shown() -> None:
    assert printable("plain\ttext\nof two lines: é 中 🙂") == "plain\ttext\nof two lines: é 中 🙂"
    assert printable(HOSTILE) == r"a\x1b]0;owned\x07\x1b[2J\x9b31m\x0d\u202etxt\x00\xff[red]"


def test_every_way_of_speaking_shows_it(capfd: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter()
    reporter.note(HOSTILE)
    reporter.error(HOSTILE)
    reporter.result({}, [HOSTILE])
    with reporter.bar(HOSTILE, 1) as bar:
        bar.advance()
    with reporter.training() as training:
        training.on_start(1, 0)
        training.on_log({"event": "evaluate", "step": 1, "epoch": 1.0, HOSTILE: 1.0})
        training.on_log({"event": "train", "step": 1, "epoch": 1.0, HOSTILE: 1.0})
    written = "".join(capfd.readouterr())
    assert written.count(printable(HOSTILE)) == 6
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", written)


def test_a_line_break_in_a_name_starts_no_line_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    Reporter().note("text column 'te\nerror: forged'")
    assert capfd.readouterr().err == "text column 'te\\nerror: forged'\n"
