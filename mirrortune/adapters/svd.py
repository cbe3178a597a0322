# SPDX-License-Identifier: Apache-2.0
"""Compute the singular value decomposition of a weight, in float64 and with canonical signs.

Shapes: O out_features, I in_features, D = min(O, I), R rank (1 <= R <= D, or R = O). W (O, I) = U diag(S) Vh. A stack
of E matrices has a leading dimension E everywhere.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mirrortune.errors import ConfigError, DataError
from mirrortune.system.devices import to_float64

# Bound on ||A v - s u|| and ||A^T u - s v|| of each triplet, relative to the largest singular value. It holds for every
# triplet, whereas a simple randomised decomposition is accurate on average and inaccurate for single triplets.
RESIDUAL = 1e-11
# For a smaller matrix, or a larger share of the directions, LAPACK's full decomposition is as fast.
_SMALLEST_SIDE, _LARGEST_SHARE = 1536, 1 / 16
_ROUNDS, _LARGEST_DEGREE, _LARGEST_GROWTH = 24, 12, 1e10

# Bounds for triplets computed on a device other than that of the matrix: ||A - U S Vh|| relative to ||A||, and the
# largest entry of U^T U - I and Vh Vh^T - I. LAPACK stays a hundred times below both.
_EXACT, _ORTHOGONAL = 1e-12, 1e-8

Triplets = tuple[Tensor, Tensor, Tensor]


def check_finite(name: str, weight: Tensor) -> None:
    """Raise DataError if the weight of the layer ``name`` holds NaN or infinities."""
    if not torch.isfinite(weight).all():
        raise DataError(name, "the weight holds NaN or infinities", fix="Repair or replace the base checkpoint")


def decompose(matrix: Tensor, rank: int, name: str) -> Triplets:
    """Compute the ``rank`` leading triplets U (O, R), S (R,), Vh (R, I) of a finite float64 ``matrix`` (O, I), with
    arbitrary signs.

    Raises:
        DataError: no algorithm converges.
    """
    smaller = min(matrix.shape)
    if smaller >= _SMALLEST_SIDE and rank <= smaller * _LARGEST_SHARE:
        with contextlib.suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            found = leading(matrix, rank)
            if found is not None:
                return found
    U, S, Vh = full(matrix, name)
    return U[:, :rank], S[:rank], Vh[:rank]


def decompose_on(device: torch.device, matrix: Tensor, rank: int, name: str) -> Triplets | None:
    """Run :func:`decompose` on another device, such as a GPU, and return the result on the device of ``matrix``.

    Returns:
        The triplets; None if memory is insufficient, an operation is not implemented or does not converge, or the
        triplets are less accurate than those of LAPACK.
    """
    try:
        there = matrix.to(device)
        found = decompose(there, rank, name)
        if not is_exact(there, found):
            return None
        U, S, Vh = (t.to(matrix.device) for t in found)
    except (RuntimeError, DataError):  # out of memory, not converged and not implemented are RuntimeErrors
        return None
    finally:
        if device.type == "cuda":
            there = found = None  # type: ignore[assignment]
            torch.cuda.empty_cache()  # leave the memory to the model
    return U, S, Vh


def is_exact(matrix: Tensor, triplets: Triplets) -> bool:
    """Return whether ``triplets`` meet the accuracy guaranteed for LAPACK's, or for those of :func:`leading`."""
    U, S, Vh = triplets
    is_full = len(S) == min(matrix.shape)
    norm = torch.linalg.matrix_norm(matrix)
    limit = _EXACT * norm if is_full else RESIDUAL * math.sqrt(len(S)) * S[0]
    sides = matrix @ Vh.T - U * S, matrix.T @ U - Vh.T * S
    residual = torch.stack([torch.linalg.matrix_norm(side) for side in sides]).max()
    identity = torch.eye(len(S), dtype=S.dtype, device=S.device)
    apart = torch.maximum((U.T @ U - identity).abs().max(), (Vh @ Vh.T - identity).abs().max())
    return bool(residual <= limit) and float(apart) <= _ORTHOGONAL


