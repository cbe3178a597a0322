# SPDX-License-Identifier: Apache-2.0
"""The adapter on disk: ``adapter.safetensors`` holds every trained number and the basis sketches, ``adapter.json``
everything else. The trained numbers of a tuner of PEFT are in PEFT's own two files instead, beside ``adapter.json``.

Loading trusts none: all files must have the recorded hashes, every adapted weight of the base must have the
recorded hash, and every basis must align with its sketch. What fails is refused with the layer's name.

Tensors: ``core.<layer>.<parameter>`` float32; ``param.<name>`` the head and other plainly trained parameters;
``sketch.<layer>`` (1 or 2, R) float32; ``pairs.<layer>`` (T, 2) int32, round after round, where the pairing is not a
function of the rank alone. A weight that holds several matrices (experts) has one more dimension in front of all of
these.
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

from mirrortune import __version__, peft_file
from mirrortune.adapters.basis import Fingerprint
from mirrortune.adapters.inject import (
    adapter_parameters,
    attachment,
    plain_parameters,
    spectral_layers,
)
from mirrortune.adapters.layouts import Layout
from mirrortune.adapters.spec import AdapterSpec, follows_from_rank
from mirrortune.adapters.targets import Target
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
        layouts: how the numbers of each layer's weight stand for matrices.
        weights: every name of each layer's weight in the base model's state.
        tensors: as in the module's docstring.
        base: name, revision, commit, dtype and auto_class of the base model.
        task: the task's own description, or None for an adapter made in other people's loops.
        head: names of the head's parameters.
        extra: what else the writer recorded (max_length, ...).
        peft_config: PEFT's own description of the adapter, or None for one of ours.
        probes: of PEFT's layers; see ``peft_file.layer_probes``.
    """

    folder: Path
    spec: AdapterSpec
    fingerprints: dict[str, Fingerprint]
    layouts: dict[str, Layout]
    weights: dict[str, tuple[str, ...]]
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
) -> int:
    """Write all files into ``folder``, which exists; returns their size in bytes. Callers make the folder atomic."""
    attached = attachment(model)
    tensors = _trained_tensors(model) | _basis_tensors(model, fingerprints)
    is_peft = attached.spec.preset.peft is not None
    metadata = {"format": "pt"} if is_peft else {"format_version": str(FORMAT_VERSION)}
    data = save({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}, metadata)
    files = {_tensor_file(attached.spec): data}
    if is_peft:
        config = peft_file.peft_config(model, base)
        files[peft_file.CONFIG_FILE] = (json.dumps(config, indent=2) + "\n").encode()
    probes = peft_file.layer_probes(model) if is_peft else {}
    layers = {
        name: {**_describe_target(target), **_describe(fingerprints[name], probes.get(name))}
        for name, target in attached.targets.layers.items()
    }
    description = {
        "format_version": FORMAT_VERSION,
        "mirrortune_version": __version__,
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
    description["description_sha256"] = _description_digest(description)
    files[_DESCRIPTION] = (json.dumps(description, indent=1) + "\n").encode()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return sum(map(len, files.values()))


def read_adapter(folder: Path) -> AdapterFile:
    """Read and check an adapter folder.

    Raises:
        VerificationError: files missing, damaged, or written by a newer format.
    """
    description = _read_description(folder)
    try:
        spec = AdapterSpec(**description["adapter"])
        files = {name: _read_file(folder / name, description[key]) for key, name in _hashed_files(spec).items()}
        tensors = load(files[_tensor_file(spec)])
        layers = description["layers"]
        return AdapterFile(
            folder=folder,
            spec=spec,
            fingerprints={
                name: Fingerprint.of_weight(layer["weight_sha256"])
                if spec.preset.peft
                else Fingerprint(
                    weight_sha256=layer["weight_sha256"],
                    probe_seeds=tuple(layer["probe_seeds"]),
                    side=layer["side"],
                    sketch=tensors[f"sketch.{name}"],
                    sigma_head=tuple(layer["sigma_head"]),
                )
                for name, layer in layers.items()
            },
            layouts={name: Layout.from_dict(layer["layout"]) for name, layer in layers.items()},
            weights={name: tuple(layer["tensors"]) for name, layer in layers.items()},
            tensors=tensors,
            base=description["base"],
            task=description["task"],
            head=tuple(description["head"]),
            extra={k: v for k, v in description.items() if k in ("max_length",)},
            peft_config=json.loads(files[peft_file.CONFIG_FILE]) if spec.preset.peft else None,
            probes={name: layer["response"] for name, layer in layers.items() if spec.preset.peft},
        )
    except (KeyError, TypeError, ValueError, IndexError, SafetensorError) as error:
        raise VerificationError(
            str(folder / _DESCRIPTION), f"damaged ({type(error).__name__}: {error})", fix="Restore the adapter folder"
        ) from error


@torch.no_grad()
def restore_trained(model: nn.Module, adapter: AdapterFile) -> None:
    """Copy stored numbers into an adapted model: ``core.*`` and ``param.*``, or all that PEFT's file holds.

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
        if parameter.shape != stored[name].shape:
            raise VerificationError(
                where, f"tensor '{name}' has shape {tuple(stored[name].shape)}", allowed=str(tuple(parameter.shape))
            )
        if not torch.isfinite(stored[name]).all():
            raise VerificationError(where, f"tensor '{name}' holds NaN or infinities", fix="Restore the adapter folder")
        if not is_peft:
            parameter.copy_(stored[name])
    if is_peft:
        peft_file.restore_tensors(model, stored)
        peft_file.check_probes(model, adapter.probes)


def _trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    if attachment(model).spec.preset.peft is not None:
        return peft_file.adapter_tensors(model)
    tensors: dict[str, Tensor] = {f"core.{n}": p for n, p in adapter_parameters(model).items()}
    return tensors | {f"param.{n}": p for n, p in plain_parameters(model).items()}


def _basis_tensors(model: nn.Module, fingerprints: dict[str, Fingerprint]) -> dict[str, Tensor]:
    spec = attachment(model).spec
    tensors: dict[str, Tensor] = {}
    for name, layer in spectral_layers(model).items():
        tensors[f"sketch.{name}"] = fingerprints[name].sketch
        pairs = getattr(layer.core, "pairs", None)
        if isinstance(pairs, Tensor) and not follows_from_rank(pairs.cpu(), spec, layer.rank, layer.layout.count):
            tensors[f"pairs.{name}"] = pairs.to(torch.int32)
    return tensors


def _describe_target(target: Target) -> dict[str, Any]:
    return {"kind": target.kind.name, "tensors": list(target.tensors), "layout": asdict(target.layout)}


def _describe(found: Fingerprint, response: list[float] | None) -> dict[str, Any]:
    if response is not None:
        return {"weight_sha256": found.weight_sha256, "response": response}
    return {
        "rank": found.sketch.shape[-1],
        "weight_sha256": found.weight_sha256,
        "probe_seeds": list(found.probe_seeds),
        "side": found.side,
        "sigma_head": list(found.sigma_head),
    }


def _tensor_file(spec: AdapterSpec) -> str:
    return peft_file.TENSOR_FILE if spec.preset.peft else _TENSORS


def _hashed_files(spec: AdapterSpec) -> dict[str, str]:
    """Key of its hash in the description -> name of the file."""
    config = {"config_sha256": peft_file.CONFIG_FILE} if spec.preset.peft else {}
    return {"tensors_sha256": _tensor_file(spec), **config}


def _read_file(path: Path, sha256: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise VerificationError(str(path), "missing or unreadable", fix="Restore the adapter folder") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise VerificationError(
            str(path), "damaged: its hash is not the one in adapter.json", fix="Restore the adapter folder"
        )
    return data


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
