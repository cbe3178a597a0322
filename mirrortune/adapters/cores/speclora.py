# SPDX-License-Identifier: Apache-2.0
"""SpecLoRA: rescaling of the leading singular values, with a LoRA branch beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from mirrortune.adapters.core import CORES
from mirrortune.adapters.cores.scale import Scale
from mirrortune.errors import ConfigError


@CORES.register("speclora")
class SpecLora(Scale):
    """Scale on the ``top_k`` leading directions, plus a LoRA branch (alpha / rank) B A beside it.

    W' = U diag(S (1 + lambda)) Vh + (alpha / rank) B A, A (rank, I), B (O, rank); k + rank (O + I) parameters.
    Initially lambda = 0 and B = 0, and A is uniform as in LoRA, drawn for each layer from the run's seed, the layer's
    name and ``init_seed``. The method's rank is that of the branch, ``lora_rank``; ``lora_alpha`` equals it by default,
    a scale of 1.

    Reference: SpecLoRA (arXiv 2505.23099), of which only the abstract is public: LoRA with learnable rescaling of the
    top singular directions. As far as the abstract tells, one thing differs: true singular directions are used instead
    of a mask on W.
    """

    default_lr = 3e-3
    rank_option = "lora_rank"

    def __init__(
        self,
        S: Tensor,
        shape: tuple[int, int],
        generator: torch.Generator,
        *,
        top_k: int | Literal["all"] = 16,
        lora_rank: int = 8,
        lora_alpha: float | None = None,
        init_seed: int = 0,
    ) -> None:
        super().__init__(S, top_k=top_k if top_k == "all" else min(top_k, S.shape[0]))
        if not isinstance(lora_rank, int) or lora_rank < 1:
            raise ConfigError("adapter.options.lora_rank", f"got {lora_rank!r}", allowed="1 or more")
        if not 0 <= init_seed < 2**32:
            raise ConfigError("adapter.options.init_seed", f"got {init_seed!r}", allowed="0 to 4294967295")
        out_features, in_features = shape
        generator.manual_seed(generator.initial_seed() ^ init_seed)
        bound = 1 / math.sqrt(in_features)
        start = torch.rand(lora_rank, in_features, generator=generator, dtype=S.dtype) * 2 * bound - bound
        self.factor = 1.0 if lora_alpha is None else lora_alpha / lora_rank
        self.lora_A = nn.Parameter(start.to(S.device))
        self.lora_B = nn.Parameter(S.new_zeros(out_features, lora_rank))

    def beside(self, project: Callable[[Tensor], Tensor]) -> Tensor:
        """Return (alpha / rank) B A x for every row, shape (..., O)."""
        down = project(self.lora_A)
        return self.factor * F.linear(down, self.lora_B.to(down.dtype))

    def beside_weight(self) -> Tensor:
        """Return (alpha / rank) B A, shape (O, I)."""
        return self.factor * self.lora_B @ self.lora_A
