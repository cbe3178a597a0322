# SPDX-License-Identifier: Apache-2.0
"""Whether what the files of an adapter say can be meant: types, ranges, names and shapes, before anything is built from
them. A file that was made to do harm has hashes that fit, so that these are no defence.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirrortune.adapters.pairings.encoding import pairs_of
from mirrortune.errors import VerificationError

_HASH = re.compile(r"values:[0-9a-f]{64}")
_SIDES = {"output": 1, "input": 1, "both": 2}
_PAIRS = ("pairs", "partners")
_LARGEST_SIZE = 2**40
_LARGEST_CLUSTER = 64
# No setting counts more than the numbers that are stored, or the directions of a layer; a few are small anyhow.
_ALWAYS_ALLOWED = 1024


def read_file(path: Path) -> bytes:
    """The content of one of an adapter's files.

    Raises:
        VerificationError: missing, no regular file (a pipe, a device), or too large for the memory.
    """
    try:
        if not path.is_file():
            raise OSError
        return path.read_bytes()
    except (OSError, MemoryError) as error:
        raise VerificationError(str(path), "missing or unreadable", fix="Restore the adapter folder") from error


def strict_json(data: bytes) -> Any:
    """JSON in which no key stands twice and every number is finite; ValueError or RecursionError otherwise."""
    return json.loads(
        data.decode("utf-8"), object_pairs_hook=_without_twins, parse_constant=_finite, parse_float=_finite
    )


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no number")
    return value


def check_description(description: Mapping[str, Any], *, has_basis: bool) -> None:
    """ValueError for a description whose fields cannot be meant.

    Args:
        description: of ``adapter.json``.
        has_basis: whether the layers have cores, and not a tuner of PEFT.
    """
    settings, base, task = description["adapter"], description["base"], description["task"]
    # Lists by pattern would be matched with names: what was paired is in the tensors, and here is but a word for it.
    _require(isinstance(settings.get("pairing"), str | None), "adapter.pairing")
    _require(isinstance(base, dict), "base")
    for key in ("name", "revision", "commit", "load_in"):
        _require(isinstance(base.get(key), str | None) and (base.get(key) or "").isprintable(), f"base.{key}")
    for key in {"dtype", "auto_class"} & base.keys():
        _require(isinstance(base[key], str) and base[key].isidentifier(), f"base.{key}")
    _require("dtype" not in base or _is_float(base["dtype"]), "base.dtype")
    labels = base.get("id2label") or {}
    _require(
        isinstance(labels, dict) and all(k.isdecimal() and isinstance(v, str) for k, v in labels.items()), "labels"
    )
    _require(task is None or (isinstance(task, dict) and isinstance(task.get("kind"), str)), "task")
    _require(description.get("max_length") is None or _is_count(description["max_length"]), "max_length")
    for key in ("head", "plain"):
        _require(_are_names(description[key]), key)
    _require(description["form"] in ("compact", "portable"), "form")
    _require(isinstance(description["layers"], dict) and all(description["layers"]), "layers")
    for name, layer in description["layers"].items():
        _check_layer(name, layer, has_basis=has_basis)


def _check_layer(name: str, layer: dict[str, Any], *, has_basis: bool) -> None:
    _require(_HASH.fullmatch(str(layer["weight"])) is not None, f"the hash of '{name}'")
    _require(_is_float(layer.get("dtype", "float32")), f"the dtype of '{name}'")
    names = layer.get("tensors", [name])
    _require(_are_names(names) and bool(names), f"the tensors of '{name}'")
    layout = layer["layout"]
    shape, rows, count = layout["shape"], layout.get("rows"), layout.get("count", 1)
    sizes = [*shape, layout["out_features"], count]
    _require(all(map(_is_count, sizes)) and math.prod(shape) <= _LARGEST_SIZE, f"the shape of '{name}'")
    outputs = layout["out_features"]
    if rows is not None:
        parts = [rows[key] for key in ("repeat", "start", "stop", "period")]
        _require(all(type(p) is int for p in parts), f"the rows of '{name}'")
        repeat, start, stop, period = parts
        _require(repeat > 0 and 0 <= start < stop <= period and outputs == repeat * (stop - start), f"rows of '{name}'")
        outputs = repeat * period
    _require(math.prod(shape) % (count * outputs) == 0, f"the layout of '{name}'")
    if has_basis:
        _check_basis(name, layer, count)
    else:
        response = layer["response"]
        _require(isinstance(response, list) and all(isinstance(v, float) for v in response), f"the probe of '{name}'")


def _check_basis(name: str, layer: dict[str, Any], count: int) -> None:
    _require(layer["side"] in _SIDES, f"the side of '{name}'")
    seeds = layer["probe_seeds"]
    _require(len(seeds) == count and all(type(s) is int and 0 <= s < 2**32 for s in seeds), f"the seeds of '{name}'")
    _require(_is_count(layer["rank"]), f"the rank of '{name}'")
    for shape in layer["holds"].values():
        is_shape = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
        _require(is_shape and math.prod(shape) <= _LARGEST_SIZE, f"what '{name}' holds")
    own = layer.get("clusters", [])
    _require(len(own) in (0, count), f"the clusters of '{name}'")
    for clusters in own:
        end = 0
        for start, stop in clusters:
            _require(type(start) is int and type(stop) is int and end <= start < stop, f"the clusters of '{name}'")
            _require(stop <= layer["rank"] and stop - start <= _LARGEST_CLUSTER, f"the clusters of '{name}'")
            end = stop


def check_tensors(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """ValueError for tensors (of an adapter with a basis) that the description has no place for, or of another type.

    Their sizes are compared with the model's when they are put into it; those of the basis are compared here.
    """
    layers = description["layers"]
    plain = {*description["head"], *description["plain"]}
    for key, tensor in tensors.items():
        kind, _, rest = key.partition(".")
        is_known = {
            "core": any(part in layers for part in _beginnings(rest)),
            "param": rest in plain,
            "factor": rest.rpartition(".")[0] in layers and description["form"] == "portable",
            "effects": not rest,
        }.get(kind, kind in ("sketch", "signs", "clusters", *_PAIRS) and rest in layers)
        _require(is_known, f"tensor '{key}'")
        is_right = tensor.dtype in (torch.int16, torch.int32) if kind in _PAIRS else tensor.is_floating_point()
        _require(is_right, f"the dtype {str(tensor.dtype).removeprefix('torch.')} of tensor '{key}'")
    for name, layer in layers.items():
        count = layer["layout"].get("count", 1)
        stack = (count,) if count > 1 else ()
        if f"signs.{name}" not in tensors:
            sketch = tensors[f"sketch.{name}"]
            _require(tuple(sketch.shape[:-1]) == (*stack, _SIDES[layer["side"]]), f"the shape of 'sketch.{name}'")
        else:
            _require("effects" in tensors, "signs without effects")
        pairs = tensors.get(f"pairs.{name}")
        if pairs is not None:
            _require(pairs.shape[-1] == 2 and tuple(pairs.shape[:-2]) == stack, f"the shape of 'pairs.{name}'")
            low, high = pairs[..., 0], pairs[..., 1]
            _require(bool(((low >= 0) & (low < high) & (high < layer["rank"])).all()), f"a pair of 'pairs.{name}'")
        partners = tensors.get(f"partners.{name}")
        if partners is not None:
            _require(partners.dim() == 1 and not stack and pairs is None, f"the shape of 'partners.{name}'")
            _check_partners(name, partners, layer["rank"])


def _check_partners(name: str, partners: Tensor, rank: int) -> None:
    try:
        pairs_of(partners, rank)
    except ValueError as error:
        raise ValueError(f"'partners.{name}' is not what it should be: {error}") from error


def largest_count(layers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """The largest number of directions, tokens or layers that an adapter can mean: it has no numbers for more."""
    sizes: list[int] = [size for layer in layers.values() for size in layer["layout"]["shape"]]
    return max([_ALWAYS_ALLOWED, sum(t.numel() for t in tensors.values()), *sizes])


def check_settings(rank: object, options: Mapping[str, Any], largest: int) -> None:
    """ValueError for counts that would build more than ``largest``, see :func:`largest_count`."""
    for key, value in {**options, "rank": rank}.items():
        _require(not isinstance(value, int) or value <= largest, f"'{key}'")


def _beginnings(name: str) -> Iterable[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def _is_float(name: object) -> bool:
    found = getattr(torch, name, None) if isinstance(name, str) else None
    return isinstance(found, torch.dtype) and found.is_floating_point


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _require(is_right: bool, what: str) -> None:  # noqa: FBT001  (an assertion, read as one)
    if not is_right:
        raise ValueError(f"{what} cannot be meant")
