# SPDX-License-Identifier: Apache-2.0
"""The most memory that two training steps hold, by method, each in a process of its own.

    python -m tests.bench.peak -o FOLDER --device cuda --dtype bfloat16 --size 8b --layers 32 --vocabulary 128256 \\
        --length 2048 --batch 1 --methods "lora r=8" "mirror r=128"

On a GPU what its allocator held, elsewhere resident memory. Factors are made-up numbers of the right shapes unless
``--factors real``: what they are changes no size.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.bench.contestants import (
    METHODS,
    REFERENCE,
    SIZES,
    VOCABULARY,
    any_factors,
    contestant,
    factor_source,
    hardware,
    make_batch,
    make_model,
    versions,
)  # fmt: skip
from tests.bench.output import command_line, write_and_print


def base_model(options: argparse.Namespace) -> nn.Module:
    """The model that ``options`` ask for."""
    return make_model(options.size, options.length, getattr(torch, options.dtype), options.device,
                      layers=options.layers, vocabulary=options.vocabulary)  # fmt: skip


def peak_of_one(options: argparse.Namespace) -> int:
    """The most memory that this process, or its GPU, has held in two steps of one method, in bytes."""
    base = base_model(options)
    factors = factor_source(base)[0] if options.factors == "real" else any_factors
    tokens = options.batch * options.length
    made = contestant(base, options.peak, factors, tokens=tokens, is_copy=False)
    batch = make_batch(options.batch, options.length, options.device)
    del factors
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
    for _ in range(2):
        made.step(batch)
    if options.device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def peaks(options: argparse.Namespace, methods: Sequence[str]) -> dict[str, int | None]:
    """Peak memory of every method in bytes, each in a process of its own; None for one that failed."""
    words = [word for key in ("device", "dtype", "size", "batch", "length", "layers", "vocabulary", "factors")
             if getattr(options, key) is not None for word in (f"--{key}", str(getattr(options, key)))]  # fmt: skip
    found: dict[str, int | None] = {}
    for name in methods:
        command = [sys.executable, "-m", "tests.bench.peak", *words, "--peak", name]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
        found[name] = int(done.stdout.split()[-1]) if done.returncode == 0 else None
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    """What a model and a batch are made by."""
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--layers", type=int, help="as many as the size has by default")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--factors", choices=("real", "any"), default="any", help="any: made up, for memory and time")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    add_options(parser)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=[REFERENCE, "mirror r=128"])
    parser.add_argument("--peak", choices=METHODS, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def table(found: dict[str, Any]) -> str:
    """The results in Markdown."""
    reference = found["peaks"].get(REFERENCE)
    lines = ["| method | peak memory | of LoRA r=8 |", "|---|---|---|"]
    for name, peak in found["peaks"].items():
        size = "failed" if peak is None else f"{peak / 1e9:.2f} GB"
        lines.append(f"| `{name}` | {size} | {f'{peak / reference:.3f}' if peak and reference else ''} |")
    lines += [
        "",
        found["setting"],
        f"{found['hardware']}; {', '.join(f'{k} {v}' for k, v in found['versions'].items())}.",
    ]
    return "\n".join(lines) + "\n"


def setting(options: argparse.Namespace) -> str:
    """Model and batch in words."""
    hidden, inner, _, layers = SIZES[options.size]
    return (
        f"{options.layers or layers} layers of {hidden} x {inner}, {options.batch} x {options.length} tokens, "
        f"{options.dtype}."
    )


def main() -> None:
    """Measure, write, print."""
    options = parse()
    if options.peak:
        sys.stdout.write(f"{peak_of_one(options)}\n")
        return
    found = {"peaks": peaks(options, options.methods), "setting": setting(options)}
    found |= {"hardware": hardware(options.device), "versions": versions()}
    write_and_print(options.output, found, table(found))


if __name__ == "__main__":
    main()
