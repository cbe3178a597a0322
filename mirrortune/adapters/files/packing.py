# SPDX-License-Identifier: Apache-2.0
"""The small tensors of many layers, one behind the other: a name and a place for each take more room than it does.

A layer's ``holds`` says what it has in which: ``{"core.theta": [32]}`` are the next 32 numbers of the tensor
``core.theta``, and ``core.<layer>.theta`` when they are read. Signs are kept as one bit each.

Shapes: R rank, E matrices of a stack.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_KINDS = ("core", "clusters", "pairs", "partners", "sketch")
_SIGNS = "signs"

Holds = dict[str, dict[str, list[int]]]
"""Layer -> name of a packed tensor -> the shape of its part."""


def pack(tensors: Mapping[str, Tensor], layers: Sequence[str]) -> tuple[dict[str, Tensor], Holds]:
    """Put together what belongs to layers one by one.

    Args:
        tensors: ``core.<layer>.<parameter>``, ``clusters.<layer>`` and others, which are left as they are.
        layers: in order.

    Returns:
        The tensors, and what each layer has of those that were put together.
    """
    places = {name: index for index, name in enumerate(layers)}
    kept: dict[str, Tensor] = {}
    own: list[tuple[int, str, str, Tensor]] = []
    for key, tensor in tensors.items():
        kind, _, rest = key.partition(".")
        name = _layer_of(rest, places) if kind in _KINDS else None
        if name is None:
            kept[key] = tensor
        else:
            own.append((places[name], kind + rest.removeprefix(name), name, tensor))
    holds: Holds = {name: {} for name in layers}
    parts: dict[str, list[Tensor]] = {}
    for _, key, name, tensor in sorted(own, key=lambda part: part[:2]):
        parts.setdefault(key, []).append(tensor.detach().cpu().reshape(-1))
        holds[name][key] = list(tensor.shape)
    return kept | {key: torch.cat(flat) for key, flat in parts.items()}, holds


def _layer_of(name: str, layers: Container[str]) -> str | None:
    """The layer that begins ``name``; the longest one, where one begins another."""
    while name and name not in layers:
        name = name.rpartition(".")[0]
    return name or None


def unpack(tensors: Mapping[str, Tensor], layers: Mapping[str, Any]) -> dict[str, Tensor]:
    """What :func:`pack` was given, and ``signs.<layer>`` out of ``signs``.

    Args:
        tensors: of a file.
        layers: their descriptions, with ``holds``.

    Raises:
        ValueError: tensors that are longer or shorter than the layers say, or belong to none.
    """
    used: Counter[str] = Counter()
    found: dict[str, Tensor] = {}

    def take(key: str, count: int) -> Tensor:
        start = used[key]
        used[key] += count
        if tensors[key].dim() != 1 or used[key] > tensors[key].numel():
            raise ValueError(f"'{key}' is too short")
        return tensors[key][start : used[key]]

    for name, layer in layers.items():
        for key, shape in layer["holds"].items():
            kind, dot, rest = key.partition(".")
            found[f"{kind}.{name}{dot}{rest}"] = take(key, math.prod(shape)).reshape(shape)
        if _SIGNS in tensors:
            count = layer["layout"].get("count", 1)
            bits = take(_SIGNS, count * -(-layer["rank"] // 8))
            found[f"{_SIGNS}.{name}"] = _to_signs(bits.reshape(count, -1), layer["rank"])
    for key, tensor in tensors.items():
        if key not in used and key.partition(".")[0] not in (*_KINDS, _SIGNS):
            found[key] = tensor
        elif tensor.numel() != used[key] or key not in used:
            raise ValueError(f"tensor '{key}' cannot be meant: no layer holds it, or not all of it")
    return found


def to_bits(sketch: Tensor) -> Tensor:
    """The signs of a sketch (1 or 2, R) or (E, 1 or 2, R), or of the first of two: one bit each, every matrix in whole
    bytes; uint8.
    """
    first = sketch.detach().cpu()[..., 0, :].reshape(-1, sketch.shape[-1])
    return torch.from_numpy(np.packbits((first < 0).numpy(), axis=1, bitorder="little").reshape(-1))


def _to_signs(bits: Tensor, rank: int) -> Tensor:
    """1 and -1, (1, R) or (E, 1, R), of the bits (E, bytes)."""
    found = np.unpackbits(bits.numpy(), axis=1, bitorder="little", count=rank)
    signs = 1 - 2 * torch.from_numpy(found).float()
    return signs[:, None] if len(signs) > 1 else signs
