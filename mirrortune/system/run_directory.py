# SPDX-License-Identifier: Apache-2.0
"""Read and write a run directory: its files, the append-only event log, and checkpoints for exact continuation.

A checkpoint is a folder such as ``checkpoints/step-000500`` with the adapter, ``training.safetensors`` (optimizer
moments and random states), ``state.json``, and ``SHA256SUMS`` of all of them (readable by ``sha256sum -c``). It is
written under a temporary name and renamed when complete. Pickle is never used.
"""

from __future__ import annotations

import errno
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
    write_text_atomically,
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
from mirrortune.system.paths import json_object_or_none, read_json_object, read_text, sha256_of

STATE_VERSION = 2
_TRAINING, _STATE, _SUMS = "training.safetensors", "state.json", "SHA256SUMS"


@dataclass(slots=True, kw_only=True)
class LoopState:
    """The state of the training loop: everything except tensors that an exact continuation needs.

    Attributes:
        global_step: optimizer steps done.
        epoch: epochs completed.
        step_in_epoch: optimizer steps done in the current epoch.
        best_metric: best value of the selection metric so far, or None.
        best_step: step of that value.
        best_metrics: all metrics of that evaluation.
        evaluations_since_best: evaluations since then.
        owes_evaluation: the evaluation due after ``global_step`` was interrupted by a signal.
        is_interim: the checkpoint was saved only because of a signal; the next one replaces it.
        window_loss: loss summed since the last log line.
        window_items: number of items in that sum, or the sum of their weights.
        num_processes: number of ranks.
        places: position of each rank in its share of streamed rows; None if rows are not streamed.
        skipped_steps: steps skipped so far because float16 gradients overflowed.
        skipped_in_a_row: steps skipped since the last step that was not.
        train_seconds: duration of all steps so far, excluding evaluation and saving.
        median_step_seconds: median duration of the steps since the last resumption.
        rows: number of training rows in all steps so far.
        tokens: number of tokens in these rows, without padding; None for rows that are not text.
        num_tokens, num_positions: number of tokens of the first rank's batches so far, without and with padding.
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
    window_items: float = 0.0
    num_processes: int = 1
    places: list[dict[str, Any]] | None = None
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    train_seconds: float = 0.0
    median_step_seconds: float = 0.0
    rows: int = 0
    tokens: int | None = None
    num_tokens: int = 0
    num_positions: int = 0


class RunDirectory:
    """The directory of one run, with the paths of its files.

    Args:
        path: folder; :meth:`create` makes it after :meth:`check`.
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
        """Whether :meth:`create` made the folder and it holds an adapter."""
        return self.is_marked and (self.adapter / "adapter.json").is_file()

    def check(self, inputs: Sequence[Input] = (), *, overwrite: bool, resume: bool) -> None:
        """Check that the folder is empty, or a run that may be resumed or overwritten. Nothing is changed.

        Args:
            inputs: all files and folders that the run reads; a resumed run may read the recipe in its own folder.
            overwrite: replace an existing run.
            resume: continue an existing run.

        Raises:
            ConfigError: the folder may not be used; the error says what to do instead.
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
        if linked := next(self._linked(), None):  # its target would be replaced or deleted
            problem = f"{linked} is a symbolic link to {linked.readlink()}"
            raise ConfigError("--resume", problem, fix="Put the folder itself there")

    @contextmanager
    def held(self, inputs: Sequence[Input], *, overwrite: bool, resume: bool) -> Iterator[None]:
        """Claim the folder while the block runs, after :meth:`check`.

        If the block ends before the new run has a checkpoint, a run that it replaces is restored.

        Raises:
            ConfigError: :meth:`check` fails, or another process writes the run.
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
        """Create the folder after a second :meth:`check`, since loading may have taken hours.

        A run that is overwritten is set aside until the first checkpoint of the new run is saved.

        Raises:
            ConfigError: :meth:`check` fails.
            ResourceError: the folder cannot be created.
        """
        self.check(inputs, overwrite=overwrite, resume=False)
        try:
            replaces = not holds_nothing(self.path, RUN)
            mode = self.path.stat().st_mode if replaces else None
            if replaces:
                self.path.rename(place_of_replaced(self.path))
            self.path.mkdir(parents=True, exist_ok=True)
            if mode is not None:  # keep the old run's permissions, which may be private
                self.path.chmod(self.path.stat().st_mode & stat.S_IMODE(mode))
            self.clear_leftovers()
            write_marker(self.path, Marker(RUN.name, frozenset(), is_pending=replaces))
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    @property
    def is_marked(self) -> bool:
        """Whether :meth:`create` made the folder."""
        marker = read_marker(self.path)
        return marker is not None and marker.kind == RUN.name

    @property
    def is_pending(self) -> bool:
        """Whether the run replaces another one, which is restored unless :meth:`take_place` is called."""
        marker = read_marker(self.path)
        return marker is not None and marker.is_pending

    @property
    def settled(self) -> Path:
        """The folder of the run that :meth:`held` will find: one set aside by a run that was killed too early, or
        ``path``.
        """
        old = place_of_replaced(self.path)
        return old if (self.is_pending or not self.is_marked) and read_marker(old) is not None else self.path

    def take_place(self) -> None:
        """Delete the run that this run replaces, once this run can be continued."""
        marker = read_marker(self.path)
        if marker is None or not marker.is_pending:
            return
        write_marker(self.path, Marker(RUN.name, marker.files))
        old = place_of_replaced(self.path)
        replaced = read_marker(old)
        if replaced is not None:
            discard(old, is_ours=replaced.owns, into=self.path)

    def give_way(self) -> None:
        """Restore the run that this run replaces, if :meth:`take_place` was not called."""
        if self.is_pending:
            put_back(self.path)

    def write_text(self, name: str, text: str) -> None:
        """Write a small text file atomically."""
        self.write_file(name, lambda file: file.write_text(text, encoding="utf-8"))

    def write_file(self, name: str, write: Callable[[Path], object]) -> None:
        """Write a file atomically and list it in the run's marker.

        Args:
            name: path relative to the run directory.
            write: writes the content to the temporary path it is called with.

        Raises:
            ResourceError: the file cannot be written, or its folder is a symbolic link.
        """
        folder = (self.path / name).parent
        if folder != self.path and folder.is_symlink():
            raise cannot_write(self.path / name, OSError(errno.ELOOP, "its folder is a symbolic link"))
        marker = read_marker(self.path)
        if marker is not None and not marker.owns(name):
            write_marker(self.path, Marker(marker.kind, marker.files | {name}, is_pending=marker.is_pending))
        write_atomically(self.path / name, write)

    def write_json(self, name: str, data: Any) -> None:
        """Write ``data`` atomically as indented JSON."""
        self.write_text(name, json.dumps(data, indent=2) + "\n")

    def write_lines(self, name: str, entries: Sequence[dict[str, Any]]) -> None:
        """Write ``entries`` as JSON lines."""
        self.write_text(name, "".join(json.dumps(entry) + "\n" for entry in entries))

    def log(self, event: dict[str, Any]) -> None:
        """Append one event to ``metrics.jsonl``."""
        _append(self.metrics, event)

    def log_progress(self, entry: dict[str, Any]) -> None:
        """Append one entry to ``progress.jsonl``."""
        _append(self.progress_log, entry)

    def events(self) -> list[dict[str, Any]]:
        """Read all events so far; a last line that a crash has truncated is dropped."""
        return _lines(self.metrics)

    def progress(self) -> list[dict[str, Any]]:
        """Read all entries of ``progress.jsonl`` so far, like :meth:`events`."""
        return _lines(self.progress_log)

    def sampled(self) -> list[dict[str, Any]]:
        """Read all entries of ``samples.jsonl`` so far, like :meth:`events`."""
        return _lines(self.samples)

    def rewind_log(self, global_step: int, *, owes_evaluation: bool = False) -> None:
        """Remove the events that a continued run will write again: those after ``global_step`` and an owed evaluation.

        A run that continues from step 0 starts over, including its evaluation before the first step.
        """

        def is_kept(event: dict[str, Any]) -> bool:
            is_owed = owes_evaluation and event["event"] == "evaluate"
            return event["step"] < global_step or (event["step"] == global_step > 0 and not is_owed)

        kept = list(filter(is_kept, self.events()))
        self.write_lines(self.metrics.name, kept)

    def clear_leftovers(self) -> None:
        """Clean up after a save that was killed (see :func:`mirrortune.system.atomic.clear_leftovers`)."""
        marker = read_marker(self.path) or Marker(RUN.name, frozenset())
        for below in ("", "checkpoints/", "reports/"):
            clear_leftovers(self.path / below, lambda name, below=below: marker.owns(below + name))  # type: ignore[misc]

    def checkpoint(self, global_step: int) -> Path:
        """Return the folder of the checkpoint after ``global_step`` optimizer steps."""
        return self.checkpoints / f"step-{global_step:06d}"

    def saved_steps(self) -> list[int]:
        """Return the steps of all complete checkpoints in ascending numeric order."""
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
        """Write a checkpoint, then delete all checkpoints but the best and the last ``keep``.

        Raises:
            ResourceError: the checkpoint cannot be written; the error names the last intact one.
        """

        def write(folder: Path) -> None:
            write_adapter_files(folder)
            save_file(tensors, folder / _TRAINING)
            described = {"format_version": STATE_VERSION, **asdict(state), "python_random": random.getstate()}
            (folder / _STATE).write_text(json.dumps(described) + "\n", encoding="utf-8")
            digests = {file.name: sha256_of(file) for file in sorted(folder.iterdir())}
            (folder / _SUMS).write_text(_sums(digests), encoding="utf-8")

        try:
            write_folder_atomically(self.checkpoint(state.global_step), write, is_ours=_is_in_checkpoint)
        except ResourceError as error:
            raise self._with_last_intact(error) from error
        self.take_place()
        # Interim checkpoints do not count, so that a run keeps the same steps in the end, interrupted or not.
        others = [s for s in self.saved_steps() if s != state.global_step]
        regular = [s for s in others if not self._is_interim(s)]
        kept = {state.best_step, *(regular[-(keep - 1) :] if keep > 1 else [])}
        for step in others:
            if step not in kept:
                self._remove_checkpoint(step)

    def remove_checkpoints(self) -> None:
        """Delete all checkpoints of a finished run; other files in the folder stay."""
        if self.is_marked and not self.checkpoints.is_symlink():
            for step in self.saved_steps():
                self._remove_checkpoint(step)
            discard(self.checkpoints, is_ours=lambda below: RUN.reserves(f"checkpoints/{below}"))

    def load_checkpoint(self, global_step: int) -> tuple[LoopState, dict[str, Tensor]]:
        """Load the state and tensors of a checkpoint, and restore Python's random state.

        Raises:
            VerificationError: a file is missing or has changed; the error names the previous checkpoint.
        """
        folder = self.checkpoint(global_step)
        try:
            _check_sums(folder)
            described = read_json_object(folder / _STATE)
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
                else "There is no earlier one: start over with --overwrite",
            ) from error

    def publish_adapter(self, step: int) -> None:
        """Copy the adapter of a checkpoint to ``adapter/``, from which ``eval`` and ``merge`` read it."""

        def write(folder: Path) -> None:
            for file in self.checkpoint(step).iterdir():
                if file.name not in (_TRAINING, _STATE, _SUMS):  # all others belong to the adapter, in either format
                    shutil.copyfile(file, folder / file.name)

        write_folder_atomically(self.adapter, write, is_ours=lambda below: RUN.reserves(f"adapter/{below}"))

    def _remove_checkpoint(self, step: int) -> None:
        folder = self.checkpoint(step)
        if folder.is_symlink() or self.checkpoints.is_symlink():  # created by another process in the meantime
            return
        (folder / _STATE).unlink(missing_ok=True)  # first, so that a partly deleted checkpoint is not taken for intact
        discard(folder, is_ours=_is_in_checkpoint)

    def _with_last_intact(self, error: ResourceError) -> ResourceError:
        """Add the newest intact checkpoint to the error."""
        for step in reversed(self.saved_steps()):
            folder = self.checkpoint(step)
            with suppress(OSError, ValueError):
                _check_sums(folder)
                return ResourceError(error.where, error.problem, fix=f"{error.fix}; {folder.name} is intact")
        return error

    def _linked(self) -> Iterator[Path]:
        """Yield folders and databases into which the run writes but which are symbolic links."""
        for path in sorted([*self.path.glob("*"), *self.checkpoints.glob("*")]):
            below = path.relative_to(self.path).as_posix()
            if path.is_symlink() and (RUN.reserves(f"{below}/") or below.startswith("mlflow.db")):
                yield path

    def _check_place(self, inputs: Sequence[Input], *, resume: bool) -> None:
        own = os.path.realpath(self.recipe)
        check_place(self.path, [i for i in inputs if not (resume and os.path.realpath(i.path) == own)])

    def _is_interim(self, step: int) -> bool:
        state = json_object_or_none(self.checkpoint(step) / _STATE)  # damage is reported when it is loaded
        return state is not None and bool(state.get("is_interim"))


