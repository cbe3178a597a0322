# SPDX-License-Identifier: Apache-2.0
"""Compare two checkpoints matrix by matrix, on several threads with one matrix each in memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mirrortune.analyze.matrices import Matrix, Pairing, pair_matrices
from mirrortune.analyze.spectra.spectra import compare_matrices
from mirrortune.analyze.spectra.summary import Analysed, Curve, MatrixGroup, by, changed, curves, name_kinds, summarise
from mirrortune.analyze.spectra.verdict import Claim, claims, verdict
from mirrortune.analyze.weights import Weights
from mirrortune.errors import ResourceError
from mirrortune.system.devices import num_cores

# Peak memory in float64 copies of a matrix, including LAPACK's workspace; measured on square matrices.
_COPIES = 16
# Maximum number of names in a list of tensors that were not compared.
_LISTED_NAMES = 20
# Smallest share of rounding in a change that is mentioned.
_LEAST_ROUNDING = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """The differences between two checkpoints.

    Attributes:
        base, tuned: names of the checkpoints as given by the user.
        matrices: all matrices, in the order of the base.
        overall: summary of all matrices.
        by_kind, by_depth: summaries of groups of matrices; depths ascend, and ``outside`` comes last.
        curves: share of the change that each method could have captured.
        claims: published findings, tested on these checkpoints.
        verdict: conclusions as sentences.
        num_weights: number of weights in the matrices that changed.
        base_only, tuned_only, resized: names of tensors that were not compared; see :class:`Pairing`.
        seconds: total time.
        matrix_seconds: time for each matrix on its thread, by name.
        threads: number of threads.
        top_k: maximum number of leading directions that count as the top.
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
        """Convert to JSON data, with numbers rounded to six digits and None for NaN and infinities."""
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
        base: weights before fine-tuning.
        tuned: weights after fine-tuning.
        pattern: regular expression that selects layers, as in ``--target-modules``.
        top_k: number of leading directions that count as the top, limited to a quarter of each matrix's directions.
        threads: number of matrices at a time; None for one per core, as far as memory allows.
        show_bar: function (label, total) that returns a progress bar: a context manager with ``advance``.

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
            rounded = _rounded(before, after)
            is_same = torch.equal(rounded.to(after.dtype), after)
            comparison = None if is_same else compare_matrices(before, after, top_k=top_k, name=matrix.name)
            rounding = float((rounded.double() - before.double()).square().sum())
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            shape = " x ".join(map(str, matrix.shape))
            raise ResourceError(matrix.name, f"{shape} does not fit into memory", fix="Use --threads 1") from error
        kind, depth = kinds[matrix.name]
        found = Analysed(name=matrix.name, kind=kind, depth=depth, shape=matrix.shape, comparison=comparison,
                         angles=tuned.angles(matrix.tuned), rounding=rounding)  # fmt: skip
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
    # Safetensors headers are sorted by name, so layer 10 precedes layer 2 in them.
    layered = sorted(matrices, key=lambda m: math.inf if m.depth is None else m.depth)
    depths = by(layered, lambda m: "outside" if m.depth is None else str(m.depth))
    return Analysis(
        base=base.label,
        tuned=tuned.label,
        matrices=matrices,
        overall=overall,
        by_kind={k: summarise(part, energies) for k, part in by(matrices, lambda m: m.kind).items()},
        by_depth={d: summarise(part, energies) for d, part in depths.items()},
        curves=methods,
        claims=claims(found),
        verdict=verdict(overall, found, methods, num_weights) + _of_rounding(tuned.label, matrices),
        num_weights=num_weights,
        base_only=pairing.base_only[:_LISTED_NAMES],
        tuned_only=pairing.tuned_only[:_LISTED_NAMES],
        resized=pairing.resized[:_LISTED_NAMES],
        seconds=total_seconds,
        matrix_seconds=seconds,
        threads=threads,
        top_k=top_k,
    )


def _rounded(before: Tensor, after: Tensor) -> Tensor:
    """Return a weight of the base as the tuned checkpoint would store it: rounded if its dtype is less precise."""
    is_coarser = torch.finfo(after.dtype).eps > torch.finfo(before.dtype).eps
    return before.to(after.dtype) if is_coarser else before


def _of_rounding(label: str, matrices: list[Analysed]) -> list[str]:
    """Return the sentence about a change that is partly the rounding of the tuned checkpoint, if there is any."""
    rounding = sum(m.rounding for m in matrices)
    total = sum(m.comparison.energy if m.comparison else m.rounding for m in matrices)
    share = rounding / total if total else 0.0
    if share < _LEAST_ROUNDING:
        return []
    return [f"{label} stores fewer bits than the base: its rounding is {min(1.0, share):.0%} of the difference."]


def _in_threads(work: Callable[[Matrix], _Result], items: list[Matrix], count: int) -> Iterator[_Result]:
    """Yield results in order; each thread uses one core, because decomposing a matrix scales badly over cores."""
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
    import psutil  # noqa: PLC0415

    largest = max(math.prod(m.shape) for m in matrices) * 8 * _COPIES
    return max(1, min(num_cores(), len(matrices), int(0.8 * psutil.virtual_memory().available) // largest))


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value
