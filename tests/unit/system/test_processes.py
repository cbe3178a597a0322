# SPDX-License-Identifier: Apache-2.0
"""processes: what a run says of how it was started."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from accelerate.commands.config import config_args
from accelerate.utils import parse_flag_from_env

from mirrortune.errors import ConfigError
from mirrortune.system import devices, machine
from mirrortune.system.devices import is_set
from mirrortune.system.distributed.processes import (
    ASKED_VARIABLE,
    describe_processes,
    make_accelerator,
    read_accelerate_config,
)

ONE = SimpleNamespace(num_processes=1, is_fsdp2=False, device=torch.device("cpu"))


def said(**of: Any) -> list[str]:
    """The lines that a run says at its start."""
    lines: list[str] = []
    accelerator: Any = SimpleNamespace(**{**vars(ONE), **of})
    reporter: Any = SimpleNamespace(note=lines.append)
    describe_processes(accelerator, reporter, Path("run"))
    return lines


@pytest.fixture
def stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A default config of accelerate's that somebody once wrote, and a launch that would take it."""
    path = tmp_path / "default_config.yaml"
    path.write_text("distributed_type: 'NO'\nnum_processes: 1\nmixed_precision: fp16\n", encoding="utf-8")
    monkeypatch.setattr(config_args, "default_config_file", str(path))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.delenv(ASKED_VARIABLE, raising=False)
    return path


def test_how_many_take_part_is_said() -> None:
    assert said(num_processes=3, is_fsdp2=True) == ["running on cpu with 3 processes (FSDP2); writing to run"]
    assert said() == ["running on cpu with 1 process; writing to run"]


def test_a_gpu_that_torch_cannot_use_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12040).\nPlease update it")

    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.version, "cuda", None)
    reason = f"torch {torch.__version__} is a build for CPUs"
    assert said()[1] == f"warning: this machine's NVIDIA GPU is not used ({reason})"
    assert machine._accelerators() == [{"kind": "cuda", "name": "NVIDIA GPU", "problem": f"not used ({reason})"}]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", fail)
    assert "The NVIDIA driver on your system is too old (found version 12040))" in said()[1]
    for name, value in (("CUDA_VISIBLE_DEVICES", ""), ("ACCELERATE_USE_CPU", "true")):
        with monkeypatch.context() as chosen:
            chosen.setenv(name, value)
            assert len(said()) == 1, "as it was told"


def test_a_stale_default_config_is_said(stale: Path) -> None:
    warning = said()[1]
    assert warning.startswith("warning: without --config_file accelerate launch takes its settings from ")
    assert f"{stale} (distributed_type NO, num_processes 1, mixed_precision fp16)" in warning


def test_a_default_config_that_had_no_say_is_not_spoken_of(stale: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ASKED_VARIABLE, "1")  # --num-processes launched it, with a config of ours
    assert len(said()) == 1
    monkeypatch.delenv(ASKED_VARIABLE)
    stale.unlink()
    assert len(said()) == 1


@pytest.mark.parametrize("words", [["--config_file", "mine.yaml"], ["--config-file=mine.yaml"]])
def test_a_config_that_the_launcher_was_given_is_no_stale_one(
    stale: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    def started_by(*words: str) -> None:
        parents = [SimpleNamespace(cmdline=lambda: ["accelerate", "launch", *words, "-m", "mirrortune", "train"])]
        monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(parents=lambda: parents))

    started_by("--num_processes", "2")
    assert str(stale) in said()[1]
    started_by(*words)
    assert len(said()) == 1


def test_a_cpu_launch_that_starts_one_process_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert "accelerate launch --cpu starts one process, whatever --num_processes says" in said()[1]


YAML = "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\n"


@pytest.mark.parametrize(
    ("word", "is_cpu"), [("no", False), ("off", False), ("False", False), ("yes", True), ("on", True), ("true", True)]
)
def test_an_accelerate_config_is_read_as_accelerate_reads_it(tmp_path: Path, word: str, is_cpu: bool) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"{YAML}use_cpu: {word}\nnum_processes: 0x2\n", encoding="utf-8")
    found = read_accelerate_config(path)
    assert found["use_cpu"] is is_cpu
    assert found["num_processes"] == 2
    assert found["use_cpu"] == config_args.load_config_from_file(str(path)).use_cpu


def test_an_accelerate_config_may_be_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    config = {"distributed_type": "MULTI_GPU", "use_cpu": False, "num_processes": 2}
    path.write_text(json.dumps(config), encoding="utf-8")
    assert read_accelerate_config(path) == config


@pytest.mark.parametrize(
    "text", ["a: b: c", "", "[1, 2]", "use_cpu: no", f"{YAML}no_such_key: 1\n", "distributed_type: SEVERAL", "\ta: 1"]
)
def test_a_config_that_accelerate_refuses_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"config\.yaml: accelerate cannot read it \(.+\)\. Allowed: a file that"):
        read_accelerate_config(path)


@pytest.mark.parametrize("value", ["y", "yes", "t", "true", "on", "1", "n", "no", "f", "false", "off", "0", "TRUE"])
def test_switches_of_the_environment_are_read_as_accelerate_reads_them(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", value)
    assert is_set("ACCELERATE_USE_CPU") == parse_flag_from_env("ACCELERATE_USE_CPU")


def test_buffers_are_not_broadcast_in_forward_passes() -> None:
    assert make_accelerator("fp32").ddp_handler.broadcast_buffers is False
