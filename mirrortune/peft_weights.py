# SPDX-License-Identifier: Apache-2.0
"""A base model with one of PEFT's adapters in it. PEFT itself loads and merges, so every tuner of its own is read; it
needs the whole base in memory, once.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mirrortune.errors import ConfigError, VerificationError
from mirrortune.merging import is_model_class
from mirrortune.model import ModelSource, load_model, resolve_dtype
from mirrortune.peft_configs import CHOOSE_LAYERS, holds_pattern
from mirrortune.weights import Weights, match_names

_AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftWeights:
    """See :class:`mirrortune.weights.Weights`; weights without a tuner are the base's own.

    Attributes:
        layers: the tuner layer of every base tensor that has one.
    """

    label: str
    base: Weights
    layers: dict[str, Any]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See :class:`mirrortune.weights.Weights`."""
        return self.base.shapes

    @property
    def source(self) -> ModelSource | None:
        """See :class:`mirrortune.weights.Weights`."""
        return self.base.source

    def read(self, name: str, part: int | None = None) -> Tensor:
        """See :class:`mirrortune.weights.Weights`; merged by PEFT in float32."""
        layer = self.layers.get(name)
        if layer is None:
            return self.base.read(name, part)
        merged = copy.deepcopy(layer).float()
        merged.merge()
        weight: Tensor = merged.get_base_layer().weight.detach()
        return weight if part is None else weight[part]

    def angles(self, name: str) -> list[float] | None:
        """None: see :class:`mirrortune.weights.Weights`."""
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
    config = peft.PeftConfig.from_pretrained(folder)
    if key := holds_pattern(config.to_dict()):
        raise ConfigError(
            label, f"'{key}' of its adapter_config.json holds a pattern, and patterns of a file are not run",
            allowed="names of layers", fix="Save the adapter again with names",
        )  # fmt: skip
    auto_class = _AUTO_CLASSES.get(str(getattr(config.task_type, "value", config.task_type)))
    name = auto_class or (config.auto_mapping or {}).get("base_model_class", "AutoModel")
    name = name if is_model_class(name) else "AutoModel"
    dtype = resolve_dtype("auto", base.source.config, torch.device("meta"))
    model = load_model(base.source, name, {}, dtype, None).model
    _name_layers(config, model, lambda: peft.utils.load_peft_weights(folder, device="cpu"))
    try:
        with warnings.catch_warnings():  # PEFT's own, about transformers
            warnings.simplefilter("ignore")
            adapted = peft.PeftModel.from_pretrained(model, folder, config=config, ignore_mismatched_sizes=True)
    except (ValueError, RuntimeError, OSError) as error:
        text = str(error).strip().split("\n")[0][:300]
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
