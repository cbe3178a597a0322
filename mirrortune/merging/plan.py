# SPDX-License-Identifier: Apache-2.0
"""Plan a merged checkpoint tensor by tensor.

Each tensor is a copy of the base's bytes, a trained parameter, or a base weight to which the changes of one or more
adapters are added in float64. Several adapters are merged in the given order, each into the result of the previous
ones. Since an adapter only fits the weight that it was trained on, adapters of the same base must change different
weights, and an adapter that was trained on a merged model must follow the adapter that was merged into that model.
"""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mirrortune.adapters.files.adapter_file import AdapterFile
from mirrortune.adapters.files.load import stored_core, trained_factors
from mirrortune.adapters.files.tensors import check_trained_tied
from mirrortune.adapters.inject import FactorSource
from mirrortune.adapters.layers import delta_weight
from mirrortune.adapters.peft_bridge.single_layer import (
    SharedLayers,
    is_of_linear_layers,
    lone_layer,
    stands_alone,
)
from mirrortune.adapters.peft_bridge.tuners import PeftLayer
from mirrortune.adapters.plain import RowRange
from mirrortune.errors import ConfigError, VerificationError
from mirrortune.models.load import ModelSource, resolve_dtype
from mirrortune.models.parts import CannotLoadParts, LoadedTensor, PartLoader, value_of
from mirrortune.models.tensors import aliases, checkpoint_files, part_loader, stored_tensors
from mirrortune.system.tensor_files import DTYPE_CODES, PlannedTensor, StoredTensor

Stored = dict[str, StoredTensor | LoadedTensor]
"""Stored tensors by name in the model."""


Round = Callable[[Sequence[str], Tensor, torch.dtype, Callable[[], Tensor] | None], Tensor]
"""Function that rounds a value: (names, value, dtype, function that reads the base's tensor) -> value in ``dtype``."""


