# SPDX-License-Identifier: Apache-2.0
"""Cache factors on disk by the content of the weight, so that a second run on a model computes no decomposition.

There is one file per combination of weight bytes, dtype, rank and algorithm version, shared by all runs, recipes and
models with that weight. U and Vh are stored in float32, the precision in which cores are trained (or in float64 for
float64 weights), and S in float64.
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mirrortune.adapters.fingerprint import weight_digest
from mirrortune.adapters.svd import FACTORIZE_VERSION, Factors, are_leading_triplets, factorize
from mirrortune.system.atomic import alone_with, write_atomically
from mirrortune.system.paths import cache_folder, is_safe_entry

# Matrices whose smaller side is below this are factorised on the CPU, since a GPU gains nothing.
_SMALLEST_SIDE = 1024
# Bytes for matrices that are factorised in parallel, and number of float64 copies of a matrix that LAPACK needs.
_MEMORY, _COPIES = 1 << 30, 6


@dataclass(slots=True)
class FactorCache:
    """A cached source of factors, for :func:`mirrortune.adapters.inject.attach`.

    Attributes:
        on_layer: called with the name of the layer after each matrix, to show progress.
        on_remark: called with a line for every matrix that needed a fallback algorithm; None to issue warnings.
        hits: number of matrices read from the cache.
        misses: number of matrices factorised.
        seconds: time spent on both.
        folder: folder of the cache.
        device: device for large matrices, such as a GPU (``devices.factorising_device``); None for the CPU.
    """

    on_layer: Callable[[str], None] | None = None
    on_remark: Callable[[str], None] | None = None
    hits: int = 0
    misses: int = 0
    seconds: float = 0.0
    folder: Path = field(default_factory=lambda: cache_folder() / "factors")
    device: torch.device | None = None
    _counting: threading.Lock = field(default_factory=threading.Lock)
    _computing: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, name: str, weight: Tensor, rank: int) -> Factors:
        """Return ``rank`` directions of the factors of ``weight`` (O, I), in float64 but U and Vh rounded as stored."""
        started = time.perf_counter()
        key, path = self._place(weight, rank)
        before, factors = self.misses, self._read(path, key, weight)
        if factors is None:
            if self.on_remark is not None and not is_safe_entry(path):
                self.on_remark(f"{path} is not used: it is a link, or another user's that others may write")
            with alone_with(path), self._reporting():  # another process may be computing the same factors
                factors = self._read(path, key, weight) or self._make(name, weight, rank, key, path)
        self.hits += self.misses == before
        self.seconds += time.perf_counter() - started
        if self.on_layer:
            self.on_layer(name)
        return Factors(U=factors.U.double(), S=factors.S.double(), Vh=factors.Vh.double())

    def share(
        self,
        layers: Sequence[tuple[str, Callable[[], Tensor], int]],
        index: int,
        count: int,
        *,
        largest: int = 0,
        room: int = _MEMORY,
    ) -> None:
        """Factorise missing ``layers``, given as (name, matrix, rank), together with the other processes of a run.

        Each process starts at a different layer and skips layers that another process is computing. These may still be
        missing at the end; :meth:`__call__` waits for them. Matrices are factorised in parallel as far as cores and
        memory allow, since LAPACK's threads gain little from a second core (``tests/bench/factorise.py``).

        Args:
            layers: layers, the same on every process.
            index: index of this process.
            count: number of processes.
            largest: number of elements of the largest matrix, if known.
            room: memory in bytes for matrices in parallel; one matrix at a time is always allowed.
        """
        begin = index * len(layers) // count
        started = time.perf_counter()
        with (
            self._reporting(),
            _divided_cores(min(_MEMORY, room) // (_COPIES * 8 * max(1, largest))) as workers,
            ThreadPoolExecutor(workers) as pool,
        ):
            for name in pool.map(self._fill, [*layers[begin:], *layers[:begin]]):
                if self.on_layer:
                    self.on_layer(name)
        self.seconds += time.perf_counter() - started

    def _read(self, path: Path, key: str, weight: Tensor) -> Factors | None:
        """Return the cached factors of ``weight``, or None if there are none."""
        found = _read(path, key) if is_safe_entry(path) else None
        return found if found is not None and are_leading_triplets(found, weight) else None

    def _fill(self, layer: tuple[str, Callable[[], Tensor], int]) -> str:
        """Create an entry if it is missing and no other process is creating it; return the name of the layer."""
        name, matrix, rank = layer
        weight = matrix()
        key, path = self._place(weight, rank)
        if not path.exists():
            with alone_with(path, wait=False) as is_ours:
                if is_ours and not path.exists():
                    self._make(name, weight, rank, key, path)
        return name

    def _make(self, name: str, weight: Tensor, rank: int, key: str, path: Path) -> Factors:
        with self._counting:
            self.misses += 1
        with self._place_to_compute(weight) as device:
            factors = _rounded(factorize(weight, rank, name=name, device=device), weight)
        stored = {"U": factors.U.cpu(), "S": factors.S.cpu(), "Vh": factors.Vh.cpu()}
        metadata = {"key": key, "sha256": _digest(factors)}
        write_atomically(path, lambda p: save_file(stored, p, metadata), optional=True)
        return factors

    @contextmanager
    def _place_to_compute(self, weight: Tensor) -> Iterator[torch.device | None]:
        """Reserve the device for one weight; yield None for a small weight or if memory is short."""
        device = self.device
        if device is None or min(weight.shape[-2:]) < _SMALLEST_SIDE:
            yield None
            return
        with self._computing:
            needed = _COPIES * 8 * math.prod(weight.shape[-2:])
            has_room = device.type != "cuda" or torch.cuda.mem_get_info(device)[0] >= needed
            yield device if has_room else None

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Pass warnings of decompositions (in any thread) to ``on_remark``."""
        with warnings.catch_warnings(record=self.on_remark is not None) as said:
            if self.on_remark is not None:
                warnings.simplefilter("always", RuntimeWarning)
            yield
        for warning in said or ():
            if self.on_remark is not None and issubclass(warning.category, RuntimeWarning):
                self.on_remark(str(warning.message))
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)

    def _place(self, weight: Tensor, rank: int) -> tuple[str, Path]:
        """Return the key and the file of an entry."""
        key = hashlib.sha256(f"{weight_digest(weight)}:{rank}:{FACTORIZE_VERSION}".encode()).hexdigest()
        return key, self.folder / key[:2] / f"{key}.safetensors"


@contextmanager
def _divided_cores(most: int) -> Iterator[int]:
    """Yield the number of worker threads, at most ``most``, among which torch's cores are divided during the block."""
    cores = torch.get_num_threads()
    workers = max(1, min(cores, most))
    torch.set_num_threads(cores // workers)
    try:
        yield workers
    finally:
        torch.set_num_threads(cores)


def _rounded(factors: Factors, weight: Tensor) -> Factors:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return Factors(U=factors.U.to(dtype).contiguous(), S=factors.S.contiguous(), Vh=factors.Vh.to(dtype).contiguous())


def _read(path: Path, key: str) -> Factors | None:
    """Return the factors in a file, or None if it is missing, damaged (a crash can leave zeros) or another entry."""
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
