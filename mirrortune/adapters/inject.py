# SPDX-License-Identifier: Apache-2.0
"""Attach a core to each target of a model, and list what is trained.

PEFT's tuners are attached in ``peft_bridge``, by the same rules: an adapted layer only has to name its trained
parameters and to merge (:class:`AdaptedLayer`).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from mirrortune.adapters.cores import Core
from mirrortune.adapters.kinds import CallableKind
from mirrortune.adapters.layers import SpectralLinear, SpectralWeight, replace_weight
from mirrortune.adapters.plain import attach_rows, held_in
from mirrortune.adapters.spec import AdapterSpec, build_core, check_spec
from mirrortune.adapters.strategies import Strategy
from mirrortune.adapters.svd import Factors, factorize
from mirrortune.adapters.targets import Target, Targets, find_targets
from mirrortune.errors import ConfigError

FactorSource = Callable[[str, Tensor, int], Factors]
"""(layer name, matrix (O, I) or stack (E, O, I), rank) -> float64 factors; the default computes them, callers may pass
a cache."""
LayerHook = Callable[[str, Tensor, Factors, Core], None]
"""Called with (layer name, matrix or stack, factors, core) for every layer that attach replaces."""
BANK = "_mirrortune_bank"
"""Attribute of a model in an :class:`~mirrortune.AdapterBank`."""
SpectralLayer = SpectralLinear | SpectralWeight
"""Adapts a weight: in place of the layer that applies it, or as a parametrisation of the weight."""


class AdaptedLayer(Protocol):
    """The interface of a layer that an adapter has changed, mirrortune's or PEFT's."""

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trained in this layer, by their names there."""

    def merged(self, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the layer's plain tensors with the adapter merged.

        Args:
            before: ``weight`` of the base model, in its own layout, and ``bias`` if the layer has one; any dtype.

        Returns:
            Those that the adapter changes, by the same names, in float64 on the CPU.
        """


@dataclass(slots=True, kw_only=True)
class Attachment:
    """The adapter of a model, stored as ``model.mirrortune``: how it was built and what it trains.

    Attributes:
        spec: how it was built.
        targets: the adapted weights and the head.
        layers: the adapted layers by name, in module order.
    """

    spec: AdapterSpec
    targets: Targets
    layers: Mapping[str, AdaptedLayer]


def attach(
    model: nn.Module,
    spec: AdapterSpec,
    *,
    targets: Targets | None = None,
    new_parameters: Iterable[str] = (),
    factor_source: FactorSource | None = None,
    pairs: dict[str, Tensor] | None = None,
    on_layer: LayerHook | None = None,
    strategies: Mapping[str, Strategy] | None = None,
) -> nn.Module:
    """Adapt ``model`` in place: attach cores to its target layers and freeze everything else but the head.

    Args:
        model: loaded model; its base weights are not changed.
        spec: what to build.
        targets: of ``model`` and ``spec``; None finds them.
        new_parameters: see :func:`find_targets`.
        factor_source: computes factors or reads them from a cache; None computes them.
        pairs: pairs by layer name, in place of the pairing's own (an adapter being loaded).
        on_layer: called for every layer, while its factors are in memory.
        strategies: by layer name, in place of the spec's.

    Returns:
        The same model, with ``model.mirrortune`` set.

    Raises:
        ConfigError: see :func:`check_spec` and :func:`find_targets`; also if the model is adapted already.
    """
    targets = checked_targets(model, spec, targets, new_parameters)
    for name, target in targets.layers.items():  # a core refuses its options before the model is changed
        S = torch.ones((target.count, target.rank) if target.count > 1 else (target.rank,))
        build_core(spec, S, name, target.shape, (pairs or {}).get(name))
    freeze(model, targets)
    listed = _listed_modules(model)
    layers: dict[str, AdaptedLayer] = {}
    for name, target in targets.layers.items():
        matrix = target.read(model)
        factors = (factor_source or _compute)(name, matrix, target.rank)
        core = build_core(spec, factors.S, name, target.shape, (pairs or {}).get(name))
        if on_layer:
            on_layer(name, matrix, factors, core)
        if target.kind.is_quantised:
            factors = factors.to(device=matrix.device, dtype=matrix.dtype)
        strategy = (strategies or {}).get(name, spec.strategy)
        layers[name] = _adapt(model, target, factors, core, strategy, listed)
    model.mirrortune = Attachment(spec=spec, targets=targets, layers=layers)  # type: ignore[assignment]
    thaw(model)
    return model


def checked_targets(
    model: nn.Module, spec: AdapterSpec, known: Targets | None, new_parameters: Iterable[str] = ()
) -> Targets:
    """Return the targets of a model that is about to be adapted: ``known`` ones, or those found for a checked ``spec``.

    Raises:
        ConfigError: see :func:`check_spec` and :func:`find_targets`; also if the model is adapted already.
    """
    if isinstance(getattr(model, "mirrortune", None), Attachment):
        raise ConfigError("attach", "the model has an adapter already", fix="Load the base model anew")
    if BANK in vars(model):
        fix = "add() it to the bank, or close() the bank first"
        raise ConfigError("attach", "the model is in an AdapterBank", fix=fix)
    if known is not None:
        return known
    check_spec(spec)
    return find_targets(model, spec, new_parameters)


def freeze(model: nn.Module, targets: Targets) -> None:
    """Require gradients for the head and the parameters trained as they are, and for nothing else."""
    trained = {*targets.head, *targets.plain}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def thaw(model: nn.Module) -> None:
    """Make rows that are trained alone parameters, and require gradients for all that is trained as it is: adapted
    layers have frozen all of their own.
    """
    attach_rows(model, attachment(model).targets.plain)
    for parameter in plain_parameters(model).values():
        parameter.requires_grad = True


def spectral_layers(model: nn.Module) -> dict[str, SpectralLayer]:
    """Return the layers of ``model`` that have a core, by name, in module order."""
    found = getattr(model, "mirrortune", None)
    layers = found.layers if isinstance(found, Attachment) else {}
    return {name: layer for name, layer in layers.items() if isinstance(layer, SpectralLayer)}


def attachment(model: nn.Module) -> Attachment:
    """Return the adapter of a model; ConfigError if it has none."""
    found = getattr(model, "mirrortune", None)
    if not isinstance(found, Attachment):
        raise ConfigError("model", "it has no adapter", fix="Call mirrortune.attach(model) first")
    return found


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters of the adapter by ``<layer>.<parameter>``; empty ones are left out."""
    return {
        f"{name}.{key}": parameter
        for name, layer in attachment(model).layers.items()
        for key, parameter in layer.adapter_parameters().items()
        if getattr(parameter, "ds_numel", parameter.numel())  # parameters that ZeRO-3 shards are empty between uses
    }


def plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters trained as they are, by their names without an adapter: the head, biases or all weights for
    ``bitfit`` and ``full``, and what ``also_train`` has chosen.
    """
    targets = attachment(model).targets
    parameters = held_in(model)
    return {name: parameters[name] for name in (*targets.head, *targets.plain)}


def trainable_parameters(model: nn.Module) -> int:
    """Count the numbers that an adapted model trains besides its task head."""
    head = set(attachment(model).targets.head)
    trained = [p for n, p in plain_parameters(model).items() if n not in head]
    return sum(p.numel() for p in [*adapter_parameters(model).values(), *trained])


def head_parameters(model: nn.Module) -> int:
    """Count the numbers of an adapted model's task head."""
    head = attachment(model).targets.head
    return sum(p.numel() for n, p in model.named_parameters() if n in set(head))


def _compute(name: str, weight: Tensor, rank: int) -> Factors:
    return factorize(weight, rank, name=name)


def _listed_modules(model: nn.Module) -> set[int]:
    """Return ids of modules that a forward may reach through a plain list, tuple or dict instead of by name.

    A module put in their place would not be called.
    """
    found: set[int] = set()
    for module in model.modules():
        for key, value in vars(module).items():
            if not key.startswith("_") and isinstance(value, (list, tuple, dict)):
                values = value.values() if isinstance(value, dict) else value
                found |= {id(entry) for entry in values if isinstance(entry, nn.Module)}
    return found


def _adapt(
    model: nn.Module, target: Target, factors: Factors, core: Core, strategy: Strategy | None, listed: Container[int]
) -> SpectralLayer:
    modules = {id(m): (m, parameter) for path, parameter in target.places for m in [model.get_submodule(path)]}
    (first, parameter), *others = modules.values()
    has_parents = all(path for path, _ in target.places)  # the model itself cannot be replaced
    kind = target.kind
    is_alone = parameter == "weight" and not others and has_parents and not target.layout.rows
    is_alone &= id(first) not in listed or kind.is_quantised
    if strategy == "dense" or not is_alone or not isinstance(kind, CallableKind) or not kind.is_callable(first):
        assert not kind.is_quantised
        spectral = SpectralWeight(target.weight(model), target.layout, factors, core)
        replace_weight(list(modules.values()), spectral)
        return spectral
    layer = SpectralLinear(first, factors, core, strategy, kind)
    for path, _ in target.places:  # one layer, wherever the module stands
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return layer
