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
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from mirrortune.adapters.core import Core
from mirrortune.adapters.effect import EFFECT_TOLERANCE, EXACT_EFFECT_TOLERANCE, Probed, effect_error, effect_of, probed
from mirrortune.adapters.files.adapter_file import AdapterFile, checked_tensor
from mirrortune.adapters.files.load import trained_factors
from mirrortune.adapters.fingerprint import weight_digest
from mirrortune.adapters.inject import FactorSource
from mirrortune.adapters.pairings.encoding import pairs_of, partners_of
from mirrortune.adapters.spec import AdapterSpec, build_core
from mirrortune.adapters.svd import Factors
from mirrortune.adapters.targets import Target

# Largest difference of an entry of two unit vectors that are taken for one: a few roundings of float32.
_SAME = 5e-7
_KEPT_CORES = 128  # of each weight
_LARGEST_SHORT = 2**15
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CoreDesign:
    """What a layer's core is built from, besides singular values and pairs.

    Attributes:
        spec: names the core and its options.
        layer: its name.
        shape: (O, I) of the weight.
        rank: directions of the core.
        design: equal for cores that differ in their numbers and pairs alone.
    """

    spec: AdapterSpec
    layer: str
    shape: tuple[int, int]
    rank: int
    design: str


class Held:
    """Factors as layers compute with them, and what is made from them once. The factors never change.

    Args:
        factors: U and Vh on the device and in the dtype of the model, S in float32 on the device.
        S: float64, on the CPU.
    """

    def __init__(self, factors: Factors, S: Tensor) -> None:
        self.factors, self.S = factors, S
        self._probes: Probed | None = None
        self._cores: OrderedDict[Hashable, Core] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def rank(self) -> int:
        """R, the number of directions held."""
        return self.factors.rank

    def leading(self, rank: int) -> Factors:
        """Return the first ``rank`` directions; views."""
        held = self.factors
        return Factors(U=held.U[:, :rank], S=held.S[:rank], Vh=held.Vh[:rank])

    def core(self, design: CoreDesign, pairs: Tensor | None) -> Core:
        """Return the untrained core of a layer, on the device of the factors.

        The last ones are kept: those with pairs of their own take several times the memory of their trained numbers.

        Args:
            design: of the core.
            pairs: :func:`encoded`, where they do not follow from the rank.
        """
        key = design.design, None if pairs is None else pairs.numpy().tobytes()
        with self._lock:
            core = self._cores.get(key)
            if core is not None:
                self._cores.move_to_end(key)
                return core
        own = None if pairs is None else decoded(pairs, design.rank)
        core = build_core(design.spec, self.S[: design.rank], design.layer, design.shape, own)
        core = core.to(self.factors.U.device).requires_grad_(requires_grad=False)
        with self._lock:
            self._cores[key] = core
            if len(self._cores) > _KEPT_CORES:
                self._cores.popitem(last=False)
        return core

    def probes(self, rank: int, signs: Tensor | None) -> Probed:
        """Return products of the first ``rank`` directions, flipped by ``signs``, with the probes of an effect."""
        if self._probes is None:
            self._probes = probed(Factors(U=self.factors.U, S=self.S, Vh=self.factors.Vh))
        whole = self._probes
        flip = torch.ones(rank, dtype=torch.float64) if signs is None else signs.cpu().double()
        left, right = whole.left[:, :rank] * flip, whole.right[:, :rank] * flip
        return Probed(left=left, right=right, shape=whole.shape, dtype=whole.dtype)


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

    def match(
        self, adapter: AdapterFile, design: CoreDesign, pairs: Tensor | None, source: FactorSource
    ) -> tuple[Basis, Tensor | None]:
        """Find, or add, the basis that a layer of ``adapter`` was trained in, with every check of ``load_adapter``.

        Returns:
            The basis, and the signs (R,) by which its vectors differ from the trained ones, or None for no difference.

        Raises:
            VerificationError: another weight, a basis that cannot be aligned, or another effect than the trained one's.
        """
        name = design.layer
        key = _fingerprint_key(adapter, name)
        found = self._known.get(key)
        if found is not None and _has_its_effect(adapter, design, pairs, *found):
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
        like = weight if self.target.kind.is_quantised else self.target.weight(self.model)
        cast = factors.to(device=like.device, dtype=like.dtype)
        tolerance = 0.0 if adapter.form == "portable" else _SAME
        for basis in self.bases:
            signs = _signs_between(basis.held, factors, cast, tolerance) if basis.dtype == dtype else None
            if signs is None:
                continue
            if factors.rank > basis.held.rank:
                grown = Factors(U=factors.U * signs, S=factors.S, Vh=factors.Vh * signs[:, None])
                basis.held = _held(grown, like)
            return basis, None if bool((signs > 0).all()) else signs.float().cpu()
        basis = Basis(dtype=dtype, held=_held(factors, like))
        self.bases.append(basis)
        return basis, None


def _held(factors: Factors, like: Tensor) -> Held:
    cast = factors.to(device=like.device, dtype=like.dtype)
    held = Factors(U=cast.U.contiguous(), S=factors.S.to(like.device, torch.float32), Vh=cast.Vh.contiguous())
    return Held(held, factors.S.cpu())


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
def _has_its_effect(
    adapter: AdapterFile, design: CoreDesign, pairs: Tensor | None, basis: Basis, signs: Tensor | None
) -> bool:
    """Whether a layer of ``adapter`` does in a shared basis what it did where it was trained."""
    name = design.layer
    core = basis.held.core(design, pairs)
    numbers = {
        key: checked_tensor(adapter, f"core.{name}.{key}", parameter.shape).double()
        for key, parameter in core.named_parameters()
        if parameter.numel()
    }
    expected = adapter.effects.get(name)
    if expected is None:  # trained in shards: the sketch, which is part of the key, says that the basis is right
        return True
    exact = stand_in(core.in_float64(), numbers)
    limit = EXACT_EFFECT_TOLERANCE if adapter.form == "portable" else EFFECT_TOLERANCE
    return effect_error(effect_of(basis.held.probes(design.rank, signs), exact), expected) <= limit


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


def encoded(pairs: Tensor, rank: int) -> Tensor:
    """Return ``pairs`` (T, 2) in the least memory: partners where there are some, (P,), in 16 bits if they fit."""
    partners = partners_of(pairs, rank)
    found = pairs if partners is None else partners
    return found.to(torch.int16 if rank <= _LARGEST_SHORT else torch.int32).contiguous()


def decoded(stored: Tensor, rank: int) -> Tensor:
    """Return the pairs (T, 2), int64, of :func:`encoded`."""
    return pairs_of(stored, rank) if stored.dim() == 1 else stored.long()


def stand_in(module: M, tensors: Mapping[str, Tensor], plain: type[M] | None = None) -> M:
    """Return a shallow copy of ``module`` with ``tensors`` in place of its parameters and buffers of these names.

    The module itself is not touched, so that other threads may use it meanwhile.

    Args:
        module: to copy.
        tensors: by name.
        plain: the class of the copy; by default the module's own.
    """
    kind = plain or type(module)
    copied = kind.__new__(kind)
    copied.__dict__.update(module.__dict__)
    for unwanted in ("forward", "_mirrortune_seat"):
        copied.__dict__.pop(unwanted, None)
    for kept, own in (("_parameters", module._parameters), ("_buffers", module._buffers)):  # noqa: SLF001
        copied.__dict__[kept] = {name: tensors.get(name, t) for name, t in own.items()}
    return copied
