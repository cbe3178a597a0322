# SPDX-License-Identifier: Apache-2.0
"""What is printed where: results on stdout, the rest on stderr; lines in a log, a live bar on a terminal."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from mirrortune.report import Bar, Reporter, TrainingProgress, describe_metrics, kilobytes

TRAIN = {"event": "train", "step": 10, "epoch": 0.5, "loss": 0.25, "lr": 3e-3, "head_lr": 0.0, "grad_norm": 1.5}
SCORE = {"event": "evaluate", "split": "validation", "step": 20, "epoch": 1.0, "accuracy": 0.75, "loss": 0.5}


def terminal() -> tuple[Console, io.StringIO]:
    """A console that believes to be a terminal, and what is written to it."""
    written = io.StringIO()
    return Console(file=written, force_terminal=True, width=120, highlight=False), written


def show(progress: TrainingProgress) -> None:
    """A training loop of 20 steps, as it is reported."""
    with progress:
        progress.on_start(20, 0)
        for step in range(1, 21):
            progress.on_step(step, 8)
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
        "step 10/20  epoch 0.50  loss 0.2500  lr 3.00e-03  head_lr 0.0000  grad_norm 1.5000",
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
