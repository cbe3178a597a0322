# SPDX-License-Identifier: Apache-2.0
"""A single layer of an adapter of PEFT's, without the rest of its model: what merging tensor by tensor needs.

PEFT puts a tuner into a model of one layer that has the layer's name and weight, and the stored probe says whether it
then computes what it did in its own model. It does not where layers share numbers or draw them one after another; those
tuners are merged as whole models.
"""

from __future__ import annotations

from torch import Tensor, nn

from mirrortune import peft_file
from mirrortune.adapter_file import AdapterFile, checked_tensor
from mirrortune.adapters.inject import attachment
from mirrortune.adapting import check_weight
from mirrortune.errors import VerificationError
from mirrortune.peft_tuners import PeftAttachment, PeftLayer, attach_tuner

_PREFIX = "base_model.model."


def stands_alone(adapter: AdapterFile) -> bool:
    """Whether every tensor of an adapter of PEFT's belongs to one plain linear layer, or to the head."""
    owners = {*adapter.layouts, *(name.rpartition(".")[0] for name in adapter.head)}
    is_plain = all(
        layout.count == 1 and not layout.is_transposed and not layout.rows and len(layout.shape) == 2
        for layout in adapter.layouts.values()
    )
    return is_plain and all(any(key.startswith(f"{_PREFIX}{owner}.") for owner in owners) for key in adapter.tensors)


def head_tensors(adapter: AdapterFile) -> dict[str, Tensor]:
    """The trained head of an adapter of PEFT's, by the model's names."""
    return {name: adapter.tensors[_PREFIX + name] for name in adapter.head if _PREFIX + name in adapter.tensors}


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
        model, adapter.spec, config=adapter.peft_config, names=[name],
        on_layer=lambda _, matrix: check_weight(adapter, name, matrix),
    )  # fmt: skip
    wanted = peft_file.adapter_tensors(model)
    own = {key for key in adapter.tensors if key.startswith(f"{_PREFIX}{name}.")}
    if own != wanted.keys():
        return None
    peft_file.restore_tensors(model, {key: checked_tensor(adapter, key, t.shape) for key, t in wanted.items()})
    try:
        peft_file.check_probes(model, adapter.probes)
    except VerificationError:
        return None
    model.eval()
    found = attachment(model)
    assert isinstance(found, PeftAttachment)
    layer = found.layers[name]
    assert isinstance(layer, PeftLayer)
    return layer


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
