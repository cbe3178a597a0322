# SPDX-License-Identifier: Apache-2.0
"""Exchange results of the main process, errors and stop votes between the processes of a run.

Messages go through a separate process group (gloo, on the CPU) without a timeout, because factorisation may take hours
and writing to disk minutes. A process that dies is still noticed, because its connection closes.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from mirrortune.errors import MirrortuneError, PeerError
from mirrortune.system.signals import StopSignals

T = TypeVar("T")
_NO_DEADLINE = datetime.timedelta(days=30)


def from_main(accelerator: Any, make: Callable[[], T]) -> T:
    """Call ``make`` on the main process and return its result on every process.

    Raises:
        MirrortuneError: on the main process, if ``make`` raised it.
        PeerError: on the other processes, if ``make`` raised an error.
    """
    if accelerator.num_processes == 1:
        return make()
    made: list[Any] = [None, 0]
    failure = None
    if accelerator.is_main_process:
        try:
            made[0] = make()
        except MirrortuneError as error:
            failure, made[1] = error, error.exit_code
    distributed.broadcast_object_list(made, src=0, group=_group())
    if failure is not None:
        raise failure
    if made[1]:
        raise PeerError(made[1])
    result: T = made[0]
    return result


def from_all(accelerator: Any, make: Callable[[], T]) -> T:
    """Call ``make``, in which the processes meet, on all of them and return the main process's result on each.

    Raises:
        MirrortuneError: error raised by ``make`` on the main process, on that process.
        PeerError: on the other processes in that case.
    """
    made, failures = list[T](), list[MirrortuneError]()
    try:
        made.append(make())
    except MirrortuneError as error:  # on the main process alone: without a word the others would wait for its result
        failures.append(error)

    def outcome() -> T:
        if failures:
            raise failures[0]
        return made[0]

    return from_main(accelerator, outcome)


def gather_lists(accelerator: Any, own: list[T]) -> list[T]:
    """Concatenate the lists of all processes, in rank order, and return the result on every process."""
    if accelerator.num_processes == 1:
        return own
    found: list[Any] = [None] * accelerator.num_processes
    distributed.all_gather_object(found, own, group=_group())
    return [item for part in found for item in part]


def copy_from_main(accelerator: Any, tensors: Iterable[Tensor]) -> None:
    """Copy the main process's values into the tensors of all processes, in place."""
    if accelerator.num_processes > 1:
        for tensor in tensors:
            held = tensor.detach().cpu()
            distributed.broadcast(held, src=0, group=_group())
            tensor.copy_(held)


def told_once(accelerator: Any, error: MirrortuneError) -> MirrortuneError:
    """Return the error to raise on this process: ``error`` on the main one, a silent PeerError on the others."""
    return error if accelerator.is_main_process else PeerError(error.exit_code)


class StopVote:
    """A vote by which all processes stop after the same step.

    All processes call :meth:`poll` equally often. With several processes it returns the result of the previous poll:
    votes are reduced while the next step is computed, so that no process waits.

    Attributes:
        number: number of the signal that was agreed on, or 0.
    """

    def __init__(self, accelerator: Any, signals: StopSignals) -> None:
        self.number = 0
        self._signals, self._is_alone = signals, accelerator.num_processes == 1
        self._votes = torch.zeros(1, dtype=torch.int32)
        self._pending: Any = None

    def poll(self) -> int:
        """Vote, and return the number of the signal to stop for, or 0."""
        if self._is_alone:
            self.number = self._signals.number
            return self.number
        self.close()
        self._votes = torch.tensor([self._signals.number], dtype=torch.int32)
        self._pending = distributed.all_reduce(self._votes, distributed.ReduceOp.MAX, group=_group(), async_op=True)
        return self.number

    def close(self) -> None:
        """Wait for the pending votes."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
            self.number = self.number or int(self._votes)


@functools.cache
def _group() -> Any:
    return distributed.new_group(backend="gloo", timeout=_NO_DEADLINE)
