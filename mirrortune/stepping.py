# SPDX-License-Identifier: Apache-2.0
"""One optimizer step on one global batch.

Micro-batches are summed, not averaged, and the gradient is divided by the number of items in the whole global batch
over all ranks, so that the way it is cut does not change the step.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mirrortune.batching import forward, micro_batches
from mirrortune.errors import MirrortuneError
from mirrortune.examples import Examples, Rows
from mirrortune.optim import set_lr
from mirrortune.tasks import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """A step that was made.

    Attributes:
        loss_sum: loss of all items of the global batch, over all ranks.
        num_items: how many items that is.
        grad_norm: of the mean gradient, before clipping.
    """

    loss_sum: float
    num_items: int
    grad_norm: float


class NotFiniteError(MirrortuneError):
    """The loss or gradient of a step is NaN or infinite; the parameters are as they were."""

    def __init__(self, loss: float, grad_norm: float) -> None:
        super().__init__("step", f"the training loss is {loss:g} and the gradient norm {grad_norm:g}")


class Stepper:
    """Makes optimizer steps.

    Args:
        model: prepared by ``accelerator``.
        optimizer: prepared by ``accelerator``; its groups carry ``peak_lr``.
        accelerator: accelerate's.
        task: the loss.
        examples: training rows.
        num_micro: micro-batches per rank and step.
        max_grad_norm: gradients are scaled down to this norm.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        accelerator: Any,
        *,
        task: Task,
        examples: Examples,
        num_micro: int,
        max_grad_norm: float,
    ) -> None:
        self.model, self.optimizer, self.accelerator = model, optimizer, accelerator
        self.task, self.examples = task, examples
        self.num_micro, self.max_grad_norm = num_micro, max_grad_norm

    def step(self, batch: Rows, epoch: int, lr_factor: float) -> StepResult:
        """Forward, backward and update on a global batch of ``epoch``, at ``lr_factor`` times the peak learning rates.

        Raises:
            NotFiniteError: before the update.
        """
        accelerator = self.accelerator
        loss_sum, num_items = self._accumulate(batch, epoch)
        loss_sum, num_items = self._sum_over_ranks(loss_sum, num_items)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            if parameter.grad is not None:
                # DistributedDataParallel has averaged over ranks; the mean is over the items of all of them.
                parameter.grad.mul_(accelerator.num_processes / num_items)
        grad_norm = float(accelerator.clip_grad_norm_(parameters, self.max_grad_norm))
        if not (math.isfinite(loss_sum) and math.isfinite(grad_norm)):
            raise NotFiniteError(loss_sum / num_items, grad_norm)
        set_lr(self.optimizer, lr_factor)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return StepResult(loss_sum=loss_sum, num_items=num_items, grad_norm=grad_norm)

    def _accumulate(self, batch: Rows, epoch: int) -> tuple[float, int]:
        """Gradients of this rank's share of the batch; its loss sum and items."""
        parts = micro_batches(
            batch,
            self.examples.lengths,
            num_micro=self.num_micro,
            num_ranks=self.accelerator.num_processes,
            rank=self.accelerator.process_index,
        )
        loss_sum, num_items = torch.zeros((), device=self.accelerator.device), 0
        for index, rows in enumerate(parts):
            is_last = index == len(parts) - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                loss, items = self._micro_loss(rows, batch, epoch)
                self.accelerator.backward(loss)
            loss_sum += loss.detach()
            num_items += items
        return float(loss_sum), num_items

    def _micro_loss(self, rows: Rows, batch: Rows, epoch: int) -> tuple[Tensor, int]:
        # A last global batch may have fewer rows than parts: an empty part still runs forward and backward, with weight
        # zero, because the other ranks wait for its gradients.
        is_empty = len(rows) == 0
        made = self.examples.batch(batch[:1] if is_empty else rows, epoch)
        _, outputs, targets = forward(self.model, made, self.accelerator.device)
        loss, items = self.task.loss(outputs, targets)
        return (loss * 0, 0) if is_empty else (loss, items)

    def _sum_over_ranks(self, loss_sum: float, num_items: int) -> tuple[float, int]:
        if self.accelerator.num_processes == 1:
            return loss_sum, num_items
        both = torch.tensor([loss_sum, num_items], dtype=torch.float64, device=self.accelerator.device)
        total, items = self.accelerator.reduce(both, reduction="sum").tolist()
        return float(total), int(items)
