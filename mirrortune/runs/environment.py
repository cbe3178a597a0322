# SPDX-License-Identifier: Apache-2.0
"""What a run was made with and on, for ``environment.json``, and how much memory it took."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from typing import Any

import torch

from mirrortune import __version__
from mirrortune.config.recipe import Resolved
from mirrortune.runs.job import Job
from mirrortune.system.devices import peak_resident_bytes, resolve_precision
from mirrortune.system.distributed import deepspeed


def environment(job: Job, resolved: Resolved, accelerator: Any, strategies: dict[str, list[str]]) -> dict[str, Any]:
    """Everything that another machine needs to know to repeat the run, besides the recipe.

    Args:
        job: assembled.
        resolved: its recipe.
        accelerator: of this process.
        strategies: layers by how they compute.
    """
    packages = ["torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "numpy"]
    packages += ["peft"] if job.spec.preset.peft else []
    packages += ["deepspeed"] if deepspeed.stage_of(accelerator) else []
    return {
        "mirrortune": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: metadata.version(name) for name in packages},
        "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type,
        "num_processes": accelerator.num_processes,
        "mixed_precision": "bf16" if resolve_precision(job.recipe.train.precision) == "bf16" else "no",
        "strategies": strategies,
        "seed": job.recipe.train.seed,
        "model": {"name": job.source.name, "revision": job.source.revision, "commit": job.source.commit},
        "data": job.data_origin,
        "argv": sys.argv,
        "origins": resolved.origins,
    }


def peak_memory_bytes() -> int:
    """Most memory in use so far: of the GPU's allocator if there is one, else of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return peak_resident_bytes()
