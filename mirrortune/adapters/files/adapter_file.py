# SPDX-License-Identifier: Apache-2.0
"""The adapter on disk: ``adapter.safetensors`` holds every trained number and the basis sketches, ``adapter.json``
everything else. The trained numbers of a tuner of PEFT are in PEFT's own two files instead, beside ``adapter.json``.

Loading trusts none: all files must have the recorded hashes, every adapted weight of the base must have the
recorded hash, every basis must align with its sketch, and every layer must have the effect that it had when it was
saved. What fails is refused with the layer's name.

Tensors: ``core.<parameter>`` float32; where the pairing is not a function of the rank alone ``partners``, int16 or
int32 (``pair_codes.py``), or where these are no shorter ``pairs`` (T, 2), round after round; ``clusters`` for
near-equal singular values (``basis.py``): each of all layers in order (``adapter_packing.py``), and read as
``core.<layer>.<parameter>``, ``partners.<layer>`` and so on. ``effects`` (layers, 16) are probes of every layer's
effect and ``signs`` one bit for each vector of each basis; where a layer's factors are in shards, neither, but
``sketch`` (1 or 2, R) float32. ``param.<name>`` are the head and other plainly trained parameters;
``factor.<layer>.U``, ``S`` and ``Vh`` the factors, in the portable form. A weight that holds several matrices
(experts) has one more dimension in front of all of these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from mirrortune import __version__
from mirrortune.adapters.files.description import DESCRIPTION, FORMAT_VERSION, description_text, read_description
from mirrortune.adapters.files.tensors import (
    Form,
    basis_tensors,
    chosen_form,
    describe_basis,
    describe_target,
    factor_tensors,
    fingerprint_of,
    pack,
    split_effects,
    unpack,
    with_pairs,
)
from mirrortune.adapters.files.validate import (
    check_description,
    check_settings,
    check_tensors,
    largest_count,
    read_file,
    strict_json,
)
from mirrortune.adapters.fingerprint import Fingerprint
from mirrortune.adapters.inject import (
    adapter_parameters,
    attachment,
    plain_parameters,
    spectral_layers,
)
from mirrortune.adapters.layout import Layout
from mirrortune.adapters.peft_bridge import files as peft_file
from mirrortune.adapters.peft_bridge.options import objection
from mirrortune.adapters.spec import AdapterSpec, check_spec
from mirrortune.errors import ConfigError, VerificationError

_TENSORS = "adapter.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFile:
    """An adapter read from disk and found undamaged, not yet compared with any base model.

    Attributes:
        folder: where it was read.
        form: ``compact``, or ``portable`` for one that holds its factors.
        spec: how to build it.
        fingerprints: by layer, in module order.
        layouts: how the numbers of each layer's weight stand for matrices.
        weights: every name of each layer's weight in the base model's state.
        dtypes: of each layer's factors where it was trained.
        effects: probes of each layer's effect, (E, 16); none where it was trained in shards.
        tensors: as in the module's docstring, but for the effects.
        base: name, revision, commit, dtype and auto_class of the base model.
        task: the task's own description, or None for an adapter made in other people's loops.
        head: names of the head's parameters.
        extra: what else the writer recorded (max_length, ...).
        peft_config: PEFT's own description of the adapter, or None for one of ours.
        probes: of PEFT's layers, without numbers where it was trained in shards; see ``peft_file.layer_probes``.
    """

    folder: Path
    form: str
    spec: AdapterSpec
    fingerprints: dict[str, Fingerprint]
    layouts: dict[str, Layout]
    weights: dict[str, tuple[str, ...]]
    dtypes: dict[str, str]
    effects: dict[str, Tensor]
    tensors: dict[str, Tensor]
    base: dict[str, Any]
    task: dict[str, Any] | None
    head: tuple[str, ...]
    extra: dict[str, Any]
    peft_config: dict[str, Any] | None
    probes: dict[str, list[float]]


def write_adapter(
    folder: Path,
    model: nn.Module,
    fingerprints: dict[str, Fingerprint],
    *,
    base: dict[str, Any],
    task: dict[str, Any] | None,
    extra: dict[str, Any],
    form: Form = "auto",
) -> int:
    """Write all files into ``folder``, which exists; returns their size in bytes. Callers make the folder atomic.

    Args: see :func:`adapter_contents`.
    """
    files = adapter_contents(model, fingerprints, base=base, task=task, extra=extra, form=form)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return sum(map(len, files.values()))


def adapter_contents(
    model: nn.Module,
    fingerprints: dict[str, Fingerprint],
    *,
    base: dict[str, Any],
    task: dict[str, Any] | None,
    extra: dict[str, Any],
    form: Form = "auto",
) -> dict[str, bytes]:
    """The files of an adapter by name. The last is ``adapter.json``, which holds the hashes of the others: files of two
    adapters are never taken for one.

    Args:
        model: adapted.
        fingerprints: of its layers.
        base: see :class:`AdapterFile`.
        task: see :class:`AdapterFile`.
        extra: see :class:`AdapterFile`.
        form: ``compact``: cores and sketches, the basis is computed again when it is loaded; ``portable``: the factors
            too, as the layers hold them; ``auto``: see :func:`mirrortune.adapters.files.tensors.chosen_form`.
    """
    attached = attachment(model)
    is_peft = attached.spec.preset.peft is not None
    if form == "auto":
        form = chosen_form(model)
    tensors = _trained_tensors(model) | basis_tensors(model, fingerprints)
    tensors |= factor_tensors(model) if form == "portable" else {}
    layers = _describe_layers(model, fingerprints)
    if not is_peft:
        tensors, holds = pack(tensors, list(layers))
        layers = {name: {**layer, "holds": holds[name]} for name, layer in layers.items()}
    metadata = {"format": "pt"} if is_peft else {"format_version": str(FORMAT_VERSION)}
    data = save({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}, metadata)
    files = {_tensor_file(attached.spec): data}
    if is_peft:
        config = peft_file.peft_config(model, base)
        files[peft_file.CONFIG_FILE] = (json.dumps(config, indent=2) + "\n").encode()
    description = {
        "format_version": FORMAT_VERSION,
        "mirrortune_version": __version__,
        "form": form,
        "adapter": attached.spec.to_dict(),
        "base": base,
        "task": task,
        "layers": layers,
        "head": list(attached.targets.head),
        "plain": list(attached.targets.plain),
        "skipped": attached.targets.skipped,
        **{key: hashlib.sha256(files[name]).hexdigest() for key, name in _hashed_files(attached.spec).items()},
        **extra,
    }
    files[DESCRIPTION] = description_text(description).encode()
    return files


def outdated_files(folder: Path, names: Iterable[str]) -> list[Path]:
    """Files of the adapter in ``folder`` that a new adapter with files called ``names`` would leave behind, if they are
    as they were saved: a stale ``adapter_config.json`` would still be loaded by PEFT.
    """
    try:
        described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        known = {
            _TENSORS: "tensors_sha256",
            peft_file.TENSOR_FILE: "tensors_sha256",
            peft_file.CONFIG_FILE: "config_sha256",
        }
        paths = {folder / name: described.get(key) for name, key in known.items() if name not in names}
        return [
            p for p, digest in paths.items() if p.is_file() and hashlib.sha256(p.read_bytes()).hexdigest() == digest
        ]
    except (OSError, ValueError, AttributeError, RecursionError):
        return []  # no adapter of ours


def _describe_layers(model: nn.Module, fingerprints: dict[str, Fingerprint]) -> dict[str, dict[str, Any]]:
    attached, held = attachment(model), spectral_layers(model)
    probes = peft_file.layer_probes(model) if attached.spec.preset.peft is not None else {}
    return {
        name: {
            **describe_target(name, target),
            **describe_basis(fingerprints[name], probes.get(name)),
            **({"dtype": str(held[name].U.dtype).removeprefix("torch.")} if name in held else {}),
        }
        for name, target in attached.targets.layers.items()
    }


def read_adapter(folder: Path) -> AdapterFile:
    """Read and check an adapter folder.

    Raises:
        VerificationError: files are missing, damaged, or in another format.
    """
    description = read_description(folder)
    try:
        spec = AdapterSpec(**description["adapter"])
        is_peft = spec.preset.peft is not None
        check_description(description, has_basis=not is_peft)
        check_spec(spec)
        files = {name: _read_file(folder / name, description[key]) for key, name in _hashed_files(spec).items()}
        tensors = load(files[_tensor_file(spec)])
        layers = description["layers"]
        if not is_peft:
            tensors = unpack(tensors, layers)
            check_tensors(description, tensors)
            tensors = with_pairs(tensors, layers)
        peft_config = strict_json(files[peft_file.CONFIG_FILE]) if is_peft else None
        rank = peft_config.get(spec.preset.peft.rank) if spec.preset.peft and peft_config else spec.rank
        check_settings(rank, spec.options, largest := largest_count(layers, tensors))
        if peft_config is not None and (problem := objection(peft_config, largest)):
            raise VerificationError(str(folder), problem, fix="Save the adapter again without it")
        layouts = {name: Layout.from_dict({"rows": None, **layer["layout"]}) for name, layer in layers.items()}
        return AdapterFile(
            folder=folder,
            form=description["form"],
            spec=spec,
            fingerprints={n: fingerprint_of(layer, None if is_peft else n, tensors) for n, layer in layers.items()},
            layouts=layouts,
            weights={name: tuple(layer.get("tensors", [f"{name}.weight"])) for name, layer in layers.items()},
            dtypes={name: layer.get("dtype", description["base"].get("dtype")) for name, layer in layers.items()},
            effects=split_effects(tensors.pop("effects", None), layouts),
            tensors=tensors,
            base=description["base"],
            task=description["task"],
            head=tuple(description["head"]),
            extra={k: v for k, v in description.items() if k in ("max_length",)},
            peft_config=peft_config,
            probes={name: layer["response"] for name, layer in layers.items() if is_peft},
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError, SafetensorError, ConfigError,
            RuntimeError, OverflowError, MemoryError) as error:  # fmt: skip
        raise VerificationError(
            str(folder / DESCRIPTION), f"damaged ({type(error).__name__}: {error})", fix="Restore the adapter folder"
        ) from error


@torch.no_grad()
def restore_trained(model: nn.Module, adapter: AdapterFile, *, remarks: list[str] | None = None) -> None:
    """Copy stored numbers into an adapted model: ``core.*`` and ``param.*``, or all that PEFT's file holds.

    A layer of PEFT that computes something else than it did is noted in ``remarks``, if there is such a list.

    Raises:
        VerificationError: if names or shapes differ from what the model trains, a number is not finite, or a layer of
            PEFT then computes something else.
    """
    tensors, where = adapter.tensors, str(adapter.folder)
    wanted = _trained_tensors(model)
    is_peft = attachment(model).spec.preset.peft is not None
    stored = {n: t for n, t in tensors.items() if is_peft or n.startswith(("core.", "param."))}
    if stored.keys() != wanted.keys():
        odd = sorted(stored.keys() ^ wanted.keys())[0]
        place = "only in the adapter" if odd in stored else "missing from the adapter"
        raise VerificationError(where, f"tensor '{odd}' is {place}", fix="Use the model that the adapter was made for")
    for name, parameter in wanted.items():
        found = checked_tensor(adapter, name, parameter.shape)
        if not is_peft:
            parameter.copy_(found)
    if is_peft:
        peft_file.restore_tensors(model, stored)
        try:
            peft_file.check_probes(model, adapter.probes)
        except VerificationError as error:
            if remarks is None:
                raise
            remarks.append(str(error))


def checked_tensor(adapter: AdapterFile, name: str, shape: Sequence[int]) -> Tensor:
    """A tensor of the file; refused if it is missing, of another ``shape``, or not finite."""
    where, found = str(adapter.folder), adapter.tensors.get(name)
    if found is None:
        raise VerificationError(where, f"tensor '{name}' is missing from the adapter", fix="Restore the adapter folder")
    if tuple(found.shape) != tuple(shape):
        raise VerificationError(where, f"tensor '{name}' has shape {tuple(found.shape)}", allowed=str(tuple(shape)))
    if not torch.isfinite(found).all():
        raise VerificationError(where, f"tensor '{name}' holds NaN or infinities", fix="Restore the adapter folder")
    return found


def _trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    if attachment(model).spec.preset.peft is not None:
        return peft_file.adapter_tensors(model)
    tensors: dict[str, Tensor] = {f"core.{n}": p for n, p in adapter_parameters(model).items()}
    return tensors | {f"param.{n}": p for n, p in plain_parameters(model).items()}


def _tensor_file(spec: AdapterSpec) -> str:
    return peft_file.TENSOR_FILE if spec.preset.peft else _TENSORS


def _hashed_files(spec: AdapterSpec) -> dict[str, str]:
    """Key of its hash in the description -> name of the file."""
    config = {"config_sha256": peft_file.CONFIG_FILE} if spec.preset.peft else {}
    return {"tensors_sha256": _tensor_file(spec), **config}


def _read_file(path: Path, sha256: str) -> bytes:
    data = read_file(path)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise VerificationError(
            str(path), "damaged: its hash is not the one in adapter.json", fix="Restore the adapter folder"
        )
    return data
