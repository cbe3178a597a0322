# SPDX-License-Identifier: Apache-2.0
"""Define the kinds of modules that hold matrices: how to recognise them, read their weight, and apply a matrix.

A module is recognised by its properties, never by its model. A new kind is one class, listed in ``targets.KINDS``.
Shapes: O out_features, I in_features, E stacked matrices (experts, convolution groups), R rank.
"""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from typing_extensions import override

from mirrortune.adapters.layout import Layout
from mirrortune.errors import ConfigError


class Kind(ABC):
    """A kind of module that holds matrices."""

    name: str
    """Name in plans and adapter files."""
    is_default: bool = True
    """Whether ``all-linear`` includes this kind; other kinds are adapted on request."""
    is_quantised: bool = False
    """Whether the weight is quantised, so that it can be read and the layer called, but the weight not replaced."""

    @abstractmethod
    def layouts(self, module: nn.Module) -> dict[str, Layout]:
        """Return the layouts of the weights of ``module`` by parameter name; empty for a module of another kind."""

    def read(self, module: nn.Module, parameter: str) -> Tensor:
        """Return the weight, in the shape of its layout."""
        return module.get_parameter(parameter).detach()


class CallableKind(Kind):
    """A kind of module that is called to apply its matrix, so that an adapted layer can take its place.

    For all other kinds, the weight is replaced where it is read.
    """

    @abstractmethod
    def is_callable(self, module: nn.Module) -> bool:
        """Return whether ``module`` computes exactly what :meth:`project` reproduces.

        If not, because it overrides ``forward``, its weight is replaced where it is read.
        """

    @abstractmethod
    def project(self, module: nn.Module, x: Tensor, Vh: Tensor) -> Tensor:
        """Apply the directions Vh (R, I) to the input instead of the weight; shape (..., R), features last."""

    @abstractmethod
    def project_backward(self, module: nn.Module, grad_z: Tensor, Vh: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        """Return the gradient of the input, of ``shape``, from that of :meth:`project`'s result; None if undefined."""

    def output(self, module: nn.Module, y: Tensor) -> Tensor:
        """Return ``y`` (..., O), features last, in the layout of the module's output."""
        return y


class Linear(CallableKind):
    """``nn.Linear``, y = x W^T + b, and modules of other classes whose ``in_features`` and ``out_features`` match the
    shape of their weight.
    """

    name = "linear"

    @override
    def layouts(self, module: nn.Module) -> dict[str, Layout]:
        weight = own_matrix(module, 2)
        said = getattr(module, "out_features", None), getattr(module, "in_features", None)
        if weight is None or said != tuple(weight.shape):
            return {}
        return {"weight": Layout(shape=tuple(weight.shape), out_features=weight.shape[0])}

    @override
    def is_callable(self, module: nn.Module) -> bool:
        return type(module).forward is nn.Linear.forward

    @override
    def project(self, module: nn.Module, x: Tensor, Vh: Tensor) -> Tensor:
        return F.linear(x, Vh)

    @override
    def project_backward(self, module: nn.Module, grad_z: Tensor, Vh: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        return (grad_z @ Vh).reshape(shape)


class TransposedLinear(Linear):
    """``transformers.pytorch_utils.Conv1D`` (of GPT-2 and relatives): a linear layer whose weight is (in, out)."""

    name = "conv1d-linear"

    @override
    def layouts(self, module: nn.Module) -> dict[str, Layout]:
        weight = own_matrix(module, 2) if _is_transformers_conv1d(type(module)) else None
        if weight is None:
            return {}
        return {"weight": Layout(shape=tuple(weight.shape), out_features=weight.shape[1], is_transposed=True)}

    @override
    def is_callable(self, module: nn.Module) -> bool:
        return type(module).forward.__qualname__ == "Conv1D.forward"


class Convolution(CallableKind):
    """``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``: W is (out, in * kernel), each output position a row.

    A grouped convolution is a stack of E = groups matrices.
    """

    name = "convolution"
    is_default = False

    @override
    def layouts(self, module: nn.Module) -> dict[str, Layout]:
        if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return {}
        weight = own_matrix(module, len(module.kernel_size) + 2)
        if weight is None:
            return {}
        out_features, count = module.out_channels // module.groups, module.groups
        return {"weight": Layout(shape=tuple(weight.shape), out_features=out_features, count=count)}

    @override
    def is_callable(self, module: nn.Module) -> bool:
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        if type(module).forward not in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward):
            return False
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)

    @override
    def project(self, module: nn.Module, x: Tensor, Vh: Tensor) -> Tensor:
        conv: Any = module
        z: Tensor = conv._conv_forward(x, _kernel(conv, Vh), None)  # noqa: SLF001  (its geometry, whatever its dimension)
        return z.movedim(-1 - len(conv.kernel_size), -1)

    @override
    def project_backward(self, module: nn.Module, grad_z: Tensor, Vh: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        conv: Any = module
        sizes = len(conv.kernel_size)
        grad = grad_z.movedim(-1, -1 - sizes)
        batch = (1,) if len(shape) == sizes + 1 else ()  # an input without a batch dimension
        x_like = grad.new_empty(1).expand(*batch, *shape)  # only its shape is read
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
            grad.reshape(*batch, *grad.shape), x_like, _kernel(conv, Vh), None, conv.stride, conv.padding,
            conv.dilation, 0, [0] * sizes, 1, [True, False, False],
        )  # fmt: skip
        return found[0].reshape(shape)

    @override
    def output(self, module: nn.Module, y: Tensor) -> Tensor:
        conv: Any = module
        return y.movedim(-1, -1 - len(conv.kernel_size))


