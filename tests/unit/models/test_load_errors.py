# SPDX-License-Identifier: Apache-2.0
"""Exceptions of transformers while it loads a model, and the errors that they become."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from huggingface_hub.utils import are_progress_bars_disabled

from mirrortune.errors import ConfigError, ResourceError
from mirrortune.models import load_errors as module
from mirrortune.models.load_errors import damage_errors, load_errors, quiet


def test_a_file_that_may_not_be_read_is_not_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Safetensors says "No such file or directory" of both."""
    weights = tmp_path / "model.safetensors"
    weights.touch()
    access = os.access
    closed: Any = lambda path, mode: Path(path) != weights and access(path, mode)  # noqa: E731
    monkeypatch.setattr(os, "access", closed)  # root may read every file

    with pytest.raises(ConfigError) as caught, load_errors(str(tmp_path)):
        raise FileNotFoundError(f"No such file or directory: {weights}")
    assert str(caught.value) == (
        f"model '{tmp_path}': its files may not be read (permission denied). Permit it: chmod u+r {weights}."
    )


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No such file or directory: model\.safetensors"), load_errors(str(tmp_path)):
        raise FileNotFoundError("No such file or directory: model.safetensors")


@pytest.mark.parametrize("is_on", [True, False])
def test_progress_bars_are_afterwards_as_before(is_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: Any = transformers.utils.logging
    monkeypatch.setattr(bars, "_tqdm_active", is_on)
    hub = sys.modules["huggingface_hub.utils.tqdm"]  # a class has the name too
    monkeypatch.setattr(hub, "progress_bar_states", {"_global": is_on})
    monkeypatch.setattr(hub, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    with quiet():
        assert not bars.is_progress_bar_enabled()
        assert are_progress_bars_disabled()
    assert bars.is_progress_bar_enabled() is is_on
    assert are_progress_bars_disabled() is not is_on


def test_python_without_docstrings_is_not_called_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    """With -OO, transformers fails on the docstrings of its own models."""
    monkeypatch.setattr(module, "sys", SimpleNamespace(flags=SimpleNamespace(optimize=2)))
    with (
        pytest.raises(ResourceError, match=r"python -OO: .* Start it without -OO"),
        damage_errors("tiny", trust_remote_code=False),
    ):
        raise ValueError("No `Args` or `Parameters` section is found in the docstring of `BaseModelOutput`.")


def test_a_failure_of_the_device_is_not_called_damage() -> None:
    """bitsandbytes quantises weights on the GPU while they are loaded."""
    with pytest.raises(RuntimeError, match="no kernel image"), damage_errors("tiny", trust_remote_code=False):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")
    with pytest.raises(ConfigError, match="Download or copy it again"), damage_errors("t", trust_remote_code=False):
        raise RuntimeError("shape '[3]' is invalid for input of size 2")
