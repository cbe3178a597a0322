# SPDX-License-Identifier: Apache-2.0
"""checkpoint: the run directory's files, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mirrortune.config.recipe import read_recipe
from mirrortune.errors import ConfigError, ResourceError, VerificationError
from mirrortune.runs.adapted_base import _stored_strategies
from mirrortune.system import atomic
from mirrortune.system.atomic import place_of_replaced
from mirrortune.system.outputs import Marker, restore, strangers
from mirrortune.system.run_directory import LoopState, RunDirectory
from mirrortune.system.run_status import read_status
from mirrortune.training.snapshots import random_tensors

TENSORS = {"optimizer.w.exp_avg": torch.arange(3.0), **{f"random.0.{k}": v for k, v in random_tensors().items()}}


def adapter_files(text: str = "adapter") -> Any:
    """A writer of files that stand for an adapter."""

    def write(folder: Path) -> None:
        for name in ("adapter.json", "adapter.safetensors"):
            (folder / name).write_text(text)

    return write


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """An empty run directory."""
    found = RunDirectory(tmp_path / "run")
    found.create()
    return found


def save(run: RunDirectory, step: int, *, keep: int = 1, **state: Any) -> None:
    """A checkpoint after ``step`` steps."""
    run.save_checkpoint(LoopState(global_step=step, **state), TENSORS, adapter_files(f"adapter {step}"), keep=keep)


def rewrite(path: Path, data: bytes) -> None:
    """Change a file of a checkpoint and its listed hash, as whoever edits it by hand would."""
    path.write_bytes(data)
    sums = path.with_name("SHA256SUMS")
    lines = [line for line in sums.read_text().splitlines() if not line.endswith(f"  {path.name}")]
    sums.write_text("\n".join([*lines, f"{hashlib.sha256(data).hexdigest()}  {path.name}"]) + "\n")


def test_a_checkpoint_comes_back_as_it_was(run: RunDirectory) -> None:
    state = LoopState(
        global_step=7, epoch=1, step_in_epoch=3, best_metric=0.5, best_step=4, best_metrics={"accuracy": 0.5},
        window_loss=1 / 3, window_items=5, num_processes=2,
    )  # fmt: skip
    run.save_checkpoint(state, TENSORS, adapter_files())
    found, tensors = run.load_checkpoint(7)
    assert found == state
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    assert run.checkpoint(7).name == "step-000007"


def test_checkpoints_are_in_the_order_of_their_steps(run: RunDirectory) -> None:
    for step in (999_999, 1_000_000, 2):
        run.save_checkpoint(LoopState(global_step=step, best_step=step), TENSORS, adapter_files())
        kept = run.saved_steps()
        assert kept == sorted(kept)
    assert RunDirectory(run.path / "none").saved_steps() == []


def test_the_best_and_the_last_are_kept(run: RunDirectory) -> None:
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 5)):
        save(run, step, best_step=best)
        assert run.saved_steps() == sorted({step, best})


def test_the_last_few_are_kept(run: RunDirectory) -> None:
    for step, best in ((1, 1), (2, 1), (3, 1), (4, 1), (5, 1)):
        save(run, step, best_step=best, keep=3)
        assert run.saved_steps() == sorted({1, *range(max(1, step - 2), step + 1)})
    save(run, 6, best_step=6, keep=1)
    assert run.saved_steps() == [6]


@given(keep=st.integers(1, 9), saves=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=14))
def test_any_sequence_of_saves_leaves_the_last_few_and_the_best(
    tmp_path: Path, keep: int, saves: list[tuple[bool, bool]]
) -> None:
    """After a regular save exactly the last ``keep`` regular checkpoints and the best one are there."""
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        run = RunDirectory(Path(folder) / "run")
        run.create()
        regular: list[int] = []
        best = None
        for step, (is_best, is_interim) in enumerate(saves, start=1):
            if not is_interim:
                regular.append(step)
                best = step if is_best or best is None else best
            save(run, step, keep=keep, best_step=best, is_interim=is_interim)
            last = regular[-keep:] if not is_interim else [*regular[max(0, len(regular) - keep + 1) :], step]
            assert run.saved_steps() == sorted({*last, *([best] if best else [])})


def test_what_was_saved_for_a_signal_alone_does_not_count(run: RunDirectory) -> None:
    """With an interruption or without, the same checkpoints are there in the end."""
    for step in (2, 4, 6):
        save(run, step, best_step=2, keep=2)
    save(run, 7, best_step=2, keep=2, is_interim=True)
    assert run.saved_steps() == [2, 6, 7]
    save(run, 8, best_step=2, keep=2)
    assert run.saved_steps() == [2, 6, 8]


def test_what_is_not_whole_is_not_a_checkpoint(run: RunDirectory) -> None:
    save(run, 3)
    (run.checkpoints / "step-000009").mkdir()
    (run.checkpoints / "step-other").mkdir()
    (run.checkpoints / ".step-000010.tmp").mkdir()
    assert run.saved_steps() == [3]


def test_a_failed_save_leaves_earlier_ones_alone(run: RunDirectory) -> None:
    save(run, 1)

    def fail(folder: Path) -> None:
        (folder / "adapter.json").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(ResourceError, match="the disk is full") as caught:
        run.save_checkpoint(LoopState(global_step=2), TENSORS, fail)
    assert caught.value.exit_code == 4
    assert run.saved_steps() == [1]
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000001"]
    assert run.load_checkpoint(1)[0].global_step == 1


@pytest.mark.parametrize("name", ["state.json", "training.safetensors", "adapter.json", "SHA256SUMS"])
@pytest.mark.parametrize("content", [b"", b"[]", None], ids=["empty", "other", "missing"])
def test_a_damaged_checkpoint_is_refused(run: RunDirectory, name: str, content: bytes | None) -> None:
    save(run, 3)
    path = run.checkpoint(3) / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(VerificationError, match=r"step-000003: damaged checkpoint .*There is no earlier one") as caught:
        run.load_checkpoint(3)
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("name", ["state.json", "training.safetensors", "adapter.safetensors", "SHA256SUMS"])
def test_a_flipped_bit_is_refused_and_the_checkpoint_before_is_named(run: RunDirectory, name: str) -> None:
    for step in (3, 4, 5):
        save(run, step, best_step=3, keep=2)
    path = run.checkpoint(5) / name
    for position in (0, len(path.read_bytes()) // 2, -2):
        before = path.read_bytes()
        data = bytearray(before)
        data[position] ^= 1
        path.write_bytes(data)
        with pytest.raises(
            VerificationError, match=r"step-000005: damaged checkpoint .*Delete it to continue from step-000004\.$"
        ):
            run.load_checkpoint(5)
        path.write_bytes(before)
    assert run.load_checkpoint(5)[0].global_step == 5


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_the_usual_tool_checks_a_checkpoint(run: RunDirectory) -> None:
    save(run, 3)
    command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(command, cwd=run.checkpoint(3), check=False).returncode == 0


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 1},
        {"format_version": 3},
        {"unknown": 1},
        {"python_random": [3, [1, 2], None]},
        {"python_random": []},
    ],
)
def test_a_state_that_means_nothing_here_is_refused(run: RunDirectory, change: dict[str, Any]) -> None:
    save(run, 3)
    path = run.checkpoint(3) / "state.json"
    rewrite(path, json.dumps({**json.loads(path.read_text()), **change}).encode())
    with pytest.raises(VerificationError, match="damaged checkpoint"):
        run.load_checkpoint(3)


@pytest.mark.parametrize("content", [b"", b"\x10\x00\x00\x00\x00\x00\x00\x00garbage"])
def test_tensors_that_mean_nothing_here_are_refused(run: RunDirectory, content: bytes) -> None:
    save(run, 3)
    rewrite(run.checkpoint(3) / "training.safetensors", content)
    with pytest.raises(VerificationError, match="damaged checkpoint"):
        run.load_checkpoint(3)


def test_pythons_random_state_comes_with_the_checkpoint(run: RunDirectory) -> None:
    random.gauss(0, 1)
    save(run, 1)
    expected = [random.random(), random.gauss(0, 1)]
    random.seed(5)
    run.load_checkpoint(1)
    assert [random.random(), random.gauss(0, 1)] == expected


@pytest.mark.parametrize("line", ["[1]\n", "[" * 100_000])
def test_a_line_of_the_log_that_is_no_object_is_named(run: RunDirectory, line: str) -> None:
    run.log({"event": "train"})
    with run.metrics.open("a") as file:
        file.write(line)
    with pytest.raises(VerificationError, match="damaged, line 2 is no object"):
        run.events()


def test_the_log_is_appended_read_and_rewound(run: RunDirectory) -> None:
    assert run.events() == []
    events = [{"event": "train", "step": step, "loss": 1 / step} for step in (1, 2, 3)]
    for event in events:
        run.log(event)
    assert run.events() == events
    with run.metrics.open("a") as file:
        file.write('{"event": "train", "st')  # by a crash
    assert run.events() == events
    run.rewind_log(2)
    assert run.events() == events[:2]
    run.log(events[2])
    assert run.events() == events
    assert len(run.metrics.read_text().splitlines()) == 3


def test_an_evaluation_that_will_be_made_again_is_dropped(run: RunDirectory) -> None:
    events = [{"event": kind, "step": step} for step in (1, 2) for kind in ("train", "evaluate")]
    for event in events:
        run.log(event)
    run.rewind_log(2, owes_evaluation=True)
    assert run.events() == events[:3]


def test_what_killed_saves_left_is_cleared(run: RunDirectory) -> None:
    save(run, 3)
    save(run, 4, best_step=3)
    for path in (run.path / ".metrics.jsonl.mt-ab12cd34.partial", run.path / ".git", run.checkpoints / ".DS_Store"):
        path.write_text("half")
    shutil.copytree(run.checkpoint(4), run.checkpoints / ".step-000005.mt-cd34ef56.partial")
    shutil.copytree(run.checkpoint(3), run.checkpoints / ".step-000003.replaced")  # its successor came
    run.checkpoint(4).rename(run.checkpoints / ".step-000004.replaced")  # its successor did not
    assert run.saved_steps() == [3]
    run.clear_leftovers()
    assert run.saved_steps() == [3, 4]
    assert run.load_checkpoint(4)[0].global_step == 4
    assert sorted(p.name for p in run.checkpoints.iterdir()) == [".DS_Store", "step-000003", "step-000004"]
    assert sorted(p.name for p in run.path.iterdir()) == [".git", ".mirrortune.json", "checkpoints"]


def test_files_with_names_like_leftovers_are_left_alone(run: RunDirectory) -> None:
    """Only the exact form of our temporary names counts, for the type that we make, and only our files in it go."""
    save(run, 3)
    mine = (
        ".recipe.yaml.my_edits.partial", ".recipe.yaml.replaced", ".adapter.mt-ab12cd34.partial",
        ".x.mt-ab12cd34.partial", ".adapter.mine_v2.partial/thesis.tex",
        ".adapter.mt-ef56gh78.partial/thesis.tex", ".reports.replaced/thesis.tex",
        ".recipe.yaml.mt-ab12cd34.partial/thesis.tex", "checkpoints/.step-000009.old.partial/state.json",
        ".checkpoints.old.partial/step-000003/state.json",
    )  # fmt: skip
    for name in mine:
        (run.path / name).parent.mkdir(exist_ok=True, parents=True)
        (run.path / name).write_text("mine")
    (run.path / ".adapter.mt-ef56gh78.partial" / "adapter.json").write_text("half")
    run.clear_leftovers()
    assert not (run.path / ".adapter.mt-ef56gh78.partial" / "adapter.json").exists()
    assert [(run.path / name).read_text() for name in mine] == ["mine"] * len(mine)
    with pytest.raises(ConfigError) as refused:
        run.check(overwrite=True, resume=False)
    assert strangers(run.path, Marker("run", frozenset())) == sorted(mine)
    assert "and 5 more" in str(refused.value)


@pytest.mark.parametrize("below", [
    "tensorboard/", "tensorboard/mirrortune/events.out.tfevents.17.host.9.0", "tensorboard/mirrortune/hparams.yml",
    "tensorboard/mirrortune/1764417600.5/events.out.tfevents.17.host.9.1", "tensorboard/mirrortune/17/hparams.yml",
    "wandb/", "wandb/latest-run", "wandb/debug.log", "wandb/debug-internal.log",
    "wandb/offline-run-20260101_000000-ab12/run-ab12.wandb", "wandb/run-20260101_000000-ab12/files/media/a.png",
    "wandb/run-20260101_000000-ab12/files/", "mlflow.db", "mlflow.db-wal",
])  # fmt: skip
def test_what_trackers_write_is_ours(below: str) -> None:
    assert Marker("run", frozenset()).owns(below)


def test_what_cannot_be_moved_from_an_old_folder_stays_in_sight(run: RunDirectory) -> None:
    save(run, 1)
    thesis = run.adapter / "adapter.json" / "thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("years of work")
    for _ in range(2):
        run.publish_adapter(1)
        run.clear_leftovers()
    assert (run.adapter / "adapter.json").read_text() == "adapter 1"
    assert (run.path / "adapter.old" / "adapter.json" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("error", [PermissionError, KeyboardInterrupt])
@pytest.mark.parametrize("can_exchange", [True, False])
def test_an_old_folder_that_cannot_be_removed_loses_nothing(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], can_exchange: bool
) -> None:
    save(run, 1)
    run.publish_adapter(1)
    (run.adapter / "thesis.txt").write_text("years of work")
    unlink = Path.unlink

    def fail(path: Path, missing_ok: bool = False) -> None:
        if path.name == "adapter.json":
            raise error("failed as it was meant to")
        unlink(path, missing_ok=missing_ok)

    if not can_exchange:
        monkeypatch.setattr(atomic, "exchange", lambda one, other: False)
    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(Path, "unlink", fail)
        run.publish_adapter(1)
    assert [path.read_text() for path in run.path.rglob("thesis.txt")] == ["years of work"]
    run.clear_leftovers()
    assert [path.read_text() for path in run.path.rglob("thesis.txt")] == ["years of work"]
    assert (run.adapter / "adapter.json").read_text() == "adapter 1"


def test_checkpoints_behind_a_link_are_kept(run: RunDirectory) -> None:
    save(run, 1)
    run.checkpoints.rename(run.path.parent / "elsewhere")
    run.checkpoints.symlink_to("../elsewhere")
    save(run, 2)
    run.remove_checkpoints()
    assert run.saved_steps() == [1, 2]


@pytest.mark.parametrize("name", ["state.json", "SHA256SUMS", "training.safetensors"])
def test_a_pipe_in_the_place_of_a_file_does_not_hang(run: RunDirectory, name: str) -> None:
    save(run, 1)
    (run.checkpoint(1) / name).unlink()
    os.mkfifo(run.checkpoint(1) / name)
    with pytest.raises(VerificationError, match="damaged checkpoint"):
        run.load_checkpoint(1)
    os.mkfifo(run.status)
    assert read_status(run) == {}
    os.mkfifo(run.recipe)
    with pytest.raises(ConfigError, match="is a pipe"):
        read_recipe(str(run.recipe))


@pytest.mark.parametrize(
    "text", [None, "[]", "null", "{", '{"strategies": [1]}', '{"strategies": {"a": 1}}', "[" * 10**5]
)
def test_a_damaged_environment_has_no_strategies(run: RunDirectory, text: str | None) -> None:
    if text is None:
        os.mkfifo(run.path / "environment.json")
    else:
        (run.path / "environment.json").write_text(text)
    assert _stored_strategies(run) == {}


def test_publishing_copies_the_adapter_of_a_step(run: RunDirectory) -> None:
    save(run, 1, best_step=1)
    save(run, 2, best_step=1)
    run.publish_adapter(1)
    assert sorted(p.name for p in run.adapter.iterdir()) == ["adapter.json", "adapter.safetensors"]
    assert (run.adapter / "adapter.json").read_text() == "adapter 1"
    run.publish_adapter(2)
    assert (run.adapter / "adapter.json").read_text() == "adapter 2"


def test_a_folder_that_holds_anything_is_refused(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.check(overwrite=False, resume=False)  # there is nothing yet
    run.path.mkdir()
    run.check(overwrite=False, resume=False)  # it is empty
    run.recipe.write_text("task: {}")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="is no folder that mirrortune wrote" if overwrite else "not empty"):
            run.check(overwrite=overwrite, resume=False)
    with pytest.raises(ConfigError, match="holds no run"):
        run.check(overwrite=False, resume=True)
    run.recipe.unlink()
    run.create()
    (run.path / ".recipe.yaml.mt-ab12cd34.partial").write_text("ta")
    run.check(overwrite=False, resume=False)  # it was killed before it began
    run.write_json("environment.json", {})
    run.check(overwrite=False, resume=False)  # it was killed before its recipe was written: --resume finds no run
    run.write_text("recipe.yaml", "task: {}")
    with pytest.raises(ConfigError, match="--resume, choose another with -o, or replace it with --overwrite"):
        run.check(overwrite=False, resume=False)
    run.check(overwrite=True, resume=False)
    run.check(overwrite=False, resume=True)
    (run.path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"not part of the run: notes\.txt\. Move it elsewhere"):
        run.check(overwrite=True, resume=False)


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_replaced_run_is_kept_until_the_first_checkpoint(run: RunDirectory) -> None:
    save(run, 3)
    before = contents(run.path)
    new = RunDirectory(run.path)
    new.create(overwrite=True)
    new.write_text("recipe.yaml", "task: {}")
    assert new.saved_steps() == []
    new.give_way()  # it failed
    assert contents(run.path) == before
    new.create(overwrite=True)
    restore(run.path)  # it was killed
    assert contents(run.path) == before
    run.path.rename(place_of_replaced(run.path))
    run.path.mkdir()
    restore(run.path)  # it was killed before its marker was written
    assert contents(run.path) == before
    new.create(overwrite=True)
    save(new, 5)
    new.give_way()
    assert new.saved_steps() == [5]
    assert [p.name for p in run.path.parent.iterdir()] == [run.path.name]


def test_notes_in_a_run_outlive_its_checkpoints(run: RunDirectory) -> None:
    save(run, 1)
    (run.checkpoint(1) / "notes.txt").write_text("mine")
    save(run, 2, best_step=2)
    assert run.saved_steps() == [2]
    run.publish_adapter(2)
    (run.adapter / "notes.txt").write_text("mine")
    run.publish_adapter(2)
    run.remove_checkpoints()
    assert (run.adapter / "notes.txt").read_text() == (run.checkpoint(1) / "notes.txt").read_text() == "mine"
    assert [p.name for p in run.checkpoints.rglob("*")] == ["step-000001", "notes.txt"]


def test_a_checkpoint_that_cannot_be_written_names_the_last_whole_one(run: RunDirectory) -> None:
    save(run, 1)
    save(run, 2, best_step=1, keep=2)
    (run.checkpoint(2) / "state.json").write_text("{}")

    def fail(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ResourceError, match=r"the disk is full.*; step-000001 is intact\."):
        run.save_checkpoint(LoopState(global_step=3), {}, fail)


def test_a_folder_that_cannot_be_made_is_a_resource_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match="cannot be written"):
        RunDirectory(tmp_path / "missing").log({"step": 1})

    def fail(path: str, mode: int = 0o777) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "mkdir", fail)
    with pytest.raises(ResourceError, match="cannot be written"):
        RunDirectory(tmp_path / "run").create()


def test_small_files_are_whole(run: RunDirectory) -> None:
    run.write_json("results.json", {"accuracy": 0.5})
    assert json.loads((run.path / "results.json").read_text()) == {"accuracy": 0.5}
    run.write_text("recipe.yaml", "é\n")
    assert run.recipe.read_text(encoding="utf-8") == "é\n"
    assert sorted(p.name for p in run.path.iterdir()) == [
        ".mirrortune.json", "checkpoints", "recipe.yaml", "results.json",
    ]  # fmt: skip


def test_a_log_that_a_backup_shares_is_not_changed_in_the_backup(run: RunDirectory) -> None:
    run.log({"step": 1})
    run.log_progress({"step": 1})
    for path in (run.metrics, run.progress_log):
        os.link(path, path.with_name(f"backup of {path.name}"))
    run.log({"step": 2})
    run.log_progress({"step": 2})
    assert [event["step"] for event in run.events()] == [entry["step"] for entry in run.progress()] == [1, 2]
    for path in (run.metrics, run.progress_log):
        assert path.with_name(f"backup of {path.name}").read_text() == '{"step": 1}\n'