class Embedding(CallableKind):
    """``nn.Embedding``: the map from one-hot rows to vectors, W (dimensions, vocabulary); adapted on request only."""

    name = "embedding"
    is_default = False

    @override
    def layouts(self, module: nn.Module) -> dict[str, Layout]:
        weight = own_matrix(module, 2) if isinstance(module, nn.Embedding) else None
        if weight is None:
            return {}
        return {"weight": Layout(shape=tuple(weight.shape), out_features=weight.shape[1], is_transposed=True)}

    @override
    def is_callable(self, module: nn.Module) -> bool:
        assert isinstance(module, nn.Embedding)
        return type(module).forward is nn.Embedding.forward and module.max_norm is None

    @override
    def project(self, module: nn.Module, x: Tensor, Vh: Tensor) -> Tensor:
        return F.embedding(x, Vh.T)

    @override
    def project_backward(self, module: nn.Module, grad_z: Tensor, Vh: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        return None  # the input consists of token ids


class Attention(Kind):
    """``nn.MultiheadAttention``: its input projections are parameters (3 D, D) that its forward reads.

    Its output projection is a linear layer that is never called; its weight is read, see ``SpectralLinear.weight``.
    """

    name = "attention-projection"

    @override
    def layouts(self, module: nn.Module) -> dict[str, Layout]:
        if not isinstance(module, nn.MultiheadAttention):
            return {}
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        held = {n: p for n in names if isinstance(p := getattr(module, n, None), nn.Parameter)}
        return {n: Layout(shape=tuple(p.shape), out_features=p.shape[0]) for n, p in held.items()}


class Experts(Kind):
    """Fused experts: parameters (experts, out, in), or (experts, in, out), of a module with the number of experts as an
    attribute. One core per expert.
    """

    name = "experts"

    @override
    def layouts(self, module: nn.Module) -> dict[str, Layout]:
        held = _expert_parameters(module)
        if not held:
            return {}
        is_transposed = getattr(module, "is_transposed", None)  # set by transformers' experts decorator
        if is_transposed is None:
            is_transposed = _is_transposed(list(held.values()))
        return {
            name: Layout(
                shape=tuple(p.shape),
                count=p.shape[0],
                out_features=p.shape[2] if is_transposed else p.shape[1],
                is_transposed=is_transposed,
            )
            for name, p in held.items()
        }


class Parameter(Kind):
    """Any other parameter of two or three dimensions, read as (out, in) or (E, out, in); on request only."""

    name = "parameter"
    is_default = False

    @override
    def layouts(self, module: nn.Module) -> dict[str, Layout]:
        found = {}
        for name, parameter in module.named_parameters(recurse=False):
            shape = tuple(parameter.shape)
            leading = math.prod(shape[:-2])
            if len(shape) in (2, 3) and is_plain(parameter) and min(shape[-2:]) > 1:
                found[name] = Layout(shape=shape, out_features=shape[-2], count=leading)
        return found


def no_view(y: Tensor) -> Tensor:
    """Return the output of an ``autograd.Function`` as a tensor that is no view; ``F.linear`` makes one with a bias.

    Model code may change it in place, as SpecAugment does, which autograd forbids for views that a Function returns.
    """
    found: Tensor = torch.ops.aten._unsafe_view(y, y.shape)  # noqa: SLF001
    return found


def own_matrix(module: nn.Module, ndim: int) -> nn.Parameter | None:
    """Return ``module.weight`` if it is a floating-point parameter of ``ndim`` dimensions, neither quantised nor
    computed.
    """
    weight = module._parameters.get("weight")  # noqa: SLF001  (getattr would compute a parametrised one)
    return weight if weight is not None and weight.ndim == ndim and is_plain(weight) else None


def is_plain(parameter: Tensor) -> bool:
    """Return whether a layer computes with the values as stored: neither quantised nor float8, which needs a scale."""
    is_wrapper = hasattr(type(parameter), "__tensor_flatten__")  # several plain tensors in one, such as torchao's
    return parameter.is_floating_point() and parameter.dtype.itemsize > 1 and not is_wrapper


def _expert_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    counts = {v for n, v in vars(module).items() if "expert" in n and isinstance(v, int) and not isinstance(v, bool)}
    return {
        name: p
        for name, p in module.named_parameters(recurse=False)
        if p.ndim == 3 and p.shape[0] in counts and p.shape[0] > 1 and min(p.shape[1:]) > 1 and is_plain(p)
    }


def _is_transposed(parameters: list[nn.Parameter]) -> bool:
    # Used without the attribute: the last map has as many outputs as the first one has inputs.
    first, last = parameters[0].shape, parameters[-1].shape
    return first[1] == last[2] and first[2] != last[1]


def _is_transformers_conv1d(cls: type) -> bool:
    # Compared by name, so that transformers need not be imported.
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in cls.__mro__)


