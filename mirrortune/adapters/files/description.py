# SPDX-License-Identifier: Apache-2.0
"""The text of ``adapter.json``: written, read, checked, and brought from every earlier format to the present one.

Format 1: the first. A layer has ``shape``, ``probe_seed`` and ``weight_sha256``, the hash of the weight's bytes.
Format 2: a layer has ``layout`` and ``tensors`` (what its weight is in the model), ``probe_seeds`` (one for each matrix
of a stack), ``clusters``, ``weight`` (the hash of its numbers, whatever their dtype), ``dtype``; the file has ``form``
and probes of every layer's effect.
Format 3: plane rotations may count in other units than angles.
Format 4: what most layers say alike is said once, in ``layers_share``; tensors of all layers are one behind the other,
and a layer's ``holds`` says what of them is its own (``adapter_packing.py``); signs stand in the place of sketches.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mirrortune.adapters.files.validate import read_file, strict_json
from mirrortune.errors import VerificationError

FORMAT_VERSION = 4
DESCRIPTION = "adapter.json"
_LARGEST_DESCRIPTION = 64 * 2**20  # bytes; lists of pairs are tensors, so that nothing in it is long


def description_text(description: dict[str, Any]) -> str:
    """The file's text, with the hash of what it says: a key a line, a layer a line."""
    shared, layers = _split_shared(description["layers"])
    short = {**{k: v for k, v in description.items() if k != "layers"}, "layers_share": shared, "layers": layers}
    return _laid_out(short)


def edited_text(text: str, edit: Callable[[dict[str, Any]], object]) -> str:
    """The text of a description, of any format, after ``edit`` has changed what it says, with its hash made again."""
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
    """What most layers say of each key that all have, where some agree; and what every layer says otherwise."""
    plain: dict[str, dict[str, Any]] = json.loads(json.dumps(layers))  # tuples are lists, as a reader will find them
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
    """What ``adapter.json`` in ``folder`` says, in the present format.

    Raises:
        VerificationError: missing, damaged, edited, or of a newer format.
    """
    path = folder / DESCRIPTION
    try:
        if path.stat().st_size > _LARGEST_DESCRIPTION:
            raise VerificationError(str(path), f"{path.stat().st_size:,} bytes", allowed=f"{_LARGEST_DESCRIPTION:,}")
        description = strict_json(read_file(path))
        version, recorded = description["format_version"], description.pop("description_sha256", None)
        is_whole = recorded == _digest(description)
        shared = description.pop("layers_share", {})
        if shared:
            description["layers"] = {name: {**shared, **own} for name, own in description["layers"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise VerificationError(
            str(path), f"missing or damaged ({type(error).__name__})", fix="Give the folder that train wrote"
        ) from error
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise VerificationError(
            str(path), f"format version {version!r}", allowed=f"up to {FORMAT_VERSION}", fix="Upgrade mirrortune"
        )
    if not is_whole:
        raise VerificationError(
            str(path),
            "damaged or edited: its own hash is another one",
            fix="Restore the adapter folder; a base that has moved is named with --model",
        )
    return migrate(description)


def migrate(description: dict[str, Any]) -> dict[str, Any]:
    """A description of any format, in the present one; what is there already is left as it is."""
    found = dict(description)
    if found["format_version"] < 2:
        found["layers"] = {name: _layer_of_format_2(layer) for name, layer in found["layers"].items()}
    if found["format_version"] < 3:
        found["adapter"] = _adapter_of_format_3(found["adapter"])
    return {**found, "format_version": FORMAT_VERSION}


def _layer_of_format_2(layer: dict[str, Any]) -> dict[str, Any]:
    own = dict(layer)
    if "shape" in own:
        shape = own.pop("shape")
        own["layout"] = {"shape": shape, "out_features": shape[0]}
    if "probe_seed" in own:
        own["probe_seeds"] = [own.pop("probe_seed")]
    if "weight_sha256" in own:
        own["weight"] = f"bytes:{own.pop('weight_sha256')}"
    return own


def _adapter_of_format_3(adapter: dict[str, Any]) -> dict[str, Any]:
    """Until then every number of plane rotations was an angle, and the file left out what was a default."""
    if adapter["method"] not in ("mirror", "neighbor", "random", "adaptive", "givens"):
        return adapter
    return {**adapter, "options": {"unit": "angle", **adapter["options"]}}


def _digest(description: dict[str, Any]) -> str:
    """SHA-256 over everything that the file says, however it is laid out."""
    plain = json.loads(json.dumps(description))  # what a reader will find: tuples are lists, keys are text
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
