# SPDX-License-Identifier: Apache-2.0
"""Finds the layers to adapt by what they are, puts a core into each, and says what is trained.

Adapters of others are attached elsewhere, by the same rules: their layers only have to say what they train and what
they merge to (:class:`AdaptedLayer`).

Nothing here knows a model family. Inside ``model.base_model`` every linear layer is a target unless its weight is
shared or newly initialised; what lies outside it, and what the checkpoint did not hold, is the task head, trained in
full. Output embeddings stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from mirrortune.adapters.cores import Core
from mirrortune.adapters.factorize import Factors, factorize, resolve_rank
from mirrortune.adapters.layer_names import matches, no_match
from mirrortune.adapters.pair_lists import check_fit
from mirrortune.adapters.spec import AdapterSpec, build_core, check_spec
from mirrortune.adapters.spectral_linear import SpectralLinear
from mirrortune.errors import ConfigError

FactorSource = Callable[[str, Tensor, int], Factors]
"""(layer name, weight (O, I), rank) -> float64 factors; the default computes, callers may pass a cache."""
LayerHook = Callable[[str, Tensor, Factors, Core], None]
"""(layer name, weight, factors, core), called for every layer that attach replaces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What attaching would do to a model: names only, so it can be made on the meta device.

    Attributes:
        layers: adapted linear layers, name -> (out_features, in_features), in module order.
        head: names of the task head's parameters, trained in full.
        plain: names of base parameters trained as they are (``bitfit``, ``full``).
        skipped: weight-bearing layers left frozen, name -> reason.
    """

    layers: dict[str, tuple[int, int]]
    head: tuple[str, ...]
    plain: tuple[str, ...]
    skipped: dict[str, str]


class AdaptedLayer(Protocol):
    """What the rest of the project asks of a layer that an adapter has changed, whoever wrote the adapter."""

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained in this layer, by its name there."""

    def merged(self, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The layer's plain tensors with the adapter in them.

        Args:
            before: ``weight`` (O, I) and, if the layer has one, ``bias`` (O,) of the base model, in any dtype.

        Returns:
            Those that the adapter changes, by the same names, in float64 on the CPU.
        """


@dataclass(slots=True, kw_only=True)
class Attachment:
    """Kept on an adapted model as ``model.mirrortune``: how it was built and what it trains.

    Attributes:
        spec: how it was built.
        targets: what was adapted.
        layers: the adapted layers by name, in module order.
    """

    spec: AdapterSpec
    targets: Targets
    layers: Mapping[str, AdaptedLayer]


def find_targets(model: nn.Module, spec: AdapterSpec, new_parameters: Iterable[str] = ()) -> Targets:
    """Which layers of ``model`` an adapter by ``spec`` takes, and which parameters are its head.

    Args:
        model: any module; for transformers models the part under ``base_model_prefix`` is adapted.
        spec: method, rank and target pattern.
        new_parameters: names of parameters that no checkpoint filled; they belong to the head.

    Raises:
        ConfigError: if no layer matches ``target_modules`` (with the nearest names), or a rank or a list of pairs does
            not fit.
    """
    new = set(new_parameters)
    prefix = _base_prefix(model)
    output = _output_embedding_ids(model)
    parameters = dict(model.named_parameters())
    head = tuple(
        name for name, p in parameters.items() if (name in new or not name.startswith(prefix)) and id(p) not in output
    )
    candidates, skipped = _candidates(model, prefix, new, output)
    plain = _plain_parameters(parameters, spec.preset.plain, set(head))
    if not spec.preset.is_adapter:
        return Targets(layers={}, head=head, plain=plain, skipped={})
    where = "adapter.target_modules"
    layers = {n: shape for n, shape in candidates.items() if matches(n, spec.target_modules, where)}
    if not layers:
        raise no_match(where, spec.target_modules, candidates)
    if spec.preset.core is not None:
        ranks = {name: resolve_rank(spec.resolved_rank, shape, name) for name, shape in layers.items()}
        if spec.pair_lists is not None:
            check_fit(spec.pair_lists, ranks)
    return Targets(layers=layers, head=head, plain=plain, skipped=skipped)


def attach(
    model: nn.Module,
    spec: AdapterSpec,
    *,
    new_parameters: Iterable[str] = (),
    factor_source: FactorSource | None = None,
    pairs: dict[str, Tensor] | None = None,
    on_layer: LayerHook | None = None,
) -> nn.Module:
    """Adapt ``model`` in place: cores into its target layers, everything else frozen but the head.

    Args:
        model: loaded model; its base weights are not changed.
        spec: what to build.
        new_parameters: see :func:`find_targets`.
        factor_source: where factors come from; None computes them.
        pairs: pairs by layer name, in place of the pairing's own (an adapter being loaded).
        on_layer: told of every layer, while its factors are at hand.

    Returns:
        The same model, with ``model.mirrortune`` set.

    Raises:
        ConfigError: see :func:`check_spec` and :func:`find_targets`; also if the model is adapted already.
    """
    targets = prepare_targets(model, spec, new_parameters)
    ranks = {name: resolve_rank(spec.resolved_rank, shape, name) for name, shape in targets.layers.items()}
    for name, shape in targets.layers.items():  # what a core refuses, it refuses before the model is touched
        build_core(spec, torch.ones(ranks[name]), name, shape, (pairs or {}).get(name))
    freeze(model, targets)
    for name, shape in targets.layers.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        factors = (factor_source or _compute)(name, layer.weight, ranks[name])
        core = build_core(spec, factors.S, name, shape, (pairs or {}).get(name))
        if on_layer:
            on_layer(name, layer.weight, factors, core)
        _replace(model, name, SpectralLinear(layer, factors, core, spec.strategy))
    model.mirrortune = Attachment(spec=spec, targets=targets, layers=spectral_layers(model))  # type: ignore[assignment]
    return model


def prepare_targets(model: nn.Module, spec: AdapterSpec, new_parameters: Iterable[str]) -> Targets:
    """The targets of a model that is about to be adapted, after every check that can be made before it is touched."""
    if isinstance(getattr(model, "mirrortune", None), Attachment):
        raise ConfigError("attach", "the model has an adapter already", fix="Load the base model anew")
    check_spec(spec)
    return find_targets(model, spec, new_parameters)


def freeze(model: nn.Module, targets: Targets) -> None:
    """Gradients for the head and the plainly trained parameters of an unadapted model, and for nothing else."""
    trained = {*targets.head, *targets.plain}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def spectral_layers(model: nn.Module) -> dict[str, SpectralLinear]:
    """The adapted layers of ``model`` by name, in module order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, SpectralLinear)}


