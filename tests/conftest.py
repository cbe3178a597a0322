# SPDX-License-Identifier: Apache-2.0
"""What every test has: its own caches and seeds, no network, one torch thread; and a tiny model in a folder.

Builders of models and training data are plain functions in ``tiny_models.py`` and ``tiny_runs.py``.
"""

from __future__ import annotations

import os

# Before anything imports huggingface_hub, which reads it once: no test of ours may depend on the network. Tests of the
# Hub run clients in subprocesses, whose environment they make themselves.
os.environ["HF_HUB_OFFLINE"] = "1"

import io
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

from tests.tiny_models import tiny_tokenizer, write_tiny_model

# derandomize: a law that fails, fails again. 10 examples a core, pairing and option set are about 150 of each law.
settings.register_profile(
    "laws",
    derandomize=True,
    deadline=None,
    max_examples=10,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("laws")
torch.set_num_threads(1)
_COUNT = itertools.count()


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name contents by their argument, not by their bytes: those of a gzip file hold the time it was made, and test
    processes that collect in different seconds would disagree about the names of the tests.
    """
    return argname if isinstance(val, bytes) else None


@pytest.fixture(autouse=True)
def own_world(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory and caches of this test's own, so that nothing is written into the checkout; every global
    generator freshly seeded.
    """
    world = tmp_path_factory.getbasetemp() / f"world-{next(_COUNT)}"
    (world / "work").mkdir(parents=True)
    monkeypatch.chdir(world / "work")
    monkeypatch.setenv("MIRRORTUNE_CACHE", str(world / "mirrortune"))
    monkeypatch.setenv("HF_HOME", str(world / "huggingface"))
    # Whether a machine is fast in bfloat16 must not decide what a test computes.
    monkeypatch.setattr("mirrortune.system.devices.bfloat16_slowdown", lambda: 0.5)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (some models draw from the global generator)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The word tokenizer of all tiny models."""
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny BERT with its tokenizer; read only."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture(scope="module")
def quick_figures() -> Iterator[None]:
    """Save figures empty in this process: matplotlib's layout and rendering take longer than a tiny training.

    Everything before that is done, and so is the page with its text. Commands in a process of their own draw as users'.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mirrortune.reports.drawing._saved", _empty)
        yield


def _empty(_: Any, kind: str) -> bytes:
    if kind == "svg":
        return b'<svg xmlns="http://www.w3.org/2000/svg"></svg>'
    png = io.BytesIO()
    Image.new("1", (1, 1)).save(png, "PNG")
    return png.getvalue()
