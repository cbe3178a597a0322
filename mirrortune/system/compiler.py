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
_C_COMPILERS = ("gcc", "clang", "cl")
_OLDEST_OF_TRITON = (7, 0)  # compute capability; torch's inductor refuses older GPUs in the first step


def check_compiler(device: torch.device) -> None:
    """Check that torch.compile has a compiler for ``device``.

    Raises:
        ResourceError: no compiler was found.
    """
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise ResourceError("--compile", "the package triton is missing", fix="Install it, or leave --compile out")
        if not any(map(shutil.which, filter(None, (os.environ.get("CC"), *_C_COMPILERS)))):
            problem = "no C compiler was found, which triton needs"
            raise ResourceError("--compile", problem, fix="Install gcc, name one in CC, or leave --compile out")
        capability = torch.cuda.get_device_capability(device)
        if torch.version.hip is None and capability < _OLDEST_OF_TRITON:
            problem = f"triton has no code for this GPU (compute capability {'.'.join(map(str, capability))})"
            raise ResourceError("--compile", problem, allowed="7.0 or newer", fix="Leave --compile out")
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
