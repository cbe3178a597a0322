# SPDX-License-Identifier: Apache-2.0
"""Runs that are stopped, by a signal or by a full disk, and go on as if nothing had been."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.cli.console import Outcome, finish, mirrortune, reviews, start, write_lines, write_table
from tests.tiny_models import write_tiny_causal, write_tiny_model

# 150 steps of a few milliseconds: time enough to be interrupted; dropout, so that random states matter.
SETTINGS = ["--epochs", 10, "--batch-size", 8, "--lr", 0.1, "train.log_every_steps=5"]


class Uninterrupted:
    """A run that nobody stops.

    Attributes:
        words: its command line, but for ``-o``.
        run: its folder.
        log: its metrics.jsonl.
        env: the environment of processes with the same cache.
    """

    def __init__(self, folder: Path, model: Path) -> None:
        data = write_table(folder / "reviews.csv", reviews(130))
        self.words = ["train", "-m", model, "-t", "text-classification", "-d", data, *SETTINGS]
        self.cache = folder / "cache"
        self.run = folder / "run"
        assert mirrortune(*self.words, "-o", self.run, cache=self.cache).exit_code == 0
        self.log = (self.run / "metrics.jsonl").read_bytes()
        self.env = {**os.environ, "MIRRORTUNE_CACHE": str(self.cache)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    folder = tmp_path_factory.mktemp("whole")
    return Uninterrupted(folder, write_tiny_model(folder / "model", dropout=0.1))


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for something that a running process does; it must not end before."""
    deadline = time.monotonic() + 300
    while not is_so():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def checkpoints(run: Path) -> list[str]:
    """Names of what is in a run's checkpoints folder, hidden things too."""
    folder = run / "checkpoints"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def resume(whole: Uninterrupted, run: Path) -> Outcome:
    """Continue a run in this process."""
    return mirrortune(*whole.words, "-o", run, "--resume", "--json", cache=whole.cache)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 143, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_log(
    whole: Uninterrupted, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    run = tmp_path / "run"
    process = start(*whole.words, "-o", run, env=whole.env)
    wait_until(lambda: (run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").stat().st_size > 0, process)
    process.send_signal(number)
    outcome = finish(process)

    assert outcome.exit_code == code, outcome.stderr
    assert outcome.stdout == ""
    assert f"{number.name} stopped it after step" in outcome.said
    assert "with --resume" in outcome.said or "and --resume." in outcome.said
    assert "Traceback" not in outcome.stderr
    assert outcome.is_plain
    before = (run / "metrics.jsonl").read_bytes()
    assert len(before) < len(whole.log)
    assert whole.log.startswith(before)
    assert not (run / "adapter").exists()
    last = checkpoints(run)[-1]
    assert f"after step {int(last.removeprefix('step-'))} of 150" in outcome.said

    assert resume(whole, run).data["metrics"]["accuracy"] > 0.5
    assert (run / "metrics.jsonl").read_bytes() == whole.log
    assert mirrortune("eval", run, cache=whole.cache).exit_code == 0


def test_what_a_crash_leaves_goes_on_from_the_last_whole_checkpoint(whole: Uninterrupted, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole.run, tmp_path / "run"))
    best, last = checkpoints(run)
    (run / "checkpoints" / last).rename(run / "checkpoints" / f".{last}.mt-x1y2z3w4.partial")  # it was being written
    (run / "checkpoints" / f".{last}.mt-x1y2z3w4.partial" / "state.json").unlink()
    shutil.rmtree(run / "adapter")
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"event": "train", "st')

    outcome = resume(whole, run)

    assert outcome.data["metrics"]["accuracy"] > 0.5
    assert f"step {int(best[5:])}/" not in outcome.stderr, "the best checkpoint's step is not made again"
    assert (run / "metrics.jsonl").read_bytes() == whole.log
    assert checkpoints(run) == [best, last]


def test_a_checkpoint_with_a_flipped_bit_is_refused(whole: Uninterrupted, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole.run, tmp_path / "run"))
    best, last = checkpoints(run)
    path = run / "checkpoints" / last / "training.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)

    outcome = mirrortune(*whole.words, "-o", run, "--resume", cache=whole.cache)

    assert outcome.exit_code == 5
    assert f"{last}: damaged checkpoint (training.safetensors is not the file that was saved" in outcome.said
    assert f"Delete it to continue from {best}." in outcome.said


def test_a_full_disk_ends_a_run_with_its_old_checkpoints_whole(whole: Uninterrupted, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(*whole.words, "-o", run, env=whole.env)
    wait_until(lambda: any(name.startswith("step-") for name in checkpoints(run)), process)
    # From now on no file of the process may grow beyond 8 KiB, which the log does not and a checkpoint does.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
    outcome = finish(process)

    assert outcome.exit_code == 4, outcome.stderr
    assert "cannot be written (the disk is full). Free space or choose another place with -o" in outcome.said
    assert "Traceback" not in outcome.stderr
    assert outcome.stdout == ""
    left = checkpoints(run)
    assert left
    assert all(name.startswith("step-") for name in left), "half a checkpoint"
    for name in left:
        folder = run / "checkpoints" / name
        assert json.loads((folder / "state.json").read_text(encoding="utf-8"))["global_step"] == int(name[5:])
        assert load_file(folder / "adapter.safetensors")
        assert load_file(folder / "training.safetensors")

    assert resume(whole, run).data["metrics"]["accuracy"] > 0.5
    assert (run / "metrics.jsonl").read_bytes() == whole.log


def of_sentences(folder: Path) -> list[object]:
    """Sentences with dropout, batches by length, and accumulation."""
    data = write_table(folder / "reviews.csv", reviews(130))
    model = write_tiny_model(folder / "model", dropout=0.1)
    return ["-m", model, "-t", "text-classification", "-d", data, "--batch-size", 4, "--epochs", 150]


def of_packed_talks(folder: Path) -> list[object]:
    """Packed conversations with dropout, accumulation, and several threads that make batches."""
    draw, path = random.Random(0), folder / "talks.jsonl"
    model = write_tiny_causal(folder / "model", attention_dropout=0.1)
    rows = [{"prompt": draw.choice("abcdefgh") * draw.randrange(1, 9), "completion": "no no no"} for _ in range(130)]
    write_lines(path, rows)
    words = ["-m", model, "-t", "causal-lm", "-d", path, "--max-length", 96, "data.packing=true", "--batch-size", 2]
    return [*words, "--epochs", 350, "train.num_workers=3"]


def kill_all(process: subprocess.Popen[str]) -> None:
    """SIGKILL to a command and to every process that it has started."""
    family, waiting = [], [process.pid]
    while waiting:
        family.append(waiting.pop())
        for file in Path(f"/proc/{family[-1]}/task").glob("*/children"):
            waiting += [int(word) for word in file.read_text(encoding="ascii").split()]
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("of", [of_sentences, of_packed_talks])
def test_twenty_kills_leave_no_trace(tmp_path: Path, of: Callable[[Path], list[object]], count: int) -> None:
    """SIGKILL while it loads, trains, evaluates and saves; what is left is continued each time."""
    draw = random.Random(5)
    words = ["train", *of(tmp_path), "--keep", 2, "--gradient-accumulation-steps", 2, "--lr", 0.1]
    words += ["train.log_every_steps=2", *(["--num-processes", count] if count > 1 else [])]
    words += ["train.save_every_steps=5", "train.eval_every_steps=11"]  # about as long as the steps in between
    env = {**os.environ, "MIRRORTUNE_CACHE": str(tmp_path / "cache")}
    assert finish(start(*words, "-o", tmp_path / "whole", env=env), timeout=3000).exit_code == 0
    run, kills = tmp_path / "run", 0
    while kills < 20:
        again = ["--resume"] if (run / "recipe.yaml").is_file() else []
        process = start(*words, "-o", run, *again, env=env)
        assert process.stderr is not None
        if kills % 5:  # the others are killed on the way to their first step
            while not process.stderr.readline().startswith("step "):
                assert process.poll() is None
        time.sleep(draw.uniform(0, 0.5 if kills % 5 else 10))
        assert process.poll() is None, "the run is too short"
        kill_all(process)
        kills += 1
    assert finish(start(*words, "-o", run, "--resume", env=env), timeout=3000).exit_code == 0

    assert (run / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert sorted(p.name for p in run.rglob("*")) == sorted(p.name for p in (tmp_path / "whole").rglob("*"))
    for path in (tmp_path / "whole" / "adapter").iterdir():
        assert (run / "adapter" / path.name).read_bytes() == path.read_bytes()
