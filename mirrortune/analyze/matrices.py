# SPDX-License-Identifier: Apache-2.0
"""Find the tensors of a checkpoint that are matrices acting on features, and read each with shape (out, in).

The layout of a tensor follows from the model's modules, which are built without weights: GPT-2's Conv1D stores its
weight as (in, out), a convolution acts on patches, and a stack of experts holds several matrices. Embeddings are lookup
tables and are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from mirrortune.adapters.kinds import Embedding, Kind, Parameter
from mirrortune.adapters.layer_patterns import matches, no_match
from mirrortune.adapters.layout import Layout
from mirrortune.adapters.targets import kind_of
from mirrortune.analyze.weights import Weights
from mirrortune.errors import ConfigError, MirrortuneError
from mirrortune.models.load import ModelSource, empty_model
from mirrortune.models.tensors import match_names


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A weight to compare.

    Attributes:
        name: name to show: that of the tensor, with the index of the matrix in a stack.
        base, tuned: name of the tensor in each checkpoint.
        layout: how the tensor stores the matrix or the stack.
        part: index in the stack, or None.
    """

    name: str
    base: str
    tuned: str
    layout: Layout
    part: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix, (O, I)."""
        return self.layout.matrix_shape

    def read(self, weights: Weights, name: str) -> Tensor:
        """Read the matrix (O, I) from the tensor called ``name`` in one checkpoint."""
        if self.part is None:
            return self.layout.matrix(weights.read(name))
        if self.layout.shape[0] != self.layout.count:  # groups of a convolution
            return self.layout.matrix(weights.read(name))[self.part]
        entry = replace(self.layout, shape=self.layout.shape[1:], count=1)
        return entry.matrix(weights.read(name, self.part))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairing:
    """The matrices that two checkpoints share, and the tensors that they do not.

    Attributes:
        matrices: shared matrices, in the order of the base.
        base_only, tuned_only: names of tensors that the other checkpoint lacks.
        resized: names of tensors whose shapes differ, such as a head for other labels.
    """

    matrices: list[Matrix]
    base_only: list[str]
    tuned_only: list[str]
    resized: list[str]


def pair_matrices(base: Weights, tuned: Weights, pattern: str) -> Pairing:
    """Match the matrices of two checkpoints.

    Args:
        base: weights of the first checkpoint.
        tuned: weights of the second checkpoint.
        pattern: regular expression that selects layers, as in ``--target-modules``.

    Raises:
        ConfigError: the checkpoints are of different architectures, or no matrix matches ``pattern``.
    """
    names = match_names(base.shapes, tuned.shapes)
    resized = [n for n, other in names.items() if base.shapes[n] != tuned.shapes[other]]
    same = {n: other for n, other in names.items() if base.shapes[n] == tuned.shapes[other]}
    kinds = _kinds(base.source, base.shapes)
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


def _as_matrices(name: str, tuned: str, shape: tuple[int, ...], held: tuple[Kind, Layout] | None) -> list[Matrix]:
    kind, layout = held or (None, Layout(shape=shape, out_features=shape[0] if shape else 1))
    # Position embeddings are often parameters with a batch dimension of 1.
    is_table = isinstance(kind, Embedding) or (isinstance(kind, Parameter) and shape[0] == 1)
    if len(shape) < 2 or is_table or min(layout.matrix_shape) < 2:
        return []
    if layout.count == 1:
        return [Matrix(name=name, base=name, tuned=tuned, layout=layout)]
    parts = range(layout.count)
    return [Matrix(name=f"{name}[{i}]", base=name, tuned=tuned, layout=layout, part=i) for i in parts]


def _kinds(source: ModelSource | None, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[Kind, Layout]]:
    """Find the kind and layout of the module that holds each tensor; empty without a configuration."""
    if source is None:
        return {}
    try:
        model = empty_model(source, "AutoModel", {})
    except (MirrortuneError, ImportError, ValueError, TypeError, AttributeError, RuntimeError, KeyError):
        return {}  # transformers cannot build the model, so only shapes are known
    found: dict[str, tuple[Kind, Layout]] = {}
    for name, module in model.named_modules():
        kind, layouts = kind_of(module)
        found |= {f"{name}.{key}".removeprefix("."): (kind, layout) for key, layout in layouts.items()}
    renamed = match_names(shapes, found)
    return {name: found[own] for name, own in renamed.items() if found[own][1].shape == shapes[name]}


def _different(base: Weights, tuned: Weights, names: dict[str, str], resized: Sequence[str]) -> ConfigError:
    """Return the error for two checkpoints that cannot be compared."""
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
