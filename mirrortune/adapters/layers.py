# SPDX-License-Identifier: Apache-2.0
"""Adapted layers: a core in the singular basis of a frozen weight, W' = W + U (K - diag(S)) Vh.

Shapes: O out_features, I in_features, R rank, E stacked matrices (an optional leading dimension), N rows of
activations. The autograd functions save z = Vh x (N, R) for the backward pass instead of x (N, I): the factors are
frozen, so the gradient of the core needs only z and U^T dy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812  (its usual name)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize

from mirrortune.adapters.core import Coefficients, Core
from mirrortune.adapters.kinds import CallableKind, Linear, no_view
from mirrortune.adapters.layout import Layout, LazyTensor
from mirrortune.adapters.strategies import cheapest_strategy
from mirrortune.adapters.svd import Factors
from mirrortune.errors import ConfigError


class Spectral(nn.Module):
    """The frozen factors of a base weight, with a trained core between them.

    Args:
        factors: singular triplets, with a leading dimension E for a stack.
        core: computes K from its trained parameters; a ``CoreStack`` for a stack.
        layout: how the tensor of the base model holds matrices.
        like: a tensor with the device and dtype to store the factors in.
    """

    def __init__(self, factors: Factors, core: Core, layout: Layout, like: Tensor) -> None:
        super().__init__()
        self.layout = layout
        self.rank = factors.rank
        self.out_features, self.in_features = layout.matrix_shape
        # Frozen parameters instead of buffers, so that sharding wrappers (FSDP2) shard rather than replicate them.
        cast = factors.to(device=like.device, dtype=like.dtype)
        self.U = nn.Parameter(cast.U, requires_grad=False)
        self.Vh = nn.Parameter(cast.Vh, requires_grad=False)
        self.core = core

    @property
    def factors(self) -> Factors:
        """U, S and Vh in the dtype and on the device of the layer."""
        return Factors(U=self.U, S=self.core.get_buffer("S"), Vh=self.Vh)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters, those of the core."""
        return dict(self.core.named_parameters())

    def merged(self, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the base weight with the adapter added, float64 on the CPU; see ``inject.AdaptedLayer``."""
        return {"weight": before["weight"].cpu().double() + self.layout.tensor(self.delta_weight())}

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Compute U (K - diag(S)) Vh, which merging adds to the weight, (O, I) or (E, O, I), in float64 on the CPU."""
        return delta_weight(self.factors, self.core)

    def adapt(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Compute W' in the layout of the base's ``weight``, in float32 or better, and round once to ``dtype``;
        differentiable with respect to the core's parameters.
        """
        with torch.autocast(self.U.device.type, enabled=False):
            delta = dense_delta(self.factors, self.core)
            adapted: Tensor = (weight.to(delta) + self.layout.tensor(delta)).to(dtype)
        return adapted


def dense_delta(factors: Factors, core: Core) -> Tensor:
    """Compute U (K - diag(S)) Vh plus the core's additional terms, (O, I) or (E, O, I), in float32 or better;
    differentiable with respect to the core's parameters.
    """
    dtype = torch.promote_types(factors.U.dtype, torch.float32)
    coefficients = matched(core.coefficients(delta=True), dtype)
    mixed = core.mix(factors.Vh.to(dtype).mT, *coefficients)  # (I, R): column i of K' Vh in row i
    delta = factors.U.to(dtype) @ mixed.mT
    beside = core.beside_weight()
    return delta if beside is None else delta + beside


@torch.no_grad()
def delta_weight(factors: Factors, core: Core) -> Tensor:
    """Compute U (K - diag(S)) Vh plus the core's additional terms, (O, I) or (E, O, I), in float64 on the CPU."""
    exact = factors.to(device=torch.device("cpu"), dtype=torch.float64)
    return dense_delta(exact, core.in_float64())


_LINEAR = Linear()
Side = Literal["output", "input"]
_EXACT = (torch.float32, torch.float64)
# Largest ratio of singular values for which a core may act on one side of the weight: at most five bits are lost.
_LARGEST_RATIO = 32


class SpectralLinear(Spectral):
    """Apply W' = W + U (K - diag(S)) Vh in place of a frozen layer that applies W.

    Args:
        base_layer: layer to adapt, whose weight ``kind`` reads as a matrix (O, I). It is frozen and never changed.
        factors: singular triplets of that matrix. For a quantised layer, their device and dtype are used to compute.
        core: computes K from its trained parameters.
        strategy: how to compute the output; None for the cheapest strategy for the layer's shape.
        kind: kind of the layer, with ``kind.is_callable(base_layer)``; a linear layer by default.

    Raises:
        ConfigError: the strategy is ``factored``, but there are fewer than min(O, I) directions.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        factors: Factors,
        core: Core,
        strategy: Literal["branch", "factored"] | None = None,
        kind: CallableKind = _LINEAR,
    ) -> None:
        weight = factors.U if kind.is_quantised else base_layer.get_parameter("weight")
        super().__init__(factors, core, kind.layouts(base_layer)["weight"], weight)
        self.base_layer = base_layer.requires_grad_(requires_grad=False)
        self.kind = kind
        # The result is never dense, because the number of rows is not given.
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
        self.cheaper_side = self._find_cheaper_side(weight) if self.strategy == "branch" else None
        self._held: dict[Any, tuple[Side | None, Coefficients]] | None = None
        if self.strategy == "factored":
            # The factors replace the weight, so the weight need not move to the device of the model.
            del base_layer.weight
            base_layer.weight = weight.detach()  # a plain attribute: ignored by .to(), parameters() and state_dict()

    @property
    def weight(self) -> Tensor:
        """W' in the layout of the base layer, for code that reads the weight of a layer instead of calling the layer.

        Reading only its shape, dtype or device costs nothing; W' is computed when its values are used.
        """
        if torch.compiler.is_compiling():
            return self.adapted_weight()
        return LazyTensor.of(self.layout.shape, self.U.detach(), self.adapted_weight)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the base layer, (O,), or None."""
        bias: Tensor | None = getattr(self.base_layer, "bias", None)
        return bias

    def __getattr__(self, name: str) -> Any:
        """Delegate attributes that model code may read (``stride``, ``embedding_dim``, ...) to the base layer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the adapted layer: (..., O) for x (..., I) if the base layer is linear."""
        is_branch = self.strategy == "branch"
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else self.U.dtype
        given = x.to(dtype) if x.is_floating_point() else x
        U, Vh, base = self.U.to(dtype), self.Vh.to(dtype), self.base_layer
        is_fused = is_branch and self._adds_in_place(dtype)
        side = self.cheaper_side if is_fused and dtype in _EXACT else None
        if side == "input" and torch.is_grad_enabled() and not x.requires_grad:
            side = None  # acting on one side would need the gradient of the input to compute that of the core
        with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():
            side, coefficients = self._coefficients(side)
            if side:
                product = one_sided_product(given, base, U if side == "output" else Vh, side, self.core, coefficients)
            elif is_fused:
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

    def _coefficients(self, side: Side | None) -> tuple[Side | None, Coefficients]:
        """Return the side on which the core acts alone, None if on both, and its coefficients there."""
        # First, so that a compiled model is not compiled again when values are held.
        if not torch.compiler.is_compiling() and self._held is not None and not torch.is_grad_enabled():
            key = (side, self.U.device)
            if key not in self._held:
                self._held[key] = self._computed(side)
            return self._held[key]
        return self._computed(side)

    def _computed(self, side: Side | None) -> tuple[Side | None, Coefficients]:
        relative = self.core.relative_coefficients(side) if side else None
        return (side, relative) if relative else (None, self.core.coefficients(delta=self.strategy == "branch"))

    def keep(self, *, kept: bool) -> None:
        """If ``kept``, hold the coefficients over many calls, between which nothing is trained; else drop them."""
        self._held = {} if kept else None

    @torch.no_grad()
    def _find_cheaper_side(self, weight: Tensor) -> Side | None:
        """Return the side with fewer features if acting on that side alone is exact up to rounding error, else None.

        This requires exact factors of this weight and singular values of similar size; otherwise the rounding errors of
        strong directions would be amplified relative to weak ones.
        """
        S = self.core.get_buffer("S")
        is_plain = type(self.kind) is Linear and weight.dtype in _EXACT and weight.shape == self.layout.matrix_shape
        if not is_plain or weight.is_meta or S.is_meta or self.out_features == self.in_features:
            return None
        side: Side = "output" if self.out_features < self.in_features else "input"
        if S.min() * _LARGEST_RATIO <= S.max() or self.core.relative_coefficients(side) is None:
            return None
        probes = torch.randn(self.rank, 8, generator=torch.Generator().manual_seed(0)).to(weight)
        scaled = S.to(weight)[:, None] * probes
        if side == "output":
            difference = weight.mT @ (self.U @ probes) - self.Vh.mT @ scaled
        else:
            difference = weight @ (self.Vh.mT @ probes) - self.U @ scaled
        allowed = 64 * torch.finfo(weight.dtype).eps * float(S.max()) * float(probes.norm())
        return side if float(difference.norm()) <= allowed else None

    def _adds_in_place(self, dtype: torch.dtype) -> bool:
        """Return whether the base layer computes y = W x + b in ``dtype``, so that y can be added to in place."""
        base = self.base_layer
        if type(self.kind) is not Linear or not self.kind.is_callable(base) or torch.compiler.is_compiling():
            return False
        hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)  # noqa: SLF001
        weight, bias = base.weight, base.bias
        is_frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)  # a caller may train its bias
        return is_frozen and not any(hooks) and weight.dtype == dtype

    def adapted_weight(self) -> Tensor:
        """Compute W', differentiably, in the layout and dtype of the base layer's weight, on the factors' device."""
        # The weight is a parameter, or a plain tensor under strategy factored.
        base: Any = self.kind.read(self.base_layer, "weight") if self.kind.is_quantised else self.base_layer.weight
        return self.adapt(base, self.U.dtype)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"rank={self.rank}, strategy={self.strategy}"


