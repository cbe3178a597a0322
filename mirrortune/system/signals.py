# SPDX-License-Identifier: Apache-2.0
"""Defer SIGINT, SIGTERM and SIGUSR1 until a run can stop safely, and end a process that the others have left.

Schedulers send a signal before they kill a job: Slurm sends the one requested with ``--signal=USR1@300``, most others
send SIGTERM. Launchers of several processes send SIGTERM to the others when one has failed.
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

# One Ctrl-C reaches a process twice in quick succession: from the terminal and forwarded by the launcher. Only a SIGINT
# that arrives later than this is a second Ctrl-C.
IMPATIENT_AFTER_SECONDS = 2.0
_SECONDS_TO_BE_ENDED = 30.0
# What gloo and NCCL say when the process at the other end has ended.
_LEFT_ALONE = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StopSignals:
    """A context manager that records the first stop signal in ``number`` (0 for none) instead of ending the process.

    A SIGINT more than ``IMPATIENT_AFTER_SECONDS`` later raises KeyboardInterrupt. If another process of the launcher
    has ended before, the first signal ends this one: it may wait for the other, and can never finish its step.

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
            self._previous = {s: signal.signal(s, self._note) for s in STOP_SIGNALS}
        except ValueError:  # not in the main thread: signals are left to the embedding program
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

        Python runs a signal handler only after the main thread returns from native code, which may take a minute in a
        backward pass; the wake-up file descriptor is written to immediately.
        """
        if self._on_first is None and _num_siblings() == 1:
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


def await_launcher(error: BaseException) -> None:
    """If ``error`` shows that another process of the run has ended, wait for the launcher to end this one too.

    The other process reports its error, and its exit code is that of the run if the launcher finds no other failure
    with it. Returns after half a minute in which no launcher has ended this process.
    """
    if lost_a_process(error):
        time.sleep(_SECONDS_TO_BE_ENDED)


def lost_a_process(error: BaseException) -> bool:
    """Return whether ``error`` is that of a collective whose other process has ended.

    Errors of the network, such as those of the Hub, quote the same words, but are no RuntimeError.
    """
    is_known = isinstance(error, RuntimeError) and any(words in str(error) for words in _LEFT_ALONE)
    return is_known and int(os.environ.get("WORLD_SIZE", "1")) > 1


def _num_siblings() -> int:
    """Return the number of processes, with this one, that torchrun has started on this machine.

    1 with another launcher: the processes of srun or mpirun need not be children of the same process.
    """
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def _is_left_alone() -> bool:
    """Return whether another process of the launcher has ended."""
    import psutil  # noqa: PLC0415

    if _num_siblings() == 1:
        return False
    found = [one.info for one in psutil.process_iter(["ppid", "status"]) if one.info["ppid"] == os.getppid()]
    num_alive: int = sum(one["status"] != psutil.STATUS_ZOMBIE for one in found)
    return num_alive < _num_siblings()


def _tell_first(arrived: socket.socket, tell: Callable[[int], None] | None) -> None:
    """Call ``tell`` with the number of the first signal, then keep reading until the other end is closed."""
    has_told = False
    with arrived:
        while numbers := arrived.recv(64):
            first = next((number for number in numbers if number in STOP_SIGNALS), None)
            if first is not None and not has_told:
                has_told = True
                if _is_left_alone():  # the main thread may never return from a collective, nor from an exit handler
                    os._exit(128 + ends_as(first))
                if tell is not None:
                    tell(first)


def describe_stop(number: int) -> str:
    """Return the message that a run shows when a signal asks it to stop."""
    more = "; press Ctrl-C again to stop now" if number == signal.SIGINT else ""
    return f"{signal.Signals(number).name}: stopping after this step, with a checkpoint{more}"


def ends_as(number: int) -> int:
    """Return the signal that determines the exit code (128 + its number); SIGUSR1, a warning, counts as SIGTERM."""
    return signal.SIGINT if number == signal.SIGINT else signal.SIGTERM


def how_to_go_on(number: int) -> str:
    """Return the advice to show after signal ``number`` has stopped a run."""
    if number in (signal.SIGINT, signal.SIGTERM):
        return "Continue with the same command and --resume"
    job = os.environ.get("SLURM_JOB_ID")
    how = f"Requeue it (scontrol requeue {job})" if job else "Submit it again"
    return f"{how} with --resume in its command"
