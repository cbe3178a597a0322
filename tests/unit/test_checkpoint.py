# SPDX-License-Identifier: Apache-2.0
"""checkpoint: the run directory's files, whole or not at all."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mirrortune.checkpoint import (
    LoopState,
    RunDirectory,
    optimizer_tensors,
    random_tensors,
    restore_optimizer,
    restore_random,
)
from mirrortune.errors import ConfigError, ResourceError, VerificationError

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


def save(run: RunDirectory, step: int, **state: Any) -> None:
    """A checkpoint after ``step`` steps."""
    run.save_checkpoint(LoopState(global_step=step, **state), TENSORS, adapter_files(f"adapter {step}"))


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


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("state.json", b""),
        ("state.json", b"[]"),
        ("state.json", b"{}"),
        ("state.json", b'{"format_version": 1, "python_random": []}'),
        ("state.json", None),
        ("training.safetensors", b""),
        ("training.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00garbage"),
        ("training.safetensors", None),
    ],
)
def test_a_damaged_checkpoint_is_refused(run: RunDirectory, name: str, content: bytes | None) -> None:
    save(run, 3)
    path = run.checkpoint(3) / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(VerificationError, match=r"step-000003: damaged checkpoint.*Delete step-000003") as caught:
        run.load_checkpoint(3)
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("change", [{"format_version": 2}, {"unknown": 1}, {"python_random": [3, [1, 2], None]}])
def test_a_state_that_means_nothing_here_is_refused(run: RunDirectory, change: dict[str, Any]) -> None:
    save(run, 3)
    path = run.checkpoint(3) / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(VerificationError, match="damaged checkpoint"):
        run.load_checkpoint(3)


def test_random_states_come_back() -> None:
    def draw() -> tuple[Any, ...]:
        numpy = np.random.standard_normal(3).tolist()  # noqa: NPY002
        return torch.rand(3).tolist(), torch.randn(1).item(), numpy

    np.random.standard_normal(1)  # noqa: NPY002  (so that a second normal number is waiting)
    states = random_tensors()
    expected = draw()
    assert draw() != expected
    restore_random(states)
    assert draw() == expected


def test_pythons_random_state_comes_with_the_checkpoint(run: RunDirectory) -> None:
    random.gauss(0, 1)
    save(run, 1)
    expected = [random.random(), random.gauss(0, 1)]
    random.seed(5)
    run.load_checkpoint(1)
    assert [random.random(), random.gauss(0, 1)] == expected


def stepped(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, dict[int, str]]:
    """A small model after two AdamW steps; one of its parameters never got a gradient."""
    torch.manual_seed(seed)
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "ab": nn.Linear(2, 1), "idle": nn.Linear(1, 1)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        model["ab"](model["a"](torch.ones(1, 2))).sum().backward()
        optimizer.step()
    return model, optimizer, {id(p): n for n, p in model.named_parameters()}


def test_optimizer_states_come_back() -> None:
    model, optimizer, names = stepped(0)
    tensors = optimizer_tensors(optimizer, names)
    assert set(tensors) == {
        f"optimizer.{name}.{entry}"
        for name, _ in model.named_parameters()
        if not name.startswith("idle")
        for entry in ("step", "exp_avg", "exp_avg_sq")
    }
    other, fresh, other_names = stepped(1)
    restore_optimizer(fresh, other_names, {name: tensor.clone() for name, tensor in tensors.items()})
    again: dict[str, Tensor] = optimizer_tensors(fresh, other_names)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    other.load_state_dict(model.state_dict())
    for one, its_optimizer in ((model, optimizer), (other, fresh)):
        its_optimizer.zero_grad()
        one["ab"](one["a"](torch.ones(1, 2))).sum().backward()
        its_optimizer.step()
    assert all(torch.equal(other.get_parameter(name), parameter) for name, parameter in model.named_parameters())


def test_the_log_is_appended_read_and_rewound(run: RunDirectory) -> None:
    assert run.events() == []
    events = [{"event": "train", "step": step, "loss": 1 / step} for step in (1, 2, 3)]
    for event in events:
        run.log(event)
    assert run.events() == events
    with run.metrics.open("a") as file:
        file.write('{"event": "train", "st')  # cut short by a crash
    assert run.events() == events
    run.rewind_log(2)
    assert run.events() == events[:2]
    run.log(events[2])
    assert run.events() == events
    assert len(run.metrics.read_text().splitlines()) == 3


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
    (run.path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="--resume, choose another with -o, or replace it with --overwrite"):
        run.check(overwrite=False, resume=False)
    with pytest.raises(ConfigError, match="is no run of ours and is left alone"):
        run.check(overwrite=True, resume=False)
    assert (run.path / "notes.txt").read_text() == "mine"
    run.recipe.write_text("task: {}")
    run.check(overwrite=True, resume=False)
    run.check(overwrite=False, resume=True)
    run.create()
    assert not (run.path / "notes.txt").exists()
    assert run.checkpoints.is_dir()


def test_a_folder_that_cannot_be_made_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot be written"):
        RunDirectory(tmp_path / "file" / "run").create()
    with pytest.raises(ResourceError, match="cannot be written"):
        RunDirectory(tmp_path / "missing").log({"step": 1})


def test_small_files_are_whole(run: RunDirectory) -> None:
    run.write_json("results.json", {"accuracy": 0.5})
    assert json.loads((run.path / "results.json").read_text()) == {"accuracy": 0.5}
    run.write_text("recipe.yaml", "é\n")
    assert run.recipe.read_text(encoding="utf-8") == "é\n"
    assert sorted(p.name for p in run.path.iterdir()) == ["checkpoints", "recipe.yaml", "results.json"]
