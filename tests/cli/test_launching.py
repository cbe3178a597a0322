# SPDX-License-Identifier: Apache-2.0
"""Runs of two processes, started by ``--num-processes`` and by launchers, are those of one with the batch of both."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

from mirrortune.cli import app
from tests.cli.console import REPOSITORY, Outcome, finish, mirrortune, reviews, start, write_table
from tests.tiny_models import write_tiny_model


@dataclass(frozen=True)
class Pair:
    """A run of two processes that nobody stops.

    Attributes:
        words: its command line, but for ``-o`` and the number of processes.
        run: its folder.
        outcome: of the command.
        env: the environment of processes with its cache.
    """

    words: list[object]
    run: Path
    outcome: Outcome
    env: dict[str, str]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    data = write_table(folder / "reviews.csv", reviews(101))  # a last batch that cannot be shared evenly
    model = write_tiny_model(folder / "model")
    words: list[object] = ["train", "-m", model, "-t", "text-classification", "-d", data, "--epochs", 2, "--lr", 0.1]
    words += ["train.log_every_steps=1", "--head-lr", 1e-2, "--json"]
    env = {**os.environ, "MIRRORTUNE_CACHE": str(folder / "cache")}
    run = folder / "two"
    outcome = finish(start(*words, "-o", run, "--batch-size", 8, "--num-processes", 2, env=env))
    return Pair(words, run, outcome, env)


def events(run: Path) -> list[dict[str, Any]]:
    """The log of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_two_processes_train_like_one_with_the_batch_of_both(pair: Pair, tmp_path: Path) -> None:
    one = mirrortune(*pair.words, "-o", tmp_path / "one", "--batch-size", 16)

    assert pair.outcome.data["metrics"] == pytest.approx(one.data["metrics"], abs=1e-4)
    assert pair.outcome.stderr.count("with 2 processes") == 1
    assert "with 1 process;" in one.stderr
    assert json.loads((pair.run / "environment.json").read_text(encoding="utf-8"))["num_processes"] == 2
    for left, right in zip(events(pair.run), events(tmp_path / "one"), strict=True):
        assert left.keys() == right.keys()
        for name, value in left.items():
            assert value == (right[name] if isinstance(value, str) else pytest.approx(right[name], rel=1e-3, abs=1e-5))
    files = [load_file(run / "adapter" / "adapter.safetensors") for run in (pair.run, tmp_path / "one")]
    assert files[0].keys() == files[1].keys()
    for name, tensor in files[0].items():
        torch.testing.assert_close(tensor, files[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_crashed_run_of_two_goes_on_bit_for_bit(pair: Pair, tmp_path: Path) -> None:
    run = Path(shutil.copytree(pair.run, tmp_path / "run"))
    last = max(path.name for path in (run / "checkpoints").iterdir())
    for folder in (run / "checkpoints" / last, run / "adapter"):
        shutil.rmtree(folder)
    (run / "checkpoints" / f".{last}.mt-a1b2c3d4.partial").mkdir()

    again = finish(start(*pair.words, "-o", run, "--batch-size", 8, "--num-processes", 2, "--resume", env=pair.env))

    assert again.data["metrics"] == pair.outcome.data["metrics"]
    assert (run / "metrics.jsonl").read_bytes() == (pair.run / "metrics.jsonl").read_bytes()
    for path in (pair.run / "adapter").iterdir():
        assert (run / "adapter" / path.name).read_bytes() == path.read_bytes()


def test_another_number_of_processes_is_refused_by_name(pair: Pair) -> None:
    outcome = mirrortune(*pair.words, "-o", pair.run, "--batch-size", 8, "--resume")
    assert outcome.exit_code == 2
    assert "the checkpoint is of 2 processes, this run has 1. Launch 2 processes" in outcome.said


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--accelerate-config", "dpd"], 2, "Did you mean 'ddp'?"),
        (["--accelerate-config", "zero1"], 2, "Did you mean 'zero"),
        (["--accelerate-config", "zero3"], 4, "zero3 needs GPUs"),
        (["--accelerate-config", "fsdp2"], 4, "fsdp2 needs GPUs"),
        (["--accelerate-config", "broken.yaml"], 2, "broken.yaml: accelerate cannot read it"),
        (["--num-processes", 0], 2, "Input should be greater than or equal to 1"),
    ],
)
def test_what_cannot_be_launched(tiny_model_dir: Path, words: list[object], code: int, said: str) -> None:
    if code == 4 and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    Path("broken.yaml").write_text("use_cpu: no", encoding="utf-8")
    outcome = mirrortune("train", "-m", tiny_model_dir, "-t", "text-classification", "-d", "reviews.csv", *words)
    assert outcome.exit_code == code
    assert said in outcome.said


