# SPDX-License-Identifier: Apache-2.0
"""What the processes of a run tell each other besides gradients: what the main one made, whether it failed, when to
stop.

They meet in a group of their own (gloo, on the CPU), where waiting for a slow one has no deadline: a matrix may take
hours to factorise, a disk minutes to write. A process that has died is noticed all the same: its connection closes.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import distributed

from mirrortune.errors import MirrortuneError, PeerError
from mirrortune.system.signals import StopSignals

T = TypeVar("T")
_NO_DEADLINE = datetime.timedelta(days=30)


def from_main(accelerator: Any, make: Callable[[], T]) -> T:
    """What ``make`` returns on the main process, on every process; the others wait for it.

    Raises:
        MirrortuneError: what ``make`` raised, on the main process.
        PeerError: on the others then.
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


def gather_lists(accelerator: Any, own: list[T]) -> list[T]:
    """The lists of all processes, one after the other, on every process."""
    if accelerator.num_processes == 1:
        return own
    found: list[Any] = [None] * accelerator.num_processes
    distributed.all_gather_object(found, own, group=_group())
    return [item for part in found for item in part]


def told_once(accelerator: Any, error: MirrortuneError) -> MirrortuneError:
    """For an error that every process has: itself on the main one, a silent one with its exit code on the others."""
    return error if accelerator.is_main_process else PeerError(error.exit_code)


class StopVote:
    """Whether any process was asked to stop, so that all of them stop after the same step.

    Every process calls :meth:`poll` equally often. With several, an answer is that of the poll before: the votes travel
    while the next step is computed, and nobody waits for them.

    Attributes:
        number: the signal that was agreed on, or 0.
    """

    def __init__(self, accelerator: Any, signals: StopSignals) -> None:
        self.number = 0
        self._signals, self._is_alone = signals, accelerator.num_processes == 1
        self._votes = torch.zeros(1, dtype=torch.int32)
        self._pending: Any = None

    def poll(self) -> int:
        """The number of the signal to stop for, or 0."""
        if self._is_alone:
            self.number = self._signals.number
            return self.number
        self.close()
        self._votes = torch.tensor([self._signals.number], dtype=torch.int32)
        self._pending = distributed.all_reduce(self._votes, distributed.ReduceOp.MAX, group=_group(), async_op=True)
        return self.number

    def close(self) -> None:
        """Wait for the votes that are still travelling."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
            self.number = self.number or int(self._votes)


@functools.cache
def _group() -> Any:
    return distributed.new_group(backend="gloo", timeout=_NO_DEADLINE)
