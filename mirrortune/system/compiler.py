# SPDX-License-Identifier: Apache-2.0
"""Compile the model of a training run with torch.compile (``--compile``).

A machine that cannot compile is refused before anything is downloaded.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import Any

import torch
from torch import nn

from mirrortune.errors import ConfigError, ResourceError
from mirrortune.system.distributed.sharding import Sharding

_COMPILERS = ("g++", "clang++", "c++", "cl")


def check_compiler(device: torch.device) -> None:
    """Check that torch.compile has a compiler for ``device``.

    Raises:
        ResourceError: no compiler was found.
    """
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise ResourceError("--compile", "the package triton is missing", fix="Install it, or leave --compile out")
    elif not any(map(shutil.which, (os.environ.get("CXX") or "c++", *_COMPILERS))):
        raise ResourceError(
            "--compile", "no C++ compiler was found", fix="Install g++, name one in CXX, or leave --compile out"
        )


def compile_model(model: nn.Module, accelerator: Any) -> None:
    """Make ``model`` compile its forward and backward passes at their first call.

    The model is changed in place, so parameter names and files stay the same.

    Raises:
        ConfigError: the parameters of the model are sharded.
    """
    if library := Sharding.of(accelerator).library:
        raise ConfigError("--compile", f"it does not work with {library}", fix="Leave --compile out, or use ddp")
    model.compile()
