# SPDX-License-Identifier: Apache-2.0
"""LoRA-XS: a free r x r matrix between the leading singular vectors."""

from __future__ import annotations

from torch import Tensor, nn

from mirrortune.adapters.core import CORES, Coefficients, MatrixCore


@CORES.register("lora-xs")
class LoraXs(MatrixCore):
    """K = diag(S) (I + M), M (r, r) free, r^2 trainable parameters, initially zero.

    Reference: LoRA-XS (arXiv 2405.17604), W + U_r diag(S_r) M Vh_r. Differs: M starts at zero instead of small noise.
    """

    S: Tensor
    side = "input"
    default_lr = 1e-2
    default_rank = 16

    def __init__(self, S: Tensor) -> None:
        super().__init__()
        self.register_buffer("S", S, persistent=False)
        self.matrix = nn.Parameter(S.new_zeros(S.shape[0], S.shape[0]))

    def coefficients(self, *, delta: bool) -> Coefficients:
        """Return (K,) or (K - diag(S),), shape (R, R)."""
        change = self.S[:, None] * self.matrix
        return (change if delta else change + self.S.diag(),)
