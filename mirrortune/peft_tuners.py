# SPDX-License-Identifier: Apache-2.0
"""Runs the tuners of the ``peft`` package (the optional extra) where ours would put cores: the same target layers, the
same head, the same loop.

The only module that imports PEFT. Its tuners are attached in place and without a wrapper, so that the model keeps its
own class and forward; what is written to disk are PEFT's own two files, which ``PeftModel.from_pretrained`` reads.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mirrortune.adapters.inject import Attachment, Targets, attachment, freeze, prepare_targets
from mirrortune.adapters.spec import AdapterSpec
from mirrortune.errors import ConfigError, VerificationError, did_you_mean
from mirrortune.locations import PACKAGE_SCHEME, package_folder

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
_NAME = "default"  # PEFT allows several adapters in a model; ours is the only one
# Settings of a tuner's configuration that follow from ours, or that a plain linear layer of ours has no use for.
_OURS = {
    "target_modules": "adapter.target_modules",
    "exclude_modules": "adapter.target_modules",
    "layers_to_transform": "adapter.target_modules",
    "layers_pattern": "adapter.target_modules",
    "modules_to_save": "the task, whose head is always trained and saved",
    "task_type": "the task",
    "base_model_name_or_path": "model.name",
    "revision": "model.revision",
    "bias": "the method: biases stay frozen, as in every adapter here",
    "inference_mode": "the command",
    "peft_type": "adapter.method",
    "fan_in_fan_out": "the layer",
}
_UNUSED = ("auto_mapping", "peft_version", "target_parameters", "layer_replication", "trainable_token_indices",
           "alora_invocation_tokens", "megatron_core", "ensure_weight_tying")  # fmt: skip
_TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "ForSeq2SeqLM": "SEQ_2_SEQ_LM",
}


@dataclass(frozen=True, slots=True)
class PeftLayer:
    """A layer that a tuner has replaced, seen as :class:`mirrortune.adapters.inject.AdaptedLayer`.

    Attributes:
        name: of the layer in the model.
        module: PEFT's layer, which holds the base layer.
        trained: names of its trained parameters.
    """

    name: str
    module: nn.Module
    trained: tuple[str, ...]

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained in this layer."""
        return {name: self.module.get_parameter(name) for name in self.trained}

    @torch.no_grad()
    def merged(self, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weight and bias by PEFT's own merge, on a copy in float64 on the CPU.

        Raises:
            ConfigError: if PEFT cannot merge this tuner, with its reason.
        """
        layer: Any = copy.deepcopy(self.module).to(device="cpu", dtype=torch.float64)
        base = layer.get_base_layer()
        kept = self.module.get_base_layer()  # type: ignore[operator]
        for key, tensor in before.items():
            now = kept.get_parameter(key).cpu()
            # What training saw in 16 bits the checkpoint may hold in 32. A tuner that keeps its share of the weight out
            # of the base layer (PiSSA) has changed what is there, and only that belongs to what it learned.
            if torch.equal(now, tensor.to(device="cpu", dtype=now.dtype)):
                base.get_parameter(key).copy_(tensor)
        plain = {key: base.get_parameter(key).clone() for key in before}
        try:
            layer.merge(safe_merge=True)
        except (NotImplementedError, ValueError) as error:
            raise ConfigError(self.name, f"PEFT cannot merge it ({_first_line(error)})") from error
        after = {key: base.get_parameter(key).detach() for key in before}
        return {k: t for k, t in after.items() if k == "weight" or not torch.equal(t, plain[k])}


@dataclass(slots=True, kw_only=True)
class PeftAttachment(Attachment):
    """An attachment whose layers are PEFT's.

    Attributes:
        tuner: PEFT's own view of the model; it also holds what the layers share.
    """

    tuner: nn.Module


def check_options(spec: AdapterSpec) -> None:
    """Refuse options that the method's tuner does not have or that are not the user's to set; all at once.

    Raises:
        ConfigError: also if the ``peft`` package is not installed.
    """
    chosen = spec.preset.peft
    if chosen is None:
        return
    config_class = _peft(spec.method).PEFT_TYPE_TO_CONFIG_MAPPING[chosen.kind]
    known = {f.name for f in dataclasses.fields(config_class)}
    ours = {**_OURS, **dict.fromkeys(chosen.fixed, "adapter.method")}
    if chosen.rank is not None:
        ours[chosen.rank] = "adapter.rank"
    allowed = sorted(known - ours.keys() - set(_UNUSED))
    errors = []
    for key in spec.options:
        where = f"adapter.options.{key}"
        if key in ours and key in known:
            errors.append(ConfigError(where, f"it follows from {ours[key]}", fix="Remove it"))
        elif key not in allowed:
            problem = f"method '{spec.method}' has no option '{key}'.{did_you_mean(key, allowed)}"
            errors.append(ConfigError(where, problem, allowed=", ".join(allowed)))
    if errors:
        raise ConfigError.several(errors)
    _make_config(spec, ["anything"])


def attach_tuner(
    model: nn.Module,
    spec: AdapterSpec,
    *,
    new_parameters: Iterable[str] = (),
    config: dict[str, Any] | None = None,
    on_layer: Callable[[str, Tensor], None] | None = None,
) -> nn.Module:
    """Adapt ``model`` in place by a tuner of PEFT: the layers that ours would take, all else frozen
    but the head.

    Args:
        model: loaded model, or one on the meta device.
        spec: what to build; its seed is that of the tuner's random numbers.
        new_parameters: see :func:`mirrortune.adapters.inject.find_targets`.
        config: PEFT's own configuration, of an adapter that is being loaded.
        on_layer: told (name, weight) of every layer before it is replaced.

    Raises:
        ConfigError: a missing package, a wrong option, or a layer that the tuner cannot take.
    """
    peft = _peft(spec.method)
    targets = prepare_targets(model, spec, new_parameters)
    check_options(spec)
    names = list(targets.layers)
    built = _make_config(spec, names) if config is None else _stored_config(config, names)
    for name in names if on_layer else ():
        on_layer(name, model.get_submodule(name).get_parameter("weight"))  # type: ignore[misc]
    freeze(model, targets)
    tuner_class = peft.PEFT_TYPE_TO_TUNER_MAPPING[built.peft_type]
    with _seeded(model, spec.seed):
        try:
            tuner = tuner_class(model, built, _NAME)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ConfigError(
                "adapter", f"PEFT cannot put '{spec.method}' into this model: {_first_line(error)}"
            ) from error
    peft.tuners.tuners_utils.cast_adapter_dtype(model, _NAME)
    layers = _tuned_layers(model, targets, peft)
    for name in targets.head:
        model.get_parameter(name).requires_grad = True
    model.mirrortune = PeftAttachment(spec=spec, targets=targets, layers=layers, tuner=tuner)  # type: ignore[assignment]
    return model


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What PEFT's own file of an adapted model holds, head included; the tensors are the model's own, not copies."""
    found = _attached(model)
    peft = _peft(found.spec.method)
    state: dict[str, Tensor] = peft.get_peft_model_state_dict(
        _Wrapped(found.tuner), adapter_name=_NAME, save_embedding_layers=False
    )
    parameters = dict(model.named_parameters())
    return state | {f"base_model.model.{name}": parameters[name].detach() for name in found.targets.head}


def restore_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put the tensors of :func:`adapter_tensors`, by the same names and shapes, back into an adapted model."""
    found = _attached(model)
    peft = _peft(found.spec.method)
    head = {f"base_model.model.{name}": name for name in found.targets.head}
    with torch.no_grad():
        for key, name in head.items():
            model.get_parameter(name).copy_(tensors[key])
    peft.set_peft_model_state_dict(
        _Wrapped(found.tuner), {k: t for k, t in tensors.items() if k not in head}, adapter_name=_NAME
    )


def peft_config(model: nn.Module, base: dict[str, Any]) -> dict[str, Any]:
    """PEFT's own description of an adapted model's adapter.

    Args:
        model: adapted by :func:`attach_tuner`.
        base: the base model's identity; ``auto_class``, ``name`` and ``commit`` are read.
    """
    found = _attached(model)
    configs: Any = found.tuner.peft_config
    described: dict[str, Any] = {k: sorted(v) if isinstance(v, set) else v for k, v in configs[_NAME].to_dict().items()}
    endings = [kind for ending, kind in _TASK_TYPES.items() if str(base.get("auto_class")).endswith(ending)]
    described |= {
        "task_type": endings[0] if endings else None,
        "base_model_name_or_path": _location(base.get("name")),
        "revision": base.get("commit"),
        "modules_to_save": _modules_of(model, found.targets.head) or None,
        "inference_mode": True,
    }
    return dict(json.loads(json.dumps(described, sort_keys=True)))


def count_trained(model: nn.Module, spec: AdapterSpec, new_parameters: Iterable[str]) -> tuple[int, int]:
    """How many numbers the spec's tuner trains in ``model``, and how many it adds in all; found on a copy without
    weights.
    """
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in model.parameters()
    }
    empty = attach_tuner(copy.deepcopy(model, memo), spec, new_parameters=new_parameters)
    trained = sum(p.numel() for layer in attachment(empty).layers.values() for p in layer.adapter_parameters().values())
    added = sum(p.numel() for p in empty.parameters()) - sum(p.numel() for p in model.parameters())
    return trained, added


class _Wrapped(nn.Module):
    """The names that PEFT's files have: a ``PeftModel`` calls its tuner ``base_model``."""

    def __init__(self, tuner: nn.Module) -> None:
        super().__init__()
        self.base_model = tuner
        self.peft_config = tuner.peft_config


def _peft(method: str) -> Any:
    try:
        import peft  # noqa: PLC0415  (optional, and seconds to import)
    except ImportError as error:
        raise ConfigError(
            "adapter.method",
            f"method '{method}' runs PEFT's tuner, and the package peft is not installed",
            fix='Install it: pip install "mirrortune[peft]"',
        ) from error
    return peft


def _attached(model: nn.Module) -> PeftAttachment:
    found = attachment(model)
    assert isinstance(found, PeftAttachment)
    return found


def _make_config(spec: AdapterSpec, names: list[str]) -> Any:
    chosen = spec.preset.peft
    assert chosen is not None
    config_class = _peft(spec.method).PEFT_TYPE_TO_CONFIG_MAPPING[chosen.kind]
    fields: dict[str, Any] = {**chosen.defaults, **chosen.fixed}
    if chosen.rank is not None:
        fields[chosen.rank] = spec.resolved_rank
    if chosen.alpha is not None:
        fields[chosen.alpha] = spec.resolved_rank
    try:
        return config_class(**{**fields, **spec.options}, target_modules=names)
    except (ValueError, TypeError) as error:
        raise ConfigError("adapter.options", f"PEFT refuses them: {_first_line(error)}") from error


def _stored_config(described: dict[str, Any], names: list[str]) -> Any:
    peft = _peft(str(described.get("peft_type")).lower())
    fields = {k: v for k, v in described.items() if k not in ("modules_to_save", "task_type", "inference_mode")}
    try:
        return peft.PeftConfig.from_peft_type(**{**fields, "target_modules": names})
    except (ValueError, TypeError, KeyError) as error:
        raise VerificationError(CONFIG_FILE, f"PEFT cannot read it ({_first_line(error)})") from error


def _location(name: str | None) -> str | None:
    """Where PEFT, which does not know models inside packages, finds the base model."""
    is_packaged = name is not None and name.startswith(PACKAGE_SCHEME)
    return str(package_folder(name)) if name and is_packaged else name


def _tuned_layers(model: nn.Module, targets: Targets, peft: Any) -> dict[str, PeftLayer]:
    kind = peft.tuners.tuners_utils.BaseTunerLayer
    tuned = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    assert tuned.keys() == targets.layers.keys()
    seen: set[int] = set()
    layers = {}
    for name, module in tuned.items():
        own = [(key, p) for key, p in module.named_parameters() if p.requires_grad and id(p) not in seen]
        seen |= {id(p) for _, p in own}  # what layers share is trained once
        layers[name] = PeftLayer(name, module, tuple(key for key, _ in own))
    return layers


def _modules_of(model: nn.Module, head: Iterable[str]) -> list[str]:
    """The largest modules whose parameters are all the head's: PEFT saves modules, not parameters."""
    wanted = set(head)
    found: list[str] = []
    for name, module in model.named_modules():
        own = {f"{name}.{key}" for key, _ in module.named_parameters()}
        if name and own and own <= wanted and not any(name.startswith(f"{larger}.") for larger in found):
            found.append(name)
    return found


@contextlib.contextmanager
def _seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Random numbers of a seed, the caller's own generators left as they were."""
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        torch.manual_seed(seed)
        yield


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__
