# SPDX-License-Identifier: Apache-2.0
"""Run a comparison: each cell of the grid is a ``mirrortune train`` process, and finished runs are kept."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mirrortune.adapters.fingerprint import sampled_digest
from mirrortune.compare.grid import Cell, Contender, Grid, Score, next_cells, shown_lr, slug
from mirrortune.config import strict_yaml
from mirrortune.config.recipe import Layer, read_recipe, read_saved_recipe, resolve, with_absolute_paths
from mirrortune.config.schema import Recipe
from mirrortune.errors import ConfigError, DataError, InterruptedRun, MirrortuneError, VerificationError
from mirrortune.reports.finished_run import read_json
from mirrortune.runs.adapted_base import load_base
from mirrortune.runs.checks import unpack
from mirrortune.runs.job import Job, assemble
from mirrortune.runs.results import changed_settings, check_same_base, check_same_data
from mirrortune.runs.rows import read_data
from mirrortune.system.atomic import discard, write_text_atomically
from mirrortune.system.claims import claimed
from mirrortune.system.console import Reporter
from mirrortune.system.outputs import (
    COMPARISON,
    RUN,
    Input,
    Marker,
    check_place,
    holds_nothing,
    read_marker,
    settle,
    strangers,
    write_marker,
)
from mirrortune.system.paths import child_environment
from mirrortune.system.run_directory import RunDirectory
from mirrortune.system.run_status import read_status
from mirrortune.system.signals import STOP_SIGNALS, ends_as
from mirrortune.tasks.metrics import METRICS

# Settings that do not affect results: where batches are prepared, the permission to run a model's code, and the method
# of the recipe, since every run has that of its contender.
_FREE = ("train.num_workers", "model.trust_remote_code", "adapter.method")
# Exit codes of a resumed run whose checkpoint is damaged. After any other failure, such as a lack of memory, the
# checkpoint can be continued.
_UNUSABLE = (ConfigError.exit_code, VerificationError.exit_code)


@dataclass(slots=True)
class Comparison:
    """A comparison on disk.

    Args:
        root: folder of the comparison.
        grid: grid of the comparison.
        recipes: recipe of each task.
        reporter: prints progress.
    """

    root: Path
    grid: Grid
    recipes: dict[str, Recipe]
    reporter: Reporter
    _running: list[subprocess.Popen[str]] = field(default_factory=list)
    _stopped: threading.Event = field(default_factory=threading.Event)
    _signal: int = 0

    def contender(self, label: str) -> Contender:
        """Return the method with the given label."""
        return next(c for c in self.grid.contenders if c.label == label)

    def prepare(self, *, report_only: bool = False) -> None:
        """Check every method on every task, read the data once, and write the recipes.

        Args:
            report_only: accept runs on other data, to which none will be added.

        Raises:
            ConfigError: settings of methods are not valid, all reported together; or the folder holds another
                comparison, or runs on other data or another base.
            DataError, HubError, ResourceError: the data or the model cannot be used.
        """
        errors = []
        for task in self.grid.tasks:
            for who in self.grid.contenders:
                try:
                    unpack(self.cell_recipe(Cell(task, who.label, who.first_lrs(task)[0], 0)))
                except ConfigError as error:
                    errors += [ConfigError(f"{task}, {who.label}", line) for line in str(error).split("\n")]
        if errors:
            raise ConfigError.several(errors)
        for task, recipe in self.recipes.items():
            self.reporter.note(f"task {task}")
            job = assemble(unpack(recipe), self.reporter)
            self.recipes[task] = with_test_split(recipe, job)
            self._check_recipe(task)
            self._check_labels(task)
            if not report_only:
                self._check_runs(task, job)
        if read_marker(self.root) is None:
            self.root.mkdir(parents=True, exist_ok=True)
            write_marker(self.root, Marker(COMPARISON.name, frozenset()))
        for task, recipe in self.recipes.items():
            write_text_atomically(self.root / "recipes" / f"{slug(task)}.yaml", recipe.to_yaml())

    def cell_recipe(self, cell: Cell) -> Recipe:
        """Return the complete recipe of a cell."""
        base = Layer(values=strict_yaml.load(self.recipes[cell.task].to_yaml(), cell.task)[0], origin=cell.task)
        values: dict[str, Any] = {}
        for key, value in self._settings(cell).items():
            section, _, name = key.partition(".")
            inner = values.setdefault(section, {})
            *parents, last = name.split(".")
            for parent in parents:
                inner = inner.setdefault(parent, {})
            inner[last] = value
        return resolve([base, Layer(values=values, origin=f"--methods {cell.label}")]).recipe

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """Read ``results.json`` of a cell, or return None if the cell has not finished."""
        return read_json(cell.folder(self.root) / "results.json") or None

    def has_diverged(self, cell: Cell) -> bool:
        """Return whether the training of a cell diverged."""
        return bool(read_status(RunDirectory(cell.folder(self.root))).get("status") == "diverged")

    def score(self, cell: Cell) -> Score | None:
        """Return the score of a cell: -inf if it diverged, None if it has not finished."""
        found = self.result(cell)
        if found is None:
            return (-math.inf, -math.inf) if self.has_diverged(cell) else None
        metric = found["selection_metric"]
        sign = 1 if METRICS[metric].higher_is_better else -1
        score, loss = sign * float(found["metrics"][metric]), -float(found["metrics"]["loss"])
        return (score, loss) if self.grid.choose_by == "score" else (loss, score)

    def run(self, jobs: int) -> None:
        """Run all cells that have not finished, ``jobs`` at a time.

        Raises:
            MirrortuneError: a cell failed for another reason than divergence.
            InterruptedRun: SIGINT, SIGTERM or SIGUSR1 arrived; the next call continues running cells from their
                checkpoints.
        """
        previous = {s: signal.signal(s, self._stop) for s in STOP_SIGNALS}
        try:
            with ThreadPoolExecutor(jobs) as pool:
                try:
                    is_complete = self._run_all(pool, jobs)
                except BaseException:
                    self._stop(signal.SIGTERM)  # before the pool waits for the other cells
                    raise
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        if not is_complete:
            raise InterruptedRun(
                str(self.root), "the comparison was interrupted; finished runs are kept",
                signal_number=ends_as(self._signal), fix="Run the same command again to continue",
            )  # fmt: skip

    def _run_all(self, pool: ThreadPoolExecutor, jobs: int) -> bool:
        """Run cells until the comparison is complete, or return False after a signal."""
        waiting: dict[Future[None], Cell] = {}
        slots = list(range(jobs))
        while not self._stopped.is_set():
            todo = [c for c in next_cells(self.grid, self.score) if c not in waiting.values()]
            if not todo and not waiting:
                return True
            while slots and todo:
                cell, slot = todo.pop(0), slots.pop(0)
                future = pool.submit(self._run_cell, cell, slot, jobs)
                future.add_done_callback(lambda _, slot=slot: slots.append(slot))  # type: ignore[misc]
                waiting[future] = cell
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                cell = waiting.pop(future)
                future.result()
                self.reporter.note(self._describe(cell))
        return False

    def _settings(self, cell: Cell) -> dict[str, Any]:
        who = self.contender(cell.label)
        # Samples cost seconds per run, and are only shown on the page of a single run.
        silent = {"eval.samples": 0} if self.recipes[cell.task].eval.samples is None else {}
        return {**silent, **who.settings, who.lr_key: cell.lr, "train.seed": cell.seed}

    def _run_cell(self, cell: Cell, slot: int, jobs: int) -> None:
        folder = cell.folder(self.root)
        file = folder.parent / f"{folder.name}.yaml"
        write_text_atomically(file, self.cell_recipe(cell).to_yaml())
        has_begun = any((folder / "checkpoints").glob("step-*/state.json"))
        words = ["train", str(file), "-o", str(folder), "-q"]
        if self.recipes[cell.task].model.trust_remote_code:  # must be a flag, because recipes cannot permit it
            words.append("--trust-remote-code")
        code, said = self._command([*words, "--resume"], slot, jobs) if has_begun else (0, "")
        is_useless = code in _UNUSABLE and not self.has_diverged(cell)
        if (is_useless or not has_begun) and not self._stopped.is_set():
            _remove_run(folder)
            code, said = self._command([*words, "--overwrite"], slot, jobs)
        if self._stopped.is_set():
            return
        if code and not self.has_diverged(cell):
            raise _failed(cell, code, said)
        RunDirectory(folder).remove_checkpoints()

    def _command(self, words: Sequence[str], slot: int, jobs: int) -> tuple[int, str]:
        env = {**os.environ, **child_environment(), **_device(slot, jobs)}
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "mirrortune", *words], env=env, text=True, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self._running.append(process)
        if self._stopped.is_set():  # a signal arrived between the last check and the start
            process.send_signal(signal.SIGTERM)
        _, said = process.communicate()
        self._running.remove(process)
        return process.returncode, said.strip()

    def _stop(self, number: int, frame: object = None) -> None:
        self._signal = self._signal or number
        self._stopped.set()
        for process in list(self._running):
            process.send_signal(signal.SIGTERM)

    def _describe(self, cell: Cell) -> str:
        name = f"{cell.task}  {cell.label}  lr {shown_lr(cell.lr)}  seed {cell.seed}"
        found = self.result(cell)
        if found is None:
            return f"{name}: {'diverged' if self.has_diverged(cell) else 'stopped'}"
        metric = found["selection_metric"]
        left = len(next_cells(self.grid, self.score))
        return (
            f"{name}: {metric} {found['metrics'][metric]:.4f}  {found['train_seconds']:.0f} s  ({left} or more to go)"
        )

    def _check_recipe(self, task: str) -> None:
        path = self.root / "recipes" / f"{slug(task)}.yaml"
        if not path.is_file():
            return
        differing = changed_settings(read_saved_recipe(path), self.recipes[task], _FREE)
        if changed := [f"{key} was {was}, is {now}" for key, was, now in differing]:
            raise ConfigError(
                str(self.root),
                f"it holds a comparison of '{task}' with other settings ({path}): {'; '.join(changed)}",
                fix="Choose another folder with -o, or use the same settings",
            )

    def _check_labels(self, task: str) -> None:
        """Check that the runs in the folder of each method have its settings: labels may share the name of a folder."""
        for who in self.grid.contenders:
            folder = self.root / "cells" / slug(task) / slug(who.label)
            expected = strict_yaml.load(
                self.cell_recipe(Cell(task, who.label, who.first_lrs(task)[0], 0)).to_yaml(), task
            )[0]
            for file in sorted(folder.glob("lr-*/seed-*/recipe.yaml")):
                known = read_recipe(str(file)).values
                keys = [key for key in who.settings if key != who.lr_key]  # of which each run has its own
                found = {key: (_setting(known, key), _setting(expected, key)) for key in keys}
                other = [f"{key} is {a!r:.200}, not {b!r:.200}" for key, (a, b) in found.items() if a != b]
                if other:
                    problem = f"{folder} holds runs of another method than '{who.label}': {'; '.join(other)}"
                    fix = "Choose another folder with -o, or write the method in another way"
                    raise ConfigError(str(self.root), problem, fix=fix)

    def _check_runs(self, task: str, job: Job) -> None:
        """Check that the runs of a task were started with its present data and base, as ``train --resume`` does."""
        weights: dict[str, str] = {}
        for who in self.grid.contenders:
            folders = sorted((self.root / "cells" / slug(task) / slug(who.label)).glob("lr-*/seed-*"))
            found = {folder: read_json(folder / "environment.json") for folder in folders}
            facts = {f: [known.get(key) for key in ("mirrortune", "data", "model")] for f, known in found.items()}
            distinct = {json.dumps(own): RunDirectory(folder) for folder, own in facts.items() if any(own)}
            if not distinct:
                continue
            own, own_weights = job, weights
            if any(key.startswith(("data.", "model.", "task.")) for key in who.settings):
                recipe = self.cell_recipe(Cell(task, who.label, who.first_lrs(task)[0], 0))
                own, own_weights = assemble(unpack(recipe), Reporter(verbosity=-1)), {}
            if not own_weights:  # loaded once for all methods that share it
                base = load_base(own)
                own_weights["sampled"] = sampled_digest(base.model, base.targets.head)
            for run in distinct.values():
                where, otherwise = str(run.path), "choose another folder with -o"
                check_same_data(own, run, self.reporter, where=where, otherwise=otherwise)
                check_same_base(own_weights, run, where=where, otherwise=otherwise)


def _remove_run(folder: Path) -> None:
    """Delete the run of a cell that cannot be continued, if there is one and it holds no files of others.

    The new run must not set it aside: if the new run diverged before its first checkpoint, the old one would be
    restored, and the record of the divergence would be lost.
    """
    with claimed(folder):
        settle(folder)
        marker = read_marker(folder)
        if marker is not None and marker.kind == RUN.name and not strangers(folder, marker):
            discard(folder, is_ours=marker.owns)


def _failed(cell: Cell, code: int, said: str) -> MirrortuneError:
    """Return the error for a cell whose process ended with an exit code; ``said`` is what it wrote to stderr."""
    where = f"{cell.task}, {cell.label}, lr {shown_lr(cell.lr)}, seed {cell.seed}"
    if code < 0:  # the process had no chance to say anything
        name = next((s.name for s in signal.Signals if s == -code), f"signal {-code}")
        fix = "Run the same command again to continue, with fewer --jobs if memory ran out"
        error = MirrortuneError(where, f"its process was killed by {name}", fix=fix)
    else:
        # Warnings of libraries may precede the error.
        problem = re.split(r"^error: ", said, flags=re.MULTILINE)[-1]
        error = MirrortuneError(where, problem)
        error.args = (f"{where}: {problem}",)  # which may have several lines
    error.exit_code = code if code > 0 else 128 - code
    return error


@contextmanager
def comparison_folder(root: Path, inputs: Sequence[Input]) -> Iterator[None]:
    """Claim the folder of a new or continued comparison while the block runs.

    Raises:
        ConfigError: the folder holds something else, or another process writes it.
    """
    check_place(root, inputs)
    with claimed(root):
        settle(root)
        marker = read_marker(root)
        if not holds_nothing(root, COMPARISON) and (marker is None or marker.kind != COMPARISON.name):
            problem = "the folder is not empty and holds no comparison"
            raise ConfigError(str(root), problem, fix=COMPARISON.ways_out)
        for pattern in ("recipes", "cells", *(f"cells/{'/'.join('*' * depth)}" for depth in range(1, 5))):
            _refuse_links(root, pattern)
        yield


def _refuse_links(root: Path, pattern: str) -> None:
    """Raise ConfigError for symbolic links to folders, into which cells would be trained; linked files are replaced."""
    for path in sorted(root.glob(pattern)):
        if path.is_symlink() and not path.is_file():
            problem = f"{path} is a symbolic link to {path.readlink()}"
            raise ConfigError(str(root), problem, fix="Put the folder itself there, or choose another with -o")


def _setting(values: Any, key: str) -> Any:
    """Return the setting with a dotted key from nested values, or None."""
    for name in key.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values


def comparable(recipe: Recipe) -> Recipe:
    """Return the part of a task's recipe that all cells share, without output folder and learning rate.

    Paths are absolute.
    """
    train = recipe.train.model_copy(update={"lr": None})
    return with_absolute_paths(recipe).model_copy(update={"output_dir": None, "train": train})


def with_test_split(recipe: Recipe, job: Job) -> Recipe:
    """Return the recipe of a job; if its data has a labelled test split, add it to the reported splits.

    A split whose rows train the model or choose its checkpoint is no test split, whatever its name.
    """
    settings = job.settings
    data, name = read_data(settings.data, settings.task), recipe.data.test_split
    rows = data.find(name)
    used = (recipe.data.train_split, recipe.data.validation_split, *recipe.eval.report_splits)
    if rows is None or any(rows is data.find(split) for split in used):
        return recipe
    try:
        job.task.strata(rows)  # raises if rows lack labels
    except DataError:
        return recipe
    update = recipe.eval.model_copy(update={"report_splits": (*recipe.eval.report_splits, name)})
    return recipe.model_copy(update={"eval": update})


def default_jobs() -> int:
    """Return the number of GPUs that runs use, or 1 if they use none."""
    return max(1, _num_gpus())


def _num_gpus() -> int:
    import torch  # noqa: PLC0415

    from mirrortune.system.devices import uses_cuda  # noqa: PLC0415

    return torch.cuda.device_count() if uses_cuda() else 0


def _device(slot: int, jobs: int) -> dict[str, str]:
    """Return environment variables that give a cell its GPU, if there are several, and its share of the CPU cores."""
    from mirrortune.system.devices import num_cores  # noqa: PLC0415

    # On GPUs too, because weights are factorised on the CPU.
    found = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, num_cores() // jobs))}
    if (count := _num_gpus()) > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(i) for i in range(count)]
        found["CUDA_VISIBLE_DEVICES"] = devices[slot % count].strip()  # more may be listed than there are
    return found
