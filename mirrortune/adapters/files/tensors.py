# SPDX-License-Identifier: Apache-2.0
"""Convert between layers and the tensors and descriptions in the files of an adapter."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mirrortune.adapters.effect import EFFECT_TOLERANCE, effect, effect_error
from mirrortune.adapters.fingerprint import Fingerprint, redrawn
from mirrortune.adapters.inject import SpectralLayer, attachment, spectral_layers
from mirrortune.adapters.kinds import is_plain
from mirrortune.adapters.layout import Layout
from mirrortune.adapters.pairings.encoding import pairs_of, partners_of
from mirrortune.adapters.plain import RowRange
from mirrortune.adapters.spec import follows_from_rank
from mirrortune.adapters.svd import Factors
from mirrortune.adapters.targets import Target
from mirrortune.errors import VerificationError
from mirrortune.system.distributed.sharding import is_whole

_KINDS = ("core", "clusters", "pairs", "partners", "sketch")
_SIGNS = "signs"
_FIRST = 1024  # numbers
_NUM_SAMPLES = 64  # at most twice as many, of each weight
_ROUNDING = (2**-7, 2**-24)  # of a cast to 16 bits, relative and absolute

Holds = dict[str, dict[str, list[int]]]
"""Layer -> name of a joined tensor -> shape of the layer's part of it."""


def check_tied(model: nn.Module, target: Target, names: Iterable[str]) -> None:
    """Check that a weight that had several names in training is one tensor in ``model`` too; names may be missing.

    Otherwise the adapter would change only one of the model's tensors.

    Raises:
        VerificationError: it is not.
    """
    if others := set(names) - set(target.tensors):
        held = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        if untied := sorted(others & held):
            raise VerificationError(
                untied[0], f"the adapter was trained where it is tied to {target.tensors[0]}, and here it is not",
                fix="Load the base with tied weights (config.tie_word_embeddings)",
            )  # fmt: skip


