# SPDX-License-Identifier: Apache-2.0
"""What a core in the singular basis of a weight adds to it: U (K - diag(S)) Vh, and what it has beside the basis.

Shapes: O out_features, I in_features, R rank, E stacked matrices (a leading dimension of all, where there are several).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mirrortune.adapters.cores import Core
from mirrortune.adapters.layout import Layout
from mirrortune.adapters.svd import Factors


class Spectral(nn.Module):
    """The frozen factors of a base weight with a trained core between them.

    Args:
        factors: singular triplets; of a stack, with a leading dimension E.
        core: owns the trained numbers and K; a ``CoreStack`` for a stack.
        layout: how the base's tensor stands for matrices.
        like: a tensor of the device and dtype to hold the factors in.
    """

    def __init__(self, factors: Factors, core: Core, layout: Layout, like: Tensor) -> None:
        super().__init__()
        self.layout = layout
        self.rank = factors.rank
        self.out_features, self.in_features = layout.matrix_shape
        # Frozen parameters and not buffers, so that sharding wrappers (FSDP2) shard them instead of replicating them.
        cast = factors.to(device=like.device, dtype=like.dtype)
        self.U = nn.Parameter(cast.U, requires_grad=False)
        self.Vh = nn.Parameter(cast.Vh, requires_grad=False)
        self.core = core

    @property
    def factors(self) -> Factors:
        """U, S and Vh as they are held."""
        return Factors(U=self.U, S=self.core.get_buffer("S"), Vh=self.Vh)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained: the core's parameters."""
        return dict(self.core.named_parameters())

    def merged(self, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The base weight with the adapter added, float64 on the CPU; see ``inject.AdaptedLayer``."""
        return {"weight": before["weight"].cpu().double() + self.layout.tensor(self.delta_weight())}

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """U (K - diag(S)) Vh in float64 on the CPU, (O, I) or (E, O, I): what merging adds to the base matrices."""
        return delta_weight(self.factors, self.core)

    def adapt(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """W' in the layout of the base's ``weight``, made in float32 or better and rounded once to ``dtype``;
        differentiable for the core's numbers.
        """
        with torch.autocast(self.U.device.type, enabled=False):
            delta = dense_delta(self.factors, self.core)
            adapted: Tensor = (weight.to(delta) + self.layout.tensor(delta)).to(dtype)
        return adapted


def dense_delta(factors: Factors, core: Core) -> Tensor:
    """U (K - diag(S)) Vh and what the core adds beside it, (O, I) or (E, O, I), in float32 or better; differentiable
    for the core's numbers.
    """
    dtype = torch.promote_types(factors.U.dtype, torch.float32)
    mixed = core.mix(factors.Vh.to(dtype).mT, *core.coefficients(delta=True))  # (I, R): column i of K' Vh in row i
    delta = factors.U.to(dtype) @ mixed.mT
    beside = core.beside_weight()
    return delta if beside is None else delta + beside


@torch.no_grad()
def delta_weight(factors: Factors, core: Core) -> Tensor:
    """U (K - diag(S)) Vh, and what the core adds beside it, in float64 on the CPU, (O, I) or (E, O, I)."""
    exact = factors.to(device=torch.device("cpu"), dtype=torch.float64)
    return dense_delta(exact, core.in_float64())
