# SPDX-License-Identifier: Apache-2.0
"""The factors of a base weight, held once for all adapters of a bank.

Two adapters of one weight were trained in the same singular basis up to signs, and one that keeps fewer directions in
the first of them. A basis is therefore shared wherever the vectors agree, signs aside, and an adapter remembers which
of them to flip. Only a basis that is really another one (near-equal singular values that another driver mixed
otherwise, factors rounded to another dtype) is held beside the first.

Shapes: O out_features, I in_features, R rank.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mirrortune.adapters.core import Core
from mirrortune.adapters.effect import EFFECT_TOLERANCE, EXACT_EFFECT_TOLERANCE, Probed, effect_error, effect_of, probed
from mirrortune.adapters.files.adapter_file import AdapterFile
from mirrortune.adapters.files.load import stored_core, trained_factors
from mirrortune.adapters.fingerprint import weight_digest
from mirrortune.adapters.inject import FactorSource
from mirrortune.adapters.svd import Factors
from mirrortune.adapters.targets import Target

# Largest difference of an entry of two unit vectors that are taken for one: a few roundings of float32.
_SAME = 5e-7


@dataclass(slots=True, eq=False)
class Held:
    """Factors as layers compute with them, and what is made from them once. Never changed after it is published.

    Attributes:
        factors: U and Vh on the device and in the dtype of the model, S in float32 on the device.
        S: float64, on the CPU.
        cores: untrained cores by what they are built from.
        probes: products with the probes of :mod:`mirrortune.adapters.effect`, made when first needed.
    """

    factors: Factors
    S: Tensor
    cores: dict[Hashable, Core] = field(default_factory=dict)
    probes: Probed | None = None

    @property
    def rank(self) -> int:
        """R, the number of directions held."""
        return self.factors.rank

    def leading(self, rank: int) -> Factors:
        """Return the first ``rank`` directions; views."""
        held = self.factors
        return Factors(U=held.U[:, :rank], S=held.S[:rank], Vh=held.Vh[:rank])


@dataclass(slots=True, eq=False)
class Basis:
    """One basis of a weight. ``held`` is replaced, whole, when an adapter needs more directions.

    Attributes:
        dtype: to which the factors were rounded where the adapters were trained.
        held: the factors.
    """

    dtype: str
    held: Held


class LayerBases:
    """The bases of one weight.

    Args:
        model: the base.
        target: where the weight is, of the largest rank asked for so far.
    """

    def __init__(self, model: nn.Module, target: Target) -> None:
        self.model, self.target = model, target
        self.bases: list[Basis] = []
        self._known: dict[Hashable, tuple[Basis, Tensor | None]] = {}
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Memory that the factors take."""
        parts = [t for b in self.bases for t in (b.held.factors.U, b.held.factors.S, b.held.factors.Vh)]
        return sum(t.numel() * t.element_size() for t in parts)

    def match(self, adapter: AdapterFile, name: str, source: FactorSource) -> tuple[Basis, Tensor | None]:
        """Find, or add, the basis that a layer of ``adapter`` was trained in, with every check of ``load_adapter``.

        Returns:
            The basis, and the signs (R,) by which its vectors differ from the trained ones, or None for no difference.

        Raises:
            VerificationError: another weight, a basis that cannot be aligned, or another effect than the trained one's.
        """
        key = _fingerprint_key(adapter, name)
        found = self._known.get(key)
        if found is not None and _has_its_effect(adapter, name, *found):
            return found
        weight = self.target.read(self.model)
        factors = trained_factors(adapter, name, weight, source)
        with self._lock:
            found = self._place(adapter, name, factors, weight)
            self._known[key] = found
        return found

    def _place(self, adapter: AdapterFile, name: str, factors: Factors, weight: Tensor) -> tuple[Basis, Tensor | None]:
        """Share a basis that agrees with ``factors``, growing it if it is shorter; add one if none agrees."""
        dtype = adapter.dtypes[name]
        like = weight if self.target.kind.is_packed else self.target.weight(self.model)
        cast = factors.to(device=like.device, dtype=like.dtype)
        tolerance = 0.0 if adapter.form == "portable" else _SAME
        for basis in self.bases:
            signs = _signs_between(basis.held, factors, cast, tolerance) if basis.dtype == dtype else None
            if signs is None:
                continue
            if factors.rank > basis.held.rank:
                grown = Factors(U=factors.U * signs, S=factors.S, Vh=factors.Vh * signs[:, None])
                basis.held = _held(grown, like)
            return basis, None if bool((signs > 0).all()) else signs.float()
        basis = Basis(dtype=dtype, held=_held(factors, like))
        self.bases.append(basis)
        return basis, None


