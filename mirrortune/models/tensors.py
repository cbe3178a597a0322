# SPDX-License-Identifier: Apache-2.0
"""Read tensors from a model's safetensors files one at a time, by their names in the model, without loading it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mirrortune.adapters.targets import Target
from mirrortune.errors import ConfigError
from mirrortune.models.load import ModelSource
from mirrortune.models.parts import CannotLoadParts, LoadedTensor, PartLoader, value_of
from mirrortune.models.skeleton import outline
from mirrortune.system.tensor_files import DTYPE_CODES, INDEX, WHOLE, StoredTensor, index_of, read_headers

Layer = tuple[str, Callable[[], Tensor], int]
"""Name of a layer to factorise, function that reads its matrix, and rank."""
_FLOATS = tuple(DTYPE_CODES[dtype] for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16))


def stored_layers(
    source: ModelSource,
    auto_class: str,
    config_fields: dict[str, Any],
    targets: Mapping[str, Target],
    dtype: torch.dtype,
) -> list[Layer] | None:
    """Return the layers to which an adapter attaches cores, with functions that read their weights from the files.

    Args:
        source: source of the model; its files are downloaded.
        auto_class: name of an Auto class.
        config_fields: see :func:`mirrortune.models.load.task_config`.
        targets: layers by name.
        dtype: dtype in which the model would be loaded.

    Returns:
        The layers, or None if the weights cannot be read from the files: the checkpoint lacks a layer, is in pickle or
        GGUF format, keeps some weights in another dtype, or cannot be loaded in parts.
    """
    if source.gguf_file or source.trust_remote_code:
        return None
    model = outline(source, auto_class, config_fields, None)
    if dtype != torch.float32 and any(getattr(model, f"_keep_in_fp32_modules{end}", None) for end in ("", "_strict")):
        return None
    files = checkpoint_files(source)
    try:
        loader = part_loader(source, auto_class, config_fields, dtype, files) if files else None
    except CannotLoadParts:
        if source.is_stored_packed:
            return None
        loader = None
    stored = stored_tensors(files, aliases(model)) if loader is None else loader.tensors()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    held = {name for name, tensor in stored.items() if tensor.shape == shapes[name] and tensor.code in _FLOATS}
    layers = []
    for name, target in targets.items():
        own = next((tensor for tensor in target.tensors if tensor in held), None)
        if own is None:
            return None
        layers.append((name, _reader(target, stored[own], dtype), target.rank))
    try:
        for _, read, _ in layers[:1] if loader is not None else []:
            read()  # only trying shows whether transformers can load a part
    except CannotLoadParts:
        return None
    return layers


def _reader(target: Target, stored: StoredTensor | LoadedTensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: target.matrix(value_of(stored, dtype).to(dtype))


def part_loader(
    source: ModelSource, auto_class: str, config_fields: dict[str, Any], dtype: torch.dtype, files: list[Path]
) -> PartLoader | None:
    """Return the loader of weights that the files store differently from the model, or None if they do not.

    Raises:
        CannotLoadParts: see :class:`PartLoader`.
    """
    loader = PartLoader(source, auto_class, config_fields, dtype, files)
    return None if loader.is_plain else loader


def stored_tensors(files: Iterable[Path], names: Iterable[str]) -> dict[str, StoredTensor]:
    """Return the tensors of ``files`` by their ``names`` in the model; tensors that the model lacks are left out."""
    headers = read_headers(files)
    return {mine: headers[theirs] for theirs, mine in match_names(headers, names).items()}


def checkpoint_files(source: ModelSource) -> list[Path]:
    """Return the safetensors files of a model, downloaded if necessary; empty if it has none."""
    source.file("generation_config.json")  # downloaded now, since it is needed later, possibly offline
    index = source.file(INDEX)
    if index is not None:
        found = {name: source.file(name) for name in index_of(index)}
        if missing := [name for name, path in found.items() if path is None]:
            raise ConfigError(str(index.parent), f"file '{missing[0]}' of its index is missing")
        return [path for path in found.values() if path is not None]
    whole = source.file(WHOLE)
    return [] if whole is None else [whole]


def aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Map each name of a parameter or persistent buffer to all of its names; tied tensors have several."""
    names: dict[int, list[str]] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    return {name: tuple(names[id(tensor)]) for name, tensor in state.items()}


def match_names(ours: Iterable[str], theirs: Iterable[str]) -> dict[str, str]:
    """Match two sets of names that are equal, or equal except for a common prefix.

    For example, ``encoder.layer.0...`` in an encoder is ``bert.encoder.layer.0...`` in a classifier built on it.

    Returns:
        The name in ``theirs`` for each name in ``ours`` that has a match.
    """
    here, there = list(ours), list(theirs)
    common = {*here} & {*there}
    longer = {(prefix, True): found for prefix, found in _behind_prefixes(there, {*here}).items()}
    longer |= {(prefix, False): found for prefix, found in _behind_prefixes(here, {*there}).items()}
    (_, is_theirs), best = max(longer.items(), key=lambda item: len(item[1]), default=(("", True), {}))
    renamed = {short: long for long, short in best.items()} if is_theirs else best
    return {name: name if name in common else renamed[name] for name in here if name in common or name in renamed}


def _behind_prefixes(names: Iterable[str], known: set[str]) -> dict[str, dict[str, str]]:
    """Return, for each prefix of ``names``, the names whose remainder is in ``known``, with that remainder."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        words = name.split(".")
        for place in range(1, len(words)):
            rest = ".".join(words[place:])
            if rest in known:
                found.setdefault(".".join(words[:place]), {})[name] = rest
    return found


def shard_bytes(source: ModelSource) -> int:
    """Return the maximum shard size in bytes for a copy: the size of the source's largest shard if it has several."""
    index = source.file(INDEX)
    sizes = [] if index is None else [f.stat().st_size for f in index.parent.glob("model-*.safetensors")]
    return max(sizes, default=50 * 2**30)
