# SPDX-License-Identifier: Apache-2.0
"""One optimizer step on one global batch.

Micro-batches are summed, not averaged, and the gradient is divided by the number of items in the global batch over all
ranks, so that a step does not depend on how the batch is split. Nothing here waits for the device: loss, norm and
whether they are finite stay there (``accumulator.py``), and a step that is not finite is skipped there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mirrortune.data.loader import MicroBatch, forward
from mirrortune.system.distributed.sharding import Sharding, own_share, whole
from mirrortune.tasks.base import Task
from mirrortune.training.accumulator import Tally
from mirrortune.training.optim import set_lr


class PlainUpdate:
    """Gradients and steps on one process, or on several under DistributedDataParallel or FSDP2.

    Args:
        optimizer: prepared by ``accelerator``.
        accelerator: accelerate's ``Accelerator``.
        tally: sums of the steps.
        max_grad_norm: gradients are scaled down to this norm.
    """

    def __init__(self, optimizer: Any, accelerator: Any, tally: Tally, max_grad_norm: float) -> None:
        self.optimizer, self.accelerator = optimizer, accelerator
        self.tally, self.max_grad_norm = tally, max_grad_norm

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradients of the summed loss of a micro-batch; ``is_last`` of its step."""
        self.accelerator.backward(loss)

    def step(self, totals: Tensor, number: int) -> None:
        """Divide the gradients by the items, clip and step, unless these or earlier ones were not finite.

        Args:
            totals: loss sum and number of items of the global batch, shape (2,).
            number: of the step, from 1.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        gradients = [own_share(p.grad) for p in parameters if p.grad is not None]
        # DistributedDataParallel has averaged over ranks; the mean is over the items of all of them.
        torch._foreach_mul_(gradients, self.accelerator.num_processes / totals[1])
        norm = whole(self.accelerator.clip_grad_norm_(parameters, self.max_grad_norm))
        self.optimizer.optimizer.found_inf = self.tally.add(totals, norm, number)  # what makes fused AdamW skip a step
        self.optimizer.step()
        self.optimizer.zero_grad()


class ZeroUpdate:
    """Gradients and steps by DeepSpeed's engine; the methods are those of :class:`PlainUpdate`.

    Args:
        engine: DeepSpeed's engine.
        num_processes: number of processes over which it averages gradients.
        tally: sums of the steps.
    """

    def __init__(self, engine: Any, num_processes: int, tally: Tally) -> None:
        self.engine, self.num_processes, self.tally = engine, num_processes, tally
        self._is_broken = False

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradients of the summed loss of a micro-batch; ``is_last`` of its step."""
        self.engine.set_gradient_accumulation_boundary(is_last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, totals: Tensor, number: int) -> None:
        """Divide, clip and step as :meth:`PlainUpdate.step` does."""
        optimizer, norm = self.engine.optimizer, math.nan
        loss, items = totals.tolist()  # DeepSpeed waits for the device in every step anyway
        if math.isfinite(loss) and items and not self._is_broken:
            optimizer.override_loss_scale(items / self.num_processes)
            self.engine.step()
            optimizer.override_loss_scale(1.0)
            norm = math.nan if optimizer.overflow else float(self.engine.get_global_grad_norm())
        self._is_broken |= not math.isfinite(norm)
        self.tally.add(totals, totals.new_tensor(norm), number)


Update = PlainUpdate | ZeroUpdate


def make_update(
    model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Any, tally: Tally, max_grad_norm: float
) -> tuple[Any, Any, Update]:
    """Prepare a model and its optimizer for the processes of a run; returns both with the update that makes steps.

    Args:
        model: bare; ``accelerator`` moves it, and wraps or shards it.
        optimizer: of the trained parameters.
        accelerator: accelerate's ``Accelerator``.
        tally: sums of the steps.
        max_grad_norm: gradients are scaled down to this norm.
    """
    sharding = Sharding.of(accelerator)
    prepared, wrapped = sharding.prepare(model, optimizer, max_grad_norm=max_grad_norm)
    if sharding.stage:
        return prepared, wrapped, ZeroUpdate(prepared, accelerator.num_processes, tally)
    return prepared, wrapped, PlainUpdate(wrapped, accelerator, tally, max_grad_norm)


class Stepper:
    """Make optimizer steps.

    Args:
        model, optimizer, update: from :func:`make_update`; the groups of the optimizer have ``peak_lr``.
        accelerator: accelerate's ``Accelerator``.
        task: loss.
        tally: sums of the steps.
        num_micro: micro-batches per rank and step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        update: Update,
        accelerator: Any,
        *,
        task: Task,
        tally: Tally,
        num_micro: int,
    ) -> None:
        self.model, self.optimizer, self.update, self.accelerator = model, optimizer, update, accelerator
        self.task, self.tally, self.num_micro = task, tally, num_micro

    def step(self, number: int, micro_batches: Iterator[MicroBatch], lr_factor: float) -> tuple[int, int | None]:
        """Make the step of the next global batch, at ``lr_factor`` times the peak learning rates.

        From the first step on whose loss or gradient is not finite, parameters and moments stay as they are; the tally
        records it.

        Args:
            number: of the step, from 1.
            micro_batches: those of this rank; ``num_micro`` are consumed.
            lr_factor: share of the peak learning rates.

        Returns:
            Number of rows of the global batch, and of tokens where rows are text.
        """
        totals, last = self._accumulate(micro_batches)
        if self.accelerator.num_processes > 1:
            totals = self.accelerator.reduce(totals, reduction="sum")
        set_lr(self.optimizer, lr_factor)
        self.update.step(totals, number)
        return last.num_rows_of_step, last.num_tokens_of_step

    def _accumulate(self, micro_batches: Iterator[MicroBatch]) -> tuple[Tensor, MicroBatch]:
        """Accumulate gradients of this rank; returns loss sum and number of items, (2,), and the last micro-batch."""
        totals = self.tally.zeros()
        for left in reversed(range(self.num_micro)):
            part = next(micro_batches)
            with self.accelerator.no_sync(self.model) if left else nullcontext():
                loss, items = self._micro_loss(part)
                self.update.backward(loss, is_last=left == 0)
            totals[0] += loss.detach()
            totals[1] += items
        return totals, part

    def _micro_loss(self, part: MicroBatch) -> tuple[Tensor, int | Tensor]:
        inputs, outputs, targets = forward(self.model, part.batch, self.accelerator.device)
        loss, items = self.task.loss(inputs, outputs, targets)
        return (loss * 0, 0) if part.is_empty else (loss, items)
