# SPDX-License-Identifier: Apache-2.0
"""Read the weights of a checkpoint one matrix at a time, from plain files or from a base with an adapter."""

from __future__ import annotations

import copy
import importlib
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from mirrortune.adapters.files.adapter_file import AdapterFile
from mirrortune.adapters.files.load import stored_core, trained_factors
from mirrortune.adapters.inject import FactorSource
from mirrortune.adapters.layers import delta_weight
from mirrortune.adapters.peft_bridge.options import CHOOSE_LAYERS, objection
from mirrortune.errors import ConfigError, VerificationError, first_line, first_of
from mirrortune.merging.bases import is_model_class
from mirrortune.merging.verify import FLOATS
from mirrortune.models.load import DTYPES, ModelSource, load_model, resolve_dtype
from mirrortune.models.tensors import match_names
from mirrortune.system.devices import to_float64
from mirrortune.system.tensor_files import StoredTensor, read_headers, read_tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights(ABC):
    """One side of a comparison.

    Attributes:
        label: name given by the user.
        shapes: shape of each floating-point tensor by name.
        source: model that the weights belong to; None without a configuration.
        base: weights to which an adapter is applied; None for a plain checkpoint.
    """

    label: str
    shapes: dict[str, tuple[int, ...]]
    source: ModelSource | None = None
    base: Weights | None = None

    @abstractmethod
    def read(self, name: str, part: int | None = None) -> Tensor:
        """Read a tensor, or entry ``part`` of its first dimension, in its stored dtype or a wider one."""

    def angles(self, name: str) -> list[float] | None:
        """Return the plane angles of a weight's adapter in degrees, or None if no adapter rotates planes of it."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeights(Weights):
    """Weights in plain safetensors files.

    Attributes:
        tensors: floating-point tensors by name.
    """

    tensors: dict[str, StoredTensor]

    @classmethod
    def of_files(cls, label: str, paths: Iterable[Path], source: ModelSource | None = None) -> StoredWeights:
        """Open safetensors files, reading only their headers.

        Raises:
            ConfigError: a file is missing or damaged, or holds nothing that can be compared.
        """
        stored = {name: tensor for path in paths for name, tensor in read_headers([path]).items()}
        tensors = {name: tensor for name, tensor in stored.items() if tensor.code in FLOATS}
        if not tensors:
            held = f"{len(stored)} tensors of packed or whole numbers" if stored else "no tensors"
            raise ConfigError(
                label, f"it holds {held}", allowed="float32, bfloat16, float16 or float64 weights in safetensors files",
                fix="Dequantise it first" if stored else "Give a checkpoint",
            )  # fmt: skip
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        return cls(label=label, shapes=shapes, tensors=tensors, source=source)

    @override
    def read(self, name: str, part: int | None = None) -> Tensor:
        stored = self.tensors[name]
        if part is None:
            return read_tensor(stored)
        size = stored.nbytes // stored.shape[0]
        return read_tensor(replace(stored, shape=stored.shape[1:], start=stored.start + part * size, nbytes=size))


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedWeights(Weights):
    """Weights of a base into which a mirrortune adapter is merged, matrix by matrix, in float64.

    Attributes:
        base: weights that the adapter was trained on; each adapted weight is checked against the hash in the adapter.
        adapter: adapter.
        factors: computes or caches the factors of the base.
        names: for each weight that the adapter changes, its name in the adapter's model by its name in the base.
    """

    base: Weights
    adapter: AdapterFile
    factors: FactorSource
    names: dict[str, str]

    @classmethod
    def of_adapter(cls, label: str, base: Weights, adapter: AdapterFile, factors: FactorSource) -> AdaptedWeights:
        """Apply ``adapter`` to ``base``.

        Raises:
            ConfigError: the base lacks adapted weights.
        """
        adapted = [tensor for tensors in adapter.weights.values() for tensor in tensors]
        plain = [n.removeprefix("param.") for n in adapter.tensors if n.startswith("param.")]
        names = match_names(base.shapes, [*adapted, *plain])
        found = set(names.values())  # a tied weight is stored under one of its names
        if missing := [tensors[0] for tensors in adapter.weights.values() if found.isdisjoint(tensors)]:
            problem = f"it lacks {len(missing)} weights of the adapter, such as {missing[0]}"
            if found:  # its own base, whose names differ, such as experts that the model fuses while loading
                fix = "If it is the adapter's own base, merge first, and give both: mirrortune analyze BASE MERGED"
                raise ConfigError(base.label, problem, fix=fix)
            own_base, fix = str(adapter.base.get("name")), "Give the adapter's own base model"
            raise ConfigError(base.label, problem, allowed=own_base, fix=fix)
        return cls(
            label=label, shapes=base.shapes, source=base.source, base=base, adapter=adapter, factors=factors,
            names=names,
        )  # fmt: skip

    @override
    def read(self, name: str, part: int | None = None) -> Tensor:
        own = self.names.get(name)
        if own is None:
            return self.base.read(name, part)
        changed = self._read_changed(name, own)
        return changed if part is None else changed[part]

    def _read_changed(self, name: str, own: str) -> Tensor:
        weight = self.base.read(name)
        plain = self.adapter.tensors.get(f"param.{own}")
        if plain is not None:
            return plain if plain.shape == weight.shape else weight
        changed = weight.double()  # as merged: what training rounded is no change of the adapter's
        weight = weight.to(DTYPES[self.adapter.base["dtype"]])
        for layer in self._layers(own):
            layout = self.adapter.layouts[layer]
            factors = trained_factors(self.adapter, layer, layout.matrix(weight).contiguous(), self.factors)
            changed = changed + layout.tensor(delta_weight(factors, stored_core(self.adapter, layer, factors.S)))
        return changed

    def _layers(self, own: str) -> list[str]:
        """Return the adapted layers whose weight is ``own`` in the adapter's model, or a part of it."""
        return [layer for layer, tensors in self.adapter.weights.items() if own in tensors]

    @override
    def angles(self, name: str) -> list[float] | None:
        found = []
        for layer in self._layers(self.names.get(name, "")):
            stored, layout = self.adapter.fingerprints[layer], self.adapter.layouts[layer]
            stack = (layout.count,) if layout.count > 1 else ()
            unknown = torch.ones(*stack, stored.rank)  # placeholder: angles do not depend on singular values
            angles = stored_core(self.adapter, layer, unknown).angles()
            if angles is not None:
                found.append(to_float64(angles.detach()).rad2deg().flatten())
        return torch.cat(found).tolist() if found else None


_AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_MERGE_FIRST = "Merge with PEFT (merge_and_unload), and give both: mirrortune analyze BASE MERGED"
_SMALLEST_LIMIT = 1024  # even a small adapter may use numbers up to this
# Exceptions that PEFT raises for unexpected values in a file.
_UNFORESEEN = (ValueError, TypeError, RuntimeError, OSError, LookupError, AttributeError, AssertionError)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftWeights(Weights):
    """Weights of a base into which PEFT merges a PEFT adapter, in float32.

    Attributes:
        base: weights of the base, including layers without a tuner.
        layers: tuner layer of each base tensor that has one.
        replaced: tensors of ``modules_to_save``, which replace those of the base, by their names in the base.
    """

    base: Weights
    layers: dict[str, Any]
    replaced: dict[str, Tensor]

    @override
    def read(self, name: str, part: int | None = None) -> Tensor:
        layer = self.layers.get(name)
        if layer is None:
            own = self.replaced.get(name)
            if own is None:
                return self.base.read(name, part)
            return own if part is None else own[part]
        merged = copy.deepcopy(layer).float()
        merged.merge()
        weight: Tensor = merged.get_base_layer().weight.detach()
        return weight if part is None else weight[part]


def load_peft(label: str, folder: str, base: Weights) -> PeftWeights:
    """Load an adapter written by PEFT and apply it to its base.

    Args:
        label: name given by the user.
        folder: folder with ``adapter_config.json``.
        base: weights of the base model.

    Raises:
        ConfigError: PEFT is not installed, or the adapter does not belong to this base.
    """
    try:
        peft = importlib.import_module("peft")
    except ImportError as error:
        problem, fix = "it is a PEFT adapter, and the package peft is not installed", "pip install 'mirrortune[peft]'"
        raise ConfigError(label, problem, fix=fix) from error
    if base.source is None:
        raise ConfigError(base.label, "it has no config.json, which PEFT needs", fix="Give the base model's folder")
    config = _checked_config(label, Path(folder), base, peft)
    auto_class = _AUTO_CLASSES.get(str(getattr(config.task_type, "value", config.task_type)))
    name = auto_class or dict(config.auto_mapping or {}).get("base_model_class", "AutoModel")
    name = name if is_model_class(name) else "AutoModel"
    dtype = resolve_dtype("auto", base.source.config, torch.device("meta"))
    model = load_model(base.source, name, {}, dtype, None).model
    try:
        _name_layers(config, model, lambda: peft.utils.load_peft_weights(folder, device="cpu"))
        with warnings.catch_warnings():  # PEFT warns about transformers
            warnings.simplefilter("ignore")
            adapted = peft.PeftModel.from_pretrained(model, folder, config=config, ignore_mismatched_sizes=True)
    except _UNFORESEEN as error:
        text = first_line(error)
        raise ConfigError(label, f"PEFT cannot load it into {base.label} ({text})", fix="Give its own base") from error
    tuners, saved = _parts(adapted, peft)
    every = match_names(base.shapes, [*tuners, *saved])
    names = {stored: own for stored, own in every.items() if own in tuners}
    if not names:
        fix = f"Give its own base model. If it is that: {_MERGE_FIRST}"
        raise VerificationError(label, f"none of its layers is in {base.label}", fix=fix)
    if lost := sorted(set(tuners) - set(names.values())):  # experts, which a model fuses while loading, or tied weights
        named = first_of((name.removesuffix(".weight") for name in lost), 1)
        problem = f"it adapts {named}, whose weight is stored otherwise in {base.label}"
        raise ConfigError(label, problem, fix=_MERGE_FIRST)
    layers = {stored: tuners[own] for stored, own in names.items()}
    replaced = {stored: saved[own] for stored, own in every.items() if own in saved}
    replaced = {stored: tensor for stored, tensor in replaced.items() if tensor.shape == base.shapes[stored]}
    return PeftWeights(
        label=label, shapes=base.shapes, source=base.source, base=base, layers=layers, replaced=replaced
    )  # fmt: skip


