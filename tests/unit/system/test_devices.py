# SPDX-License-Identifier: Apache-2.0
"""Devices and dtypes: what a machine is slow in, peak memory, and 16-bit bases whose head is trained in float32."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn

from mirrortune.config import recipe
from mirrortune.errors import ConfigError
from mirrortune.merging import write
from mirrortune.models.load import describe_widening, resolve_dtype
from mirrortune.runs.evaluate import evaluate
from mirrortune.runs.train import train
from mirrortune.system import devices
from mirrortune.system.console import Reporter
from mirrortune.system.devices import as_computed, autocast, rounding_unit, widen, wrap_calls
from tests.cli.console import mirrortune, reviews, write_table
from tests.tiny_models import tiny_bert, tiny_causal
from tests.tiny_runs import HEAD, logits

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


def test_a_run_on_the_cpu_asks_the_gpu_of_its_machine_nothing(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # without one, any other function of it fails
    data = write_table(tmp_path / "reviews.csv", reviews(20))
    words = ["-m", tiny_model_dir, "-t", "text-classification", "-d", data, "--max-steps", 2, "-o", tmp_path / "run"]
    outcome = mirrortune("train", *words, "--gradient-accumulation-steps", 2, "--json")
    assert outcome.exit_code == 0
    assert "(a guess" not in outcome.said
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert results["peak_memory_bytes"] > 2**20
    assert results["peak_reserved_bytes"] is None


def test_widen_changes_only_what_is_named_and_in_16_bits() -> None:
    model = tiny_bert().to(torch.bfloat16)
    widen(model, HEAD)
    assert {n for n, p in model.named_parameters() if p.dtype == torch.float32} == set(HEAD)
    wide = tiny_bert().double()
    widen(wide, HEAD)
    assert {p.dtype for p in wide.parameters()} == {torch.float64}


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.float32, None), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)]
)
def test_autocast_is_for_16_bit_weights_and_in_their_dtype(dtype: torch.dtype, expected: torch.dtype | None) -> None:
    model = tiny_bert().to(dtype)
    widen(model, HEAD)
    with autocast(model):
        assert torch.is_autocast_enabled("cpu") is (expected is not None)
        assert expected in (None, torch.get_autocast_dtype("cpu"))
        assert logits(model).isfinite().all()
    for other in (nn.Sequential(tiny_bert().half(), tiny_bert().bfloat16()), tiny_causal().half()):
        with autocast(other):  # float16 would lose small gradients, and CPUs are slow in it
            assert torch.get_autocast_dtype("cpu") == torch.bfloat16


def test_the_rounding_unit_is_that_of_the_arithmetic_if_it_is_coarser() -> None:
    units = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float16, torch.bfloat16)}
    normed, plain = tiny_bert(), tiny_causal()
    assert rounding_unit(normed) == units[torch.float32] == rounding_unit(plain, torch.float32)
    assert rounding_unit(normed.half()) == units[torch.float16] == rounding_unit(tiny_bert(), torch.float16)
    assert rounding_unit(plain.half()) == units[torch.bfloat16] == rounding_unit(tiny_causal(), torch.float16)
    packed = nn.ParameterList([nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False), torch.zeros(1)])
    assert rounding_unit(packed) == units[torch.float32]


def in_bfloat16(module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return call(*args, **kwargs)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_wrapped_calls_clean_up_whatever_ends_them(error: type[BaseException]) -> None:
    model = tiny_bert()
    wrap_calls(model, in_bfloat16)

    def stop(*_: object) -> None:
        raise error

    hook = model.get_submodule("bert.pooler").register_forward_hook(stop)
    with pytest.raises(error):
        model(torch.tensor([[5, 6]]))
    assert not torch.is_autocast_enabled("cpu")
    hook.remove()
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied(torch.tensor([[5, 6]])).logits.dtype == torch.bfloat16
        assert type(copied).__name__ == type(tiny_bert()).__name__
        assert inspect.signature(copied.forward) == inspect.signature(tiny_bert().forward)
    replica = model._replicate_for_data_parallel()  # type: ignore[operator]
    replica.classifier = nn.Linear(32, 7)
    assert replica(torch.tensor([[5, 6]])).logits.shape == (1, 7)


@pytest.mark.slow
def test_a_bfloat16_run_is_trained_scored_and_merged(tiny_model_dir: Path, tmp_path: Path) -> None:
    words = ("good", "bad")
    rows = "".join(f"the film was very {words[i % 2]},{words[i % 2]}\n" for i in range(40))
    (tmp_path / "films.csv").write_text("text,label\n" + rows)
    values = {
        "model": {"name": str(tiny_model_dir), "dtype": "bfloat16"},
        "task": {"kind": "text-classification"},
        "data": {"path": str(tmp_path / "films.csv")},
        "train": {"batch_size": 8, "epochs": 4, "head_lr": 1e-2},
        "output_dir": str(tmp_path / "run"),
    }
    resolved, quiet = recipe.resolve([recipe.Layer(values=values, origin="test")]), Reporter(verbosity=-1)
    trained = train(resolved, quiet, recipe_name=None)
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter.safetensors")
    assert {t.dtype for n, t in tensors.items() if n.startswith(("core.", "param."))} == {torch.float32}
    assert evaluate(str(tmp_path / "run"), resolved.recipe, quiet).metrics == trained.metrics
    assert write.merge([str(tmp_path / "run")], quiet, output_dir=str(tmp_path / "merged")).passed


@pytest.fixture
def alone() -> Iterator[None]:
    """accelerate's state of a process that has just begun, for this test alone."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("alone")
def test_outputs_are_had_as_they_were_computed_below_accelerates_wrapper() -> None:
    """With mixed precision accelerate's forward makes float32 of all outputs, too much for a large vocabulary."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(nn.Linear(4, 4))
    inputs = torch.zeros(1, 4)
    assert model(inputs).dtype == torch.float32
    with as_computed(model), accelerator.autocast():
        assert model(inputs).dtype == torch.bfloat16
    assert model(inputs).dtype == torch.float32
    plain = nn.Linear(4, 4)
    with as_computed(plain):
        assert plain(inputs).dtype == torch.float32
