# SPDX-License-Identifier: Apache-2.0
"""Hold the factors of a base weight once for all adapters of a bank.

The adapters of a weight were trained in the same singular basis up to signs; an adapter of lower rank uses its first
directions. A basis is therefore shared if its vectors agree up to signs, and each adapter stores which vectors to flip.
A second basis is held only if it really differs: another driver may mix directions of nearly equal singular values
differently, or factors may have been rounded to another dtype.

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
from mirrortune.system.devices import to_float64

# Two unit vectors whose entries differ by at most this, a few float32 rounding errors, count as equal.
_SAME = 5e-7
_KEPT_CORES = 128  # per weight
_LARGEST_SHORT = 2**15
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CoreDesign:
    """What a layer's core is built from, besides singular values and pairs.

    Attributes:
        spec: adapter specification with the name and options of the core.
        layer: name of the layer.
        shape: shape of the weight, (O, I).
        rank: number of directions of the core.
        design: key that is equal for cores that differ only in parameter values and pairs.
    """

    spec: AdapterSpec
    layer: str
    shape: tuple[int, int]
    rank: int
    design: str


class Held:
    """Immutable factors in the form that layers compute with, and objects that are derived from them once.

    Args:
        factors: u and Vh on the device and in the dtype of the model, S on the device in float32.
        S: singular values in float64 on the CPU.
    """

    def __init__(self, factors: Factors, S: Tensor) -> None:
        self.factors, self.S = factors, S
        self._probes: Probed | None = None
        self._cores: OrderedDict[Hashable, Core] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def rank(self) -> int:
        """Number of directions held, R."""
        return self.factors.rank

    def leading(self, rank: int) -> Factors:
        """Return views of the first ``rank`` directions."""
        held = self.factors
        return Factors(U=held.U[:, :rank], S=held.S[:rank], Vh=held.Vh[:rank])

    def core(self, design: CoreDesign, pairs: Tensor | None) -> Core:
        """Return the untrained core of a layer, on the device of the factors.

        Only the most recent cores are cached, because a core with its own pairs takes several times the memory of its
        trained parameters.

        Args:
            design: design of the core.
            pairs: pairs from :func:`encoded`, or None if they follow from the rank.
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
        """Return the products of the first ``rank`` directions, flipped by ``signs``, with the probes of an effect."""
        if self._probes is None:
            self._probes = probed(Factors(U=self.factors.U, S=self.S, Vh=self.factors.Vh))
        whole = self._probes
        flip = torch.ones(rank, dtype=torch.float64) if signs is None else signs.cpu().double()
        left, right = whole.left[:, :rank] * flip, whole.right[:, :rank] * flip
        return Probed(left=left, right=right, shape=whole.shape)


@dataclass(slots=True, eq=False)
class Basis:
    """One basis of a weight.

    Attributes:
        dtype: dtype to which the factors were rounded when the adapters were trained.
        held: factors; replaced as one object when an adapter needs more directions.
    """

    dtype: str
    held: Held


class LayerBases:
    """The bases of one weight.

    Args:
        model: base model.
        target: location of the weight, with the largest rank requested so far.
    """

    def __init__(self, model: nn.Module, target: Target) -> None:
        self.model, self.target = model, target
        self.bases: list[Basis] = []
        self._known: dict[Hashable, tuple[Basis, Tensor | None]] = {}
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Memory of the factors in bytes."""
        parts = [t for b in self.bases for t in (b.held.factors.U, b.held.factors.S, b.held.factors.Vh)]
        return sum(t.numel() * t.element_size() for t in parts)

    def match(
        self, adapter: AdapterFile, design: CoreDesign, pairs: Tensor | None, source: FactorSource
    ) -> tuple[Basis, Tensor | None]:
        """Find or add the basis that a layer of ``adapter`` was trained in, with all checks of ``load_adapter``.

        Returns:
            The basis, and the signs (R,) by which its vectors differ from the trained ones, or None if they are equal.

        Raises:
            VerificationError: the weight is not the trained one, the basis cannot be aligned, or the layer's effect
                differs from that in training.
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
        """Return a basis that agrees with ``factors``, extended if it has fewer directions, or else add a new one."""
        dtype = adapter.dtypes[name]
        like = weight if self.target.kind.is_quantised else self.target.weight(self.model)
        cast = factors.to(device=like.device, dtype=like.dtype)
        tolerance = 0.0 if adapter.form == "portable" else _SAME
        for basis in self.bases:
            signs = _signs_between(basis.held, factors, cast, tolerance) if basis.dtype == dtype else None
            if signs is None:
                continue
            if factors.rank > basis.held.rank:
                basis.held = _held(factors.flipped(signs), like)
            return basis, None if bool((signs > 0).all()) else signs.float().cpu()
        basis = Basis(dtype=dtype, held=_held(factors, like))
        self.bases.append(basis)
        return basis, None


