# SPDX-License-Identifier: Apache-2.0
"""Compare one weight before and after fine-tuning: compute every value that ``analyze`` reports about it.

Shapes: O out_features, I in_features, D = min(O, I), k leading directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mirrortune.adapters.svd import Factors
from mirrortune.analyze.spectra.approximations import Approximation, Change, approximate
from mirrortune.analyze.spectra.overlaps import (
    Matching,
    Overlaps,
    Shares,
    delta_energies,
    delta_ranks,
    full_factors,
    match_directions,
    overlaps,
    principal_angles,
    split_change,
)

# Sizes of the leading subspaces whose angles and energies are reported, up to half of the directions.
SUBSPACES = (1, 4, 16, 64, 256)
# Number of points of a spectrum that are kept, enough for a curve.
_CURVE_POINTS = 96
_LISTED_NEW = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixComparison:
    """The comparison of a weight W (O, I) with W' = W + Delta.

    Angles are in degrees. Shares are of the energy ||Delta||^2 of the change, from 0 to 1.

    Attributes:
        shape: shape of W, (O, I).
        top_k: number of leading directions that count as the top.
        norms: Frobenius and spectral norms of W, W' and Delta, and ||Delta|| / ||W||.
        positions: 1-based positions at which the spectra are sampled.
        base_spectrum, tuned_spectrum, delta_spectrum: singular values of W, W' and Delta at these positions.
        value_change: relative change of the sum of singular values in the ``top`` k, the ``middle`` and the ``tail``
            half, matched by position. A mean of relative changes would be dominated by the last values, near zero.
        value_change_size: sum of the absolute changes relative to the sum of the singular values, in the same parts.
        top_change: relative change of each of the top k singular values, matched by overlap.
        counterparts: 1-based position in W' of the direction that matches each of the top k base directions by overlap.
        overlaps: |<u, u'> <v, v'>| of each top direction with its counterpart, from 0 to 1.
        crossings: number of pairs among the top k whose counterparts are in the opposite order.
        turned: angle between each of the top k left (``output``) and right (``input``) vectors and its counterpart.
        principal_angles: mean and largest angle between the leading subspaces of W and W', ``output`` and ``input``, by
            their size k.
        kept: share of a subspace of W' that lies in that of W, for the ``top`` k and the ``tail`` half; mean over both
            sides.
        subspace_energy: share of the change in the leading k output directions of W, input directions, and both; and
            the expected share of a change without preferred directions; by k.
        overlap_output, overlap_input: |U_k' U'_k| and |V_k' V'_k| for the top k, shape (k, k).
        block_change: relative size of the change, ||U_a' Delta V_a|| / ||S_a||, in the ``top`` k directions and in the
            ``rest``.
        delta: stable rank, effective rank (exponential of the entropy of the singular values), and number of directions
            that hold 90% of the energy.
        shares: amplification, reorientation and new; see :mod:`mirrortune.analyze.spectra.overlaps`.
        amplification_by_rank: amplification in the ``top``, ``middle`` and ``tail``.
        outside: share of the change outside the column or row space of W, which no spectral core can represent.
        num_new: number of new directions.
        new_directions: the strongest new directions: 1-based position, singular value, familiarity.
        approximations: see :mod:`mirrortune.analyze.spectra.approximations`.
    """

    shape: tuple[int, int]
    top_k: int
    norms: dict[str, float]
    positions: list[int]
    base_spectrum: list[float]
    tuned_spectrum: list[float]
    delta_spectrum: list[float]
    value_change: dict[str, float]
    value_change_size: dict[str, float]
    top_change: list[float]
    counterparts: list[int]
    overlaps: list[float]
    crossings: int
    turned: dict[str, list[float]]
    principal_angles: dict[int, dict[str, float]]
    kept: dict[str, float]
    subspace_energy: dict[int, dict[str, float]]
    overlap_output: list[list[float]]
    overlap_input: list[list[float]]
    block_change: dict[str, float]
    delta: dict[str, float]
    shares: dict[str, float]
    amplification_by_rank: dict[str, float]
    outside: float
    num_new: int
    new_directions: list[dict[str, float]]
    approximations: list[Approximation]

    @property
    def energy(self) -> float:
        """Energy ||Delta||^2, by which this matrix is weighted in means of shares."""
        return self.norms["delta"] ** 2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """The decompositions of W and W' and their matching, in float64."""

    base: Factors
    tuned: Factors
    matching: Matching
    k: int


