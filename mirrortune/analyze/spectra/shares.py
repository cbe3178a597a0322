# SPDX-License-Identifier: Apache-2.0
"""What a change consists of: amplification of directions that were there, their re-orientation, and new directions.

The change Delta = W' - W is split into three parts whose energies (squared Frobenius norms) sum to its own:

* new: tuned direction j is new when less than half of its strength was there, u'_j^T W v'_j < sigma'_j / 2, and W does
  not take v'_j to u'_j even in direction (their cosine, the geometric mean of both sides, is below 1/2). Its part is
  the projection of Delta on u'_j v'_j^T; these are orthonormal, so the energy is the sum of (sigma'_j - u'_j^T W
  v'_j)^2.
* amplification: what of the rest is explained by giving base directions the strengths of their counterparts, with
  a_i = sigma'_match(i) - sigma_i in place of Delta on u_i v_i^T, for those i where that explains anything.
* re-orientation: what is left. The same strengths, in turned directions.

Exact on the pure cases: U diag(s') V^T against U diag(s) V^T is all amplification, whatever the order of s'; rotations
of either basis below 60 degrees are all re-orientation; what acts where W does not is all new. Both tests for new ones
ask what W does there and not which vectors are parallel, so they do not depend on how a driver mixes directions of
near-equal strength; for intruder dimensions in the latter sense see Shuttleworth et al. 2024 (arXiv 2410.21228).

Shapes: D directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mirrortune.analyze.spectra.subspaces import Matching, Overlaps

NEW_BELOW = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Energies of the three parts, in squared units of the weight; they sum to ||Delta||^2.

    Attributes:
        amplification: by base direction, shape (D,), >= 0.
        new: by tuned direction, shape (D,); 0 for directions that are not new.
        reorientation: the rest, >= 0 up to rounding.
        familiarity: u'_j^T W v'_j / sigma'_j by tuned direction, shape (D,); 1 for a direction that stayed as it was.
        is_new: which tuned directions are new, shape (D,).
    """

    amplification: Tensor
    new: Tensor
    reorientation: float
    familiarity: Tensor
    is_new: Tensor


def split_change(base: Tensor, tuned: Tensor, overlaps: Overlaps, matching: Matching, energy: float) -> Shares:
    """Split a change into its three parts.

    Args:
        base: singular values of W, shape (D,).
        tuned: singular values of W', shape (D,).
        overlaps: of base and tuned directions.
        matching: of base and tuned directions.
        energy: ||Delta||^2, > 0.
    """
    product = overlaps.product()
    was_there = product.T @ base  # u'_j^T W v'_j
    floor = torch.finfo(tuned.dtype).eps * len(tuned) * max(float(tuned[0]), float(base[0]))
    exists = tuned > floor
    familiarity = torch.where(exists, was_there / tuned.clamp(min=floor), 1.0)
    reach = (overlaps.left.square().T @ base.square()) * (overlaps.right.square().T @ base.square())
    # |W^T u'_j| |W v'_j|, by the geometric mean of which u'_j^T W v'_j becomes a cosine.
    aligned = was_there / reach.pow(0.25).clamp(min=floor)
    is_new = (familiarity < NEW_BELOW) & (aligned < NEW_BELOW)
    written = torch.where(is_new, tuned - was_there, 0.0)
    # Diagonal of U^T (Delta - new part) V, the most that changed strengths could explain.
    diagonal = product @ tuned - base - product @ written
    strength = torch.where(is_new[matching.tuned], 0.0, tuned[matching.tuned] - base)
    amplification = (2 * strength * diagonal - strength.square()).clamp(min=0)
    new = written.square()
    rest = energy - float(amplification.sum()) - float(new.sum())
    return Shares(
        amplification=amplification, new=new, reorientation=max(rest, 0.0), familiarity=familiarity, is_new=is_new
    )
