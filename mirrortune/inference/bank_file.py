# SPDX-License-Identifier: Apache-2.0
"""Store many adapters in one safetensors file, or in a folder each, and read each when it is needed.

The file holds the tensors of all ``adapter.safetensors``, each distinct tensor once (``t0``, ``t1``, ...). Its metadata
holds JSON under ``mirrortune_bank``: ``version``; ``tensors``, the SHA-256 of each; ``descriptions``, the distinct
contents of ``adapter.json``; ``adapters``, with the index of the ``description``, the ``own`` fields and the
``tensors`` of each by name; and ``sha256`` of all of this. Adapters are checked like those from a folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mirrortune.adapters.files.adapter_file import AdapterFile, parse_adapter, read_adapter
from mirrortune.adapters.files.description import strict_json
from mirrortune.adapters.fingerprint import weight_digest
from mirrortune.adapters.spec import AdapterSpec
from mirrortune.errors import ConfigError, VerificationError
from mirrortune.inference.bank_entries import Entry
from mirrortune.system.atomic import write_atomically
from mirrortune.system.outputs import check_file

_KEY, _VERSION, _SUFFIX = "mirrortune_bank", 1, ".safetensors"


ReadAdapter = Callable[[], AdapterFile]
"""Reads an adapter of a bank and checks its integrity; raises VerificationError if it is missing or damaged."""


class _BankFile:
    """An open file of adapters; replacing the file later has no effect."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            file: Any = safe_open(path, framework="pt")
            self._file = file
            text = (self._file.metadata() or {}).get(_KEY)
            if text is None:
                raise ConfigError(str(path), "it holds no adapters of a bank", fix="Give what AdapterBank.save wrote")
            self.content = _checked(strict_json(text.encode()))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._damaged(f"{type(error).__name__}: {error}") from error

    def read(self, name: str) -> AdapterFile:
        own = self.content["adapters"][name]
        description = {**self.content["descriptions"][own["description"]], **own["own"]}

        def tensors_of(_: AdapterSpec) -> tuple[dict[str, Tensor], None]:
            return {key: self._tensor(stored) for key, stored in own["tensors"].items()}, None

        return parse_adapter(self.path, description, tensors_of)

    def _tensor(self, stored: str) -> Tensor:
        try:
            tensor: Tensor = self._file.get_tensor(stored)
        except SafetensorError as error:
            raise self._damaged(str(error)) from error
        if weight_digest(tensor) != self.content["tensors"][stored]:
            raise self._damaged(f"tensor '{stored}' has another hash")
        return tensor

    def _damaged(self, problem: str) -> VerificationError:
        return VerificationError(str(self.path), f"damaged ({problem})", fix="Save the bank again")


def open_bank(path: Path) -> Mapping[str, ReadAdapter]:
    """Return the functions that read the adapters of a file, or of a folder of adapter folders or runs, by name.

    Raises:
        ConfigError: there is no adapter.
        VerificationError: the file is damaged or has a newer version.
    """
    if path.is_dir():
        found = {name: partial(read_adapter, folder) for name, folder in adapter_folders(path).items()}
    elif path.is_file():
        file = _BankFile(path)
        found = {name: partial(file.read, name) for name in file.content["adapters"]}
    else:
        found = {}
    if not found:
        raise ConfigError(str(path), "no adapters are there", allowed="a file of AdapterBank.save, or a folder that "
                          "holds a folder for each adapter")  # fmt: skip
    return found


def adapter_folders(path: Path) -> dict[str, Path]:
    """Return the adapter folders of a bank by name: the folders in ``path`` that are one, or contain one as runs do."""
    found = {own.name: (own, own / "adapter") for own in sorted(path.iterdir()) if own.is_dir()}
    return {
        name: folder
        for name, places in found.items()
        if (folder := next((place for place in places if (place / "adapter.json").is_file()), None)) is not None
    }


