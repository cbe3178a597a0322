# SPDX-License-Identifier: Apache-2.0
"""One optimizer step on one global batch.

Micro-batches are summed, not averaged, and the gradient is divided by the number of items in the global batch over all
ranks, so that a step does not depend on how the batch is split. But in float16, nothing here waits for the device:
loss, norm and whether they are finite stay there (``accumulator.py``), and a step that is not finite is skipped there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from typing_extensions import override

from mirrortune.data.loader import MicroBatch, forward
from mirrortune.system.distributed.sharding import Sharding, own_share, whole
from mirrortune.tasks.base import ComparesRows
from mirrortune.tasks.objective import Objective
from mirrortune.training.accumulator import Tally
from mirrortune.training.optim import set_lr

_OF_SCALER = ("scale", "_growth_tracker")


class Update(ABC):
    """How gradients are added up and steps are made on the processes of a run."""

    @abstractmethod
    def backward(self, loss: Tensor, items: int | Tensor, *, is_last: bool) -> None:
        """Add the gradients of the loss of a micro-batch, summed over ``items``; ``is_last`` of its step."""

    @abstractmethod
    def step(self, totals: Tensor, number: int) -> bool:
        """Divide the gradients by the items, clip and step, unless these or earlier ones were not finite.

        Args:
            totals: loss sum and number of items of the global batch, shape (2,).
            number: of the step, from 1.

        Returns:
            False if gradients overflowed in float16: the step is left out, and the next one may be made.
        """

    @property
    def scale(self) -> float | None:
        """Factor of the loss in the backward pass; None where it has none."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """Return the state that a checkpoint keeps besides the optimizer's, by name."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:  # noqa: B027  (most have nothing to restore)
        """Restore what :meth:`tensors` returned; other tensors may be among them."""


class PlainUpdate(Update):
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
        self._is_fused = getattr(optimizer.optimizer, "_step_supports_amp_scaling", False)

    @override
    def backward(self, loss: Tensor, items: int | Tensor, *, is_last: bool) -> None:
        self.accelerator.backward(loss)

    @override
    def step(self, totals: Tensor, number: int) -> bool:
        norm = self._clip(self.accelerator.num_processes / totals[1])
        is_broken = self.tally.add(totals, norm, number)
        if self._is_fused:
            self.optimizer.optimizer.found_inf = is_broken  # what makes fused AdamW skip a step
            self.optimizer.step()
        elif not is_broken:  # other optimizers wait for the device
            self.optimizer.step()
        self.optimizer.zero_grad()
        return True

    def _clip(self, factor: Tensor) -> Tensor:
        """Multiply the gradients by ``factor``, clip them, and return their norm before that, shape ()."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        gradients = [own_share(p.grad) for p in parameters if p.grad is not None]
        # DistributedDataParallel has averaged over ranks; the mean is over the items of all of them.
        torch._foreach_mul_(gradients, factor)
        return whole(self.accelerator.clip_grad_norm_(parameters, self.max_grad_norm))


class ScaledUpdate(PlainUpdate):
    """Gradients and steps in float16: losses are scaled up, since small gradients would round to zero.

    A step whose gradients overflow is left out, and the scale halves. Each step waits for the device to know that.

    Args:
        optimizer: prepared by ``accelerator``.
        accelerator: accelerate's ``Accelerator``, with a scaler.
        tally: sums of the steps.
        max_grad_norm: gradients are scaled down to this norm, once they have their own scale again.
        num_micro: micro-batches per rank and step.
    """

    def __init__(self, optimizer: Any, accelerator: Any, tally: Tally, max_grad_norm: float, *, num_micro: int) -> None:
        super().__init__(optimizer, accelerator, tally, max_grad_norm)
        self.num_micro, self._is_fresh = num_micro, True

    @override
    def backward(self, loss: Tensor, items: int | Tensor, *, is_last: bool) -> None:
        if self._is_fresh:
            self._choose_scale(items)
        self.accelerator.backward(loss)

    def _choose_scale(self, items: int | Tensor) -> None:
        """Divide torch's initial scale, which is for mean losses, by about the ``items`` of a global batch."""
        own = torch.as_tensor(items, dtype=torch.float32, device=self.accelerator.device)
        count = float(self.accelerator.reduce(own, reduction="sum")) * self.num_micro
        state = self.accelerator.scaler.state_dict()
        scale = state["scale"] / 2.0 ** round(math.log2(max(1.0, count)))
        self.accelerator.scaler.load_state_dict({**state, "scale": scale})
        self._is_fresh = False

    def _back_off(self) -> None:
        """Halve the scale and let it stay for the usual number of steps, as the scaler does after an overflow."""
        scaler = self.accelerator.scaler
        scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
        scaler.load_state_dict({**scaler.state_dict(), "_growth_tracker": 0})

    @property
    @override
    def scale(self) -> float | None:
        return float(self.accelerator.scaler.get_scale())

    @override
    def tensors(self) -> dict[str, Tensor]:
        state = {} if self._is_fresh else self.accelerator.scaler.state_dict()
        return {f"scaler.{name}": torch.tensor(state[name], dtype=torch.float64) for name in _OF_SCALER if state}

    @override
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        found = {name: tensors[f"scaler.{name}"].item() for name in _OF_SCALER if f"scaler.{name}" in tensors}
        if found:
            state = self.accelerator.scaler.state_dict()
            self.accelerator.scaler.load_state_dict(
                {**state, **found, "_growth_tracker": int(found["_growth_tracker"])}
            )
            self._is_fresh = False

    @override
    def step(self, totals: Tensor, number: int) -> bool:
        # The last term makes the norm of a step with a loss that is not finite NaN.
        norm = self._clip(self.accelerator.num_processes / totals[1] + 0 * totals[0])
        is_made = bool(torch.isfinite(norm))
        if is_made:
            self.tally.add(totals, norm, number)
            self.optimizer.step()
        else:
            self.tally.skip(totals)
            self._back_off()
        self.optimizer.zero_grad()
        return is_made


