# SPDX-License-Identifier: Apache-2.0
"""Short runs: the accuracy of each method after 40, 80, 160 and 400 steps, at default settings, beside PEFT's LoRA.

    python -m tests.bench.short_runs FOLDER [-o tests/bench/results/short-runs] [--seeds 3] [--only NAME ...]
    python -m tests.bench.short_runs FOLDER --list       the runs that are missing, in their order
    python -m tests.bench.short_runs FOLDER --table      the tables of the finished runs

MiniLM-L6 on 2,400 movie sentences in batches of 16, scored on the 1,056 validation sentences. Each number of steps is a
run of its own, since learning rates decay to zero at the last step. ``Trainer + PEFT LoRA r=8`` is transformers'
Trainer at its defaults with a learning rate of 1e-3; the others are ``mirrortune train -m MODEL -d ROWS``.

FOLDER gets one JSON file for each finished run; the same command continues a stopped bench. Shorter runs come first, so
that every hour completes a column. Time is processor time of one thread, which other work on the machine hardly
lengthens.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.contestants import hardware, versions
from tests.bench.end_to_end import MODEL, peft_trainer
from tests.bench.output import command_line, write_and_print

STEPS = (80, 40, 160, 400)
BATCH, ROWS = 16, 2400
_SENTENCES = Path(__file__).parents[2] / "recipes" / "data" / "movie-sentences"
PEER = "Trainer + PEFT LoRA r=8"
METHODS: dict[str, tuple[str, ...]] = {
    "mirror": ("adapter.method=mirror",),
    PEER: (),
    "mirror-scale": ("adapter.method=mirror-scale",),
    "mirror with scales": ("adapter.method=mirror", "adapter.options.scale_top_k=all"),
    "svft": ("adapter.method=svft",),
    "adaptive with scales": ("adapter.method=adaptive", "adapter.options.scale_top_k=all"),
    "scale": ("adapter.method=scale",),
    "lora r=8": ("adapter.method=lora", "train.lr=1e-3"),
}
"""Candidates for the default, and LoRA twice: as a user of PEFT runs it, and with everything else as ours."""
_RATES: dict[str, tuple[str, ...]] = {
    "mirror": ("train.lr=5e-2", "train.head_lr=5e-3"),
    "mirror with scales": ("train.lr=1e-2", "train.lr=5e-2", "train.head_lr=5e-3"),
    "svft": ("train.head_lr=5e-3",),
}
VARIANTS: dict[str, tuple[str, ...]] = {
    f"{name}, {word.removeprefix('train.')}": (*METHODS[name], word) for name, words in _RATES.items() for word in words
}
"""Other rates of the adapter and of the head, for the runs of 80 steps: whether a default is too slow."""
VARIANT_STEPS = 80


@dataclass(frozen=True, slots=True)
class Cell:
    """A run."""

    method: str
    steps: int
    seed: int

    def file(self, folder: Path) -> Path:
        """Return the file of its result."""
        name = "".join(c if c.isalnum() else "-" for c in self.method)
        return folder / "cells" / f"{name}-{self.steps}-{self.seed}.json"


def cells(seeds: int, only: Sequence[str] = ()) -> Iterator[Cell]:
    """Yield every run in its order: two columns, the other rates with one seed, another column, and the rest."""
    columns = [[Cell(name, steps, seed) for seed in range(seeds) for name in METHODS] for steps in STEPS]
    rates = [[Cell(name, VARIANT_STEPS, seed) for name in VARIANTS] for seed in range(seeds)]
    parts = [*columns[:2], *rates[:1], *columns[2:3], *rates[1:], *columns[3:]]
    yield from (cell for part in parts for cell in part if not only or cell.method in only)


def write_rows(folder: Path) -> Path:
    """Write the rows to train on and to score."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", ROWS), ("validation", None)):
        lines = (_SENTENCES / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
        (folder / f"{name}.tsv").write_text("\n".join(lines[: count and count + 1]) + "\n", encoding="utf-8")
    return folder


def run(cell: Cell, folder: Path) -> dict[str, Any]:
    """Train and score one run."""
    data = write_rows(folder / "data")
    started = time.process_time()
    found = train_with_peft(cell, data, folder / "trainer") if cell.method == PEER else train(cell, data, folder)
    return {**found, "cpu_seconds": round(time.process_time() - started, 1)}


def train(cell: Cell, data: Path, folder: Path) -> dict[str, Any]:
    """Run ``mirrortune train``."""
    from tests.cli.console import mirrortune

    words = ["train", "-m", MODEL, "-t", "text-classification", "-d", data, "--batch-size", BATCH, "--seed", cell.seed,
             "--max-steps", cell.steps, "-o", folder / "scratch", "--overwrite", "--json", "data.label_column=label",
             f"train.eval_every_steps={cell.steps}", "eval.before=false"]  # fmt: skip
    done = mirrortune(*words, *(METHODS | VARIANTS)[cell.method], cache=folder / "cache").data
    return {"accuracy": done["metrics"]["accuracy"], "loss": done["metrics"]["loss"],
            "trained_numbers": done["trainable_parameters"]}  # fmt: skip


def train_with_peft(cell: Cell, data: Path, output: Path) -> dict[str, Any]:
    """Run what a user of transformers and PEFT runs, dynamic padding included."""
    import transformers

    transformers.set_seed(cell.seed)
    trainer = peft_trainer(
        data, output, cache=output.parent / "datasets", per_device_train_batch_size=BATCH, max_steps=cell.steps,
        save_strategy="no", seed=cell.seed, use_cpu=True,
    )  # fmt: skip
    trainer.train()
    scored = trainer.evaluate()
    trained = sum(p.numel() for n, p in trainer.model.named_parameters() if p.requires_grad and "lora_" in n)
    return {"accuracy": scored["eval_accuracy"], "loss": scored["eval_loss"], "trained_numbers": trained}


def read(folder: Path, seeds: int) -> dict[str, Any]:
    """Return the finished runs: method -> steps -> one result for each seed."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for cell in cells(seeds):
        if cell.file(folder).is_file():
            done = json.loads(cell.file(folder).read_text(encoding="utf-8"))
            found.setdefault(cell.method, {}).setdefault(str(cell.steps), []).append({"seed": cell.seed, **done})
    return found


def step_seconds(runs: dict[str, list[dict[str, Any]]]) -> float | None:
    """Return the median processor time of a step: what longer runs took more than shorter ones of the same seed."""
    least, most = min(map(int, runs)), max(map(int, runs))
    short = {run["seed"]: run["cpu_seconds"] for run in runs[str(least)]}
    shared = [run["cpu_seconds"] - short[run["seed"]] for run in runs[str(most)] if run["seed"] in short]
    return statistics.median(shared) / (most - least) if most > least and shared else None


def table(found: dict[str, Any]) -> str:
    """Return the results in Markdown."""
    methods = found["methods"]
    columns = [steps for steps in sorted(STEPS) if any(str(steps) in methods.get(name, {}) for name in METHODS)]
    lines = [f"| method | trainable parameters | {' | '.join(f'{n} steps' for n in columns)} | step |",
             "|---|---|" + "---|" * (len(columns) + 1)]  # fmt: skip
    for name in (n for n in METHODS if n in methods):
        runs = methods[name]
        scores = [_score(runs.get(str(steps), []), found["seeds"]) for steps in columns]
        seconds = step_seconds(runs)
        trained = next(iter(runs.values()))[0]["trained_numbers"]
        step = "" if seconds is None else f"{seconds * 1e3:.0f} ms"
        lines.append(f"| {name} | {trained:,} | {' | '.join(scores)} | {step} |")
    own = [name for name in VARIANTS if name in methods]
    if own:
        lines += ["", f"| other rates | {VARIANT_STEPS} steps | at default rates |", "|---|---|---|"]
    for name in own:
        default = methods.get(name.partition(", ")[0], {}).get(str(VARIANT_STEPS), [])
        scores = [_score(runs, found["seeds"]) for runs in (methods[name][str(VARIANT_STEPS)], default)]
        lines.append(f"| {name} | {' | '.join(scores)} |")
    lines += [
        "",
        f"Accuracy, times 100: mean ± standard deviation over {found['seeds']} seeds, or over (n) where fewer ran; "
        f"scored once, at the end, on 1,056 rows (standard error 1.2 near 80). {ROWS:,} training rows, batches of "
        f"{BATCH}, float32. Step times are CPU time of one thread.",
        f"{found['hardware']}; {', '.join(f'{k} {v}' for k, v in found['versions'].items())}.",
    ]
    return "\n".join(lines) + "\n"


def _score(runs: list[dict[str, Any]], seeds: int) -> str:
    values = [100 * run["accuracy"] for run in runs]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}" + ("" if len(values) == seeds else f" ({len(values)})")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = command_line(__doc__, has_folder=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=(*METHODS, *VARIANTS), default=(), metavar="NAME")
    parser.add_argument("--list", action="store_true", help="print the runs that are missing")
    parser.add_argument("--table", action="store_true", help="train nothing")
    return parser.parse_args(words)


def main() -> None:
    """Train what is missing, write, print."""
    options = parse()
    missing = [c for c in cells(options.seeds, options.only) if not c.file(options.folder).is_file()]
    if options.list:
        sys.stdout.writelines(f"{cell.method}, {cell.steps} steps, seed {cell.seed}\n" for cell in missing)
        return
    logging.disable(logging.WARNING)
    for cell in [] if options.table else missing:
        found = run(cell, options.folder)
        file = cell.file(options.folder)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".partial").write_text(json.dumps(found) + "\n", encoding="utf-8")
        file.with_suffix(".partial").rename(file)
        print(f"{cell.method}, {cell.steps} steps, seed {cell.seed}: {found}", file=sys.stderr, flush=True)  # noqa: T201
    methods = read(options.folder, options.seeds)
    if methods:
        found = {"seeds": options.seeds, "methods": methods, "hardware": hardware("cpu"), "versions": versions()}
        write_and_print(options.output, found, table(found))


if __name__ == "__main__":
    main()
