# SPDX-License-Identifier: Apache-2.0
"""Compare two checkpoints matrix by matrix, on several threads with one matrix each in memory."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mirrortune.analyze.matrices import Matrix, Pairing, pair_matrices
from mirrortune.analyze.spectra.spectra import compare_matrices
from mirrortune.analyze.spectra.summary import Analysed, Curve, MatrixGroup, by, changed, curves, name_kinds, summarise
from mirrortune.analyze.spectra.verdict import Claim, claims, verdict
from mirrortune.analyze.weights import Weights
from mirrortune.errors import ResourceError

# Peak number of float64 copies of a matrix, including LAPACK's workspace; measured on square matrices.
_COPIES = 16
# Most names listed of tensors that were not compared.
_LISTED_NAMES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """The differences between two checkpoints.

    Attributes:
        base, tuned: as named by the user.
        matrices: every matrix, in the base's order.
        overall: summary of all matrices; ``by_kind`` and ``by_depth`` of groups.
        curves: what each method could have captured.
        claims: published findings, tested.
        verdict: sentences.
        num_weights: number of weights in the matrices that changed.
        base_only, tuned_only, resized: names of tensors that were not compared.
        seconds: in all; ``matrix_seconds`` of each matrix, by name, on its thread.
        threads: number of threads.
        top_k: largest number of directions that count as the top.
    """

    base: str
    tuned: str
    matrices: list[Analysed]
    overall: MatrixGroup
    by_kind: dict[str, MatrixGroup]
    by_depth: dict[str, MatrixGroup]
    curves: dict[str, Curve]
    claims: list[Claim]
    verdict: list[str]
    num_weights: int
    base_only: list[str]
    tuned_only: list[str]
    resized: list[str]
    seconds: float
    matrix_seconds: dict[str, float]
    threads: int
    top_k: int

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON data: numbers to six digits, None for NaN and infinities."""
        found = _plain(asdict(self))
        assert isinstance(found, dict)
        return found


_Result = tuple[Analysed, float, float]


def analyse(
    base: Weights,
    tuned: Weights,
    *,
    pattern: str = "all-linear",
    top_k: int = 16,
    threads: int | None = None,
    show_bar: Callable[[str, int], Any],
) -> Analysis:
    """Compare every matrix that two checkpoints share.

    Args:
        base: the weights before fine-tuning.
        tuned: the weights after it.
        pattern: chooses layers, as for ``--target-modules``.
        top_k: how many leading directions count as the top, at most a quarter of a matrix's.
        threads: matrices at a time; None for one for each core, as far as memory allows.
        show_bar: (label, total) -> a context manager with ``advance``, for a progress bar.

    Raises:
        ConfigError: the checkpoints are of different architectures.
        DataError: a weight holds NaN or infinities.
        ResourceError: a matrix does not fit into memory.
    """
    started = time.perf_counter()
    pairing = pair_matrices(base, tuned, pattern)
    kinds = name_kinds(m.name for m in pairing.matrices)
    count = threads or _threads_that_fit(pairing.matrices)

    def one(matrix: Matrix) -> _Result:
        begun = time.perf_counter()
        try:
            before, after = matrix.read(base, matrix.base), matrix.read(tuned, matrix.tuned)
            energy = float(before.double().square().sum())
            comparison = compare_matrices(before, after, top_k=top_k, name=matrix.name)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            shape = " x ".join(map(str, matrix.shape))
            raise ResourceError(matrix.name, f"{shape} does not fit into memory", fix="Use --threads 1") from error
        kind, depth = kinds[matrix.name]
        found = Analysed(name=matrix.name, kind=kind, depth=depth, shape=matrix.shape, comparison=comparison,
                         angles=tuned.angles(matrix.tuned))  # fmt: skip
        return found, energy, time.perf_counter() - begun

    matrices, energies, seconds = [], {}, {}
    with show_bar("matrices compared", len(pairing.matrices)) as bar:
        for found, energy, taken in _in_threads(one, pairing.matrices, count):
            matrices.append(found)
            energies[found.name], seconds[found.name] = energy, taken
            bar.advance(found.name)
    return _collect(base, tuned, pairing, matrices, energies, seconds, count, top_k, time.perf_counter() - started)


def _collect(
    base: Weights,
    tuned: Weights,
    pairing: Pairing,
    matrices: list[Analysed],
    energies: dict[str, float],
    seconds: dict[str, float],
    threads: int,
    top_k: int,
    total_seconds: float,
) -> Analysis:
    found = changed(matrices)
    overall, methods = summarise(matrices, energies), curves(found)
    num_weights = sum(math.prod(c.shape) for c in found)
    depths = by(matrices, lambda m: "outside" if m.depth is None else str(m.depth))
    return Analysis(
        base=base.label,
        tuned=tuned.label,
        matrices=matrices,
        overall=overall,
        by_kind={k: summarise(part, energies) for k, part in by(matrices, lambda m: m.kind).items()},
        by_depth={d: summarise(part, energies) for d, part in depths.items()},
        curves=methods,
        claims=claims(found),
        verdict=verdict(overall, found, methods, num_weights),
        num_weights=num_weights,
        base_only=pairing.base_only[:_LISTED_NAMES],
        tuned_only=pairing.tuned_only[:_LISTED_NAMES],
        resized=pairing.resized[:_LISTED_NAMES],
        seconds=total_seconds,
        matrix_seconds=seconds,
        threads=threads,
        top_k=top_k,
    )


def _in_threads(work: Callable[[Matrix], _Result], items: list[Matrix], count: int) -> Iterator[_Result]:
    """Yield results in order; each thread uses one core, since decompositions of one matrix scale badly over cores."""
    if count == 1:
        yield from map(work, items)
        return
    with _one_core_each(), ThreadPoolExecutor(count) as pool:
        try:
            yield from pool.map(work, items)
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _one_core_each() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _threads_that_fit(matrices: list[Matrix]) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    largest = max(math.prod(m.shape) for m in matrices) * 8 * _COPIES
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # macOS and Windows do not tell
        free = 4 * 2**30
    return max(1, min(cores, len(matrices), int(0.8 * free) // largest))


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value
