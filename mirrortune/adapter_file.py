# SPDX-License-Identifier: Apache-2.0
"""The adapter on disk: ``adapter.safetensors`` holds every trained number and the basis sketches, ``adapter.json``
everything else.

Loading trusts neither: both files must have the recorded hashes, every adapted weight of the base must have the
recorded hash, and every basis must align with its sketch. What fails is refused with the layer's name.

Tensors: ``core.<layer>.<parameter>`` float32; ``param.<name>`` the head and other plainly trained parameters;
``sketch.<layer>`` (1 or 2, R) float32; ``pairs.<layer>`` (P, 2) int32 where the pairing is not a function of the rank
alone.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from mirrortune import __version__
from mirrortune.adapters.basis import Fingerprint, align, fingerprint, weight_digest
from mirrortune.adapters.cores import Core
from mirrortune.adapters.factorize import Factors
from mirrortune.adapters.inject import (
    FactorSource,
    adapter_parameters,
    attach,
    attachment,
    plain_parameters,
    spectral_layers,
)
from mirrortune.adapters.spec import AdapterSpec, make_pairs, needs_saliency
from mirrortune.errors import VerificationError

FORMAT_VERSION = 1
_DESCRIPTION, _TENSORS = "adapter.json", "adapter.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFile:
    """An adapter read from disk and found undamaged, not yet compared with any base model.

    Attributes:
        folder: where it was read.
        spec: how to build it.
        fingerprints: by layer, in module order.
        shapes: (out_features, in_features) by layer.
        tensors: as in the module's docstring.
        base: name, revision, commit, dtype and auto_class of the base model.
        task: the task's own description, or None for an adapter made in other people's loops.
        head: names of the head's parameters.
        extra: what else the writer recorded (max_length, ...).
    """

    folder: Path
    spec: AdapterSpec
    fingerprints: dict[str, Fingerprint]
    shapes: dict[str, tuple[int, int]]
    tensors: dict[str, Tensor]
    base: dict[str, Any]
    task: dict[str, Any] | None
    head: tuple[str, ...]
    extra: dict[str, Any]


class FingerprintBook:
    """Fingerprints of a model's layers, made once (the base does not change while training) and used at every save."""

    def __init__(self) -> None:
        self.entries: dict[str, Fingerprint] = {}

    def __call__(self, name: str, weight: Tensor, factors: Factors, core: Core) -> None:
        """Note one layer; the hook for :func:`mirrortune.adapters.inject.attach`."""
        self.entries[name] = fingerprint(weight, factors, core.side)


