# SPDX-License-Identifier: Apache-2.0
"""The weights of any checkpoint, read one matrix at a time: plain folders and Hub repositories, our runs, PEFT's
adapters.

Files are opened for each matrix and closed again: a mapping that stays open would count as memory for every page that
was read from it.
"""

from __future__ import annotations

import copy
import importlib
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mirrortune.adapters.files.adapter_file import AdapterFile
from mirrortune.adapters.files.load import stored_core, trained_factors
from mirrortune.adapters.inject import FactorSource
from mirrortune.adapters.layers import delta_weight
from mirrortune.adapters.peft_bridge.options import CHOOSE_LAYERS, first_line, objection
from mirrortune.errors import ConfigError, VerificationError
from mirrortune.merging.bases import is_model_class
from mirrortune.models.load import DTYPES, ModelSource, load_model, resolve_dtype
from mirrortune.models.tensors import match_names

_FLOATS = ("F64", "F32", "BF16", "F16")


class Weights(Protocol):
    """One side of a comparison.

    Attributes:
        label: how the user named it.
        shapes: of every floating point tensor, by name.
        source: the model that it is of, if it has a configuration.
    """

    @property
    def label(self) -> str:
        """See above."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See above."""

    @property
    def source(self) -> ModelSource | None:
        """See above."""

    def read(self, name: str, part: int | None = None) -> Tensor:
        """One tensor, or one entry of its first dimension, in its stored dtype or a wider one."""

    def angles(self, name: str) -> list[float] | None:
        """Plane angles in degrees, if it is an adapter that turns planes of this weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeights:
    """Plain safetensors files.

    Attributes:
        label: see :class:`Weights`.
        shapes: see :class:`Weights`.
        files: the file of every tensor.
        num_opaque: tensors of other types (integers, packed numbers), which are left out.
    """

    label: str
    shapes: dict[str, tuple[int, ...]]
    files: dict[str, Path]
    source: ModelSource | None = None
    num_opaque: int = 0

    @classmethod
    def of_files(cls, label: str, paths: Iterable[Path], source: ModelSource | None = None) -> StoredWeights:
        """The tensors of some files, from their headers.

        Raises:
            ConfigError: a file is missing or damaged, or holds nothing that can be compared.
        """
        shapes, files, opaque = {}, {}, 0
        for path in paths:
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118  (no mapping)
                        found = file.get_slice(name)
                        if found.get_dtype() not in _FLOATS:
                            opaque += 1
                            continue
                        shapes[name], files[name] = tuple(found.get_shape()), path
            except (OSError, SafetensorError) as error:
                raise ConfigError(
                    str(path), f"missing or damaged ({error})", fix="Download or copy the checkpoint again"
                ) from error
        if not shapes:
            held = f"{opaque} tensors of packed or whole numbers" if opaque else "no tensors"
            raise ConfigError(
                label, f"it holds {held}", allowed="float32, bfloat16, float16 or float64 weights in safetensors files",
                fix="Dequantise it first" if opaque else "Give a checkpoint",
            )  # fmt: skip
        return cls(label=label, shapes=shapes, files=files, source=source, num_opaque=opaque)

    def read(self, name: str, part: int | None = None) -> Tensor:
        """See :class:`Weights`."""
        try:
            with safe_open(self.files[name], framework="pt") as file:
                found: Tensor = file.get_tensor(name) if part is None else file.get_slice(name)[part]
                return found
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{self.files[name]}: {name}", f"cannot be read ({error})") from error

    def angles(self, name: str) -> list[float] | None:
        """None: see :class:`Weights`."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedWeights:
    """A base with one of our adapters merged into it, matrix by matrix, in float64.

    Attributes:
        base: what the adapter was trained on; every adapted weight is checked against the adapter's hash of it.
        adapter: the adapter.
        factors: computes or remembers the factors of the base.
        names: name in the base -> name in the adapter's model, for what the adapter changes.
    """

    label: str
    base: Weights
    adapter: AdapterFile
    factors: FactorSource
    names: dict[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See :class:`Weights`."""
        return self.base.shapes

    @property
    def source(self) -> ModelSource | None:
        """See :class:`Weights`."""
        return self.base.source

    @classmethod
    def of_adapter(cls, label: str, base: Weights, adapter: AdapterFile, factors: FactorSource) -> AdaptedWeights:
        """The tuned side of ``adapter`` over ``base``; ConfigError if the base does not hold the adapted weights."""
        adapted = [tensor for tensors in adapter.weights.values() for tensor in tensors]
        plain = [n.removeprefix("param.") for n in adapter.tensors if n.startswith("param.")]
        names = match_names(base.shapes, [*adapted, *plain])
        found = set(names.values())  # a tied weight is stored under one of its names
        if missing := [tensors[0] for tensors in adapter.weights.values() if found.isdisjoint(tensors)]:
            raise ConfigError(
                base.label, f"it lacks {len(missing)} weights of the adapter, such as {missing[0]}",
                allowed=str(adapter.base.get("name")), fix="Give the adapter's own base model",
            )  # fmt: skip
        return cls(label=label, base=base, adapter=adapter, factors=factors, names=names)

    def read(self, name: str, part: int | None = None) -> Tensor:
        """See :class:`Weights`.

        Raises:
            VerificationError: the base weight is not the one that the adapter was trained on, or cannot be aligned.
        """
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
        weight = weight.to(DTYPES[self.adapter.base["dtype"]])
        changed = weight.double()
        for layer in self._layers(own):
            layout = self.adapter.layouts[layer]
            factors = trained_factors(self.adapter, layer, layout.matrix(weight).contiguous(), self.factors)
            changed = changed + layout.tensor(delta_weight(factors, stored_core(self.adapter, layer, factors.S)))
        return changed

    def _layers(self, own: str) -> list[str]:
        """The adapted layers whose weight, or a part of it, the adapter's model calls ``own``."""
        return [layer for layer, tensors in self.adapter.weights.items() if own in tensors]

    def angles(self, name: str) -> list[float] | None:
        """Plane angles of the adapter at a weight, in degrees, or None if it turns no planes there."""
        found = []
        for layer in self._layers(self.names.get(name, "")):
            stored, layout = self.adapter.fingerprints[layer], self.adapter.layouts[layer]
            stack = (layout.count,) if layout.count > 1 else ()
            unknown = torch.ones(*stack, stored.rank)  # angles do not depend on the strengths
            angles = stored_core(self.adapter, layer, unknown).angles()
            if angles is not None:
                found.append(angles.detach().double().rad2deg().flatten())
        return torch.cat(found).tolist() if found else None


_AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_SMALLEST_LIMIT = 1024  # a small adapter may count up to this
# What PEFT raises for values of a file that it does not expect.
_UNFORESEEN = (ValueError, TypeError, RuntimeError, OSError, LookupError, AttributeError, AssertionError)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftWeights:
    """See :class:`mirrortune.analyze.weights.Weights`; weights without a tuner are the base's own.

    Attributes:
        layers: the tuner layer of every base tensor that has one.
    """

    label: str
    base: Weights
    layers: dict[str, Any]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See :class:`mirrortune.analyze.weights.Weights`."""
        return self.base.shapes

    @property
    def source(self) -> ModelSource | None:
        """See :class:`mirrortune.analyze.weights.Weights`."""
        return self.base.source

    def read(self, name: str, part: int | None = None) -> Tensor:
        """See :class:`mirrortune.analyze.weights.Weights`; merged by PEFT in float32."""
        layer = self.layers.get(name)
        if layer is None:
            return self.base.read(name, part)
        merged = copy.deepcopy(layer).float()
        merged.merge()
        weight: Tensor = merged.get_base_layer().weight.detach()
        return weight if part is None else weight[part]

    def angles(self, name: str) -> list[float] | None:
        """None: see :class:`mirrortune.analyze.weights.Weights`."""
        return None


def load_peft(label: str, folder: str, base: Weights) -> PeftWeights:
    """Read an adapter that PEFT wrote.

    Args:
        label: how the user named it.
        folder: where ``adapter_config.json`` is.
        base: its base model's weights.

    Raises:
        ConfigError: PEFT is not installed, or the adapter is not for this base.
    """
    try:
        peft = importlib.import_module("peft")
    except ImportError as error:
        raise ConfigError(label, "it is an adapter of PEFT's", fix="pip install 'mirrortune[peft]'") from error
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
        with warnings.catch_warnings():  # PEFT's own, about transformers
            warnings.simplefilter("ignore")
            adapted = peft.PeftModel.from_pretrained(model, folder, config=config, ignore_mismatched_sizes=True)
    except _UNFORESEEN as error:
        text = first_line(error)
        raise ConfigError(label, f"PEFT cannot load it into {base.label} ({text})", fix="Give its own base") from error
    tuners = {
        f"{path}.weight": module
        for path, module in adapted.get_base_model().named_modules()
        if _is_tuner(module, peft.tuners.tuners_utils.BaseTunerLayer)
    }
    names = match_names(base.shapes, tuners)
    if not names:
        raise VerificationError(label, f"none of its layers is in {base.label}", fix="Give its own base model")
    return PeftWeights(label=label, base=base, layers={ours: tuners[own] for ours, own in names.items()})


def read_config(label: str, folder: Path) -> dict[str, Any]:
    """What ``adapter_config.json`` of an adapter that PEFT wrote holds; ConfigError if it is damaged."""
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
    """PEFT's configuration of an adapter that changes weights, and asks PEFT for nothing else."""
    stored = sum(path.stat().st_size for path in folder.glob("adapter_model.*"))
    largest = max([_SMALLEST_LIMIT, stored, *(size for shape in base.shapes.values() for size in shape)])
    try:
        if problem := objection(read_config(label, folder), largest):
            raise ConfigError(label, problem, fix="Save the adapter again without it")
        with warnings.catch_warnings():  # of fields that this version of PEFT does not have
            warnings.simplefilter("ignore")
            config = peft.PeftConfig.from_pretrained(str(folder))
        changes_weights = hasattr(config, "target_modules") and not config.is_prompt_learning
    except _UNFORESEEN as error:
        raise ConfigError(label, f"PEFT cannot read its adapter_config.json ({first_line(error)})") from error
    if not changes_weights:
        raise ConfigError(label, f"an adapter of the kind {config.peft_type.value} changes no weights of its base")
    return config


def _name_layers(config: Any, model: nn.Module, load: Callable[[], Mapping[str, Tensor]]) -> None:
    """Put the names of the layers that the adapter has tensors for in the place of patterns that choose layers."""
    if not (isinstance(config.target_modules, str) or any(getattr(config, key, None) for key in CHOOSE_LAYERS)):
        return
    modules = dict(model.named_modules())
    names = set()
    for key in load():
        words = key.removeprefix("base_model.model.").split(".")
        parts = (".".join(words[:end]) for end in range(len(words) - 1, 0, -1))
        name = next((part for part in parts if part in modules), None)
        if name is not None and ".".join(words)[len(name) + 1 :] not in dict(modules[name].named_parameters()):
            names.add(name)  # otherwise a module that was saved whole
    config.target_modules = names
    for key in CHOOSE_LAYERS:
        if hasattr(config, key):
            setattr(config, key, None)


def _is_tuner(module: nn.Module, kind: type) -> bool:
    return isinstance(module, kind) and isinstance(getattr(module, "get_base_layer", lambda: None)(), nn.Module)