def attachment(model: nn.Module) -> Attachment:
    """What :func:`attach` left on the model; ConfigError if it has no adapter."""
    found = getattr(model, "mirrortune", None)
    if not isinstance(found, Attachment):
        raise ConfigError("model", "it has no adapter", fix="Call mirrortune.attach(model) first")
    return found


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trained numbers of the adapter: ``<layer>.<parameter>`` -> parameter; empty ones are left out."""
    return {
        f"{name}.{key}": parameter
        for name, layer in attachment(model).layers.items()
        for key, parameter in layer.adapter_parameters().items()
        if parameter.numel()
    }


def plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Everything trained that is not in the adapter: the head, and biases or weights for ``bitfit`` and ``full``."""
    targets = attachment(model).targets
    parameters = dict(model.named_parameters())
    return {name: parameters[name] for name in (*targets.head, *targets.plain)}


def trainable_parameters(model: nn.Module) -> int:
    """How many numbers an adapted model trains besides its task head."""
    head = set(attachment(model).targets.head)
    trained = [p for n, p in plain_parameters(model).items() if n not in head]
    return sum(p.numel() for p in [*adapter_parameters(model).values(), *trained])


def head_parameters(model: nn.Module) -> int:
    """How many numbers the task head of an adapted model has."""
    head = attachment(model).targets.head
    return sum(p.numel() for n, p in model.named_parameters() if n in set(head))


def _base_prefix(model: nn.Module) -> str:
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""


def _output_embedding_ids(model: nn.Module) -> set[int]:
    getter = getattr(model, "get_output_embeddings", None)
    module: object = getter() if callable(getter) else None
    return {id(p) for p in module.parameters()} if isinstance(module, nn.Module) else set()


def _candidates(
    model: nn.Module, prefix: str, new: set[str], output: set[int]
) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    attention = {f"{name}.out_proj" for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    found: dict[str, tuple[int, int]] = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.ndim < 2 or not name.startswith(prefix):
            continue
        if id(weight) in output or f"{name}.weight" in new:
            continue  # the output embedding stays frozen; a newly initialised layer is part of the head
        if name in attention:
            skipped[name] = "nn.MultiheadAttention reads its weight without calling the layer"
        elif not isinstance(module, nn.Linear):
            skipped[name] = f"{type(module).__name__} is not a linear layer"
        elif owners[id(weight)] > 1:
            skipped[name] = "its weight is shared with another layer"
        else:
            found[name] = (module.out_features, module.in_features)
    return found, skipped


def _plain_parameters(parameters: dict[str, nn.Parameter], kind: str, head: set[str]) -> tuple[str, ...]:
    ending = {"none": None, "bias": "bias", "all": ""}[kind]
    return tuple(n for n in parameters if ending is not None and n not in head and n.endswith(ending))


def _compute(name: str, weight: Tensor, rank: int) -> Factors:
    return factorize(weight, rank, name=name)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