def _held(factors: Factors, like: Tensor) -> Held:
    cast = factors.to(device=like.device, dtype=like.dtype)
    held = Factors(U=cast.U.contiguous(), S=factors.S.to(like.device, torch.float32), Vh=cast.Vh.contiguous())
    return Held(factors=held, S=factors.S.cpu())


def _signs_between(held: Held, factors: Factors, cast: Factors, tolerance: float) -> Tensor | None:
    """Return signs (R,), float64, by which ``factors`` and a basis differ in their common directions, ones beyond them;
    None where they differ in more.

    Args:
        held: the basis.
        factors: of another adapter, float64.
        cast: the same in the dtype and on the device of the basis.
        tolerance: largest difference of an entry.
    """
    common = min(held.rank, factors.rank)
    own = held.leading(common)
    U, Vh = cast.U[:, :common], cast.Vh[:common]
    signs = torch.where((own.U.double() * U.double()).sum(dim=0) < 0, -1.0, 1.0).to(U)
    apart = [(own.U * signs - U).abs().max(), (own.Vh * signs[:, None] - Vh).abs().max()]
    S = factors.S[:common].cpu()
    apart.append(((held.S[:common] - S).abs().max() / S[0].clamp_min(torch.finfo(S.dtype).tiny)).to(apart[0]))
    if max(map(float, apart)) > tolerance:
        return None
    whole = torch.ones(factors.rank, dtype=torch.float64)
    whole[:common] = signs.cpu().double()
    return whole.to(factors.U.device)


@torch.no_grad()
def _has_its_effect(adapter: AdapterFile, name: str, basis: Basis, signs: Tensor | None) -> bool:
    """Whether a layer of ``adapter`` does in a shared basis what it did where it was trained."""
    expected = adapter.effects.get(name)
    if expected is None:  # trained in shards: the sketch, which is part of the key, says that the basis is right
        return True
    held, rank = basis.held, adapter.fingerprints[name].rank
    if held.probes is None:
        held.probes = probed(Factors(U=held.factors.U, S=held.S, Vh=held.factors.Vh))
    flip = torch.ones(rank, dtype=torch.float64) if signs is None else signs.cpu().double()
    whole = held.probes
    own = Probed(
        left=whole.left[:, :rank] * flip, right=whole.right[:, :rank] * flip, shape=whole.shape, dtype=whole.dtype
    )
    exact = stored_core(adapter, name, held.S[:rank]).in_float64()
    limit = EXACT_EFFECT_TOLERANCE if adapter.form == "portable" else EFFECT_TOLERANCE
    return effect_error(effect_of(own, exact), expected) <= limit


def _fingerprint_key(adapter: AdapterFile, name: str) -> Hashable:
    """What decides which basis a layer was trained in: two adapters with the same key share one."""
    stored = adapter.fingerprints[name]
    tensors = [stored.sketch, *stored.cluster_sketches]
    if adapter.form == "portable":
        tensors += [adapter.tensors[f"factor.{name}.{part}"] for part in ("U", "S", "Vh")]
    said = [stored.weight_hash, stored.probe_seeds, stored.side, stored.clusters, adapter.dtypes[name], adapter.form]
    digest = hashlib.sha256(json.dumps(said).encode())
    for tensor in tensors:
        digest.update(weight_digest(tensor).encode())
    return digest.digest()