def test_a_process_that_was_launched_launches_nothing(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    words = ["train", "-m", tiny_model_dir, "-t", "text-classification", "-d", "reviews.csv", "--num-processes", 2]
    outcome = mirrortune(*words)
    assert outcome.exit_code == 2
    assert "a launcher has started this process already" in outcome.said


@pytest.mark.parametrize(("word", "code"), [("ls", 0), ("what", 2)])
def test_a_process_closes_its_connections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, code: int
) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    monkeypatch.setattr(sys, "argv", ["mirrortune", "recipes", word])
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == code
    assert not distributed.is_initialized()


@pytest.mark.parametrize(("word", "is_closed"), [("ls", True), ("what", False)])
def test_a_process_that_failed_does_not_wait_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, is_closed: bool
) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    monkeypatch.setattr(distributed, "get_backend", lambda: "nccl")  # which closes connections with all processes
    monkeypatch.setattr(sys, "argv", ["mirrortune", "recipes", word])
    try:
        with pytest.raises(SystemExit):
            app.main()
        assert distributed.is_initialized() is not is_closed
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


@pytest.mark.slow
def test_a_process_that_fails_alone_ends_the_run_with_its_own_error(tmp_path: Path) -> None:
    """Of 1,600 rows of a stream, one that is not among the first 1,000 cannot be read."""
    rows = [{"text": text, "label": label} for text, label in reviews(1600)]
    rows[1501]["label"] = "neither"
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    scored = write_table(tmp_path / "scored.csv", reviews(20))
    words = ["train", "-m", write_tiny_model(tmp_path / "model"), "-t", "text-classification", "-d", data, "-o", "run"]
    words += ["data.streaming=true", f"data.validation_path={scored}", "task.labels=[negative, positive]"]
    outcome = finish(start(*words, "--max-steps", 400, "--batch-size", 8, "--num-processes", 2, "--quiet"))

    assert outcome.exit_code == 3, outcome.stderr
    assert outcome.stderr.startswith("error: ")
    assert outcome.stderr.count("\n") == 1
    assert "label 'neither' is not among the classes" in outcome.stderr


@pytest.mark.slow
def test_a_signal_to_the_launcher_is_a_safe_stop(pair: Pair, tmp_path: Path) -> None:
    run, words = tmp_path / "run", [*pair.words, "--batch-size", 8, "--num-processes", 2]
    process = start(*words, "-o", run, env=pair.env)
    deadline = time.monotonic() + 300
    while not ((run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").stat().st_size > 0):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    stopped = finish(process)

    assert stopped.exit_code == 143, stopped.stderr
    assert stopped.stderr.count("SIGTERM stopped it after step") == 1
    assert "Traceback" not in stopped.stderr

    again = finish(start(*words, "-o", run, "--resume", env=pair.env))
    assert again.data["metrics"] == pair.outcome.data["metrics"]
    assert (run / "metrics.jsonl").read_bytes() == (pair.run / "metrics.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "count"), [("torchrun", "2 processes"), ("accelerate", "1 process;")])
def test_launchers_of_others_run_it(pair: Pair, tmp_path: Path, launcher: str, count: str) -> None:
    """torchrun starts as many as it is told; on a CPU accelerate starts one, and the run says so."""
    start_two = {
        "torchrun": "-m torch.distributed.run --standalone --nproc_per_node 2 -m",
        "accelerate": "-m accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no "
        "--dynamo_backend no -m",
    }
    words = [*pair.words, "-o", tmp_path / "run", "--max-steps", 2]
    outcome = finish(start(*words, env=pair.env, launcher=start_two[launcher].split()))

    assert outcome.exit_code == 0, outcome.stderr
    assert f"running on cpu with {count}" in outcome.stderr
    assert ("accelerate launch --cpu starts one process" in outcome.stderr) == (launcher == "accelerate")


@pytest.mark.slow
def test_two_machines_train_like_two_processes_of_one(pair: Pair, tmp_path: Path) -> None:
    """Two launchers that find each other by an address and a port, with a process each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ddp = REPOSITORY / "mirrortune" / "system" / "distributed" / "profiles" / "ddp.yaml"
    options = f"--num_machines 2 --num_processes 2 --main_process_ip 127.0.0.1 --main_process_port {port}"
    env = {**pair.env, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    machines = [
        start(
            *pair.words, "-o", tmp_path / "run", "--batch-size", 8, env=env,
            launcher=["-m", "accelerate.commands.launch", "--config_file", str(ddp), *options.split(),
                      "--machine_rank", str(rank), "-m"],
        )
        for rank in (0, 1)
    ]  # fmt: skip
    first, second = map(finish, machines)

    assert first.exit_code == second.exit_code == 0, first.stderr + second.stderr
    assert first.stderr.count("with 2 processes;") == 1
    assert "with 2 processes" not in second.stderr
    assert first.data["metrics"] == pair.outcome.data["metrics"]
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (pair.run / "metrics.jsonl").read_bytes()
    for path in (pair.run / "adapter").iterdir():
        assert (tmp_path / "run" / "adapter" / path.name).read_bytes() == path.read_bytes()
