# SPDX-License-Identifier: Apache-2.0
"""The run directory: names of its files, the append-only event log, and checkpoints from which a run continues exactly.

A checkpoint is a folder ``checkpoints/step-000500`` with the adapter, ``training.safetensors`` (optimizer moments and
random states), ``state.json``, and ``SHA256SUMS`` of them all (``sha256sum -c`` reads it); it is written under a
temporary name and renamed last. No pickle anywhere.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mirrortune.errors import ConfigError, ResourceError, VerificationError
from mirrortune.system.atomic import (
    MARKER,
    cannot_write,
    clear_leftovers,
    discard,
    place_of_replaced,
    write_atomically,
    write_folder_atomically,
)
from mirrortune.system.claims import claimed
from mirrortune.system.outputs import (
    RUN,
    Input,
    Marker,
    check_place,
    holds_nothing,
    may_replace,
    put_back,
    read_marker,
    settle,
    write_marker,
)

STATE_VERSION = 2
_TRAINING, _STATE, _SUMS = "training.safetensors", "state.json", "SHA256SUMS"


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
        evaluations_since_best: evaluations in a row that were no better.
        owes_evaluation: whether the evaluation that is due after ``global_step`` was cut short by a signal.
        is_interim: whether the checkpoint was saved for a signal alone; the next one replaces it.
        window_loss, window_items: loss summed since the last log line, and over how many items.
        num_processes: ranks that took part.
        places: where each of them was in its share of streamed rows; None for rows that are not.
        skipped_steps: steps so far that were left out because gradients overflowed in float16.
        skipped_in_a_row: the latest of them, without a step that was made after them.
    """

    global_step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    best_metric: float | None = None
    best_step: int | None = None
    best_metrics: dict[str, float] | None = None
    evaluations_since_best: int = 0
    owes_evaluation: bool = False
    is_interim: bool = False
    window_loss: float = 0.0
    window_items: int = 0
    num_processes: int = 1
    places: list[dict[str, int]] | None = None
    skipped_steps: int = 0
    skipped_in_a_row: int = 0


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
        self.samples = path / "samples.jsonl"
        self.validation = path / "validation.json"
        self.checkpoints = path / "checkpoints"
        self.status = path / "status.json"

    @property
    def is_run(self) -> bool:
        """Whether the folder is a run that :meth:`create` made, and holds an adapter."""
        return self.is_marked and (self.adapter / "adapter.json").is_file()

    def check(self, inputs: Sequence[Input] = (), *, overwrite: bool, resume: bool) -> None:
        """Refuse a folder that holds anything, unless it is a run to be resumed or overwritten; changes nothing.

        Args:
            inputs: what the run reads; a run that is resumed may be started by its own recipe.
            overwrite: replace the run that is there.
            resume: continue the run that is there.

        Raises:
            ConfigError: with the ways out.
        """
        if not resume:
            may_replace(self.path, inputs, RUN, overwrite=overwrite)
            return
        self._check_place(inputs, resume=True)
        if not self.is_marked:
            lost = (self.adapter / "adapter.json").is_file() or self.checkpoints.is_dir()
            problem = f": there is no {MARKER}, by which a run is known" if lost else ""
            fix = "Copy that file too: cp -r copies it with its folder, FOLDER/* leaves it out"
            raise ConfigError(
                "--resume", f"{self.path} holds no run{problem}", fix=fix if lost else "Start it without --resume"
            )
        if linked := next(self._linked(), None):  # what it leads to would be replaced or deleted
            problem = f"{linked} is a symbolic link to {linked.readlink()}"
            raise ConfigError("--resume", problem, fix="Put the folder itself there")

    @contextmanager
    def held(self, inputs: Sequence[Input], *, overwrite: bool, resume: bool) -> Iterator[None]:
        """Claim the folder and refuse what :meth:`check` refuses. A run that is to be replaced is put back if the block
        ends before the new one has a checkpoint.

        Raises:
            ConfigError: what :meth:`check` raises, or another process writes there.
        """
        self._check_place(inputs, resume=resume)
        with claimed(self.path):
            settle(self.path)
            self.check(inputs, overwrite=overwrite, resume=resume)
            try:
                yield
            finally:
                self.give_way()

    def create(self, inputs: Sequence[Input] = (), *, overwrite: bool = False) -> None:
        """Make the folder, after another :meth:`check`: loading may have taken hours. A run that is overwritten is set
        aside until the first checkpoint of the new one is saved.

        Raises:
            ConfigError: what :meth:`check` raises.
            ResourceError: the folder cannot be made.
        """
        self.check(inputs, overwrite=overwrite, resume=False)
        try:
            replaces = not holds_nothing(self.path, RUN)
            mode = self.path.stat().st_mode if replaces else None
            if replaces:
                self.path.rename(place_of_replaced(self.path))
            self.path.mkdir(parents=True, exist_ok=True)
            if mode is not None:  # which may be private
                self.path.chmod(self.path.stat().st_mode & stat.S_IMODE(mode))
            self.clear_leftovers()
            write_marker(self.path, Marker(RUN.name, frozenset(), is_pending=replaces))
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    @property
    def is_marked(self) -> bool:
        """Whether the folder is a run that :meth:`create` made."""
        marker = read_marker(self.path)
        return marker is not None and marker.kind == RUN.name

    def take_place(self) -> None:
        """Delete the run that this one replaces, now that this one can be continued by itself."""
        marker = read_marker(self.path)
        if marker is None or not marker.is_pending:
            return
        write_marker(self.path, Marker(RUN.name, marker.files))
        old = place_of_replaced(self.path)
        replaced = read_marker(old)
        if replaced is not None:
            discard(old, is_ours=replaced.owns, into=self.path)

    def give_way(self) -> None:
        """Put the run back that this one was to replace, if this one ends before :meth:`take_place`."""
        marker = read_marker(self.path)
        if marker is not None and marker.is_pending:
            put_back(self.path)

    def write_text(self, name: str, text: str) -> None:
        """Write a small file whole or not at all."""
        self.write_file(name, lambda p: _write_text(p, text))

    def write_file(self, name: str, write: Callable[[Path], None]) -> None:
        """Write a file whole or not at all, and list it among the run's own.

        Args:
            name: path below the run's folder.
            write: given a temporary path, writes the content.

        Raises:
            ResourceError: it cannot be written, or its folder is a link to another.
        """
        folder = (self.path / name).parent
        if folder != self.path and folder.is_symlink():
            raise cannot_write(self.path / name, OSError(errno.ELOOP, "its folder is a symbolic link"))
        marker = read_marker(self.path)
        if marker is not None and not marker.owns(name):
            write_marker(self.path, Marker(marker.kind, marker.files | {name}, is_pending=marker.is_pending))
        write_atomically(self.path / name, write)

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

    def sampled(self) -> list[dict[str, Any]]:
        """All entries of ``samples.jsonl`` so far."""
        return _lines(self.samples)

    def rewind_log(self, global_step: int, *, owes_evaluation: bool = False) -> None:
        """Drop what the continued run writes again: events after ``global_step``, and the evaluation that it owes.

        A run that is continued from step 0 begins anew, with its evaluation before the first step.
        """
        kept = [
            e
            for e in self.events()
            if e["step"] < global_step
            or (e["step"] == global_step > 0 and not (owes_evaluation and e["event"] == "evaluate"))
        ]
        self.write_text(self.metrics.name, "".join(json.dumps(e) + "\n" for e in kept))

    def clear_leftovers(self) -> None:
        """Remove what a save that was killed has left, and put back what it had set aside."""
        marker = read_marker(self.path) or Marker(RUN.name, frozenset())
        for below in ("", "checkpoints/", "reports/"):
            clear_leftovers(self.path / below, lambda name, below=below: marker.owns(below + name))  # type: ignore[misc]

    def checkpoint(self, global_step: int) -> Path:
        """Folder of the checkpoint after ``global_step`` optimizer steps."""
        return self.checkpoints / f"step-{global_step:06d}"

    def saved_steps(self) -> list[int]:
        """Steps of the checkpoints that are whole, ascending (as numbers: step-1000000 comes after step-999999)."""
        folders = self.checkpoints.glob("step-*") if self.checkpoints.is_dir() else []
        return sorted(int(f.name[5:]) for f in folders if f.name[5:].isdigit() and (f / _STATE).is_file())

    def save_checkpoint(
        self,
        state: LoopState,
        tensors: dict[str, Tensor],
        write_adapter_files: Callable[[Path], object],
        *,
        keep: int = 1,
    ) -> None:
        """Write a checkpoint, then remove all but the best and the last ``keep``.

        Raises:
            ResourceError: if it cannot be written; says which earlier checkpoint is intact.
        """

        def write(folder: Path) -> None:
            write_adapter_files(folder)
            save_file(tensors, folder / _TRAINING)
            described = {"format_version": STATE_VERSION, **asdict(state), "python_random": random.getstate()}
            _write_text(folder / _STATE, json.dumps(described) + "\n")
            digests = {file.name: _sha256(file) for file in sorted(folder.iterdir())}
            _write_text(folder / _SUMS, _sums(digests))

        try:
            write_folder_atomically(self.checkpoint(state.global_step), write, is_ours=_is_in_checkpoint)
        except ResourceError as error:
            raise self._with_last_intact(error) from error
        self.take_place()
        # What was saved for a signal alone does not count: with it or without, the same steps are kept in the end.
        others = [s for s in self.saved_steps() if s != state.global_step]
        regular = [s for s in others if not self._is_interim(s)]
        kept = {state.best_step, *(regular[-(keep - 1) :] if keep > 1 else [])}
        for step in others:
            if step not in kept:
                self._remove_checkpoint(step)

    def remove_checkpoints(self) -> None:
        """Delete all checkpoints of a finished run, and nothing else that lies among them."""
        if self.is_marked and not self.checkpoints.is_symlink():
            for step in self.saved_steps():
                self._remove_checkpoint(step)
            discard(self.checkpoints, is_ours=lambda below: RUN.reserves(f"checkpoints/{below}"))

    def load_checkpoint(self, global_step: int) -> tuple[LoopState, dict[str, Tensor]]:
        """State and tensors of a checkpoint; sets Python's own random state.

        Raises:
            VerificationError: if a file is missing or not the one that was saved; names the checkpoint before it.
        """
        folder = self.checkpoint(global_step)
        try:
            _check_sums(folder)
            described = json.loads(read_text(folder / _STATE))
            version = described.pop("format_version")
            kind, internal, gauss = described.pop("python_random")
            if version != STATE_VERSION:
                raise ValueError(f"format version {version}")
            random.setstate((kind, tuple(internal), gauss))
            return LoopState(**described), load_file(folder / _TRAINING)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            earlier = [s for s in self.saved_steps() if s < global_step]
            raise VerificationError(
                str(folder),
                f"damaged checkpoint ({error})",
                fix=f"Delete it to continue from {self.checkpoint(earlier[-1]).name}"
                if earlier
                else "There is no earlier one: start again with --overwrite",
            ) from error

    def publish_adapter(self, step: int) -> None:
        """Copy the adapter of a checkpoint to ``adapter/``, where eval and merge look for it."""

        def write(folder: Path) -> None:
            for file in self.checkpoint(step).iterdir():
                if file.name not in (_TRAINING, _STATE, _SUMS):  # all else is the adapter's, whose format is its own
                    shutil.copyfile(file, folder / file.name)

        write_folder_atomically(self.adapter, write, is_ours=lambda below: RUN.reserves(f"adapter/{below}"))

    def _remove_checkpoint(self, step: int) -> None:
        folder = self.checkpoint(step)
        if folder.is_symlink() or self.checkpoints.is_symlink():  # made meanwhile, by an unknown process
            return
        (folder / _STATE).unlink(missing_ok=True)  # first: a checkpoint that is half removed does not count
        discard(folder, is_ours=_is_in_checkpoint)

    def _with_last_intact(self, error: ResourceError) -> ResourceError:
        """The error, with the newest checkpoint that is whole."""
        for step in reversed(self.saved_steps()):
            folder = self.checkpoint(step)
            with suppress(OSError, ValueError):
                _check_sums(folder)
                return ResourceError(error.where, error.problem, fix=f"{error.fix}; {folder.name} is intact")
        return error

    def _linked(self) -> Iterator[Path]:
        """Yield links in the place of folders and databases into which a run writes."""
        for path in sorted([*self.path.glob("*"), *self.checkpoints.glob("*")]):
            below = path.relative_to(self.path).as_posix()
            if path.is_symlink() and (RUN.reserves(f"{below}/") or below.startswith("mlflow.db")):
                yield path

    def _check_place(self, inputs: Sequence[Input], *, resume: bool) -> None:
        own = os.path.realpath(self.recipe)
        check_place(self.path, [i for i in inputs if not (resume and os.path.realpath(i.path) == own)])

    def _is_interim(self, step: int) -> bool:
        try:
            return bool(json.loads(read_text(self.checkpoint(step) / _STATE))["is_interim"])
        except (OSError, ValueError, KeyError, TypeError):
            return False  # damaged, which whoever loads it will say


