# SPDX-License-Identifier: Apache-2.0
"""How much memory and time ``analyze`` takes on large checkpoints.

    python -m tests.bench.analyze_memory FOLDER [--gigabytes 1.5] [--threads N]
    python -m tests.bench.analyze_memory FOLDER --square 4096

The first makes two checkpoints of transformer layers (1,024 wide, 4,096 inside, float32, shards of 400 MB), the second
one pair of square matrices. Each is analysed in a process of its own, whose peak resident memory is printed with the
seconds that each shape of matrix took on its thread.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file

_WIDTH, _INSIDE, _SHARD_BYTES = 1024, 4096, 400_000_000
_SHAPES = {f"attention.{kind}_proj": (_WIDTH, _WIDTH) for kind in "qkvo"} | {
    "mlp.up_proj": (_INSIDE, _WIDTH),
    "mlp.down_proj": (_WIDTH, _INSIDE),
}


def transformer(num_bytes: float) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names and shapes of layers until they hold ``num_bytes`` in float32."""
    held, layer = 0, 0
    while held < num_bytes:
        for kind, shape in _SHAPES.items():
            yield f"model.layers.{layer}.{kind}.weight", shape
            held += 4 * shape[0] * shape[1]
        layer += 1


def write_checkpoint(folder: Path, shapes: dict[str, tuple[int, int]], *, change: float) -> None:
    """Random weights by name, the same in every folder, and random changes of ``change`` times their size."""
    folder.mkdir(parents=True, exist_ok=True)
    shard: dict[str, torch.Tensor] = {}
    placed: dict[str, str] = {}

    def flush() -> None:
        name = f"model-{len(set(placed.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        placed.update(dict.fromkeys(shard, name))
        shard.clear()

    for seed, (name, shape) in enumerate(shapes.items()):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / shape[1] ** 0.5
        if change:
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1_000_000))
            weight += change * noise / shape[1] ** 0.5
        shard[name] = weight
        if sum(4 * w.numel() for w in shard.values()) > _SHARD_BYTES:
            flush()
    if shard:
        flush()
    index = {"weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=1.5)
    parser.add_argument("--square", type=int)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    square = {"layers.0.weight": (given.square, given.square)} if given.square else None
    shapes = square or dict(transformer(1e9 * given.gigabytes))
    base, tuned = given.folder / "base", given.folder / "tuned"
    write_checkpoint(base, shapes, change=0.0)
    write_checkpoint(tuned, shapes, change=0.02)
    size = sum(f.stat().st_size for f in base.glob("*.safetensors"))
    words = [sys.executable, "-m", "mirrortune", "analyze", base, tuned, "--json"]
    words += ["--threads", given.threads] if given.threads else []
    started = time.perf_counter()
    done = subprocess.run([str(w) for w in words], stdout=subprocess.PIPE, check=True)
    seconds = time.perf_counter() - started
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = used.ru_maxrss * 1024
    data = json.loads(done.stdout)
    spent = used.ru_utime + used.ru_stime
    lines = [
        f"{len(shapes)} matrices, two checkpoints of {size / 1e9:.2f} GB, {data['threads']} threads",
        f"{seconds:.0f} s in all, {spent:.0f} s of processor time, peak resident memory {peak / 1e9:.2f} GB",
    ]
    by_shape: dict[tuple[int, int], list[float]] = {}
    for matrix in data["matrices"]:
        by_shape.setdefault(tuple(matrix["shape"]), []).append(data["matrix_seconds"][matrix["name"]])
    lines += [f"{o} x {i}: {median(t):.1f} s a matrix (median of {len(t)})" for (o, i), t in by_shape.items()]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