def read_config(label: str, folder: Path) -> dict[str, Any]:
    """Read ``adapter_config.json`` of an adapter written by PEFT.

    Raises:
        ConfigError: the file is damaged.
    """
    path = folder / "adapter_config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        problem = f"a {type(found).__name__}"
    except (OSError, ValueError, RecursionError) as error:
        problem = first_line(error)
    raise ConfigError(label, f"its adapter_config.json is damaged ({problem})", fix="Download or copy it again")


def _checked_config(label: str, folder: Path, base: Weights, peft: Any) -> Any:
    """Load PEFT's configuration of an adapter; raise ConfigError for adapters that do more than change weights."""
    stored = sum(path.stat().st_size for path in folder.glob("adapter_model.*"))
    largest = max([_SMALLEST_LIMIT, stored, *(size for shape in base.shapes.values() for size in shape)])
    try:
        if problem := objection(read_config(label, folder), largest):
            raise ConfigError(label, problem, fix="Save the adapter again without it")
        with warnings.catch_warnings():  # about fields that this version of PEFT does not have
            warnings.simplefilter("ignore")
            config = peft.PeftConfig.from_pretrained(str(folder))
        # A shadow model beside the base, which PEFT would download, is none of its weights either.
        is_beside = config.is_prompt_learning or config.peft_type.value == "SHADOW"
        changes_weights = hasattr(config, "target_modules") and not is_beside
    except _UNFORESEEN as error:
        raise ConfigError(label, f"PEFT cannot read its adapter_config.json ({first_line(error)})") from error
    if not changes_weights:
        raise ConfigError(label, f"an adapter of the kind {config.peft_type.value} changes no weights of its base")
    return config


def _name_layers(config: Any, model: nn.Module, load: Callable[[], Mapping[str, Tensor]]) -> None:
    """Replace the patterns that select layers by the names of the layers for which the adapter has tensors."""
    if not (isinstance(config.target_modules, str) or any(getattr(config, key, None) for key in CHOOSE_LAYERS)):
        return
    modules = dict(model.named_modules())
    names = set()
    for key in load():
        words = key.removeprefix("base_model.model.").split(".")
        parts = (".".join(words[:end]) for end in range(len(words) - 1, 0, -1))
        name = next((part for part in parts if part in modules), None)
        if name is not None and ".".join(words)[len(name) + 1 :] not in dict(modules[name].named_parameters()):
            names.add(name)  # other modules were saved completely, without a tuner
    config.target_modules = names
    for key in CHOOSE_LAYERS:
        if hasattr(config, key):
            setattr(config, key, None)


def _parts(adapted: Any, peft: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the tuner layer of each weight, and the tensors of the modules that the adapter holds whole, by name."""
    modules, kind = adapted.get_base_model().named_modules(), peft.tuners.tuners_utils.BaseTunerLayer
    tuners: dict[str, Any] = {}
    saved: dict[str, Tensor] = {}
    for path, module in modules:
        if isinstance(module, kind) and isinstance(getattr(module, "get_base_layer", lambda: None)(), nn.Module):
            tuners[f"{path}.weight"] = module
        elif isinstance(module, peft.utils.ModulesToSaveWrapper):
            own = module.modules_to_save[adapted.active_adapter]
            saved |= {f"{path}.{key}": tensor for key, tensor in own.state_dict().items()}
    return tuners, saved
