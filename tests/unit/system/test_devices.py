# SPDX-License-Identifier: Apache-2.0
"""hardware: what this machine is slow in, and how much memory a process took, on any system."""

from __future__ import annotations

import importlib
import os
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from mirrortune.errors import ConfigError
from mirrortune.models.load import describe_widening, resolve_dtype
from mirrortune.system import devices

CPU, GPU, META = (torch.device(name) for name in ("cpu", "cuda", "meta"))


@pytest.mark.parametrize(
    ("stored", "slowdown", "device", "loaded"),
    [
        ("bfloat16", 40.0, CPU, torch.float32),
        ("bfloat16", 2.6, CPU, torch.float32),
        ("bfloat16", 0.8, CPU, torch.bfloat16),
        ("bfloat16", 40.0, GPU, torch.bfloat16),
        ("bfloat16", 40.0, META, torch.bfloat16),
        ("float16", 0.5, CPU, torch.float32),
        ("float16", 0.5, META, torch.float16),
        ("float32", 40.0, CPU, torch.float32),
        (None, 40.0, CPU, torch.float32),
    ],
)
def test_weights_of_16_bits_become_float32_where_the_cpu_is_slow_in_them(
    monkeypatch: pytest.MonkeyPatch, stored: str | None, slowdown: float, device: torch.device, loaded: torch.dtype
) -> None:
    monkeypatch.setattr(devices, "bfloat16_slowdown", lambda: slowdown)
    config = SimpleNamespace(dtype=stored)
    assert resolve_dtype("auto", config, device) == loaded
    said = describe_widening("auto", config, device)
    assert (said is not None) == (stored in ("bfloat16", "float16") and loaded == torch.float32)
    if stored is not None:
        assert resolve_dtype(stored, config, device) == getattr(torch, stored), "what is asked for is had"
        assert describe_widening(stored, config, device) is None


def test_a_cpu_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = importlib.util.find_spec("mirrortune.system.devices")
    assert fresh is not None
    assert fresh.loader is not None
    module = importlib.util.module_from_spec(fresh)
    fresh.loader.exec_module(module)
    state = torch.get_rng_state()
    first = module.bfloat16_slowdown()
    assert 0 < first < 1000
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(module, "_linear_seconds", lambda dtype: pytest.fail("measured again"))
    assert module.bfloat16_slowdown() == first


def test_the_peak_of_a_process_is_known_without_posix(monkeypatch: pytest.MonkeyPatch) -> None:
    posix = devices.peak_resident_bytes()
    assert 2**20 < posix < 2**40
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    memory = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=12345))
    monkeypatch.setattr(psutil, "Process", lambda: memory)
    assert devices.peak_resident_bytes() == 12345


def test_the_machine_has_a_limit_without_posix(monkeypatch: pytest.MonkeyPatch) -> None:
    from mirrortune.runs import fit

    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.delattr(os, "sysconf", raising=False)
    monkeypatch.setattr(fit, "peak_resident_bytes", lambda: 2**20)
    limit, name = fit.device_memory("cpu")
    assert 0 < limit < psutil.virtual_memory().total
    assert "this machine" in name
    monkeypatch.setenv(fit.LIMIT_VARIABLE, "x")
    with pytest.raises(ConfigError):
        fit.device_memory("cpu")