class ZeroUpdate(Update):
    """Gradients and steps by DeepSpeed's engine.

    Args:
        engine: DeepSpeed's engine.
        num_processes: number of processes over which it averages gradients.
        tally: sums of the steps.
    """

    def __init__(self, engine: Any, num_processes: int, tally: Tally) -> None:
        self.engine, self.num_processes, self.tally = engine, num_processes, tally
        self._is_broken = False

    @override
    def backward(self, loss: Tensor, items: int | Tensor, *, is_last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(is_last)
        self.engine.backward(loss, scale_wrt_gas=False)

    @override
    def step(self, totals: Tensor, number: int) -> bool:
        optimizer, norm = self.engine.optimizer, math.nan
        loss, items = totals.tolist()  # DeepSpeed waits for the device in every step anyway
        if math.isfinite(loss) and items and not self._is_broken:
            optimizer.override_loss_scale(items / self.num_processes)
            self.engine.step()
            optimizer.override_loss_scale(1.0)
            norm = math.nan if optimizer.overflow else float(self.engine.get_global_grad_norm())
        self._is_broken |= not math.isfinite(norm)
        self.tally.add(totals, totals.new_tensor(norm), number)
        return True


def make_update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Any,
    tally: Tally,
    *,
    max_grad_norm: float,
    num_micro: int,
) -> tuple[Any, Any, Update]:
    """Prepare a model and its optimizer for the processes of a run; returns both with the update that makes steps.

    Args:
        model: bare; ``accelerator`` moves it, and wraps or shards it.
        optimizer: of the trained parameters.
        accelerator: accelerate's ``Accelerator``.
        tally: sums of the steps.
        max_grad_norm: gradients are scaled down to this norm.
        num_micro: micro-batches per rank and step.
    """
    sharding = Sharding.of(accelerator)
    prepared, wrapped = sharding.prepare(model, optimizer, max_grad_norm=max_grad_norm)
    if sharding.stage:
        return prepared, wrapped, ZeroUpdate(prepared, accelerator.num_processes, tally)
    if accelerator.scaler is not None:
        scaled = ScaledUpdate(wrapped, accelerator, tally, max_grad_norm, num_micro=num_micro)
        return prepared, wrapped, scaled
    return prepared, wrapped, PlainUpdate(wrapped, accelerator, tally, max_grad_norm)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step consumed.

    Attributes:
        rows: of the global batch.
        tokens: of the global batch without padding; None for rows that are not text.
        is_made: False if gradients overflowed in float16 and the step was left out.
    """

    rows: int
    tokens: int | None
    is_made: bool


class Stepper:
    """Make optimizer steps.

    Args:
        model, optimizer, update: from :func:`make_update`; the groups of the optimizer have ``peak_lr``.
        accelerator: accelerate's ``Accelerator``.
        objective: training loss.
        tally: sums of the steps.
        num_micro: micro-batches per rank and step.
        batch_size: largest number of rows of a micro-batch.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        update: Update,
        accelerator: Any,
        *,
        objective: Objective,
        tally: Tally,
        num_micro: int,
        batch_size: int,
    ) -> None:
        self.model, self.optimizer, self.update, self.accelerator = model, optimizer, update, accelerator
        self.objective, self.tally, self.num_micro, self.batch_size = objective, tally, num_micro, batch_size

    def step(self, number: int, micro_batches: Iterator[MicroBatch], lr_factor: float) -> StepResult:
        """Make the step of the next global batch, at ``lr_factor`` times the peak learning rates.

        From the first step on whose loss or gradient is not finite, parameters and moments stay as they are; the tally
        records it.

        Args:
            number: of the step, from 1.
            micro_batches: those of this rank; ``num_micro`` are consumed.
            lr_factor: share of the peak learning rates.

        """
        totals, last = self._accumulate(micro_batches)
        if self.accelerator.num_processes > 1:
            totals = self.accelerator.reduce(totals, reduction="sum")
        set_lr(self.optimizer, lr_factor)
        is_made = self.update.step(totals, number)
        return StepResult(rows=last.num_rows_of_step, tokens=last.num_tokens_of_step, is_made=is_made)

    def _accumulate(self, micro_batches: Iterator[MicroBatch]) -> tuple[Tensor, MicroBatch]:
        """Accumulate gradients of this rank; returns loss sum and number of items, (2,), and the last micro-batch."""
        totals = self.tally.zeros()
        for left in reversed(range(self.num_micro)):
            part = next(micro_batches)
            with self.accelerator.no_sync(self.model) if left else nullcontext():
                loss, items = self._micro_loss(part)
                self.update.backward(loss, items, is_last=left == 0)
            totals[0] += loss.detach()
            totals[1] += items
        return totals, part

    def _micro_loss(self, part: MicroBatch) -> tuple[Tensor, int | Tensor]:
        inputs, outputs, targets = forward(self.model, part.batch, self.accelerator.device)
        task = self.objective.task
        loss: Tensor
        items: int | Tensor
        if isinstance(task, ComparesRows) and self.accelerator.num_processes > 1:
            loss, items = self._loss_among_ranks(task, task.vectors(inputs, outputs), targets, part)
        else:
            loss, items = self.objective.loss(inputs, outputs, targets)
        return (loss * 0, 0) if part.is_empty else (loss, items)

    def _loss_among_ranks(
        self, task: ComparesRows, vectors: Tensor, targets: Tensor, part: MicroBatch
    ) -> tuple[Tensor, int | Tensor]:
        """Return the loss of this rank's rows, compared with those of all ranks; gradients reach the rows of all ranks.

        Every rank sends ``batch_size`` rows, the last ones fillers: nobody waits to learn how many the others have.
        """
        count, first = len(targets), self.accelerator.process_index * self.batch_size
        is_row = torch.arange(self.batch_size, device=targets.device) < (0 if part.is_empty else count)
        all_vectors, all_targets, all_are_rows = (self._of_all_ranks(t) for t in (vectors, targets, is_row.byte()))
        return task.loss_of_rows(all_vectors, all_targets, all_are_rows.bool(), slice(first, first + count))

    def _of_all_ranks(self, tensor: Tensor) -> Tensor:
        """Return a tensor of ``batch_size`` rows from each rank, one after the other; zeros where it has fewer."""
        missing = tensor.new_zeros(self.batch_size - len(tensor), *tensor.shape[1:])
        found: Tensor = _Gather.apply(torch.cat([tensor, missing]))  # type: ignore[no-untyped-call]
        return found


class _Gather(torch.autograd.Function):
    """Concatenate tensors of one shape from all ranks; each rank gets the sum of all ranks' gradients of its own.

    ``torch.distributed.nn.functional.all_gather`` does the same, and is deprecated.
    """

    @staticmethod
    @override
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        found = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
        distributed.all_gather(found, tensor)
        return torch.cat(found)

    @staticmethod
    @override
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        summed = gradient.contiguous().clone()
        distributed.all_reduce(summed)
        return summed.chunk(distributed.get_world_size())[distributed.get_rank()]