def full(matrix: Tensor, name: str) -> Triplets:
    """Compute all D triplets by divide and conquer, or if it fails to converge by QR iteration, then eigenvectors."""
    try:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # gesdd can fail on ill-conditioned weights where gesvd does not.
        U, S, Vh = _by_qr_iteration(matrix, name)
    return U, S, Vh


def leading(matrix: Tensor, rank: int) -> Triplets | None:
    """Compute the ``rank`` leading triplets to :data:`RESIDUAL`; return None if they do not converge soon enough.

    The algorithm is subspace iteration with a Chebyshev filter, which damps the components below the L-th singular
    value. For slowly decaying spectra it damps them far more per product with the matrix than power iteration does. The
    start is random with a fixed seed, so that a weight always has the same factors.

    Reference: Halko, Martinsson & Tropp 2011 (arXiv:0909.4061), alg. 4.4, with the filter of Zhou, Saad, Tiago &
    Chelikowsky 2006 in place of powers.
    """
    # Vectors are iterated on the smaller side: with A A^T or A^T A.
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    columns = min(2 * rank + 10, tall.shape[1])
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(tall.shape[1], columns, generator=generator, dtype=torch.float64).to(matrix.device)
    basis = torch.linalg.qr(tall.T @ (tall @ start)).Q
    for _ in range(_ROUNDS):
        U, S, Vh = _ritz(tall, basis)
        errors = torch.linalg.vector_norm(tall.T @ U[:, :rank] - Vh[:rank].T * S[:rank], dim=0)
        # Number of leading triplets that have converged. They are excluded from the filter, because a few outliers of
        # the spectrum would limit its degree.
        done = int((errors <= RESIDUAL * S[0]).cumprod(dim=0).sum())
        if done == rank:
            found = U[:, :rank], S[:rank], Vh[:rank]
            return found if tall is matrix else (found[2].T, found[1], found[0].T)
        if not float(S[-1]) > 0:
            return None  # fewer directions than ``rank``: LAPACK completes the basis
        kept, rest = Vh[:done].T, Vh[done:].T
        filtered = _filtered(tall, rest, kept, float(S[done]), float(S[-1]))
        basis = torch.linalg.qr(torch.cat([kept, filtered], dim=1)).Q
    return None


def _ritz(tall: Tensor, basis: Tensor) -> Triplets:
    """Compute the best triplets whose right vectors lie in ``basis`` (n, L); they satisfy A v = s u exactly."""
    U, S, small = torch.linalg.svd(tall @ basis, full_matrices=False)
    return U, S, small @ basis.T


def _filtered(tall: Tensor, vectors: Tensor, kept: Tensor, largest: float, smallest: float) -> Tensor:
    """Apply a Chebyshev polynomial of A^T A, small on [0, smallest^2] and growing fast above, to ``vectors`` (n, l) in
    the orthogonal complement of ``kept`` (n, k).

    The degree is bounded so that the weakest direction stays above the rounding error of the strongest one, whose
    singular value is ``largest``.
    """
    top = 2 * (largest / smallest) ** 2 - 1
    degree = int(math.log(2 * _LARGEST_GROWTH) / max(math.acosh(top), 1e-3)) if top > 1 else _LARGEST_DEGREE
    scale = 2 / smallest**2

    def product(x: Tensor) -> Tensor:
        mapped = scale * (tall.T @ (tall @ x)) - x
        return mapped - kept @ (kept.T @ mapped)

    before, now = vectors, product(vectors)
    for _ in range(min(max(degree, 2), _LARGEST_DEGREE) - 1):
        before, now = now, 2 * product(now) - before
    unit: Tensor = now / torch.linalg.vector_norm(now, dim=0)
    return unit


