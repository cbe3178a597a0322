# SPDX-License-Identifier: Apache-2.0
"""kill -9 in the middle of saving and merging: what is left loads and is right, or is not there."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import mirrortune
from mirrortune.adapters.inject import spectral_layers
from mirrortune.errors import MirrortuneError
from tests.spectral import train_a_little
from tests.tiny_models import tiny_causal, tiny_chat_tokenizer

pytestmark = pytest.mark.slow
KILLS = 20
SAVE = """
import sys, mirrortune, torch
from transformers import AutoModelForCausalLM
from mirrortune.adapters.inject import spectral_layers
from tests.spectral import train_a_little
model = mirrortune.attach(AutoModelForCausalLM.from_pretrained("base"))
print("ready", flush=True)
for seed in range(10_000):
    for index, layer in enumerate(spectral_layers(model).values()):
        train_a_little(layer.core, seed % 2 + index)
    mirrortune.save_adapter(model, "adapter")
"""
MERGE = """
import shutil, mirrortune
from pathlib import Path
mirrortune.merge_adapter(None, "trained", "warm")
print("ready", flush=True)
for _ in range(10_000):
    shutil.rmtree("merged", ignore_errors=True)
    mirrortune.merge_adapter(None, "trained", "merged")
"""


def killed(code: str, folder: Path, after: float) -> None:
    """Run a loop in ``folder`` and kill it some seconds after it is ready."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "MIRRORTUNE_CACHE": str(folder / "cache")}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def answers(model: torch.nn.Module) -> torch.Tensor:
    """Logits on fixed tokens."""
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=torch.arange(5, 30)[None]).logits)


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A base in several files, and a trained adapter of it."""
    tiny_causal().save_pretrained(tmp_path / "base", max_shard_size="40KB")  # type: ignore[operator]
    tiny_chat_tokenizer().save_pretrained(tmp_path / "base")
    model = mirrortune.attach(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    for index, layer in enumerate(spectral_layers(model).values()):
        train_a_little(layer.core, index)
    model.config._name_or_path = str(tmp_path / "base")
    mirrortune.save_adapter(model, tmp_path / "trained")
    return tmp_path


def test_a_killed_save_leaves_a_whole_adapter_or_none(desk: Path) -> None:
    right = []
    for seed in (0, 1):
        model = mirrortune.attach(AutoModelForCausalLM.from_pretrained(desk / "base"))
        for index, layer in enumerate(spectral_layers(model).values()):
            train_a_little(layer.core, seed + index)
        right.append(answers(model))
    for kill in range(KILLS):
        killed(SAVE, desk, random.Random(kill).uniform(0, 0.6))
        if not (desk / "adapter").is_dir():
            continue
        model = AutoModelForCausalLM.from_pretrained(desk / "base")
        try:
            found = answers(mirrortune.load_adapter(model, desk / "adapter"))
        except MirrortuneError:
            continue
        assert any(torch.equal(found, expected) for expected in right)


def test_a_killed_merge_leaves_a_whole_model_or_none(desk: Path) -> None:
    model = mirrortune.load_adapter(AutoModelForCausalLM.from_pretrained(desk / "base"), desk / "trained")
    expected = answers(model)
    for kill in range(KILLS):
        killed(MERGE, desk, random.Random(kill).uniform(0, 1.5))
        for folder in (desk / "merged", desk / "warm"):
            if folder.is_dir() and (folder / "config.json").is_file() and list(folder.glob("*.safetensors")):
                try:
                    found = answers(AutoModelForCausalLM.from_pretrained(folder))
                except (OSError, ValueError):
                    continue
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        for name in ("merged", "warm"):
            subprocess.run(["rm", "-rf", str(desk / name)], check=True)
