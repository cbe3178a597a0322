# SPDX-License-Identifier: Apache-2.0
"""Probe an adapter's effect on a weight: compute a few numbers that identify W' - W, however it is represented.

The probes are bilinear forms p_k^T (W' - W) x_k with Gaussian p_k and x_k. If the change has an error E, the probes
have errors p_k^T E x_k, whose mean square is ||E||_F^2, so sixteen probes measure the size of E. They are computed from
factors and core alone and compared when an adapter is loaded, which detects another basis, other pairs, or a core whose
definition has changed.

Shapes: O out_features, I in_features, R rank, E matrices of a stack.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mirrortune.adapters.cores import Core
from mirrortune.adapters.svd import Factors
from mirrortune.system.devices import float64_device

NUM_PROBES = 16
# Relative to the norm of the change. The documented bound is 1e-4 (2e-6 for stored factors); to pass, a larger error
# would have to be small in all sixteen probes at once. Earlier versions saved sums in float32, wrong by up to 9e-7.
EFFECT_TOLERANCE = 2e-5
EXACT_EFFECT_TOLERANCE = 2e-6
_CANCELLED = 1e-13  # rounding error of the difference of two weights in float64, relative to the weights
_BLOCK = 1 << 24  # numbers converted to float64 at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """The products of a layer's factors with the probes, in float64 on the CPU; :func:`effect` needs nothing else.

    Attributes:
        left: p_k^T U, shape (16, R) or (E, 16, R).
        right: x_k^T Vh^T, same shape.
        shape: shape of each matrix, (O, I).
    """

    left: Tensor
    right: Tensor
    shape: tuple[int, int]


def effect(factors: Factors, core: Core) -> Tensor:
    """Compute the probes of a layer's change U (K - diag(S)) Vh, including the part outside the singular basis.

    Args:
        factors: factors as the layer holds them.
        core: core of the layer.

    Returns:
        The probes in float64, shape (E, 16), with E = 1 for a single matrix.
    """
    return effect_of(probed(factors), core.in_float64())


@torch.no_grad()
def probed(factors: Factors) -> Probed:
    """Compute the products of ``factors`` with the probes, which do not depend on the core."""
    shape = factors.U.shape[-2], factors.Vh.shape[-1]
    left, right = _products(_probes(shape[0], 0), factors.U), _products(_probes(shape[1], 1), factors.Vh.mT)
    return Probed(left=left, right=right, shape=shape)


def _products(probes: Tensor, vectors: Tensor) -> Tensor:
    """Multiply ``probes`` (16, N) by ``vectors`` (N, R) or (E, N, R) in float64, some rows at a time.

    In float32, whose sums depend on the machine, products of thousands of rows are wrong by 1e-6, in TF32 by 6e-4.
    """
    device = float64_device(vectors.device)
    rows = max(1, _BLOCK * vectors.shape[-2] // max(1, vectors.numel()))
    found = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, vectors.shape[-2], rows):
        block = vectors[..., start : start + rows, :].detach().to(device).double()
        found = found + probes[:, start : start + rows].to(device) @ block
    return found.cpu()


@torch.no_grad()
def effect_of(products: Probed, exact: Core) -> Tensor:
    """Compute the probes of a core's effect, (E, 16), from the products of its factors.

    Args:
        products: products of the factors with the probes.
        exact: core in float64 on the CPU.
    """
    mixed = exact.mix(products.right, *exact.coefficients(delta=True))
    found = (products.left * mixed).sum(dim=-1)
    beside = exact.beside_weight()
    if beside is not None:
        left, right = (_probes(size, side) for side, size in enumerate(products.shape))
        found = found + ((left @ beside) * right).sum(dim=-1)
    return found.reshape(-1, NUM_PROBES)


@torch.no_grad()
def change_error(before: Tensor, after: Tensor, expected: Tensor) -> float:
    """Return the :func:`effect_error` of the change between two weights, (O, I) or (E, O, I), except rounding errors.

    Args:
        before: weight without the adapter.
        after: weight with it, in float64.
        expected: recorded effect of the adapter, (E, 16).
    """
    held, merged = (
        (_products(_probes(w.shape[-2], 0), w) * _probes(w.shape[-1], 1)).sum(dim=-1).reshape(-1, NUM_PROBES)
        for w in (before, after)
    )
    found, expected = merged - held, expected.double()
    is_noise = (found - expected).norm(dim=-1, keepdim=True) <= _CANCELLED * held.norm(dim=-1, keepdim=True)
    return effect_error(torch.where(is_noise, expected, found), expected)


def effect_error(found: Tensor, expected: Tensor) -> float:
    """Return the distance of two effects (E, 16) relative to ``expected``, maximised over the matrices of a stack.

    The result is 0 if both are zero, and infinite if only ``expected`` is zero or if either is not finite.
    """
    found, expected = found.double(), expected.double()
    difference, size = (found - expected).norm(dim=-1), expected.norm(dim=-1)
    if not bool(torch.isfinite(difference).all()):
        return float("inf")
    return float(torch.where(difference == 0, 0.0, difference / size).max())


@functools.lru_cache(maxsize=32)
def _probes(size: int, side: int) -> Tensor:
    # NumPy guarantees that its legacy generator never changes, so probes are the same in every version.
    return torch.from_numpy(np.random.RandomState(side).standard_normal((NUM_PROBES, size)))
