# SPDX-License-Identifier: Apache-2.0
"""Build a model without weights that reads the weights of each module just before it runs and frees them afterwards.

A forward pass then needs only the memory of the largest module.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mirrortune.models.load import ModelSource, task_config, with_room
from mirrortune.system.devices import change_class

Read = Callable[[str], Tensor]
"""Function that returns the value of the parameter or buffer with the given name."""


def outline(source: ModelSource, auto_class: str, config_fields: dict[str, Any], pad_token_id: int | None) -> nn.Module:
    """Build a model without weights in evaluation mode; its buffers have values, since they are computed, not loaded.

    Args:
        source: source of the model.
        auto_class: name of an Auto class, or of a model class.
        config_fields: see :func:`mirrortune.models.load.task_config`.
        pad_token_id: see :func:`mirrortune.models.load.task_config`.
    """
    import transformers  # noqa: PLC0415
    from accelerate import init_empty_weights  # noqa: PLC0415

    config = task_config(source, config_fields, pad_token_id)
    model_class: Any = getattr(transformers, auto_class)
    with init_empty_weights(include_buffers=False):
        model: nn.Module = (
            model_class.from_config(config, trust_remote_code=False)
            if hasattr(model_class, "from_config")
            else model_class(config)
        )
    tie: Any = getattr(model, "tie_weights", lambda: None)
    tie()  # init_empty_weights unties weights
    return with_room(model, source).eval()


def read_lazily(model: nn.Module, read: Read) -> nn.Module:
    """Make an :func:`outline` read its weights lazily.

    Each time before a module runs, ``read`` is called for each of its parameters and persistent buffers. A parameter
    that another module reads, such as DeBERTa's table of relative positions, is read each time.
    """
    saved = set(model.state_dict())
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        buffers = [name for name, _ in module.named_buffers(recurse=False) if _full(prefix, name) in saved]
        if own or buffers:
            _read_empty(module, prefix, list(own), read)
            module.register_forward_pre_hook(_reader(prefix, list(own), buffers, read))
            module.register_forward_hook(_emptier(own), always_call=True)
    return model


def _full(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _read_empty(module: nn.Module, prefix: str, names: list[str], read: Read) -> None:
    """Read parameters of a module where they are used while the module does not run."""

    def value_of(name: str) -> property:
        def get(module: nn.Module) -> Tensor | None:
            held = module._parameters[name]  # noqa: SLF001
            return read(_full(prefix, name)) if held is not None and held.is_meta else held

        return property(get)

    change = functools.partial(_read_empty, prefix=prefix, names=names, read=read)
    change_class(module, change, {name: value_of(name) for name in names})


def _reader(prefix: str, names: list[str], buffers: list[str], read: Read) -> Callable[[nn.Module, Any], None]:
    def fill(module: nn.Module, _: Any) -> None:
        for name in names:
            value = nn.Parameter(read(_full(prefix, name)), requires_grad=False)
            module._parameters[name] = value  # noqa: SLF001  (or setattr would read the value)
            setattr(module, name, value)
        for name in buffers:
            setattr(module, name, read(_full(prefix, name)))

    return fill


def _emptier(empty: dict[str, nn.Parameter]) -> Callable[[nn.Module, Any, Any], None]:
    def let_go(module: nn.Module, *_: Any) -> None:
        for name, parameter in empty.items():
            setattr(module, name, parameter)

    return let_go
