# SPDX-License-Identifier: Apache-2.0
"""Fingerprint a weight and its singular basis, and repair a basis that another driver computed.

Two correct decompositions may differ in the signs of hundreds of vectors. A flipped sign reverses a learned angle, a
silent error of more than 100% of the adapter's effect. An adapter therefore stores, for each layer, a hash of the
weight and a sketch p^T U of the basis with a fixed random p, or only the signs of the sketch if probes of the layer's
effect (``effect.py``) can verify the basis. Loading sorts vectors by their singular values and flips signs back.
Vectors of near-equal singular values form a cluster, which each driver mixes differently; they have a sketch with more
rows and are rotated back within their cluster. A basis that cannot be repaired is refused.

Shapes: O out_features, I in_features, R rank, E matrices of a stack (each with its own probe).
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from mirrortune.adapters.svd import Factors
from mirrortune.errors import VerificationError
from mirrortune.system.devices import to_float64
from mirrortune.system.distributed.sharding import is_whole

# Largest difference of |p^T u| between a repaired basis and the stored sketch; p has unit-variance entries, so this
# bounds the distance of the vectors themselves to about 1e-5 and the adapter's effect to well under 1e-4 of itself.
SKETCH_TOLERANCE = 1e-5
# A vector p is accepted if no entry of its sketch is smaller than this; the sign of a smaller one would be noise.
_SMALLEST_SKETCH = 1e-3
_PROBE_ATTEMPTS = 64
# Neighbouring singular values closer than this fraction of the largest form a cluster. Drivers agree on a vector to
# rounding error (1e-15) divided by the gap, so vectors outside clusters agree to 1e-8.
_CLUSTER_GAP = 1e-7
_NULL = 1e-10  # below this fraction of the largest value, left and right vectors are independent of each other
_SHORT = 8  # hexadecimal digits of the digest of a frozen weight
_SAMPLE = 2**14  # values of a parameter, or up to twice as many
_LARGEST_CLUSTER = 64  # m vectors; the sketch has 2 m^2 entries per side, and a larger cluster is not repaired

Clusters = tuple[tuple[int, int], ...]
"""(start, stop) of each cluster, the bounds of a slice of directions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """Identify an adapted weight and the basis in which its core was trained.

    Attributes:
        weight_hash: ``values:`` and the :func:`value_digest` of the weight.
        probe_seeds: seed of the vector p of the sketch, one for each matrix.
        side: which vectors the core's effect depends on beyond their product with S: ``output`` (U), ``input`` (Vh) or
            ``both``; ``none`` for an adapter that has no basis.
        sketch: p^T U and/or p^T Vh^T by ``side``, shape (1 or 2, R), or (E, 1 or 2, R), float32; of a file that keeps
            signs, 1 and -1 for the first of them, shape (1, R) or (E, 1, R).
        clusters: of each matrix.
        cluster_sketches: of each matrix, flat, float32: (2m, m) for each cluster of m vectors and side.
        has_sizes: False if the sketch has only signs.
        rounded_to: dtype that the factors of a loaded adapter are rounded to, which may be narrower than that of the
            layer that holds them; None for the dtype of the layer.
    """

    weight_hash: str
    probe_seeds: tuple[int, ...]
    side: str
    sketch: Tensor
    clusters: tuple[Clusters, ...] = ()
    cluster_sketches: tuple[Tensor, ...] = ()
    has_sizes: bool = True
    rounded_to: torch.dtype | None = None

    @classmethod
    def of_weight(cls, weight: Tensor) -> Fingerprint:
        """Return the fingerprint of a weight whose adapter does not depend on a basis: its hash only."""
        return cls.of_hash(f"values:{value_digest(weight)}")

    @classmethod
    def of_hash(cls, weight_hash: str) -> Fingerprint:
        """Return the fingerprint without basis for the stored hash of a weight."""
        return cls(weight_hash=weight_hash, probe_seeds=(), side="none", sketch=torch.zeros(0, 0))

    @property
    def rank(self) -> int:
        """Number of directions R of each basis."""
        return self.sketch.shape[-1]

    def is_of(self, weight: Tensor) -> bool:
        """Return whether ``weight`` has the hashed values."""
        return self.weight_hash == f"values:{value_digest(weight)}"

    def coarsest(self, held_in: torch.dtype) -> torch.dtype:
        """Return the dtype of the coarsest rounding of the factors that a layer holds in the dtype ``held_in``."""
        return max(held_in, self.rounded_to or held_in, key=lambda dtype: torch.finfo(dtype).eps)


