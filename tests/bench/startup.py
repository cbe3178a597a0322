# SPDX-License-Identifier: Apache-2.0
"""How long a command takes to begin, against what it cannot do without, and against another checkout.

    python -m tests.bench.startup FOLDER [--against CHECKOUT] [--turns 7]

Each turn runs, one after the other, ``mirrortune --help`` and the imports of Typer and Rich alone; and a training of
one step on a tiny model and the imports of torch, transformers and datasets alone. Ratios are medians over turns,
divided within a turn. With ``--against`` the same two commands of another checkout run in every turn too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.bench.output import command_line, write_and_print
from tests.tiny_models import write_tiny_model

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "--help": (["--help"], "import rich, typer"),
    "one step": (
        ["train", "-m", "model", "-t", "text-classification", "-d", "rows.csv", "-o", "run", "--overwrite",
         "train.max_steps=1", "--quiet"],
        "import datasets, torch, transformers",
    ),
}  # fmt: skip


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = command_line(__doc__, has_folder=True)
    parser.add_argument("--against", type=Path, help="another checkout of mirrortune")
    parser.add_argument("--turns", type=int, default=7)
    return parser.parse_args(words)


def seconds(words: Sequence[str], folder: Path, checkout: Path) -> float:
    """Run Python with ``words`` in ``folder`` on the code of ``checkout``; return the seconds that it took."""
    env = {**os.environ, "PYTHONPATH": str(checkout), "MIRRORTUNE_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=folder, env=env, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    """Time the commands in turns and write the ratios down."""
    given = parse()
    folder: Path = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    write_tiny_model(folder / "model")
    rows = [f"a {word} film,{word}" for word in ("good", "bad") * 10]
    (folder / "rows.csv").write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    found, lines = {}, ["| command | seconds | of the imports | of the other checkout |", "|---|---:|---:|---:|"]
    for name, (words, imports) in COMMANDS.items():
        kinds = {"ours": (["-m", "mirrortune", *words], ROOT), "imports": (["-c", imports], ROOT)}
        if given.against:
            kinds["other"] = (["-m", "mirrortune", *words], given.against.resolve())
        for kind in kinds.values():  # compile, and fill the caches
            seconds(kind[0], folder, kind[1])
        turns = [{k: seconds(w, folder, where) for k, (w, where) in kinds.items()} for _ in range(given.turns)]
        row = {"seconds": statistics.median(turn["ours"] for turn in turns)}
        row |= {k: statistics.median(turn["ours"] / turn[k] for turn in turns) for k in kinds if k != "ours"}
        found[name] = row
        other = f"{row['other']:.2f}" if "other" in row else ""
        lines.append(f"| {name} | {row['seconds']:.2f} | {row['imports']:.2f} | {other} |")
    write_and_print(given.output, found, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