def _by_qr_iteration(matrix: Tensor, name: str) -> Triplets:
    import scipy.linalg  # noqa: PLC0415  (only needed on this rare path)

    host = np.ascontiguousarray(matrix.cpu().numpy())
    try:
        parts = scipy.linalg.svd(host, full_matrices=False, lapack_driver="gesvd")
    except scipy.linalg.LinAlgError:
        return _by_eigenvectors(matrix, name)
    warnings.warn(f"{name}: LAPACK's gesdd did not converge on this weight, gesvd did", RuntimeWarning, stacklevel=2)
    U, S, Vh = (torch.from_numpy(np.ascontiguousarray(p)).to(matrix.device) for p in parts)
    return U, S, Vh


def _by_eigenvectors(matrix: Tensor, name: str) -> Triplets:
    """Decompose by the Gram matrix of the smaller side, and check the result, as small singular values lose digits."""
    is_tall = matrix.shape[0] >= matrix.shape[1]
    tall = matrix if is_tall else matrix.T
    failed = DataError(
        name, "no algorithm finds the singular values of this weight",
        fix="Leave this layer out with --target-modules, or repair the base checkpoint",
    )  # fmt: skip
    try:
        V = torch.linalg.eigh(tall.T @ tall).eigenvectors.flip(1)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise failed from error
    Q, triangle = torch.linalg.qr(tall @ V)  # nearly diagonal, its diagonal the singular values up to sign
    signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(triangle)
    S, order = (triangle.diagonal() * signs).sort(descending=True)
    U, Vh = (Q * signs)[:, order], V[:, order].T
    if not float((tall - U * S @ Vh).norm()) <= 1e-9 * float(tall.norm()):
        raise failed
    warnings.warn(
        f"{name}: LAPACK's gesdd and gesvd did not converge on this weight, eigenvectors did",
        RuntimeWarning,
        stacklevel=2,
    )
    return (U, S, Vh) if is_tall else (Vh.T, S, U.T)


# Part of the cache keys: increase it when the factors of a given weight change.
FACTORIZE_VERSION = 2

_PROBED = 1e-4  # tolerance relative to the largest singular value, far above the rounding error of float32 factors
_POWER_STEPS = 4

Rank = int | Literal["full", "out"]
"""Number of directions kept: an integer, ``"full"`` for min(O, I), or ``"out"`` for all O of the output side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """The R leading singular triplets of a weight, or of each matrix of a stack, largest singular value first.

    Attributes:
        U: left singular vectors, shape (O, R), orthonormal columns.
        S: singular values, shape (R,), descending, >= 0.
        Vh: right singular vectors, shape (R, I), orthonormal rows; rows from D on are zero, as is S.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor

    @property
    def rank(self) -> int:
        """R, the number of directions kept."""
        return self.S.shape[-1]

    @property
    def is_stack(self) -> bool:
        """Whether these are factors of several matrices."""
        return self.S.ndim == 2

    def each(self) -> list[Factors]:
        """Return the factors of each matrix, a list of one if this is no stack."""
        if not self.is_stack:
            return [self]
        parts = zip(self.U, self.S, self.Vh, strict=True)
        return [Factors(U=U, S=S, Vh=Vh) for U, S, Vh in parts]

    @classmethod
    def stacked(cls, each: Sequence[Factors]) -> Factors:
        """Stack the factors of several matrices."""
        U, S, Vh = (torch.stack(part) for part in zip(*((f.U, f.S, f.Vh) for f in each), strict=True))
        return cls(U=U, S=S, Vh=Vh)

    def flipped(self, signs: Tensor) -> Factors:
        """Return the factors of one matrix with the vectors of each direction multiplied by ``signs``, shape (R,)."""
        return Factors(U=self.U * signs, S=self.S, Vh=self.Vh * signs[:, None])

    def to(self, *, device: torch.device, dtype: torch.dtype) -> Factors:
        """Return the factors on ``device`` in ``dtype``."""
        # Converted on the CPU where one side is an Apple GPU, which has no float64.
        first, then = (device, dtype) if device.type == "cpu" else (dtype, device)
        return Factors(U=self.U.to(first).to(then), S=self.S.to(first).to(then), Vh=self.Vh.to(first).to(then))


