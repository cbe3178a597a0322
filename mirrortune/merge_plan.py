# SPDX-License-Identifier: Apache-2.0
"""What each tensor of a merged checkpoint is: a copy of the base's bytes, a trained parameter, or a base weight with
the changes of one or more adapters, in float64.

Several adapters are merged in the order in which they are given, each into what the ones before it have left; since an
adapter only fits the weight that it was trained on, adapters of the same base must change different weights, and one
that was trained on a merged model follows the adapter that was merged into it.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mirrortune.adapter_file import AdapterFile
from mirrortune.adapters.inject import FactorSource
from mirrortune.adapters.spectral import delta_weight
from mirrortune.adapting import stored_core, trained_factors
from mirrortune.errors import ConfigError, VerificationError
from mirrortune.merge_contents import aliases
from mirrortune.model import ModelSource, resolve_dtype
from mirrortune.peft_layers import head_tensors, lone_layer, stands_alone
from mirrortune.peft_tuners import PeftLayer
from mirrortune.shards import DTYPE_CODES, PlannedTensor, StoredTensor, read_tensor
from mirrortune.stored_model import checkpoint_files, stored_tensors


class NotTensorByTensor(Exception):  # noqa: N818  (a way to go on, not an error)
    """The checkpoint cannot be merged by its files alone; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergePlan:
    """A merged checkpoint before it is written.

    Attributes:
        files: of the base.
        stored: every tensor of the base that the model has, by the model's name.
        planned: every tensor of the output.
        trained: names of parameters that were trained as they are -> the adapter that holds them last.
        adapted: names of changed weights -> (adapter, its layers there), in the order of merging.
        adapters: in that order.
        source_of_factors: computes or remembers factors.
        remarks: what did not fit, where a base is taken by force; None to refuse it.
    """

    files: list[Path]
    stored: dict[str, StoredTensor]
    planned: list[PlannedTensor]
    trained: dict[str, Tensor]
    adapted: dict[str, list[tuple[AdapterFile, list[str]]]]
    source_of_factors: FactorSource
    remarks: list[str] | None = None

    @torch.no_grad()
    def reference(self, name: str) -> Tensor:
        """The value of an adapted weight, float64; of several adapters the last one's, into what the others left
        rounded.
        """
        *before, last = self.adapted[name]
        if last[0].peft_config is not None:
            return self._tuned(name, last[0], last[1][0])
        current = read_tensor(self.stored[name])
        for adapter, layers in before:
            current = self._changed(current, adapter, layers).to(current.dtype)
        return self._changed(current, *last)

    @torch.no_grad()
    def made(self, planned: PlannedTensor) -> Tensor:
        """A tensor to be written, rounded once."""
        dtype = next(dtype for dtype, code in DTYPE_CODES.items() if code == planned.code)
        if planned.name in self.trained:
            return self.trained[planned.name].to(dtype)
        return self.reference(planned.name).to(dtype)

    def tuned_layer(self, name: str, adapter: AdapterFile, layer: str) -> tuple[PeftLayer, dict[str, Tensor]]:
        """A layer of PEFT's around the weight ``name``, and the base's weight and bias as they are stored."""
        names = {"weight": name, "bias": name.removesuffix("weight") + "bias"}
        before = {key: read_tensor(self.stored[own]) for key, own in names.items() if own in self.stored}
        trained_in = getattr(torch, str(adapter.base["dtype"]))
        held = {key: tensor.to(trained_in) for key, tensor in before.items()}
        found = lone_layer(adapter, layer, held["weight"], held.get("bias"))
        if found is None:
            raise NotTensorByTensor(f"method '{adapter.spec.method}' makes another layer of '{layer}' on its own")
        return found, before

    def _tuned(self, name: str, adapter: AdapterFile, layer: str) -> Tensor:
        weight = (
            name if self.stored[name].shape == adapter.layouts[layer].shape else name.removesuffix("bias") + "weight"
        )
        found, before = self.tuned_layer(weight, adapter, layer)
        key = "weight" if weight == name else "bias"
        merged = found.merged(before).get(key, before[key].double())
        del found
        gc.collect(1)  # PEFT's tuners and their models hold each other; a full collection takes a third of a second
        return merged

    def _changed(self, weight: Tensor, adapter: AdapterFile, layers: list[str]) -> Tensor:
        changed = weight.double()
        for layer in layers:
            changed += adapter.layouts[layer].tensor(self.delta(weight, adapter, layer))
        return changed

    def delta(self, weight: Tensor, adapter: AdapterFile, layer: str) -> Tensor:
        """What one layer of an adapter adds to its matrix in ``weight``, float64."""
        factors = self.factors(weight, adapter, layer)
        return delta_weight(factors, stored_core(adapter, layer, factors.S))

    def factors(self, weight: Tensor, adapter: AdapterFile, layer: str) -> Any:
        """The factors of a layer, of its matrix in ``weight`` as the adapter was trained on it."""
        trained_in = getattr(torch, adapter.dtypes[layer])
        matrix = adapter.layouts[layer].matrix(weight.to(trained_in)).contiguous()
        return trained_factors(adapter, layer, matrix, self.source_of_factors, remarks=self.remarks)


