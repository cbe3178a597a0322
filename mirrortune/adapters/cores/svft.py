# SPDX-License-Identifier: Apache-2.0
"""SVFT: a sparse trained matrix between the frozen singular vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from mirrortune.adapters.core import CORES, Coefficients, Core
from mirrortune.errors import ConfigError


@CORES.register("svft")
class Svft(Core):
    """K = diag(S) + M, M zero outside a fixed pattern.

    The pattern ``plain`` is the diagonal, R numbers. ``banded`` adds ``bands`` = d off-diagonals on each side, in total
    R(2d+1) - d(d+1) numbers. ``random`` has as many: the diagonal and positions drawn with ``pattern_seed``,
    which is the seed of the run unless given. The file of an adapter holds this seed, and not the positions, which are
    the same for every layer of one rank.

    Reference: SVFT (arXiv 2405.19597, NeurIPS 2024). Differs: M is zero initially, so the model starts as the base;
    the paper's code draws M at random through a gate, and draws all random positions, those of the diagonal too, with
    replacement from the global generator.
    """

    S: Tensor
    rows: Tensor
    columns: Tensor
    default_lr = 3e-2
    image_lr = 1e-2

    def __init__(
        self,
        S: Tensor,
        *,
        pattern: Literal["plain", "banded", "random"] = "plain",
        bands: int = 2,
        pattern_seed: int = 0,
    ) -> None:
        super().__init__()
        rank = S.shape[0]
        if pattern not in ("plain", "banded", "random"):
            raise ConfigError("adapter.options.pattern", f"got {pattern!r}", allowed="plain, banded, random")
        if not isinstance(bands, int) or bands < 0:
            raise ConfigError("adapter.options.bands", f"got {bands!r}", allowed="0 or more")
        if not 0 <= pattern_seed < 2**32:
            raise ConfigError("adapter.options.pattern_seed", f"got {pattern_seed!r}", allowed="0 to 4294967295")
        self.is_plain = pattern == "plain"
        rows, columns = _positions(rank, pattern, min(bands, rank - 1), pattern_seed)
        self.register_buffer("S", S, persistent=False)
        self.register_buffer("rows", rows.to(S.device), persistent=False)
        self.register_buffer("columns", columns.to(S.device), persistent=False)
        self.values = nn.Parameter(S.new_zeros(len(rows)))

    @override
    @classmethod
    def seeded(cls, options: Mapping[str, Any], seed: int) -> dict[str, Any]:
        drawn = {"pattern_seed": seed % 2**32} if options.get("pattern") == "random" else {}
        return {**drawn, **options}

    def coefficients(self, *, delta: bool) -> Coefficients:
        """Return the diagonal (R,) for ``plain``, otherwise the matrix K or K - diag(S), (R, R)."""
        if self.is_plain:
            return (self.values if delta else self.S + self.values,)
        rank = self.S.shape[0]
        matrix = self.S.new_zeros(rank, rank).index_put((self.rows, self.columns), self.values)
        return (matrix if delta else matrix + torch.diag(self.S),)

    @override
    def mix(self, z: Tensor, *coefficients: Tensor) -> Tensor:
        return z * coefficients[0] if self.is_plain else z @ coefficients[0].T

    @override
    def mix_rows(self, z: Tensor, dims: Sequence[int | None], *coefficients: Tensor) -> Tensor:
        own = coefficients[0]
        if not self.is_plain:
            return z @ own.mT
        return z * (own if dims[0] is None else own[:, None])


def _positions(rank: int, pattern: str, bands: int, seed: int) -> tuple[Tensor, Tensor]:
    diagonal = torch.arange(rank)
    if pattern == "plain":
        return diagonal, diagonal
    row, column = torch.meshgrid(diagonal, diagonal, indexing="ij")
    if pattern == "banded":
        found = ((row - column).abs() <= bands).nonzero()
    else:
        count = rank * (2 * bands + 1) - bands * (bands + 1) - rank
        off = (row != column).nonzero()
        # NumPy guarantees that its legacy generator never changes, so the pattern follows from the seed.
        chosen = np.random.RandomState(seed).permutation(len(off))[:count]
        found = torch.cat([torch.stack([diagonal, diagonal], dim=1), off[torch.from_numpy(np.sort(chosen))]])
    return found[:, 0].contiguous(), found[:, 1].contiguous()
