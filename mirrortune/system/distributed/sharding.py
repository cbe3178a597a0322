# SPDX-License-Identifier: Apache-2.0
"""How the processes of a run share its model (DDP, FSDP2, ZeRO), and parameters made whole where files need them whole.

Everything here is collective unless it says otherwise: all processes of a run call it together, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from mirrortune.system.console import chatter_to_stderr
from mirrortune.system.distributed import deepspeed

_EMBEDDINGS = ("get_input_embeddings", "get_output_embeddings")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """How the processes of an accelerator share a model. Not collective, but for :meth:`prepare`.

    Attributes:
        accelerator: accelerate's ``Accelerator``.
        library: what shards the model; "" for one process and for DDP, where each process holds all of it.
        stage: of ZeRO: 2 shards gradients and moments, 3 the weights too; 0 without DeepSpeed.
    """

    accelerator: Any
    library: Literal["", "FSDP2", "DeepSpeed"]
    stage: int

    @classmethod
    def of(cls, accelerator: Any) -> Sharding:
        """Return how ``accelerator`` was launched to share a model."""
        stage = deepspeed.stage_of(accelerator)
        library: Literal["", "FSDP2", "DeepSpeed"] = "DeepSpeed" if stage else ""
        if not stage and getattr(accelerator, "is_fsdp2", False):
            library = "FSDP2"
        return cls(accelerator=accelerator, library=library, stage=stage)

    @property
    def shards_weights(self) -> bool:
        """Whether no process holds all of the weights."""
        return self.library == "FSDP2" or self.stage == 3

    @property
    def name(self) -> str:
        """``FSDP2``, ``ZeRO-2`` or ``ZeRO-3``; "" where nothing is sharded."""
        return f"ZeRO-{self.stage}" if self.stage else self.library

    def autocast(self) -> AbstractContextManager[object]:
        """The context to run a model in that is called without the wrapper of :meth:`prepare`."""
        if not self.stage:
            context: AbstractContextManager[object] = self.accelerator.autocast()
            return context
        # accelerate leaves autocast to DeepSpeed, which has it in its own wrapper.
        enabled = self.accelerator.state.deepspeed_plugin.deepspeed_config["torch_autocast"]["enabled"]
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=enabled)

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, max_grad_norm: float) -> tuple[Any, Any]:
        """Move a model to the device and wrap or shard it; returns it with accelerate's optimizer.

        Args:
            model: bare.
            optimizer: of what it trains.
            max_grad_norm: the norm that DeepSpeed clips gradients to.
        """
        if self.shards_weights:
            # transformers then generates on each process until all are done: those that stop earlier would be waited
            # for.
            vars(model)["_is_fsdp_managed_module"] = True
        prepared: tuple[Any, Any]
        if self.stage:
            prepared = deepspeed.make_engine(model, optimizer, self.accelerator, max_grad_norm=max_grad_norm)
            return prepared
        if self.library:
            _choose_units(model, self.accelerator.state.fsdp_plugin)
        with ties_in_one_unit(model), chatter_to_stderr():  # for FSDP2 accelerate imports DeepSpeed, which prints
            prepared = self.accelerator.prepare(model, optimizer)
        return prepared


def _choose_units(model: nn.Module, plugin: Any) -> None:
    """Tell accelerate's FSDP2 which modules of ``model`` are gathered as one: its blocks.

    accelerate 1.15 takes what transformers lists as not to be split, in encoders the embeddings too, and then fails to
    make a unit of the token embedding, which is in one already.
    """
    if plugin.transformer_cls_names_to_wrap:
        return
    embedding = _embedding(model, _EMBEDDINGS[0])
    listed = set(getattr(model, "_no_split_modules", None) or ())
    holds_embedding = {type(m).__name__ for m in model.modules() if any(part is embedding for part in m.modules())}
    plugin.transformer_cls_names_to_wrap = sorted(listed - holds_embedding) or None


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor of which this process may hold a shard."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_share(tensor: Tensor) -> Tensor:
    """Return a view of this process's shard; the tensor itself if it is not sharded. Not collective."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shared_like(value: Tensor, like: Tensor) -> Tensor:
    """Return ``value``, which every process has, on the device of ``like`` and sharded as that is. Not collective."""
    value = value.to(like.device)
    if not isinstance(like, DTensor) or value.shape != like.shape:  # a step count is not sharded
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


