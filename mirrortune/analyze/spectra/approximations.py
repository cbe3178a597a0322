# SPDX-License-Identifier: Apache-2.0
"""Compute how much of a given change Delta each method could represent: the best approximation at each size.

The part of Delta inside the base's singular basis is M = U^T Delta V (D, D). No core can represent the energy outside
it: ||Delta - U X V^T||^2 = ||Delta||^2 - ||M||^2 + ||M - X||^2. Each function in ``APPROXIMATIONS`` takes one family of
matrices X and yields its sizes with parameter counts and captured energies. These are upper limits of what a method can
represent; training need not find them, and the task may not need them.

Shapes: O out_features, I in_features, D = min(O, I), r rank, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mirrortune.adapters.pairings.matching import match
from mirrortune.adapters.pairings.rules import PAIRINGS
from mirrortune.registry import Registry

# PSOFT needs dozens of r x r decompositions, and larger free matrices would not be small adapters.
_LARGEST_DENSE_RANK = 128
_PSOFT_SWEEPS = 12
# Name of pairs that are matched to the change, unlike mirror, neighbor and random pairs.
_BEST_PAIRS = "best pairs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A change in the coordinates of the base's singular basis.

    Attributes:
        M: U^T Delta V, shape (D, D).
        S: singular values of the base, shape (D,).
        energies: squared singular values of Delta in descending order, shape (D,).
        shape: shape of Delta, (O, I).
    """

    M: Tensor
    S: Tensor
    energies: Tensor
    shape: tuple[int, int]

    @property
    def rank(self) -> int:
        """Number of directions, D."""
        return self.S.shape[0]

    @property
    def is_alive(self) -> Tensor:
        """Mask of singular values above rounding error, shape (D,); scaling S (1 + lambda) cannot change the others."""
        return self.S.gt(torch.finfo(self.S.dtype).eps * self.rank * self.S[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Approximation:
    """The best approximation of a change by a method at one size.

    Attributes:
        method: name of the method.
        size: rank, number of directions, or number of bands.
        parameters: number of trained parameters for this matrix.
        captured: captured energy: ||Delta||^2 minus the squared error of the approximation.
    """

    method: str
    size: int
    parameters: int
    captured: float


Sized = Iterator[tuple[int, int, float]]
"""Iterator over (size, parameters, captured energy) in order of increasing size."""

APPROXIMATIONS: Registry[Callable[[Change], Sized]] = Registry("approximation")


def approximate(change: Change) -> list[Approximation]:
    """Approximate a change by every method at every size that fits."""
    return [
        Approximation(method=name, size=size, parameters=parameters, captured=captured)
        for name in APPROXIMATIONS.names()
        for size, parameters, captured in APPROXIMATIONS.get(name, "approximation")(change)
    ]


def sizes(limit: int, largest: int | None = None) -> list[int]:
    """Return the powers of two below ``limit``, and ``limit``; a smaller ``largest`` takes the place of ``limit``."""
    stop = limit if largest is None else min(limit, largest)
    found = [2**n for n in range(stop.bit_length()) if 2**n < stop]
    return [*found, stop]


@APPROXIMATIONS.register("scale")
def scale(change: Change) -> Sized:
    """Change the singular values of the top k directions, the diagonal of M: k parameters. k = D is plain SVFT."""
    captured = (change.M.diagonal() * change.is_alive).square().cumsum(0)
    yield from ((k, k, float(captured[k - 1])) for k in sizes(change.rank))


@APPROXIMATIONS.register("svft banded")
def svft_banded(change: Change) -> Sized:
    """Change the diagonal of M and d diagonals on each side of it: D(2d+1) - d(d+1) parameters."""
    rank = change.rank
    for bands in [d for d in (1, 2, 4, 8, 16) if d < rank]:
        captured = sum(float(change.M.diagonal(d).square().sum()) for d in range(-bands, bands + 1))
        yield bands, rank * (2 * bands + 1) - bands * (bands + 1), captured


@APPROXIMATIONS.register("lora-xs")
def lora_xs(change: Change) -> Sized:
    """Insert a free matrix between the r leading directions of both sides, the leading block of M: r^2 parameters."""
    for r in sizes(change.rank, _LARGEST_DENSE_RANK):
        yield r, r * r, float((change.is_alive[:r, None] * change.M[:r, :r]).square().sum())


@APPROXIMATIONS.register("lora")
def lora(change: Change) -> Sized:
    """Add a matrix of rank r, at best the r leading singular triplets of Delta (Eckart-Young): r (O + I) parameters."""
    captured = change.energies.cumsum(0)
    yield from ((r, r * sum(change.shape), float(captured[r - 1])) for r in sizes(change.rank))


@APPROXIMATIONS.register("full")
def every_weight(change: Change) -> Sized:
    """Change every weight: O I parameters."""
    yield change.rank, change.shape[0] * change.shape[1], float(change.energies.sum())


def plane_gains(M: Tensor, S: Tensor) -> Tensor:
    """Compute the energy captured by the best output-side rotation of each plane (i, j), shape (r, r), symmetric.

    With T = diag(S) + M, trace(T_ij^T R(theta) diag(s_i, s_j)) = a cos(theta) + b sin(theta), where a = T_ii s_i +
    T_jj s_j and b = T_ji s_i - T_ij s_j. The maximum, at theta = atan2(b, a), exceeds the value at theta = 0 by
    hypot(a, b) - a, and the squared error falls by twice that.

    Args:
        M: change in the singular basis, shape (r, r); pass its transpose for rotations on the input side.
        S: singular values, shape (r,).
    """
    strength, turned = (S + M.diagonal()) * S, M.T * S[:, None]
    a, b = strength[:, None] + strength, turned - turned.T
    # hypot(a, b) - a, without cancellation for small angles.
    length = torch.hypot(a, b)
    gain = torch.where(a > 0, b.square() / (length + a).clamp(min=torch.finfo(a.dtype).tiny), length - a)
    return (2 * gain).fill_diagonal_(0)


def _rotated(pairing: str, *, transposed: bool = False) -> Callable[[Change], Sized]:
    def rotate(change: Change) -> Sized:
        for r in sizes(change.rank)[1:] or [1]:
            M = change.M[:r, :r]
            gains = plane_gains(M.T if transposed else M, change.S[:r])
            pairs = _pairs(pairing, r, gains)
            yield r, len(pairs), float(gains[pairs[:, 0], pairs[:, 1]].sum())

    return rotate


def _pairs(pairing: str, rank: int, gains: Tensor) -> Tensor:
    if pairing == _BEST_PAIRS:
        return match(gains, exact_limit=0)  # greedy, at least half of the optimum; exact matching would be too slow
    return PAIRINGS.get(pairing, "approximation")(rank, torch.Generator().manual_seed(0))


for _name in ("mirror", "neighbor", "random", _BEST_PAIRS):
    APPROXIMATIONS.register(_name)(_rotated(_name))
APPROXIMATIONS.register("mirror, input side")(_rotated("mirror", transposed=True))


@APPROXIMATIONS.register("mirror + scale")
def mirror_and_scale(change: Change) -> Sized:
    """Rotate mirror pairs and change every singular value: floor(r / 2) + r parameters.

    In a plane, R(theta) diag(t) has the columns t_i (c, s) and t_j (-s, c), with c = cos(theta), s = sin(theta). With
    the best t it captures (c, s) (T_i T_i^T + J T_j T_j^T J^T) (c, s)^T, where T_i is column i of T = diag(S) + M and J
    a rotation by 90 degrees. The maximum over theta is the larger eigenvalue of that 2 x 2 matrix.
    """
    for r in sizes(change.rank)[1:] or [1]:
        M, S = change.M[:r, :r], change.S[:r]
        T = M + torch.diag(S)
        pairs = _pairs("mirror", r, M)
        i, j = pairs[:, 0], pairs[:, 1]
        own, other = torch.stack([T[i, i], T[j, i]]), torch.stack([T[j, j], -T[i, j]])  # J^T T_j turned onto (c, s)
        xx, yy, xy = own[0] ** 2 + other[0] ** 2, own[1] ** 2 + other[1] ** 2, own[0] * own[1] + other[0] * other[1]
        largest = (xx + yy) / 2 + torch.hypot((xx - yy) / 2, xy)
        missed = xx + yy - largest  # of ||T||^2 in the plane; theta = 0 and t = s miss all of ||M||^2
        in_planes = M[i, i] ** 2 + M[j, j] ** 2 + M[i, j] ** 2 + M[j, i] ** 2
        captured = float((in_planes - missed).sum())
        if r % 2:
            captured += float(M[r // 2, r // 2] ** 2)
        yield r, len(pairs) + r, captured


@APPROXIMATIONS.register("psoft")
def psoft(change: Change) -> Sized:
    """Use diag(S) diag(beta) Q diag(alpha) in the r leading directions, Q a rotation: r(r-1)/2 + 2r parameters.

    The captured energy is a lower bound. Q alone solves an orthogonal Procrustes problem; alpha and beta are added by
    alternating least squares, whose error never increases.
    """
    for r in sizes(change.rank, _LARGEST_DENSE_RANK)[1:]:
        M, S = change.M[:r, :r], change.S[:r]
        error = psoft_error(M + torch.diag(S), S)
        yield r, r * (r - 1) // 2 + 2 * r, float(M.square().sum()) - error


def psoft_error(T: Tensor, S: Tensor) -> float:
    """Return an upper bound of the minimum of ||T - diag(S beta) Q diag(alpha)||^2 over Q, alpha and beta; T (r, r)."""
    left, alpha = S.clone(), torch.ones_like(S)
    Q = _nearest_rotation(left[:, None] * T)
    for _ in range(_PSOFT_SWEEPS):
        mapped = left[:, None] * Q
        alpha = _fit(mapped, T, alpha, dim=0)
        mapped = Q * alpha
        left = _fit(mapped, T, left, dim=1)
        # Bounds the curvature of ||T - L Q A||^2 in Q, so that a projected gradient step of 1/bound never increases it.
        bound = float(left.abs().max() * alpha.abs().max()) ** 2
        if bound == 0:
            break
        residual = T - left[:, None] * Q * alpha
        Q = _nearest_rotation(Q + left[:, None] * residual * alpha / bound)
    alpha = _fit(left[:, None] * Q, T, alpha, dim=0)
    return float((T - left[:, None] * Q * alpha).square().sum())


def _fit(basis: Tensor, target: Tensor, before: Tensor, dim: int) -> Tensor:
    """Fit a factor to each column (dim 0) or row (dim 1) of ``basis`` by least squares; keep ``before`` for zeros."""
    weight = basis.square().sum(dim)
    return torch.where(weight > 0, (basis * target).sum(dim) / weight.clamp(min=torch.finfo(weight.dtype).tiny), before)


def _nearest_rotation(matrix: Tensor) -> Tensor:
    """Return the rotation Q (determinant 1) that maximises trace(Q^T matrix)."""
    U, _, Vh = torch.linalg.svd(matrix)
    nearest: Tensor = U @ Vh
    if torch.linalg.det(nearest) < 0:  # a reflection: flip the direction of the smallest singular value
        nearest = nearest - 2 * U[:, -1:] @ Vh[-1:]
    return nearest