def tied_names(model: nn.Module, trained: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the other names of those of the ``trained`` parameters, or of the matrices of trained rows, that have
    several in ``model``, which has no adapter.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    several = {own[0]: tuple(own[1:]) for own in names.values() if len(own) > 1}
    found = {name: name if (rows := RowRange.parse(name)) is None else rows.weight for name in trained}
    return {name: several[weight] for name, weight in found.items() if weight in several}


def check_trained_tied(model: nn.Module, tied: Mapping[str, Sequence[str]]) -> None:
    """Check that parameters that were trained as they are under several names are tied in ``model`` too.

    Otherwise only one of the model's tensors would be restored.

    Args:
        model: model without adapter.
        tied: result of :func:`tied_names` in training; ``model`` may lack the other names.

    Raises:
        VerificationError: they are not.
    """
    held = dict(model.named_parameters(remove_duplicate=False)) if tied else {}
    for name, others in tied.items():
        weight = name if (rows := RowRange.parse(name)) is None else rows.weight
        if untied := next((other for other in others if other in held and held[other] is not held.get(weight)), None):
            raise VerificationError(
                untied, f"the adapter was trained where it is tied to {weight}, and here it is not",
                fix="Load the base with tied weights (config.tie_word_embeddings)",
            )  # fmt: skip


def sampled_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return a few values of the base weight of each adapted layer, (N,) float64, for :func:`changed_weights`.

    Weights that are quantised, sharded or without values are left out.
    """
    weights = {
        name: getattr(getattr(layer, "base_layer", None), "weight", None)
        for name, layer in attachment(model).layers.items()
    }
    return {
        name: weight.detach().reshape(-1)[:: -(-weight.numel() // _NUM_SAMPLES)].cpu().double()
        for name, weight in weights.items()
        if isinstance(weight, Tensor) and is_plain(weight) and is_whole(weight) and not weight.is_meta and len(weight)
    }


def changed_weights(model: nn.Module, before: Mapping[str, Tensor]) -> list[str]:
    """Return the layers whose base weight differs from its earlier samples by more than a cast to 16 bits."""
    relative, absolute = _ROUNDING
    return [
        name
        for name, now in sampled_weights(model).items()
        if (own := before.get(name)) is not None and own.shape == now.shape
        and not ((now - own).abs() <= relative * own.abs() + absolute).all()
    ]  # fmt: skip


def rounding_of(*tensors: Tensor) -> torch.dtype:
    """Return the narrowest dtype that holds the values of all tensors, which have one dtype, exactly.

    It is narrower than their own if the model was cast (``model.half().float()``).
    """
    own = tensors[0].dtype
    if not all(is_whole(tensor) and tensor.numel() for tensor in tensors):
        return own
    values = [tensor.detach() for tensor in tensors]
    firsts = [tensor.reshape(-1)[:_FIRST] for tensor in values]  # nearly always enough to tell
    narrower = [t for t in (torch.bfloat16, torch.float16, torch.float32) if torch.finfo(t).eps > torch.finfo(own).eps]
    return next((t for t in narrower if all(_holds(t, part) for part in (*firsts, *values))), own)


def _holds(dtype: torch.dtype, values: Tensor) -> bool:
    return torch.equal(values.to(dtype).to(values.dtype), values)


def pack_tensors(tensors: Mapping[str, Tensor], layers: Sequence[str]) -> tuple[dict[str, Tensor], Holds]:
    """Flatten and join the tensors of all layers into one tensor for each name.

    Args:
        tensors: ``core.<layer>.<parameter>``, ``clusters.<layer>`` and so on; other tensors are not changed.
        layers: layer names, in order.

    Returns:
        The tensors, and the shape of each layer's part of the joined tensors.
    """
    places = {name: index for index, name in enumerate(layers)}
    kept: dict[str, Tensor] = {}
    own: list[tuple[int, str, str, Tensor]] = []
    for key, tensor in tensors.items():
        kind, _, rest = key.partition(".")
        name = _layer_of(rest, places) if kind in _KINDS else None
        if name is None:
            kept[key] = tensor
        else:
            own.append((places[name], kind + rest.removeprefix(name), name, tensor))
    holds: Holds = {name: {} for name in layers}
    parts: dict[str, list[Tensor]] = {}
    for _, key, name, tensor in sorted(own, key=lambda part: part[:2]):
        parts.setdefault(key, []).append(tensor.detach().cpu().reshape(-1))
        holds[name][key] = list(tensor.shape)
    return kept | {key: torch.cat(flat) for key, flat in parts.items()}, holds


def _layer_of(name: str, layers: Container[str]) -> str | None:
    """Return the longest layer name that is a prefix of ``name``."""
    while name and name not in layers:
        name = name.rpartition(".")[0]
    return name or None


def unpack_tensors(tensors: Mapping[str, Tensor], layers: Mapping[str, Any]) -> dict[str, Tensor]:
    """Invert :func:`pack_tensors`, and split ``signs`` into ``signs.<layer>``.

    Args:
        tensors: tensors of a file.
        layers: descriptions of the layers, with ``holds``.

    Raises:
        ValueError: the size of a tensor is not that of the layers' parts, or it belongs to no layer.
    """
    used: Counter[str] = Counter()
    found: dict[str, Tensor] = {}

    def take(key: str, count: int) -> Tensor:
        start = used[key]
        used[key] += count
        if key not in tensors or tensors[key].dim() != 1 or used[key] > tensors[key].numel():
            raise ValueError(f"'{key}' is missing or too short")
        return tensors[key][start : used[key]]

    if _SIGNS in tensors and tensors[_SIGNS].dtype != torch.uint8:
        raise ValueError(f"the dtype {tensors[_SIGNS].dtype} of tensor 'signs' is invalid")
    for name, layer in layers.items():
        for key, shape in layer["holds"].items():
            kind, dot, rest = key.partition(".")
            found[f"{kind}.{name}{dot}{rest}"] = take(key, math.prod(shape)).reshape(shape)
        if _SIGNS in tensors:
            count = layer["layout"].get("count", 1)
            bits = take(_SIGNS, count * -(-layer["rank"] // 8))
            found[f"{_SIGNS}.{name}"] = _to_signs(bits.reshape(count, -1), layer["rank"])
    for key, tensor in tensors.items():
        if key not in used and key.partition(".")[0] not in (*_KINDS, _SIGNS):
            found[key] = tensor
        elif tensor.numel() != used[key] or key not in used:
            raise ValueError(f"tensor '{key}' is invalid: no layer holds it, or not all of it")
    return found


def to_bits(sketch: Tensor) -> Tensor:
    """Encode the signs in the first row of a sketch (1 or 2, R) or (E, 1 or 2, R) as bits, in uint8, with each matrix
    padded to a full byte.
    """
    first = sketch.detach().cpu()[..., 0, :].reshape(-1, sketch.shape[-1])
    return torch.from_numpy(np.packbits((first < 0).numpy(), axis=1, bitorder="little").reshape(-1))


def _to_signs(bits: Tensor, rank: int) -> Tensor:
    """Decode bits (E, bytes) into 1 and -1, (1, R) or (E, 1, R)."""
    found = np.unpackbits(bits.numpy(), axis=1, bitorder="little", count=rank)
    signs = 1 - 2 * torch.from_numpy(found).float()
    return signs[:, None] if len(signs) > 1 else signs


Form = Literal["auto", "compact", "portable"]
_LARGEST_SHORT = 2**15  # directions, numbered from 0
_LOW = 8  # if at most one in this many directions is kept, factors are small compared with weights
_SVD_WORK = 22  # floating-point operations of a decomposition, in units of O I min(O, I) (Golub and Van Loan, 8.6)
_LONG_WORK = 2e12  # floating-point operations: one to two minutes on two cores of a laptop, in float64
_PLAIN_LAYOUT = {"count": 1, "is_transposed": False, "rows": None}


def fingerprint_of(layer: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> Fingerprint:
    """Return the stored fingerprint of the layer ``name``; raise a ValueError if its tensors do not match ``layer``."""
    flat, signs = tensors.get(f"clusters.{name}", torch.zeros(0)), tensors.get(f"signs.{name}")
    sketch = tensors[f"sketch.{name}"] if signs is None else signs
    if not (torch.isfinite(flat).all() and torch.isfinite(sketch).all()):
        raise ValueError(f"the sketch of '{name}' holds NaN or infinities")
    clusters = tuple(tuple((int(a), int(b)) for a, b in own) for own in layer.get("clusters", ()))
    sizes = [sum(2 * (b - a) ** 2 for a, b in own) * (2 if layer["side"] == "both" else 1) for own in clusters]
    if flat.dim() != 1 or len(flat) != sum(sizes):
        raise ValueError(f"the clusters of '{name}' have {flat.numel()} numbers, got {sum(sizes)}")
    return Fingerprint(
        weight_hash=layer["weight"],
        probe_seeds=tuple(layer["probe_seeds"]),
        side=layer["side"],
        sketch=sketch,
        clusters=clusters,
        cluster_sketches=tuple(torch.split(flat, sizes)),
        has_sizes=signs is None,
    )


def split_effects(stored: Tensor | None, layouts: dict[str, Layout]) -> dict[str, Tensor]:
    """Return the stored effects of each layer, (E, 16)."""
    if stored is None:
        return {}
    parts = torch.split(stored, [layout.count for layout in layouts.values()])
    return dict(zip(layouts, parts, strict=True))


def basis_tensors(model: nn.Module, fingerprints: dict[str, Fingerprint]) -> dict[str, Tensor]:
    """Return sketches or their signs, pairs, and effect probes of all layers; see ``adapter_file.py``."""
    spec = attachment(model).spec
    tensors: dict[str, Tensor] = {}
    effects: list[Tensor] = []
    for name, layer in spectral_layers(model).items():
        found = fingerprints[name]
        if any(found.clusters):
            tensors[f"clusters.{name}"] = torch.cat(found.cluster_sketches)
        pairs = getattr(layer.core, "pairs", None)
        if isinstance(pairs, Tensor) and not follows_from_rank(pairs.cpu(), spec, layer.rank, layer.layout.count):
            partners = partners_of(pairs, layer.rank) if pairs.dim() == 2 else None
            stored = pairs if partners is None else partners
            kind = "pairs" if partners is None else "partners"
            tensors[f"{kind}.{name}"] = stored.to(torch.int16 if layer.rank <= _LARGEST_SHORT else torch.int32)
        if is_whole(layer.U):  # the effect cannot be computed from a shard
            effects.append(effect(_factors(layer), layer.core))
    own = {f"sketch.{name}": fingerprints[name].sketch for name in spectral_layers(model)}
    if len(effects) == len(own) > 0:
        # The effects verify the basis, so only the signs of its sketch are needed, to flip vectors back.
        return {**tensors, "effects": torch.cat(effects).float(), "signs": torch.cat([*map(to_bits, own.values())])}
    return tensors | own


def with_pairs(tensors: Mapping[str, Tensor], layers: Mapping[str, Any]) -> dict[str, Tensor]:
    """Replace the encoded partners in the checked tensors of a file by pairs."""
    pairs = {
        f"pairs.{name}": pairs_of(tensors[key], layer["rank"])
        for name, layer in layers.items()
        if (key := f"partners.{name}") in tensors
    }
    return {**{key: t for key, t in tensors.items() if not key.startswith("partners.")}, **pairs}


def usual_form(sizes: Iterable[tuple[tuple[int, int], int, int]]) -> Literal["compact", "portable"]:
    """Return the default form of an adapter whose bases can be computed again.

    It is compact, unless computing them takes minutes at each load and the factors are small.

    Args:
        sizes: shape (O, I), rank and number of matrices of each layer.
    """
    found = list(sizes)
    is_low = bool(found) and all(_LOW * rank <= min(shape) for shape, rank, _ in found)
    work = sum(_SVD_WORK * shape[0] * shape[1] * min(shape) * count for shape, _, count in found)
    return "portable" if is_low and work > _LONG_WORK else "compact"


@torch.no_grad()
def chosen_form(model: nn.Module) -> Literal["compact", "portable"]:
    """Return the default form of an adapter.

    It is portable if the bases are not those of the weights, or if one cannot be reproduced and a different one would
    change the adapter's effect; compact if the factors are sharded; otherwise :func:`usual_form`.
    """
    if attachment(model).spec.basis == "gradient":
        return "portable"
    layers = spectral_layers(model).values()
    if not all(is_whole(layer.U) for layer in layers):  # no process has the complete factors
        return "compact"
    usual = usual_form((layer.layout.matrix_shape, layer.rank, layer.layout.count) for layer in layers)
    return usual if all(map(_can_be_found_again, layers)) else "portable"


def _can_be_found_again(layer: SpectralLayer) -> bool:
    factors = _factors(layer)
    found = [(matrix, redrawn(matrix)) for matrix in factors.each()]
    if all(other is None for _, other in found):
        return True
    each = [(other or matrix).to(device=torch.device("cpu"), dtype=torch.float64) for matrix, other in found]
    mixed = Factors.stacked(each) if factors.is_stack else each[0]
    return effect_error(effect(mixed, layer.core), effect(factors, layer.core)) <= EFFECT_TOLERANCE


def factor_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the factors of all layers, in the dtype of the layers."""
    return {
        f"factor.{name}.{key}": tensor
        for name, layer in spectral_layers(model).items()
        for key, tensor in (("U", layer.U), ("S", layer.core.get_buffer("S")), ("Vh", layer.Vh))
    }


def _factors(layer: SpectralLayer) -> Factors:
    return Factors(U=layer.U, S=layer.core.get_buffer("S"), Vh=layer.Vh)


def describe_target(name: str, target: Target) -> dict[str, Any]:
    """Return the part of a layer's description with its kind, the names of its weight, and its layout."""
    layout = {k: v for k, v in asdict(target.layout).items() if v != _PLAIN_LAYOUT.get(k, ...)}
    tensors = {} if target.tensors == (f"{name}.weight",) else {"tensors": list(target.tensors)}
    return {"kind": target.kind.name, **tensors, "layout": layout}


def describe_basis(found: Fingerprint) -> dict[str, Any]:
    """Return the part of a layer's description with the fingerprint of its weight and basis."""
    return {
        "rank": found.rank,
        "weight": found.weight_hash,
        "probe_seeds": list(found.probe_seeds),
        "side": found.side,
        **({"clusters": [list(map(list, own)) for own in found.clusters]} if any(found.clusters) else {}),
    }