def plan_merge(
    source: ModelSource,
    model: nn.Module,
    adapters: Sequence[AdapterFile],
    factors: FactorSource,
    remarks: list[str] | None = None,
) -> MergePlan:
    """How to merge ``adapters`` into the base at ``source``, from its files' headers.

    Args:
        source: of the base.
        model: the model to be saved, without weights.
        adapters: of ours, in order.
        factors: computes or remembers factors.
        remarks: see :class:`MergePlan`.

    Raises:
        NotTensorByTensor: if the files do not hold the model's own tensors one by one, or a tuner of PEFT does not
            stand alone in each layer.
        ConfigError: two adapters of one base train the same parameter.
    """
    tuned = [adapter for adapter in adapters if adapter.peft_config is not None]
    if any(not stands_alone(adapter) for adapter in tuned):
        raise NotTensorByTensor("layers of this tuner of PEFT share numbers")
    if tuned and (len(adapters) > 1 or remarks is not None):
        raise NotTensorByTensor("PEFT merges whole models")
    files = checkpoint_files(source)
    if not files:
        raise NotTensorByTensor("the base has no safetensors files")
    names = aliases(model)
    stored = stored_tensors(files, names)
    trained = _trained(adapters, names)
    adapted = _adapted(adapters, stored, names)
    code = DTYPE_CODES[resolve_dtype("auto", source.config, torch.device("meta"))]
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    planned: dict[str, PlannedTensor] = {}
    for name, shape in shapes.items():
        found = stored.get(name)
        is_right = found is not None and found.shape == shape
        if name in trained and shape != tuple(trained[name].shape):
            raise NotTensorByTensor(f"'{name}' was trained in another shape")
        if name in trained or name in adapted:
            if not is_right and name in adapted:
                raise NotTensorByTensor(f"the files hold '{name}' otherwise than the model")
            # Eight bits do not hold a turned weight.
            own = found.code if found and is_right and not found.code.startswith("F8") else code
            planned[name] = PlannedTensor(name=name, code=own, shape=shape, place=found.path if found else None)
        elif found is not None and is_right:
            planned[name] = PlannedTensor(name=name, code=found.code, shape=shape, source=found, place=found.path)
        elif not any(other in stored or other in trained for other in names[name] if other != name):
            raise NotTensorByTensor(f"the files hold no '{name}'")
    return MergePlan(
        files=files, stored=stored, planned=_without_twins(planned, names, stored), trained=trained, adapted=adapted,
        source_of_factors=factors, remarks=remarks,
    )  # fmt: skip


def _without_twins(
    planned: dict[str, PlannedTensor], names: dict[str, tuple[str, ...]], stored: dict[str, StoredTensor]
) -> list[PlannedTensor]:
    """Of tied tensors one, under the name that the files have for it, as transformers saves them; in their order."""
    kept = []
    for name, tensor in planned.items():
        twins = [twin for twin in names[name] if twin in planned]
        chosen = next((twin for twin in twins if twin in stored), twins[0])
        if name == chosen:
            kept.append(tensor)
    places = {name: index for index, name in enumerate(stored)}
    return sorted(kept, key=lambda tensor: places.get(tensor.name, len(places)))


def _trained(adapters: Sequence[AdapterFile], names: dict[str, tuple[str, ...]]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    owners: dict[str, AdapterFile] = {}
    for adapter in adapters:
        for name, tensor in _plain_tensors(adapter).items():
            key = f"param.{name}"
            if name not in names:
                raise VerificationError(str(adapter.folder), f"tensor '{key}' is none of the model's")
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


def _plain_tensors(adapter: AdapterFile) -> dict[str, Tensor]:
    """Parameters that were trained as they are, by the model's names."""
    if adapter.peft_config is not None:
        return head_tensors(adapter)
    kind = "param."
    return {key.removeprefix(kind): t for key, t in adapter.tensors.items() if key.startswith(kind)}


def _adapted(
    adapters: Sequence[AdapterFile], stored: dict[str, StoredTensor], names: dict[str, tuple[str, ...]]
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
                raise NotTensorByTensor(f"the files hold '{here[0]}' otherwise than the model")
            biases = [name.removesuffix("weight") + "bias" for name in here] if adapter.peft_config else []
            for name in (*here, *(bias for bias in biases if bias in stored)):
                own.setdefault(name, []).append(layer)
        for name, layers in own.items():
            found.setdefault(name, []).append((adapter, layers))
    return found
