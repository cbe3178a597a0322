# SPDX-License-Identifier: Apache-2.0
"""Autograd functions for U mix(Vh x), alone (with a bias) or added to the frozen layer's output.

Both save z = Vh x (N, R) for the backward pass, not x (N, I): the factors are frozen, so the core's gradient needs only
z and U^T dy. Shapes: N rows, O out_features, I in_features, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (the field's name for it)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mirrortune.adapters.core import Coefficients, Core
from mirrortune.adapters.kinds import CallableKind


def spectral_product(
    x: Tensor,
    U: Tensor,
    Vh: Tensor,
    kind: CallableKind,
    base: nn.Module,
    core: Core,
    coefficients: Coefficients,
    bias: Tensor | None = None,
) -> Tensor:
    """Return U mix(Vh x) + bias, shape (..., O), for any kind of layer."""
    if torch.compiler.is_compiling():
        # A compiler decides by itself what to save, and cannot look into a custom backward pass.
        z = kind.project(base, x, Vh)
        mixed = core.mix(z.reshape(-1, z.shape[-1]).to(_mixing_dtype(z)), *matched(coefficients, z.dtype))
        return F.linear(mixed.to(z.dtype), U, bias).reshape(*z.shape[:-1], -1)
    product: Tensor = _SpectralProduct.apply(x, U, Vh, bias, kind, base, core, *coefficients)  # type: ignore[no-untyped-call]
    return product


def added_product(x: Tensor, base: nn.Module, U: Tensor, Vh: Tensor, core: Core, coefficients: Coefficients) -> Tensor:
    """Return W x + b + U mix(Vh x), shape (..., O), for a frozen ``nn.Linear``.

    The second product accumulates into the first, forward and backward: adding two separate results would pass over
    (N, O) and (N, I) numbers once more, which at low rank is much of what the adapter costs.
    """
    added: Tensor = _AddedProduct.apply(x, base.weight, base.bias, U, Vh, core, *coefficients)  # type: ignore[no-untyped-call]
    return added


class _SpectralProduct(torch.autograd.Function):
    """x -> U mix(Vh x), with gradients for x, a bias and the core's coefficients; U and Vh are constants."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, U: Tensor, Vh: Tensor, bias: Tensor | None, kind: CallableKind, base: nn.Module,
        core: Core, *coefficients: Tensor,
    ) -> Tensor:  # fmt: skip
        projected = kind.project(base, x, Vh)  # (..., R)
        z = projected.reshape(-1, projected.shape[-1])  # (N, R)
        ctx.kind, ctx.base, ctx.core, ctx.shapes = kind, base, core, (x.shape, projected.shape)
        ctx.save_for_backward(z, U, Vh, *coefficients)
        mixed = core.mix(z.to(_mixing_dtype(z)), *matched(coefficients, z.dtype))
        # Reshaped before the product: model code may change the output in place, which autograd allows for no view.
        return F.linear(mixed.to(z.dtype).reshape(projected.shape), U, bias)  # (..., O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        z, U, Vh, *coefficients = ctx.saved_tensors
        shape, projected = ctx.shapes
        grad_z, grad_coefficients = _mixed_backward(grad_y.reshape(-1, U.shape[0]), z, U, ctx.core, coefficients)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.kind.project_backward(ctx.base, grad_z.reshape(projected), Vh, shape)
        grad_bias = grad_y.reshape(-1, U.shape[0]).sum(dim=0) if ctx.needs_input_grad[3] else None
        return (grad_x, None, None, grad_bias, None, None, None, *grad_coefficients)


class _AddedProduct(torch.autograd.Function):
    """x -> W x + b + U mix(Vh x), with gradients for x and the core's coefficients; all else is constant."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, U: Tensor, Vh: Tensor, core: Core,
        *coefficients: Tensor,
    ) -> Tensor:  # fmt: skip
        y = F.linear(x, weight, bias)  # (..., O)
        z = F.linear(x, Vh).reshape(-1, Vh.shape[0])  # (N, R)
        mixed = core.mix(z.to(_mixing_dtype(z)), *matched(coefficients, z.dtype))
        y.view(-1, U.shape[0]).addmm_(mixed.to(z.dtype), U.T)
        ctx.core, ctx.shape = core, x.shape
        ctx.save_for_backward(z, weight, U, Vh, *coefficients)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, U, Vh, *coefficients = ctx.saved_tensors
        rows = grad_y.reshape(-1, U.shape[0])
        grad_z, grad_coefficients = _mixed_backward(rows, z, U, ctx.core, coefficients)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (rows.to(weight.dtype) @ weight).addmm_(grad_z, Vh).reshape(ctx.shape)
        return (grad_x, None, None, None, None, None, *grad_coefficients)


def _mixed_backward(
    rows: Tensor, z: Tensor, U: Tensor, core: Core, coefficients: list[Tensor]
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Compute the gradients of z (N, R), in its dtype, and of the coefficients from that of the output (N, O)."""
    dtype = _mixing_dtype(z)
    grad_mixed = rows.to(U.dtype) @ U  # (N, R)
    grad_z, grad_coefficients = core.mix_backward(z.to(dtype), grad_mixed.to(dtype), *matched(coefficients, z.dtype))
    return grad_z.to(z.dtype), grad_coefficients


def matched(coefficients: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """Return a core's coefficients as a layer of ``dtype`` needs them: widened for a float64 one, else as they are."""
    if dtype != torch.float64:
        return coefficients
    return [c.to(dtype) if c.is_floating_point() else c for c in coefficients]


def _mixing_dtype(z: Tensor) -> torch.dtype:
    # The core works in float32 even when the model runs in 16 bits: its coefficients are near 1 and differ in the last
    # digits.
    return torch.promote_types(z.dtype, torch.float32)
