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
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mirrortune.adapters.autograd import added_product, spectral_product
from mirrortune.adapters.cores import Core
from mirrortune.adapters.kinds import CallableKind, Linear
from mirrortune.adapters.spectral import Spectral
from mirrortune.adapters.strategies import cheapest_strategy
from mirrortune.adapters.svd import Factors
from mirrortune.errors import ConfigError

_LINEAR = Linear()


class SpectralLinear(Spectral):
    """W' = W + U (K - diag(S)) Vh in place of a frozen layer that applies W.

    Args:
        base_layer: the layer to adapt, its weight a matrix (O, I) in the eyes of ``kind``; frozen and never changed.
        factors: singular triplets of that matrix; of a packed one on the device and in the dtype to compute in.
        core: owns the trained numbers and K.
        strategy: how to compute the output; None for what is cheapest by the layer's shape.
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
        kind: CallableKind = _LINEAR,
    ) -> None:
        weight = factors.U if kind.is_packed else base_layer.get_parameter("weight")
        super().__init__(factors, core, kind.layouts(base_layer)["weight"], weight)
        self.base_layer = base_layer.requires_grad_(requires_grad=False)
        self.kind = kind
        # Without the number of rows it is never dense, which is no matter of the layer alone.
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
        U, Vh, base = self.U.to(dtype), self.Vh.to(dtype), self.base_layer
        is_fused = is_branch and self._adds_in_place(dtype)
        with torch.autocast(x.device.type, enabled=False):
            if is_fused:
                product = added_product(given, base, U, Vh, self.core, coefficients)
            else:
                bias = None if is_branch or self.bias is None else self.bias.to(dtype)
                product = spectral_product(given, U, Vh, self.kind, base, self.core, coefficients, bias)
        beside = self.core.beside(lambda A: self.kind.project(base, given, A.to(dtype)))
        if beside is not None:
            product = product + beside
        if is_fused:
            return product
        output = self.kind.output(base, product)
        return base(x) + output if is_branch else output

    def _adds_in_place(self, dtype: torch.dtype) -> bool:
        """Whether the base layer is y = W x + b in ``dtype`` and nothing more, to whose result ours can be added."""
        base = self.base_layer
        hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)  # noqa: SLF001
        is_plain = type(self.kind) is Linear and self.kind.is_callable(base) and not any(hooks)
        is_frozen = not any(p.requires_grad for p in base.parameters())  # somebody may train a bias of ours
        return (
            is_plain and is_frozen and base.get_parameter("weight").dtype == dtype and not torch.compiler.is_compiling()
        )

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
