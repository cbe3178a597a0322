# SPDX-License-Identifier: Apache-2.0
"""Parameters that are cut into shares, one for each process (FSDP2, ZeRO-3), made whole where files want them whole.

Everything here is a meeting: all processes of a run call it together, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from mirrortune.system.distributed import deepspeed

_EMBEDDINGS = ("get_input_embeddings", "get_output_embeddings")


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which this process may hold a share."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_share(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: a view, and all of it unless it is cut. Not a meeting."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shared_like(value: Tensor, like: Tensor) -> Tensor:
    """``value``, which every process has, on the device of ``like`` and cut as that is. Not a meeting."""
    value = value.to(like.device)
    if not isinstance(like, DTensor) or value.shape != like.shape:  # a step count is not cut
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def choose_units(model: nn.Module, accelerator: Any) -> None:
    """Tell accelerate's FSDP2 which modules of ``model`` are gathered as one, its blocks, and transformers that it is
    cut, as ZeRO-3 cuts it too; do nothing without the two.

    accelerate 1.15 takes what transformers lists as not to be split, in encoders the embeddings too, and then fails to
    make a unit of the token embedding, which is in one already.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None or deepspeed.stage_of(accelerator) == 3:
        # What writes text then goes on until all processes are done: those that stopped earlier would be waited for.
        vars(model)["_is_fsdp_managed_module"] = True
    if plugin is None or plugin.transformer_cls_names_to_wrap:
        return
    embedding = _embedding(model, _EMBEDDINGS[0])
    listed = set(getattr(model, "_no_split_modules", None) or ())
    holds_embedding = {type(m).__name__ for m in model.modules() if any(part is embedding for part in m.modules())}
    plugin.transformer_cls_names_to_wrap = sorted(listed - holds_embedding) or None


@contextmanager
def ties_in_one_unit(model: nn.Module) -> Iterator[None]:
    """Within: accelerate's FSDP2 leaves an embedding that other modules than the output have too (encoder and decoder
    of a T5) in the unit of the whole model.

    accelerate 1.15 makes a unit of it, or of it and the output; the others then are in a second unit, and torch from
    2.13 on refuses a parameter in two.
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
    except NotImplementedError:  # transformers does not know where this family, of sound say, has its own
        return None
    return found


def _own_weight(module: nn.Module) -> Tensor | None:
    return dict(module.named_parameters(recurse=False)).get("weight")


@contextmanager
def whole_parameters(model: nn.Module, *, write_back: bool = False) -> Iterator[None]:
    """Within: the trained parameters of ``model`` are whole, under FSDP2 on the CPU. Others stay as they are.

    Args:
        model: whose frozen parameters, the bulk of it, stay cut.
        write_back: take over what was written into them.
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
        with deepspeed.whole_parameters(model, write_back=write_back):
            yield
    finally:
        for module, name, parameter in cut:
            written = module.get_parameter(name)
            module.register_parameter(name, parameter)
            if write_back:
                with torch.no_grad():
                    parameter.copy_(shared_like(written.detach(), parameter))


def is_in_shards(model: nn.Module) -> bool:
    """Whether FSDP2 has cut ``model``, or a part of it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def is_whole(tensor: Tensor) -> bool:
    """Whether this process has all numbers of a tensor."""
    return type(tensor.data) is Tensor and deepspeed.is_whole(tensor)
