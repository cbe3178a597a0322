# SPDX-License-Identifier: Apache-2.0
"""Measure the memory of a training step on fake tensors.

Forward and backward passes run on shapes alone and every allocation is counted. This works for any architecture before
any weight is loaded.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mirrortune.adapters.inject import bytes_kept
from mirrortune.data.examples import Batch
from mirrortune.data.loader import forward

_ATEN = torch.ops.aten


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Estimated peak memory of a run on the device, in bytes.

    Attributes:
        weights: weights of the base model and its head.
        factors: singular vectors and other tensors of the adapter.
        gradients: gradients of the trained parameters.
        optimizer: optimizer state, two moments per trained parameter.
        activations: activations saved for the backward pass, and the largest temporary tensors.
        evaluation: one batch of an evaluation, without weights, factors and optimizer state.
        kept: part of ``evaluation``, whatever its batch: adapted weights that are held while text is generated.
        is_counted: allocations were counted; otherwise activations are estimated from the widths of layers.
    """

    weights: int
    factors: int
    gradients: int
    optimizer: int
    activations: int
    evaluation: int = 0
    kept: int = 0
    is_counted: bool = True

    @property
    def total(self) -> int:
        """Peak memory in bytes."""
        return sum(self.parts().values())

    @property
    def step(self) -> int:
        """Memory of a training step without weights, factors and optimizer state."""
        return self.gradients + self.activations

    def parts(self) -> dict[str, int]:
        """Return bytes by name; ``evaluation`` is what it takes beyond a step, whose gradients have been freed."""
        names = ("weights", "factors", "gradients", "optimizer", "activations")
        return {**{name: getattr(self, name) for name in names}, "evaluation": max(0, self.evaluation - self.step)}


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of storages as they are allocated and freed.

    Operations whose result depends on values, such as the rows that a mask selects, return the most expensive result.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def know(self, tensor: Tensor) -> None:
        """Exclude a tensor that exists already from the count."""
        self._known[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = answered(func, args) if func in ASK_NUMBERS else None
        if out is None:
            out = func(*all_rows(func, args), **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known[storage] = size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.live -= size


@contextmanager
def _unlogged() -> Iterator[None]:
    """Keep torch from logging operations that cannot run without values: they raise, and the caller goes on."""
    log = logging.getLogger(FakeTensorMode.__module__)
    disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = disabled


@_unlogged()
def rehearse(
    model: nn.Module,
    batch: Batch,
    scored: Batch,
    loss: Callable[[Batch, Any, Tensor], tuple[Tensor, Any]],
    *,
    is_base: Callable[[str], bool],
    device: str,
    is_16bit_compute: bool,
    keeps_weights: bool = False,
) -> Footprint:
    """Measure the memory of one training step and of one batch of an evaluation.

    Args:
        model: adapted model with final dtypes and ``requires_grad`` flags, on the meta device or loaded; not changed.
        batch: training batch with targets from ``Examples.batch``; only dtypes and shapes matter.
        scored: batch of an evaluation.
        loss: loss of the task.
        is_base: returns whether the tensor of ``model`` with a given name belongs to the base model.
        device: type of the device to train on.
        is_16bit_compute: compute under bfloat16 autocast.
        keeps_weights: an evaluation generates text, and holds the adapted weights of dense layers.

    Raises:
        Exception: any error of a model that needs the values of tensors.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        empty = without_numbers(model, device).train()
        inputs, scored_inputs = _empty_batch(batch, device), _empty_batch(scored, device)
    ledger = _Ledger()
    held = dict(_tensors(empty))
    for tensor in (*held.values(), *inputs.values(), *scored_inputs.values()):
        if isinstance(tensor, Tensor):
            ledger.know(tensor)
    autocast: AbstractContextManager[object]
    autocast = torch.autocast(device, torch.bfloat16) if is_16bit_compute else nullcontext()
    with mode, ledger:
        with autocast:
            given, outputs, targets = forward(empty, inputs, torch.device(device))
            total, _ = loss(given, outputs, targets)
        total.backward()  # type: ignore[no-untyped-call]
        del given, outputs, targets, total
    trained, step = [p for p in empty.parameters() if p.requires_grad], ledger.peak
    empty.eval().zero_grad()
    ledger.peak = ledger.live
    with mode, ledger, torch.no_grad(), autocast:
        loss(*forward(empty, scored_inputs, torch.device(device)))
    gradients = sum(_bytes(p) for p in trained)
    weights = sum(_bytes(t) for name, t in held.items() if is_base(name))
    kept = bytes_kept(empty) if keeps_weights else 0
    everything = sum({id(t): _bytes(t) for t in held.values()}.values())
    return Footprint(
        weights=weights,
        factors=everything - weights,
        gradients=gradients,
        optimizer=2 * gradients,
        activations=max(0, step - gradients),
        evaluation=ledger.peak + kept, kept=kept,
    )  # fmt: skip


def _empty_batch(batch: Batch, device: str) -> Batch:
    return {k: torch.empty_like(v, device=device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def without_numbers(model: nn.Module, device: str) -> nn.Module:
    """Return a copy of a model whose tensors have dtypes and shapes but no memory."""
    return copy.deepcopy(model, _memo(model, device))


def _memo(model: nn.Module, device: str) -> dict[int, Any]:
    """Return a memo for ``copy.deepcopy`` that replaces each tensor by an empty one of the same dtype and shape."""
    memo: dict[int, Any] = {}
    for _, tensor in _tensors(model):
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    return memo


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters, buffers and tensor attributes, each once under its first name."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        own = {**module._parameters, **module._buffers}  # noqa: SLF001
        own |= {k: v for k, v in vars(module).items() if isinstance(v, Tensor)}
        for name, tensor in own.items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{prefix}.{name}".lstrip("."), tensor


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def all_rows(func: Any, args: Any) -> Any:
    """Replace boolean masks in arguments, which select an unknown number of rows, by the indices of all rows."""
    if func not in (
        _ATEN.index.Tensor,
        _ATEN.index_put.default,
        _ATEN.index_put_.default,
        _ATEN._index_put_impl_.default,
    ):
        return args
    indices: list[Tensor | None] = []
    for index in args[1]:
        if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
            rows = torch.zeros(index.numel(), dtype=torch.long, device=index.device)
            indices += [rows] * index.ndim
        else:
            indices.append(index)
    return (args[0], indices, *args[2:])


def answered(func: Any, args: Any) -> Any:
    """Return a result for an operation that depends on values: 1 for a scalar, all elements for a selection."""
    tensor = args[0]
    if func is _SCALAR:
        return True if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1
    if func is _ATEN.nonzero.default:
        return torch.zeros((tensor.numel(), tensor.ndim), dtype=torch.long, device=tensor.device)
    return tensor.reshape(-1).clone()  # masked_select


_SCALAR = _ATEN._local_scalar_dense.default  # noqa: SLF001  (called by .item() and int())
ASK_NUMBERS = (_SCALAR, _ATEN.nonzero.default, _ATEN.masked_select.default)
"""Operations whose result depends on values; see :func:`answered`."""