def weight_digest(weight: Tensor) -> str:
    """Return the SHA-256 (hex) of the dtype, shape and bytes of ``weight``."""
    host = weight.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{host.dtype}:{tuple(host.shape)}:".encode())
    digest.update(host.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def value_digest(weight: Tensor) -> str:
    """Return the SHA-256 (hex) of the shape and values of ``weight``.

    It does not depend on the dtype if this represents the values exactly: a weight that is stored in 16 bits has the
    same digest when it is loaded in 32.
    """
    host = weight.detach().cpu().contiguous()
    single = host.to(torch.float32)
    is_exact = host.dtype != torch.float64 or torch.equal(single.to(torch.float64), host)
    numbers = (single if is_exact else host) + 0.0  # no negative zeros
    digest = hashlib.sha256(f"{tuple(host.shape)}:".encode())
    digest.update(numbers.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sampled_digest(model: nn.Module, left_out: Container[str]) -> str:
    """Return a digest of samples of a model's weights, up to 32,767 values of every parameter not in ``left_out``.

    Values are compared in float32, so that the digest does not depend on the dtype. Quantised weights are left out.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if name in left_out or not parameter.is_floating_point():
            continue
        digest.update(f"{name}:{tuple(parameter.shape)}:".encode())
        digest.update(_sampled(parameter))
    return digest.hexdigest()


def frozen_digests(model: nn.Module, left_out: Iterable[str]) -> str | None:
    """Return the digests of the weights of an unadapted model, sorted, without parameters named in ``left_out``.

    None for a model that is quantised, in shards, or without values (on the meta device).
    """
    excluded = {id(model.get_parameter(name)) for name in left_out}
    found = []
    for parameter in model.parameters():
        if parameter.is_meta or not parameter.is_floating_point() or not is_whole(parameter):
            return None
        if id(parameter) not in excluded:
            found.append(short_digest(parameter))
    return "".join(sorted(found))


def num_lost(recorded: str, found: str) -> int:
    """Return how many of the digests that are joined in ``recorded`` are not in ``found``, or not as often."""
    counts = [Counter(text[i : i + _SHORT] for i in range(0, len(text), _SHORT)) for text in (recorded, found)]
    return (counts[0] - counts[1]).total()


def short_digest(weight: Tensor) -> str:
    """Return a digest of 8 hexadecimal digits of the shape and up to 32,767 values of ``weight``, in any dtype."""
    return hashlib.sha256(f"{tuple(weight.shape)}:".encode() + _sampled(weight)).hexdigest()[:_SHORT]


def _sampled(parameter: Tensor) -> bytes:
    values = parameter.detach().reshape(-1)
    stride = max(1, len(values) // _SAMPLE) | 1  # odd, so that columns of even matrices are not skipped
    sample = values[::stride].float().cpu() + 0.0  # no negative zeros
    return sample.numpy().tobytes()


def fingerprint(weight: Tensor, factors: Factors, side: str) -> Fingerprint:
    """Compute the fingerprint of ``weight``, (O, I) or (E, O, I), and of its ``factors``, deterministically.

    Args:
        weight: weight of the base model.
        factors: factors of ``weight``.
        side: side of the core, see :class:`Fingerprint`.
    """
    each = factors.each()
    chosen = [_choose_probe(matrix, side) for matrix in each]
    sketches = [sketch.to(torch.float32) for _, sketch in chosen]
    clusters = tuple(_clusters(matrix) for matrix in each)
    return Fingerprint(
        weight_hash=f"values:{value_digest(weight)}",
        probe_seeds=tuple(seed for seed, _ in chosen),
        side=side,
        sketch=torch.stack(sketches) if factors.is_stack else sketches[0],
        clusters=clusters,
        cluster_sketches=tuple(
            torch.cat([torch.zeros(0), *(p.flatten().float().cpu() for c in own for p in _cluster_sketch(m, c, side))])
            for m, own in zip(each, clusters, strict=True)
        ),
    )


def completed(stored: Fingerprint, factors: Factors) -> Fingerprint:
    """Return ``stored`` with the complete sketch of ``factors``, which are aligned with it, instead of only signs."""
    if stored.has_sizes:
        return stored
    sketches = [_sketch(f, s, stored.side).float() for f, s in zip(factors.each(), stored.probe_seeds, strict=True)]
    return replace(stored, sketch=torch.stack(sketches) if factors.is_stack else sketches[0], has_sizes=True)


def try_align(factors: Factors, stored: Fingerprint, name: str) -> tuple[Factors, VerificationError | None]:
    """Align ``factors`` with the basis that ``stored`` describes.

    Args:
        factors: decomposition of the same weight by any driver, float64.
        stored: fingerprint stored with the adapter.
        name: name of the layer, for the message.

    Returns:
        Factors equal to those of training up to rounding, and None; or factors repaired as far as possible, and an
        error that names the worst direction.

    Raises:
        VerificationError: the number of bases or directions differs.
    """
    each, references = factors.each(), stored.sketch if factors.is_stack else stored.sketch[None]
    if len(each) != len(references) or len(each) != len(stored.probe_seeds):
        raise VerificationError(name, f"the adapter holds {len(references)} bases, the weight has {len(each)}")
    repaired: list[Factors] = []
    doubts: list[VerificationError] = []
    for index, (matrix, reference) in enumerate(zip(each, references, strict=True)):
        place = f"{name}.{index}" if factors.is_stack else name
        if matrix.rank != reference.shape[-1]:
            problem = f"the adapter holds a basis of rank {reference.shape[-1]}, got {matrix.rank}"
            raise VerificationError(place, problem)
        found, distance = _repair(matrix, stored, reference.to(torch.float64), index)
        repaired.append(found)
        if not float(distance.max()) <= SKETCH_TOLERANCE:  # also catches NaN
            doubts.append(_misaligned(place, found, distance))
    if not factors.is_stack:
        return repaired[0], doubts[0] if doubts else None
    return Factors.stacked(repaired), doubts[0] if doubts else None


def _misaligned(place: str, factors: Factors, distance: Tensor) -> VerificationError:
    worst = int(distance.nan_to_num(torch.inf).argmax())
    return VerificationError(
        place,
        f"the basis of this weight cannot be aligned with the adapter's: direction {worst} of {factors.rank} "
        f"(singular value {float(factors.S[worst]):.6g}) differs by {float(distance[worst]):.1e}",
        allowed=f"at most {SKETCH_TOLERANCE:.0e}",
        fix="Its singular value is too close to a neighbour's, or the adapter file is damaged; load it where it was "
        "trained and save it again with form='portable', or merge it there",
    )


def _repair(factors: Factors, stored: Fingerprint, reference: Tensor, index: int) -> tuple[Factors, Tensor]:
    """Return one basis, repaired as far as possible, and the distance of each direction from the sketch, (R,)."""
    S = factors.S
    if not bool((S[:-1] >= S[1:]).all()):
        order = S.argsort(descending=True, stable=True)
        factors = Factors(U=factors.U[:, order], S=S[order], Vh=factors.Vh[order])
    clusters = stored.clusters[index] if stored.clusters else ()
    if clusters:
        factors = _turn_back(factors, clusters, stored.cluster_sketches[index], stored.side)
    sketch = _sketch(factors, stored.probe_seeds[index], stored.side).cpu()
    signs = torch.where(sketch[0] * reference[0] < 0, -1.0, 1.0).to(torch.float64)
    for start, stop in clusters:
        signs[start:stop] = 1.0  # rotated back, signs included
    distance = (sketch * signs - reference).abs().max(dim=0).values if stored.has_sizes else torch.zeros_like(signs)
    repaired = factors.flipped(signs.to(factors.U))
    used = repaired.U if stored.side == "output" else repaired.Vh if stored.side == "input" else repaired.U + 0
    if not torch.isfinite(used).all():
        distance = torch.full_like(distance, torch.nan)
    return repaired, distance


def _clusters(factors: Factors) -> Clusters:
    """Return the clusters of near-equal singular values that can be repaired, and single vectors of value zero."""
    S = factors.S.cpu().double()
    limit = min(factors.U.shape[0], factors.Vh.shape[1], factors.rank)  # the complement of a basis follows from it
    largest = float(S[0])
    return tuple(
        (start, stop)
        for start, stop in _runs(S[:limit], _CLUSTER_GAP)
        if (stop - start > 1 or float(S[start]) <= _NULL * largest) and stop - start <= _LARGEST_CLUSTER
    )


def _runs(S: Tensor, gap: float) -> list[tuple[int, int]]:
    """Return (start, stop) of runs of singular values, (R,) float64, in which neighbours differ by at most ``gap``
    times the largest value.
    """
    behind = (S[:-1] - S[1:] > gap * S[0]).nonzero().flatten() + 1
    return list(itertools.pairwise([0, *behind.tolist(), len(S)]))


def redrawn(factors: Factors) -> Factors | None:
    """Return ``factors`` of one matrix as another driver may compute them, with vectors that a fingerprint cannot
    repair mixed at random; None if it can repair all.

    These vectors are in clusters too large for a fingerprint, and in a last cluster that may extend beyond the kept
    directions (if it has three values or more, because two may be a coincidence).
    """
    gap = max(_CLUSTER_GAP, 2 * torch.finfo(factors.S.dtype).eps)  # layers hold theirs rounded
    S = factors.S.cpu().double()
    full = min(factors.U.shape[0], factors.Vh.shape[1])
    runs = [
        (start, stop)
        for start, stop in _runs(S[: min(full, factors.rank)], gap)
        if stop - start > _LARGEST_CLUSTER or (stop == factors.rank < full and stop - start > 2)
    ]
    if not runs:
        return None
    U, Vh = to_float64(factors.U).clone(), to_float64(factors.Vh).clone()
    for start, stop in runs:
        turns = [_random_turn(stop - start, seed).to(U) for seed in (0, 1)]
        is_null = float(S[stop - 1]) <= _NULL * float(S[0])
        U[:, start:stop] = U[:, start:stop] @ turns[0]
        Vh[start:stop] = turns[int(is_null)].T @ Vh[start:stop]
    return Factors(U=U, S=factors.S, Vh=Vh)


def _random_turn(size: int, seed: int) -> Tensor:
    drawn = torch.from_numpy(np.random.RandomState(seed).standard_normal((size, size)))
    turn: Tensor = torch.linalg.qr(drawn)[0]
    return turn


def _cluster_sketch(factors: Factors, cluster: tuple[int, int], side: str) -> list[Tensor]:
    """Compute the sketch of the m vectors of a cluster, (2m, m) float64, for each side that the core depends on."""
    start, stop = cluster
    state = np.random.RandomState(1000 + start)  # frozen by NumPy's maintainers: the same in every version
    vectors = {"output": [factors.U], "input": [factors.Vh.T], "both": [factors.U, factors.Vh.T]}[side]
    found = []
    for v in vectors:
        probes = torch.from_numpy(state.standard_normal((2 * (stop - start), v.shape[0]))).to(v)
        found.append(probes @ v[:, start:stop])
    return found


def _turn_back(factors: Factors, clusters: Clusters, sketches: Tensor, side: str) -> Factors:
    """Rotate the vectors of each cluster to match the stored sketch (orthogonal Procrustes)."""
    U, Vh, place = factors.U.clone(), factors.Vh.clone(), 0
    for start, stop in clusters:
        size = 2 * (stop - start) ** 2
        now = [part.cpu().double() for part in _cluster_sketch(factors, (start, stop), side)]
        then = [sketches[place + i * size :][:size].double().reshape(part.shape) for i, part in enumerate(now)]
        place += size * len(now)
        # For singular value zero left and right vectors rotate independently.
        is_null = float(factors.S[stop - 1]) <= _NULL * float(factors.S[0])
        if not is_null:
            now, then = [torch.cat(now)], [torch.cat(then)]
        turns = [_procrustes(a, b).to(U) for a, b in zip(now, then, strict=True)]
        U[:, start:stop] = U[:, start:stop] @ turns[0]
        Vh[start:stop] = turns[-1].T @ Vh[start:stop]
    return Factors(U=U, S=factors.S, Vh=Vh)


def _procrustes(now: Tensor, then: Tensor) -> Tensor:
    """Return the orthogonal Q (m, m) that minimises ||now Q - then||; the identity if either is not finite."""
    product = now.T @ then
    if not torch.isfinite(product).all():
        return torch.eye(product.shape[0], dtype=product.dtype)
    left, _, right = torch.linalg.svd(product)
    turn: Tensor = left @ right
    return turn


def _choose_probe(factors: Factors, side: str) -> tuple[int, Tensor]:
    """Return the seed and sketch of the first accepted vector p for one basis, or of the best one tried."""
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
