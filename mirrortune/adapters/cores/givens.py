# SPDX-License-Identifier: Apache-2.0
"""Plane rotations of paired singular directions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mirrortune.adapters.core import CORES, Coefficients, Core, checked_top_k, leading, trained
from mirrortune.errors import ConfigError


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
    default_pairing = "mirror"

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
        num_scales = checked_top_k(scale_top_k, rank, "adapter.options.scale_top_k")
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
            scaled = self.S * (1 + leading(self.scale, self.S.shape[0]))
        # cos - 1 = -2 sin^2(angle / 2) without cancellation, so small angles keep all their digits.
        turned = -2 * torch.sin(angle / 2).square() * scaled
        own = turned + (scaled - self.S) if delta else torch.cos(angle) * scaled
        other = scaled[self.partner] if self.side == "output" else scaled
        return own, torch.sin(angle) * other, self.partner

    def angles(self) -> Tensor:
        """See :class:`Core`."""
        return self.theta

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
