# SPDX-License-Identifier: Apache-2.0
"""Singular triplets of one matrix: all of them by LAPACK, or the leading ones by a filtered subspace iteration.

Shapes: O out_features, I in_features, D = min(O, I), R triplets, L = 2 R + 10 vectors iterated.
"""

from __future__ import annotations

import contextlib
import math
import warnings

import numpy as np
import torch
from torch import Tensor

from mirrortune.errors import DataError

# ||A v - s u|| and ||A^T u - s v|| of every triplet, relative to the largest singular value. A careless randomised
# decomposition is good on average and poor in single axes; these are triplets of a matrix that far away, every one.
RESIDUAL = 1e-11
# Below this size, or for a larger share of the directions, LAPACK's own is as fast.
_SMALLEST_SIDE, _LARGEST_SHARE = 1536, 1 / 16
_ROUNDS, _LARGEST_DEGREE, _LARGEST_GROWTH = 24, 12, 1e10

# What is asked of all triplets that a device other than the matrix's own has found: ||A - U S Vh|| relative to ||A||,
# and the largest entry of U^T U - I and Vh Vh^T - I. LAPACK stays a hundred times below both.
_EXACT, _ORTHOGONAL = 1e-12, 1e-8

Triplets = tuple[Tensor, Tensor, Tensor]


def decompose(matrix: Tensor, rank: int, name: str) -> Triplets:
    """The ``rank`` leading triplets U (O, R), S (R,), Vh (R, I) of ``matrix`` (O, I), float64, finite; signs as they
    come.

    Raises:
        DataError: if no algorithm converges.
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
    """:func:`decompose` on another device, such as a GPU, checked there; the result on the device of ``matrix``.

    None if it cannot be had: too little memory, an operation that is missing or does not converge, or triplets less
    exact than LAPACK's would be. Nothing is lost then but time.
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
            torch.cuda.empty_cache()  # the model needs the memory next
    return U, S, Vh


def is_exact(matrix: Tensor, triplets: Triplets) -> bool:
    """Whether ``triplets`` are as good as those of LAPACK, or of :func:`leading`, are promised to be."""
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
    """All D triplets by divide and conquer; by QR iteration, then by eigenvectors, where that does not converge."""
    try:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # gesdd can fail on ill-conditioned weights where gesvd does not.
        U, S, Vh = _by_qr_iteration(matrix, name)
    return U, S, Vh


def leading(matrix: Tensor, rank: int) -> Triplets | None:
    """The ``rank`` leading triplets to :data:`RESIDUAL`, or None if they do not get there soon enough.

    Subspace iteration with a Chebyshev filter, which damps everything below the L-th singular value: the reduction of
    the unwanted per product with the matrix is far better than a power iteration's for spectra that fall off slowly.
    The start is random with a fixed seed, so that a weight has one factorisation.

    Reference: Halko, Martinsson & Tropp 2011 (arXiv:0909.4061), alg. 4.4, with the filter of Zhou, Saad, Tiago &
    Chelikowsky 2006 in place of powers.
    """
    # The side on which vectors are iterated is the smaller one, of A A^T or A^T A.
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    columns = min(2 * rank + 10, tall.shape[1])
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(tall.shape[1], columns, generator=generator, dtype=torch.float64).to(matrix.device)
    basis = torch.linalg.qr(tall.T @ (tall @ start)).Q
    for _ in range(_ROUNDS):
        U, S, Vh = _ritz(tall, basis)
        errors = torch.linalg.vector_norm(tall.T @ U[:, :rank] - Vh[:rank].T * S[:rank], dim=0)
        # How many triplets from the strongest on are there already; they are kept out of the filter, which would have
        # to be gentle to a spectrum with a few outliers.
        done = int((errors <= RESIDUAL * S[0]).cumprod(dim=0).sum())
        if done == rank:
            found = U[:, :rank], S[:rank], Vh[:rank]
            return found if tall is matrix else (found[2].T, found[1], found[0].T)
        if not float(S[-1]) > 0:
            return None  # fewer directions than asked for: LAPACK completes the basis
        kept, rest = Vh[:done].T, Vh[done:].T
        filtered = _filtered(tall, rest, kept, float(S[done]), float(S[-1]))
        basis = torch.linalg.qr(torch.cat([kept, filtered], dim=1)).Q
    return None


def _ritz(tall: Tensor, basis: Tensor) -> Triplets:
    """The best triplets whose right vectors lie in ``basis`` (n, L); A v = s u holds for them exactly."""
    U, S, small = torch.linalg.svd(tall @ basis, full_matrices=False)
    return U, S, small @ basis.T


def _filtered(tall: Tensor, vectors: Tensor, kept: Tensor, largest: float, smallest: float) -> Tensor:
    """A Chebyshev polynomial of A^T A, small on [0, smallest^2] and growing fast above, applied to ``vectors`` (n, l)
    in the orthogonal complement of ``kept`` (n, k).

    Its degree is bounded so that the strongest direction, of singular value ``largest``, does not drown the weakest in
    rounding.
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
    """Through the Gram matrix of the smaller side, with a check of the result: small singular values lose digits."""
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