def top_directions(rank: int, top_k: int) -> int:
    """Return how many of ``rank`` directions count as the top: ``top_k``, limited to 1 to a quarter of them."""
    return max(1, min(top_k, rank // 4))


def compare_matrices(base: Tensor, tuned: Tensor, *, top_k: int = 16, name: str = "weight") -> MatrixComparison | None:
    """Compare a weight before and after fine-tuning.

    Args:
        base: w, shape (O, I), any floating-point dtype.
        tuned: W', same shape.
        top_k: number of leading directions that count as the top, limited to a quarter of all directions.
        name: name of the weight in errors.

    Returns:
        The comparison, or None if the weight did not change.

    Raises:
        DataError: a weight contains NaN or infinities.
    """
    before = base.detach().to(torch.float64)
    after = tuned.detach().to(torch.float64)
    delta = after - before
    if not delta.any():
        return None
    factors = full_factors(before, name)
    del before
    tuned_factors = full_factors(after, name)
    del after
    total = float(delta.square().sum())
    energies = delta_energies(delta)
    k = top_directions(factors.rank, top_k)
    shape = (delta.shape[0], delta.shape[1])
    seen = _beside(factors, tuned_factors, energies, total, k)
    del tuned_factors  # free memory; from here on, only directions of the base are needed
    left, M, right = _coordinates(delta, factors)
    del delta
    S = factors.S
    del factors
    return MatrixComparison(
        shape=shape,
        **seen,
        subspace_energy={size: _energy(size, left, M, right, total, shape) for size in _subspaces(S)},
        block_change=_blocks(M, S, k),
        delta=delta_ranks(energies),
        outside=max(0.0, 1 - float(M.square().sum()) / total),
        approximations=approximate(Change(M=M, S=S, energies=energies, shape=shape)),
    )


def _beside(base: Factors, tuned: Factors, energies: Tensor, total: float, k: int) -> dict[str, Any]:
    """Compute the fields of a comparison that need the singular vectors of both weights."""
    found = overlaps(base, tuned)
    matching = match_directions(found.product())
    shares = split_change(base.S, tuned.S, found, matching, total)
    pair = _Pair(base=base, tuned=tuned, matching=matching, k=k)
    return {
        "norms": _norms(pair, energies),
        **_spectra(pair, energies),
        **_directions(pair),
        "principal_angles": {size: _angles(pair, size) for size in _subspaces(base.S)},
        "kept": _kept(found, k),
        "overlap_output": _rounded(found.left[:k, :k]),
        "overlap_input": _rounded(found.right[:k, :k]),
        "shares": _relative(shares, total),
        "amplification_by_rank": {n: float(p.sum()) for n, p in _groups(shares.amplification / total, k).items()},
        **_new(shares, tuned.S),
    }


def curve_positions(rank: int) -> list[int]:
    """Choose at most ``_CURVE_POINTS`` positions from 1 to ``rank``, dense at the top and including the last."""
    spread = torch.logspace(0, float(torch.log10(torch.tensor(float(rank)))), _CURVE_POINTS, dtype=torch.float64)
    return sorted({*spread.round().long().clamp(1, rank).tolist(), 1, rank})


def _coordinates(delta: Tensor, base: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """Return the energies of the rows of U^T Delta (D,), M = U^T Delta V (D, D), and those of the columns of Delta V
    (D,).
    """
    rows = base.U.T @ delta
    left = rows.square().sum(1)
    M = rows @ base.Vh.T
    del rows
    return left, M, (delta @ base.Vh.T).square().sum(0)


def _norms(pair: _Pair, energies: Tensor) -> dict[str, float]:
    base, tuned, delta = (float(v.norm()) for v in (pair.base.S, pair.tuned.S, energies.sqrt()))
    return {
        "base": base,
        "tuned": tuned,
        "delta": delta,
        "relative": delta / base if base else float("inf"),
        "base_spectral": float(pair.base.S[0]),
        "tuned_spectral": float(pair.tuned.S[0]),
        "delta_spectral": float(energies[0].sqrt()),
    }


def _spectra(pair: _Pair, energies: Tensor) -> dict[str, Any]:
    positions = curve_positions(pair.base.rank)
    index = torch.tensor(positions) - 1
    before, change = _groups(pair.base.S, pair.k), _groups(pair.tuned.S - pair.base.S, pair.k)
    sums = {name: float(part.sum()) for name, part in before.items() if float(part.sum()) > 0}
    return {
        "positions": positions,
        "base_spectrum": pair.base.S[index].tolist(),
        "tuned_spectrum": pair.tuned.S[index].tolist(),
        "delta_spectrum": energies[index].sqrt().tolist(),
        "value_change": {name: float(change[name].sum()) / total for name, total in sums.items()},
        "value_change_size": {name: float(change[name].abs().sum()) / total for name, total in sums.items()},
    }


def _directions(pair: _Pair) -> dict[str, Any]:
    k, matching = pair.k, pair.matching
    counterparts = matching.tuned[:k]
    cosines = {
        "output": (pair.base.U[:, :k] * pair.tuned.U[:, counterparts]).sum(0),
        "input": (pair.base.Vh[:k] * pair.tuned.Vh[counterparts]).sum(1),
    }
    order = counterparts[:, None] > counterparts
    return {
        "top_k": k,
        "top_change": _relative_values(pair.tuned.S[counterparts], pair.base.S[:k]).tolist(),
        "counterparts": (counterparts + 1).tolist(),
        "overlaps": matching.overlap[:k].tolist(),
        "crossings": int(torch.triu(order, diagonal=1).sum()),
        "turned": {side: c.abs().clamp(max=1).acos().rad2deg().tolist() for side, c in cosines.items()},
    }


def _kept(found: Overlaps, k: int) -> dict[str, float]:
    half = max(k, (len(found.left) + 1) // 2)
    parts = {"top": slice(0, k), "tail": slice(half, None)}
    return {
        name: float(torch.stack([m[part, part].square().sum() for m in (found.left, found.right)]).mean()) / size
        for name, part in parts.items()
        if (size := len(found.left[part]))
    }


def _subspaces(S: Tensor) -> list[int]:
    limit = max(1, len(S) // 2)
    return [size for size in SUBSPACES if size <= limit]


def _angles(pair: _Pair, size: int) -> dict[str, float]:
    sides = {
        "output": principal_angles(pair.base.U[:, :size], pair.tuned.U[:, :size]),
        "input": principal_angles(pair.base.Vh[:size].T, pair.tuned.Vh[:size].T),
    }
    found: dict[str, float] = {}
    for side, angles in sides.items():
        degrees = angles.rad2deg()
        found |= {f"{side}_mean": float(degrees.mean()), f"{side}_largest": float(degrees.max())}
    return found


def _energy(
    size: int, left: Tensor, M: Tensor, right: Tensor, total: float, shape: tuple[int, int]
) -> dict[str, float]:
    return {
        "output": float(left[:size].sum()) / total,
        "input": float(right[:size].sum()) / total,
        "both": float(M[:size, :size].square().sum()) / total,
        "output_chance": size / shape[0],
        "input_chance": size / shape[1],
        "both_chance": size * size / (shape[0] * shape[1]),
    }


def _blocks(M: Tensor, S: Tensor, k: int) -> dict[str, float]:
    parts = {"top": (M[:k, :k], S[:k]), "rest": (M[k:, k:], S[k:])}
    return {name: float(m.norm() / s.norm()) for name, (m, s) in parts.items() if float(s.norm()) > 0}


def _relative(shares: Shares, total: float) -> dict[str, float]:
    return {
        "amplification": float(shares.amplification.sum()) / total,
        "reorientation": shares.reorientation / total,
        "new": float(shares.new.sum()) / total,
    }


def _new(shares: Shares, values: Tensor) -> dict[str, Any]:
    found = shares.is_new.nonzero().flatten()
    listed = [
        {"position": i + 1, "value": float(values[i]), "familiarity": float(shares.familiarity[i])}
        for i in found[:_LISTED_NEW].tolist()
    ]
    return {"num_new": len(found), "new_directions": listed}


def _relative_values(after: Tensor, before: Tensor) -> Tensor:
    """Return (after - before) / before; NaN where ``before`` is zero up to rounding."""
    floor = torch.finfo(before.dtype).eps * len(before) * float(before.max())
    return torch.where(before > floor, (after - before) / before.clamp(min=max(floor, 1e-300)), torch.nan)


def _groups(values: Tensor, k: int) -> dict[str, Tensor]:
    """Split values into the top k, the tail half, and the middle between them; leave out empty groups."""
    half = max(k, (len(values) + 1) // 2)
    parts = {"top": values[:k], "middle": values[k:half], "tail": values[half:]}
    return {name: part for name, part in parts.items() if len(part)}


def _rounded(overlap: Tensor) -> list[list[float]]:
    return [[round(v, 4) for v in row] for row in overlap.abs().tolist()]
