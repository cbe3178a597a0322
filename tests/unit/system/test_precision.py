# SPDX-License-Identifier: Apache-2.0
"""16-bit bases: the head is trained in float32, and train, eval and merge agree about it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn

from mirrortune.config import recipe
from mirrortune.merging import write
from mirrortune.runs.evaluate import evaluate
from mirrortune.runs.train import train
from mirrortune.system.console import Reporter
from mirrortune.system.devices import as_computed, autocast, widen
from tests.tiny_models import tiny_bert
from tests.tiny_runs import HEAD


def test_widen_changes_only_what_is_named_and_in_16_bits() -> None:
    model = tiny_bert().to(torch.bfloat16)
    widen(model, HEAD)
    assert {n for n, p in model.named_parameters() if p.dtype == torch.float32} == set(HEAD)
    wide = tiny_bert().double()
    widen(wide, HEAD)
    assert {p.dtype for p in wide.parameters()} == {torch.float64}


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, False), (torch.bfloat16, True)])
def test_autocast_is_for_16_bit_weights(dtype: torch.dtype, expected: bool) -> None:
    with autocast(tiny_bert().to(dtype)):
        assert torch.is_autocast_enabled("cpu") is expected


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
