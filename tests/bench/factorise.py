# SPDX-License-Identifier: Apache-2.0
"""Ways to factorise the 72 matrices of a BERT-base in float64: how long each takes, and how exact it is.

    python -m tests.bench.factorise -o tests/bench/results/factorise-cpu [--repeats 3] [--side-by-side 8]

    gesdd             LAPACK's divide and conquer, what ``decompositions.full`` calls
    QR and gesdd      of the triangle (768 x 768) of a QR decomposition of the long side
    Gram              eigenvectors of the small Gram matrix, and a QR decomposition that makes the other side orthogonal
    Gram and gesdd    the same, and gesdd of what is left of the triangle besides its diagonal

Time is processor time of one thread, medians. Exactness is the largest over random matrices and ill-conditioned ones
(singular values from 1 to 1e-12): ||W - U S Vh|| / ||W|| and the largest entry of U^T U - I and Vh Vh^T - I. Then some
square ones are factorised by the time on the clock: one after another with LAPACK's threads, and side by side with one
thread each, as ``factor_cache.py`` does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.bench.methods import hardware
from tests.bench.output import write_and_print

SHAPES = {(768, 768): 48, (3072, 768): 24}  # and as many of the wide ones as of the tall, which cost the same
Triplets = tuple[Tensor, Tensor, Tensor]


def gesdd(W: Tensor) -> Triplets:
    """LAPACK's."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U, S, Vh


def qr_and_gesdd(W: Tensor) -> Triplets:
    """Through the triangle."""
    Q, R = torch.linalg.qr(W)
    U, S, Vh = gesdd(R)
    return Q @ U, S, Vh


def gram(W: Tensor) -> Triplets:
    """Through the eigenvectors of W^T W."""
    V = torch.linalg.eigh(W.T @ W).eigenvectors.flip(1)
    Q, R = torch.linalg.qr(W @ V)
    return Q * R.diagonal().sign(), R.diagonal().abs(), V.T


def gram_and_gesdd(W: Tensor) -> Triplets:
    """The same with a decomposition of the nearly diagonal triangle."""
    V = torch.linalg.eigh(W.T @ W).eigenvectors.flip(1)
    Q, R = torch.linalg.qr(W @ V)
    U, S, Vh = gesdd(R)
    return Q @ U, S, Vh @ V.T


WAYS: dict[str, Callable[[Tensor], Triplets]] = {
    "gesdd": gesdd, "QR and gesdd": qr_and_gesdd, "Gram": gram, "Gram and gesdd": gram_and_gesdd,
}  # fmt: skip


def matrices(shape: tuple[int, int], seed: int) -> dict[str, Tensor]:
    """A random matrix as a layer has it, and one with singular values from 1 to 1e-12."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(drawn, full_matrices=False)
    return {"random": drawn * 0.02, "ill-conditioned": U * torch.logspace(0, -12, min(shape), dtype=torch.float64) @ Vh}


def errors(W: Tensor, found: Triplets) -> tuple[float, float]:
    """Relative residual, and distance from orthogonality."""
    U, S, Vh = found
    identity = torch.eye(len(S), dtype=W.dtype)
    apart = max(float((U.T @ U - identity).abs().max()), float((Vh @ Vh.T - identity).abs().max()))
    return float((W - U * S @ Vh).norm() / W.norm()), apart


def side_by_side(count: int, cores: int) -> dict[str, float]:
    """Seconds on the clock for ``count`` square matrices in either way; turns, best of two."""
    given = [matrices((768, 768), seed)["random"] for seed in range(count)]
    found: dict[str, list[float]] = {"one after another": [], "side by side": []}
    for _ in range(2):
        for way, times in found.items():
            is_parallel = way == "side by side"
            torch.set_num_threads(1 if is_parallel else cores)
            started = time.perf_counter()
            with ThreadPoolExecutor(cores if is_parallel else 1) as pool:
                list(pool.map(gesdd, given))
            times.append(time.perf_counter() - started)
    return {way: min(times) for way, times in found.items()}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {way: {"seconds": {}, "residual": 0.0, "orthogonality": 0.0} for way in WAYS}
    for shape in SHAPES:
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for seed in range(options.repeats):
            for W in matrices(shape, seed).values():
                for way, make in WAYS.items():
                    started = time.process_time()
                    triplets = make(W)
                    times[way].append(time.process_time() - started)
                    residual, apart = errors(W, triplets)
                    found[way]["residual"] = max(found[way]["residual"], residual)
                    found[way]["orthogonality"] = max(found[way]["orthogonality"], apart)
        for way, own in times.items():
            found[way]["seconds"]["x".join(map(str, shape))] = statistics.median(own)
    for row in found.values():
        row["all"] = sum(SHAPES[shape] * row["seconds"]["x".join(map(str, shape))] for shape in SHAPES)
    clock = side_by_side(options.side_by_side, cores) if options.side_by_side else {}
    return {"ways": found, "clock": clock, "count": options.side_by_side, "cores": cores, "load": os.getloadavg()[0]}


def table(found: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = ["| way | 768 x 768 | 768 x 3,072 | all 72 | residual | orthogonality |", "|" + "---|" * 6]
    for way, row in found["ways"].items():
        square, tall = row["seconds"].values()
        lines.append(
            f"| {way} | {square:.3f} s | {tall:.3f} s | {row['all']:.1f} s | {row['residual']:.0e} | "
            f"{row['orthogonality']:.0e} |"
        )
    lines += ["", "Processor seconds of one thread. Asked for: a residual of 1e-12, orthogonality of 1e-8."]
    if found["clock"]:
        lines.append(
            f"On the clock, {found['count']} of 768 x 768 on {found['cores']} cores (load {found['load']:.1f}): "
            + ", ".join(f"{way} {seconds:.2f} s" for way, seconds in found["clock"].items())
            + "."
        )
    return "\n".join([*lines, f"{hardware('cpu')}; torch {torch.__version__}."]) + "\n"


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side-by-side", type=int, default=8, help="matrices that are timed by the clock; 0 for none")
    options = parser.parse_args()
    found = measure(options)
    write_and_print(options.output, found, table(found))


if __name__ == "__main__":
    main()
