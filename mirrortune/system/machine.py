# SPDX-License-Identifier: Apache-2.0
"""Describe this machine for a bug report: versions, devices, caches, and which features run here.

The description contains no user name, host name or token, so that it can be posted in public.
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import importlib.util
import os
import platform
import re
import shutil
import socket
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mirrortune import __version__
from mirrortune.errors import MirrortuneError, first_line
from mirrortune.system.compiler import check_compiler
from mirrortune.system.devices import (
    bfloat16_slowdown,
    check_attention,
    default_device,
    has_bf16,
    num_cores,
    resolve_precision,
    why_unused,
)
from mirrortune.system.paths import cache_folder

_PACKAGES = (
    "torch", "transformers", "accelerate", "datasets", "tokenizers", "huggingface-hub", "safetensors", "numpy", "scipy",
    "scikit-learn", "pyarrow", "peft", "bitsandbytes", "flash-attn", "triton", "deepspeed", "trl", "seqeval",
    "rouge-score", "sacrebleu", "soundfile", "gguf", "schedulefree", "tensorboard",
)  # fmt: skip
_VARIABLES = (
    "HF_HUB_OFFLINE", "HF_HOME", "HF_HUB_CACHE", "MIRRORTUNE_CACHE", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF",
    "OMP_NUM_THREADS", "ACCELERATE_USE_CPU", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED",
    "TOKENIZERS_PARALLELISM", "MIRRORTUNE_DEVICE_MEMORY",
)  # fmt: skip
"""Environment variables that affect results or speed; none of them holds a secret."""


def describe_machine() -> dict[str, Any]:
    """Return versions, devices, caches and abilities as JSON data.

    Returns:
        ``mirrortune``, ``python`` and ``platform`` (versions); ``packages`` (version by name, None if not installed);
        ``devices``; ``precision`` (the choice of ``auto``); ``abilities`` (see :func:`abilities`); ``caches`` (with
        free space in bytes, and whether they can be written); ``hub_token`` (whether one is stored); ``environment``
        (variables that are set).
    """
    return {
        "mirrortune": __version__,
        "python": platform.python_version(),
        "platform": without_names(platform.platform()),
        "packages": {name: _version(name) for name in _PACKAGES},
        "devices": [_cpu(), *_accelerators()],
        "precision": resolve_precision("auto"),
        "abilities": abilities(),
        "caches": {name: _cache(place) for name, place in _caches().items()},
        "hub_token": _has_token(),
        "environment": {name: without_names(os.environ[name]) for name in _VARIABLES if name in os.environ},
    }


def abilities() -> dict[str, str]:
    """Return what this machine can do, by name: "yes" with a remark, or "no" with the reason."""
    device = default_device()
    is_gpu = device.type == "cuda"
    if is_gpu:
        bf16 = "yes" if has_bf16() else "no (this GPU emulates it)"
        fp16 = "yes"
    else:
        slowdown = bfloat16_slowdown() if device.type == "cpu" else 1.0
        bf16 = "yes" if slowdown < 1 else f"slow ({slowdown:.1f} times as long as fp32)"
        fp16 = "no (untested on MPS)" if device.type == "mps" else "slow (a CPU has no units for it)"
    return {
        "bf16": bf16,
        "fp16": fp16,
        "flash attention": _allowed(lambda: check_attention("flash_attention_2", device)),
        "8-bit and 4-bit weights": _has("bitsandbytes", "mirrortune[quantised]"),
        "torch.compile": _allowed(lambda: check_compiler(device)),
        "several GPUs": f"yes ({torch.cuda.device_count()})" if torch.cuda.device_count() > 1 else "no",
        "PEFT's tuners": _has("peft", "mirrortune[peft]"),
    }


def without_names(text: str) -> str:
    """Replace the home folder in a text by ``~``, and the names of the user and the host by ``USER`` and ``HOST``."""
    home = str(Path.home())
    if len(home) > 1:
        text = re.sub(rf"{re.escape(home)}(?![^/\\:;,])", "~", text)
    for name, word in ((_user(), "USER"), (socket.gethostname(), "HOST")):
        if name:
            text = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", word, text)
    return text


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # in a container, the user id may have no name
        return ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _has(module: str, extra: str) -> str:
    return "yes" if importlib.util.find_spec(module) else f"no (pip install '{extra}')"


def _allowed(check: Callable[[], object]) -> str:
    try:
        check()
    except MirrortuneError as error:
        return f"no ({error.problem})"
    return "yes"


def _cpu() -> dict[str, Any]:
    import psutil  # noqa: PLC0415

    memory = psutil.virtual_memory()
    return {
        "kind": "cpu", "name": platform.machine(), "cores": num_cores(), "threads": torch.get_num_threads(),
        "memory_bytes": memory.total, "free_bytes": memory.available,
    }  # fmt: skip


def _accelerators() -> list[dict[str, Any]]:
    if torch.backends.mps.is_available():
        return [{"kind": "mps", "name": "Apple GPU"}]
    if (reason := why_unused()) is not None:
        return [{"kind": "cuda", "name": "NVIDIA GPU", "problem": f"not used ({reason})"}]
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        device: dict[str, Any] = {"kind": "cuda", "name": torch.cuda.get_device_name(index)}
        device |= {"capability": f"{major}.{minor}", "runtime": torch.version.cuda or torch.version.hip}
        try:
            free, total = torch.cuda.mem_get_info(index)
            found.append({**device, "memory_bytes": total, "free_bytes": free})
        except RuntimeError as error:  # it is full, broken, or another process has it for itself
            found.append({**device, "problem": first_line(error)})
    return found


@functools.cache
def _caches() -> dict[str, Path]:
    from datasets import config as data_sets  # noqa: PLC0415
    from huggingface_hub import constants  # noqa: PLC0415

    return {
        "mirrortune": cache_folder(),
        "models": Path(constants.HF_HUB_CACHE),
        "data sets": Path(data_sets.HF_DATASETS_CACHE),
    }


def _cache(folder: Path) -> dict[str, Any]:
    # os.path, because pathlib raises an error for a folder that may not be looked into.
    place = next((p for p in (folder, *folder.parents) if os.path.exists(p)), None)  # noqa: PTH110
    free = None
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(place).free if place else None
    return {
        "path": without_names(str(folder)),
        "exists": os.path.isdir(folder),  # noqa: PTH112
        "writable": place is not None and os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK),  # noqa: PTH112
        "free_bytes": free,
    }


def _has_token() -> bool:
    from huggingface_hub import get_token  # noqa: PLC0415

    return get_token() is not None
