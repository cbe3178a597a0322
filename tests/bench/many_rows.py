# SPDX-License-Identifier: Apache-2.0
"""What `prepare` takes of time and memory when there are many rows, and when they are more than it may hold.

    python -m tests.bench.many_rows FOLDER [-o OUTPUT] [--rows 1000000] [--megabytes 800]

FOLDER gets a tiny model and made-up rows: a few (what the program itself takes), many short ones as csv, and long ones
as JSON lines. Each is prepared twice in a process of its own, the second time from the cache. Memory is what cannot be
dropped (anonymous pages): files that are mapped do not count, since they are paged out when memory runs short. Time is
that of the processor, which other work on the machine does not lengthen. Linux only.

Writes results.json and table.md to OUTPUT, or to FOLDER.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.bench.output import command_line, write_and_print
from tests.tiny_models import write_tiny_model

_SHORT = 8  # words of a short row
_LONG = 4000  # characters of a long one


def write_short(path: Path, rows: int) -> None:
    """A csv file of rows of a few words."""
    draw = random.Random(0)
    words = [f"word{i}" for i in range(5000)] + ["good", "bad", "film", "the", "was"]
    with path.open("w", encoding="utf-8") as file:
        file.write("text,label\n")
        for i in range(rows):
            file.write(f"{' '.join(draw.choices(words, k=_SHORT))},{i % 2}\n")


def write_long(path: Path, megabytes: int) -> None:
    """JSON lines of long rows, each other than all others; of long words, which a tokenizer is quick with."""
    line = "".join(chr(97 + i * 7 % 26) for i in range(199))
    text = " ".join([line] * (_LONG // 200))
    with path.open("w", encoding="utf-8") as file:
        for i in range(megabytes * 1_000_000 // _LONG):
            file.write(json.dumps({"text": f"row {i} {text}", "label": i % 2}) + "\n")


def prepare(model: Path, data: Path, cache: Path) -> dict[str, float]:
    """Seconds of the processor, and the peak of anonymous memory in MB, of one ``prepare``."""
    words = ["prepare", "-m", model, "-t", "text-classification", "-d", data, "--dry-run", "--json"]
    return measured(list(map(str, words)), {**os.environ, "MIRRORTUNE_CACHE": str(cache)})


def measured(words: Sequence[str], env: dict[str, str]) -> dict[str, float]:
    """Seconds of the processor, and the peak of anonymous memory in MB, of one command in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with subprocess.Popen(
        [sys.executable, "-m", "mirrortune", *words], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    ) as process:  # fmt: skip
        peak = max(_anonymous(process), default=0)
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == 0, said
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu_seconds": round(seconds, 1), "peak_mb": round(peak / 1e6)}


def _anonymous(process: subprocess.Popen[str]) -> Iterator[int]:
    """Bytes that a process holds which no file backs, again and again until it ends."""
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("RssAnon"):
                yield int(line.split()[1]) * 1024
        time.sleep(0.02)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__, has_folder=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--megabytes", type=int, default=800)
    return parser.parse_args(words)


def main() -> None:
    """Make the rows, prepare them, write down what it took."""
    given = parse()
    folder: Path = given.folder
    folder.mkdir(parents=True, exist_ok=True)
    model = write_tiny_model(folder / "model")
    cases: dict[str, tuple[str, Callable[[Path], None]]] = {
        "200 short rows": ("few.csv", lambda path: write_short(path, 200)),
        f"{given.rows:,} short rows": ("many.csv", lambda path: write_short(path, given.rows)),
        f"{given.megabytes:,} MB of long rows": ("long.jsonl", lambda path: write_long(path, given.megabytes)),
    }
    found = []
    for name, (file, write) in cases.items():
        path = folder / file
        if not path.exists():
            write(path)
        shutil.rmtree(folder / "cache", ignore_errors=True)
        for which in ("first", "from the cache"):
            taken = prepare(model, path, folder / "cache")
            found.append({"rows": name, "data_mb": round(path.stat().st_size / 1e6), "which": which, **taken})
            sys.stdout.write(json.dumps(found[-1]) + "\n")
            sys.stdout.flush()
    lines = ["| rows | data, MB | | CPU seconds | peak memory, MB |", "|---|---:|---|---:|---:|"]
    lines += ["| {rows} | {data_mb} | {which} | {cpu_seconds} | {peak_mb} |".format(**row) for row in found]
    write_and_print(given.output or folder, found, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
