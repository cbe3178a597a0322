# SPDX-License-Identifier: Apache-2.0
"""Thin singular value decomposition of a weight, in float64 and with canonical signs.

Shapes: O out_features, I in_features, D = min(O, I), R rank (1 <= R <= D). W (O, I) = U diag(S) Vh.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mirrortune.errors import ConfigError, DataError

# Part of every cache key: raise it when the factors of a given weight change.
FACTORIZE_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """The R leading singular triplets of a weight, largest singular value first.

    Attributes:
        U: left singular vectors, shape (O, R), orthonormal columns.
        S: singular values, shape (R,), descending, >= 0.
        Vh: right singular vectors, shape (R, I), orthonormal rows.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor

    @property
    def rank(self) -> int:
        """R, the number of directions kept."""
        return self.S.shape[0]

    def to(self, *, device: torch.device, dtype: torch.dtype) -> Factors:
        """All three factors on ``device`` in ``dtype``."""
        return Factors(U=self.U.to(device, dtype), S=self.S.to(device, dtype), Vh=self.Vh.to(device, dtype))


def resolve_rank(rank: int | Literal["full"], shape: tuple[int, int], where: str) -> int:
    """R for a weight of ``shape``: the number asked for, or min(O, I) for ``"full"``.

    Raises:
        ConfigError: if the rank is below 1 or above min(O, I).
    """
    full = min(shape)
    if rank == "full":
        return full
    if not 1 <= rank <= full:
        raise ConfigError(
            where,
            f"rank {rank} does not fit a weight of shape {shape[0]} x {shape[1]}",
            allowed=f"1 to {full}, or full",
            fix="Lower --rank, or leave this layer out with --target-modules",
        )
    return rank


def factorize(weight: Tensor, rank: int | Literal["full"] = "full", *, name: str = "weight") -> Factors:
    """Singular value decomposition of ``weight`` in float64 on its device.

    float64 whatever the weight's dtype: in float32 the vectors of near-equal singular values are a matter of luck, and
    an adapter's angles mean nothing in another basis.

    Args:
        weight: shape (O, I), any floating dtype.
        rank: how many leading triplets to keep.
        name: the layer's name, for messages.

    Returns:
        Factors in float64, signs canonical: the largest entry of each column of U is positive.

    Raises:
        DataError: if the weight holds NaN or infinities.
        ConfigError: if ``rank`` does not fit.
    """
    kept = resolve_rank(rank, (weight.shape[0], weight.shape[1]), name)
    matrix = weight.detach().to(torch.float64)
    if not torch.isfinite(matrix).all():
        raise DataError(name, "the weight holds NaN or infinities", fix="Repair or replace the base checkpoint")
    U, S, Vh = _svd(matrix)
    U, S, Vh = U[:, :kept], S[:kept], Vh[:kept]
    signs = canonical_signs(U)
    return Factors(U=(U * signs).contiguous(), S=S.contiguous(), Vh=(Vh * signs[:, None]).contiguous())


def canonical_signs(U: Tensor) -> Tensor:
    """+1 or -1 for each column of ``U`` (O, R), so that its entry of largest magnitude becomes positive; shape (R,)."""
    largest = U.abs().argmax(dim=0, keepdim=True)
    return torch.where(U.gather(0, largest).squeeze(0) < 0, -1.0, 1.0).to(U.dtype)


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    try:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # Divide and conquer (gesdd) can fail to converge on ill-conditioned weights; QR iteration (gesvd) does not.
        import scipy.linalg  # noqa: PLC0415  (only needed on this rare path)

        host = np.ascontiguousarray(matrix.cpu().numpy())
        parts = scipy.linalg.svd(host, full_matrices=False, lapack_driver="gesvd")
        U, S, Vh = (torch.from_numpy(np.ascontiguousarray(p)).to(matrix.device) for p in parts)
    return U, S, Vh
