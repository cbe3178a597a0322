# SPDX-License-Identifier: Apache-2.0
"""The parts of the bench: a module each, with its words for a whole and for a quick run."""

from __future__ import annotations

import importlib
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

LARGE = ["lora r=8", "frozen", "mirror", "mirror r=64", "mirror r=128", "dora r=8", "oft", "road", "psoft-peft", "full"]
"""Methods that are taken to the sizes of large language models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One command.

    Attributes:
        module: of ``tests/bench``.
        folder: its place among the results.
        words: of a whole run.
        quick: words after those that make it short; None to leave the part out of a quick run.
        has_folder: whether its first word is a folder for what it makes on the way.
        writes: whether it takes ``-o``; otherwise what it prints is kept.
    """

    module: str
    folder: str
    words: tuple[str, ...] = ()
    quick: tuple[str, ...] | None = ()
    has_folder: bool = False
    writes: bool = True

    def command(self, output: Path, scratch: Path, *, is_quick: bool, clock: str) -> list[str]:
        """The words after ``python -m tests.bench.MODULE``."""
        found = [str(scratch)] if self.has_folder else []
        found += ["-o", str(output)] if self.writes else []
        found += [*self.words, *((self.quick or ()) if is_quick else ())]
        return [*found, "--clock", clock] if self.module in ("methods", "strategies") else found

    def parsed(self, words: list[str]) -> Namespace:
        """``words`` as the module itself understands them; SystemExit if it does not."""
        options: Namespace = importlib.import_module(f"tests.bench.{self.module}").parse(words)
        return options


def _steps(length: int) -> Part:
    """Steps of few methods in more turns, for targets that a busy machine would blur; 8 rows of ``length`` tokens."""
    methods = ("mirror", "mirror r=64", "full", "frozen") if length < 512 else ("mirror", "full")
    turns = {32: "21", 128: "9", 512: "4"}[length]
    return Part(
        module="methods", folder=f"steps-cpu-{8 * length}",
        words=("--length", str(length), "--steps", turns, "--methods", *methods, "--no-peaks"),
        quick=("--size", "mini", "--steps", "3", "--warmup", "1", "--length", "32"),
    )  # fmt: skip


_FEW = ("--methods", "mirror", "mirror r=64", "frozen", "dora r=8")
_TINY = ("--size", "mini", "--steps", "3", "--warmup", "1", *_FEW)
# By the time that they take, shortest first: a run that is stopped has what came before. HRA takes ten times a step of
# LoRA's; BOFT, which takes minutes, takes one.
CPU = {
    "scaling": Part(module="scaling", folder="scaling-70b"),
    "factorise": Part(
        module="factorise", folder="factorise-cpu",
        quick=("--repeats", "1", "--side-by-side", "2", "--whole", "4"),
    ),
    "strategies": Part(module="strategies", folder="strategies-cpu", quick=("--rows", "512")),
    "large-models": Part(
        module="large_models", folder="large-models", has_folder=True, quick=("--gigabytes", "0.1"),
    ),
    "many-rows": Part(
        module="many_rows", folder="many-rows", has_folder=True, quick=("--rows", "5000", "--megabytes", "5"),
    ),
    "bank": Part(
        module="bank", folder="bank-cpu", quick=("--lengths", "1", "--layers", "1", "--turns", "1", "--no-memory"),
    ),
    "methods-256": Part(module="methods", folder="methods-cpu", words=("--length", "32"), quick=_TINY),
    "methods": Part(module="methods", folder="methods-cpu-1024", quick=(*_TINY, "--length", "64", "--no-peaks")),
    **{f"steps-{8 * length}": _steps(length) for length in (32, 128, 512)},
    "end-to-end": Part(
        module="end_to_end", folder="end-to-end-cpu", quick=("--rows", "80", "--repeats", "1", "--starts", "1"),
    ),
    "reload": Part(module="reload", folder="reload", quick=None, writes=False),
}  # fmt: skip


def _on_gpu(size: str, length: int, rows: int) -> Part:
    methods = () if size == "base" else ("--methods", *LARGE)
    words = ("--device", "cuda", "--dtype", "bfloat16", "--size", size, "--batch", str(rows), "--length", str(length))
    # A process for each method takes minutes; the part peak-8b has the peaks. Merges are made on the CPU.
    words += ("--factors", "any", "--no-peaks", "--no-merges", *methods)
    return Part(
        module="methods", folder=f"methods-cuda-{size}-{length}", words=words,
        quick=("--steps", "3", "--warmup", "1", *_FEW),
    )  # fmt: skip


_EIGHT_B = ("--device", "cuda", "--dtype", "bfloat16", "--size", "8b", "--layers", "32", "--vocabulary", "128256",
            "--batch", "1", "--length", "2048")  # fmt: skip
_STEPS = {f"methods-{size}-{length}": _on_gpu(size, length, rows)
          for size, rows in (("1b", 4), ("8b", 2), ("base", 16)) for length in (1024, 2048, 512)}  # fmt: skip
# What says most in the fewest minutes first: a machine may be lent for ten. How long a GPU takes to factorise in
# float64 is not known, and so comes last.
CUDA = {
    "precisions": Part(
        module="precisions", folder="precisions-cuda", has_folder=True, words=("--device", "cuda"),
        quick=("--steps", "4", "--size", "mini", "--layers", "2", "--length", "64", "--no-compile"),
    ),
    "methods-1b-1024": _STEPS["methods-1b-1024"],
    "peak-8b": Part(
        module="peak", folder="peak-cuda-8b", words=(*_EIGHT_B, "--methods", "lora r=8", "mirror r=128", "frozen"),
        quick=("--layers", "2"),
    ),
    "strategies": Part(
        module="strategies", folder="strategies-cuda", words=("--device", "cuda", "--autocast", "bfloat16"),
        quick=("--rows", "1024"),
    ),
    **_STEPS,
    "end-to-end": Part(
        module="end_to_end", folder="end-to-end-cuda", words=("--device", "cuda"),
        quick=("--rows", "80", "--repeats", "1", "--starts", "1"),
    ),
    "factorise": Part(
        module="factorise", folder="factorise-cuda",
        words=("--device", "cuda", "--repeats", "1", "--whole", "4", "--ways", "gesdd", "Gram and gesdd"),
        quick=("--whole", "1", "--ways", "gesdd"),
    ),
}  # fmt: skip
PARTS = {"cpu": CPU, "cuda": CUDA}
