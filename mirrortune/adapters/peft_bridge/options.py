# SPDX-License-Identifier: Apache-2.0
"""From our settings to the configuration of a tuner of PEFT, and what of it is not the user's to set.

The only module that imports PEFT (the optional extra), when a method asks for it.
"""

from __future__ import annotations

import contextlib
import re
import types
import typing
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from mirrortune.adapters.spec import AdapterSpec
from mirrortune.errors import ConfigError, VerificationError
from mirrortune.registry import option_errors

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
           "alora_invocation_tokens", "megatron_config", "megatron_core", "ensure_weight_tying", "use_qalora",
           "qalora_group_size", "use_effective_conv2d", "runtime_config")  # fmt: skip
CHOOSE_LAYERS = ("exclude_modules", "layers_to_transform", "layers_pattern")
_BY_PATTERN = ("feedforward_modules", "modules_to_save")
_NAME = re.compile(r"[\w.-]+")
_NEED_MORE = ("eva", "corda", "loftq")  # ways to start LoRA
_ITERATIONS = re.compile(r"_niter_(\d+)$")  # in the name of a way to start LoRA; otherwise "iter" ends the field's name
_MOST_ITERATIONS = 128
_NO_COUNTS = ("alpha", "prng", "seed")  # words in the names of fields whose whole numbers may be large


def import_peft(method: str) -> Any:
    """The package, or the error that says how to get it."""
    try:
        import peft  # noqa: PLC0415  (optional, and seconds to import)
    except ImportError as error:
        raise ConfigError(
            "adapter.method",
            f"method '{method}' runs PEFT's tuner, and the package peft is not installed",
            fix='Install it: pip install "mirrortune[peft]"',
        ) from error
    return peft


def check_options(spec: AdapterSpec) -> None:
    """Refuse options that the method's tuner does not have or that are not the user's to set; all at once.

    Raises:
        ConfigError: also if the ``peft`` package is not installed.
    """
    chosen = spec.preset.peft
    if chosen is None:
        return
    hints = typing.get_type_hints(import_peft(spec.method).PEFT_TYPE_TO_CONFIG_MAPPING[chosen.kind])
    ours = {**_OURS, **dict.fromkeys(chosen.fixed, "adapter.method")}
    if chosen.rank is not None:
        ours[chosen.rank] = "adapter.rank"
    errors = [
        ConfigError(f"adapter.options.{key}", f"it follows from {ours[key]}", fix="Remove it")
        for key in spec.options
        if key in ours and key in hints
    ]
    allowed = {k: hint for k, hint in hints.items() if k not in ours and k not in _UNUSED and _is_plain(hint)}
    others = {key: value for key, value in spec.options.items() if key not in ours or key not in hints}
    errors += option_errors(others, allowed, owner=f"method '{spec.method}'", where="adapter.options")
    if spec.options.get("init_lora_weights") in _NEED_MORE:
        start = spec.options["init_lora_weights"]
        errors.append(
            ConfigError("adapter.options.init_lora_weights", f"'{start}' needs data or quantisation that is not here")
        )
    if name := _endless(spec.options):
        problem, most = "it asks for too many iterations", f"up to {_MOST_ITERATIONS}"
        errors.append(ConfigError(f"adapter.options.{name}", problem, allowed=most))
    if errors:
        raise ConfigError.several(errors)
    if spec.rank != "full":
        with recorded_warnings():  # said once, when the adapter is attached
            make_config(spec, ["anything"])


def make_config(spec: AdapterSpec, names: list[str]) -> Any:
    """PEFT's configuration of the spec's tuner for the layers ``names``; ConfigError if PEFT refuses it."""
    chosen = spec.preset.peft
    assert chosen is not None
    config_class = import_peft(spec.method).PEFT_TYPE_TO_CONFIG_MAPPING[chosen.kind]
    fields: dict[str, Any] = {**chosen.defaults, **chosen.fixed}
    if chosen.rank is not None:
        fields[chosen.rank] = spec.resolved_rank
    if chosen.alpha is not None:
        fields[chosen.alpha] = spec.resolved_rank
    try:
        return config_class(**{**fields, **spec.options}, target_modules=names)
    except (ValueError, TypeError) as error:
        raise ConfigError("adapter.options", f"PEFT refuses them: {first_line(error)}") from error


