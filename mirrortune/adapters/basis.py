# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of a weight and of its singular basis, and the repair of a basis that another driver computed.

Two correct decompositions differ in the signs of hundreds of vectors, and a flipped sign turns a learned angle the
wrong way: an error above 100% of the adapter's effect, in silence. An adapter therefore stores, for each layer, a hash
of the weight and a sketch p^T U of its basis with a fixed probe p. Loading compares, flips signs back exactly, and
refuses what it cannot repair (vectors of equal singular values, which every driver mixes as it likes).

Shapes: O out_features, I in_features, R rank.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mirrortune.adapters.factorize import Factors
from mirrortune.errors import VerificationError

# |p^T u| of a repaired basis may differ from the stored sketch by this much; p has unit-variance entries, so this
# bounds the distance of the vectors themselves to about 1e-5 and the adapter's effect to well under 1e-4 of itself.
SKETCH_TOLERANCE = 1e-5
# A probe is good when no vector is nearly orthogonal to it: below this the sign of the sketch would be noise.
_SMALLEST_SKETCH = 1e-3
_PROBE_ATTEMPTS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """What identifies one adapted weight and the basis its core was trained in.

    Attributes:
        weight_sha256: hash of the weight's dtype, shape and bytes.
        probe_seed: seed of the probe vectors.
        side: which vectors the core's effect depends on beyond their product with S: ``output`` (U), ``input`` (Vh) or
            ``both``; ``none`` for an adapter that has no basis.
        sketch: p^T U and/or p^T Vh^T by ``side``, shape (1 or 2, R), float32.
        sigma_head: the largest singular values, at most 8, for diagnosis.
    """

    weight_sha256: str
    probe_seed: int
    side: str
    sketch: Tensor
    sigma_head: tuple[float, ...]

    @classmethod
    def of_weight(cls, weight_sha256: str) -> Fingerprint:
        """The fingerprint of a weight whose adapter does not depend on a basis: its hash alone."""
        return cls(weight_sha256=weight_sha256, probe_seed=0, side="none", sketch=torch.zeros(0, 0), sigma_head=())


def weight_digest(weight: Tensor) -> str:
    """SHA-256 (hex) over dtype, shape and the raw bytes of ``weight``."""
    host = weight.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{host.dtype}:{tuple(host.shape)}:".encode())
    digest.update(host.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprint(weight: Tensor, factors: Factors, side: str) -> Fingerprint:
    """The fingerprint of ``weight`` (O, I) and its ``factors``, for a core that turns ``side``; deterministic."""
    best_seed, best_sketch, best_smallest = 0, None, -1.0
    for seed in range(_PROBE_ATTEMPTS):
        candidate = _sketch(factors, seed, side)
        smallest = float(candidate[0].abs().min())
        if smallest > best_smallest:
            best_seed, best_sketch, best_smallest = seed, candidate, smallest
        if smallest > _SMALLEST_SKETCH:
            break
    assert best_sketch is not None
    return Fingerprint(
        weight_sha256=weight_digest(weight),
        probe_seed=best_seed,
        side=side,
        sketch=best_sketch.to(torch.float32),
        sigma_head=tuple(float(s) for s in factors.S[:8]),
    )


def align(factors: Factors, stored: Fingerprint, name: str) -> Factors:
    """``factors`` with the signs of the basis that ``stored`` describes.

    Args:
        factors: a decomposition of the same weight, by any driver, float64.
        stored: the fingerprint kept with the adapter.
        name: the layer's name, for the message.

    Returns:
        Factors equal to the trained ones up to the drivers' rounding.

    Raises:
        VerificationError: if some vector is another one even after its sign is repaired.
    """
    sketch = _sketch(factors, stored.probe_seed, stored.side).cpu()
    reference = stored.sketch.to(torch.float64)
    if sketch.shape != reference.shape:
        raise VerificationError(name, f"the adapter holds a basis of rank {reference.shape[1]}, got {sketch.shape[1]}")
    signs = torch.where(sketch[0] * reference[0] < 0, -1.0, 1.0).to(torch.float64)
    distance = (sketch * signs - reference).abs()
    worst = int(distance.max(dim=0).values.argmax())
    if not float(distance.max()) <= SKETCH_TOLERANCE:  # also catches NaN
        raise VerificationError(
            name,
            f"the basis of this weight cannot be aligned with the adapter's: direction {worst} of {factors.rank} "
            f"(singular value {float(factors.S[worst]):.6g}) differs by {float(distance.max()):.1e}",
            allowed=f"at most {SKETCH_TOLERANCE:.0e}",
            fix="Its singular value is too close to a neighbour's, or the adapter file is damaged; "
            "load it where it was trained and merge it there",
        )
    signs = signs.to(factors.U)
    return Factors(U=factors.U * signs, S=factors.S, Vh=factors.Vh * signs[:, None])


def _sketch(factors: Factors, seed: int, side: str) -> Tensor:
    # NumPy's legacy generator is frozen by its maintainers: the same seed gives the same probe in every version.
    state = np.random.RandomState(seed)
    vectors = {"output": [factors.U], "input": [factors.Vh.T], "both": [factors.U, factors.Vh.T]}[side]
    return torch.stack([torch.from_numpy(state.standard_normal(v.shape[0])).to(v) @ v for v in vectors])