def resolve_rank(rank: Rank, shape: tuple[int, int], where: str) -> int:
    """Return R for a weight of ``shape``: ``rank`` if it is an integer, min(O, I) for ``"full"``, O for ``"out"``.

    Raises:
        ConfigError: the rank is below 1 or above min(O, I).
    """
    full = min(shape)
    if rank == "full":
        return full
    if rank == "out":
        return shape[0]
    if not 1 <= rank <= full:
        raise ConfigError(
            where,
            f"rank {rank} does not fit a weight of shape {shape[0]} x {shape[1]}",
            allowed=f"1 to {full}, full or out",
            fix="Lower --rank, or leave this layer out with --target-modules",
        )
    return rank


def factorize(
    weight: Tensor, rank: Rank = "full", *, name: str = "weight", device: torch.device | None = None
) -> Factors:
    """Compute the singular value decomposition of ``weight`` in float64, by default on the CPU.

    float64 is used for every dtype of the weight: in float32 the vectors of near-equal singular values are arbitrary,
    and the angles of an adapter have no meaning in another basis.

    Args:
        weight: shape (O, I), or (E, O, I) for a stack, any floating-point dtype.
        rank: number of leading triplets to keep. O, or ``"out"``, is allowed even if there are fewer triplets.
        name: name of the layer, for messages.
        device: device to compute on; the CPU is used if this one cannot reach the same accuracy. By default, too, even
            for a weight on a GPU: most GPUs compute float64 a 32nd or a 64th as fast as float32.

    Returns:
        Factors in float64 on the device of ``weight``, or on the CPU if it has no float64. Signs are canonical: the
        largest entry of each column of U is positive. Columns of U beyond min(O, I) are those of :func:`complement`.

    Raises:
        DataError: the weight contains NaN or infinity, or cannot be decomposed.
        ConfigError: ``rank`` is out of range.
    """
    if weight.ndim == 3:
        each = [factorize(matrix, rank, name=f"{name}.{index}", device=device) for index, matrix in enumerate(weight)]
        return Factors.stacked(each)
    shape = (weight.shape[0], weight.shape[1])
    kept = resolve_rank("out" if rank == shape[0] else rank, shape, name)
    matrix = to_float64(weight.detach())
    check_finite(name, matrix)
    found = None if device is None else decompose_on(device, matrix, min(kept, *shape), name)
    U, S, Vh = found or decompose(matrix.cpu(), kept, name)
    signs = canonical_signs(U)
    U, Vh = U * signs, Vh * signs[:, None]
    if kept > min(shape):
        missing = kept - min(shape)
        U = torch.cat([U, complement(U)], dim=1)
        S, Vh = (torch.cat([t, t.new_zeros(missing, *t.shape[1:])]) for t in (S, Vh))
    made = Factors(U=U.contiguous(), S=S.contiguous(), Vh=Vh.contiguous())
    return made.to(device=matrix.device, dtype=torch.float64)


def complement(U: Tensor) -> Tensor:
    """Compute orthonormal vectors that complete the columns of ``U`` (O, D), D < O, to a basis; (O, O - D), float64.

    The weight does not determine them: any basis of its left null space gives a valid decomposition. The result is Q of
    the QR decomposition, with a positive diagonal of R, of fixed Gaussian vectors projected by I - U U^T. It depends
    only on the span of U, so neither flipped signs nor mixed vectors of near-equal singular values change it.
    """
    out_features, kept = U.shape
    # NumPy's legacy generator is frozen, so the vectors are the same in every version and on every device.
    drawn = np.random.RandomState(0).standard_normal((out_features, out_features - kept))
    vectors = torch.from_numpy(drawn).to(U)
    # A square Gaussian matrix is ill-conditioned, so one projection would leave a part of U in the last vectors. After
    # two projections they are orthogonal to U up to rounding error.
    for _ in range(2):
        vectors, triangle = torch.linalg.qr(vectors - U @ (U.T @ vectors))
        vectors = vectors * torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(U)
    return vectors


