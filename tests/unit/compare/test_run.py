# SPDX-License-Identifier: Apache-2.0
"""What a comparison does with cells that fail, are killed or diverge, and with signals; no cell is trained."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from mirrortune.compare.grid import Cell, make_grid
from mirrortune.compare.run import Comparison, _device, default_jobs, with_test_split
from mirrortune.config.recipe import override_layer, resolve
from mirrortune.config.schema import Recipe
from mirrortune.errors import ConfigError, DataError, DivergedError, InterruptedRun, MirrortuneError
from mirrortune.runs.checks import unpack
from mirrortune.system.console import Reporter
from mirrortune.system.run_directory import LoopState, RunDirectory
from mirrortune.system.run_status import recorded_status

CELL = Cell("data", "mirror", 0.1, 0)
Command = Callable[[RunDirectory, str], tuple[int, str]]


def comparison(root: Path, methods: str = "mirror") -> Comparison:
    """Return a comparison of one task with one seed and one learning rate."""
    grid = make_grid({"data": Recipe()}, methods, seeds=1, tune_seeds=1, lr_grid="1e-1", extensions=0)
    return Comparison(root, grid, {"data": Recipe()}, Reporter(verbosity=-1))


def begin(run: RunDirectory, *, has_checkpoint: bool) -> None:
    """Write the folder of a run that was killed while it trained."""
    run.create()
    run.write_text("recipe.yaml", "train:\n  lr: 0.1\n")
    run.write_json("status.json", {"status": "running"})
    run.log({"event": "train", "step": 1, "epoch": 0.1, "loss": 1.0})
    if has_checkpoint:
        run.save_checkpoint(LoopState(global_step=1), {}, lambda folder: (folder / "adapter.json").write_text("{}"))


def as_train(monkeypatch: pytest.MonkeyPatch, command: Command) -> list[str]:
    """Replace the processes of cells by ``command``; return the list to which it adds how each was started."""
    flags: list[str] = []

    def started(self: Comparison, words: Sequence[str], slot: int, jobs: int) -> tuple[int, str]:
        flags.append(words[-1])
        run, is_new = RunDirectory(Path(words[words.index("-o") + 1])), words[-1] == "--overwrite"
        with run.held([], overwrite=is_new, resume=not is_new):
            if is_new:
                run.create(overwrite=True)
            return command(run, words[-1])

    monkeypatch.setattr(Comparison, "_command", started)
    return flags


def diverge(run: RunDirectory, flag: str) -> tuple[int, str]:
    """Diverge before the first checkpoint."""
    run.write_text("recipe.yaml", "train:\n  lr: 0.1\n")
    with pytest.raises(DivergedError), recorded_status(run, is_main=True):
        raise DivergedError(1, "the training loss is nan", fix="Lower --lr")
    return DivergedError.exit_code, "error: the training loss is nan"


def test_a_cell_that_was_killed_before_its_first_checkpoint_may_diverge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared, run = comparison(tmp_path), RunDirectory(CELL.folder(tmp_path))
    begin(run, has_checkpoint=False)
    flags = as_train(monkeypatch, diverge)
    compared._run_cell(CELL, 0, 1)
    assert flags == ["--overwrite"]
    assert compared.has_diverged(CELL)


def test_a_cell_whose_checkpoint_cannot_be_continued_may_diverge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared, run = comparison(tmp_path), RunDirectory(CELL.folder(tmp_path))
    begin(run, has_checkpoint=True)
    flags = as_train(monkeypatch, lambda run, flag: diverge(run, flag) if flag == "--overwrite" else (5, "damaged"))
    compared._run_cell(CELL, 0, 1)
    assert flags == ["--resume", "--overwrite"]
    assert compared.has_diverged(CELL)


def test_files_of_others_in_the_folder_of_a_cell_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared, run = comparison(tmp_path), RunDirectory(CELL.folder(tmp_path))
    begin(run, has_checkpoint=False)
    (run.path / "notes.txt").write_text("mine")
    as_train(monkeypatch, diverge)
    with pytest.raises(MirrortuneError, match=r"notes\.txt"):
        compared._run_cell(CELL, 0, 1)
    assert (run.path / "notes.txt").read_text() == "mine"
    assert run.metrics.is_file()


@pytest.mark.parametrize(
    ("code", "says", "exit_code"),
    [
        (-9, "data, mirror, lr 0.1, seed 0: its process was killed by SIGKILL. Run the same command again", 137),
        (4, "data, mirror, lr 0.1, seed 0: no space left", 4),
    ],
)
def test_a_cell_that_fails_for_want_of_resources_keeps_its_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, says: str, exit_code: int
) -> None:
    compared, run = comparison(tmp_path), RunDirectory(CELL.folder(tmp_path))
    begin(run, has_checkpoint=True)
    flags = as_train(monkeypatch, lambda run, flag: (code, "error: no space left" if code > 0 else ""))
    with pytest.raises(MirrortuneError) as error:
        compared._run_cell(CELL, 0, 1)
    assert str(error.value).startswith(says)
    assert error.value.exit_code == exit_code
    assert flags == ["--resume"]
    assert run.saved_steps() == [1]


def test_a_cell_that_fails_stops_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared, has_begun, stopped = comparison(tmp_path, "mirror,none"), threading.Event(), []

    def run_cell(self: Comparison, cell: Cell, slot: int, jobs: int) -> None:
        if cell.label == "mirror":
            has_begun.wait(30)
            raise DataError("reviews.csv", "no rows")
        has_begun.set()
        stopped.append(self._stopped.wait(30))

    monkeypatch.setattr(Comparison, "_run_cell", run_cell)
    with pytest.raises(DataError, match="no rows"):
        compared.run(2)
    assert stopped == [True]


@pytest.mark.parametrize(("number", "exit_code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 143)])
def test_the_exit_code_of_a_stopped_comparison_names_the_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str, exit_code: int
) -> None:
    def run_cell(self: Comparison, cell: Cell, slot: int, jobs: int) -> None:
        os.kill(os.getpid(), signal.Signals[number])
        self._stopped.wait(30)

    monkeypatch.setattr(Comparison, "_run_cell", run_cell)
    with pytest.raises(InterruptedRun, match="Run the same command again") as error:
        comparison(tmp_path).run(1)
    assert error.value.exit_code == exit_code


@pytest.mark.parametrize(
    ("words", "reported"),
    [
        ([], ("test",)),
        (["data.validation_split=test"], ()),
        (["data.train_split=test", "data.validation_split=train"], ()),
        (["eval.report_splits=[test]"], ("test",)),
    ],
)
def test_rows_that_train_or_choose_are_no_test_rows(
    tmp_path: Path, words: list[str], reported: tuple[str, ...]
) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("text,label\ngood,yes\nbad,no\n" * 4)
    words = ["model.name=m", "task.kind=text-classification", f"data.path={tmp_path}", *words]
    recipe = resolve([override_layer(words)]).recipe
    job = Mock(settings=unpack(recipe))
    assert with_test_split(recipe, job).eval.report_splits == reported


def test_runs_share_the_gpus_only_where_they_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 5,7,-1,8")  # CUDA uses those before the first that is none
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert default_jobs() == 3
    found = [_device(slot, 4) for slot in (1, 2, 3)]
    assert found == [{"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": "2"} for gpu in "574"]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert default_jobs() == 1
    assert _device(2, 4) == {"OMP_NUM_THREADS": "2"}


def test_an_option_that_is_removed_is_another_setting(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "data.yaml").write_text("adapter:\n  options: {scale_top_k: 4}\n")
    with pytest.raises(ConfigError, match=r"adapter\.options was \{'scale_top_k': 4\}, is \{\}"):
        comparison(tmp_path)._check_recipe("data")