def _is_in_checkpoint(below: str) -> bool:
    return RUN.reserves(f"checkpoints/step-0/{below}")


def run_of(adapter: Path) -> RunDirectory | None:
    """The run that an adapter folder is the result of: the folder around it, if that is a run and calls it so. A file
    that merely lies beside an adapter says nothing about it.
    """
    folder = adapter.resolve()
    run = RunDirectory(folder.parent)
    return run if folder.name == run.adapter.name and run.is_run else None


def read_text(path: Path) -> str:
    """Read a file of a run, where a pipe would never end.

    Raises:
        OSError: there is no regular file.
        UnicodeDecodeError: it is not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return path.read_text(encoding="utf-8")


def _append(path: Path, entry: dict[str, Any]) -> None:
    try:
        if path.is_symlink() or (path.exists() and path.stat().st_nlink > 1):  # a backup shares the file
            write_atomically(path, lambda copy: _write_text(copy, path.read_text(encoding="utf-8")))
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


def _check_sums(folder: Path) -> None:
    """OSError or ValueError unless every file of a checkpoint is there as it was saved, and is listed."""
    text = read_text(folder / _SUMS)
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in text.splitlines())}
    if pipe := next((name for name in listed if not (folder / name).is_file()), None):  # reading it would hang
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder / pipe))
    found = {name: _sha256(folder / name) for name in listed}
    for name, digest in found.items():
        if digest != listed[name]:
            raise ValueError(f"{name} is not the file that was saved: its SHA-256 is another")
    if text != _sums(found) or not {_TRAINING, _STATE} <= found.keys():
        raise ValueError(f"{_SUMS} is not the file that was saved")


def _sums(digests: dict[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in digests.items())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_merge(run: RunDirectory, output_dir: str, report: dict[str, Any]) -> None:
    """Note in a run's directory where it was merged to, and how that was verified; other folders are left alone."""
    if run.is_marked and run.results.is_file():
        run.write_json("reports/merge.json", {"output_dir": output_dir, **report})