def save_bank(path: Path, entries: Mapping[str, Entry]) -> None:
    """Write adapters into one file; see :meth:`mirrortune.AdapterBank.save`."""
    if path.suffix != _SUFFIX:
        raise ConfigError("save", f"'{path}' is not the name of a bank", allowed=f"a name that ends in {_SUFFIX}")
    check_file(path, [], "save")
    if path.exists() and not _is_bank(path):
        raise ConfigError("save", f"{path} was not written by AdapterBank.save", fix="Give another name")
    tensors: dict[str, Tensor] = {}
    digests: dict[str, str] = {}  # SHA-256 -> name in the file
    descriptions: dict[str, int] = {}
    factors: dict[Any, dict[str, str]] = {}
    adapters: dict[str, Any] = {}

    def put(tensor: Tensor) -> str:
        digest = weight_digest(tensor)
        if digest not in digests:
            digests[digest] = f"t{len(digests)}"
            tensors[digests[digest]] = tensor.detach().cpu().contiguous()
        return digests[digest]

    for name, entry in entries.items():
        text = json.dumps({**entry.structure.description, "layers": _layers(entry)})  # keeps the order of the layers
        names = {key: put(tensor) for key, tensor in _contents(entry).items()}
        if entry.portable:
            key = entry.structure
            if key not in factors:
                factors[key] = {name: put(tensor) for name, tensor in _factors(entry).items()}
            names |= factors[key]
        number = descriptions.setdefault(text, len(descriptions))
        adapters[name] = {"description": number, "own": json.loads(entry.own), "tensors": names}
    content = {
        "version": _VERSION,
        "tensors": {name: digest for digest, name in digests.items()},
        "descriptions": [json.loads(text) for text in descriptions],
        "adapters": adapters,
    }
    metadata = {_KEY: json.dumps({**content, "sha256": _digest(content)})}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def _is_bank(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return _KEY in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def _checked(content: Any) -> dict[str, Any]:
    """Return the file's description; raise ValueError, KeyError or TypeError if it is invalid."""
    recorded = content.pop("sha256")
    if content["version"] != _VERSION:
        raise ValueError(f"version {content['version']!r}, upgrade mirrortune")
    if recorded != _digest(content):
        raise ValueError("its description has another hash")
    stored = {*content["tensors"]}
    for name, own in content["adapters"].items():
        texts = [name, *own["tensors"], *own["tensors"].values()]
        if not all(isinstance(text, str) and text for text in texts) or type(own["description"]) is not int:
            raise ValueError(f"adapter '{name}'")
        if not 0 <= own["description"] < len(content["descriptions"]) or not stored.issuperset(own["tensors"].values()):
            raise ValueError(f"adapter '{name}'")
        if not isinstance(own["own"], dict) or not own["own"].keys() <= {"base", "task", "max_length"}:
            raise ValueError(f"adapter '{name}'")
    return dict(content)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _layers(entry: Entry) -> dict[str, Any]:
    """Return the description of the layers, with the entries of each in the packed pairs."""
    found = {}
    for name, layer in entry.structure.description["layers"].items():
        pairs = entry.pairs.get(name)
        kind = {} if pairs is None else {"partners" if pairs.dim() == 1 else "pairs": list(pairs.shape)}
        found[name] = {**layer, "holds": {**layer["holds"], **kind}}
    return found


def _contents(entry: Entry) -> dict[str, Tensor]:
    """Return the tensors of an adapter's file without factors."""
    packed: dict[str, list[Tensor]] = {}
    for name in entry.structure.parts:
        pairs = entry.pairs.get(name)
        if pairs is not None:
            packed.setdefault("partners" if pairs.dim() == 1 else "pairs", []).append(pairs.reshape(-1))
    # If one layer has so many directions that its pairs need 32 bits, those of all layers are stored in 32 bits.
    widest = {key: max((t.dtype for t in own), key=lambda d: d.itemsize) for key, own in packed.items()}
    return {**entry.tensors, **{key: torch.cat([t.to(widest[key]) for t in own]) for key, own in packed.items()}}


def _factors(entry: Entry) -> dict[str, Tensor]:
    """Return the factors of a portable adapter in the basis it was trained in."""
    found: dict[str, Tensor] = {}
    for name, part in entry.structure.parts.items():
        held = part.basis.held.leading(part.rank)
        signs = torch.ones(part.rank) if part.signs is None else part.signs
        signs = signs.to(held.U)
        own = {"U": held.U * signs, "S": held.S, "Vh": held.Vh * signs[:, None]}
        found |= {f"factor.{name}.{key}": tensor for key, tensor in own.items()}
    return found
