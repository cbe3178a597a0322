# SPDX-License-Identifier: Apache-2.0
"""Rescaling of the leading singular values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from typing_extensions import override

from mirrortune.adapters.core import CORES, Coefficients, Core, checked_top_k, trained, zero_padded


@CORES.register("scale")
class Scale(Core):
    """K = diag(S (1 + lambda)), lambda on the ``top_k`` leading directions; k trainable parameters, initially zero.

    Reference: the rescaling half of SpecLoRA (arXiv 2505.23099), alone; with ``top_k: all`` the diagonal family of
    SVFit (arXiv 2409.05926) and SVDiff (arXiv 2303.11305), in relative steps instead of absolute ones and without the
    ReLU.
    """

    S: Tensor

    def __init__(self, S: Tensor, *, top_k: int | Literal["all"] = "all") -> None:
        super().__init__()
        count = checked_top_k(top_k, S.shape[0], "adapter.options.top_k")
        self.register_buffer("S", S, persistent=False)
        self.scale = trained(S, count)

    def coefficients(self, *, delta: bool) -> Coefficients:
        """Return (a,) with K = diag(a), or K - diag(S) = diag(a)."""
        change = self.S * zero_padded(self.scale, self.S.shape[0])
        return (change if delta else self.S + change,)

    @override
    def mix(self, z: Tensor, *coefficients: Tensor) -> Tensor:
        return z * coefficients[0]

    @override
    def mix_rows(self, z: Tensor, dims: Sequence[int | None], *coefficients: Tensor) -> Tensor:
        return z * (coefficients[0] if dims[0] is None else coefficients[0][:, None])

    @override
    def mix_backward(self, z: Tensor, grad: Tensor, *coefficients: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        return grad * coefficients[0], ((grad * z).sum(dim=0),)
