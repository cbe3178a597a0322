# SPDX-License-Identifier: Apache-2.0
"""A frozen linear layer with a trained core in its singular basis, and the two ways to run it.

    branch     y = base(x) + U (K - S) Vh x     exact base model for an untrained core; cheap when R << D
    factored   y = U K Vh x + b                 R >= D only; cheaper than branch there, equal to the base up to rounding

Both save z = Vh x (N, R) for the backward pass, not x (N, I): the factors are frozen, so the core's gradient needs only
z and U^T dy. Shapes: N rows, O out_features, I in_features, D = min(O, I), R rank.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812  (the field's name for it)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mirrortune.adapters.cores import Core
from mirrortune.adapters.factorize import Factors
from mirrortune.errors import ConfigError

Strategy = Literal["branch", "factored"]


class _SpectralProduct(torch.autograd.Function):
    """x -> U mix(Vh x), with gradients for x and the core's coefficients; U and Vh are constants."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, U: Tensor, Vh: Tensor, core: Core, *coefficients: Tensor) -> Tensor:
        z = F.linear(x, Vh)  # (N, R)
        ctx.core = core
        ctx.save_for_backward(z, U, Vh, *coefficients)
        mixed = core.mix(z.to(_mixing_dtype(z)), *coefficients)
        return F.linear(mixed.to(z.dtype), U)  # (N, O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        z, U, Vh, *coefficients = ctx.saved_tensors
        dtype = _mixing_dtype(z)
        grad_mixed = grad_y.to(U.dtype) @ U  # (N, R)
        grad_z, grad_coefficients = ctx.core.mix_backward(z.to(dtype), grad_mixed.to(dtype), *coefficients)
        grad_x = grad_z.to(z.dtype) @ Vh if ctx.needs_input_grad[0] else None  # (N, I)
        return (grad_x, None, None, None, *grad_coefficients)


def _mixing_dtype(z: Tensor) -> torch.dtype:
    # The core works in float32 even when the model runs in 16 bits: its coefficients are near 1 and differ in the last
    # digits.
    return torch.promote_types(z.dtype, torch.float32)


class SpectralLinear(nn.Module):
    """W' = W + U (K - diag(S)) Vh in place of a frozen linear layer W.

    Args:
        base_layer: the layer to adapt, weight (O, I); frozen and never changed.
        factors: singular triplets of its weight.
        core: owns the trained numbers and K.
        strategy: how to compute the output; None lets :func:`cheapest_strategy` choose.

    Raises:
        ConfigError: if ``factored`` is asked for with fewer than min(O, I) directions.
    """

    def __init__(self, base_layer: nn.Linear, factors: Factors, core: Core, strategy: Strategy | None = None) -> None:
        super().__init__()
        weight = base_layer.weight
        self.base_layer = base_layer.requires_grad_(requires_grad=False)
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.rank = factors.rank
        self.strategy = strategy or cheapest_strategy(self.out_features, self.in_features, self.rank, weight.dtype)
        if self.strategy == "factored" and self.rank < min(self.out_features, self.in_features):
            raise ConfigError(
                "adapter.strategy",
                f"factored needs every singular direction, got rank {self.rank} of {min(weight.shape)}",
                allowed="branch",
                fix="Use --rank full or adapter.strategy=branch",
            )
        # Frozen parameters and not buffers, so that sharding wrappers (FSDP2) shard them instead of replicating them.
        cast = factors.to(device=weight.device, dtype=weight.dtype)
        self.U = nn.Parameter(cast.U, requires_grad=False)
        self.Vh = nn.Parameter(cast.Vh, requires_grad=False)
        self.core = core
        if self.strategy == "factored":
            # The product of the factors stands for the weight, which then need not follow the model to its device.
            del base_layer.weight
            base_layer.weight = weight.detach()  # a plain attribute: out of .to(), parameters() and state_dict()

    @property
    def weight(self) -> Tensor:
        """The base layer's weight (O, I), as it was before adapting; model code reads its dtype and device."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias (O,), or None."""
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Output of the adapted layer, shape (..., O), for x (..., I)."""
        is_branch = self.strategy == "branch"
        coefficients = self.core.coefficients(delta=is_branch)
        rows, U, Vh = x.reshape(-1, x.shape[-1]), self.U, self.Vh
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else U.dtype
        factors = (rows.to(dtype), U.to(dtype), Vh.to(dtype))
        with torch.autocast(x.device.type, enabled=False):
            product: Tensor = _SpectralProduct.apply(*factors, self.core, *coefficients)  # type: ignore[no-untyped-call]
        product = product.reshape(*x.shape[:-1], self.out_features)
        beside = self.core.beside(x.to(dtype))
        if beside is not None:
            product = product + beside
        if is_branch:
            frozen: Tensor = self.base_layer(x)
            return frozen + product
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained: the core's parameters."""
        return dict(self.core.named_parameters())

    def merged(self, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The base weight with the adapter added, float64 on the CPU; see ``inject.AdaptedLayer``."""
        return {"weight": before["weight"].cpu().double() + self.delta_weight()}

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """U (K - diag(S)) Vh in float64 on the CPU, shape (O, I): what merging adds to the base weight."""
        return delta_weight(Factors(U=self.U, S=self.core.get_buffer("S"), Vh=self.Vh), self.core)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"rank={self.rank}, strategy={self.strategy}"


@torch.no_grad()
def delta_weight(factors: Factors, core: Core) -> Tensor:
    """U (K - diag(S)) Vh, and what the core adds beside it, in float64 on the CPU, shape (O, I)."""
    exact = factors.to(device=torch.device("cpu"), dtype=torch.float64)
    delta = exact.U @ core.delta_matrix() @ exact.Vh
    beside = copy.deepcopy(core).to(device="cpu", dtype=torch.float64).beside_weight()
    return delta if beside is None else delta + beside


def cheapest_strategy(out_features: int, in_features: int, rank: int, dtype: torch.dtype) -> Strategy:
    """The strategy with the fewer multiplications per row, in units of the frozen layer's own O * I.

    branch costs 1 + R (O + I) / (O I), factored R (O + I) / (O I). In 16 bits factored would put one more rounding of
    the whole weight into the model, so branch is taken there.
    """
    is_full = rank >= min(out_features, in_features)
    return "factored" if is_full and dtype in (torch.float32, torch.float64) else "branch"
