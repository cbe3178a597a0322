# SPDX-License-Identifier: Apache-2.0
"""The description of a machine: complete, and without names or secrets."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mirrortune.system import machine
from mirrortune.system.disk import check_disk


@pytest.fixture
def ada(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder of the user ada on the host babbage, who has a token."""
    home = tmp_path / "ada"
    (home / "cache").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("LOGNAME", "ada")
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    monkeypatch.setenv("MIRRORTUNE_CACHE", str(home / "cache" / "deep"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr("socket.gethostname", lambda: "babbage")
    return home


@pytest.mark.usefixtures("ada")
def test_it_names_neither_user_nor_host_and_holds_no_token() -> None:
    found = machine.describe_machine()

    text = json.dumps(found)
    assert not [name for name in ("ada", "babbage", "hf_secretsecret") if name in text]
    assert found["hub_token"] is True
    assert found["caches"]["mirrortune"]["path"] == "~/cache/deep"
    assert found["caches"]["mirrortune"]["exists"] is False
    assert found["caches"]["mirrortune"]["free_bytes"] > 0
    assert found["environment"]["MIRRORTUNE_CACHE"] == "~/cache/deep"
    assert found["environment"]["CUDA_VISIBLE_DEVICES"] == "0"
    assert found["packages"]["torch"] == torch.__version__
    assert found["devices"][0]["cores"] >= 1


def test_names_are_replaced_as_whole_words(ada: Path) -> None:
    assert machine.without_names(f"{ada}/x:{ada}") == "~/x:~"
    assert machine.without_names(f"{ada}line/x").endswith("adaline/x")
    assert machine.without_names("/scratch/ada/x on babbage, not adalbert") == "/scratch/USER/x on HOST, not adalbert"


def test_what_does_not_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "default_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(machine, "bfloat16_slowdown", lambda: 3.25)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    found = machine.abilities()

    assert found["bf16"] == "slow (3.2 times as long as fp32)"
    assert found["flash attention"] == "no (flash_attention_2 runs only on CUDA GPUs, got cpu)"
    assert found["8-bit and 4-bit weights"] == "no (pip install 'mirrortune[quantised]')"


def test_gpus_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    def free(index: int) -> tuple[int, int]:
        if index == 0:
            raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nmore")
        return 3 * 2**30, 16 * 2**30

    fake = SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 2, mem_get_info=free,
        get_device_capability=lambda index: (7, 5), get_device_name=lambda index: f"Tesla T4 {index}",
        is_bf16_supported=lambda including_emulation=True: including_emulation,
    )  # fmt: skip
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setattr(machine, "default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.version, "cuda", "12.8")

    found = machine.abilities()

    assert (found["bf16"], found["fp16"], found["several GPUs"]) == ("no (this GPU emulates it)", "yes", "yes (2)")
    assert machine._accelerators()[1] == {
        "kind": "cuda", "name": "Tesla T4 1", "memory_bytes": 16 * 2**30, "free_bytes": 3 * 2**30, "capability": "7.5",
        "runtime": "12.8",
    }  # fmt: skip
    assert machine._accelerators()[0]["problem"] == "CUDA error: CUDA-capable device(s) is/are busy or unavailable"


@pytest.mark.usefixtures("ada")
def test_a_cache_that_may_not_be_looked_into_is_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed, really = tmp_path / "closed", os.stat

    def refusing(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if isinstance(path, str | os.PathLike) and str(path).startswith(f"{closed}/"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return really(path, *args, **kwargs)

    closed.mkdir()
    (tmp_path / "file").touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", refusing)
        assert machine._cache(closed / "hub")["exists"] is False
        check_disk({closed / "hub": {"weights": 1}})
    assert machine._cache(tmp_path / "file")["writable"] is False
    assert machine._cache(tmp_path / "new")["writable"] is True