def _held(factors: Factors, like: Tensor) -> Held:
    cast = factors.to(device=like.device, dtype=like.dtype)
    held = Factors(U=cast.U.contiguous(), S=factors.S.to(like.device, torch.float32), Vh=cast.Vh.contiguous())
    return Held(held, factors.S.cpu())


def _signs_between(held: Held, factors: Factors, cast: Factors, tolerance: float) -> Tensor | None:
    """Return the signs by which ``factors`` and a basis differ in their common directions, or None if they differ more.

    Args:
        held: factors of the basis.
        factors: factors of another adapter in float64.
        cast: these factors in the dtype and on the device of the basis.
        tolerance: largest allowed difference of an entry.

    Returns:
        Signs of shape (R,) in float64, with ones for directions that the two do not have in common.
    """
    common = min(held.rank, factors.rank)
    own = held.leading(common)
    U, Vh = cast.U[:, :common], cast.Vh[:common]
    signs = torch.where((to_float64(own.U) * to_float64(U)).sum(dim=0) < 0, -1.0, 1.0).to(U)
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
    """Return whether a layer of ``adapter`` has the same effect in a shared basis as in training."""
    name = design.layer
    core = basis.held.core(design, pairs)
    numbers = {
        key: checked_tensor(adapter, f"core.{name}.{key}", parameter.shape).double()
        for key, parameter in core.named_parameters()
        if parameter.numel()
    }
    expected = adapter.effects.get(name)
    if expected is None:  # trained in shards: the sketch, which is part of the key, identifies the basis
        return True
    exact = stand_in(core.in_float64(), numbers)
    limit = EXACT_EFFECT_TOLERANCE if adapter.form == "portable" else EFFECT_TOLERANCE
    return effect_error(effect_of(basis.held.probes(design.rank, signs), exact), expected) <= limit


def _fingerprint_key(adapter: AdapterFile, name: str) -> Hashable:
    """Return a key of the basis that a layer was trained in; adapters with the same key share a basis."""
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
    """Encode ``pairs`` (T, 2) compactly, as partners (P,) if possible, and in 16 bits if the indices fit."""
    partners = partners_of(pairs, rank)
    found = pairs if partners is None else partners
    return found.to(torch.int16 if rank <= _LARGEST_SHORT else torch.int32).contiguous()


def decoded(stored: Tensor, rank: int) -> Tensor:
    """Decode pairs from :func:`encoded` to shape (T, 2), int64."""
    return pairs_of(stored, rank) if stored.dim() == 1 else stored.long()


def stand_in(module: M, tensors: Mapping[str, Tensor], plain: type[M] | None = None) -> M:
    """Return a shallow copy of ``module`` in which ``tensors`` replace the parameters and buffers of the same names.

    The module is not changed, so other threads may use it at the same time.

    Args:
        module: module to copy.
        tensors: replacements by name.
        plain: class of the copy; that of the module by default.
    """
    kind = plain or type(module)
    copied = kind.__new__(kind)
    copied.__dict__.update(module.__dict__)
    for unwanted in ("forward", "_mirrortune_seat"):
        copied.__dict__.pop(unwanted, None)
    for kept, own in (("_parameters", module._parameters), ("_buffers", module._buffers)):  # noqa: SLF001
        copied.__dict__[kept] = {name: tensors.get(name, t) for name, t in own.items()}
    return copied
