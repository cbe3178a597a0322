# SPDX-License-Identifier: Apache-2.0
"""Kills itself with SIGKILL at random lines of our code while it saves or merges, and says what is left behind.

    python -m tests.e2e.kill_points save|merge FOLDER [--kills 20] [--seed 0]

Every kill is of a forked process, at a line drawn from all lines of ``mirrortune`` that one whole pass executes: the
points do not depend on how fast or how busy the machine is. Every other one is among the last lines, where folders are
renamed. What is left is then loaded by the parent. Prints how often
it was nothing, the earlier state, the new one, something that is refused, and something wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import mirrortune
from mirrortune.adapters.inject import spectral_layers
from mirrortune.errors import MirrortuneError
from tests.spectral import train_a_little
from tests.tiny_models import tiny_causal, tiny_chat_tokenizer

_LAST = 20
_OURS = str(Path(mirrortune.__file__).parent)


def count_lines(work: Callable[[], None], kill_at: int | None = None) -> int:
    """How many lines of ours ``work`` executes; at line ``kill_at`` the process kills itself."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(_OURS):
            return None
        count += event == "line"
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return count


def kill_lines(lines: int, kills: int, draw: random.Random) -> list[int]:
    """Where to kill: anywhere, and near the end, in turn."""
    return [draw.randint(max(1, lines - _LAST) if kill % 2 else 1, lines) for kill in range(kills)]


def killed(work: Callable[[], None], kill_at: int) -> bool:
    """Run ``work`` in a process of its own up to a line; whether it was killed there."""
    child = os.fork()
    if child == 0:
        count_lines(work, kill_at)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def answers(model: nn.Module) -> Tensor:
    """Logits on fixed tokens."""
    with torch.no_grad():
        return torch.as_tensor(model.eval()(input_ids=torch.arange(5, 30)[None]).logits)


def trained(folder: Path, seed: int) -> nn.Module:
    """The base with an adapter."""
    model = mirrortune.attach(AutoModelForCausalLM.from_pretrained(folder / "base"), target_modules="q_proj|up_proj")
    for index, layer in enumerate(spectral_layers(model).values()):
        train_a_little(layer.core, seed + index)
    model.config._name_or_path = str(folder / "base")
    return model


def kill_saves(folder: Path, kills: int, draw: random.Random) -> Counter[str]:
    """Saves over an earlier adapter."""
    old, new = trained(folder, 0), trained(folder, 7)
    states = {"old": answers(old), "new": answers(new)}
    mirrortune.save_adapter(old, folder / "counted")
    lines = count_lines(lambda: mirrortune.save_adapter(new, folder / "counted"))
    found: Counter[str] = Counter()
    for line in kill_lines(lines, kills, draw):
        mirrortune.save_adapter(old, folder / "adapter")
        found["killed"] += killed(lambda: mirrortune.save_adapter(new, folder / "adapter"), line)
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        try:
            now = answers(mirrortune.load_adapter(base, folder / "adapter"))
        except MirrortuneError:
            found["refused"] += 1
            continue
        found[next((name for name, state in states.items() if torch.equal(now, state)), "wrong")] += 1
    return found


def kill_merges(folder: Path, kills: int, draw: random.Random) -> Counter[str]:
    """Merges into a new folder; what lies under a temporary name is loaded too."""
    model = trained(folder, 0)
    mirrortune.save_adapter(model, folder / "adapter")
    expected, space = answers(model), folder / "space"

    def merge() -> None:
        mirrortune.merge_adapter(None, folder / "adapter", space / "merged")

    merge()  # the first one imports modules, whose lines no later one executes
    shutil.rmtree(space)
    lines = count_lines(merge)
    found: Counter[str] = Counter()
    for line in kill_lines(lines, kills, draw):
        shutil.rmtree(space, ignore_errors=True)
        found["killed"] += killed(merge, line)
        found["nothing"] += not (space / "merged").exists()
        for left in space.iterdir() if space.is_dir() else ():
            try:
                now = answers(AutoModelForCausalLM.from_pretrained(left))
            except (OSError, ValueError):
                found["refused" if left.name == "merged" else "partial, refused"] += 1
                continue
            is_right = torch.allclose(now, expected, rtol=1e-4, atol=1e-4)
            found[("new" if left.name == "merged" else "partial, whole") if is_right else "wrong"] += 1
    return found


def main() -> None:
    """Kill, and print what was left."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["save", "merge"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    tiny_causal().save_pretrained(given.folder / "base", max_shard_size="40KB")  # type: ignore[operator]
    tiny_chat_tokenizer().save_pretrained(given.folder / "base")
    kill = kill_saves if given.what == "save" else kill_merges
    sys.stdout.write(json.dumps(kill(given.folder, given.kills, random.Random(given.seed))) + "\n")


if __name__ == "__main__":
    main()
