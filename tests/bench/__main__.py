# SPDX-License-Identifier: Apache-2.0
"""The whole bench in one command: every part in a process of its own, and one table of what was aimed at.

    python -m tests.bench                                on a CPU: an hour or two
    python -m tests.bench --quick                        a few minutes, small sizes: whether everything runs
    python -m tests.bench methods factorise              some parts
    python -m tests.bench --device cuda                  on a GPU: half an hour, the most telling parts first
    python -m tests.bench --device cuda --minutes 10     what fits into ten minutes
    python -m tests.bench --table                        the table of what is there, measuring nothing

Each part leaves ``results.json`` and ``table.md`` in a folder of its own under ``tests/bench/results``, with hardware
and versions; the table of targets is ``targets-DEVICE.md`` there. A quick run writes nothing there unless ``-o`` says
where. Ratios are of turns: a part takes steps or runs of all that it compares one after the other, again and again, and
divides within a turn, so that a machine that slows down slows all of them. ``--clock cpu`` compares processor time, for
a machine that others use too. A part that fails, or that ``--minutes`` cuts, is said at the end (exit code 1), and the
others go on.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.bench.contestants import environment, hardware, versions
from tests.bench.parts import PARTS, Part
from tests.bench.targets import read_results, table, targets

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help="; ".join(f"{d}: {', '.join(p)}" for d, p in PARTS.items())
    )
    parser.add_argument("-o", "--output", type=Path, help="folder of the results; tests/bench/results by default")
    parser.add_argument("--device", choices=PARTS, default="cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes, a few minutes")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--minutes", type=float, help="stop then, wherever it is; finished parts are kept")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    options = parser.parse_args(words)
    known = PARTS[options.device]
    if unknown := [name for name in options.parts if name not in known]:
        parser.error(f"no part {', '.join(unknown)} on {options.device}; there are {', '.join(known)}")
    if options.device == "cuda" and options.clock == "cpu":
        parser.error("the processor's time says nothing of a GPU: leave out --clock cpu")
    return options


def chosen(options: argparse.Namespace) -> dict[str, Part]:
    """The parts to run."""
    if options.table:
        return {}
    known = PARTS[options.device]
    wanted = options.parts or [n for n, part in known.items() if part.quick is not None or not options.quick]
    return {name: known[name] for name in dict.fromkeys(wanted)}


def run(part: Part, output: Path, options: argparse.Namespace, seconds: float | None = None) -> bool:
    """Run a part in a process of its own for at most ``seconds``; whether it succeeded."""
    with tempfile.TemporaryDirectory() as scratch:
        words = part.command(output, Path(scratch), is_quick=options.quick, clock=options.clock)
        command = [sys.executable, "-m", f"tests.bench.{part.module}", *words]
        env = environment(Path(scratch) / "cache", options.device)
        process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True, process_group=0)
        try:
            printed, _ = process.communicate(timeout=seconds)
        except BaseException as error:  # Ctrl-C too, which does not reach a group of its own
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started, which hold the GPU
            printed, _ = process.communicate()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
    say(printed)
    if not part.writes and process.returncode == 0:
        output.mkdir(parents=True, exist_ok=True)
        (output / "table.md").write_text(printed, encoding="utf-8")
    return process.returncode == 0


def measure(options: argparse.Namespace, folder: Path) -> list[str]:
    """Run the chosen parts and write the table of targets; the names of those that failed."""
    failed, begun = [], time.perf_counter()
    for name, part in chosen(options).items():
        started = time.perf_counter()
        left = None if options.minutes is None else 60 * options.minutes - (started - begun)
        if left is not None and left <= 0:
            failed.append(name)
            continue
        say(f"\n## {name}\n\n")
        if not run(part, folder / part.folder, options, left):
            failed.append(name)
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)  # noqa: T201
    results = read_results(folder, options.device)
    rows = [t.row(results, is_judged=not options.quick) for t in targets(options.device, options.clock)]
    made = {**versions(), "python": platform.python_version()}
    remarks = [f"{hardware(options.device)}; {', '.join(f'{k} {v}' for k, v in made.items())}; {options.clock} clock."]
    remarks += [f"Failed, or not finished: {', '.join(failed)}."] if failed else []
    text = table(rows, remarks)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"targets-{options.device}.md").write_text(text, encoding="utf-8")
    say(f"\n## Targets\n\n{text}")
    return failed


def say(text: str) -> None:
    """Print at once: a bench takes an hour."""
    sys.stdout.write(text)
    sys.stdout.flush()


def main() -> int:
    """Measure, write, print."""
    options = parse()
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("torch sees no GPU here")
    if options.output or not options.quick:
        return bool(measure(options, options.output or RESULTS))
    folder = Path(tempfile.mkdtemp(prefix="mirrortune-bench-"))
    try:
        return bool(measure(options, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
