# SPDX-License-Identifier: Apache-2.0
"""Share a model between processes (DDP, FSDP2, ZeRO), and gather sharded parameters to write them to files.

Unless stated otherwise, functions are collective: all processes of a run call them together, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
    """How the processes of an accelerator share a model. Only :meth:`prepare` is collective.

    Attributes:
        accelerator: accelerate's ``Accelerator``.
        library: library that shards the model; "" for one process and for DDP, where each process holds all of it.
        stage: ZeRO stage: 2 shards gradients and moments, 3 also the weights; 0 without DeepSpeed.
    """

    accelerator: Any
    library: Literal["", "FSDP2", "DeepSpeed"]
    stage: int

    @classmethod
    def of(cls, accelerator: Any) -> Sharding:
        """Determine from ``accelerator`` how a model will be shared."""
        stage = deepspeed.stage_of(accelerator)
        library: Literal["", "FSDP2", "DeepSpeed"] = "DeepSpeed" if stage else ""
        if not stage and getattr(accelerator, "is_fsdp2", False):
            library = "FSDP2"
        return cls(accelerator=accelerator, library=library, stage=stage)

    @property
    def shards_weights(self) -> bool:
        """Whether the weights are sharded, so that no process holds all of them."""
        return self.library == "FSDP2" or self.stage == 3

    @property
    def name(self) -> str:
        """``FSDP2``, ``ZeRO-2`` or ``ZeRO-3``; "" where nothing is sharded."""
        return f"ZeRO-{self.stage}" if self.stage else self.library

    def autocast(self) -> AbstractContextManager[object]:
        """Return the autocast context for a model that is called without the wrapper of :meth:`prepare`."""
        if not self.stage:
            context: AbstractContextManager[object] = self.accelerator.autocast()
            return context
        # Under DeepSpeed, accelerate leaves autocast to the engine, the wrapper that is bypassed here.
        enabled = self.accelerator.state.deepspeed_plugin.deepspeed_config["torch_autocast"]["enabled"]
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=enabled)

    def training_autocast(self) -> AbstractContextManager[object]:
        """Return the autocast context for a model that is called through the wrapper of :meth:`prepare`: of those of
        accelerate and DeepSpeed, all but FSDP2's enter it themselves.
        """
        return self.autocast() if self.library == "FSDP2" else nullcontext()

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, max_grad_norm: float) -> tuple[Any, Any]:
        """Move a model to the device and wrap or shard it; return it with accelerate's optimizer.

        Args:
            model: unwrapped model.
            optimizer: optimizer of its trained parameters.
            max_grad_norm: gradient norm at which DeepSpeed clips.
        """
        if self.shards_weights:
            # Makes transformers' generate() run on every process until all are done; otherwise a process that stops
            # early would leave the others waiting in a collective operation.
            vars(model)["_is_fsdp_managed_module"] = True
        prepared: tuple[Any, Any]
        if self.stage:
            prepared = deepspeed.make_engine(model, optimizer, self.accelerator, max_grad_norm=max_grad_norm)
            return prepared
        if self.library:
            plugin = self.accelerator.state.fsdp_plugin
            _choose_units(model, plugin)
            # Precision is left to autocast: in bf16, accelerate has FSDP2 round trained parameters and gradients too.
            plugin.mixed_precision_policy = None
        with ties_in_one_unit(model), chatter_to_stderr():  # for FSDP2, accelerate imports DeepSpeed, which prints
            prepared = self.accelerator.prepare(model, optimizer)
        return prepared


def _choose_units(model: nn.Module, plugin: Any) -> None:
    """Make the transformer blocks of ``model`` the units that accelerate's FSDP2 gathers.

    By default accelerate 1.15 uses transformers' ``_no_split_modules``. In encoders these include the embeddings, and
    accelerate then fails to wrap the token embedding, which already belongs to a unit.
    """
    if plugin.transformer_cls_names_to_wrap:
        return
    embedding = _embedding(model, _EMBEDDINGS[0])
    listed = set(getattr(model, "_no_split_modules", None) or ())
    holds_embedding = {type(m).__name__ for m in model.modules() if any(part is embedding for part in m.modules())}
    plugin.transformer_cls_names_to_wrap = sorted(listed - holds_embedding) or None


def whole(tensor: Tensor) -> Tensor:
    """Return the full tensor; this process may hold only a shard of it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_share(tensor: Tensor) -> Tensor:
    """Return a view of this process's shard, or the tensor itself if it is not sharded. Not collective."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shared_like(value: Tensor, like: Tensor) -> Tensor:
    """Return the full tensor ``value``, which every process holds, on the device and in the sharding of ``like``.

    Not collective.
    """
    value = value.to(like.device)
    if not isinstance(like, DTensor) or value.shape != like.shape:  # a step count is not sharded
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


@contextmanager
def ties_in_one_unit(model: nn.Module) -> Iterator[None]:
    """Keep a shared embedding in the root FSDP2 unit of the model while the block runs.

    An embedding may be shared by more modules than the output layer, as by the encoder and decoder of a T5. accelerate
    1.15 wraps it, alone or with the output layer, in a unit of its own. The other modules then belong to another unit,
    and torch refuses a parameter in two units from version 2.13 on.
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
    except NotImplementedError:  # transformers has no such accessor for this family, such as audio models
        return None
    return found


def _own_weight(module: nn.Module) -> Tensor | None:
    return dict(module.named_parameters(recurse=False)).get("weight")


def optimizer_states(optimizer: Any, trained: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Tensor]]:
    """Return the unsharded state of an optimizer on the CPU, by parameter name."""
    if deepspeed.is_zero_optimizer(optimizer):
        states = deepspeed.zero_states(optimizer, trained)
    else:
        states = {name: optimizer.state.get(parameter, {}) for name, parameter in trained.items()}
    return {
        name: {entry: _on_cpu(value) for entry, value in state.items() if value is not None}
        for name, state in states.items()
    }


def _on_cpu(value: Any) -> Tensor:
    """Return a copy of an optimizer-state entry as a CPU tensor; Python numbers become 64-bit tensors."""
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)
    return whole(value.detach()).cpu().contiguous()


def _as_kept(value: Tensor, like: Tensor) -> Tensor | float | int:
    """Invert :func:`_on_cpu`, on the device and in the sharding of ``like``."""
    if not value.ndim and value.dtype in (torch.float64, torch.int64):
        number: float | int = value.item()
        return number
    return shared_like(value, like)


def restore_states(
    optimizer: Any, trained: Mapping[str, nn.Parameter], states: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Restore states from :func:`optimizer_states`, on the device and in the sharding of each parameter."""
    if deepspeed.is_zero_optimizer(optimizer):
        deepspeed.restore_zero_states(optimizer, trained, states)
        return
    for name, entries in states.items():
        for entry, value in entries.items():
            optimizer.state[trained[name]][entry] = _as_kept(value, trained[name])


@contextmanager
def whole_parameters(model: nn.Module, *, write_back: bool = False) -> Iterator[None]:
    """Gather the trained parameters of ``model`` while the block runs; under FSDP2, on the CPU.

    Args:
        model: model; its frozen parameters, which are most of it, stay sharded.
        write_back: at the end of the block, shard the values that were written into the parameters.
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
    """Return whether FSDP2 has sharded any part of ``model``. Not collective."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def is_whole(tensor: Tensor) -> bool:
    """Return whether this process holds all of ``tensor``. Not collective."""
    return type(tensor.data) is Tensor and deepspeed.is_gathered(tensor)
