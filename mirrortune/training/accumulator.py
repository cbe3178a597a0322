# SPDX-License-Identifier: Apache-2.0
"""Accumulate loss, gradient norm and step durations on the device, so that no step waits for the device."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mirrortune.system.devices import float64_device


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """The values of a :class:`Tally`.

    Attributes:
        loss_sum: sum of the loss over the finite steps since the window was opened.
        num_items: number of items in these steps, or the sum of their weights.
        step: latest step, or the first one that was not finite.
        loss: mean loss of that step.
        grad_norm: norm of its mean gradient before clipping.
        is_finite: all steps were finite, not counting those recorded by :meth:`Tally.skip`. From the first non-finite
            step on, no parameter is updated.
    """

    loss_sum: float
    num_items: float
    step: int
    loss: float
    grad_norm: float
    is_finite: bool


class Tally:
    """Accumulates loss, items and gradient norm of steps on a device.

    Args:
        device: device of the loss and the gradients.
    """

    def __init__(self, device: torch.device) -> None:
        # In float64, a sum over steps does not depend on where a resumed run was interrupted.
        self._dtype = torch.float64 if float64_device(device) == device else torch.float32
        self._device = device
        self._window, self._latest = self._numbers(0.0, 0.0), self._numbers(0.0, 0.0, 0.0)
        self._broken = torch.zeros((), dtype=torch.bool, device=device)

    def add(self, totals: Tensor, grad_norm: Tensor, step: int) -> Tensor:
        """Add a step before its update is applied.

        Args:
            totals: loss sum and number of items of the global batch, shape (2,).
            grad_norm: norm of the mean gradient, shape ().
            step: number of the step, starting at 1.

        Returns:
            1 if the update must be skipped because this or an earlier step is not finite, else 0; float32, shape ().
        """
        norm = grad_norm.to(self._dtype)
        latest = torch.stack([torch.full_like(norm, step), totals[0] / totals[1], norm])
        self._latest = torch.where(self._broken, self._latest, latest)
        self._broken = self._broken | ~torch.isfinite(latest).all()
        self._window = self._window + torch.where(self._broken, torch.zeros_like(totals), totals)
        return self._broken.float()

    def skip(self, totals: Tensor) -> None:
        """Add the loss, if finite, of a step whose update is skipped because a gradient overflowed.

        Args:
            totals: loss sum and number of items of the global batch, shape (2,).
        """
        is_finite = torch.isfinite(totals).all()
        self._window = self._window + torch.where(is_finite, totals, torch.zeros_like(totals))
        latest = torch.stack([self._latest[0], totals[0] / totals[1], self._latest[2]])
        self._latest = torch.where(is_finite, latest, self._latest)

    def open_window(self, loss_sum: float = 0.0, num_items: float = 0.0) -> None:
        """Start a logging window, or restore one that was interrupted."""
        self._window = self._numbers(loss_sum, num_items)

    def read(self) -> Totals:
        """Return the sums so far, waiting for the device."""
        numbers = torch.cat([self._window, self._latest, self._broken.to(self._dtype).reshape(1)]).tolist()
        loss_sum, num_items, step, loss, grad_norm, is_broken = numbers
        return Totals(
            loss_sum=loss_sum,
            num_items=num_items,
            step=round(step),
            loss=loss,
            grad_norm=grad_norm,
            is_finite=not is_broken,
        )

    def zeros(self) -> Tensor:
        """Return a zero loss sum and a zero number of items, shape (2,)."""
        return torch.zeros(2, dtype=self._dtype, device=self._device)

    def _numbers(self, *values: float) -> Tensor:
        return torch.tensor(values, dtype=self._dtype, device=self._device)


class StepClock:
    """Measures durations of steps on the device, in seconds.

    Args:
        device: device of the model. A GPU runs asynchronously, so events are queued and read later.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._marks: list[tuple[Any, Any]] = []
        self._start: Any = None
        self._seconds: list[float] = []

    def start(self) -> None:
        """Mark the start of a step."""
        self._start = self._mark()

    def stop(self) -> None:
        """Mark the end of a step that is done, or queued on the device."""
        self._marks.append((self._start, self._mark()))

    def drain(self) -> None:
        """Convert the marks so far to seconds and release them, waiting for the device.

        A CUDA event is a driver resource, so a long run must not hold two events per step.
        """
        if self._is_cuda and self._marks:
            self._marks[-1][1].synchronize()
        self._seconds += [a.elapsed_time(b) / 1000 if self._is_cuda else b - a for a, b in self._marks]
        self._marks.clear()

    def seconds(self) -> list[float]:
        """Return the duration of every step so far, waiting for the device."""
        self.drain()
        return self._seconds

    def _mark(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
