# SPDX-License-Identifier: Apache-2.0
"""kill -9 in the middle of saving and merging: what is left loads and is right, or is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
KILLS = 20


def left_after(what: str, folder: Path) -> dict[str, int]:
    """What ``KILLS`` kills at random lines leave."""
    env = {**os.environ, "MIRRORTUNE_CACHE": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "tests.e2e.kill_points", what, str(folder), "--kills", str(KILLS)]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, env=env | {"PYTHONPATH": str(root)}, cwd=root, capture_output=True, text=True, check=True
    )
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_killed_save_leaves_the_earlier_adapter_the_new_one_or_one_that_is_refused(tmp_path: Path) -> None:
    found = left_after("save", tmp_path)
    assert found["killed"] == KILLS
    assert found.keys() <= {"killed", "old", "new", "refused"}
    assert found.get("refused", 0) < KILLS / 2, "only between the renames of two files"
    assert found["old"] > 0


def test_a_killed_merge_leaves_a_whole_model_or_none(tmp_path: Path) -> None:
    found = left_after("merge", tmp_path)
    assert found["killed"] == KILLS
    assert found.keys() <= {"killed", "new", "nothing", "partial, refused", "partial, whole"}
    assert found["nothing"] > 0