@contextmanager
def ties_in_one_unit(model: nn.Module) -> Iterator[None]:
    """Keep a shared embedding in the FSDP2 unit of the whole model while the context is open.

    An embedding may be shared by other modules than the output (encoder and decoder of a T5). accelerate 1.15 makes a
    unit of it, or of it and the output; the others are then in a second unit, and torch from 2.13 on refuses a
    parameter in two.
    """
    embeddings = [_embedding(model, name) for name in _EMBEDDINGS]
    first, second = (None if module is None else _own_weight(module) for module in embeddings)
    holders = [m for m in model.modules() if first is not None and _own_weight(m) is first]
    is_shared = not {id(m) for m in holders} <= {id(m) for m in embeddings}
    hidden = [name for name, module in zip(_EMBEDDINGS, embeddings, strict=True) if module is None]
    hidden += [name for name, weight in zip(_EMBEDDINGS, (first, second), strict=True) if is_shared and weight is first]
    vars(model).update(dict.fromkeys(hidden, lambda: None))
    try:
        yield
    finally:
        for name in hidden:
            del vars(model)[name]


def _embedding(model: nn.Module, name: str) -> nn.Module | None:
    try:
        found: nn.Module | None = getattr(model, name, lambda: None)()
    except NotImplementedError:  # transformers does not know it for this family, such as audio models
        return None
    return found


def _own_weight(module: nn.Module) -> Tensor | None:
    return dict(module.named_parameters(recurse=False)).get("weight")


def optimizer_states(optimizer: Any, trained: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Tensor]]:
    """Return the state of an optimizer by the names of its parameters, whole, on the CPU."""
    if deepspeed.is_zero_optimizer(optimizer):
        states = deepspeed.zero_states(optimizer, trained)
    else:
        states = {name: optimizer.state.get(parameter, {}) for name, parameter in trained.items()}
    return {
        name: {entry: _on_cpu(value) for entry, value in state.items() if value is not None}
        for name, state in states.items()
    }


def _on_cpu(value: Any) -> Tensor:
    """Return an entry of an optimizer's state as a tensor of its own; numbers of Python have 64 bits."""
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)
    return whole(value.detach()).cpu().contiguous()


def _as_kept(value: Tensor, like: Tensor) -> Tensor | float | int:
    """Inverse of :func:`_on_cpu`, on the device of ``like`` and sharded as that is."""
    if not value.ndim and value.dtype in (torch.float64, torch.int64):
        number: float | int = value.item()
        return number
    return shared_like(value, like)


def restore_states(
    optimizer: Any, trained: Mapping[str, nn.Parameter], states: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Inverse of :func:`optimizer_states`, on each parameter's device, and sharded as that is."""
    if deepspeed.is_zero_optimizer(optimizer):
        deepspeed.restore_zero_states(optimizer, trained, states)
        return
    for name, entries in states.items():
        for entry, value in entries.items():
            optimizer.state[trained[name]][entry] = _as_kept(value, trained[name])


@contextmanager
def whole_parameters(model: nn.Module, *, write_back: bool = False) -> Iterator[None]:
    """Gather the trained parameters of ``model`` while the context is open, under FSDP2 on the CPU.

    Args:
        model: model whose frozen parameters, the bulk of it, stay sharded.
        write_back: shard what was written into them when the context ends.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    cut = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad and isinstance(parameter, DTensor)
    ]
    for module, name, parameter in cut:
        module.register_parameter(name, nn.Parameter(whole(parameter.detach()).cpu()))
    try:
        with deepspeed.gathered_parameters(model, write_back=write_back):
            yield
    finally:
        for module, name, parameter in cut:
            written = module.get_parameter(name)
            module.register_parameter(name, parameter)
            if write_back:
                with torch.no_grad():
                    parameter.copy_(shared_like(written.detach(), parameter))


def is_in_shards(model: nn.Module) -> bool:
    """Return whether FSDP2 has sharded ``model`` or a part of it. Not collective."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def is_whole(tensor: Tensor) -> bool:
    """Return whether this process holds the whole tensor. Not collective."""
    return type(tensor.data) is Tensor and deepspeed.is_gathered(tensor)
