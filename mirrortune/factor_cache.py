# SPDX-License-Identifier: Apache-2.0
"""Factors on disk, addressed by the content of the weight: a second run on the same model factorises nothing.

One file for each (weight bytes, dtype, rank, algorithm version), shared by every run, recipe and model that holds that
weight. U and Vh are stored in float32 (the precision in which cores are trained; float64 for float64 weights), S in
float64.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mirrortune.adapters.basis import weight_digest
from mirrortune.adapters.factorize import FACTORIZE_VERSION, Factors, factorize
from mirrortune.atomic import write_atomically
from mirrortune.locations import cache_folder


@dataclass(slots=True)
class FactorCache:
    """A source of factors that remembers, for :func:`mirrortune.adapters.inject.attach`.

    Attributes:
        on_layer: called with the layer's name after each matrix, for progress.
        hits, misses: matrices read, matrices factorised.
        seconds: time spent on both.
    """

    on_layer: Callable[[str], None] | None = None
    hits: int = 0
    misses: int = 0
    seconds: float = 0.0
    folder: Path = field(default_factory=lambda: cache_folder() / "factors")

    def __call__(self, name: str, weight: Tensor, rank: int) -> Factors:
        """Factors of ``weight`` (O, I) with ``rank`` directions: float64 S; U and Vh as stored, cast to float64."""
        started = time.perf_counter()
        key = hashlib.sha256(f"{weight_digest(weight)}:{rank}:{FACTORIZE_VERSION}".encode()).hexdigest()
        path = self.folder / key[:2] / f"{key}.safetensors"
        factors = _read(path, key)
        if factors is None:
            self.misses += 1
            factors = _rounded(factorize(weight, rank, name=name), weight)
            stored = {"U": factors.U.cpu(), "S": factors.S.cpu(), "Vh": factors.Vh.cpu()}
            metadata = {"key": key, "sha256": _digest(factors)}
            write_atomically(path, lambda p: save_file(stored, p, metadata), optional=True)
        else:
            self.hits += 1
        self.seconds += time.perf_counter() - started
        if self.on_layer:
            self.on_layer(name)
        return Factors(U=factors.U.double(), S=factors.S.double(), Vh=factors.Vh.double())


def _rounded(factors: Factors, weight: Tensor) -> Factors:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return Factors(U=factors.U.to(dtype).contiguous(), S=factors.S.contiguous(), Vh=factors.Vh.to(dtype).contiguous())


def _read(path: Path, key: str) -> Factors | None:
    """The cached factors, or None when the file is absent, damaged (a crash can leave zeros) or another entry's."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            factors = Factors(U=file.get_tensor("U"), S=file.get_tensor("S"), Vh=file.get_tensor("Vh"))
    except (OSError, SafetensorError):
        return None
    is_whole = metadata.get("key") == key and metadata.get("sha256") == _digest(factors)
    return factors if is_whole else None


def _digest(factors: Factors) -> str:
    return hashlib.sha256("".join(map(weight_digest, (factors.U, factors.S, factors.Vh))).encode()).hexdigest()
