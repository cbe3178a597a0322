# SPDX-License-Identifier: Apache-2.0
"""Record how a run ended in ``status.json``, for programs that start runs and for later inspection."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

from mirrortune.errors import DivergedError, InterruptedRun, MirrortuneError, PeerError, known_error
from mirrortune.system.paths import json_object_or_none
from mirrortune.system.run_directory import RunDirectory
from mirrortune.system.signals import lost_a_process

Status = Literal["running", "finished", "diverged", "interrupted", "failed"]


@contextmanager
def recorded_status(run: RunDirectory, *, is_main: bool) -> Iterator[None]:
    """Write ``status.json`` when training begins and when it ends.

    The file holds ``status``; ``step``, at which the run diverged or after which it was interrupted, or null;
    ``message``, the text of the error, or null; and ``exit_code`` of the command, or null while it runs. If the process
    is killed, ``status`` stays ``running``.

    Args:
        run: existing run directory.
        is_main: write the file; only one rank does.
    """

    def write(status: Status, *, step: int | None = None, message: str | None = None, code: int | None = None) -> None:
        if is_main:
            found = {"status": status, "step": step, "message": message, "exit_code": code}
            run.write_json(run.status.name, found)

    write("running")
    try:
        yield
    except BaseException as error:
        with suppress(MirrortuneError):  # the original error may be a full disk
            if isinstance(error, DivergedError):
                write("diverged", step=error.step, message=str(error), code=error.exit_code)
            elif isinstance(error, InterruptedRun):
                write("interrupted", step=error.step, message=str(error), code=error.exit_code)
            elif isinstance(error, KeyboardInterrupt):
                write("interrupted", code=130)
            else:
                known = PeerError(1) if lost_a_process(error) else known_error(error) or error
                code = known.exit_code if isinstance(known, MirrortuneError) else 1
                write("failed", message=str(known) or type(known).__name__, code=code)
        raise
    write("finished", code=0)


def read_status(run: RunDirectory) -> dict[str, Any]:
    """Return the content of ``status.json``, or an empty dict if the file is missing or damaged."""
    return json_object_or_none(run.status) or {}


def describe_status(run: RunDirectory) -> str:
    """Describe how an unfinished run ended, or return an empty string if that is unknown."""
    found = read_status(run)
    words = {
        "running": "it is running, or was killed",
        "diverged": f"it diverged at step {found.get('step')}",
        "interrupted": "it was interrupted" + (f" after step {found['step']}" if found.get("step") is not None else ""),
        "failed": "it failed",
    }
    return words.get(str(found.get("status")), "")