class NotTensorByTensor(Exception):  # noqa: N818  (a fallback, not an error)
    """Raised if a checkpoint cannot be merged from its files alone; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergePlan:
    """The plan of a merged checkpoint.

    Attributes:
        files: files of the base.
        stored: tensors of the base that the model uses, by name in the model.
        planned: tensors of the output.
        auto_class: name of the transformers class of the model.
        trained_in: dtype in which the last adapter was trained.
        trained: parameters that were trained directly, by name; if several adapters have one, that of the last.
        adapted: for each changed weight, the adapters and their layers in it, in the order of merging.
        source_of_factors: computes or caches factors.
        loader: converts between the tensors of the files and of the model; None if they are the same.
        turned: tensors of the quantised base that the adapter was trained on, by name in the model, if it is merged
            into full-precision weights; else None.
        is_of_lone_layers: no two layers of a PEFT tuner share parameters.
        shared: returns the layers of a PEFT tuner that share parameters or draw them from one random generator.
        remarks: list to which mismatches with a base used by force are appended; None to raise for them.
    """

    files: list[Path]
    stored: Stored
    planned: list[PlannedTensor]
    auto_class: str
    trained_in: torch.dtype
    trained: dict[str, Tensor]
    adapted: dict[str, list[tuple[AdapterFile, list[str]]]]
    source_of_factors: FactorSource
    loader: PartLoader | None = None
    turned: Stored | None = None
    is_of_lone_layers: bool = True
    shared: Callable[[], SharedLayers] | None = None
    remarks: list[str] | None = None

    @torch.no_grad()
    def reference(self, name: str) -> Tensor:
        """Compute an adapted weight in float64.

        With several adapters, the result of each but the last is rounded to the stored dtype.
        """
        *before, last = self.adapted[name]
        if last[0].peft_config is not None:
            return self._tuned(name, last[0], last[1][0])
        current = value_of(self.stored[name])
        for adapter, layers in before:
            current = self._changed(name, current, adapter, layers).to(current.dtype)
        return self._changed(name, current, *last)

    @torch.no_grad()
    def made(self, planned: PlannedTensor, round_tensor: Round) -> Tensor:
        """Compute a tensor to be written; ``round_tensor`` rounds each of the model's tensors in it once."""
        dtype = next(dtype for dtype, code in DTYPE_CODES.items() if code == planned.code)

        def rounded(name: str) -> Tensor:
            return round_tensor([name], self.value(name), dtype, self.stored_value(name))

        if self.loader is not None and planned.stands_for:
            return self.loader.made(planned, rounded)
        return rounded(planned.name)

    def stored_value(self, name: str) -> Callable[[], Tensor] | None:
        """Return a function that reads the base's tensor ``name``, or None if no adapter changes it."""
        return functools.partial(value_of, self.stored[name]) if name in self.adapted else None

    def other_values(self, adapter: AdapterFile) -> Iterator[Tensor]:
        """Yield the tensors of the base but the weights of adapted layers, as stored and in the dtype of training."""
        trained_in = adapter.weights_in
        for name in self.stored.keys() - {name for names in adapter.weights.values() for name in names}:
            value = value_of(self.stored[name], trained_in)
            yield value
            if value.is_floating_point() and value.dtype != trained_in:
                yield value.to(trained_in)

    def value(self, name: str) -> Tensor:
        """Compute a tensor of the merged model, in float64 if an adapter changes it, else in its stored dtype."""
        if name in self.trained:
            return self.trained[name]
        return self.reference(name) if name in self.adapted else value_of(self.stored[name])

    def changed_values(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that the adapters change or have trained, by name, before they are rounded."""
        yield from ((name, self.value(name)) for name in (*self.adapted, *self.trained))

    def tuned_layer(self, name: str, adapter: AdapterFile, layer: str) -> tuple[PeftLayer, dict[str, Tensor]]:
        """Build PEFT's layer around the weight ``name``; return it with the stored weight and bias of the base."""
        names = {"weight": name, "bias": name.removesuffix("weight") + "bias"}
        before = {key: value_of(self.stored[own]) for key, own in names.items() if own in self.stored}
        trained_in = getattr(torch, str(adapter.base["dtype"]))
        held = {key: value_of(self.stored[names[key]], trained_in).to(trained_in) for key in before}
        weight, bias = held["weight"], held.get("bias")
        found = lone_layer(adapter, layer, weight, bias) if self.is_of_lone_layers else None
        if found is None and self.shared is not None:
            found = self.shared().layer(layer, weight, bias)
        if found is None:
            is_known = bool(adapter.responses[layer])
            why = "of more than its own weight" if is_known else "in a way that cannot be checked from the file"
            raise NotTensorByTensor(f"method '{adapter.spec.method}' makes '{layer}' {why}")
        return found, before

    def _tuned(self, name: str, adapter: AdapterFile, layer: str) -> Tensor:
        weight = (
            name if self.stored[name].shape == adapter.layouts[layer].shape else name.removesuffix("bias") + "weight"
        )
        found, before = self.tuned_layer(weight, adapter, layer)
        key = "weight" if weight == name else "bias"
        merged = found.merged(before).get(key, before[key].double())
        del found
        gc.collect(1)  # PEFT's tuners and models are reference cycles; a full collection takes a third of a second
        return merged

    def _changed(self, name: str, weight: Tensor, adapter: AdapterFile, layers: list[str]) -> Tensor:
        changed = weight.double()
        is_first = self.adapted[name][0][0] is adapter
        own = self.turned_weight(name, adapter) if is_first else weight
        for layer in layers:
            try:
                factors = self.factors(own, adapter, layer)
            except VerificationError as error:
                if is_first:
                    raise
                raise self._not_on_result(name, adapter, layer) from error
            delta = delta_weight(factors, stored_core(adapter, layer, factors.S))
            changed += adapter.layouts[layer].tensor(delta)
        return changed

    def _not_on_result(self, name: str, adapter: AdapterFile, layer: str) -> VerificationError:
        before = [str(other.folder) for other, _ in self.adapted[name]]
        before = before[: [other is adapter for other, _ in self.adapted[name]].index(True)]
        return VerificationError(
            layer,
            f"{' and '.join(before)} changed this weight before, and {adapter.folder} was not trained on the result",
            allowed="adapters of one base that change different layers, or each trained on the merge of those before",
            fix="Train one adapter on both data sets (--data twice), or on layers that the other leaves out",
        )  # fmt: skip

    def turned_weight(self, name: str, adapter: AdapterFile) -> Tensor:
        """Read the weight that the first adapter of the weight ``name`` was trained on."""
        held = self.stored[name] if self.turned is None else self.turned[name]
        return value_of(held, getattr(torch, str(adapter.base["dtype"])))

    def factors(self, weight: Tensor, adapter: AdapterFile, layer: str) -> Any:
        """Return the factors of a layer's matrix in ``weight``, in the basis that the adapter was trained in."""
        # A model that was cast before it was saved has coarser factors than its base.
        trained_in = torch.promote_types(
            getattr(torch, adapter.dtypes[layer]), getattr(torch, str(adapter.base["dtype"]))
        )
        matrix = adapter.layouts[layer].matrix(weight.to(trained_in)).contiguous()
        return trained_factors(adapter, layer, matrix, self.source_of_factors, remarks=self.remarks)


def plan_merge(
    source: ModelSource,
    model: nn.Module,
    adapters: Sequence[AdapterFile],
    factors: FactorSource,
    remarks: list[str] | None = None,
    packed: ModelSource | None = None,
) -> MergePlan:
    """Plan how to merge ``adapters`` into the base at ``source``, reading only the headers of its files.

    Args:
        source: source of the base.
        model: model to be saved, on the meta device.
        adapters: adapters in the order of merging.
        factors: computes or caches factors.
        remarks: see :class:`MergePlan`.
        packed: quantised base that the adapter was trained on, if ``source`` holds the full-precision weights.

    Raises:
        NotTensorByTensor: the files do not store the model's tensors one by one, or PEFT can only merge the model in
            memory.
        ConfigError: two adapters of one base train the same parameter.
        VerificationError: a trained tensor does not belong to the model, is not finite, or is also changed by another
            adapter.
    """
    tuned = [adapter for adapter in adapters if adapter.peft_config is not None]
    if not all(map(is_of_linear_layers, tuned)):
        raise NotTensorByTensor("a tuner of PEFT has other layers than linear ones")
    if tuned and (len(adapters) > 1 or remarks is not None or packed is not None):
        raise NotTensorByTensor("PEFT merges whole models")
    files = checkpoint_files(source)
    if not files:
        raise NotTensorByTensor("the base has no safetensors files")
    for adapter in adapters:
        check_trained_tied(model, adapter.tied)
    names = aliases(model)
    dtype = resolve_dtype("auto", source.config, torch.device("meta"))
    auto_class = str(adapters[-1].base["auto_class"])
    loader, stored = _stored(source, auto_class, model, dtype, files)
    turned = None if packed is None else _stored(packed, auto_class, model, dtype, checkpoint_files(packed))[1]
    trained = _trained(adapters, names, stored)
    adapted = _adapted(adapters, stored, names)
    if both := trained.keys() & adapted.keys():
        problem = f"'{min(both)}' is trained as a whole by one adapter and changed by another"
        raise VerificationError("merge", problem, fix="Merge one of them")
    planned = _planned(model, stored, names, trained, adapted, DTYPE_CODES[dtype])
    written = _without_twins(planned, names, stored)
    return MergePlan(
        files=files, stored=stored, trained=trained, adapted=adapted, source_of_factors=factors, remarks=remarks,
        planned=written if loader is None else loader.as_stored(written, {*trained, *adapted}), loader=loader,
        is_of_lone_layers=all(map(stands_alone, tuned)),
        shared=functools.cache(lambda: SharedLayers(tuned[0], copy.deepcopy(model))) if tuned else None,
        turned=turned, auto_class=auto_class, trained_in=adapters[-1].weights_in,
    )  # fmt: skip


def _planned(
    model: nn.Module,
    stored: Stored,
    names: dict[str, tuple[str, ...]],
    trained: dict[str, Tensor],
    adapted: Container[str],
    code: str,
) -> dict[str, PlannedTensor]:
    """Plan every tensor of the merged model; tensors that the files lack get the dtype ``code``."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    planned: dict[str, PlannedTensor] = {}
    for name, shape in shapes.items():
        found = stored.get(name)
        is_right = found is not None and found.shape == shape
        if name in trained and shape != tuple(trained[name].shape):
            raise NotTensorByTensor(f"'{name}' was trained in another shape")
        if name in trained or name in adapted:
            if not is_right and name in adapted:
                raise NotTensorByTensor(f"the files hold '{name}' differently from the model")
            # The change of an adapter would be lost in 8 bits.
            own = found.code if found and is_right and not found.code.startswith("F8") else code
            planned[name] = PlannedTensor(name=name, code=own, shape=shape, place=found.path if found else None)
        elif found is not None and is_right:
            copied = found if isinstance(found, StoredTensor) else None
            planned[name] = PlannedTensor(name=name, code=found.code, shape=shape, source=copied, place=found.path)
        elif not any(other in stored or other in trained for other in names[name] if other != name):
            raise NotTensorByTensor(f"the files hold no '{name}'")
    return planned


def _stored(
    source: ModelSource, auto_class: str, model: nn.Module, dtype: torch.dtype, files: list[Path]
) -> tuple[PartLoader | None, Stored]:
    """Return the loader that converts tensors as transformers does, or None, and the tensors that the files hold."""
    try:
        fields = {"num_labels": model.config.num_labels} if hasattr(model.config, "num_labels") else {}
        loader = part_loader(source, auto_class, fields, dtype, files)
    except CannotLoadParts as error:
        if source.is_stored_packed:
            raise NotTensorByTensor(f"transformers loads it in another way ({error})") from error
        loader = None
    return loader, dict(stored_tensors(files, aliases(model))) if loader is None else loader.tensors()


def _without_twins(
    planned: dict[str, PlannedTensor], names: dict[str, tuple[str, ...]], stored: Stored
) -> list[PlannedTensor]:
    """Keep one of each group of tied tensors, under its name in the files, as transformers does; in file order."""
    kept = []
    for name, tensor in planned.items():
        twins = [twin for twin in names[name] if twin in planned]
        chosen = next((twin for twin in twins if twin in stored), twins[0])
        if name == chosen:
            kept.append(tensor)
    places = {name: index for index, name in enumerate(stored)}
    return sorted(kept, key=lambda tensor: places.get(tensor.name, len(places)))


def _direct_tensors(
    adapter: AdapterFile, names: dict[str, tuple[str, ...]], stored: Stored
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """Yield the tensors that an adapter has trained directly, by name; rows within the base's matrix, which new ones
    make longer.
    """
    for name, tensor in adapter.plain_tensors().items():
        rows = RowRange.parse(name)
        if rows is None:
            yield name, tensor
            continue
        held = next((twin for twin in names.get(rows.weight, ()) if twin in stored), None)
        if held is None or stored[held].shape[0] < rows.first:
            raise NotTensorByTensor(f"the files hold '{rows.weight}' differently from the model")
        yield rows.weight, rows.put(tensor, value_of(stored[held]))


def _trained(
    adapters: Sequence[AdapterFile], names: dict[str, tuple[str, ...]], stored: Stored
) -> dict[str, Tensor]:  # fmt: skip
    found: dict[str, Tensor] = {}
    owners: dict[str, AdapterFile] = {}
    for adapter in adapters:
        for name, tensor in _direct_tensors(adapter, names, stored):
            key = f"param.{name}"
            if name not in names:
                raise VerificationError(str(adapter.folder), f"the model has no tensor '{key}'")
            if not torch.isfinite(tensor).all():
                raise VerificationError(str(adapter.folder), f"tensor '{key}' holds NaN or infinities")
            other = owners.get(name)
            if other is not None and other.base.get("name") == adapter.base.get("name"):
                raise ConfigError(
                    "merge", f"'{other.folder}' and '{adapter.folder}' of one base have both trained '{name}'",
                    fix="Merge one of them, or adapters without a task head",
                )  # fmt: skip
            for twin in names[name]:
                found[twin], owners[twin] = tensor, adapter
    return found


def _adapted(
    adapters: Sequence[AdapterFile], stored: Stored, names: dict[str, tuple[str, ...]]
) -> dict[str, list[tuple[AdapterFile, list[str]]]]:
    found: dict[str, list[tuple[AdapterFile, list[str]]]] = {}
    for adapter in adapters:
        own: dict[str, list[str]] = {}
        for layer, tensors in adapter.weights.items():
            twins = {twin for name in tensors for twin in names.get(name, ())}
            here = sorted(twin for twin in twins if twin in stored)
            if not here:
                raise NotTensorByTensor(f"the files hold no '{tensors[0]}'")
            if stored[here[0]].shape != adapter.layouts[layer].shape:
                raise NotTensorByTensor(f"the files hold '{here[0]}' differently from the model")
            biases = [name.removesuffix("weight") + "bias" for name in here] if adapter.peft_config else []
            for name in (*here, *(bias for bias in biases if bias in stored)):
                own.setdefault(name, []).append(layer)
        for name, layers in own.items():
            found.setdefault(name, []).append((adapter, layers))
    return found
