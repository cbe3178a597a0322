# SPDX-License-Identifier: Apache-2.0
"""Runs the command line as a user does, in this process (fast) or in one of its own, and writes files to run it on."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from mirrortune.cli.app import app

REPOSITORY = Path(__file__).parents[2]
# Wide, so that no box of a usage error breaks a name; no colour, as in a log.
_TERMINAL = {"COLUMNS": "400", "TERMINAL_WIDTH": "400"}


@dataclass(frozen=True)
class Outcome:
    """What a command did: its exit code and what it wrote."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def said(self) -> str:
        """Standard error in one line, without the box that usage errors are drawn in."""
        return re.sub(r"[\s╭╮╰╯─│]+", " ", self.stderr)

    @property
    def is_plain(self) -> bool:
        """Whether it can be read in a log: no colours, no progress bars (of other people's either), no warnings."""
        return not re.search(r"\x1b|\r|%\||Warning", self.stdout + self.stderr)

    @property
    def data(self) -> dict[str, Any]:
        """The result of a command that was given --json: it succeeded and wrote one JSON object, on one line."""
        assert self.exit_code == 0, self.stderr
        assert self.stdout.count("\n") == 1, self.stdout
        found = json.loads(self.stdout)
        assert isinstance(found, dict)
        return found


def mirrortune(*words: object, cache: Path | None = None, stdin: str | bytes | None = None) -> Outcome:
    """Run a command in this process. What is no error of ours is raised, so a bug fails its test with a traceback.

    Args:
        words: the command line after ``mirrortune``.
        cache: our cache, for runs that are made outside a test.
        stdin: what is piped into it.
    """
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # a command is a process of its own, as far as it knows
    env = {**_TERMINAL, **({"MIRRORTUNE_CACHE": str(cache)} if cache else {})}
    result = CliRunner().invoke(app, [str(word) for word in words], input=stdin, env=env, catch_exceptions=False)
    return Outcome(result.exit_code, result.stdout, result.stderr)


def changed(words: Sequence[object], *own: object) -> list[object]:
    """A command line with more words, where a flag takes the place of the same one and its value in ``words``."""
    flags = [word for word in own if str(word).startswith("-")]
    kept = [w for before, w in zip(("", *words), words, strict=False) if w not in flags and before not in flags]
    return [*kept, *own]


def start(
    *words: object, env: dict[str, str] | None = None, launcher: Sequence[str] = ("-m",)
) -> subprocess.Popen[str]:
    """Start a command in a process of its own, with pipes for its output.

    Args:
        words: the command line after ``mirrortune``.
        env: the environment; this process's by default.
        launcher: what stands between ``python`` and ``mirrortune``.
    """
    command = [sys.executable, *launcher, "mirrortune", *map(str, words)]
    env = {**(os.environ if env is None else env), **_TERMINAL, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, text=True)


def finish(process: subprocess.Popen[str], timeout: float = 600) -> Outcome:
    """Wait for a command that was started."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return Outcome(process.returncode, stdout, stderr)


def reviews(rows: int, seed: int = 0) -> list[tuple[str, str]]:
    """Sentences about films in the tiny models' words, each ``positive`` or ``negative`` by its verdict."""
    draw = random.Random(seed)
    verdicts = {"positive": ("good", "great"), "negative": ("bad", "awful")}
    found = []
    for _ in range(rows):
        label = draw.choice(sorted(verdicts))
        degree = draw.choice(("", "very ", "really "))
        subject = f"{draw.choice(('the', 'a'))} {draw.choice(('movie', 'film', 'plot', 'story'))}"
        found.append((f"{subject} {draw.choice(('was', 'is'))} {degree}{draw.choice(verdicts[label])}", label))
    return found


def write_table(path: Path, rows: Sequence[Sequence[object]], header: Sequence[str] = ("text", "label")) -> Path:
    """Write a .csv or .tsv file; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerow(header)
        writer.writerows(rows)
    return path


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write a file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
