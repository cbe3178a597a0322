# SPDX-License-Identifier: Apache-2.0
"""Processes that a command starts import nothing from the working directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mirrortune.system.paths import child_environment


def version(folder: Path, *flags: str, **more: str) -> subprocess.CompletedProcess[str]:
    """``python -m mirrortune --version`` in a folder, as compare and --num-processes start it."""
    env = {**os.environ, **child_environment(), **more}
    command = [sys.executable, *flags, "-m", "mirrortune", "--version"]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("flags", [(), ("-P",)])
def test_a_module_beside_the_data_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    for name in ("typer", "torch", "rich", "mirrortune"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit(9)")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", os.environ.get("PYTHONPATH", "")]))  # "" is the folder too
    done = version(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("mirrortune ")
    assert not (tmp_path / "ran").exists()


def test_what_the_user_put_on_the_path_is_still_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "sitecustomize.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "own"), os.environ.get("PYTHONPATH", "")]))
    assert version(tmp_path).returncode == 0
    assert (tmp_path / "ran").exists()
