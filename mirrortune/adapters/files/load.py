# SPDX-License-Identifier: Apache-2.0
"""Attach a new or stored adapter to a base model, with mirrortune's cores or a PEFT tuner.

A stored adapter must belong to the base model: each adapted weight must have the recorded hash, each basis must align
with its sketch, and each layer must have the effect that it had when it was saved. Otherwise an error names the layer.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mirrortune.adapters.cores import Core
from mirrortune.adapters.effect import EFFECT_TOLERANCE, EXACT_EFFECT_TOLERANCE, effect, effect_error
from mirrortune.adapters.files.adapter_file import AdapterFile, PeftAdapterFile, checked_tensor
from mirrortune.adapters.files.tensors import check_tied
from mirrortune.adapters.fingerprint import (
    Fingerprint,
    completed,
    fingerprint,
    frozen_digests,
    num_lost,
    short_digest,
    try_align,
)
from mirrortune.adapters.inject import (
    FactorSource,
    SpectralLayer,
    attach,
    attachment,
    changes,
    checked_targets,
    spectral_layers,
)
from mirrortune.adapters.peft_bridge import tuners
from mirrortune.adapters.plain import RowRange
from mirrortune.adapters.spec import AdapterSpec, build_core
from mirrortune.adapters.strategies import Strategy, loaded_strategy
from mirrortune.adapters.svd import Factors
from mirrortune.adapters.targets import Targets, find_targets
from mirrortune.errors import ConfigError, VerificationError
from mirrortune.system.distributed.sharding import is_whole


class FingerprintBook:
    """Fingerprints of the layers of a model, computed once and used at each save, as training never changes the base.

    Attributes:
        entries: fingerprints by layer name.
        remarks: mismatches found when an adapter was loaded with ``force_base``.
    """

    def __init__(self) -> None:
        self.entries: dict[str, Fingerprint] = {}
        self.remarks: list[str] = []

    def __call__(self, name: str, weight: Tensor, factors: Factors, core: Core) -> None:
        """Record the fingerprint of one layer; this is the hook for :func:`mirrortune.adapters.inject.attach`."""
        self.entries[name] = fingerprint(weight, factors, core.side)

    def record_weight(self, name: str, weight: Tensor) -> None:
        """Record the fingerprint of a layer whose adapter has no basis."""
        self.entries[name] = Fingerprint.of_weight(weight)


def adapt(
    model: nn.Module,
    spec: AdapterSpec,
    *,
    factor_source: FactorSource,
    targets: Targets | None = None,
    new_parameters: Iterable[str] = (),
    pairs: dict[str, Tensor] | None = None,
    bases: Mapping[str, Factors] | None = None,
    strategies: Mapping[str, Strategy] | None = None,
) -> FingerprintBook:
    """Attach a new adapter in its initial state; see :func:`mirrortune.adapters.inject.attach` for the arguments.

    ``bases`` are the factors by layer name, for a method whose bases are measured on a task.

    Raises:
        ConfigError: see :func:`~mirrortune.adapters.inject.attach`; also if measured bases are needed but not given.
    """
    if spec.basis == "gradient":
        factor_source = _measured_factors(spec, bases)
    book = FingerprintBook()
    targets = checked_targets(model, spec, targets, new_parameters)
    frozen = _frozen(model, targets)
    if spec.preset.peft is not None:
        tuners.count_trained(model, spec, targets)  # on a copy: if PEFT raises an error, the model is unchanged
        tuners.attach_tuner(model, spec, targets=targets, on_layer=book.record_weight)
    else:
        attach(
            model, spec, targets=targets, factor_source=factor_source, pairs=pairs, on_layer=book, strategies=strategies
        )
        with changes(model):
            _start(model)
    attachment(model).frozen = frozen
    return book


def _frozen(model: nn.Module, targets: Targets) -> str | None:
    """Return the digests of the weights that the adapter leaves as they are, of a model without adapter."""
    rows = {name: RowRange.parse(name) for name in (*targets.head, *targets.plain)}
    changed = [name if found is None else found.weight for name, found in rows.items()]
    return frozen_digests(model, [*changed, *(name for target in targets.layers.values() for name in target.tensors)])


def _measured_factors(spec: AdapterSpec, bases: Mapping[str, Factors] | None) -> FactorSource:
    if bases is None:
        raise ConfigError(
            "adapter.method", f"the bases of '{spec.method}' are measured on a task, and there is none here",
            fix="Use mirrortune train, or another method",
        )  # fmt: skip
    return lambda name, matrix, rank: bases[name]


@torch.no_grad()
def _start(model: nn.Module) -> None:
    """Set the parameters of each core to their initial values for training."""
    for layer in spectral_layers(model).values():
        for name, value in layer.core.start().items():
            layer.core.get_parameter(name).copy_(value)


def load_into(
    model: nn.Module,
    adapter: AdapterFile,
    source: FactorSource,
    *,
    force_base: bool = False,
    trained_on: nn.Module | None = None,
) -> FingerprintBook:
    """Attach ``adapter`` to its base ``model`` in place, and restore its trained parameters.

    Args:
        model: base model, in the dtype of training or a wider one.
        adapter: adapter returned by :func:`~mirrortune.adapters.files.adapter_file.read_adapter`.
        source: computes factors or reads them from a cache.
        force_base: accept a base with different weights of the same shapes, and record this in ``remarks``.
        trained_on: quantised model that the adapter was trained on, if ``model`` is the same model in full precision.

    Returns:
        The fingerprints, with which the adapter can be saved again.

    Raises:
        VerificationError: the base differs, a basis cannot be aligned, or tensors do not fit; it names the layer.
        ConfigError: ``trained_on`` is given for one of PEFT's tuners.
    """
    targets, book = stored_targets(model, adapter), FingerprintBook()
    remarks = book.remarks if force_base else None
    frozen = check_frozen(adapter, trained_on or model, targets, remarks)
    if isinstance(adapter, PeftAdapterFile):
        if trained_on is not None:
            raise ConfigError(
                "--base", f"method '{adapter.spec.method}' computes with the weights it was trained on",
                fix="Merge without --base, into its dequantised weights, or with PEFT",
            )  # fmt: skip

        def note_weight(name: str, weight: Tensor) -> None:
            _check_weight_or_remark(adapter, name, weight, remarks)
            book.record_weight(name, weight)

        tuners.attach_tuner(model, adapter.spec, targets=targets, config=adapter.peft_config, on_layer=note_weight)
    else:
        _attach_cores(model, adapter, targets, source, book, force_base=force_base, trained_on=trained_on)
    with changes(model):
        adapter.restore(model, remarks=remarks)
    attachment(model).frozen = frozen
    return book


def check_frozen(
    adapter: AdapterFile, model: nn.Module, targets: Targets, remarks: list[str] | None = None
) -> str | None:
    """Check that the weights that the adapter neither adapts nor holds are those of its training.

    The model may have others besides. For an adapter saved in Python, a difference is only a warning: transformers
    initialises weights that a checkpoint lacks at random, and they need not have an effect.

    Returns:
        The digests of these weights in ``model``, None if they are not known.

    Raises:
        VerificationError: they are not, and ``remarks`` is None; it names an adapted layer if one of them differs too.
    """
    found = _frozen(model, targets)
    problem = _other_frozen(adapter, found)
    if problem is not None and remarks is not None:
        remarks.append(str(problem))
    elif problem is not None:
        for name, target in targets.layers.items():
            check_weight(adapter, name, target.read(model))
        _raise_or_warn(adapter, problem)
    return found


def check_stored(adapter: AdapterFile, values: Iterable[Tensor], remarks: list[str] | None) -> None:
    """Check like :func:`check_frozen` that ``values`` include the weights that the adapter leaves as they are."""
    found = "".join(map(short_digest, values)) if adapter.frozen else ""
    if (problem := _other_frozen(adapter, found)) and remarks is not None:
        remarks.append(str(problem))
    elif problem:
        _raise_or_warn(adapter, problem)


def _other_frozen(adapter: AdapterFile, found: str | None) -> VerificationError | None:
    if adapter.frozen is None or found is None or not (count := num_lost(adapter.frozen, found)):
        return None
    problem = f"the base differs in {count:,} of the weights that the adapter leaves as they are"
    return _other_base(adapter, str(adapter.folder), problem)


def _raise_or_warn(adapter: AdapterFile, problem: VerificationError) -> None:
    if adapter.task is not None:
        raise problem
    warnings.warn(f"{problem} Expected only where the base initialises unused weights at random", stacklevel=6)


def _attach_cores(
    model: nn.Module,
    adapter: AdapterFile,
    targets: Targets,
    source: FactorSource,
    book: FingerprintBook,
    *,
    force_base: bool,
    trained_on: nn.Module | None,
) -> None:
    spec, remarks = adapter.spec, book.remarks if force_base else None
    own = {} if trained_on is None else stored_targets(trained_on, adapter).layers
    if trained_on is not None and spec.strategy != "dense":
        spec = replace(spec, strategy="branch")  # add to the output of the unchanged weights

    def trained_weight(name: str, weight: Tensor) -> Tensor:
        return weight if trained_on is None else own[name].read(trained_on)

    def factors_of(name: str, weight: Tensor, rank: int) -> Factors:
        stored = adapter.fingerprints[name].rank
        if rank != stored:
            raise VerificationError(name, f"the adapter holds a basis of rank {stored}, got {rank}")
        return trained_factors(adapter, name, trained_weight(name, weight), source, remarks=remarks)

    def note(name: str, weight: Tensor, factors: Factors, core: Core) -> None:
        if force_base:
            book(name, trained_weight(name, weight), factors, core)
        else:
            book.entries[name] = completed(adapter.fingerprints[name], factors)
        # A layer in a wider dtype holds the rounded factors too; the adapter must be saved with this dtype.
        book.entries[name] = replace(book.entries[name], rounded_to=factors_dtype(adapter, name, weight))

    plain = {name: target.weight(model) for name, target in targets.layers.items() if not target.kind.is_quantised}
    strategies = {
        name: loaded_strategy(spec.strategy, factors_dtype(adapter, name, weight), weight.dtype)
        for name, weight in plain.items()
    }
    attach(
        model, spec, targets=targets, factor_source=factors_of, pairs=stored_pairs(adapter), on_layer=note,
        strategies=strategies,
    )  # fmt: skip


def restore_into(model: nn.Module, adapter: AdapterFile, book: FingerprintBook | None = None) -> None:
    """Restore the trained parameters of ``adapter`` in a model that has the same adapter attached to the same base.

    Args:
        model: adapted model.
        adapter: adapter returned by :func:`~mirrortune.adapters.files.adapter_file.read_adapter`.
        book: fingerprints of the layers of ``model``; None if the base is known to be the same.

    Raises:
        VerificationError: method, options, layers, pairs, base weights or bases differ; nothing is restored. Layers of
            PEFT are compared after they have been restored.
    """
    where, found = str(adapter.folder), attachment(model)
    for key, own in _function_of(found.spec).items():
        stored = _function_of(adapter.spec)[key]
        if own != stored:
            problem = f"its adapter has {key} {stored!r}, the model's has {own!r}"
            raise VerificationError(where, problem, fix=_ATTACH_THE_SAME)
    own_layouts = {name: target.layout for name, target in found.targets.layers.items()}
    if odd := [n for n in {**adapter.layouts, **own_layouts} if adapter.layouts.get(n) != own_layouts.get(n)]:
        problem = f"its adapter and the model's differ in the layers that they adapt, such as {odd[0]}"
        raise VerificationError(where, problem, fix=_ATTACH_THE_SAME)
    for name, entry in ({} if book is None else book.entries).items():
        if entry.weight_hash != adapter.fingerprints[name].weight_hash:
            raise _other_weight(adapter, name)
    if book is not None and (other := _other_frozen(adapter, found.frozen)):
        _raise_or_warn(adapter, other)
    for name, layer in spectral_layers(model).items():
        _compare_core(adapter, name, layer)
    adapter.restore(model)


_ATTACH_THE_SAME = "Attach the adapter with the settings of the checkpoint, or load that with mirrortune.load_adapter"


def _function_of(spec: AdapterSpec) -> dict[str, Any]:
    """Return the settings that determine what a layer computes from its base weight, rank, pairs and parameters."""
    settled = spec.settled()
    return {"method": settled.method, "options": json.loads(json.dumps(settled.options))}


def _compare_core(adapter: AdapterFile, name: str, layer: SpectralLayer) -> None:
    """Raise an error if the stored core acts on other directions than that of ``layer``."""
    stored_rank = adapter.fingerprints[name].rank
    if layer.rank != stored_rank:
        problem = f"the adapter holds a basis of rank {stored_rank}, the model has one of rank {layer.rank}"
        raise VerificationError(name, problem, fix=_ATTACH_THE_SAME)
    core = stored_core(adapter, name, layer.core.get_buffer("S").cpu())
    pairs, own = getattr(core, "pairs", None), getattr(layer.core, "pairs", None)
    if isinstance(pairs, Tensor) and isinstance(own, Tensor) and not torch.equal(pairs.cpu(), own.cpu()):
        problem = "the adapter and the model pair the directions of this weight differently"
        raise VerificationError(name, problem, fix=_ATTACH_THE_SAME)
    expected = adapter.effects.get(name)
    if expected is not None and is_whole(layer.U):
        distance = effect_error(effect(layer.factors, core), expected)
        if not distance <= EFFECT_TOLERANCE:  # also catches NaN
            raise VerificationError(
                name, f"the model holds another basis of this weight: the effect would differ by {distance:.1e}",
                fix="Resume on the machine that trained it; mirrortune.load_adapter aligns the basis on any machine",
            )  # fmt: skip


def trained_factors(
    adapter: AdapterFile, name: str, weight: Tensor, source: FactorSource, *, remarks: list[str] | None = None
) -> Factors:
    """Return the factors of ``weight`` with which a layer of ``adapter`` was trained, in float64.

    They are the stored ones, or computed again, aligned with the fingerprint, and rounded as in training.

    Args:
        adapter: adapter returned by :func:`~mirrortune.adapters.files.adapter_file.read_adapter`.
        name: name of the layer.
        weight: weight of the base model, as matrix (O, I) or stack (E, O, I).
        source: computes factors or reads them from a cache.
        remarks: list that mismatches are added to; None to raise an error.

    Raises:
        VerificationError: the weight or the effect of the layer differs, or the basis cannot be aligned.
    """
    doubts: list[VerificationError] = []
    try:
        check_weight(adapter, name, weight)
    except VerificationError as error:
        doubts.append(error)
    if doubts and remarks is None:
        raise doubts[0]
    factors, doubt = _stored_factors(adapter, name), None
    if factors is None:
        found = source(name, weight, adapter.fingerprints[name].rank)
        aligned, doubt = try_align(found, adapter.fingerprints[name], name)
        factors = _as_held(aligned, factors_dtype(adapter, name, weight))
    expected = adapter.effects.get(name)
    if expected is not None:
        distance = effect_error(effect(factors, stored_core(adapter, name, factors.S)), expected)
        # The adapter may have no effect on the directions that could not be aligned.
        limit = EXACT_EFFECT_TOLERANCE if adapter.form == "portable" else EFFECT_TOLERANCE
        doubt = (
            None
            if distance <= limit
            else doubt or _other_effect(name, distance, limit, is_stored=adapter.form == "portable")
        )
    if doubt is not None:
        doubts.append(doubt)
    if remarks is None and doubts:
        raise doubts[0]
    if remarks is not None:
        remarks += [str(error) for error in doubts]
    return factors


def check_weight(adapter: AdapterFile, name: str, weight: Tensor) -> None:
    """Check that a base weight is the one that a layer was trained on, and is not loaded in lower precision.

    Raises:
        VerificationError: it is not; the error names the layer.
    """
    trained_in = factors_dtype(adapter, name, weight)
    if torch.promote_types(weight.dtype, trained_in) != weight.dtype:
        found, wanted = (str(dtype).removeprefix("torch.") for dtype in (weight.dtype, trained_in))
        raise VerificationError(
            name, f"the adapter was trained in {wanted}, the base is loaded in {found}, which would round its factors",
            fix=f"Load the base with dtype={wanted}",
        )  # fmt: skip
    if not adapter.fingerprints[name].is_of(weight):
        raise _other_weight(adapter, name)


def _other_weight(adapter: AdapterFile, name: str) -> VerificationError:
    return _other_base(adapter, name, "the base weight is not the one that the adapter was trained on")


def _other_base(adapter: AdapterFile, where: str, problem: str) -> VerificationError:
    base = adapter.base
    commit = f" at commit {base['commit']}" if base.get("commit") else ""
    return VerificationError(
        where,
        problem,
        allowed=f"{base['name']}{commit}, in {base['dtype']}" if base.get("name") else None,
        fix="Load that base; an adapter of another base rotates the wrong directions",
    )


def _check_weight_or_remark(adapter: AdapterFile, name: str, weight: Tensor, remarks: list[str] | None) -> None:
    try:
        check_weight(adapter, name, weight)
    except VerificationError as error:
        if remarks is None:
            raise
        remarks.append(str(error))


def stored_core(adapter: AdapterFile, layer: str, S: Tensor) -> Core:
    """Return the core of a layer with its trained parameters, for singular values ``S``, (R,) or (E, R)."""
    core = build_core(adapter.spec, S, layer, adapter.layouts[layer].matrix_shape, stored_pairs(adapter).get(layer))
    with torch.no_grad():
        for key, parameter in core.named_parameters():
            if parameter.numel():
                parameter.copy_(checked_tensor(adapter, f"core.{layer}.{key}", parameter.shape))
    return core


def _stored_factors(adapter: AdapterFile, name: str) -> Factors | None:
    """Return the factors stored in a portable adapter, float64; None for a compact one."""
    if adapter.form != "portable":
        return None
    layout, rank = adapter.layouts[name], adapter.fingerprints[name].rank
    stack = (layout.count,) if layout.count > 1 else ()
    out_features, in_features = layout.matrix_shape
    shapes = {"U": (*stack, out_features, rank), "S": (*stack, rank), "Vh": (*stack, rank, in_features)}
    U, S, Vh = (checked_tensor(adapter, f"factor.{name}.{key}", shape).double() for key, shape in shapes.items())
    return Factors(U=U, S=S, Vh=Vh)


def factors_dtype(adapter: AdapterFile, name: str, weight: Tensor) -> torch.dtype:
    """Return the dtype that the factors of the layer were rounded to in training."""
    found = getattr(torch, str(adapter.dtypes[name]), None)
    return found if isinstance(found, torch.dtype) and found.is_floating_point else weight.dtype


def _as_held(factors: Factors, dtype: torch.dtype) -> Factors:
    """Round ``factors`` to ``dtype``, as a layer of this dtype does, and return them in float64."""
    U, Vh = factors.U.to(dtype).double(), factors.Vh.to(dtype).double()
    return Factors(U=U, S=factors.S, Vh=Vh)


def _other_effect(name: str, error: float, limit: float, *, is_stored: bool) -> VerificationError:
    return VerificationError(
        name,
        f"the adapter changes this weight differently than when it was saved: its effect differs by {error:.1e}",
        allowed=f"at most {limit:.0e} of itself",
        fix="The file is damaged: restore the adapter folder" if is_stored else
        "Its basis cannot be found again here (singular values too close to each other), or the file is damaged; "
        "load it where it was trained and save it again with form='portable', or merge it there",
    )  # fmt: skip


def stored_targets(model: nn.Module, adapter: AdapterFile) -> Targets:
    """Find the layers and the head of an adapter in its base ``model``.

    Raises:
        VerificationError: the base lacks one of them, or has it in another shape; or the file trains a layer's weight
            as a whole too.
    """
    weights = {name for names in adapter.weights.values() for name in names}
    if both := weights.intersection((*adapter.head, *adapter.plain, *adapter.statistics)):
        raise VerificationError(
            min(both), "the adapter changes it, and holds it whole", fix="Restore the adapter folder"
        )
    found = find_targets(model, adapter.spec, adapter.head, adapter.layouts, (*adapter.plain, *adapter.statistics))
    for name, layout in adapter.layouts.items():
        own = found.layers[name].layout if name in found.layers else None
        if own != layout:
            raise VerificationError(
                name,
                f"the adapter was made for a weight of shape {layout.shape}, the base has "
                + (f"one of shape {own.shape}, read in another way" if own else "no such layer"),
                fix="Use its own base model",
            )
        check_tied(model, found.layers[name], adapter.weights[name])
    return found


def stored_bases(adapter: AdapterFile) -> dict[str, Factors]:
    """Return the factors stored in the file, by layer, float64; empty for a compact adapter."""
    found = {name: _stored_factors(adapter, name) for name in adapter.layouts}
    return {name: factors for name, factors in found.items() if factors is not None}


def stored_pairs(adapter: AdapterFile) -> dict[str, Tensor]:
    """Return the pairs (T, 2) stored in the file, by layer."""
    return {n.removeprefix("pairs."): t.long() for n, t in adapter.tensors.items() if n.startswith("pairs.")}