def write_adapter(
    folder: Path,
    model: nn.Module,
    fingerprints: dict[str, Fingerprint],
    *,
    base: dict[str, Any],
    task: dict[str, Any] | None,
    extra: dict[str, Any],
) -> int:
    """Write both files into ``folder``, which exists; returns their size in bytes. Callers make the folder atomic."""
    attached = attachment(model)
    tensors = _trained_tensors(model) | _basis_tensors(model, fingerprints)
    data = save({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, {"format_version": str(FORMAT_VERSION)})
    layers = {
        name: {
            "shape": list(shape),
            "rank": fingerprints[name].sketch.shape[1],
            "weight_sha256": fingerprints[name].weight_sha256,
            "probe_seed": fingerprints[name].probe_seed,
            "side": fingerprints[name].side,
            "sigma_head": list(fingerprints[name].sigma_head),
        }
        for name, shape in attached.targets.layers.items()
    }
    description = {
        "format_version": FORMAT_VERSION,
        "mirrortune_version": __version__,
        "adapter": asdict(attached.spec),
        "base": base,
        "task": task,
        "layers": layers,
        "head": list(attached.targets.head),
        "plain": list(attached.targets.plain),
        "skipped": attached.targets.skipped,
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
        **extra,
    }
    (folder / _TENSORS).write_bytes(data)
    description["description_sha256"] = _description_digest(description)
    text = json.dumps(description, indent=1) + "\n"
    (folder / _DESCRIPTION).write_text(text, encoding="utf-8")
    return len(data) + len(text.encode())


def read_adapter(folder: Path) -> AdapterFile:
    """Read and check an adapter folder.

    Raises:
        VerificationError: files missing, damaged, or written by a newer format.
    """
    description = _read_description(folder)
    try:
        data = (folder / _TENSORS).read_bytes()
    except OSError as error:
        raise VerificationError(
            str(folder / _TENSORS), "missing or unreadable", fix="Restore the adapter folder"
        ) from error
    if hashlib.sha256(data).hexdigest() != description.get("tensors_sha256"):
        raise VerificationError(
            str(folder / _TENSORS), "damaged: its hash is not the one in adapter.json", fix="Restore the adapter folder"
        )
    try:
        tensors = load(data)
        layers = description["layers"]
        return AdapterFile(
            folder=folder,
            spec=AdapterSpec(**description["adapter"]),
            fingerprints={
                name: Fingerprint(
                    weight_sha256=layer["weight_sha256"],
                    probe_seed=layer["probe_seed"],
                    side=layer["side"],
                    sketch=tensors[f"sketch.{name}"],
                    sigma_head=tuple(layer["sigma_head"]),
                )
                for name, layer in layers.items()
            },
            shapes={name: (layer["shape"][0], layer["shape"][1]) for name, layer in layers.items()},
            tensors=tensors,
            base=description["base"],
            task=description["task"],
            head=tuple(description["head"]),
            extra={k: v for k, v in description.items() if k in ("max_length",)},
        )
    except (KeyError, TypeError, IndexError, SafetensorError) as error:
        raise VerificationError(
            str(folder / _DESCRIPTION), f"damaged ({type(error).__name__}: {error})", fix="Restore the adapter folder"
        ) from error


def load_into(model: nn.Module, adapter: AdapterFile, source: FactorSource) -> FingerprintBook:
    """Attach ``adapter`` to its base ``model`` (in place) and give it its trained numbers.

    Args:
        model: the base, in the dtype that the adapter was trained on.
        adapter: from :func:`read_adapter`.
        source: computes or remembers factors.

    Returns:
        The fingerprints, for saving again.

    Raises:
        VerificationError: another base, a basis that cannot be aligned, or tensors that do not fit; with the layer's
            name.
    """
    modules = dict(model.named_modules())
    for name, shape in adapter.shapes.items():
        weight = getattr(modules.get(name), "weight", None)
        if not isinstance(weight, Tensor) or tuple(weight.shape) != shape:
            found = tuple(weight.shape) if isinstance(weight, Tensor) else "no such layer"
            raise VerificationError(
                name,
                f"the adapter was made for a weight of shape {shape}, the base has {found}",
                fix="Use its own base model",
            )

    def checked(name: str, weight: Tensor, rank: int) -> Factors:
        stored = adapter.fingerprints.get(name)
        if stored is None:
            raise VerificationError(name, "the base has this layer, the adapter does not", fix="Use its own base model")
        if weight_digest(weight) != stored.weight_sha256:
            raise VerificationError(
                name,
                "the base weight is not the one that the adapter was trained on",
                allowed="{name} at commit {commit}, in {dtype}".format_map({"commit": "unknown", **adapter.base}),
                fix="Load that base; an adapter of another base turns the wrong directions",
            )
        return align(source(name, weight, rank), stored, name)

    book = FingerprintBook()
    pairs = stored_pairs(adapter)
    attach(model, adapter.spec, new_parameters=adapter.head, factor_source=checked, pairs=pairs, on_layer=book)
    missing = set(adapter.shapes) - set(spectral_layers(model))
    if missing:
        raise VerificationError(sorted(missing)[0], "the adapter has this layer, the base does not adapt it")
    restore_trained(model, adapter.tensors, str(adapter.folder))
    return book


def stored_pairs(adapter: AdapterFile) -> dict[str, Tensor]:
    """The pairs (P, 2) that the file holds, by layer."""
    return {n.removeprefix("pairs."): t.long() for n, t in adapter.tensors.items() if n.startswith("pairs.")}


@torch.no_grad()
def restore_trained(model: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Copy ``core.*`` and ``param.*`` tensors into an adapted model.

    Raises:
        VerificationError: if names or shapes differ from what the model trains, or a number is not finite.
    """
    wanted = _trained_tensors(model)
    stored = {n: t for n, t in tensors.items() if n.startswith(("core.", "param."))}
    if stored.keys() != wanted.keys():
        odd = sorted(stored.keys() ^ wanted.keys())[0]
        place = "only in the adapter" if odd in stored else "missing from the adapter"
        raise VerificationError(where, f"tensor '{odd}' is {place}", fix="Use the model that the adapter was made for")
    for name, parameter in wanted.items():
        if parameter.shape != stored[name].shape:
            raise VerificationError(
                where, f"tensor '{name}' has shape {tuple(stored[name].shape)}", allowed=str(tuple(parameter.shape))
            )
        if not torch.isfinite(stored[name]).all():
            raise VerificationError(where, f"tensor '{name}' holds NaN or infinities", fix="Restore the adapter folder")
        parameter.copy_(stored[name])


def _trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {f"core.{n}": p for n, p in adapter_parameters(model).items()}
    return tensors | {f"param.{n}": p for n, p in plain_parameters(model).items()}


def _basis_tensors(model: nn.Module, fingerprints: dict[str, Fingerprint]) -> dict[str, Tensor]:
    spec = attachment(model).spec
    tensors: dict[str, Tensor] = {}
    for name, layer in spectral_layers(model).items():
        tensors[f"sketch.{name}"] = fingerprints[name].sketch
        pairs = getattr(layer.core, "pairs", None)
        if isinstance(pairs, Tensor) and not _is_derived(pairs.cpu(), spec, layer.rank):
            tensors[f"pairs.{name}"] = pairs.to(torch.int32)
    return tensors


def _is_derived(pairs: Tensor, spec: AdapterSpec, rank: int) -> bool:
    """Whether ``pairs`` follow from the rank alone, so that the file need not hold them."""
    # Drawn for a name that no layer has: equal to a layer's own pairs only when the pairing ignores its generator.
    return not needs_saliency(spec) and torch.equal(pairs, make_pairs(spec, rank, ""))


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / _DESCRIPTION
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        version = description["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VerificationError(
            str(path), f"missing or damaged ({type(error).__name__})", fix="Give the folder that train wrote"
        ) from error
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise VerificationError(
            str(path), f"format version {version!r}", allowed=f"up to {FORMAT_VERSION}", fix="Upgrade mirrortune"
        )
    recorded = description.pop("description_sha256", None)
    if recorded != _description_digest(description):
        raise VerificationError(
            str(path),
            "damaged or edited: its own hash is another one",
            fix="Restore the adapter folder; a base that has moved is named with --model",
        )
    return dict(description)


def _description_digest(description: dict[str, Any]) -> str:
    """SHA-256 over everything that the file says, however it is laid out."""
    plain = json.loads(json.dumps(description))  # what a reader will find: tuples are lists, keys are text
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
