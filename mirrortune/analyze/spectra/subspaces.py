# SPDX-License-Identifier: Apache-2.0
"""Two singular bases side by side: overlaps, principal angles, and which direction became which.

Shapes: O out_features, I in_features, D = min(O, I) directions, k leading ones. All float64; nothing depends on the
signs of singular vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mirrortune.adapters.svd import Factors, factorize


def decompose(matrix: Tensor, name: str = "weight") -> Factors:
    """All min(O, I) singular triplets of ``matrix`` (O, I) in float64; a wide one is turned first, which LAPACK finds
    faster.

    Raises:
        DataError: if it holds NaN or infinities.
    """
    if matrix.shape[0] >= matrix.shape[1]:
        return factorize(matrix, name=name)
    turned = factorize(matrix.T, name=name)
    return Factors(U=turned.Vh.T, S=turned.S, Vh=turned.U.T)


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Angles between the spans of two orthonormal bases (N, k), in radians, 0 to pi/2, ascending; shape (k,).

    Reference: Björck & Golub 1973; cosines give large angles to full precision and sines give small ones.
    """
    inner = first.T @ second
    cosines = torch.linalg.svdvals(inner).clamp(max=1)
    sines = torch.linalg.svdvals(second - first @ inner).clamp(max=1).flip(0)
    return torch.where(cosines.square() < 0.5, cosines.acos(), sines.asin())


@dataclass(frozen=True, slots=True, kw_only=True)
class Matching:
    """Which tuned direction each base direction became.

    Attributes:
        tuned: for base direction i the position of its counterpart, shape (D,), a permutation.
        overlap: |<u_i, u'_j> <v_i, v'_j>| of the two, shape (D,), 0 to 1.
    """

    tuned: Tensor
    overlap: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlaps:
    """Inner products of base direction i with tuned direction j, each of shape (D, D).

    Attributes:
        left: <u_i, u'_j>.
        right: <v_i, v'_j>.
    """

    left: Tensor
    right: Tensor

    def product(self) -> Tensor:
        """<u_i, u'_j> <v_i, v'_j>: the coordinates of u'_j v'_j^T on u_i v_i^T, in which signs cancel."""
        return self.left * self.right


def overlaps(base: Factors, tuned: Factors) -> Overlaps:
    """Overlaps of all directions of two decompositions."""
    return Overlaps(left=base.U.T @ tuned.U, right=base.Vh @ tuned.Vh.T)


def match_directions(product: Tensor) -> Matching:
    """Match base and tuned directions by overlap and not by position, so that crossing singular values are followed.

    Args:
        product: from :meth:`Overlaps.product`, shape (D, D).

    Returns:
        The assignment of largest total overlap (exact; shortest augmenting paths).
    """
    found = product.abs()
    rows, columns = linear_sum_assignment(found.cpu().numpy(), maximize=True)
    tuned = torch.empty(len(found), dtype=torch.int64)
    tuned[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return Matching(tuned=tuned, overlap=found[torch.arange(len(tuned)), tuned])
