# SPDX-License-Identifier: Apache-2.0
"""Every weight of a model that could be adapted, wherever it is used, and what is of no kind and why."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.utils import parametrize

from mirrortune.adapters.kinds import (
    Attention,
    Convolution,
    Embedding,
    Experts,
    Kind,
    Linear,
    Parameter,
    TransposedLinear,
)
from mirrortune.adapters.layout import Layout
from mirrortune.adapters.packed import PackedLinear

KINDS: tuple[Kind, ...] = (
    Linear(),
    TransposedLinear(),
    PackedLinear(),
    Convolution(),
    Embedding(),
    Attention(),
    Experts(),
    Parameter(),
)
"""In the order in which they are asked; the first that knows a module has it."""


@dataclass(slots=True, kw_only=True)
class Candidate:
    """A weight that could be adapted, with every module that holds it."""

    kind: Kind
    layout: Layout
    places: list[tuple[str, str]]
    is_output: bool
    is_read: bool
    """Whether ``nn.MultiheadAttention`` reads its weight and never calls the layer."""
    whole: str = ""
    """Name of the fused layer that this is a part of."""

    @property
    def is_peft(self) -> bool:
        """Whether tuners of PEFT take it: a linear layer that nobody else is or shares a weight with."""
        return isinstance(self.kind, Linear) and len(self.places) == 1 and not self.is_read

    @property
    def is_grouped(self) -> bool:
        """Whether it is a convolution in groups: small matrices, of rank 1 where each channel has its own."""
        return self.kind.name == "convolution" and self.layout.count > 1


def find_candidates(
    model: nn.Module, prefix: str, new: set[str], output: set[int]
) -> tuple[dict[str, Candidate], dict[str, str]]:
    """Every weight of a known kind inside the base model, by layer name, and those of no kind with the reason.

    Args:
        model: not adapted.
        prefix: what the names of the base model's parameters begin with.
        new: names of parameters that no checkpoint filled.
        output: identities of the output embedding's parameters.
    """
    found: dict[int, Candidate] = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        kind, layouts = kind_of(module)
        for parameter, layout in layouts.items():
            weight: object = module if kind.is_packed else module.get_parameter(parameter)
            full = ".".join(filter(None, (name, parameter)))
            held = module.parameters(recurse=False) if kind.is_packed else [weight]
            is_output = any(id(tensor) in output for tensor in held)
            if full in new or not (full.startswith(prefix) or is_output or id(weight) in found):
                continue  # the task head
            if id(weight) in found:
                found[id(weight)].places.append((name, parameter))
            else:
                found[id(weight)] = Candidate(
                    kind=kind,
                    layout=layout,
                    places=[(name, parameter)],
                    is_output=is_output,
                    is_read=isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear),
                )
        if not layouts and name.startswith(prefix) and (reason := _opaque(module)):
            skipped[name] = reason
    return {_layer_name(*c.places[0]): c for c in found.values()}, skipped


def kind_of(module: nn.Module) -> tuple[Kind, dict[str, Layout]]:
    """The kind of a module, with the layouts of the weights that it holds as such, by parameter name; none if it holds
    no matrix.
    """
    for kind in KINDS:
        if layouts := kind.layouts(module):
            return kind, layouts
    return KINDS[-1], {}


def _opaque(module: nn.Module) -> str | None:
    """Why a module with a weight of its own is of no kind, or None for one without such a weight."""
    if parametrize.is_parametrized(module):
        return "its weight is computed from other parameters"
    weight = module._parameters.get("weight")  # noqa: SLF001  (getattr would compute a parametrised one)
    if weight is None or weight.ndim < 2:
        return None
    numbers = str(weight.dtype).removeprefix("torch.")
    if numbers.startswith("float8"):
        return f"{type(module).__name__} of {numbers} numbers, whose scales are elsewhere; load the model dequantised"
    return f"{type(module).__name__} of {numbers} numbers {tuple(weight.shape)}, which is no kind of layer known here"


def _layer_name(module: str, parameter: str) -> str:
    return module if parameter == "weight" else ".".join(filter(None, (module, parameter)))
