# SPDX-License-Identifier: Apache-2.0
"""How the command line looks: help at once, flags in either spelling, results on stdout alone, plain lines in a log."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mirrortune import __version__
from tests.cli.console import REPOSITORY, Outcome, changed, finish, mirrortune, start

HEAVY = ("torch", "transformers", "accelerate", "datasets", "huggingface_hub", "numpy", "pyarrow", "scipy", "sklearn")
LOADED = f"""
import json, sys
from mirrortune.cli.app import app
try:
    app(sys.argv[1:])
finally:
    print(json.dumps([name for name in {HEAVY} if name in sys.modules]), file=sys.stderr)
"""

LATER = ("datasets", "pandas", "peft", "matplotlib", "sklearn", "scipy.stats", "bitsandbytes")
"""What a run needs after its first step, or not at all; each is a third of a second or more."""
UNTIL_THE_FIRST_STEP = f"""
import json, sys
from mirrortune.cli.app import app
from mirrortune.training.trainer import Trainer
def first_step(self):
    print(json.dumps([name for name in {LATER} if name in sys.modules]))
    raise SystemExit
Trainer._run_steps = first_step
app(sys.argv[1:])
"""


def train(model: Path, *words: object) -> Outcome:
    """Two steps of training on reviews.csv, into the folder ``run``."""
    own = ["-m", model, "-t", "text-classification", "-d", "reviews.csv", "-o", "run", "--max-steps", 2]
    return mirrortune("train", *changed(own, *words))


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0), (["train", "--help"], 0), (["--version"], 0), (["merge"], 2),
        (["train", "--modle", "x"], 2), (["train", "glue/sst"], 2), (["train", "--lr", "abc"], 2),
    ],
    ids=str,
)  # fmt: skip
def test_what_needs_no_model_loads_none(words: list[str], code: int) -> None:
    done = subprocess.run([sys.executable, "-c", LOADED, *words], capture_output=True, text=True, check=False)

    assert done.returncode == code
    assert json.loads(done.stderr.splitlines()[-1]) == []


def test_a_run_loads_nothing_that_its_first_step_does_not_need(desk: Path, tiny_model_dir: Path) -> None:
    words = ["train", "-m", tiny_model_dir, "-t", "text-classification", "-d", desk / "reviews.csv", "-o", desk / "run"]
    done = subprocess.run(
        [sys.executable, "-c", UNTIL_THE_FIRST_STEP, *map(str, words), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert json.loads(done.stdout) == [], done.stderr


@pytest.mark.parametrize("command", ["prepare", "train", "eval", "merge"])
def test_every_command_explains_itself(command: str) -> None:
    outcome = mirrortune(command, "-h")

    assert outcome.exit_code == 0
    assert f"mirrortune {command} " in outcome.stdout
    assert "Dangerous options" in outcome.stdout
    assert outcome.stdout.count("--trust-remote-code") == 1
    for flag in ("--json", "--quiet", "--verbose", "--debug"):
        assert flag in outcome.stdout


def test_no_command_shows_the_help() -> None:
    outcome = mirrortune()

    assert "prepare" in outcome.stdout + outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_the_version() -> None:
    assert mirrortune("--version").stdout == f"mirrortune {__version__}\n"


def test_the_module_runs_like_the_script(desk: Path) -> None:
    outcome = finish(start("--version", env={**os.environ, "PYTHONPATH": str(REPOSITORY)}))

    assert outcome == Outcome(0, f"mirrortune {__version__}\n", "")


def test_dashes_and_underscores_are_the_same(desk: Path, tiny_model_dir: Path) -> None:
    words = (
        "--batch_size 8 --gradient_accumulation_steps 2 --head_lr 0.5 --dry_run --max_length 32 train.log-every-steps=3"
    )

    outcome = train(tiny_model_dir, "-v", *words.split())

    assert outcome.exit_code == 0, outcome.stderr
    for line in (
        "train.batch_size = 8  (--batch-size)",
        "train.gradient_accumulation_steps = 2  (--gradient-accumulation-steps)",
        "train.head_lr = 0.5  (--head-lr)",
        "data.max_length = 32  (--max-length)",
        "train.log_every_steps = 3  ('train.log-every-steps=3')",
    ):
        assert line in outcome.stderr.splitlines()


def test_two_spellings_of_the_learning_rate(desk: Path, tiny_model_dir: Path) -> None:
    for flag in ("--lr", "--learning-rate", "--learning_rate"):
        assert "train.lr = 0.25  (--lr)" in train(tiny_model_dir, flag, 0.25, "-v", "--dry-run").stderr


def test_a_dry_run_checks_everything_and_writes_nothing(desk: Path, tiny_model_dir: Path) -> None:
    (tiny_model_dir / "model.safetensors").rename(desk / "away")
    try:
        outcome = train(tiny_model_dir, "--dry-run")
        as_json = train(tiny_model_dir, "--dry-run", "--json")
    finally:
        (desk / "away").rename(tiny_model_dir / "model.safetensors")

    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.stdout == "would adapt 13 layers and train 624 parameters, plus 66 in the task head\n"
    assert as_json.data["targets"] == 13
    assert [p.name for p in desk.iterdir()] == ["reviews.csv"]
    assert train(tiny_model_dir, "--dry-run", "--target-modules", "nothing").exit_code == 2


def test_where_every_setting_came_from(desk: Path, tiny_model_dir: Path) -> None:
    (desk / "my.yaml").write_text("train:\n  lr: 0.5\n  seed: 7\n", encoding="utf-8")

    outcome = mirrortune(
        *["train", "my.yaml", "-m", tiny_model_dir, "-t", "text-classification", "-d", "reviews.csv"],
        *["--seed", 8, "eval.batch_size=16", "-v", "--dry-run"],
    )

    lines = outcome.stderr.splitlines()
    for line in (
        "train.lr = 0.5  (my.yaml:2: train.lr)", "train.seed = 8  (--seed)",
        "eval.batch_size = 16  ('eval.batch_size=16')",
        "train.weight_decay = 0.01  (default)", "task.kind = 'text-classification'  (--task)",
    ):  # fmt: skip
        assert line in lines
    assert outcome.stdout.count("\n") == 1


def test_results_are_on_stdout_and_the_rest_on_stderr(desk: Path, tiny_model_dir: Path) -> None:
    outcome = train(tiny_model_dir)

    assert outcome.stdout.startswith("validation: accuracy 0.")
    assert "score it:  mirrortune eval run\n" in outcome.stdout
    assert "export it: mirrortune merge run -o run-merged\n" in outcome.stdout
    assert "step " not in outcome.stdout
    for word in ("reviews.csv, 60 rows", "layers adapted: 13", "running on cpu with 1 process", "step 2/2"):
        assert word in outcome.stderr


def test_quiet_leaves_results_and_errors(desk: Path, tiny_model_dir: Path) -> None:
    for quiet in ("-q", "--quiet"):
        outcome = train(tiny_model_dir, quiet, "--overwrite")
        assert outcome.stderr == ""
        assert outcome.stdout.startswith("validation: ")
    for words in (["eval", "run"], ["merge", "run", "-o", "merged"]):
        outcome = mirrortune(*words, "-q")
        assert (outcome.exit_code, outcome.stderr) == (0, "")
    refused = train(tiny_model_dir, "-q")
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: run: the output directory is not empty")


def test_debug_shows_where_an_error_came_from(desk: Path, tiny_model_dir: Path) -> None:
    with_debug, without = (train(tiny_model_dir, "-d", "x.csv", *words) for words in (["--debug"], []))

    assert "Traceback (most recent call last)" in with_debug.stderr
    assert with_debug.stderr.endswith(without.stderr)
    assert (with_debug.exit_code, without.exit_code) == (3, 3)


@pytest.mark.slow
def test_a_log_holds_plain_lines(desk: Path, tiny_model_dir: Path) -> None:
    outcomes = [train(tiny_model_dir, "-v"), mirrortune("eval", "run"), mirrortune("merge", "run", "-o", "merged")]

    for outcome in outcomes:
        assert outcome.exit_code == 0, outcome.stderr
        assert outcome.stdout
        assert outcome.is_plain


def test_a_cache_that_cannot_be_written_is_done_without(desk: Path, tiny_model_dir: Path) -> None:
    words = ["train", "-m", tiny_model_dir, "-t", "text-classification", "-d", "reviews.csv", "--max-steps", 1]

    assert mirrortune(*words, cache=desk / "reviews.csv").exit_code == 0


def on_terminal(*words: object, env: dict[str, str]) -> str:
    """What a command writes to a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "mirrortune", *map(str, words)], stdin=theirs, stdout=theirs, stderr=theirs,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "200", **env},
    )  # fmt: skip
    os.close(theirs)
    written = b""
    try:
        while part := os.read(ours, 65536):
            written += part
    except OSError:  # the other end was closed
        pass
    finally:
        os.close(ours)
        process.wait(timeout=60)
    return written.decode()


@pytest.mark.parametrize(("env", "is_red"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_errors_are_red_unless_colour_is_not_wanted(
    monkeypatch: pytest.MonkeyPatch, env: dict[str, str], *, is_red: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    written = on_terminal("train", "glue/sst", env=env)

    assert "unknown recipe 'glue/sst'. Did you mean 'glue/sst2'?" in written
    assert ("31m" in written) is is_red
    assert bool(re.search(r"\x1b\[[\d;]*3[0-7]m", written)) is is_red


@pytest.mark.slow
def test_a_terminal_gets_one_live_bar(desk: Path, tiny_model_dir: Path) -> None:
    written = on_terminal(
        *["train", "-m", tiny_model_dir, "-t", "text-classification", "-d", "reviews.csv", "--max-steps", 4],
        env={"NO_COLOR": "1"},
    )

    assert "4/4" in written
    assert "rows/s" in written
    assert "loss 0." in written
    assert "validation: accuracy" in written
    assert "mirrortune eval runs/reviews-tiny-bert-mirror-scale" in written
    assert "Traceback" not in written
