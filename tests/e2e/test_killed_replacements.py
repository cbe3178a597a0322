# SPDX-License-Identifier: Apache-2.0
"""kill -9 in front of every change to the file system while an output is replaced: the old or the new one is there
whole, at the latest when the next command looks, and nothing else has changed.
"""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path

import pytest
import torch

from mirrortune.system import atomic
from mirrortune.system.atomic import MARKER
from mirrortune.system.outputs import LORA, MERGED, Input, OutputKind, output_folder, restore
from mirrortune.system.run_directory import LoopState, RunDirectory
from tests.kills import ends_before
from tests.trees import tree


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def surroundings(root: Path) -> Path:
    """A folder with a user's own things, some named like leftovers."""
    for name in (
        "thesis.txt", "model/config.json", ".b.claim", ".b.mt-ab12cd34.partial/b/model.safetensors", ".b.replaced/x",
        "ab/adapter.json",
    ):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"mine: {name}")
    return root


def beside(root: Path) -> dict[str, str]:
    """All but the output ``a`` and what was left of it."""
    own = (str(root / "a"), f"{root}/.a.")
    return {p: w for p, w in tree(root).items() if not (p == own[0] or p.startswith((f"{own[0]}/", own[1])))}


def content(folder: Path) -> dict[str, str]:
    """Files of a folder but its marker."""
    found = {p.relative_to(folder).as_posix(): p.read_text(errors="replace") for p in folder.rglob("*") if p.is_file()}
    return {name: text for name, text in found.items() if name != MARKER}


FILES = ("config.json", "model-1.safetensors", "model-2.safetensors", "tokenizer/vocab.txt", "tokenizer/deep/a.txt")
NEWER = ("config.json", "model.safetensors", "other/vocab.txt")


def write_model(root: Path, kind: OutputKind, version: str, names: tuple[str, ...]) -> None:
    """Merge or export into ``a``."""

    def write(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(version)

    with output_folder(root / "a", [Input("model", root / "model")], kind, overwrite=True) as put:
        put(write)


@pytest.mark.parametrize(
    ("kind", "is_exchanged", "is_there"), [(MERGED, True, True), (LORA, False, True), (MERGED, True, False)]
)
def test_a_killed_merge_or_export(
    kind: OutputKind, is_exchanged: bool, is_there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_exchanged:
        monkeypatch.setattr(atomic, "exchange", lambda one, other: False)
    old, new = dict.fromkeys(FILES, "old"), dict.fromkeys(NEWER, "new")
    for change in itertools.count(1):
        root = surroundings(tmp_path / str(change))
        if is_there:
            write_model(root, kind, "old", FILES)
        before = beside(root)
        is_ended = ends_before(lambda root=root: write_model(root, kind, "new", NEWER), change)  # type: ignore[misc]

        if is_exchanged and is_there:
            assert content(root / "a") in (old, new)
        restore(root / "a")  # as every command that reads a model
        allowed = [new, *([old] if is_there else [])]
        assert content(root / "a") in allowed if (root / "a").exists() else not is_there
        write_model(root, kind, "newer", FILES)
        assert content(root / "a") == dict.fromkeys(FILES, "newer")
        assert beside(root) == before
        assert not list(root.glob(".a.*")), "the next command removes what was left"
        if not is_ended:
            assert change > 10
            return


TENSORS = {"optimizer.w.exp_avg": torch.arange(3.0)}


def train(root: Path, text: str, *, overwrite: bool = True) -> None:
    """What a training of two steps does to its run."""
    run = RunDirectory(root / "a")
    inputs = [Input("model", root / "model")]

    def adapter(folder: Path) -> None:
        for name in ("adapter.json", "adapter.safetensors"):
            (folder / name).write_text(text)

    with run.held(inputs, overwrite=overwrite, resume=False):
        run.create(inputs, overwrite=overwrite)
        run.write_text("recipe.yaml", text)
        run.write_text("own page.html", text)
        for step in (1, 2):
            run.log({"step": step, "event": "train"})
            run.save_checkpoint(LoopState(global_step=step, best_step=1), TENSORS, adapter)
            run.publish_adapter(1)
        run.write_json("results.json", text)
        run.remove_checkpoints()


def resume(root: Path) -> None:
    """Continue a run as far as the file system has a part in it."""
    run = RunDirectory(root / "a")
    with run.held([Input("model", root / "model"), Input("recipe", run.recipe)], overwrite=False, resume=True):
        run.clear_leftovers()
        for step in run.saved_steps():
            run.load_checkpoint(step)
        run.rewind_log(max(run.saved_steps(), default=0))


@pytest.mark.parametrize(
    ("then", "is_exchanged"), [("overwrite", True), pytest.param("resume", False, marks=pytest.mark.slow)]
)
def test_a_killed_training(then: str, is_exchanged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_exchanged:
        monkeypatch.setattr(atomic, "exchange", lambda one, other: False)
    for change in itertools.count(1):
        root = surroundings(tmp_path / str(change))
        train(root, "old")
        run, before, old = RunDirectory(root / "a"), beside(root), content(root / "a")
        is_ended = ends_before(lambda root=root: train(root, "new"), change)  # type: ignore[misc]

        restore(run.path)  # as every command that reads a run
        run.clear_leftovers()
        now = content(run.path)
        if now != old:
            assert "old" not in now.values()
            assert run.saved_steps() or run.results.is_file(), "a run without a checkpoint has not replaced another"
            for step in run.saved_steps():
                run.load_checkpoint(step)
            texts = {now[name] for name in ("adapter/adapter.json", "adapter/adapter.safetensors") if name in now}
            assert texts <= {"new"}
        if then == "resume":
            resume(root)
        train(root, "newer")
        assert content(run.path) == {name: text.replace("old", "newer") for name, text in old.items()}
        assert beside(root) == before
        assert not list(root.rglob(".a.*"))
        assert not [p.name for p in run.path.rglob(".*") if p.name != MARKER]
        if not is_ended:
            assert change > 40
            return
        shutil.rmtree(root)


def test_a_killed_new_training(tmp_path: Path) -> None:
    """Into an empty place: the same command works again, with --resume as soon as there is a run."""
    for change in itertools.count(1):
        root = surroundings(tmp_path / str(change))
        before = beside(root)
        is_ended = ends_before(lambda root=root: train(root, "new", overwrite=False), change)  # type: ignore[misc]
        run = RunDirectory(root / "a")
        if run.is_marked:
            resume(root)
        train(root, "newer")
        assert set(content(run.path)) == {
            "recipe.yaml", "own page.html", "metrics.jsonl", "results.json", "adapter/adapter.json",
            "adapter/adapter.safetensors",
        }  # fmt: skip
        assert beside(root) == before
        assert not list(root.glob(".a.*"))
        if not is_ended:
            return
        shutil.rmtree(root)
