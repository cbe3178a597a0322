# SPDX-License-Identifier: Apache-2.0
"""SIGINT, SIGTERM and SIGUSR1, noted and acted on when it is safe.

Schedulers warn a job before they end it: Slurm with the signal of ``--signal=USR1@300``, most others with SIGTERM.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

# A launcher passes on what its processes get from the terminal as well: the same key press arrives twice within a
# moment. Who presses again later means it.
IMPATIENT_AFTER_SECONDS = 2.0
_WARNINGS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StopSignals:
    """While entered, a signal to stop is only noted in ``number`` (the first one; 0 for none).

    A SIGINT some seconds after it interrupts at once.
    """

    def __init__(self) -> None:
        self.number = 0
        self._noted_at = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        try:
            self._previous = {s: signal.signal(s, self._note) for s in _WARNINGS}
        except ValueError:  # not in the main thread: the embedding program handles signals
            self._previous = {}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.number:
            self.number, self._noted_at = number, now
        elif number == signal.SIGINT and now - self._noted_at >= IMPATIENT_AFTER_SECONDS:
            raise KeyboardInterrupt


def ends_as(number: int) -> int:
    """The signal whose exit code (128 + its number) a run reports that ``number`` stopped: a warning is a SIGTERM."""
    return signal.SIGINT if number == signal.SIGINT else signal.SIGTERM


def how_to_go_on(number: int) -> str:
    """What to do after a run was stopped by ``number``."""
    if number in (signal.SIGINT, signal.SIGTERM):
        return "Continue with the same command and --resume"
    job = os.environ.get("SLURM_JOB_ID")
    how = f"Requeue it (scontrol requeue {job})" if job else "Submit it again"
    return f"{how} with --resume in its command"
