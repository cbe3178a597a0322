# SPDX-License-Identifier: Apache-2.0
"""Whether a checkpoint that was merged tensor by tensor is what was planned: every tensor is read back from its file,
and a model of them compared with base + adapter, both without more than a module in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from mirrortune.adapters.files.adapter_file import AdapterFile
from mirrortune.adapters.files.load import stored_core
from mirrortune.errors import VerificationError
from mirrortune.merging.contents import tensor_entry
from mirrortune.merging.in_memory import OutputError, Probes, compare_outputs
from mirrortune.merging.plan import MergePlan
from mirrortune.models.load import find_model, resolve_dtype
from mirrortune.models.parts import LoadedTensor, value_of
from mirrortune.models.skeleton import read_lazily
from mirrortune.models.tensors import aliases, part_loader
from mirrortune.system.tensor_files import StoredTensor, read_headers, same_bytes
from mirrortune.tasks.model_outputs import compared_outputs

FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Kinds of floating point numbers in safetensors files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What was written, read back.

    Attributes:
        headers: every tensor of the files.
        tensors: by the model's names.
    """

    headers: dict[str, StoredTensor]
    tensors: Mapping[str, StoredTensor | LoadedTensor]

    @classmethod
    def of(cls, folder: Path, plan: MergePlan) -> Written:
        """The files of ``folder``; opened as the base's are, if those hold tensors otherwise than the model."""
        files = sorted(folder.glob("*.safetensors"))
        headers = read_headers(files)
        if plan.loader is None or not plan.loader.parts:
            return cls(headers=headers, tensors=headers)
        source = find_model(str(folder))
        dtype = resolve_dtype("auto", source.config, torch.device("meta"))
        loader = part_loader(source, plan.auto_class, {}, dtype, files)
        return cls(headers=headers, tensors=headers if loader is None else loader.tensors())


@torch.no_grad()
def compare_tensors(plan: MergePlan, written: Written) -> tuple[dict[str, dict[str, float]], int]:
    """Errors of every adapted tensor against its float64 reference, and how many others are not what they should be."""
    found: dict[str, dict[str, float]] = {}
    if odd := written.headers.keys() ^ {tensor.name for tensor in plan.planned}:
        raise VerificationError(
            "merge", f"'{min(odd)}' and {len(odd) - 1} other tensors are missing, or new, as written"
        )
    changed = 0
    for planned in plan.planned:
        if planned.source is not None:
            changed += not same_bytes(written.headers[planned.name], planned.source)
            continue
        for name in planned.stands_for or (planned.name,):
            if name in found:  # of several stored tensors, or tensors of the model
                continue
            own = value_of(written.tensors[name])
            if name in plan.adapted:
                found[name] = tensor_entry(own, plan.reference(name), partial(value_of, plan.stored[name]))
            else:
                changed += not torch.equal(own, plan.value(name).to(own.dtype))
    return found, changed


def compare_lazily(make: Callable[[], nn.Module], probes: Probes, plan: MergePlan, written: Written) -> OutputError:
    """The outputs of the merged model and of base + adapter, of models without weights that ``make`` makes.

    Both read their weights module by module; the adapter runs beside its layers, as it was trained.
    """
    model = make()
    names = aliases(model)
    held = written.tensors.values()
    stored_in = max((FLOATS[t.code] for t in held if t.code in FLOATS), key=lambda d: torch.finfo(d).eps)
    trained_in = plan.trained_in
    # Not every layer computes in float16 on a CPU, and 16-bit arithmetic is no error of the weights.
    computed_in = (
        torch.float32 if torch.float16 in (stored_in, trained_in) or trained_in == torch.float32 else stored_in
    )

    def read_merged(name: str) -> Tensor:
        found = value_of(next(written.tensors[twin] for twin in names[name] if twin in written.tensors))
        return found.to(computed_in) if found.is_floating_point() else found

    merged = read_lazily(model, read_merged)
    adapted = _base_with_adapters(make(), plan, trained_in)
    epsilon = max(torch.finfo(dtype).eps for dtype in (stored_in, trained_in))
    return compare_outputs(
        lambda probe: compared_outputs(merged, probe, dtype=computed_in),
        lambda probe: compared_outputs(adapted, probe, dtype=trained_in), probes, tolerance=max(1e-4, 8 * epsilon),
    )  # fmt: skip


def _base_with_adapters(model: nn.Module, plan: MergePlan, dtype: torch.dtype) -> nn.Module:
    names = aliases(model)
    beside: set[str] = set()
    for name, changes in plan.adapted.items():
        module = model.get_submodule(name.rpartition(".")[0])
        (adapter, layers), *others = changes
        if adapter.peft_config is not None:
            beside.add(name)
            if name.endswith("weight"):
                module.register_forward_hook(_tuned(plan, name, adapter, layers[0]))
            continue
        if others or len(layers) > 1 or type(module) is not nn.Linear or adapter.layouts[layers[0]].rows:
            continue  # read as it is merged
        beside.add(name)
        module.register_forward_hook(_branch(plan, name, adapter, layers[0]))

    def read(name: str) -> Tensor:
        if name in plan.trained:
            return plan.trained[name].to(dtype if name in plan.stored else torch.float32)
        own = next(twin for twin in names[name] if twin in plan.stored)
        is_adapted = own in plan.adapted and own not in beside
        found = plan.reference(own) if is_adapted else value_of(plan.stored[own], dtype)
        return found.to(dtype) if found.is_floating_point() else found

    return read_lazily(model, read)


def _tuned(plan: MergePlan, name: str, adapter: AdapterFile, layer: str) -> Any:
    """A hook by which PEFT's layer answers in the place of a linear layer."""

    def answer(_: nn.Module, given: tuple[Tensor, ...], __: Tensor) -> Any:
        return plan.tuned_layer(name, adapter, layer)[0].module(*given)

    return answer


def _branch(plan: MergePlan, name: str, adapter: AdapterFile, layer: str) -> Any:
    """A hook that adds U (K - diag(S)) Vh x to a linear layer's output, in float32."""

    def add(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            factors = plan.factors(plan.turned_weight(name, adapter), adapter, layer)
            core, x = stored_core(adapter, layer, factors.S), given[0].float()
            z = F.linear(x, factors.Vh.float())
            product = F.linear(core.mix(z, *core.coefficients(delta=True)), factors.U.float())
            beside = core.beside(lambda matrix: F.linear(x, matrix.float()))
            return output + (product if beside is None else product + beside).to(output.dtype)

    return add
