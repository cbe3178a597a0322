# SPDX-License-Identifier: Apache-2.0
"""Cores: the small trained matrix K (R, R) between the frozen factors, W' = W + U (K - diag(S)) Vh.

A core is one class. Its positional parameters are what the layer gives it (``S``, and ``pairs`` if it asks for them);
its keyword-only parameters are its recipe options. It turns its parameters into *coefficients* (a few small tensors,
ordinary autograd) and says how coefficients act on z = Vh x. The layer's autograd function does the rest and saves z,
never x.

Shapes: N rows, R rank, P pairs, O out_features, I in_features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mirrortune.errors import ConfigError
from mirrortune.registry import Registry

Coefficients = tuple[Tensor, ...]


class Core(nn.Module):
    """What a layer and the law tests require of a core.

    Parameters are float32 and stay so when the model is cast to 16 bits: an angle of 1e-3 has two digits in bfloat16.
    """

    side: Literal["output", "input", "both"] = "both"
    """Which singular vectors the core's effect depends on beyond their product with S: U, Vh, or both."""

    def coefficients(self, *, delta: bool) -> Coefficients:
        """Tensors by which :meth:`mix` applies K, or K - diag(S) when ``delta`` (exactly zero for an untrained
        core).
        """
        raise NotImplementedError

    def mix(self, z: Tensor, *coefficients: Tensor) -> Tensor:
        """K z for every row of ``z`` (N, R), by the given coefficients; shape (N, R)."""
        raise NotImplementedError

    def mix_backward(self, z: Tensor, grad: Tensor, *coefficients: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Gradients of ``(grad * mix(z, *coefficients)).sum()`` for z and each coefficient.

        This default recomputes ``mix`` under autograd, so a new core need not write a backward pass.
        """
        with torch.enable_grad():
            inputs = [z.detach().requires_grad_()]
            inputs += [c.detach().requires_grad_(c.is_floating_point()) for c in coefficients]
            mixed = self.mix(*inputs)
            wanted = [t for t in inputs if t.requires_grad]
            found = iter(torch.autograd.grad(mixed, wanted, grad, allow_unused=True))
        grads = [next(found) if t.requires_grad else None for t in inputs]
        grad_z = grads[0] if grads[0] is not None else torch.zeros_like(z)
        return grad_z, tuple(grads[1:])

    @torch.no_grad()
    def delta_matrix(self) -> Tensor:
        """K - diag(S) in float64, shape (R, R), on the CPU."""
        exact = copy.deepcopy(self).to(device="cpu", dtype=torch.float64)
        rank = exact.get_buffer("S").shape[0]
        return exact.mix(torch.eye(rank, dtype=torch.float64), *exact.coefficients(delta=True)).T

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Core:  # noqa: FBT001, FBT002  (torch's signature)
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype in (torch.bfloat16, torch.float16):
                return tensor.to(moved.device)
            return moved

        super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        return self


CORES: Registry[Callable[..., Core]] = Registry("core")


@CORES.register("givens")
class Givens(Core):
    """Rotation by non-overlapping plane rotations, K = R(theta) diag(S) on the output side, diag(S) R(theta) on the
    input side.

    R_ii = R_jj = cos, R_ij = -sin, R_ji = sin for each pair i < j; unpaired axes stay. theta = 0 at the start. Trained
    numbers: one angle per pair, P = floor(R / 2), plus k for ``scale_top_k``, which puts S (1 + lambda) in place of S
    for the k leading directions.

    At full rank the output side satisfies W' = (U R U^T) W: every singular value and the whole input-side geometry
    (W'^T W' = W^T W) are kept, unless ``scale_top_k`` changes the singular values.

    Reference: mirror-paired rotation of the output-side singular subspace (Kim & Baik). It states neither where diag(S)
    goes nor the initial angles; R between U and diag(S) is the one place where axes are ordered by strength. The scale
    is the rescaling half of SpecLoRA (arXiv 2505.23099), composed with the rotation by us.
    """

    S: Tensor
    pairs: Tensor
    partner: Tensor
    plane: Tensor
    sign: Tensor

    def __init__(
        self,
        S: Tensor,
        pairs: Tensor,
        *,
        side: Literal["output", "input"] = "output",
        scale_top_k: int | Literal["all"] = 0,
    ) -> None:
        super().__init__()
        if side not in ("output", "input"):
            raise ConfigError("adapter.options.side", f"got {side!r}", allowed="output, input")
        self.side = side
        rank, num_pairs = S.shape[0], pairs.shape[0]
        num_scales = rank if scale_top_k == "all" else _checked_top_k(scale_top_k, rank)
        lower, upper = pairs[:, 0], pairs[:, 1]
        partner = torch.arange(rank)
        partner[lower], partner[upper] = upper, lower
        plane = torch.full((rank,), num_pairs)  # the extra plane num_pairs is the zero angle of unpaired axes
        plane[lower] = plane[upper] = torch.arange(num_pairs)
        sign = torch.zeros(rank)
        sign[lower], sign[upper] = -1.0, 1.0
        for name, buffer in (("S", S), ("pairs", pairs), ("partner", partner), ("plane", plane), ("sign", sign)):
            self.register_buffer(name, buffer.to(S.device), persistent=False)
        self.theta = trained(S, num_pairs)
        self.scale = trained(S, num_scales)

    def coefficients(self, *, delta: bool) -> Coefficients:
        """(a, b, partner) with (K z)_i = a_i z_i + b_i z_partner(i); a - S in place of a when ``delta``."""
        angle = torch.cat([self.theta, self.theta.new_zeros(1)])[self.plane] * self.sign
        scaled = self.S
        if self.scale.numel():
            padding = self.scale.new_zeros(self.S.shape[0] - self.scale.shape[0])
            scaled = self.S * (1 + torch.cat([self.scale, padding]))
        # cos - 1 = -2 sin^2(angle / 2) without cancellation, so small angles keep all their digits.
        turned = -2 * torch.sin(angle / 2).square() * scaled
        own = turned + (scaled - self.S) if delta else torch.cos(angle) * scaled
        other = scaled[self.partner] if self.side == "output" else scaled
        return own, torch.sin(angle) * other, self.partner

    def mix(self, z: Tensor, *coefficients: Tensor) -> Tensor:
        """See :class:`Core`."""
        own, cross, partner = coefficients
        return own * z + cross * z.index_select(-1, partner)

    def mix_backward(self, z: Tensor, grad: Tensor, *coefficients: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """See :class:`Core`; uses that ``partner`` is its own inverse."""
        own, cross, partner = coefficients
        grad_z = own * grad + (cross * grad).index_select(-1, partner)
        # Not einsum: it makes R products of length N out of these column sums and takes a third of a CPU step for it.
        grad_own = (grad * z).sum(dim=0)
        grad_cross = (grad * z.index_select(-1, partner)).sum(dim=0)
        return grad_z, (grad_own, grad_cross, None)


def trained(S: Tensor, count: int) -> nn.Parameter:
    """``count`` trained zeros of the dtype and device of ``S``; none of them wants a gradient if there are none.

    (DistributedDataParallel waits for the gradient of every parameter that wants one, even an empty one.)
    """
    return nn.Parameter(S.new_zeros(count), requires_grad=count > 0)


def _checked_top_k(top_k: Any, rank: int) -> int:
    if not isinstance(top_k, int) or isinstance(top_k, bool) or not 0 <= top_k <= rank:
        raise ConfigError("adapter.options.scale_top_k", f"got {top_k!r}", allowed=f"0 to {rank}, or all")
    return top_k
