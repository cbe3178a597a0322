# SPDX-License-Identifier: Apache-2.0
"""Run a command in several processes on this machine with accelerate's launcher (``train --num-processes``).

On a CPU, accelerate ignores ``--num_processes`` and starts one process unless ``--multi_gpu`` is also given; every
process therefore checks how many were started.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mirrortune.errors import ConfigError, MirrortuneError, ResourceError, unknown_name
from mirrortune.system.distributed import deepspeed
from mirrortune.system.distributed.processes import ASKED_VARIABLE, read_accelerate_config
from mirrortune.system.paths import child_environment, local_path
from mirrortune.system.signals import ends_as

_FOLDER = Path(__file__).parent / "profiles"
_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
# Time to save the last checkpoint before the launcher kills its processes; torch's default is 30 seconds.
_SECONDS_TO_SAVE = "600"


def launch(words: Sequence[str], *, num_processes: int | None, profile: str | None) -> int:
    """Run ``mirrortune WORDS`` in several processes and wait for them.

    Args:
        words: command-line arguments.
        num_processes: number of processes; by default that of the profile, or the number of GPUs.
        profile: name of a shipped profile or path of an accelerate config file; ``ddp`` by default.

    Returns:
        The exit code of the processes.

    Raises:
        ConfigError: the profile is unknown or not valid, or DeepSpeed is not installed; nothing was started.
        ResourceError: this machine has too few GPUs; nothing was started.
    """
    import torch  # noqa: PLC0415

    from mirrortune.system.devices import num_cores  # noqa: PLC0415

    path = find_profile(profile or "ddp")
    config = read_accelerate_config(path)
    gpus = torch.cuda.device_count()
    on_cpu = bool(config.get("use_cpu")) or gpus == 0
    count = num_processes or config.get("num_processes") or max(1, gpus)
    if on_cpu and config.get("distributed_type") != "MULTI_GPU":
        raise ResourceError(
            "--accelerate-config",
            f"{path.stem} needs GPUs: accelerate shards on accelerators only",
            fix="Use ddp or cpu-2 here",
        )
    if config.get("distributed_type") == "DEEPSPEED":
        deepspeed.check_installed()
    if not on_cpu and count > gpus and config.get("num_machines", 1) == 1:
        raise ResourceError("--num-processes", f"got {count}, this machine has {gpus} GPUs", allowed=f"1 to {gpus}")
    threads = os.environ.get("OMP_NUM_THREADS") or max(1, num_cores() // count)
    os.environ[ASKED_VARIABLE] = str(count)
    os.environ.update(child_environment())
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _SECONDS_TO_SAVE)
    if on_cpu:
        os.environ.update(ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES="")
    options = ["--config_file", str(path), "--num_processes", str(count), "--main_process_port", "0"]
    options += ["--num_cpu_threads_per_process", str(threads), "--module"]
    return _run_launcher([*options, *(["--multi_gpu"] if on_cpu else []), "mirrortune", *words], count)


def find_profile(name: str) -> Path:
    """Return the path of a shipped profile, or ``name`` if it is a file.

    Raises:
        ConfigError: there is neither; suggests the nearest name.
    """
    shipped = {path.stem: path for path in _FOLDER.glob("*.yaml")}
    path = shipped.get(name, local_path(name))
    if not path.is_file():
        raise unknown_name("--accelerate-config", "profile or file", name, shipped)
    return path


def is_launched() -> bool:
    """Return whether this process was started by :func:`launch`.

    Raises:
        ConfigError: another launcher started it and has chosen the number of processes.
    """
    if ASKED_VARIABLE in os.environ:
        return True
    if "LOCAL_RANK" in os.environ:
        raise ConfigError(
            "--num-processes", "a launcher has started this process already", fix="Give the number to the launcher"
        )
    return False


def _run_launcher(arguments: list[str], count: int) -> int:
    from accelerate.commands.launch import launch_command, launch_command_parser  # noqa: PLC0415
    from torch.distributed.elastic.multiprocessing.api import SignalException  # noqa: PLC0415
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: PLC0415

    given = launch_command_parser().parse_args(arguments)
    given.signals_to_handle = _SIGNALS  # forwarded to torchrun
    logging.disable(logging.CRITICAL)  # the processes report their errors themselves
    try:
        launch_command(given)
    except ChildFailedError as error:
        return _exit_code(error, count)
    except SignalException as error:
        return 128 + ends_as(error.sigval)
    return 0


def _exit_code(error: Any, count: int) -> int:
    """Return the exit code of the first process that failed.

    Raises:
        MirrortuneError: the process was killed by a signal and could not report why.
    """
    rank, failure = error.get_first_failure()
    if failure.exitcode >= 0:
        return int(failure.exitcode)
    name = signal.Signals(-failure.exitcode).name
    raise MirrortuneError(
        f"process {rank} of {count}", f"it was killed by {name}", fix="Look for the out-of-memory killer; then --resume"
    )