class SpectralWeight(Spectral):
    """Map W to W', as a parametrisation of ``torch.nn.utils.parametrize``.

    Args:
        weight: frozen tensor, in the layout of its module.
        layout: how the tensor holds matrices.
        factors: singular triplets, with a leading dimension E for a stack.
        core: computes K from its trained parameters; a ``CoreStack`` for a stack.
    """

    strategy = "dense"

    def __init__(self, weight: Tensor, layout: Layout, factors: Factors, core: Core) -> None:
        super().__init__(factors, core, layout, weight)
        self._held: dict[bool, Tensor] | None = None
        self._is_kept = False

    def forward(self, weight: Tensor) -> Tensor:
        """Return W' in the shape and dtype of ``weight``; for an untrained core it equals ``weight`` bit for bit."""
        if torch.compiler.is_compiling() or self._held is None:
            return self.adapt(weight, weight.dtype)
        wants_graph = torch.is_grad_enabled()
        if wants_graph not in self._held:
            self._held[wants_graph] = self.adapt(weight, weight.dtype)
        return self._held[wants_graph]

    def hold(self, *, held: bool) -> None:
        """If ``held``, compute W' once and return it for every access; else drop it, unless it is kept."""
        if not self._is_kept:
            self._held = {} if held else None

    def keep(self, *, kept: bool) -> None:
        """If ``kept``, hold W' over many calls of the model, between which nothing is trained; else drop it."""
        self._is_kept, self._held = kept, {} if kept else None

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"rank={self.rank}, strategy=dense"


