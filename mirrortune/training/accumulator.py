# SPDX-License-Identifier: Apache-2.0
"""What optimizer steps sum up, and how long they take, kept on the device until somebody asks: no step waits for it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A tally as numbers.

    Attributes:
        loss_sum, num_items: of the finite steps since the window was opened.
        step: the latest step, or the first one that was not finite.
        loss, grad_norm: its mean loss, and the norm of its mean gradient before clipping.
        is_finite: whether all steps were; those from the first that was not were not made.
    """

    loss_sum: float
    num_items: int
    step: int
    loss: float
    grad_norm: float
    is_finite: bool


class Tally:
    """Counts steps on a device.

    Args:
        device: of the loss and the gradients.
    """

    def __init__(self, device: torch.device) -> None:
        # In float64 a sum over steps does not depend on where a resumed run was cut; MPS has none.
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._device = device
        self._window, self._latest = self._numbers(0.0, 0.0), self._numbers(0.0, 0.0, 0.0)
        self._broken = torch.zeros((), dtype=torch.bool, device=device)

    def add(self, totals: Tensor, grad_norm: Tensor, step: int) -> Tensor:
        """Count a step before it is made.

        Args:
            totals: loss sum and number of items of the global batch, shape (2,).
            grad_norm: of the mean gradient, shape ().
            step: its number, from 1.

        Returns:
            1 if the step must not be made, because it or an earlier one is not finite, else 0: float32, shape ().
        """
        norm = grad_norm.to(self._dtype)
        latest = torch.stack([torch.full_like(norm, step), totals[0] / totals[1], norm])
        self._latest = torch.where(self._broken, self._latest, latest)
        self._broken = self._broken | ~torch.isfinite(latest).all()
        self._window = self._window + torch.where(self._broken, torch.zeros_like(totals), totals)
        return self._broken.float()

    def open_window(self, loss_sum: float = 0.0, num_items: int = 0) -> None:
        """Begin a window of the log, or go on with one that was interrupted."""
        self._window = self._numbers(loss_sum, num_items)

    def read(self) -> Reading:
        """Everything so far; waits for the device."""
        numbers = torch.cat([self._window, self._latest, self._broken.to(self._dtype).reshape(1)]).tolist()
        loss_sum, num_items, step, loss, grad_norm, is_broken = numbers
        return Reading(
            loss_sum=loss_sum,
            num_items=round(num_items),
            step=round(step),
            loss=loss,
            grad_norm=grad_norm,
            is_finite=not is_broken,
        )

    def zeros(self) -> Tensor:
        """A loss sum and number of items to add to, shape (2,)."""
        return torch.zeros(2, dtype=self._dtype, device=self._device)

    def _numbers(self, *values: float) -> Tensor:
        return torch.tensor(values, dtype=self._dtype, device=self._device)


class StepClock:
    """Durations of steps in seconds, as the device sees them.

    Args:
        device: that computes; a GPU works behind the program, so marks are put into its queue and read later.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._marks: list[tuple[Any, Any]] = []
        self._start: Any = None
        self._seconds: list[float] = []

    def start(self) -> None:
        """A step begins."""
        self._start = self._mark()

    def stop(self) -> None:
        """It has been made, or is waiting in the device's queue."""
        self._marks.append((self._start, self._mark()))

    def drain(self) -> None:
        """Turn the marks so far into seconds and let go of them; waits for the device.

        An event of CUDA's is a resource of the driver: a long run must not hold two for each of its steps.
        """
        if self._is_cuda and self._marks:
            self._marks[-1][1].synchronize()
        self._seconds += [a.elapsed_time(b) / 1000 if self._is_cuda else b - a for a, b in self._marks]
        self._marks.clear()

    def seconds(self) -> list[float]:
        """Duration of every step so far; waits for the device."""
        self.drain()
        return self._seconds

    def _mark(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
