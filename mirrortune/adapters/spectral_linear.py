# SPDX-License-Identifier: Apache-2.0
"""A frozen linear map (linear layer, convolution, embedding) with a trained core in its singular basis, and two ways to
run it.

    branch     y = base(x) + U (K - S) Vh x     exact base model for an untrained core; cheap when R << D
    factored   y = U K Vh x + b                 R >= D only; cheaper than branch there, equal to the base up to rounding

Both save z = Vh x (N, R) for the backward pass, not x (N, I): the factors are frozen, so the core's gradient needs only
z and U^T dy. Shapes: N rows, O out_features, I in_features, D = min(O, I), R rank; a convolution has a row for each
position of its output, and I counts its kernel.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812  (the field's name for it)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map

from mirrortune.adapters.cores import Core
from mirrortune.adapters.factorize import Factors
from mirrortune.adapters.kinds import Embedding, Kind, Linear
from mirrortune.adapters.spectral import Spectral
from mirrortune.errors import ConfigError

Strategy = Literal["branch", "factored", "dense"]

_LINEAR = Linear()


class _SpectralProduct(torch.autograd.Function):
    """x -> U mix(Vh x), with gradients for x and the core's coefficients; U and Vh are constants."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, U: Tensor, Vh: Tensor, kind: Kind, base: nn.Module, core: Core, *coefficients: Tensor
    ) -> Tensor:
        projected = kind.project(base, x, Vh)  # (..., R)
        z = projected.reshape(-1, projected.shape[-1])  # (N, R)
        ctx.kind, ctx.base, ctx.core, ctx.shapes = kind, base, core, (x.shape, projected.shape)
        ctx.save_for_backward(z, U, Vh, *coefficients)
        mixed = core.mix(z.to(_mixing_dtype(z)), *coefficients)
        # Reshaped before the product: model code may change the output in place, which autograd allows for no view.
        return F.linear(mixed.to(z.dtype).reshape(projected.shape), U)  # (..., O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        z, U, Vh, *coefficients = ctx.saved_tensors
        dtype, (shape, projected) = _mixing_dtype(z), ctx.shapes
        grad_mixed = grad_y.reshape(-1, U.shape[0]).to(U.dtype) @ U  # (N, R)
        grad_z, grad_coefficients = ctx.core.mix_backward(z.to(dtype), grad_mixed.to(dtype), *coefficients)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.kind.project_backward(ctx.base, grad_z.to(z.dtype).reshape(projected), Vh, shape)
        return (grad_x, None, None, None, None, None, *grad_coefficients)


def _mixing_dtype(z: Tensor) -> torch.dtype:
    # The core works in float32 even when the model runs in 16 bits: its coefficients are near 1 and differ in the last
    # digits.
    return torch.promote_types(z.dtype, torch.float32)