def replace_weight(owners: list[tuple[nn.Module, str]], spectral: SpectralWeight) -> None:
    """Parametrise a weight by ``spectral`` in each (module, parameter name) of ``owners``."""
    for module, parameter in owners:
        # ``unsafe`` skips a check that would compute W' once more, on the device that the model was loaded to.
        parametrize.register_parametrization(module, parameter, spectral, unsafe=True)
        # A loop over experts accesses the complete stack for each of them.
        module.register_forward_pre_hook(_hold)
        module.register_forward_hook(_release, always_call=True)


def _hold(module: nn.Module, *_: object, held: bool = True) -> None:
    # They are found through the module, because state stored in the hooks would be shared with a copy of the module.
    for chain in module.get_submodule("parametrizations").children():
        for spectral in (part for part in chain.children() if isinstance(part, SpectralWeight)):
            spectral.hold(held=held)


def _release(module: nn.Module, *_: object) -> None:
    _hold(module, held=False)


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
        # A compiler decides itself what to save, and cannot trace a custom backward pass.
        z = kind.project(base, x, Vh)
        return F.linear(_mixed(z.reshape(-1, z.shape[-1]), core, coefficients), U, bias).reshape(*z.shape[:-1], -1)
    product: Tensor = _SpectralProduct.apply(x, U, Vh, bias, kind, base, core, *coefficients)  # type: ignore[no-untyped-call]
    return product


def added_product(x: Tensor, base: nn.Module, U: Tensor, Vh: Tensor, core: Core, coefficients: Coefficients) -> Tensor:
    """Return W x + b + U mix(Vh x), shape (..., O), for a frozen ``nn.Linear``.

    The second product accumulates into the first, forward and backward. Adding two separate results would read and
    write (N, O) and (N, I) values once more, which is a large part of the adapter's cost at low rank.
    """
    added: Tensor = _AddedProduct.apply(x, base.weight, base.bias, U, Vh, core, *coefficients)  # type: ignore[no-untyped-call]
    return added


