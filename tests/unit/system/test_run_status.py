# SPDX-License-Identifier: Apache-2.0
"""run_status: what status.json says of every way in which a run ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirrortune.errors import DivergedError, InterruptedRun, ResourceError
from mirrortune.system.run_directory import RunDirectory
from mirrortune.system.run_status import describe_status, read_status, recorded_status


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """An empty run directory."""
    found = RunDirectory(tmp_path / "run")
    found.create()
    return found


def test_a_run_that_goes_through(run: RunDirectory) -> None:
    with recorded_status(run, is_main=True):
        assert read_status(run)["status"] == "running"
    assert read_status(run) == {"status": "finished", "step": None, "message": None, "exit_code": 0}


@pytest.mark.parametrize(
    ("error", "status", "step", "code", "words"),
    [
        (DivergedError(7, "it is nan", fix="Lower --lr"), "diverged", 7, 2, "it diverged at step 7"),
        (InterruptedRun("run", "SIGTERM", signal_number=15, fix="Go on", step=4), "interrupted", 4, 143,
         "it was interrupted after step 4"),
        (KeyboardInterrupt(), "interrupted", None, 130, "it was interrupted"),
        (ResourceError("disk", "full"), "failed", None, 4, "it failed"),
        (ZeroDivisionError("a bug"), "failed", None, 1, "it failed"),
    ],
)  # fmt: skip
def test_a_run_that_does_not(
    run: RunDirectory, error: BaseException, status: str, step: int | None, code: int, words: str
) -> None:
    with pytest.raises(type(error)), recorded_status(run, is_main=True):
        raise error
    found = read_status(run)
    assert (found["status"], found["step"], found["exit_code"]) == (status, step, code)
    assert found["message"] == (str(error) or None)
    assert describe_status(run) == words


def test_one_process_writes_and_nothing_is_made_up(run: RunDirectory) -> None:
    with recorded_status(run, is_main=False):
        assert read_status(run) == {}
    assert describe_status(run) == ""
    run.status.write_text("{", encoding="utf-8")
    assert read_status(run) == {}
