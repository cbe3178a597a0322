# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a checkpoint are matrices that act on features, and how to read each as (out, in).

Known from the model's modules, built without weights, and not from names: embeddings are tables and left out, GPT-2's
Conv1D holds its weight as (in, out), convolutions act on patches, and a stack of experts is as many matrices.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn

from mirrortune.adapters.layer_names import matches, no_match
from mirrortune.errors import ConfigError, MirrortuneError
from mirrortune.model import ModelSource, empty_model
from mirrortune.weights import Weights, match_names

_TRANSPOSED = "Conv1D"  # transformers' own linear layer with the weight as (in, out)


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A weight that is compared.

    Attributes:
        name: for people; the tensor's name, with the number of its part if it is a stack.
        base, tuned: the tensor's name on either side.
        part: entry of the stack, or None.
        shape: (O, I).
        is_transposed: whether it is stored as (I, O).
    """

    name: str
    base: str
    tuned: str
    part: int | None
    shape: tuple[int, int]
    is_transposed: bool

    def read(self, weights: Weights, name: str) -> Tensor:
        """The matrix (O, I) from one side, where it is called ``name``."""
        stored = weights.read(name, self.part)
        flat = stored.reshape(stored.shape[0], -1)
        return flat.T if self.is_transposed else flat


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairing:
    """The matrices that two checkpoints have in common, and what they do not.

    Attributes:
        matrices: in the base's order.
        base_only, tuned_only: names of tensors that the other side lacks.
        resized: names of tensors whose shapes differ (a head for other labels, an embedding for other tokens).
    """

    matrices: list[Matrix]
    base_only: list[str]
    tuned_only: list[str]
    resized: list[str]


def pair_matrices(base: Weights, tuned: Weights, pattern: str) -> Pairing:
    """Match the matrices of two checkpoints.

    Args:
        base: one side.
        tuned: the other.
        pattern: which layers, as for ``--target-modules``.

    Raises:
        ConfigError: they are of different architectures, or no matrix matches ``pattern``.
    """
    names = match_names(base.shapes, tuned.shapes)
    resized = [n for n, other in names.items() if base.shapes[n] != tuned.shapes[other]]
    same = {n: other for n, other in names.items() if base.shapes[n] == tuned.shapes[other]}
    kinds = _module_kinds(base.source, base.shapes)
    found = [m for n in same for m in _as_matrices(n, same[n], base.shapes[n], kinds.get(n))]
    if not found or len(resized) > len(same):
        raise _different(base, tuned, names, resized)
    layers = [m.base.removesuffix(".weight") for m in found]
    chosen = [m for m, layer in zip(found, layers, strict=True) if matches(layer, pattern, "--target-modules")]
    if not chosen:
        raise no_match("--target-modules", pattern, layers)
    taken = set(names.values())
    return Pairing(
        matrices=chosen,
        base_only=[n for n in base.shapes if n not in names],
        tuned_only=[n for n in tuned.shapes if n not in taken],
        resized=resized,
    )


def _as_matrices(name: str, tuned: str, shape: tuple[int, ...], kind: str | None) -> list[Matrix]:
    if kind == "embedding" or len(shape) < 2:
        return []
    if kind == "stack":
        parts: list[tuple[str, int | None, tuple[int, int]]] = (
            [(f"{name}[{i}]", i, (shape[1], prod(shape[2:]))) for i in range(shape[0])] if shape[0] > 1 else []
        )
    else:
        parts = [(name, None, (shape[0], prod(shape[1:])))]
    return [
        Matrix(
            name=label, base=name, tuned=tuned, part=part,
            shape=(size[1], size[0]) if kind == "transposed" else size, is_transposed=kind == "transposed",
        )
        for label, part, size in parts
        if min(size) > 1
    ]  # fmt: skip


def _module_kinds(source: ModelSource | None, names: Iterable[str]) -> dict[str, str]:
    """What holds each tensor: ``linear``, ``transposed``, ``embedding``, ``convolution`` or ``stack``; unknown ones are
    left out.
    """
    if source is None:
        return {}
    try:
        model = empty_model(source, "AutoModel", {})
    except (MirrortuneError, ImportError, ValueError, TypeError, AttributeError, RuntimeError, KeyError):
        return {}  # a configuration that transformers cannot build; shapes alone must do
    kinds = {
        f"{name}.{key}".removeprefix("."): _kind(module, parameter.ndim)
        for name, module in model.named_modules()
        for key, parameter in module.named_parameters(recurse=False)
    }
    renamed = match_names(names, kinds)
    return {name: kinds[own] for name, own in renamed.items()}


def _kind(module: nn.Module, ndim: int) -> str:
    if isinstance(module, nn.Embedding):
        return "embedding"
    if type(module).__name__ == _TRANSPOSED:
        return "transposed"
    if isinstance(module, nn.modules.conv._ConvNd):  # noqa: SLF001  (torch has no public name for all convolutions)
        return "convolution"
    return "linear" if ndim < 3 else "stack"


def _different(base: Weights, tuned: Weights, names: dict[str, str], resized: Sequence[str]) -> ConfigError:
    """The error for two checkpoints that cannot be compared; says what they do and do not share."""
    where = f"{base.label} and {tuned.label}"
    fix = "Give two checkpoints of one architecture, or an adapter with its own base"
    if resized:
        shown = "; ".join(f"{n}: {_shape(base, n)} and {_shape(tuned, names[n])}" for n in resized[:3])
        return ConfigError(where, f"{len(resized)} of {len(names)} weights differ in shape ({shown})", fix=fix)
    return ConfigError(where, f"they share no matrix (for example {_example(base)} and {_example(tuned)})", fix=fix)


def _example(weights: Weights) -> str:
    return next((n for n, shape in weights.shapes.items() if len(shape) > 1 and re.search(r"\d", n)), "") or next(
        iter(weights.shapes)
    )


def _shape(weights: Weights, name: str) -> str:
    return " x ".join(map(str, weights.shapes[name]))
