# SPDX-License-Identifier: Apache-2.0
"""Linear layers whose weight is packed: quantised, or in numbers that mean nothing without scales kept elsewhere.

Such a layer is known by what it does, y = W x + b, whoever packed it. W is unpacked once, to be factorised; the layer
itself is never touched and computes as before, with the core's branch beside it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mirrortune.adapters.kinds import Linear, is_plain, own_matrix
from mirrortune.adapters.layout import Layout
from mirrortune.errors import ConfigError

_BLOCK = 1024  # rows of the identity that a layer is applied to at once


class PackedLinear(Linear):
    """A linear layer of which only the function is plain: bitsandbytes, torchao, GPTQ, AWQ, float8 with scales, ..."""

    name = "quantised-linear"
    is_packed = True

    def layouts(self, module: nn.Module) -> dict[str, Layout]:
        """See :class:`mirrortune.adapters.kinds.Kind`."""
        sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)
        if not all(isinstance(n, int) and n > 0 for n in sizes) or own_matrix(module, 2) is not None:
            return {}
        if any(True for _ in module.children()) or all(is_plain(t) for t in _tensors(module)):
            return {}
        out_features, in_features = (int(n) for n in sizes if n is not None)
        return {"weight": Layout(shape=(out_features, in_features), out_features=out_features)}

    def is_callable(self, module: nn.Module) -> bool:
        """See :class:`mirrortune.adapters.kinds.Kind`."""
        return True

    @torch.no_grad()
    def read(self, module: nn.Module, parameter: str) -> Tensor:
        """W (O, I), dequantised: by whoever packed it, or else column by column from what the layer computes."""
        held: Any = getattr(module, "weight", None)
        packer = type(held).__name__
        if packer == "Params4bit" and not getattr(held.quant_state, "packing_format_for_cpu", False):
            functional: Any = importlib.import_module("bitsandbytes.functional")
            return functional.dequantize_4bit(held.data, held.quant_state)  # type: ignore[no-any-return]
        if packer == "Int8Params":
            functional = importlib.import_module("bitsandbytes.functional")
            # The first forward moves the scales from the weight to the layer's state.
            state: Any = module.state
            scales = held.SCB if held.SCB is not None else state.SCB
            return functional.int8_vectorwise_dequant(held.data, scales)  # type: ignore[no-any-return]
        if hasattr(type(held), "__tensor_flatten__") and hasattr(held, "dequantize"):  # torchao
            return held.dequantize()  # type: ignore[no-any-return]
        return _by_columns(module)


def plain_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's first unpacked weight: what packed ones are dequantised to."""
    return next((p.dtype for p in model.parameters() if is_plain(p)), torch.float32)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _by_columns(module: Any) -> Tensor:
    """W from the layer's outputs for the unit vectors; exact where it rounds nothing but W."""
    device = next(_tensors(module)).device
    floats = [t.dtype for t in _tensors(module) if t.dtype in (torch.float16, torch.bfloat16, torch.float32)]
    dtype = min(floats, key=lambda d: d.itemsize, default=torch.float32)
    bias, columns = getattr(module, "bias", None), list[Tensor]()
    if bias is not None:
        module.bias = None  # subtracted from the result it would leave its rounding there
    try:
        for start in range(0, module.in_features, _BLOCK):
            count = min(_BLOCK, module.in_features - start)
            units = torch.zeros(count, module.in_features, dtype=dtype, device=device)
            units[torch.arange(count), torch.arange(start, start + count)] = 1
            columns.append(_outputs(module, units))
    finally:
        if bias is not None:
            module.bias = bias
    return torch.cat(columns).T.contiguous()


def _outputs(module: Any, x: Tensor) -> Tensor:
    try:
        return module(x)  # type: ignore[no-any-return]
    except (RuntimeError, AttributeError, TypeError) as error:
        raise ConfigError(
            "model", f"a quantised layer cannot be called by itself ({type(error).__name__}: {str(error)[:200]})",
            fix="Load the model dequantised (dequantize=True in its quantization_config), or in full precision",
        ) from error  # fmt: skip
