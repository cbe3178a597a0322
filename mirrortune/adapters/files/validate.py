# SPDX-License-Identifier: Apache-2.0
"""Check types, ranges, names and shapes in the files of an adapter before any object is built from them.

The hashes of a malicious file match its content, so they are no protection. All functions raise ValueError, and no
other exception, for invalid content; code that runs after the checks may rely on the types that they establish.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from types import NoneType
from typing import Any, get_args

import torch
from torch import Tensor

from mirrortune.adapters.effect import NUM_PROBES
from mirrortune.adapters.pairings.encoding import pairs_of
from mirrortune.adapters.strategies import Strategy

_HASH = re.compile(r"values:[0-9a-f]{64}")
_FROZEN = re.compile(r"(?:[0-9a-f]{8})*")
_SIDES = {"output": 1, "input": 1, "both": 2}
_PAIRS = ("pairs", "partners")
_LARGEST_SIZE = 2**40
_LARGEST_CLUSTER = 64
# A count in the settings is at most the number of stored values or of directions of a layer; this many are always
# allowed.
_ALWAYS_ALLOWED = 1024

Types = type | tuple[type, ...]
_DESCRIPTION: dict[str, Types] = {
    "adapter": dict, "base": dict, "task": (dict, NoneType), "layers": dict, "head": list, "plain": list, "form": str,
}  # fmt: skip
_SETTINGS: dict[str, Types] = {
    "method": str, "rank": (int, str, NoneType), "pairing": (str, NoneType), "target_modules": str, "seed": int,
    "strategy": (str, NoneType), "options": dict, "split": dict,
}  # fmt: skip
_LAYER: dict[str, Types] = {"weight": str, "layout": dict}
_BASIS: dict[str, Types] = {"rank": int, "side": str, "probe_seeds": list, "holds": dict}


def check_description(description: Mapping[str, Any]) -> None:
    """Check all parts of ``adapter.json`` that do not depend on the method."""
    _check_types(description, _DESCRIPTION, "")
    settings, base, task = description["adapter"], description["base"], description["task"]
    _check_types(settings, _SETTINGS, "adapter.")
    _require(settings.keys() <= _SETTINGS.keys(), f"a key of adapter ({', '.join(settings)})")
    # Lists of pairs by pattern would be matched with names; the pairs are in the tensors, and this is only their name.
    rank, strategy = settings["rank"], settings["strategy"]
    _require(rank in (None, "full", "out") or _is_count(rank), "adapter.rank")
    _require(strategy is None or strategy in get_args(Strategy), "adapter.strategy")
    _require(0 <= settings["seed"] < 2**63, "adapter.seed")
    for key in ("name", "revision", "commit", "load_in"):
        _require(isinstance(base.get(key), str | None) and (base.get(key) or "").isprintable(), f"base.{key}")
    for key in {"dtype", "auto_class"} & base.keys():
        _require(isinstance(base[key], str) and base[key].isidentifier(), f"base.{key}")
    _require("dtype" not in base or _is_float(base["dtype"]), "base.dtype")
    _require("new_tokens" not in base or _are_names(base["new_tokens"]), "base.new_tokens")
    labels = base.get("id2label") or {}
    _require(
        isinstance(labels, dict) and all(k.isdecimal() and isinstance(v, str) for k, v in labels.items()), "labels"
    )
    _require(task is None or isinstance(task.get("kind"), str), "task")
    _require(description.get("max_length") is None or _is_count(description["max_length"]), "max_length")
    for key in ("head", "plain", "statistics"):
        _require(_are_names(description.get(key, [])), key)
    tied = description.get("tied", {})
    _require(isinstance(tied, dict) and all(map(_are_names, tied.values())), "tied")
    frozen = description.get("frozen")
    _require(frozen is None or (isinstance(frozen, str) and _FROZEN.fullmatch(frozen) is not None), "frozen")
    _require(description["form"] in ("compact", "portable"), "form")
    for name, layer in description["layers"].items():
        _require(bool(name) and isinstance(layer, dict), "layers")
        _check_layer(name, layer)


def _check_layer(name: str, layer: dict[str, Any]) -> None:
    _check_types(layer, _LAYER, f"{name}: ")
    _require(_HASH.fullmatch(layer["weight"]) is not None, f"the hash of '{name}'")
    _require(_is_float(layer.get("dtype", "float32")), f"the dtype of '{name}'")
    names = layer.get("tensors", [name])
    _require(_are_names(names) and bool(names), f"the tensors of '{name}'")
    layout = {"count": 1, "is_transposed": False, "rows": None, **layer["layout"]}
    _require(layout.keys() == {"shape", "out_features", "count", "is_transposed", "rows"}, f"the layout of '{name}'")
    shape, rows, count, outputs = layout["shape"], layout["rows"], layout["count"], layout["out_features"]
    _require(type(layout["is_transposed"]) is bool and isinstance(shape, list), f"the layout of '{name}'")
    _require(
        all(map(_is_count, [*shape, outputs, count])) and math.prod(shape) <= _LARGEST_SIZE, f"the shape of '{name}'"
    )
    if rows is not None:
        keys = ("repeat", "start", "stop", "period")
        _require(isinstance(rows, dict) and rows.keys() == set(keys), f"the rows of '{name}'")
        _require(all(type(part) is int for part in rows.values()), f"the rows of '{name}'")
        repeat, start, stop, period = (rows[key] for key in keys)
        _require(repeat > 0 and 0 <= start < stop <= period and outputs == repeat * (stop - start), f"rows of '{name}'")
        outputs = repeat * period
    _require(math.prod(shape) % (count * outputs) == 0, f"the layout of '{name}'")


def check_responses(description: Mapping[str, Any]) -> None:
    """Check the responses of the layers in the description of a PEFT adapter."""
    for name, layer in description["layers"].items():
        response = layer.get("response")
        _require(
            isinstance(response, list) and all(isinstance(v, float) for v in response), f"the response of '{name}'"
        )


def check_bases(description: Mapping[str, Any]) -> None:
    """Check the bases of the layers in the description of a mirrortune adapter."""
    for name, layer in description["layers"].items():
        _check_types(layer, _BASIS, f"{name}: ")
        count = layer["layout"].get("count", 1)
        _require(layer["side"] in _SIDES, f"the side of '{name}'")
        seeds = layer["probe_seeds"]
        _require(
            len(seeds) == count and all(type(s) is int and 0 <= s < 2**32 for s in seeds), f"the seeds of '{name}'"
        )
        _require(_is_count(layer["rank"]), f"the rank of '{name}'")
        for shape in layer["holds"].values():
            is_shape = isinstance(shape, list) and all(type(n) is int and 0 <= n <= _LARGEST_SIZE for n in shape)
            _require(is_shape and math.prod(shape) <= _LARGEST_SIZE, f"what '{name}' holds")
        _check_clusters(name, layer, count)


def _check_clusters(name: str, layer: dict[str, Any], count: int) -> None:
    what, own = f"the clusters of '{name}'", layer.get("clusters", [])
    _require(isinstance(own, list) and len(own) in (0, count), what)
    for clusters in own:
        end = 0
        _require(isinstance(clusters, list) and all(isinstance(c, list) and len(c) == 2 for c in clusters), what)
        for start, stop in clusters:
            _require(type(start) is int and type(stop) is int and end <= start < stop, what)
            _require(stop <= layer["rank"] and stop - start <= _LARGEST_CLUSTER, what)
            end = stop


def check_tensors(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Check the names and dtypes of the tensors of a mirrortune adapter against its description.

    Of the sizes, only those of the bases are checked; the others are compared with the model when tensors are loaded.
    """
    layers = description["layers"]
    statistics = {*description.get("statistics", ())}
    plain = {*description["head"], *description["plain"], *statistics}
    for key, tensor in tensors.items():
        kind, _, rest = key.partition(".")
        is_known = {
            "core": any(part in layers for part in _beginnings(rest)),
            "param": rest in plain,
            "factor": rest.rpartition(".")[0] in layers and description["form"] == "portable",
            "effects": not rest,
        }.get(kind, kind in ("sketch", "signs", "clusters", *_PAIRS) and rest in layers)
        _require(is_known, f"tensor '{key}'")
        is_right = tensor.dtype in (torch.int16, torch.int32) if kind in _PAIRS else _computes(tensor.dtype)
        is_right |= kind == "param" and rest in statistics and tensor.dtype == torch.int64  # a number of batches
        _require(is_right, f"the dtype {str(tensor.dtype).removeprefix('torch.')} of tensor '{key}'")
    counts = {name: layer["layout"].get("count", 1) for name, layer in layers.items()}
    if "effects" in tensors:
        _require(tuple(tensors["effects"].shape) == (sum(counts.values()), NUM_PROBES), "the shape of 'effects'")
    for name, layer in layers.items():
        stack = (counts[name],) if counts[name] > 1 else ()
        if f"signs.{name}" not in tensors:
            sketch = tensors.get(f"sketch.{name}")
            _require(sketch is not None, f"'{name}', which has neither signs nor a sketch,")
            assert sketch is not None
            _require(tuple(sketch.shape[:-1]) == (*stack, _SIDES[layer["side"]]), f"the shape of 'sketch.{name}'")
        else:
            _require("effects" in tensors, "signs without effects")
        pairs = tensors.get(f"pairs.{name}")
        if pairs is not None:
            _require(
                pairs.dim() > 1 and pairs.shape[-1] == 2 and tuple(pairs.shape[:-2]) == stack,
                f"the shape of 'pairs.{name}'",
            )
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
        raise ValueError(f"'partners.{name}' is invalid: {error}") from error


