# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of a weight and of its singular basis, and the repair of a basis that another driver computed.

Two correct decompositions differ in the signs of hundreds of vectors, and a flipped sign turns a learned angle the
wrong way: an error above 100% of the adapter's effect, in silence. An adapter therefore stores, for each layer, a hash
of the weight and a sketch p^T U of its basis with a fixed probe p. Loading compares, flips signs back exactly, and
refuses what it cannot repair (vectors of equal singular values, which every driver mixes as it likes).

Shapes: O out_features, I in_features, R rank, E matrices of a stack (each with a probe of its own).
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
        probe_seeds: seed of the probe vectors, one for each matrix.
        side: which vectors the core's effect depends on beyond their product with S: ``output`` (U), ``input`` (Vh) or
            ``both``; ``none`` for an adapter that has no basis.
        sketch: p^T U and/or p^T Vh^T by ``side``, shape (1 or 2, R), or (E, 1 or 2, R), float32.
        sigma_head: the largest singular values (of the first matrix), at most 8, for diagnosis.
    """

    weight_sha256: str
    probe_seeds: tuple[int, ...]
    side: str
    sketch: Tensor
    sigma_head: tuple[float, ...]

    @classmethod
    def of_weight(cls, weight_sha256: str) -> Fingerprint:
        """The fingerprint of a weight whose adapter does not depend on a basis: its hash alone."""
        return cls(weight_sha256=weight_sha256, probe_seeds=(), side="none", sketch=torch.zeros(0, 0), sigma_head=())


def weight_digest(weight: Tensor) -> str:
    """SHA-256 (hex) over dtype, shape and the raw bytes of ``weight``."""
    host = weight.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{host.dtype}:{tuple(host.shape)}:".encode())
    digest.update(host.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprint(weight: Tensor, factors: Factors, side: str) -> Fingerprint:
    """The fingerprint of ``weight``, (O, I) or (E, O, I), and its ``factors``, for a core that turns ``side``;
    deterministic.
    """
    chosen = [_choose_probe(matrix, side) for matrix in factors.each()]
    sketches = [sketch.to(torch.float32) for _, sketch in chosen]
    return Fingerprint(
        weight_sha256=weight_digest(weight),
        probe_seeds=tuple(seed for seed, _ in chosen),
        side=side,
        sketch=torch.stack(sketches) if factors.is_stack else sketches[0],
        sigma_head=tuple(float(s) for s in factors.each()[0].S[:8]),
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
    each, references = factors.each(), stored.sketch if factors.is_stack else stored.sketch[None]
    if len(each) != len(references) or len(each) != len(stored.probe_seeds):
        raise VerificationError(name, f"the adapter holds {len(references)} bases, the weight has {len(each)}")
    names = [f"{name}.{index}" for index in range(len(each))] if factors.is_stack else [name]
    signs = [
        _signs(matrix, reference.to(torch.float64), seed, stored.side, place)
        for matrix, reference, seed, place in zip(each, references, stored.probe_seeds, names, strict=True)
    ]
    sign = (torch.stack(signs) if factors.is_stack else signs[0]).to(factors.U)
    return Factors(U=factors.U * sign[..., None, :], S=factors.S, Vh=factors.Vh * sign[..., :, None])


def _signs(factors: Factors, reference: Tensor, seed: int, side: str, name: str) -> Tensor:
    """+1 or -1 for each direction of one basis, shape (R,), float64."""
    sketch = _sketch(factors, seed, side).cpu()
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
    return signs


def _choose_probe(factors: Factors, side: str) -> tuple[int, Tensor]:
    """Seed and sketch of the first good probe of one basis, or of the best of those that were tried."""
    best_seed, best_sketch, best_smallest = 0, None, -1.0
    for seed in range(_PROBE_ATTEMPTS):
        candidate = _sketch(factors, seed, side)
        smallest = float(candidate[0].abs().min())
        if smallest > best_smallest:
            best_seed, best_sketch, best_smallest = seed, candidate, smallest
        if smallest > _SMALLEST_SKETCH:
            break
    assert best_sketch is not None
    return best_seed, best_sketch


def _sketch(factors: Factors, seed: int, side: str) -> Tensor:
    # NumPy's legacy generator is frozen by its maintainers: the same seed gives the same probe in every version.
    state = np.random.RandomState(seed)
    vectors = {"output": [factors.U], "input": [factors.Vh.T], "both": [factors.U, factors.Vh.T]}[side]
    return torch.stack([torch.from_numpy(state.standard_normal(v.shape[0])).to(v) @ v for v in vectors])
