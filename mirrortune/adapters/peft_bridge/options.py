# SPDX-License-Identifier: Apache-2.0
"""Build the configuration of a PEFT tuner from the settings of an adapter, and check options and stored configurations.

No other module imports PEFT, an optional dependency; it is imported when a method needs it.
"""

from __future__ import annotations

import contextlib
import re
import types
import typing
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from mirrortune.adapters.layer_patterns import fits
from mirrortune.adapters.spec import AdapterSpec
from mirrortune.errors import ConfigError, VerificationError, first_line
from mirrortune.registry import option_errors

# Fields of a tuner's configuration that follow from other settings, or are not applicable to plain linear layers.
_DERIVED = {
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
_NEED_MORE = ("eva", "corda", "loftq")  # initialisations of LoRA that need data or quantisation
_ITERATIONS = re.compile(r"_niter_(\d+)$")  # in the name of an initialisation; other such fields end in "iter"
_MOST_ITERATIONS = 128
_NO_COUNTS = ("alpha", "prng", "seed", "token_indices")  # words in names of fields whose integers may be large


def import_peft(method: str) -> Any:
    """Import and return ``peft``; raise a ConfigError with the install command if it is missing."""
    try:
        import peft  # noqa: PLC0415  (optional, and takes seconds to import)
    except ImportError as error:
        raise ConfigError(
            "adapter.method",
            f"method '{method}' runs PEFT's tuner, and the package peft is not installed",
            fix='Install it: pip install "mirrortune[peft]"',
        ) from error
    return peft


def check_options(spec: AdapterSpec) -> None:
    """Check that the tuner of the method has all given options, and that none follows from other settings.

    Raises:
        ConfigError: it reports all problems together; also if the ``peft`` package is not installed.
    """
    chosen = spec.preset.peft
    if chosen is None:
        return
    hints = typing.get_type_hints(import_peft(spec.method).PEFT_TYPE_TO_CONFIG_MAPPING[chosen.kind])
    derived = {**_DERIVED, **dict.fromkeys(chosen.fixed, "adapter.method")}
    if chosen.rank is not None:
        derived[chosen.rank] = "adapter.rank"
    errors = [
        ConfigError(
            f"adapter.options.{key}", f"it follows from {derived[key]}",
            fix="Remove it" if " " in derived[key] else f"Set {derived[key]} in its place",
        )
        for key in spec.options
        if key in derived and key in hints
    ]  # fmt: skip
    allowed = {k: hint for k, hint in hints.items() if k not in derived and k not in _UNUSED and _is_plain(hint)}
    others = {key: value for key, value in spec.options.items() if key not in derived or key not in hints}
    errors += option_errors(others, allowed, owner=f"method '{spec.method}'", where="adapter.options")
    if spec.options.get("init_lora_weights") in _NEED_MORE:
        start = spec.options["init_lora_weights"]
        errors.append(
            ConfigError("adapter.options.init_lora_weights", f"'{start}' needs data or quantisation that is not here")
        )
    if name := _endless(spec.options):
        problem, most = "it requests too many iterations", f"up to {_MOST_ITERATIONS}"
        errors.append(ConfigError(f"adapter.options.{name}", problem, allowed=most))
    if errors:
        raise ConfigError.several(errors)
    if spec.rank != "full":
        with recorded_warnings():  # warnings are shown when the adapter is attached
            make_config(spec, ["anything"])


def make_config(spec: AdapterSpec, names: list[str]) -> Any:
    """Build PEFT's configuration of the tuner for the layers ``names``; raise a ConfigError if PEFT refuses it."""
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
    """Build the configuration that is stored with an adapter, for the layers ``names``.

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


def objection(described: Mapping[str, Any], largest: int, kind: str | None = None) -> str | None:
    """Return the reason why a configuration from a file must not be passed to PEFT; None if it may be passed.

    PEFT does not check the configuration: it builds the tuner that the file names (one of them downloads a model that
    the file names too), matches patterns with layer names, allocates any number of directions, and runs any number of
    iterations.

    Args:
        described: content of ``adapter_config.json``.
        largest: upper bound on the numbers of directions, tokens and layers.
        kind: PEFT's name of the tuner that it must be of; None for any.
    """
    if kind is not None and described.get("peft_type") != kind:
        found = repr(described.get("peft_type"))[:60]
        return f"'peft_type' of its adapter_config.json is {found}, which is not the tuner of its method ({kind})"
    if key := _holds_pattern(described):
        return f"'{key}' of its adapter_config.json holds a pattern, and patterns of a file are not run"
    if key := _endless(described):
        return f"'{key}' of its adapter_config.json requests more than {_MOST_ITERATIONS} iterations"
    if described.get("layer_replication") is not None:
        return "'layer_replication' of its adapter_config.json repeats layers of the base, which is not read"
    for key, value in described.items():
        if not any(word in key for word in _NO_COUNTS) and any(n > largest for n in _whole_numbers(value)):
            return f"'{key}' of its adapter_config.json counts more than the adapter and its base hold"
    return None


def _holds_pattern(described: Mapping[str, Any]) -> str | None:
    """Return the first field with a regular expression that PEFT would match with layer names; None if there is none.

    Fields that select the layers are not considered, because loading ignores them.
    """
    for key, value in described.items():
        if key.endswith("_pattern") and isinstance(value, dict):
            names = [*value]
        elif key in _BY_PATTERN and value is not None:
            names = value if isinstance(value, list) else [value]
        else:
            continue
        if not all(isinstance(name, str) and _NAME.fullmatch(name) for name in names):
            return key
    return None


def _endless(described: Mapping[str, Any]) -> str | None:
    """Return the first field that sets too many iterations, such as ``{"init_lora_weights": "pissa_niter_10000"}``;
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
    """Yield all integers in JSON data."""
    if isinstance(value, int):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _whole_numbers(inner)


def spelt_out(described: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Replace the patterns in PEFT's description by the layers among ``names`` that they match, so that loading runs no
    pattern.
    """
    found = dict(described)
    for key, value in described.items():
        where = f"adapter.options.{key}"
        if key.endswith("_pattern") and isinstance(value, dict):
            owners = {name: next((p for p in value if fits(rf"(.*\.)?({p})", name, where)), None) for name in names}
            found[key] = {name: value[pattern] for name, pattern in owners.items() if pattern is not None}
        elif key in _BY_PATTERN and isinstance(value, str):
            found[key] = [name for name in names if fits(value, name, where)]
    return found


@contextlib.contextmanager
def recorded_warnings() -> Iterator[list[warnings.WarningMessage]]:
    """Collect PEFT's warnings instead of showing them, so that the caller can show them once."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found


def _is_plain(hint: Any) -> bool:
    """Return whether a recipe can express values of the type ``hint``."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return all(map(_is_plain, typing.get_args(hint)))
    kind = typing.get_origin(hint) or hint
    return kind is typing.Literal or kind in (int, float, bool, str, list, dict, types.NoneType)
