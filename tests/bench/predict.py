# SPDX-License-Identifier: Apache-2.0
"""What `predict` takes of time and memory when there are ten times as many rows.

    python -m tests.bench.predict FOLDER [-o OUTPUT] [--rows 1000000]

FOLDER gets a run of a tiny model, and made-up short rows as csv: few (what the program itself takes), a tenth, and all.
Each is predicted to a csv file by a process of its own. Memory is what cannot be dropped (anonymous pages), as in
`tests.bench.many_rows`; time is that of the processor. Linux only.

Writes results.json and table.md to OUTPUT, or to FOLDER.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.bench.many_rows import measured, write_short
from tests.bench.output import command_line, write_and_print
from tests.tiny_models import write_tiny_model

_FEW = 200


def make_run(folder: Path) -> Path:
    """A run of a tiny model, trained for a few steps."""
    run = folder / "run"
    if not run.is_dir():
        write_short(folder / "train.csv", _FEW)
        words = ["-m", str(write_tiny_model(folder / "model")), "-d", str(folder / "train.csv"), "-o", str(run)]
        command = [sys.executable, "-m", "mirrortune", "train", *words, "-t", "text-classification", "-q"]
        subprocess.run([*command, "--max-steps", "4"], check=True, stdout=subprocess.DEVNULL)
    return run


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__, has_folder=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    return parser.parse_args(words)


def main() -> None:
    """Make the rows, predict them, write down what it took."""
    given = parse()
    folder: Path = given.folder
    folder.mkdir(parents=True, exist_ok=True)
    run, found = make_run(folder), []
    for rows in (_FEW, given.rows // 10, given.rows):
        path, answers = folder / f"{rows}.csv", folder / f"answers-{rows}.csv"
        if not path.exists():
            write_short(path, rows)
        answers.unlink(missing_ok=True)
        taken = measured(
            ["predict", str(run), "-d", str(path), "-o", str(answers), "-q"],
            {**os.environ, "MIRRORTUNE_CACHE": str(folder / "cache")},
        )
        with answers.open(encoding="utf-8") as file:
            assert sum(1 for _ in file) == rows + 1
        found.append({"rows": rows, "data_mb": round(path.stat().st_size / 1e6, 1), **taken})
        sys.stdout.write(json.dumps(found[-1]) + "\n")
        sys.stdout.flush()
    lines = ["| rows | data, MB | CPU seconds | peak memory, MB |", "|---:|---:|---:|---:|"]
    lines += ["| {rows:,} | {data_mb} | {cpu_seconds} | {peak_mb} |".format(**row) for row in found]
    write_and_print(given.output or folder, found, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
