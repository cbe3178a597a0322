# SPDX-License-Identifier: Apache-2.0
"""Build a single layer of a PEFT adapter without the rest of its model, to merge tensor by tensor.

PEFT attaches its tuner to a model of one layer with this layer's name and weight. If layers share parameters, or draw
them one after another, it attaches the tuner to all layers of a model whose weights take no memory, and one of them is
filled at a time. The stored response verifies that the layer computes the same as in the complete model. It does not if
the tuner depends on the weights of missing layers; such a tuner is merged with its complete model in memory.
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
    """Return whether all layers of a PEFT adapter are plain linear layers."""
    return all(
        layout.count == 1 and not layout.is_transposed and not layout.rows and len(layout.shape) == 2
        for layout in adapter.layouts.values()
    )


def stands_alone(adapter: AdapterFile) -> bool:
    """Whether every tensor of a PEFT adapter belongs to one layer, or is of a parameter trained as it is."""
    keys = adapter.tensors.keys() - whole_keys(adapter)
    return all(any(key.startswith(f"{files.PREFIX}{owner}.") for owner in adapter.layouts) for key in keys)


def whole_keys(adapter: AdapterFile) -> set[str]:
    """Return PEFT's names for the tensors of the head and of modules with other parameters trained as they are."""
    modules = (adapter.peft_config or {}).get("modules_to_save") or ()
    owners = (*(name.rpartition(".")[0] for name in adapter.head), *modules)
    rows = {files.rows_key(name) for name in adapter.plain}
    return {k for k in adapter.tensors if k in rows or any(k.startswith(f"{files.PREFIX}{o}.") for o in owners)}


def lone_layer(adapter: AdapterFile, name: str, weight: Tensor, bias: Tensor | None) -> PeftLayer | None:
    """Build one trained layer of ``adapter``, in evaluation mode.

    Args:
        adapter: adapter for which :func:`stands_alone` is true.
        name: name of the layer.
        weight: weight of the base model, in the dtype of training.
        bias: bias of the base model, in the dtype of training.

    Returns:
        The layer; None if it cannot be built without its model.

    Raises:
        VerificationError: the base weight differs, or stored values are missing or not finite.
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
    """Return a layer of an adapted model if it responds as it did when it was saved, else None."""
    if not adapter.responses[name]:
        return None
    try:
        files.compare_responses(model, {name: adapter.responses[name]})
    except VerificationError:
        return None
    found = attachment(model)
    assert isinstance(found, PeftAttachment)
    layer = found.layers[name]
    assert isinstance(layer, PeftLayer)
    return layer


class SharedLayers:
    """The layers of a PEFT adapter, with one base weight in memory at a time.

    Args:
        adapter: adapter of plain linear layers that share parameters.
        model: base model without weights.
    """

    def __init__(self, adapter: AdapterFile, model: nn.Module) -> None:
        self._adapter = adapter
        self._model = hollow_copy(model.to(getattr(torch, str(adapter.base["dtype"]))), "cpu")
        targets = find_targets(self._model, adapter.spec, stored=adapter.layouts)
        attach_tuner(self._model, adapter.spec, targets=targets, config=adapter.peft_config)
        wanted = files.adapter_tensors(self._model)
        own = {key: tensor for key, tensor in adapter.tensors.items() if key not in whole_keys(adapter)}
        self._is_whole = own.keys() == wanted.keys()
        if self._is_whole:
            numbers = {key: checked_tensor(adapter, key, t.shape) for key, t in wanted.items()}
            files.restore_tensors(self._model.eval(), numbers)
        self._filled: tuple[nn.Module, dict[str, nn.Parameter]] | None = None

    def layer(self, name: str, weight: Tensor, bias: Tensor | None) -> PeftLayer | None:
        """Build one trained layer as :func:`lone_layer` does; the weight of the layer returned before is dropped."""
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
    """Build a model with one linear layer called ``name``."""
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
