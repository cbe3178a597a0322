# SPDX-License-Identifier: Apache-2.0
"""Set up the processes of a run: accelerate's ``Accelerator``, seeds, and notes on how they were launched."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from mirrortune.errors import ConfigError, ResourceError, first_line
from mirrortune.system.console import Reporter
from mirrortune.system.devices import default_device, is_set, resolve_precision, why_unused
from mirrortune.system.distributed import deepspeed
from mirrortune.system.distributed.sharding import Sharding

ASKED_VARIABLE = "MIRRORTUNE_NUM_PROCESSES"
"""Environment variable with the number of processes launched by ``--num-processes``; set in each of them."""


def make_accelerator(precision: str, *, has_idle_parameters: bool = False) -> Any:
    """Make accelerate's ``Accelerator`` for this process.

    Args:
        precision: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        has_idle_parameters: some trained parameters may receive no gradient in a step.

    Raises:
        ConfigError: launch settings that the training loop does not support.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs  # noqa: PLC0415  (two seconds to import)
    from accelerate.utils import GradientAccumulationPlugin  # noqa: PLC0415

    is_cpu, resolved = default_device().type == "cpu", resolve_precision(precision)
    has_zero = is_set("ACCELERATE_USE_DEEPSPEED")
    if has_zero and is_cpu:
        raise ResourceError("accelerate launch", "DeepSpeed needs GPUs: accelerate starts it on accelerators only")
    # Frozen buffers are equal on all processes; before each evaluation and save, the Trainer copies trained running
    # statistics from the main one. Broadcasting them would add a collective operation to every forward pass.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=has_idle_parameters, broadcast_buffers=False)
    accelerator = Accelerator(
        mixed_precision="no" if has_zero or resolved == "fp32" else resolved,
        # Without it, accelerate treats each of torchrun's processes on a CPU as a separate run.
        cpu=is_cpu,
        deepspeed_plugin=deepspeed.make_plugin(is_bf16=resolved == "bf16") if has_zero else None,
        kwargs_handlers=[ddp],
        # The training loop accumulates; accelerate would read a value from its config file and divide by it.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    if is_cpu and resolved == "fp16":  # on a CPU accelerate provides neither autocast nor a scaler, but torch does
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
    if has_zero:
        deepspeed.load_whole()
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version != 2:
        raise ConfigError("fsdp_version", f"got {plugin.fsdp_version}", allowed="2")
    if plugin is not None and plugin.cpu_ram_efficient_loading:
        raise ConfigError(
            "fsdp_cpu_ram_efficient_loading",
            "every process must read the weights, to know their singular basis",
            allowed="false",
        )
    asked = os.environ.get(ASKED_VARIABLE)
    if asked and int(asked) != accelerator.num_processes:
        raise ConfigError("--num-processes", f"asked for {asked}, {accelerator.num_processes} took part")
    return accelerator


def read_accelerate_config(path: Path) -> dict[str, Any]:
    """Read an accelerate config file as accelerate does.

    A ``.json`` file is JSON and any other file YAML 1.1, in which an unquoted ``no`` is False, unlike in a recipe.

    Raises:
        ConfigError: accelerate would refuse the file.
    """
    from accelerate.commands.config.config_args import load_config_from_file  # noqa: PLC0415

    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        load_config_from_file(str(path))
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ConfigError(
            str(path),
            f"accelerate cannot read it ({first_line(error)})",
            allowed="a file that `accelerate config` wrote",
        ) from error
    assert isinstance(found, dict)  # accelerate accepts nothing else
    return found


def describe_processes(accelerator: Any, reporter: Reporter, run: Path) -> None:
    """Print the device and the number of processes, and warn of settings that the user may not have chosen."""
    count = accelerator.num_processes
    sharding = Sharding.of(accelerator)
    kind = f" ({'DeepSpeed ' if sharding.stage else ''}{sharding.name})" if sharding.library else ""
    reporter.note(
        f"running on {accelerator.device.type} with {count} process{'es' * (count > 1)}{kind}; writing to {run}"
    )
    if accelerator.device.type == "cpu" and (reason := why_unused()) is not None:
        reporter.note(f"warning: this machine's NVIDIA GPU is not used ({reason})")
    if is_set("ACCELERATE_USE_CPU") and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        reporter.note(
            "warning: accelerate launch --cpu starts one process, whatever --num_processes says; "
            "use mirrortune train --num-processes N"
        )
    if "ACCELERATE_MIXED_PRECISION" in os.environ and ASKED_VARIABLE not in os.environ:
        _warn_of_default_config(reporter)


def seed_everything(seed: int) -> None:
    """Seed every random number generator that a model may use."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (some models draw from the global generator)
    torch.manual_seed(seed)


def _warn_of_default_config(reporter: Reporter) -> None:
    from accelerate.commands.config.config_args import default_config_file  # noqa: PLC0415

    path = Path(default_config_file)
    if not path.is_file() or is_set("ACCELERATE_USE_CPU") or _was_given_config():
        return
    shown = ("distributed_type", "num_processes", "num_machines", "mixed_precision", "gpu_ids")
    found = read_accelerate_config(path)
    values = ", ".join(f"{key} {found[key]}" for key in shown if key in found)
    reporter.note(
        f"warning: without --config_file accelerate launch takes its settings from {path} ({values}); "
        "remove it if that is not what you want"
    )


def _was_given_config() -> bool:
    """Return whether the command line of this process's launcher names a config file."""
    import psutil  # noqa: PLC0415

    try:
        words = [word for parent in psutil.Process().parents() for word in parent.cmdline()]
    except psutil.Error:  # a parent process has ended or may not be inspected
        return False
    return any(word.replace("-", "_").split("=")[0] == "__config_file" for word in words)
