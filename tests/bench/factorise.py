# SPDX-License-Identifier: Apache-2.0
"""Ways to factorise the 72 matrices of a BERT-base in float64: how long each takes, and how exact it is.

    python -m tests.bench.factorise -o tests/bench/results/factorise-cpu [--repeats 3] [--side-by-side 8] [--whole 72]

    gesdd             LAPACK's divide and conquer, what ``decompositions.full`` calls
    QR and gesdd      of the triangle (768 x 768) of a QR decomposition of the long side
    Gram              eigenvectors of the small Gram matrix, and a QR decomposition that makes the other side orthogonal
    Gram and gesdd    the same, and gesdd of what is left of the triangle besides its diagonal

Time is processor time of one thread, medians. Exactness is the largest over random matrices and ill-conditioned ones
(singular values from 1 to 1e-12): ||W - U S Vh|| / ||W|| and the largest entry of U^T U - I and Vh Vh^T - I. Then some
square ones are factorised by the time on the clock: one after another with LAPACK's threads, and side by side with one
thread each, as ``factor_cache.py`` does. Last, all 72 by ``FactorCache.share`` into an empty cache, by the clock: what
a first run waits for. ``--device cuda`` does the same on a GPU with shapes of an 8B Llama, and puts a square matrix
into a cache by the GPU and by the CPU: whether it is worth it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirrortune.adapters.factor_cache import FactorCache
from tests.bench.contestants import hardware, wait
from tests.bench.output import command_line, write_and_print

# Of a BERT-base, and of an 8B Llama but for its small ones; wide ones are counted as tall, which cost the same.
SHAPES = {"cpu": {(768, 768): 48, (3072, 768): 24}, "cuda": {(4096, 4096): 64, (14336, 4096): 96}}
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
    U = torch.linalg.qr(drawn).Q
    V = torch.linalg.qr(torch.randn(shape[1], shape[1], generator=generator, dtype=torch.float64)).Q
    return {"random": drawn * 0.02, "ill-conditioned": U * torch.logspace(0, -12, min(shape), dtype=torch.float64) @ V}


def errors(W: Tensor, found: Triplets) -> tuple[float, float]:
    """Relative residual, and distance from orthogonality."""
    U, S, Vh = found
    identity = torch.eye(len(S), dtype=W.dtype, device=W.device)
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


def whole(count: int, device: str) -> dict[str, Any]:
    """Seconds on the clock until ``count`` of a model's matrices are in an empty cache, and until they are read."""
    shapes = [shape for shape, number in SHAPES[device].items() for _ in range(number)]
    chosen = shapes[:: max(1, len(shapes) // count)][:count]
    return {"of": len(shapes), **filled(chosen, device)}


def filled(chosen: list[tuple[int, int]], device: str) -> dict[str, Any]:
    """Seconds on the clock until matrices of the ``chosen`` shapes are in an empty cache, and until they are read."""
    weights = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(chosen)]
    layers = [(f"{i}", (lambda w=w: w), min(w.shape)) for i, w in enumerate(weights)]
    with tempfile.TemporaryDirectory() as folder:
        cache = FactorCache(folder=Path(folder), device=torch.device(device) if device != "cpu" else None)
        started = time.perf_counter()
        cache.share(layers, 0, 1, largest=max(w.numel() for w in weights))
        seconds, started = time.perf_counter() - started, time.perf_counter()
        for name, matrix, rank in layers:
            cache(name, matrix(), rank)
        again = time.perf_counter() - started
    return {"count": len(chosen), "seconds": seconds, "again_seconds": again}


def ways(repeats: int, device: str, chosen: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The chosen ways on every shape: seconds, and how exact they are; ``all`` is what the whole model would take."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    found: dict[str, dict[str, Any]] = {way: {"seconds": {}, "residual": 0.0, "orthogonality": 0.0} for way in chosen}
    for shape in SHAPES[device]:
        times: dict[str, list[float]] = {way: [] for way in chosen}
        for seed in range(repeats):
            for W in matrices(shape, seed).values():
                there = W.to(device)
                for way in chosen:
                    wait()
                    started = clock()
                    triplets = WAYS[way](there)
                    wait()
                    times[way].append(clock() - started)
                    residual, apart = errors(there, triplets)
                    found[way]["residual"] = max(found[way]["residual"], residual)
                    found[way]["orthogonality"] = max(found[way]["orthogonality"], apart)
        for way, own in times.items():
            found[way]["seconds"][" x ".join(map(str, shape))] = statistics.median(own)
    for row in found.values():
        row["all"] = sum(n * row["seconds"][" x ".join(map(str, shape))] for shape, n in SHAPES[device].items())
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    found = {"whole": whole(options.whole, options.device), "load": os.getloadavg()[0]}
    if options.device == "cuda":
        square = next(iter(SHAPES["cuda"]))
        clock = {place: filled([square], place)["seconds"] for place in ("cuda", "cpu")}
    else:
        clock = side_by_side(options.side_by_side, cores) if options.side_by_side else {}
        torch.set_num_threads(1)
    count = options.side_by_side if options.device == "cpu" else 1
    found |= {"ways": ways(options.repeats, options.device, options.ways), "clock": clock, "count": count}
    return found | {"cores": cores, "device": options.device, "hardware": hardware(options.device)}


def table(found: dict[str, Any]) -> str:
    """The results in Markdown."""
    done, cores = found["whole"], found["cores"]
    shapes = next(iter(found["ways"].values()))["seconds"]
    lines = [f"| method | {' | '.join(shapes)} | all {done['of']} | residual | orthogonality |"]
    lines.append("|" + "---|" * (4 + len(shapes)))
    for way, row in found["ways"].items():
        each = " | ".join(f"{seconds:.3f} s" for seconds in row["seconds"].values())
        lines.append(f"| {way} | {each} | {row['all']:.1f} s | {row['residual']:.0e} | {row['orthogonality']:.0e} |")
    kind = "CPU seconds of one thread" if found["device"] == "cpu" else "Wall-clock seconds"
    lines += ["", f"{kind}. Required: a residual of 1e-12 and an orthogonality error of 1e-8."]
    if found["clock"]:
        each = ", ".join(f"{way} {seconds:.2f} s" for way, seconds in found["clock"].items())
        shape = " x ".join(map(str, next(iter(shapes))))
        lines.append(f"Wall time of {found['count']} matrices of {shape} on {cores} cores: {each}.")
    lines.append(
        f"Wall time of {done['count']} of the {done['of']} matrices into an empty cache, {cores} cores (load "
        f"{found['load']:.1f}) and {found['device']}: {done['seconds']:.1f} s; read back and checked in "
        f"{done['again_seconds']:.1f} s."
    )
    return "\n".join([*lines, f"{found['hardware']}; torch {torch.__version__}."]) + "\n"


def main() -> None:
    """Measure, write, print."""
    options = parse()
    found = measure(options)
    write_and_print(options.output, found, table(found))


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side-by-side", type=int, default=8, help="matrices that are timed by the clock; 0 for none")
    parser.add_argument("--whole", type=int, default=72, help="matrices that are put into a cache")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