def _kernel(conv: Any, Vh: Tensor) -> Tensor:
    return Vh.reshape(-1, conv.in_channels, *conv.kernel_size)


_BLOCK = 1024  # rows of the identity matrix to which a layer is applied at once


class QuantisedLinear(Linear):
    """A quantised linear layer of any make: bitsandbytes, torchao, GPTQ, AWQ, float8 with scales, ..."""

    name = "quantised-linear"
    is_quantised = True

    @override
    def layouts(self, module: nn.Module) -> dict[str, Layout]:
        sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)
        if not all(isinstance(n, int) and n > 0 for n in sizes) or own_matrix(module, 2) is not None:
            return {}
        if any(True for _ in module.children()) or all(is_plain(t) for t in _tensors(module)):
            return {}
        out_features, in_features = (int(n) for n in sizes if n is not None)
        return {"weight": Layout(shape=(out_features, in_features), out_features=out_features)}

    @override
    def is_callable(self, module: nn.Module) -> bool:
        return True

    @torch.no_grad()
    def read(self, module: nn.Module, parameter: str) -> Tensor:
        """Return W (O, I), dequantised by its library or else computed column by column from the layer's outputs."""
        held: Any = getattr(module, "weight", None)
        packer = type(held).__name__
        if packer == "Params4bit" and not getattr(held.quant_state, "packing_format_for_cpu", False):
            functional: Any = importlib.import_module("bitsandbytes.functional")
            return functional.dequantize_4bit(held.data, held.quant_state)  # type: ignore[no-any-return]
        if packer == "Int8Params":
            functional = importlib.import_module("bitsandbytes.functional")
            # The first forward pass moves the scales from the weight to the state of the layer.
            state: Any = module.state
            scales = held.SCB if held.SCB is not None else state.SCB
            return functional.int8_vectorwise_dequant(held.data, scales)  # type: ignore[no-any-return]
        if hasattr(type(held), "__tensor_flatten__") and hasattr(held, "dequantize"):  # torchao
            return held.dequantize()  # type: ignore[no-any-return]
        return _by_columns(module)


def plain_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of a model's first plain weight, to which quantised weights are dequantised."""
    return next((p.dtype for p in model.parameters() if is_plain(p)), torch.float32)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _by_columns(module: Any) -> Tensor:
    """Compute W from the layer's outputs for the unit vectors; exact if the layer rounds nothing but W."""
    device = next(_tensors(module)).device
    floats = [t.dtype for t in _tensors(module) if t.dtype in (torch.float16, torch.bfloat16, torch.float32)]
    dtype = min(floats, key=lambda d: d.itemsize, default=torch.float32)
    bias, columns = getattr(module, "bias", None), list[Tensor]()
    if bias is not None:
        module.bias = None  # removed, because subtracting it from the result would leave its rounding error
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


def base_prefix(model: nn.Module) -> str:
    """Return the prefix of the parameters of the base model in a model with a head; empty if it has no such part."""
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""
