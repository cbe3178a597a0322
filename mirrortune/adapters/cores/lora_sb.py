# SPDX-License-Identifier: Apache-2.0
"""LoRA-SB: a free r x r matrix between the singular vectors of full fine-tuning's first step."""

from __future__ import annotations

import math

from torch import Tensor, nn
from typing_extensions import override

from mirrortune.adapters.core import CORES, Coefficients, MatrixCore
from mirrortune.errors import ConfigError


@CORES.register("lora-sb")
class LoraSb(MatrixCore):
    """K = diag(S) + M, M (r, r) free, between singular vectors of a gradient; r^2 trainable parameters.

    U, S and Vh are the leading singular triplets of -sign(G), the direction of Adam's first step in full fine-tuning,
    where G is the gradient of the loss with respect to the weight, measured on training rows. W' = W + U M Vh does not
    depend on the singular values and vectors of W. Training starts at M = ``first_step`` diag(S), for which W' - W is
    the best rank-r approximation of that step at the learning rate ``first_step``; 0 starts at the base model.

    Reference: LoRA-SB (arXiv 2411.19557), with s = 1: for orthonormal U and Vh, the gradient of M is the projection of
    the gradient of the weight, without a scale. Differs: gradients are measured without dropout and after a warm-up of
    the head (``adapter.calibration_warmup_steps=0`` turns this off); ``first_step`` is a setting, where the paper's
    code uses the learning rate of the first step of the warm-up, ``train.lr`` divided by its number of steps.
    """

    S: Tensor
    basis = "gradient"
    default_lr = 1e-2
    default_rank = 20

    def __init__(self, S: Tensor, *, first_step: float = 5e-5) -> None:
        super().__init__()
        if isinstance(first_step, bool) or not isinstance(first_step, int | float) or not 0 <= first_step < math.inf:
            raise ConfigError("adapter.options.first_step", f"got {first_step!r}", allowed="0 or more")
        self.first_step = first_step
        self.register_buffer("S", S, persistent=False)
        self.matrix = nn.Parameter(S.new_zeros(S.shape[0], S.shape[0]))

    @override
    def start(self) -> dict[str, Tensor]:
        return {"matrix": self.first_step * self.S.diag()}

    def coefficients(self, *, delta: bool) -> Coefficients:
        """Return (K,) or (K - diag(S),), shape (R, R)."""
        return (self.matrix if delta else self.matrix + self.S.diag(),)