def one_sided_product(
    x: Tensor, base: nn.Module, basis: Tensor, side: Side, core: Core, coefficients: Coefficients
) -> Tensor:
    """Return (1 + U M U^T) W x + b, or W (1 + V M V^T) x + b, shape (..., O), for a frozen ``nn.Linear``.

    M z is ``core.mix`` with its relative coefficients. If O and I differ, two products with the factor of the smaller
    side cost less than one product with each factor.
    """
    changed: Tensor = _OneSidedProduct.apply(x, base.weight, base.bias, basis, side, core, *coefficients)  # type: ignore[no-untyped-call]
    return changed


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
        return no_view(F.linear(_mixed(z, core, coefficients).reshape(projected.shape), U, bias))  # (..., O)

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
    """x -> W x + b + U mix(Vh x), with gradients for x and the core's coefficients; all other tensors are constants."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, U: Tensor, Vh: Tensor, core: Core,
        *coefficients: Tensor,
    ) -> Tensor:  # fmt: skip
        y = F.linear(x, weight, bias)  # (..., O)
        z = F.linear(x, Vh).reshape(-1, Vh.shape[0])  # (N, R)
        y.view(-1, U.shape[0]).addmm_(_mixed(z, core, coefficients), U.T)
        ctx.core, ctx.shape = core, x.shape
        ctx.save_for_backward(z, weight, U, Vh, *coefficients)
        return no_view(y)

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


class _OneSidedProduct(torch.autograd.Function):
    """x -> (1 + U M U^T) W x + b or W (1 + V M V^T) x + b, with gradients for x and the core's coefficients.

    ``basis`` is U (O, R) for the output side, Vh (R, I) for the input side.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, basis: Tensor, side: str, core: Core,
        *coefficients: Tensor,
    ) -> Tensor:  # fmt: skip
        if side == "output":
            y = F.linear(x, weight, bias)  # (..., O)
            rows = y.view(-1, y.shape[-1])
            z = rows @ basis if bias is None else torch.addmm(bias @ basis, rows, basis, beta=-1)  # of W x alone
            rows.addmm_(_mixed(z, core, coefficients), basis.T)
        else:
            rows = x.reshape(-1, x.shape[-1])
            z = rows @ basis.T
            changed = torch.addmm(rows, _mixed(z, core, coefficients), basis)
            y = F.linear(changed.reshape(x.shape), weight, bias)
        ctx.core, ctx.side, ctx.shape = core, side, x.shape
        ctx.save_for_backward(z, weight, basis, *coefficients)
        return no_view(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, basis, *coefficients = ctx.saved_tensors
        rows = grad_y.reshape(-1, weight.shape[0]).to(weight.dtype)
        grad_x = None
        if ctx.side == "output":
            grad_z, grad_coefficients = _mixed_backward(rows, z, basis, ctx.core, coefficients)
            if ctx.needs_input_grad[0]:
                grad_x = (torch.addmm(rows, grad_z, basis.T) @ weight).reshape(ctx.shape)
        else:
            entering = rows @ weight  # (N, I)
            grad_z, grad_coefficients = _mixed_backward(entering, z, basis.T, ctx.core, coefficients)
            if ctx.needs_input_grad[0]:
                grad_x = entering.addmm_(grad_z, basis).reshape(ctx.shape)
        return (grad_x, None, None, None, None, None, *grad_coefficients)


def _mixed(z: Tensor, core: Core, coefficients: Sequence[Tensor]) -> Tensor:
    """Return ``core.mix`` of z (N, R), in the dtype of z."""
    return core.mix(z.to(_mixing_dtype(z)), *matched(coefficients, z.dtype)).to(z.dtype)


def _mixed_backward(
    rows: Tensor, z: Tensor, U: Tensor, core: Core, coefficients: list[Tensor]
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Compute the gradients of z (N, R), in its dtype, and of the coefficients from the output's gradient (N, O)."""
    dtype = _mixing_dtype(z)
    grad_mixed = rows.to(U.dtype) @ U  # (N, R)
    grad_z, grad_coefficients = core.mix_backward(z.to(dtype), grad_mixed.to(dtype), *matched(coefficients, z.dtype))
    return grad_z.to(z.dtype), grad_coefficients


def matched(coefficients: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """Return the coefficients of a core for a layer of ``dtype``: converted to float64 for float64, else unchanged."""
    if dtype != torch.float64:
        return coefficients
    return [c.to(dtype) if c.is_floating_point() else c for c in coefficients]


def _mixing_dtype(z: Tensor) -> torch.dtype:
    # The core computes in float32 even if the model runs in 16 bits, because its coefficients are close to 1 and differ
    # from it only in the last digits.
    return torch.promote_types(z.dtype, torch.float32)
