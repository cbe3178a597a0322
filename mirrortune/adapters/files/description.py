# SPDX-License-Identifier: Apache-2.0
"""Write and read the text of ``adapter.json``.

``layers`` has one entry per adapted layer: ``kind`` and ``layout`` (how its weight stores matrices), ``tensors`` (names
of the weight in the model, if they differ from the layer's), ``weight`` (hash of the weight's values), ``dtype`` (of
the factors), ``rank``, ``side``, ``probe_seeds`` and ``clusters`` (see ``Fingerprint``), and ``holds`` (shapes of its
parts of the joined tensors, see ``tensors.py``). Values that most layers share are written once, in ``layers_share``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mirrortune.errors import VerificationError

FORMAT_VERSION = 1
DESCRIPTION = "adapter.json"
_LARGEST_DESCRIPTION = 64 * 2**20  # bytes; descriptions are short, since lists of pairs are stored as tensors


def description_text(description: dict[str, Any]) -> str:
    """Return the text of the file with a hash of its content, one key or layer per line."""
    shared, layers = _split_shared(description["layers"])
    short = {**{k: v for k, v in description.items() if k != "layers"}, "layers_share": shared, "layers": layers}
    return _laid_out(short)


def edited_text(text: str, edit: Callable[[dict[str, Any]], object]) -> str:
    """Return the text of a description after ``edit`` has changed its content, with a new hash."""
    description = strict_json(text.encode())
    description.pop("description_sha256", None)
    edit(description)
    return _laid_out(description)


def _laid_out(description: dict[str, Any]) -> str:
    whole = {**description, "description_sha256": _digest(description)}
    lines = [
        f" {json.dumps(key)}: {_layer_lines(value) if key == 'layers' else json.dumps(value)}"
        for key, value in whole.items()
    ]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _split_shared(layers: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Split off the values that several layers share, the most common one for each key that all layers have.

    Returns:
        The shared values, and the remaining values of each layer.
    """
    plain: dict[str, dict[str, Any]] = json.loads(json.dumps(layers))  # tuples become lists, as they will be read
    shared: dict[str, Any] = {}
    for key in next(iter(plain.values()), {}):
        said = Counter(json.dumps(layer[key]) if key in layer else None for layer in plain.values())
        text, count = said.most_common(1)[0]
        if None not in said and text is not None and count > 1:
            shared[key] = json.loads(text)
    own = {
        name: {key: value for key, value in layer.items() if key not in shared or value != shared[key]}
        for name, layer in plain.items()
    }
    return shared, own


def _layer_lines(layers: dict[str, Any]) -> str:
    lines = [f"  {json.dumps(name)}: {json.dumps(layer)}" for name, layer in layers.items()]
    return "{\n" + ",\n".join(lines) + "\n }" if lines else "{}"


def read_description(folder: Path) -> dict[str, Any]:
    """Read ``adapter.json`` in ``folder``.

    Raises:
        VerificationError: the file is missing, damaged, edited, or in another format.
    """
    path = folder / DESCRIPTION
    try:
        if path.stat().st_size > _LARGEST_DESCRIPTION:
            raise VerificationError(str(path), f"{path.stat().st_size:,} bytes", allowed=f"{_LARGEST_DESCRIPTION:,}")
        description = strict_json(read_file(path))
        if not isinstance(description, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError) as error:
        raise VerificationError(
            str(path), f"missing or damaged ({type(error).__name__})", fix="Give the folder that train wrote"
        ) from error
    version, recorded = description.get("format_version"), description.pop("description_sha256", None)
    if type(version) is not int or version != FORMAT_VERSION:
        problem = f"format version {version!r}"
        raise VerificationError(str(path), problem, allowed=str(FORMAT_VERSION), fix="Upgrade mirrortune")
    if recorded != _digest(description):
        raise VerificationError(
            str(path),
            "damaged or edited: its content does not match its own hash",
            fix="Restore the adapter folder; a base that has moved is named with --model",
        )
    shared, layers = description.pop("layers_share", {}), description.get("layers")
    if not (isinstance(layers, dict) and all(isinstance(part, dict) for part in (shared, *layers.values()))):
        raise VerificationError(str(path), "damaged (its layers are not objects)", fix="Restore the adapter folder")
    return {**description, "layers": {name: {**shared, **own} for name, own in layers.items()}}


def read_file(path: Path) -> bytes:
    """Return the content of one of an adapter's files.

    Raises:
        VerificationError: the file is missing, not a regular file (a pipe, a device), or too large for memory.
    """
    try:
        if not path.is_file():
            raise OSError
        return path.read_bytes()
    except (OSError, MemoryError) as error:
        raise VerificationError(str(path), "missing or unreadable", fix="Restore the adapter folder") from error


def strict_json(data: bytes) -> Any:
    """Parse JSON, rejecting repeated keys and non-finite numbers.

    Raises:
        ValueError: the text is not such JSON.
    """
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=_without_twins, parse_constant=_finite, parse_float=_finite
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is repeated in one object")
    return found


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not a number")
    return value


def _digest(description: dict[str, Any]) -> str:
    """Return the SHA-256 of the content, independent of the layout of the text."""
    plain = json.loads(json.dumps(description))  # as it will be read: tuples become lists, keys become text
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
