# SPDX-License-Identifier: Apache-2.0
"""Save and restore the state of a training loop: adapter, optimizer and random states."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mirrortune.adapters.files.adapter_file import read_adapter
from mirrortune.adapters.files.load import restore_into
from mirrortune.adapters.inject import adapter_parameters, plain_parameters, trained_buffers
from mirrortune.errors import ConfigError
from mirrortune.system.devices import uses_cuda
from mirrortune.system.distributed import sharding, sync
from mirrortune.system.distributed.sharding import whole_parameters
from mirrortune.system.run_directory import LoopState, RunDirectory
from mirrortune.training.optim import averaged_weights
from mirrortune.training.step import Update

_OF_GROUPS = ("k", "weight_sum", "lr_max")
"""Entries that schedule-free keeps in a parameter group."""


class Snapshots:
    """Saves and restores the checkpoints of a loop.

    Args:
        model: adapted model, not wrapped for distribution.
        optimizer: optimizer of the trained parameters of ``model``; under DeepSpeed, that of DeepSpeed.
        accelerator: accelerate's ``Accelerator``.
        run: directory of the checkpoints.
        write_adapter_files: writes the adapter into a folder.
        keep: number of latest checkpoints to keep in addition to the best.
        update: applies the steps; its state, if any, is saved as well.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        accelerator: Any,
        *,
        run: RunDirectory,
        write_adapter_files: Callable[[Path], object],
        keep: int,
        update: Update,
    ) -> None:
        self.model, self.optimizer, self.accelerator = model, optimizer, accelerator
        self.run, self.write_adapter_files, self.keep = run, write_adapter_files, keep
        self.update = update
        self.last_step = 0
        self._trained = {**adapter_parameters(model), **plain_parameters(model)}

    def save(self, state: LoopState, *, is_interim: bool = False) -> None:
        """Write a checkpoint. Collective.

        Args:
            state: state of the loop.
            is_interim: the checkpoint is saved only because the run stops here.

        Raises:
            ResourceError: the checkpoint cannot be written.
        """
        index = self.accelerator.process_index
        own = [(f"random.{index}.{name}", tensor) for name, tensor in random_tensors().items()]
        tensors = optimizer_tensors(self.optimizer, self._trained) | dict(sync.gather_lists(self.accelerator, own))
        tensors |= self.update.tensors()
        state.is_interim = is_interim
        with averaged_weights(self.optimizer) as points, whole_parameters(self.model):
            tensors |= {f"point.{n}": points[id(p)].cpu() for n, p in self._trained.items() if id(p) in points}
            sync.from_main(
                self.accelerator,
                lambda: self.run.save_checkpoint(state, tensors, self.write_adapter_files, keep=self.keep),
            )
        self.last_step = state.global_step

    def restore(self) -> LoopState | None:
        """Restore the newest checkpoint and rewind the log; return its state, or None without a checkpoint.

        Raises:
            ConfigError: the checkpoint was written by a different number of processes.
            VerificationError: the checkpoint is damaged, or was trained in another basis.
        """
        sync.from_main(self.accelerator, self.run.clear_leftovers)
        steps = self.run.saved_steps()
        if not steps:
            sync.from_main(self.accelerator, lambda: self.run.rewind_log(0))
            return None
        state, tensors = self.run.load_checkpoint(steps[-1])
        count = self.accelerator.num_processes
        if state.num_processes != count:
            raise ConfigError(
                "--resume",
                f"the checkpoint is of {state.num_processes} processes, this run has {count}",
                fix=f"Launch {state.num_processes} processes",
            )
        folder = self.run.checkpoint(steps[-1])
        with whole_parameters(self.model, write_back=True):
            restore_into(self.model, read_adapter(folder))
        restore_optimizer(self.optimizer, self._trained, tensors)
        self.update.restore(tensors)
        with torch.no_grad():
            for name, parameter in self._trained.items():
                if (point := tensors.get(f"point.{name}")) is not None:
                    parameter.copy_(point)
        prefix = f"random.{self.accelerator.process_index}."
        restore_random({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        self.last_step = state.global_step
        owes = state.owes_evaluation
        sync.from_main(self.accelerator, lambda: self.run.rewind_log(state.global_step, owes_evaluation=owes))
        return state


class FrozenBuffers:
    """The buffers that a checkpoint of the base would hold and that are not trained, such as a codebook or a counter.

    Some modules change theirs in training. No adapter holds them, so they get their values back after every step.

    Args:
        model: adapted model, on its device.
    """

    def __init__(self, model: nn.Module) -> None:
        trained = {id(tensor) for tensor in trained_buffers(model).values()}
        self._kept: list[tuple[dict[str, Tensor | None], str, Tensor, Tensor]] = []
        for module in model.modules():
            own, left_out = module._buffers, module._non_persistent_buffers_set  # noqa: SLF001
            for name, tensor in own.items():
                if tensor is None or name in left_out or id(tensor) in trained:
                    continue
                if tensor.is_floating_point() or tensor.numel() == 1:  # others are quantised weights, which are large
                    self._kept.append((own, name, tensor, tensor.detach().clone()))
        self._versions = [tensor._version for _, _, tensor, _ in self._kept]  # noqa: SLF001

    @torch.no_grad()
    def restore(self) -> None:
        """Give every buffer that has been replaced or written to its value back."""
        for index, (own, name, tensor, value) in enumerate(self._kept):
            if own[name] is not tensor or tensor._version != self._versions[index]:  # noqa: SLF001
                tensor.copy_(value)
                own[name], self._versions[index] = tensor, tensor._version  # noqa: SLF001


def optimizer_tensors(optimizer: Any, trained: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the optimizer state of ``trained`` (parameters by name) as tensors ``optimizer.<parameter>.<entry>``."""
    states = sharding.optimizer_states(optimizer, trained)
    found = {f"optimizer.{name}.{entry}": value for name, state in states.items() for entry, value in state.items()}
    for index, group in enumerate(optimizer.param_groups):
        found |= {
            f"group.{index}.{key}": torch.tensor(group[key], dtype=torch.float64) for key in _OF_GROUPS if key in group
        }
    return found


def restore_optimizer(optimizer: Any, trained: Mapping[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
    """Restore what :func:`optimizer_tensors` returned, on the device of each parameter."""
    states: dict[str, dict[str, Tensor]] = {}
    for name in trained:
        prefix = f"optimizer.{name}."
        if entries := {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}:
            states[name] = entries
    sharding.restore_states(optimizer, trained, states)
    for index, group in enumerate(optimizer.param_groups):
        for key in _OF_GROUPS:
            if (value := tensors.get(f"group.{index}.{key}")) is not None:
                group[key] = type(group[key])(value.item())


def random_tensors() -> dict[str, Tensor]:
    """Return the random states of this process: torch's on CPU and GPU, and NumPy's global one (some models use it)."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    states = {
        "torch": torch.get_rng_state(),
        "numpy.keys": torch.from_numpy(np.asarray(keys, dtype=np.uint32).view(np.int32).copy()),
        "numpy.rest": torch.tensor([position, has_gauss, gauss], dtype=torch.float64),
    }
    if uses_cuda():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Restore all random states after the block, because some models draw random numbers even in evaluation mode."""
    drawn, python_drawn = random_tensors(), random.getstate()
    try:
        yield
    finally:
        restore_random(drawn)
        random.setstate(python_drawn)


def restore_random(states: dict[str, Tensor]) -> None:
    """Restore what :func:`random_tensors` returned."""
    torch.set_rng_state(states["torch"])
    position, has_gauss, gauss = states["numpy.rest"].tolist()
    keys = states["numpy.keys"].numpy().view(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))  # noqa: NPY002
    if "cuda" in states and uses_cuda():
        torch.cuda.set_rng_state(states["cuda"])
