# SPDX-License-Identifier: Apache-2.0
"""Handle SIGINT, SIGTERM and SIGUSR1 when a run can stop safely.

Schedulers warn a job before they end it: Slurm with the signal of ``--signal=USR1@300``, most others with SIGTERM.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

# A launcher forwards signals that its processes also get from the terminal: one key press arrives twice within a
# moment. A later one is a second key press.
IMPATIENT_AFTER_SECONDS = 2.0
_WARNINGS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StopSignals:
    """Context in which a signal to stop is only recorded in ``number`` (the first one; 0 for none).

    A SIGINT some seconds later raises KeyboardInterrupt.

    Args:
        on_first: called in a separate thread with the number of the first signal as soon as it arrives.
    """

    def __init__(self, on_first: Callable[[int], None] | None = None) -> None:
        self.number = 0
        self._on_first = on_first
        self._listener: tuple[socket.socket, threading.Thread, int] | None = None
        self._noted_at = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        try:
            self._previous = {s: signal.signal(s, self._note) for s in _WARNINGS}
        except ValueError:  # not in the main thread: the embedding program handles signals
            self._previous = {}
        else:
            self._listen()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._listener is not None:
            ours, thread, previous = self._listener
            signal.set_wakeup_fd(previous)
            ours.close()
            thread.join()
            self._listener = None

    def _listen(self) -> None:
        """Start the thread that calls ``on_first``.

        Python runs a signal handler only when the main thread returns from native code, such as a backward pass of a
        minute; the wake-up descriptor is written to immediately.
        """
        if self._on_first is None:
            return
        ours, theirs = socket.socketpair()
        ours.settimeout(0)  # the wake-up descriptor must not block
        thread = threading.Thread(target=_tell_first, args=(theirs, self._on_first), daemon=True)
        thread.start()
        self._listener = ours, thread, signal.set_wakeup_fd(ours.fileno(), warn_on_full_buffer=False)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.number:
            self.number, self._noted_at = number, now
        elif number == signal.SIGINT and now - self._noted_at >= IMPATIENT_AFTER_SECONDS:
            raise KeyboardInterrupt


def _tell_first(arrived: socket.socket, tell: Callable[[int], None]) -> None:
    """Call ``tell`` with the first signal that arrives, and read on until the other end is closed."""
    has_told = False
    with arrived:
        while numbers := arrived.recv(64):
            first = next((number for number in numbers if number in _WARNINGS), None)
            if first is not None and not has_told:
                has_told = True
                tell(first)


def describe_stop(number: int) -> str:
    """Return the message that a run shows as soon as a signal asks it to stop."""
    more = "; press Ctrl-C again to stop now" if number == signal.SIGINT else ""
    return f"{signal.Signals(number).name}: stopping after this step, with a checkpoint{more}"


def ends_as(number: int) -> int:
    """Return the signal whose exit code (128 + its number) a stopped run has: SIGUSR1, a warning, counts as SIGTERM."""
    return signal.SIGINT if number == signal.SIGINT else signal.SIGTERM


def how_to_go_on(number: int) -> str:
    """Return the advice after a run was stopped by signal ``number``."""
    if number in (signal.SIGINT, signal.SIGTERM):
        return "Continue with the same command and --resume"
    job = os.environ.get("SLURM_JOB_ID")
    how = f"Requeue it (scontrol requeue {job})" if job else "Submit it again"
    return f"{how} with --resume in its command"
