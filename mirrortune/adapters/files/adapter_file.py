# SPDX-License-Identifier: Apache-2.0
"""Adapters on disk: ``adapter.safetensors`` holds the trained parameters and the fingerprints of the bases, and
``adapter.json`` all other data. For a PEFT tuner, PEFT's two files hold the trained parameters instead.

Loading verifies that each file and each adapted weight of the base has the recorded hash, that each basis aligns with
its sketch, and that each layer has the effect that it had when it was saved. Otherwise an error names the layer.

Tensors: ``core.<parameter>`` float32; pairs where they do not follow from the rank alone, as ``partners`` (int16 or
int32, see ``pairings/encoding.py``) or, where that is no shorter, ``pairs`` (T, 2), round after round; ``clusters`` for
near-equal singular values (``fingerprint.py``). Each of these holds all layers in order (``tensors.py``) and is read as
``core.<layer>.<parameter>``, ``partners.<layer>`` and so on. ``effects`` (layers, 16) holds the probes of every layer's
effect and ``signs`` one bit for each singular vector; a model in shards has ``sketch`` (1 or 2, R) float32 per layer in
place of both. ``param.<name>`` are the head and other parameters trained as they are, with the running statistics of
their layers; ``factor.<layer>.U``, ``S`` and ``Vh`` the factors, in the portable form. A weight that holds several
matrices (experts) has one more leading dimension in all of these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from typing_extensions import override

from mirrortune import __version__
from mirrortune.adapters.files.description import (
    DESCRIPTION,
    FORMAT_VERSION,
    description_text,
    read_description,
    read_file,
    strict_json,
)
from mirrortune.adapters.files.tensors import (
    Form,
    basis_tensors,
    chosen_form,
    describe_basis,
    describe_target,
    factor_tensors,
    fingerprint_of,
    pack_tensors,
    rounding_of,
    split_effects,
    unpack_tensors,
    with_pairs,
)
from mirrortune.adapters.files.validate import (
    check_bases,
    check_counts,
    check_description,
    check_new_tokens,
    check_responses,
    check_tensors,
    largest_count,
)
from mirrortune.adapters.fingerprint import Fingerprint
from mirrortune.adapters.inject import (
    adapter_parameters,
    attachment,
    plain_parameters,
    spectral_layers,
    trained_buffers,
)
from mirrortune.adapters.layout import Layout
from mirrortune.adapters.peft_bridge import files as peft_files
from mirrortune.adapters.peft_bridge.options import objection
from mirrortune.adapters.spec import AdapterSpec, check_spec
from mirrortune.errors import ConfigError, VerificationError


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFile:
    """An adapter read from disk and checked, but not yet compared with a base model; this class for mirrortune's cores.

    Attributes:
        folder: where it was read.
        form: ``compact``, or ``portable`` for one that holds its factors.
        spec: how to build it.
        fingerprints: by layer, in module order.
        layouts: how each layer's weight holds matrices.
        weights: every name of each layer's weight in the base model's state.
        dtypes: dtype that each layer's factors were rounded to in training.
        tensors: as in the module's docstring, without the effects.
        base: name, revision, commit, dtype and auto_class of the base model.
        task: the task's own description, or None for an adapter trained outside mirrortune's loop.
        head: names of the head's parameters.
        plain: names of base parameters that were trained as they are.
        statistics: names of the running statistics of normalisation layers among ``head`` and ``plain``.
        tied: other names that parameters of ``head`` and ``plain`` had in the base model, in which they are tied.
        extra: what else the writer recorded (max_length, ...).
        frozen: :func:`~mirrortune.adapters.fingerprint.frozen_digests` of the base's weights that the adapter leaves as
            they are; None if it is not known.
        effects: probes of each layer's effect, (E, 16); none for an adapter trained in shards.
        peft_config: PEFT's own description of the adapter; None for mirrortune's own.
        responses: of PEFT's layers, empty lists where it was trained in shards; see
            :func:`~mirrortune.adapters.peft_bridge.files.layer_responses`.
    """

    TENSOR_FILE: ClassVar[str] = "adapter.safetensors"

    folder: Path
    form: str
    spec: AdapterSpec
    fingerprints: dict[str, Fingerprint]
    layouts: dict[str, Layout]
    weights: dict[str, tuple[str, ...]]
    dtypes: dict[str, str]
    tensors: dict[str, Tensor]
    base: dict[str, Any]
    task: dict[str, Any] | None
    head: tuple[str, ...]
    plain: tuple[str, ...]
    extra: dict[str, Any]
    frozen: str | None = None
    statistics: tuple[str, ...] = ()
    tied: dict[str, tuple[str, ...]] = field(default_factory=dict)
    effects: dict[str, Tensor] = field(default_factory=dict)
    peft_config: dict[str, Any] | None = None
    responses: dict[str, list[float]] = field(default_factory=dict)

    @property
    def weights_in(self) -> torch.dtype:
        """Dtype of the base's weights in training: the one they were loaded in, or float32 if all were trained."""
        if self.spec.preset.plain == "all":
            return torch.float32
        found: torch.dtype = getattr(torch, str(self.base["dtype"]))
        return found

    @staticmethod
    def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
        """Return the trained tensors of an adapted model, without copying them, by their names in the file."""
        tensors: dict[str, Tensor] = {f"core.{n}": p for n, p in adapter_parameters(model).items()}
        return tensors | {f"param.{n}": t for n, t in {**plain_parameters(model), **trained_buffers(model)}.items()}

    @staticmethod
    def contents(
        model: nn.Module, fingerprints: dict[str, Fingerprint], form: Form, base: dict[str, Any]
    ) -> tuple[dict[str, bytes], dict[str, dict[str, Any]]]:
        """Return the files other than ``adapter.json``, the tensor file first, and the description of each layer.

        Args:
            model: adapted model.
            fingerprints: fingerprints of its layers.
            form: compact or portable.
            base: see :class:`AdapterFile`.
        """
        tensors = AdapterFile.trained_tensors(model) | basis_tensors(model, fingerprints)
        tensors |= factor_tensors(model) if form == "portable" else {}
        dtypes = {name: rounding_of(layer.U, layer.Vh) for name, layer in spectral_layers(model).items()}
        layers = {
            name: {
                **describe_target(name, target),
                **describe_basis(fingerprints[name]),
                "dtype": str(fingerprints[name].coarsest(dtypes[name])).removeprefix("torch."),
            }
            for name, target in attachment(model).targets.layers.items()
        }
        tensors, holds = pack_tensors(tensors, list(layers))
        layers = {name: {**layer, "holds": holds[name]} for name, layer in layers.items()}
        return {AdapterFile.TENSOR_FILE: _saved(tensors, {"format_version": str(FORMAT_VERSION)})}, layers

    @classmethod
    def parsed(cls, fields: dict[str, Any], description: dict[str, Any], tensors: dict[str, Tensor], _: Any) -> Self:
        """Create the adapter from its checked description and its tensors.

        Args:
            fields: fields common to all adapters.
            description: content of ``adapter.json``.
            tensors: content of the tensor file.

        Raises:
            ValueError: a tensor, or the description of a basis, is invalid.
        """
        layers, spec = description["layers"], fields["spec"]
        check_bases(description)
        tensors = unpack_tensors(tensors, layers)
        check_tensors(description, tensors)
        if spec.basis == "gradient" and description["form"] != "portable":
            raise ValueError(f"a basis of '{spec.method}' does not follow from a weight, and the file holds none")
        check_counts(spec.rank, spec.options, largest_count(layers, tensors))
        tensors = with_pairs(tensors, layers)
        fingerprints = {name: fingerprint_of(layer, name, tensors) for name, layer in layers.items()}
        effects = split_effects(tensors.pop("effects", None), fields["layouts"])
        return cls(**fields, fingerprints=fingerprints, tensors=tensors, effects=effects)

    def plain_tensors(self) -> dict[str, Tensor]:
        """Return the directly trained parameters and running statistics, by their names in the model."""
        kind = "param."
        return {key.removeprefix(kind): t for key, t in self.tensors.items() if key.startswith(kind)}

    @torch.no_grad()
    def restore(self, model: nn.Module, *, remarks: list[str] | None = None) -> None:
        """Copy the stored parameters into an adapted model.

        Args:
            model: model adapted by the same spec.
            remarks: list that deviations of PEFT's layers are added to; None to raise an error.

        Raises:
            VerificationError: names or shapes differ from the trained parameters of the model, a value is not finite,
                or a PEFT layer does not compute what it did when it was saved.
        """
        stored = {name for name in self.tensors if name.startswith(("core.", "param."))}
        for name, parameter in self._matched(stored, self.trained_tensors(model)).items():
            parameter.copy_(checked_tensor(self, name, parameter.shape))

    def _matched(self, stored: set[str], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return ``wanted``; raise a VerificationError if its names are not those of the ``stored`` tensors."""
        if stored != wanted.keys():
            odd = sorted(stored ^ wanted.keys())[0]
            place = "only in the adapter" if odd in stored else "missing from the adapter"
            fix = "Use the model that the adapter was made for"
            raise VerificationError(str(self.folder), f"tensor '{odd}' is {place}", fix=fix)
        return wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftAdapterFile(AdapterFile):
    """An adapter of a PEFT tuner."""

    TENSOR_FILE: ClassVar[str] = peft_files.TENSOR_FILE

    @override
    @staticmethod
    def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
        return peft_files.adapter_tensors(model)

    @override
    @staticmethod
    def contents(
        model: nn.Module, fingerprints: dict[str, Fingerprint], form: Form, base: dict[str, Any]
    ) -> tuple[dict[str, bytes], dict[str, dict[str, Any]]]:
        responses = peft_files.layer_responses(model)
        layers = {
            name: {
                **describe_target(name, target),
                "weight": fingerprints[name].weight_hash,
                "response": responses[name],
            }
            for name, target in attachment(model).targets.layers.items()
        }
        config = json.dumps(peft_files.peft_config(model, base), indent=2) + "\n"
        tensors = _saved(peft_files.adapter_tensors(model), {"format": "pt"})
        return {peft_files.TENSOR_FILE: tensors, peft_files.CONFIG_FILE: config.encode()}, layers

    @override
    @classmethod
    def parsed(
        cls, fields: dict[str, Any], description: dict[str, Any], tensors: dict[str, Tensor], peft_config: Any
    ) -> Self:
        layers, spec = description["layers"], fields["spec"]
        check_responses(description)
        if not isinstance(peft_config, dict):
            raise ValueError(f"{peft_files.CONFIG_FILE} is not an object")
        largest = largest_count(layers, tensors)
        check_counts(peft_config.get(spec.preset.peft.rank), spec.options, largest)
        if problem := objection(peft_config, largest, spec.preset.peft.kind):
            raise VerificationError(str(fields["folder"]), problem, fix="Save the adapter again without it")
        fingerprints = {name: Fingerprint.of_hash(layer["weight"]) for name, layer in layers.items()}
        responses = {name: layer["response"] for name, layer in layers.items()}
        return cls(**fields, fingerprints=fingerprints, tensors=tensors, peft_config=peft_config, responses=responses)

    @override
    def plain_tensors(self) -> dict[str, Tensor]:
        keys = {name: peft_files.rows_key(name) for name in (*self.head, *self.plain, *self.statistics)}
        return {name: self.tensors[key] for name, key in keys.items() if key in self.tensors}

    @override
    @torch.no_grad()
    def restore(self, model: nn.Module, *, remarks: list[str] | None = None) -> None:
        for name, tensor in self._matched({*self.tensors}, self.trained_tensors(model)).items():
            checked_tensor(self, name, tensor.shape)
        peft_files.restore_tensors(model, self.tensors)
        try:
            peft_files.compare_responses(model, self.responses)
        except VerificationError as error:
            if remarks is None:
                raise
            remarks.append(str(error))


def _class_of(spec: AdapterSpec) -> type[AdapterFile]:
    return AdapterFile if spec.preset.peft is None else PeftAdapterFile


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
    """Write all files of an adapter into an existing ``folder``, and return their size in bytes.

    The files are not written atomically; this is left to the caller. For the arguments see :func:`adapter_contents`.
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
    """Return the content of the files of an adapter, by name.

    The last is ``adapter.json``, which holds the hashes of the others, so that files of two adapters cannot be mixed.

    Args:
        model: adapted model.
        fingerprints: fingerprints of its layers.
        base: see :class:`AdapterFile`.
        task: see :class:`AdapterFile`.
        extra: see :class:`AdapterFile`.
        form: ``compact`` for cores and sketches only, so that loading computes the basis again; ``portable`` to store
            the factors as well; ``auto``: see :func:`mirrortune.adapters.files.tensors.chosen_form`.
    """
    attached = attachment(model)
    if form == "auto":
        form = chosen_form(model)
    if form == "compact" and attached.spec.basis == "gradient":
        raise no_compact_form(attached.spec.method)
    files, layers = _class_of(attached.spec).contents(model, fingerprints, form, base)
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
        **({"tied": {name: list(others) for name, others in attached.tied.items()}} if attached.tied else {}),
        **({"statistics": list(attached.targets.statistics)} if attached.targets.statistics else {}),
        "skipped": attached.targets.skipped,
        "frozen": attached.frozen,
        **{_HASHES[name]: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        **extra,
    }
    files[DESCRIPTION] = description_text(description).encode()
    return files


def no_compact_form(method: str) -> ConfigError:
    """Return the error for a compact adapter of a ``method`` whose bases cannot be computed from the weights."""
    problem = f"the bases of '{method}' are measured on the task, and have to be in the file"
    return ConfigError("adapter.form", problem, allowed="auto or portable")


_HASHES = {
    AdapterFile.TENSOR_FILE: "tensors_sha256",
    peft_files.TENSOR_FILE: "tensors_sha256",
    peft_files.CONFIG_FILE: "config_sha256",
}
"""File name -> key of its hash in the description."""


def _saved(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    return save({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, metadata)


def outdated_files(folder: Path, names: Iterable[str]) -> list[Path]:
    """Return files of the adapter in ``folder`` that a new adapter with the files ``names`` would not overwrite.

    PEFT would still load a stale ``adapter_config.json``. Files that changed since they were saved are left out.
    """
    try:
        described = strict_json((folder / DESCRIPTION).read_bytes())
    except (OSError, ValueError):
        return []
    if not isinstance(described, dict):
        return []
    paths = [(folder / name, described.get(key)) for name, key in _HASHES.items() if name not in names]
    return [p for p, digest in paths if p.is_file() and hashlib.sha256(p.read_bytes()).hexdigest() == digest]


def read_adapter(folder: Path) -> AdapterFile:
    """Read and check an adapter folder.

    Raises:
        VerificationError: files are missing, damaged, or in another format.
    """
    description = read_description(folder)

    def tensors_of(spec: AdapterSpec) -> tuple[dict[str, Tensor], Any]:
        kind = _class_of(spec)
        path = folder / kind.TENSOR_FILE
        data = _read_file(path, description)
        try:
            tensors = load(data)
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:  # torch may also lack a dtype
            raise _damaged(path, error) from error
        if kind is AdapterFile:
            return tensors, None
        return tensors, strict_json(_read_file(folder / peft_files.CONFIG_FILE, description))

    return parse_adapter(folder, description, tensors_of)


def parse_adapter(
    folder: Path, description: dict[str, Any], tensors_of: Callable[[AdapterSpec], tuple[dict[str, Tensor], Any]]
) -> AdapterFile:
    """Create an adapter from its description and tensors, and check them.

    Args:
        folder: folder that they were read from, for messages.
        description: see :func:`~mirrortune.adapters.files.description.read_description`.
        tensors_of: returns the tensors of the file and PEFT's description, or None for mirrortune's cores.

    Raises:
        VerificationError: they are damaged, or the method is unknown to this version.
    """
    try:
        check_description(description)
        spec = AdapterSpec(**description["adapter"])
        check_spec(spec)
        tensors, peft_config = tensors_of(spec)
        check_new_tokens(description, tensors)
        layers = description["layers"]
        fields = {
            "folder": folder,
            "form": description["form"],
            "spec": spec,
            "layouts": {name: Layout.from_dict({"rows": None, **layer["layout"]}) for name, layer in layers.items()},
            "weights": {name: tuple(layer.get("tensors", [f"{name}.weight"])) for name, layer in layers.items()},
            "dtypes": {name: layer.get("dtype", description["base"].get("dtype")) for name, layer in layers.items()},
            "base": description["base"],
            "task": description["task"],
            "head": tuple(description["head"]),
            "plain": tuple(description["plain"]),
            "frozen": description.get("frozen"),
            "statistics": tuple(description.get("statistics", ())),
            "tied": {name: tuple(others) for name, others in description.get("tied", {}).items()},
            "extra": {k: v for k, v in description.items() if k in ("max_length",)},
        }
        return _class_of(spec).parsed(fields, description, tensors, peft_config)
    except ValueError as error:
        raise _damaged(folder / DESCRIPTION, error) from error
    except ConfigError as error:
        raise VerificationError(
            str(folder / DESCRIPTION), f"its settings do not work here ({error})",
            fix="Upgrade mirrortune, import what defines its method, or restore the adapter folder",
        ) from error  # fmt: skip


def _damaged(path: Path, error: Exception) -> VerificationError:
    return VerificationError(str(path), f"damaged ({type(error).__name__}: {error})", fix="Restore the adapter folder")


def checked_tensor(adapter: AdapterFile, name: str, shape: Sequence[int]) -> Tensor:
    """Return a tensor of the file.

    Raises:
        VerificationError: it is missing, does not have this ``shape``, or is not finite; also for a dtype of 8 bits or
            fewer, in which torch does not compute.
    """
    where, found = str(adapter.folder), adapter.tensors.get(name)
    if found is None:
        raise VerificationError(where, f"tensor '{name}' is missing from the adapter", fix="Restore the adapter folder")
    if tuple(found.shape) != tuple(shape):
        is_head = found.ndim and name.endswith(adapter.head) and found.shape[1:] == torch.Size(shape[1:])
        fix = f"Load the base with num_labels={len(found)}" if is_head else None
        problem = f"tensor '{name}' has shape {tuple(found.shape)}"
        raise VerificationError(where, problem, allowed=f"{tuple(shape)}", fix=fix)
    if found.is_floating_point() and found.dtype.itemsize == 1:
        raise VerificationError(where, f"tensor '{name}' is {found.dtype}", fix="Restore the adapter folder")
    if not torch.isfinite(found).all():
        raise VerificationError(where, f"tensor '{name}' holds NaN or infinities", fix="Restore the adapter folder")
    return found


def _read_file(path: Path, description: dict[str, Any]) -> bytes:
    data = read_file(path)
    if hashlib.sha256(data).hexdigest() != description.get(_HASHES[path.name]):
        raise VerificationError(
            str(path), "damaged: its hash differs from the one in adapter.json", fix="Restore the adapter folder"
        )
    return data