def canonical_signs(U: Tensor) -> Tensor:
    """Return the signs, (R,), that make the entry of largest magnitude in each column of ``U`` (O, R) positive."""
    largest = U.abs().argmax(dim=0, keepdim=True)
    return torch.where(U.gather(0, largest).squeeze(0) < 0, -1.0, 1.0).to(U.dtype)


@torch.no_grad()
def are_leading_triplets(factors: Factors, weight: Tensor) -> bool:
    """Return whether untrusted factors are those of ``weight`` (O, I), or of each matrix of a stack (E, O, I).

    The test is randomised. For a random combination z of directions, W Vh' z = U S z and W' U z = Vh' S z must hold,
    and U and Vh must preserve the length of z; a few steps of the power method must find no direction outside Vh that
    is stronger than the weakest kept one. Factors that pass are wrong by at most 1e-4 of the largest singular value
    along nearly every z, and the author of a file cannot know z.
    """
    out_features, in_features = weight.shape[-2:]
    rank, smaller = factors.rank, min(out_features, in_features)
    shapes = ((*weight.shape[:-1], rank), (*weight.shape[:-2], rank), (*weight.shape[:-2], rank, in_features))
    if tuple(tuple(part.shape) for part in (factors.U, factors.S, factors.Vh)) != shapes:
        return False
    dtype = torch.promote_types(weight.dtype, torch.float32)
    # On the CPU: a GPU may compute products of float32 in TF32, whose rounding errors exceed the tolerance.
    W = weight.cpu().to(dtype)
    U, S, Vh = (part.to(W.device, dtype) for part in (factors.U, factors.S, factors.Vh))
    if not bool((S >= 0).all()) or not bool((S.diff() <= 0).all()) or bool(Vh[..., smaller:, :].any()):
        return False
    generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(7)))
    z = torch.randn((*S.shape, 1), generator=generator, dtype=dtype)
    top, scaled, inside = S[..., :1], S[..., None] * z, z[..., :smaller, :]
    pairs = (
        (W @ (Vh.mT @ z), U @ scaled, top), (W.mT @ (U @ z), Vh.mT @ scaled, top),
        (U.mT @ (U @ z), z, torch.ones_like(top)), ((Vh @ (Vh.mT @ z))[..., :smaller, :], inside, torch.ones_like(top)),
    )  # fmt: skip
    fits = all(bool((_length(a - b) <= _PROBED * size.double() * _length(z)).all()) for a, b, size in pairs)
    return fits and (rank >= smaller or _has_nothing_stronger(W, S, Vh, generator))


def _has_nothing_stronger(W: Tensor, S: Tensor, Vh: Tensor, generator: torch.Generator) -> bool:
    """Return whether the power method finds no direction outside Vh that W scales by more than the last value of S."""
    x = torch.randn((*W.shape[:-2], W.shape[-1], 1), generator=generator, dtype=W.dtype)
    most = S[..., -1:].double() + _PROBED * S[..., :1].double()
    for _ in range(_POWER_STEPS):
        x = x - Vh.mT @ (Vh @ x)
        x = x / _length(x).clamp_min(torch.finfo(W.dtype).tiny)[..., None].to(W.dtype)
        y = W @ x
        stretch = _length(y)
        if not bool((stretch <= most).all()):
            return False
        x = W.mT @ (y / stretch.clamp_min(torch.finfo(W.dtype).tiny)[..., None].to(W.dtype))
    return True


def _length(vectors: Tensor) -> Tensor:
    """Compute the Euclidean norms of columns (..., N, 1), in float64 to avoid overflow; shape (..., 1)."""
    found: Tensor = torch.linalg.vector_norm(vectors.double(), dim=-2)
    return found