def _is_in_checkpoint(below: str) -> bool:
    return RUN.reserves(f"checkpoints/step-0/{below}")


def run_of(adapter: Path) -> RunDirectory | None:
    """Return the run that an adapter folder belongs to, or None.

    It belongs to the run in its parent folder if it has the name of the run's adapter folder. Other files beside an
    adapter prove nothing about it.
    """
    folder = adapter.resolve()
    run = RunDirectory(folder.parent)
    return run if folder.name == run.adapter.name and run.is_run else None


def _append(path: Path, entry: dict[str, Any]) -> None:
    try:
        if path.is_symlink() or (path.exists() and path.stat().st_nlink > 1):  # a backup may share the file
            write_text_atomically(path, path.read_text(encoding="utf-8"))
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
    except OSError as error:
        raise cannot_write(path, error) from error


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    found: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break
        except RecursionError:
            entry = None
        if not isinstance(entry, dict):
            raise VerificationError(
                str(path), f"damaged, line {len(found) + 1} is no object", fix="Restore the run directory"
            )
        found.append(entry)
    return found


def _check_sums(folder: Path) -> None:
    """Check that a checkpoint holds exactly the listed files with their recorded SHA-256 sums.

    Raises:
        OSError, ValueError: it does not.
    """
    text = read_text(folder / _SUMS)
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in text.splitlines())}
    if pipe := next((name for name in listed if not (folder / name).is_file()), None):  # reading a pipe would block
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder / pipe))
    found = {name: sha256_of(folder / name) for name in listed}
    for name, digest in found.items():
        if digest != listed[name]:
            raise ValueError(f"{name} is not the file that was saved: its SHA-256 is another")
    if text != _sums(found) or not {_TRAINING, _STATE} <= found.keys():
        raise ValueError(f"{_SUMS} is not the file that was saved")


def _sums(digests: dict[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in digests.items())


def record_merge(run: RunDirectory, output_dir: str, report: dict[str, Any]) -> None:
    """Record in a run directory where the run was merged to and how the merge was verified.

    A folder that is not a run directory is not changed.
    """
    if run.is_marked and run.results.is_file():
        run.write_json("reports/merge.json", {"output_dir": output_dir, **report})