def stored_config(described: dict[str, Any], names: list[str]) -> Any:
    """The configuration that an adapter folder holds, for the layers ``names``.

    Raises:
        VerificationError: PEFT cannot read it.
    """
    peft = import_peft(str(described.get("peft_type")).lower())
    ignored = {"modules_to_save", "task_type", "inference_mode", *CHOOSE_LAYERS, *_UNUSED} - {"peft_version"}
    fields = {k: v for k, v in described.items() if k not in ignored}
    try:
        return peft.PeftConfig.from_peft_type(**{**fields, "target_modules": names})
    except (ValueError, TypeError, KeyError) as error:
        raise VerificationError("adapter_config.json", f"PEFT cannot read it ({first_line(error)})") from error


def objection(described: Mapping[str, Any], largest: int) -> str | None:
    """Why PEFT may not be given a configuration from a file; None if it may.

    PEFT takes it at its word: it matches patterns with the names of layers, makes room for any number of directions,
    and repeats a search as often as it is told.

    Args:
        described: what ``adapter_config.json`` holds.
        largest: no number of directions, tokens or layers in it can be meant that is above this.
    """
    if key := _holds_pattern(described):
        return f"'{key}' of its adapter_config.json holds a pattern, and patterns of a file are not run"
    if key := _endless(described):
        return f"'{key}' of its adapter_config.json asks for more than {_MOST_ITERATIONS} iterations"
    if described.get("layer_replication") is not None:
        return "'layer_replication' of its adapter_config.json repeats layers of the base, which is not read"
    for key, value in described.items():
        if not any(word in key for word in _NO_COUNTS) and any(n > largest for n in _whole_numbers(value)):
            return f"'{key}' of its adapter_config.json counts more than the adapter and its base hold"
    return None


def _holds_pattern(described: Mapping[str, Any]) -> str | None:
    """The first field by which PEFT would match names of layers with a regular expression from a file; None if there
    is none. Fields that choose the layers are not looked at.
    """
    for key, value in described.items():
        if key.endswith("_pattern") and isinstance(value, dict):
            names = [*value]
        elif key in _BY_PATTERN and value is not None:
            names = [value] if isinstance(value, str) else [*value]
        else:
            continue
        if not all(isinstance(name, str) and _NAME.fullmatch(name) for name in names):
            return key
    return None


def _endless(described: Mapping[str, Any]) -> str | None:
    """The first field that has PEFT repeat a search too often, such as ``{"init_lora_weights": "pissa_niter_10000"}``;
    None if there is none.
    """
    for key, value in described.items():
        if isinstance(value, dict) and (inner := _endless(value)):
            return f"{key}.{inner}"
        asked = _ITERATIONS.search(value) if isinstance(value, str) else None
        count = asked[1] if asked else value if key.endswith("iter") and isinstance(value, int) else 0
        if len(str(count)) > len(str(_MOST_ITERATIONS)) or int(count) > _MOST_ITERATIONS:
            return key
    return None


def _whole_numbers(value: Any) -> Iterator[int]:
    """All whole numbers in JSON data."""
    if isinstance(value, int):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _whole_numbers(inner)


def spelt_out(described: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """PEFT's description with patterns of the user's replaced by the names of the layers, of ``names``, that they mean,
    so that whoever loads it has none to match.
    """
    found = dict(described)
    for key, value in described.items():
        if key.endswith("_pattern") and isinstance(value, dict):
            owners = {name: next((p for p in value if re.match(rf"(.*\.)?({p})$", name)), None) for name in names}
            found[key] = {name: value[pattern] for name, pattern in owners.items() if pattern is not None}
        elif key in _BY_PATTERN and isinstance(value, str):
            found[key] = [name for name in names if re.fullmatch(value, name)]
    return found


@contextlib.contextmanager
def recorded_warnings() -> Iterator[list[warnings.WarningMessage]]:
    """Keeps what PEFT warns of, to be said in its place and once."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found


def first_line(error: BaseException | str) -> str:
    """What a foreign error or warning says first, in a length for a message of ours."""
    return str(error).strip().split("\n")[0][:300] or type(error).__name__


def _is_plain(hint: Any) -> bool:
    """Whether a recipe can say a value of the type ``hint``."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return all(map(_is_plain, typing.get_args(hint)))
    kind = typing.get_origin(hint) or hint
    return kind is typing.Literal or kind in (int, float, bool, str, list, dict, types.NoneType)
