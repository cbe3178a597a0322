# SPDX-License-Identifier: Apache-2.0
"""Attach a core to each target of a model, and list the trained parameters.

PEFT's tuners are attached in ``peft_bridge`` by the same rules. An adapted layer only needs the interface of
:class:`AdaptedLayer`: its trained parameters and its merged tensors.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from mirrortune.adapters.cores import Core
from mirrortune.adapters.kinds import CallableKind
from mirrortune.adapters.layers import Spectral, SpectralLinear, SpectralWeight, replace_weight
from mirrortune.adapters.plain import (
    RowRange,
    attach_rows,
    call_in_autocast,
    held_in,
    hold_statistics,
    keep_biases,
)
from mirrortune.adapters.spec import AdapterSpec, build_core, check_spec
from mirrortune.adapters.strategies import Strategy
from mirrortune.adapters.svd import Factors, factorize
from mirrortune.adapters.targets import Target, Targets, find_targets
from mirrortune.errors import ConfigError, first_of
from mirrortune.system.devices import holds_half

FactorSource = Callable[[str, Tensor, int], Factors]
"""(layer name, matrix (O, I) or stack (E, O, I), rank) -> float64 factors, computed or read from a cache."""
LayerHook = Callable[[str, Tensor, Factors, Core], None]
"""Called with (layer name, matrix or stack, factors, core) for each layer that :func:`attach` replaces."""
BANK = "_mirrortune_bank"
"""Name of the attribute that marks a model in an :class:`~mirrortune.AdapterBank`."""
_HALF_CHANGED = "_mirrortune_half_changed"  # name of the attribute that marks a model left by a failed attach
SpectralLayer = SpectralLinear | SpectralWeight
"""A module that adapts a weight: it replaces the layer of the weight, or is a parametrisation of the weight."""


class AdaptedLayer(Protocol):
    """The interface of a layer with an adapter, from mirrortune or PEFT."""

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters of this layer, by their names in the layer."""

    def merged(self, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the plain tensors of the layer with the adapter merged.

        Args:
            before: ``weight`` of the base model, in its layout there, and ``bias`` if the layer has one; any dtype.

        Returns:
            The tensors that the adapter changes, by the same names, in float64 on the CPU.
        """


@dataclass(slots=True, kw_only=True)
class Attachment:
    """The adapter of a model: its specification and its layers. Stored as ``model.mirrortune``.

    Attributes:
        spec: specification that the adapter was built from.
        targets: the adapted weights, and the head.
        layers: adapted layers by name, in module order.
        frozen: :func:`~mirrortune.adapters.fingerprint.frozen_digests` of the base's weights that the adapter leaves as
            they are; None if it is not known.
        tied: other names of the parameters that are trained as they are and have several, by the name in ``targets``.
    """

    spec: AdapterSpec
    targets: Targets
    layers: Mapping[str, AdaptedLayer]
    frozen: str | None = None
    tied: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def attach(
    model: nn.Module,
    spec: AdapterSpec,
    *,
    targets: Targets | None = None,
    new_parameters: Iterable[str] = (),
    factor_source: FactorSource | None = None,
    pairs: dict[str, Tensor] | None = None,
    on_layer: LayerHook | None = None,
    strategies: Mapping[str, Strategy | None] | None = None,
) -> nn.Module:
    """Adapt ``model`` in place: attach cores to its target layers, and freeze all other parameters except the head.

    Args:
        model: loaded model; its base weights are not changed.
        spec: specification of the adapter.
        targets: targets of ``spec`` in ``model``; None to find them.
        new_parameters: see :func:`find_targets`.
        factor_source: computes factors or reads them from a cache; None to compute them.
        pairs: pairs by layer name, which replace those of the pairing when an adapter is loaded.
        on_layer: called for each layer while its factors are in memory.
        strategies: strategies by layer name, which override that of ``spec``.

    Returns:
        The same model, with ``model.mirrortune`` set.

    Raises:
        ConfigError: see :func:`check_spec` and :func:`find_targets`; also if the model is adapted already.
    """
    targets = checked_targets(model, spec, targets, new_parameters)
    for name, target in targets.layers.items():  # cores check their options before the model is changed
        S = torch.ones((target.count, target.rank) if target.count > 1 else (target.rank,))
        build_core(spec, S, name, target.shape, (pairs or {}).get(name))
    layers: dict[str, AdaptedLayer] = {}
    begun: list[str] = []
    with changes(model, begun):
        freeze(model, targets)
        listed = _listed_modules(model)
        compute = factor_source or (lambda name, weight, rank: factorize(weight, rank, name=name))
        for name, target in targets.layers.items():
            matrix = target.read(model)
            factors = compute(name, matrix, target.rank)
            S = factors.S.float().to(matrix.device)  # factors may be on the CPU: from a cache, or for an Apple GPU
            core = build_core(spec, S, name, target.shape, (pairs or {}).get(name))
            if on_layer:
                on_layer(name, matrix, factors, core)
            if target.kind.is_quantised:
                factors = factors.to(device=matrix.device, dtype=matrix.dtype)
            strategy = (strategies or {}).get(name, spec.strategy)
            begun.append(name)
            layers[name] = _adapt(model, target, factors, core, strategy, listed)
        model.mirrortune = Attachment(spec=spec, targets=targets, layers=layers)  # type: ignore[assignment]
        thaw(model)
    return model


@contextlib.contextmanager
def changes(model: nn.Module, begun: Sequence[str] | None = None) -> Iterator[None]:
    """Mark ``model`` as unusable if the block that changes it fails or is interrupted.

    The changes are not undone: some layers are adapted then, and a second :func:`attach` would adapt the others only.
    :func:`check_plain` and :func:`attachment` refuse a marked model.

    Args:
        model: model that is changed.
        begun: names of the layers changed so far, which the block fills; as long as there are none, a second attempt
            repeats everything that the block has done. None if any change counts.
    """
    try:
        yield
    except BaseException:  # Ctrl-C too
        if begun is None or begun:
            vars(model)[_HALF_CHANGED] = True
        raise


def _check_whole(model: nn.Module, where: str) -> None:
    if _HALF_CHANGED in vars(model):
        problem = "an earlier attach() or load_adapter() has failed and left the model half changed"
        raise ConfigError(where, problem, fix="Load the base model again")


def check_plain(model: nn.Module, where: str) -> None:
    """Check that a model has no adapter, is in no bank, and was not left half changed.

    Raises:
        ConfigError: it has, or a module inside has, at ``where``.
    """
    _check_whole(model, where)
    if isinstance(getattr(model, "mirrortune", None), Attachment):
        raise ConfigError(where, "the model has an adapter already", fix="Load the base model again")
    for name, module in model.named_modules():
        # Its change would be taken for a part of the base, and be in neither the adapter nor the base.
        if isinstance(module, Spectral) or isinstance(vars(module).get("mirrortune"), Attachment):
            problem = f"a module inside has an adapter already: '{name}'"
            raise ConfigError(where, problem, fix="Load the base again, and attach one adapter to the whole model")
        if _is_of_peft(module):
            problem = f"the model has an adapter of PEFT already, in '{name}'"
            raise ConfigError(where, problem, fix="Merge it with PEFT's merge_and_unload(), or load the base again")
    if BANK in vars(model):
        fix = "add() it to the bank, or close() the bank first"
        raise ConfigError(where, "the model is in an AdapterBank", fix=fix)


def _is_of_peft(module: nn.Module) -> bool:
    tuners: Any = sys.modules.get("peft.tuners.tuners_utils")  # importing PEFT takes seconds
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)


def checked_targets(
    model: nn.Module, spec: AdapterSpec, known: Targets | None, new_parameters: Iterable[str] = ()
) -> Targets:
    """Return the targets of a model to adapt: ``known`` if given, else those found for ``spec``, which is checked.

    Raises:
        ConfigError: see :func:`check_spec` and :func:`find_targets`; also if the model is adapted already.
    """
    check_plain(model, "attach")
    if known is not None:
        return known
    check_spec(spec)
    return find_targets(model, spec, new_parameters)


def freeze(model: nn.Module, targets: Targets) -> None:
    """Set ``requires_grad`` for the head and the parameters that are trained directly only; freeze all others, and the
    running statistics of normalisation layers that are not trained.
    """
    trained = {*targets.head, *targets.plain}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    hold_statistics(model, targets.statistics)


def thaw(model: nn.Module) -> None:
    """Make rows that are trained alone parameters, and require gradients for all that is trained as it is: adapted
    layers have frozen all of their own.
    """
    attached = attachment(model)
    attach_rows(model, attached.targets.plain)
    held = held_in(model)
    whole = [name for name in attached.targets.plain if RowRange.parse(name) is None]
    wide = [name for name in whole if held[name].dtype == torch.float32]
    if wide and attached.spec.preset.plain != "all" and holds_half(model):
        call_in_autocast(model)
    keep_biases(model, whole)
    for parameter in plain_parameters(model).values():
        parameter.requires_grad = True


def spectral_layers(model: nn.Module) -> dict[str, SpectralLayer]:
    """Return the layers of ``model`` with a core, by name, in module order."""
    found = getattr(model, "mirrortune", None)
    layers = found.layers if isinstance(found, Attachment) else {}
    return {name: layer for name, layer in layers.items() if isinstance(layer, SpectralLayer)}


_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


@contextlib.contextmanager
def weights_kept(model: nn.Module) -> Iterator[None]:
    """Compute the adapted weights of dense layers, and the cores' coefficients of others, once while the block runs, in
    which nothing is trained.

    Otherwise every call of the model computes them, which for the single token of a step of generation can take far
    longer than the layer itself. The weights take as much memory as those of these layers, coefficients little.
    """
    found = [module for module in model.modules() if isinstance(module, (SpectralLinear, SpectralWeight))]
    try:
        for spectral in found:
            spectral.keep(kept=True)
        yield
    finally:
        for spectral in found:
            spectral.keep(kept=False)


def bytes_kept(model: nn.Module) -> int:
    """Return the bytes of the weights that :func:`weights_kept` holds."""
    chains = [module for module in model.modules() if isinstance(module, parametrize.ParametrizationList)]
    kept = {id(part): chain.original for chain in chains for part in chain if isinstance(part, SpectralWeight)}
    return sum(weight.numel() * weight.element_size() for weight in kept.values())


def unwrapped(model: object) -> nn.Module:
    """Return the model inside the wrappers of torch, ``torch.compile``, ``DataParallel``, ``DistributedDataParallel``
    and ``AveragedModel``, and inside modules that forward the attributes of an adapted model, as PEFT's do.

    Raises:
        ConfigError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        problem = f"got {model!r:.60}" if isinstance(model, (str, Path)) else f"got a {type(model).__name__}"
        raise ConfigError("model", problem, allowed="a model, such as AutoModel.from_pretrained(...) returns")
    # torch.compile registers the model as a submodule, accelerate's regional compilation keeps it as an attribute.
    compiled = model._modules.get("_orig_mod") or vars(model).get("_orig_mod")  # noqa: SLF001
    inner = model.module if isinstance(model, _WRAPPERS) else compiled
    if isinstance(inner, nn.Module):
        return unwrapped(inner)
    found = getattr(model, "mirrortune", None)
    owners = (m for m in model.modules() if isinstance(found, Attachment) and vars(m).get("mirrortune") is found)
    return next(owners, model)


def check_unwrapped(model: nn.Module, where: str) -> None:
    """Check that ``model`` is no wrapper of torch, whose parameters have other names.

    Raises:
        ConfigError: it is one.
    """
    if unwrapped(model) is not model:
        problem = f"got a model in {type(model).__name__}"
        raise ConfigError(where, problem, fix=f"Call {where} with the model itself, then wrap it")


def attachment(model: nn.Module) -> Attachment:
    """Return the adapter of a model; raise a ConfigError if it has none, or was left half changed."""
    _check_whole(model, "model")
    found = getattr(model, "mirrortune", None)
    if isinstance(found, Attachment):
        return found
    for name, module in model.named_modules():
        if isinstance(getattr(module, "mirrortune", None), Attachment):
            raise ConfigError("model", f"its adapter is that of the module '{name}' inside", fix="Pass that module")
    raise ConfigError("model", "it has no adapter", fix="Call mirrortune.attach(model) first")


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters of the adapter, by ``<layer>.<parameter>``, without empty ones."""
    return {
        f"{name}.{key}": parameter
        for name, layer in attachment(model).layers.items()
        for key, parameter in layer.adapter_parameters().items()
        if getattr(parameter, "ds_numel", parameter.numel())  # parameters sharded by ZeRO-3 are empty between uses
    }


def plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters trained as they are, by their names without an adapter: the head, biases or all weights for
    ``bitfit`` and ``full``, and what ``also_train`` has chosen.
    """
    targets = attachment(model).targets
    parameters = held_in(model)
    names = (*targets.head, *targets.plain)
    if gone := [name for name in names if name not in parameters]:
        problem = f"it has no parameters of these names any more, which its adapter trains: {first_of(gone, 3)}"
        raise ConfigError("model", problem, fix="Take off what was put around them, as PEFT's unload() does")
    return {name: parameters[name] for name in names}


def trained_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the running statistics that move in training and are saved, by their names without an adapter."""
    return {name: model.get_buffer(name) for name in attachment(model).targets.statistics}


def trainable_parameters(model: nn.Module) -> int:
    """Return the number of trained parameters of an adapted model, without its task head."""
    head = set(attachment(model).targets.head)
    trained = [p for n, p in plain_parameters(model).items() if n not in head]
    return sum(p.numel() for p in [*adapter_parameters(model).values(), *trained])


def head_parameters(model: nn.Module) -> int:
    """Return the number of parameters in the task head of an adapted model."""
    head = attachment(model).targets.head
    return sum(p.numel() for n, p in model.named_parameters() if n in set(head))


def _listed_modules(model: nn.Module) -> set[int]:
    """Return the ids of modules that ``forward`` may reach through a plain list, tuple or dict instead of an attribute.

    Replacing such a module as an attribute would have no effect.
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
    for path, _ in target.places:  # the same layer at every place of a shared module
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return layer
