# SPDX-License-Identifier: Apache-2.0
"""processes: what a run says of how it was started."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from accelerate.commands.config import config_args

from mirrortune.processes import ASKED_VARIABLE, describe_processes

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
