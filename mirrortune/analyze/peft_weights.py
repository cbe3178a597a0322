# SPDX-License-Identifier: Apache-2.0
"""A base model with one of PEFT's adapters in it. PEFT itself loads and merges, so every tuner of its own is read; it
needs the whole base in memory, once.
"""

from __future__ import annotations

import copy
import importlib
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mirrortune.adapters.peft_bridge.options import CHOOSE_LAYERS, first_line, objection
from mirrortune.analyze.weights import Weights
from mirrortune.errors import ConfigError, VerificationError
from mirrortune.merging.in_memory import is_model_class
from mirrortune.models.load import ModelSource, load_model, resolve_dtype
from mirrortune.models.tensors import match_names

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
