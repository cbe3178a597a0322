# SPDX-License-Identifier: Apache-2.0
"""The run directory: names of its files, the append-only event log, and checkpoints from which a run continues exactly.

A checkpoint is a folder ``checkpoints/step-000500`` with the adapter, ``training.safetensors`` (optimizer moments and
random states) and ``state.json``; it is written under a temporary name and renamed last. No pickle anywhere.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mirrortune.atomic import cannot_write, write_atomically, write_folder_atomically
from mirrortune.errors import ConfigError, VerificationError

STATE_VERSION = 1
_TRAINING, _STATE = "training.safetensors", "state.json"


@dataclass(slots=True, kw_only=True)
class LoopState:
    """Where the loop is; everything besides tensors that an exact continuation needs.

    Attributes:
        global_step: optimizer steps done.
        epoch: epochs done.
        step_in_epoch: optimizer steps done in the current epoch.
        best_metric: best value of the selection metric so far, or None.
        best_step: its step.
        best_metrics: all metrics of that evaluation.
        window_loss, window_items: loss summed since the last log line, and over how many items.
        num_processes: ranks that took part.
    """

    global_step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    best_metric: float | None = None
    best_step: int | None = None
    best_metrics: dict[str, float] | None = None
    window_loss: float = 0.0
    window_items: int = 0
    num_processes: int = 1


class RunDirectory:
    """Paths and files of one run.

    Args:
        path: the folder; made by :meth:`create` once :meth:`check` allows it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.adapter = path / "adapter"
        self.results = path / "results.json"
        self.metrics = path / "metrics.jsonl"
        self.progress_log = path / "progress.jsonl"
        self.validation = path / "validation.json"
        self.checkpoints = path / "checkpoints"

    def check(self, *, overwrite: bool, resume: bool) -> None:
        """Refuse a folder that holds anything, unless it is a run to be resumed or overwritten; changes nothing.

        Raises:
            ConfigError: with the three ways out.
        """
        if resume or not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return
        if not overwrite:
            raise ConfigError(
                str(self.path),
                "the output directory is not empty" if self.path.is_dir() else "it is a file",
                fix="Continue it with --resume, choose another with -o, or replace it with --overwrite",
            )
        if not self.recipe.is_file():
            raise ConfigError(
                "--overwrite", f"{self.path} is no run of ours and is left alone", fix="Choose another with -o"
            )

    def create(self) -> None:
        """Make the folder anew; what :meth:`check` allowed to be overwritten is removed."""
        try:
            if self.path.exists():
                shutil.rmtree(self.path)
            self.checkpoints.mkdir(parents=True)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def write_text(self, name: str, text: str) -> None:
        """Write a small file whole or not at all."""
        write_atomically(self.path / name, lambda p: _write_text(p, text))

    def write_json(self, name: str, data: Any) -> None:
        """Write ``data`` as indented JSON."""
        self.write_text(name, json.dumps(data, indent=2) + "\n")

    def log(self, event: dict[str, Any]) -> None:
        """Append one event to ``metrics.jsonl``."""
        _append(self.metrics, event)

    def log_progress(self, entry: dict[str, Any]) -> None:
        """Append one entry to ``progress.jsonl``."""
        _append(self.progress_log, entry)

    def events(self) -> list[dict[str, Any]]:
        """All events so far; a last line cut short by a crash is dropped."""
        return _lines(self.metrics)

    def progress(self) -> list[dict[str, Any]]:
        """All entries of ``progress.jsonl`` so far, in the same way."""
        return _lines(self.progress_log)

    def rewind_log(self, global_step: int) -> None:
        """Drop events after ``global_step``: the continued run will write them again."""
        kept = [e for e in self.events() if e["step"] <= global_step]
        self.write_text(self.metrics.name, "".join(json.dumps(e) + "\n" for e in kept))

    def checkpoint(self, global_step: int) -> Path:
        """Folder of the checkpoint after ``global_step`` optimizer steps."""
        return self.checkpoints / f"step-{global_step:06d}"

    def saved_steps(self) -> list[int]:
        """Steps of the checkpoints that are whole, ascending (as numbers: step-1000000 comes after step-999999)."""
        folders = self.checkpoints.glob("step-*") if self.checkpoints.is_dir() else []
        return sorted(int(f.name[5:]) for f in folders if f.name[5:].isdigit() and (f / _STATE).is_file())

    def save_checkpoint(
        self, state: LoopState, tensors: dict[str, Tensor], write_adapter_files: Callable[[Path], object]
    ) -> None:
        """Write a checkpoint, then remove all but the best and the last.

        Raises:
            ResourceError: if it cannot be written; earlier checkpoints are intact.
        """

        def write(folder: Path) -> None:
            write_adapter_files(folder)
            save_file(tensors, folder / _TRAINING)
            described = {"format_version": STATE_VERSION, **asdict(state), "python_random": random.getstate()}
            _write_text(folder / _STATE, json.dumps(described) + "\n")

        write_folder_atomically(self.checkpoint(state.global_step), write)
        for step in self.saved_steps():
            if step not in (state.global_step, state.best_step):
                shutil.rmtree(self.checkpoint(step), ignore_errors=True)

    def load_checkpoint(self, global_step: int) -> tuple[LoopState, dict[str, Tensor]]:
        """State and tensors of a checkpoint; sets Python's own random state.

        Raises:
            VerificationError: if a file is missing or damaged.
        """
        folder = self.checkpoint(global_step)
        try:
            described = json.loads((folder / _STATE).read_text(encoding="utf-8"))
            version = described.pop("format_version")
            kind, internal, gauss = described.pop("python_random")
            if version != STATE_VERSION:
                raise ValueError(f"format version {version}")
            random.setstate((kind, tuple(internal), gauss))
            return LoopState(**described), load_file(folder / _TRAINING)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise VerificationError(
                str(folder),
                f"damaged checkpoint ({error})",
                fix=f"Delete {folder.name} to continue from an earlier one",
            ) from error

    def publish_adapter(self, step: int) -> None:
        """Copy the adapter of a checkpoint to ``adapter/``, where eval and merge look for it."""

        def write(folder: Path) -> None:
            for file in self.checkpoint(step).iterdir():
                if file.name not in (_TRAINING, _STATE):  # all else is the adapter's, whose format is not ours to know
                    shutil.copyfile(file, folder / file.name)

        write_folder_atomically(self.adapter, write)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, Tensor]:
    """Optimizer state as tensors: ``optimizer.<parameter>.<entry>``; ``names`` maps id(parameter) to its name."""
    return {
        f"optimizer.{names[id(parameter)]}.{entry}": value.detach().cpu().contiguous()
        for parameter, state in optimizer.state.items()
        for entry, value in state.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, names: dict[int, str], tensors: dict[str, Tensor]) -> None:
    """Inverse of :func:`optimizer_tensors`, onto each parameter's device (AdamW keeps its step counts on the CPU)."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            prefix = f"optimizer.{names[id(parameter)]}."
            entries = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            for entry, value in entries.items():
                device = value.device if entry == "step" else parameter.device
                optimizer.state[parameter][entry] = value.to(device)


def random_tensors() -> dict[str, Tensor]:
    """Random states of this process: torch on CPU and GPU, and NumPy's global one (some models draw from it)."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    states = {
        "torch": torch.get_rng_state(),
        "numpy.keys": torch.from_numpy(np.asarray(keys, dtype=np.uint32).view(np.int32).copy()),
        "numpy.rest": torch.tensor([position, has_gauss, gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random(states: dict[str, Tensor]) -> None:
    """Inverse of :func:`random_tensors`."""
    torch.set_rng_state(states["torch"])
    position, has_gauss, gauss = states["numpy.rest"].tolist()
    keys = states["numpy.keys"].numpy().view(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))  # noqa: NPY002
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _append(path: Path, entry: dict[str, Any]) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
    except OSError as error:
        raise cannot_write(path, error) from error


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
