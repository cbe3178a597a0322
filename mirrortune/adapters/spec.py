# SPDX-License-Identifier: Apache-2.0
"""How an adapter is built: its settings, their check, and the core and pairs that they give a layer."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from mirrortune.adapters.cores import CORES, Core
from mirrortune.adapters.pairings import PAIRINGS
from mirrortune.adapters.presets import PeftTuner, Preset, preset
from mirrortune.adapters.spectral_linear import Strategy
from mirrortune.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """How an adapter is built, independent of any model's weights; JSON-serialisable by its fields."""

    method: str = "mirror"
    rank: int | Literal["full"] | None = None
    pairing: str | None = None
    target_modules: str = "all-linear"
    seed: int = 0
    strategy: Strategy | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def preset(self) -> Preset:
        """The preset that ``method`` names."""
        return preset(self.method)

    @property
    def resolved_rank(self) -> int | Literal["full"]:
        """The rank asked for, or the preset's."""
        return self.preset.rank if self.rank is None else self.rank

    @property
    def resolved_pairing(self) -> str | None:
        """The pairing asked for, or the preset's."""
        return self.pairing or self.preset.pairing


def check_spec(spec: AdapterSpec) -> None:
    """Refuse unknown methods, pairings and options, and settings that the method would ignore; all at once.

    Raises:
        ConfigError: naming each setting, the nearest name and what is allowed.
    """
    chosen, errors = spec.preset, []
    if chosen.peft is not None:  # its options are PEFT's to know: peft_tuners.check_options
        errors += _peft_errors(spec, chosen.peft)
    elif chosen.core is None:
        ignored = {"rank": spec.rank, "pairing": spec.pairing, "options": spec.options or None}
        errors += [
            ConfigError(f"adapter.{key}", f"method '{spec.method}' has no {key}, got {value!r}", fix="Remove it")
            for key, value in ignored.items()
            if value is not None
        ]
    else:
        core = CORES.get(chosen.core, "adapter.method")
        checks: list[Callable[[], object]] = [
            lambda: CORES.check_options(chosen.core or "", spec.options, "adapter.options")
        ]
        if "pairs" in inspect.signature(core).parameters:
            checks.append(lambda: PAIRINGS.get(spec.resolved_pairing or "", "adapter.pairing"))
        elif spec.pairing:
            errors.append(ConfigError("adapter.pairing", f"method '{spec.method}' pairs nothing"))
        for check in checks:
            try:
                check()
            except ConfigError as error:
                errors.append(error)
    if errors:
        raise ConfigError.several(errors)


def _peft_errors(spec: AdapterSpec, tuner: PeftTuner) -> list[ConfigError]:
    """What a tuner of PEFT makes nothing of, among the settings that all methods share."""
    errors = []
    ignored = {"pairing": spec.pairing, "strategy": spec.strategy}
    if tuner.rank is None:
        ignored["rank"] = None if spec.rank is None else str(spec.rank)
    elif spec.rank == "full":
        errors.append(ConfigError("adapter.rank", "got 'full'", allowed=f"a number for method '{spec.method}'"))
    return errors + [
        ConfigError(f"adapter.{key}", f"method '{spec.method}' has no {key}, got {value!r}", fix="Remove it")
        for key, value in ignored.items()
        if value is not None
    ]


def build_core(spec: AdapterSpec, S: Tensor, name: str, shape: tuple[int, int], pairs: Tensor | None = None) -> Core:
    """The untrained core that ``spec`` gives the layer ``name`` of ``shape`` (O, I) with singular values ``S`` (R,)."""
    core_name = spec.preset.core
    assert core_name is not None
    core_class = CORES.get(core_name, "adapter.method")
    wanted = inspect.signature(core_class).parameters
    runtime: list[Any] = [S.float()]
    if "pairs" in wanted:
        runtime.append(pairs if pairs is not None else make_pairs(spec, S.shape[0], name))
    if "shape" in wanted:
        runtime.append(shape)
    return core_class(*runtime, **spec.options)


def needs_saliency(spec: AdapterSpec) -> bool:
    """Whether the spec's pairing is made from measured gradients."""
    pairing = spec.resolved_pairing
    return pairing is not None and "saliency" in inspect.signature(PAIRINGS.get(pairing, "adapter.pairing")).parameters


def make_pairs(spec: AdapterSpec, rank: int, name: str, saliency: Tensor | None = None) -> Tensor:
    """Pairs (P, 2) of the spec's pairing for one layer.

    Args:
        spec: names the pairing; its seed and ``name`` seed the pairing's generator.
        rank: number of directions R.
        name: of the layer.
        saliency: (R, R) for a pairing that is made from measured gradients.

    Raises:
        ConfigError: if such a pairing gets no saliency.
    """
    digest = hashlib.sha256(f"{spec.seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    pairing = PAIRINGS.get(spec.resolved_pairing or "", "adapter.pairing")
    if not needs_saliency(spec):
        return pairing(rank, generator)
    if saliency is None:
        raise ConfigError(
            "adapter.pairing",
            f"'{spec.resolved_pairing}' is measured on a task, and there is none here",
            fix="Use mirrortune train, or another pairing",
        )
    return pairing(rank, generator, saliency)
