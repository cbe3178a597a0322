# SPDX-License-Identifier: Apache-2.0
"""Make one optimizer step on one global batch.

Micro-batches are summed, not averaged, and the gradient is divided by the number of items in the global batch over all
ranks, so that a step does not depend on how the batch is split. Except in float16, nothing here waits for the device:
loss, norm and the test for finite values stay on the device (``accumulator.py``), which also skips non-finite steps.
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
    """How gradients are accumulated and steps are applied on the processes of a run."""

    @abstractmethod
    def backward(self, loss: Tensor, items: int | Tensor, *, is_last: bool) -> None:
        """Accumulate the gradients of a micro-batch's loss, which is summed over ``items``.

        ``is_last`` marks the last micro-batch of a step.
        """

    @abstractmethod
    def step(self, totals: Tensor, number: int) -> bool:
        """Divide the gradients by the number of items, clip them, and step, unless a gradient so far was not finite.

        Args:
            totals: loss sum and number of items of the global batch, shape (2,).
            number: number of the step, starting at 1.

        Returns:
            False if gradients overflowed in float16, so that this step was skipped but training may continue.
        """

    @property
    def scale(self) -> float | None:
        """Loss scale in the backward pass, or None without scaling."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """Return the state that a checkpoint stores in addition to the optimizer's, by name."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:  # noqa: B027  (most have nothing to restore)
        """Restore the state from :meth:`tensors`; ``tensors`` may contain others."""


class PlainUpdate(Update):
    """Gradients and steps on one process, or on several under DistributedDataParallel or FSDP2.

    Args:
        optimizer: optimizer prepared by ``accelerator``.
        accelerator: accelerate's ``Accelerator``.
        tally: accumulates loss and gradient norm.
        max_grad_norm: norm at which gradients are clipped.
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
            self.optimizer.optimizer.found_inf = is_broken  # makes fused AdamW skip the step on the device
            self.optimizer.step()
        elif not is_broken:  # for other optimizers, this waits for the device
            self.optimizer.step()
        self.optimizer.zero_grad()
        return True

    def _clip(self, factor: Tensor) -> Tensor:
        """Multiply the gradients by ``factor``, clip them, and return their norm before clipping, shape ()."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        gradients = [own_share(p.grad) for p in parameters if p.grad is not None]
        if {gradient.dtype for gradient in gradients} == {torch.float32}:
            factor = factor.float()  # as each product would; of equal dtypes, CUDA has one kernel for all gradients
        # DistributedDataParallel averages over ranks, but the mean must be over the items of all ranks.
        torch._foreach_mul_(gradients, factor)
        return whole(self.accelerator.clip_grad_norm_(parameters, self.max_grad_norm))


class ScaledUpdate(PlainUpdate):
    """Gradients and steps in float16, with loss scaling, since small gradients would underflow.

    A step whose gradients overflow is skipped, and the scale is halved. To detect this, each step waits for the device.

    Args:
        optimizer: optimizer prepared by ``accelerator``.
        accelerator: accelerate's ``Accelerator``, with a scaler.
        tally: accumulates loss and gradient norm.
        max_grad_norm: norm at which unscaled gradients are clipped.
        num_micro: number of micro-batches per rank and step.
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
        """Divide torch's initial scale, meant for mean losses, by roughly the number of ``items`` in a global batch."""
        own = torch.as_tensor(items, dtype=torch.float32, device=self.accelerator.device)
        count = float(self.accelerator.reduce(own, reduction="sum")) * self.num_micro
        state = self.accelerator.scaler.state_dict()
        scale = state["scale"] / 2.0 ** round(math.log2(max(1.0, count)))
        self.accelerator.scaler.load_state_dict({**state, "scale": scale})
        self._is_fresh = False

    def _back_off(self) -> None:
        """Halve the scale and keep it for the usual number of steps, as the scaler does after an overflow."""
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
        # The last term makes the norm NaN if the loss is not finite.
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
        num_processes: number of processes over which the engine averages gradients.
        tally: accumulates loss and gradient norm.
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
        loss, items = totals.tolist()  # waits for the device, as DeepSpeed does in every step anyway
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
    """Prepare a model and its optimizer for the processes of a run; return both and the update that applies steps.

    Args:
        model: unwrapped model; ``accelerator`` moves it to the device and wraps or shards it.
        optimizer: optimizer of the trained parameters.
        accelerator: accelerate's ``Accelerator``.
        tally: accumulates loss and gradient norm.
        max_grad_norm: norm at which gradients are clipped.
        num_micro: number of micro-batches per rank and step.
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
    """The result of a step.

    Attributes:
        rows: number of rows in the global batch.
        tokens: number of tokens in the global batch, excluding padding; None for rows that are not text.
        is_made: False if the step was skipped because gradients overflowed in float16.
    """

    rows: int
    tokens: int | None
    is_made: bool


class Stepper:
    """Makes optimizer steps.

    Args:
        model, optimizer, update: results of :func:`make_update`; the parameter groups have a ``peak_lr``.
        accelerator: accelerate's ``Accelerator``.
        objective: training loss.
        tally: accumulates loss and gradient norm.
        num_micro: number of micro-batches per rank and step.
        batch_size: maximum number of rows per micro-batch.
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
        self.sharding = Sharding.of(accelerator)

    def step(self, number: int, micro_batches: Iterator[MicroBatch], lr_factor: float) -> StepResult:
        """Make a step on the next global batch.

        From the first step whose loss or gradient is not finite, parameters and moments are no longer updated, and the
        tally records that step.

        Args:
            number: number of the step, starting at 1.
            micro_batches: micro-batches of this rank, of which ``num_micro`` are consumed.
            lr_factor: learning rates as a share of their peak.

        """
        totals, last = self._accumulate(micro_batches)
        if self.accelerator.num_processes > 1:
            totals = self.accelerator.reduce(totals, reduction="sum")
        set_lr(self.optimizer, lr_factor)
        is_made = self.update.step(totals, number)
        return StepResult(rows=last.num_rows_of_step, tokens=last.num_tokens_of_step, is_made=is_made)

    def _accumulate(self, micro_batches: Iterator[MicroBatch]) -> tuple[Tensor, MicroBatch]:
        """Accumulate gradients of this rank; return loss sum and number of items, (2,), and the last micro-batch."""
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
        with self.sharding.training_autocast():
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
        """Return the loss of this rank's rows, compared with the rows of all ranks, to which gradients flow as well.

        Every rank sends ``batch_size`` rows, padded with dummy rows, so that no rank has to wait for the row counts of
        the others.
        """
        count, first = len(targets), self.accelerator.process_index * self.batch_size
        is_row = torch.arange(self.batch_size, device=targets.device) < (0 if part.is_empty else count)
        all_vectors, all_targets, all_are_rows = (self._of_all_ranks(t) for t in (vectors, targets, is_row.byte()))
        return task.loss_of_rows(all_vectors, all_targets, all_are_rows.bool(), slice(first, first + count))

    def _of_all_ranks(self, tensor: Tensor) -> Tensor:
        """Concatenate ``batch_size`` rows from each rank, padded with zeros."""
        missing = tensor.new_zeros(self.batch_size - len(tensor), *tensor.shape[1:])
        found: Tensor = _Gather.apply(torch.cat([tensor, missing]))  # type: ignore[no-untyped-call]
        return found


class _Gather(torch.autograd.Function):
    """Concatenate tensors of equal shape from all ranks; in backward, each rank gets the summed gradient of its tensor.

    ``torch.distributed.nn.functional.all_gather`` does the same, but is deprecated.
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