class SpectralLinear(Spectral):
    """W' = W + U (K - diag(S)) Vh in place of a frozen layer that applies W.

    Args:
        base_layer: the layer to adapt, its weight a matrix (O, I) in the eyes of ``kind``; frozen and never changed.
        factors: singular triplets of that matrix; of a packed one on the device and in the dtype to compute in.
        core: owns the trained numbers and K.
        strategy: how to compute the output; None lets :func:`cheapest_strategy` choose.
        kind: what the layer is, ``kind.is_callable(base_layer)``; a linear layer by default.

    Raises:
        ConfigError: if ``factored`` is asked for with fewer than min(O, I) directions.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        factors: Factors,
        core: Core,
        strategy: Literal["branch", "factored"] | None = None,
        kind: Kind = _LINEAR,
    ) -> None:
        weight = factors.U if kind.is_packed else base_layer.get_parameter("weight")
        super().__init__(factors, core, kind.layouts(base_layer)["weight"], weight)
        self.base_layer = base_layer.requires_grad_(requires_grad=False)
        self.kind = kind
        self.strategy = strategy or cheapest_strategy(
            self.out_features, self.in_features, self.rank, weight.dtype, kind
        )
        if self.strategy == "factored" and self.rank < min(self.out_features, self.in_features):
            raise ConfigError(
                "adapter.strategy",
                f"factored needs every singular direction, got rank {self.rank} of {min(self.layout.matrix_shape)}",
                allowed="branch",
                fix="Use --rank full or adapter.strategy=branch",
            )
        if self.strategy == "factored":
            # The product of the factors stands for the weight, which then need not follow the model to its device.
            del base_layer.weight
            base_layer.weight = weight.detach()  # a plain attribute: out of .to(), parameters() and state_dict()

    @property
    def weight(self) -> Tensor:
        """W' in the base layer's own layout, for code that reads a layer's weight instead of calling the layer.

        Its shape, dtype and device cost nothing, which is all that most readers want; W' is computed when it is used.
        """
        return self.adapted_weight() if torch.compiler.is_compiling() else _AdaptedWeight.of(self)

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias (O,), or None."""
        bias: Tensor | None = getattr(self.base_layer, "bias", None)
        return bias

    def __getattr__(self, name: str) -> Any:
        """Whatever else model code asks of the layer (``stride``, ``embedding_dim``, ...) the base layer answers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def forward(self, x: Tensor) -> Tensor:
        """Output of the adapted layer for what the base layer takes; (..., O) for x (..., I) of a linear layer."""
        is_branch = self.strategy == "branch"
        coefficients = self.core.coefficients(delta=is_branch)
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else self.U.dtype
        given = x.to(dtype) if x.is_floating_point() else x
        with torch.autocast(x.device.type, enabled=False):
            product = self._product(given, self.U.to(dtype), self.Vh.to(dtype), coefficients)
        beside = self.core.beside(lambda A: self.kind.project(self.base_layer, given, A.to(dtype)))
        if beside is not None:
            product = product + beside
        if is_branch:
            frozen: Tensor = self.base_layer(x)
            return frozen + self.kind.output(self.base_layer, product)
        biased = product if self.bias is None else product + self.bias.to(product.dtype)
        return self.kind.output(self.base_layer, biased)

    def _product(self, x: Tensor, U: Tensor, Vh: Tensor, coefficients: tuple[Tensor, ...]) -> Tensor:
        """U mix(Vh x), shape (..., O)."""
        if torch.compiler.is_compiling():
            # A compiler decides by itself what to keep, and need not step into our backward pass to see what it does.
            z = self.kind.project(self.base_layer, x, Vh)
            mixed = self.core.mix(z.reshape(-1, z.shape[-1]).to(_mixing_dtype(z)), *coefficients)
            return F.linear(mixed.to(z.dtype), U).reshape(*z.shape[:-1], -1)
        product: Tensor = _SpectralProduct.apply(x, U, Vh, self.kind, self.base_layer, self.core, *coefficients)  # type: ignore[no-untyped-call]
        return product

    def adapted_weight(self) -> Tensor:
        """W' in the layout and dtype of the base layer's weight, on the device of the factors; differentiable."""
        # A parameter, or a plain tensor beside its factors.
        base: Any = self.kind.read(self.base_layer, "weight") if self.kind.is_packed else self.base_layer.weight
        return self.adapt(base, self.U.dtype)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"rank={self.rank}, strategy={self.strategy}"


class _AdaptedWeight(Tensor):
    """Stands for a layer's W': answers for its shape, dtype and device, and becomes W' in anything else."""

    layer: SpectralLinear

    @classmethod
    def of(cls, layer: SpectralLinear) -> _AdaptedWeight:
        """The weight of ``layer``, not computed yet."""
        outline = layer.U.detach().new_empty(1).expand(layer.layout.shape)  # all but its numbers, without memory
        weight = outline.as_subclass(cls)
        weight.layer = layer
        return weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer from the outline, or compute."""
        if func in _OUTLINE:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        given = tree_map(
            lambda a: a.layer.adapted_weight() if isinstance(a, _AdaptedWeight) else a, (args, kwargs or {})
        )
        return func(*given[0], **given[1])


_PROPERTIES = ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_meta", "is_mps", "is_sparse",
               "is_quantized", "is_nested", "names", "itemsize", "nbytes")  # fmt: skip
_OUTLINE = {getattr(Tensor, name).__get__ for name in _PROPERTIES if hasattr(Tensor, name)} | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.is_floating_point,
    Tensor.is_complex, Tensor.get_device, Tensor.__len__,
}  # fmt: skip
"""What can be said of W' without computing it."""


def cheapest_strategy(
    out_features: int, in_features: int, rank: int, dtype: torch.dtype, kind: Kind = _LINEAR
) -> Literal["branch", "factored"]:
    """The strategy with the fewer multiplications per row, in units of the frozen layer's own O * I.

    branch costs 1 + R (O + I) / (O I), factored R (O + I) / (O I). In 16 bits factored would put one more rounding of
    the whole weight into the model, so branch is taken there; for embeddings, whose own forward costs nothing, and for
    packed weights, which were packed to be small.
    """
    is_full = rank >= min(out_features, in_features)
    is_exact_enough = dtype in (torch.float32, torch.float64) and not isinstance(kind, Embedding) and not kind.is_packed
    return "factored" if is_full and is_exact_enough else "branch"
