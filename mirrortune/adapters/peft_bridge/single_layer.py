# SPDX-License-Identifier: Apache-2.0
"""A single layer of an adapter of PEFT's, without the rest of its model: what merging tensor by tensor needs.

PEFT puts a tuner into a model of one layer that has the layer's name and weight, or, where layers share numbers or draw
them one after another, into all layers of a model whose weights take no memory, of which one is filled at a time. The
stored probe says whether the layer then computes what it did in its own model. It does not where a tuner makes its
numbers out of the weights of layers that are not there; those tuners are merged as whole models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mirrortune.adapters.files.adapter_file import AdapterFile, checked_tensor
from mirrortune.adapters.files.load import check_weight
from mirrortune.adapters.inject import attachment
from mirrortune.adapters.peft_bridge import files
from mirrortune.adapters.peft_bridge.tuners import PeftAttachment, PeftLayer, attach_tuner, hollow_copy
from mirrortune.adapters.targets import find_targets
from mirrortune.errors import VerificationError


def is_of_linear_layers(adapter: AdapterFile) -> bool:
    """Whether an adapter of PEFT's has plain linear layers alone."""
    return all(
        layout.count == 1 and not layout.is_transposed and not layout.rows and len(layout.shape) == 2
        for layout in adapter.layouts.values()
    )


def stands_alone(adapter: AdapterFile) -> bool:
    """Whether every tensor of an adapter of PEFT's belongs to one layer, or to the head."""
    owners = {*adapter.layouts, *(name.rpartition(".")[0] for name in adapter.head)}
    return all(any(key.startswith(f"{files.PREFIX}{owner}.") for owner in owners) for key in adapter.tensors)


def head_keys(adapter: AdapterFile) -> set[str]:
    """PEFT's names for the head's tensors."""
    return {files.PREFIX + name for name in adapter.head}


def lone_layer(adapter: AdapterFile, name: str, weight: Tensor, bias: Tensor | None) -> PeftLayer | None:
    """A layer of ``adapter`` as PEFT made it for training, in evaluation mode.

    Args:
        adapter: of a tuner that :func:`stands_alone`.
        name: of the layer.
        weight: of the base, in the dtype that the adapter was trained in.
        bias: likewise.

    Returns:
        None if it is another layer without its model.

    Raises:
        VerificationError: another base weight, or numbers that are missing or not finite.
    """
    model = _model_of(name, weight, bias)
    attach_tuner(
        model, adapter.spec, targets=find_targets(model, adapter.spec, stored={name: adapter.layouts[name]}),
        config=adapter.peft_config, on_layer=lambda _, matrix: check_weight(adapter, name, matrix),
    )  # fmt: skip
    wanted = files.adapter_tensors(model)
    own = {key for key in adapter.tensors if key.startswith(f"{files.PREFIX}{name}.")}
    if own != wanted.keys():
        return None
    files.restore_tensors(model, {key: checked_tensor(adapter, key, t.shape) for key, t in wanted.items()})
    return _as_saved(model.eval(), adapter, name)


def _as_saved(model: nn.Module, adapter: AdapterFile, name: str) -> PeftLayer | None:
    """A layer of an adapted model, if it is known to compute what it did when it was saved."""
    if not adapter.probes[name]:
        return None
    try:
        files.check_probes(model, {name: adapter.probes[name]})
    except VerificationError:
        return None
    found = attachment(model)
    assert isinstance(found, PeftAttachment)
    layer = found.layers[name]
    assert isinstance(layer, PeftLayer)
    return layer


class SharedLayers:
    """All layers of an adapter of PEFT's, of whose base weights one at a time is in memory.

    Args:
        adapter: of plain linear layers, which share numbers.
        model: the base without weights.
    """

    def __init__(self, adapter: AdapterFile, model: nn.Module) -> None:
        self._adapter = adapter
        self._model = hollow_copy(model.to(getattr(torch, str(adapter.base["dtype"]))), "cpu")
        targets = find_targets(self._model, adapter.spec, stored=adapter.layouts)
        attach_tuner(self._model, adapter.spec, targets=targets, config=adapter.peft_config)
        wanted = files.adapter_tensors(self._model)
        own = {key: tensor for key, tensor in adapter.tensors.items() if key not in head_keys(adapter)}
        self._is_whole = own.keys() == wanted.keys()
        if self._is_whole:
            numbers = {key: checked_tensor(adapter, key, t.shape) for key, t in wanted.items()}
            files.restore_tensors(self._model.eval(), numbers)
        self._filled: tuple[nn.Module, dict[str, nn.Parameter]] | None = None

    def layer(self, name: str, weight: Tensor, bias: Tensor | None) -> PeftLayer | None:
        """As :func:`lone_layer`; the layer that was given before is empty again."""
        check_weight(self._adapter, name, weight)
        if self._filled is not None:
            base, hollow = self._filled
            for key, parameter in hollow.items():
                base.register_parameter(key, parameter)
        if not self._is_whole:
            return None
        module: Any = self._model.get_submodule(name)
        base = module.get_base_layer()
        self._filled = base, dict(base.named_parameters(recurse=False))
        for key, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None:
                base.register_parameter(key, nn.Parameter(tensor, requires_grad=False))
        return _as_saved(self._model, self._adapter, name)


def _model_of(name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A model that has one linear layer, of this name."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    model = module = nn.Module()
    *path, last = name.split(".")
    for part in path:
        module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    module.add_module(last, layer)
    return model