def check_new_tokens(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Refuse more new tokens than any tensor has rows: the model is made longer by as many."""
    most = max((len(tensor) for tensor in tensors.values() if tensor.dim() == 2), default=0)
    tokens = description["base"].get("new_tokens", [])
    _require(len(tokens) <= most and len({*tokens}) == len(tokens), "base.new_tokens")


def largest_count(layers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """Return an upper bound on the directions, tokens or layers of an adapter, from the sizes that it stores."""
    sizes: list[int] = [size for layer in layers.values() for size in layer["layout"]["shape"]]
    return max([_ALWAYS_ALLOWED, sum(t.numel() for t in tensors.values()), *sizes])


def check_counts(rank: object, options: Mapping[str, Any], largest: int) -> None:
    """Check that no count in the settings exceeds ``largest``, see :func:`largest_count`."""
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
    return isinstance(found, torch.dtype) and _computes(found)


def _computes(dtype: torch.dtype) -> bool:
    """Return whether torch computes with floating-point numbers of a dtype; not with those of 8 or fewer bits."""
    return dtype.is_floating_point and dtype.itemsize > 1


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _check_types(data: Mapping[str, Any], types: Mapping[str, Types], where: str) -> None:
    for key, kind in types.items():
        _require(key in data and isinstance(data[key], kind) and not isinstance(data[key], bool), f"{where}{key}")


def _require(is_right: bool, what: str) -> None:  # noqa: FBT001  (an assertion, read as one)
    if not is_right:
        raise ValueError(f"{what} is invalid")
