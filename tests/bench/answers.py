# SPDX-License-Identifier: Apache-2.0
"""Answers of a language model before and after training: perplexity and exact match, through ``mirrortune compare``.

    python -m tests.bench.answers FOLDER                     the next missing run, again and again
    python -m tests.bench.answers FOLDER --steps 100 --rows 300
    python -m tests.bench.answers FOLDER --list              the commands
    python -m tests.bench.answers FOLDER --report -o OUTPUT  the table of the finished runs

SmolLM2-135M-Instruct on the commonsense questions at hand and on GSM8K (rows: ``tests/bench/real_hub.py``; weights:
``tests/bench/assets.py``, or ``--model``). FOLDER gets a comparison for each task, whose finished runs are kept: the
same command continues. Learning rates are those that ``tests/bench/results/rates/chatterbot`` has chosen for this
model; mirror-scale and LoRA were not in it and choose between two by the loss on the commonsense rows that are scored
here, which can only favour them. GSM8K takes the rates that commonsense has chosen. The model is scored once before
training and once after the last step, on rows set aside from the training rows (commonsense) or of the test split
(GSM8K).
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirrortune.compare.grid import Cell
from tests.bench.assets import build
from tests.bench.output import command_line, write_and_print
from tests.bench.real import environment, refresh
from tests.bench.real_hub import FOLDER_VARIABLE, data_folder, real_hub

MODEL = "smollm2-135m-instruct"
SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task of the table.

    Attributes:
        recipe: shipped.
        methods: with their learning rates.
        steps: of 8 rows each.
        rows: that are answered.
        words: settings.
    """

    recipe: str
    methods: tuple[str, ...]
    steps: int
    rows: int
    words: tuple[str, ...]


TASKS = {
    "commonsense": Task(
        recipe="llm/commonsense-170k", steps=30, rows=200,
        methods=(
            "mirror-scale:lr=1e-2/2e-2", "lora:rank=8:lr=1e-3/3e-3", "svft:lr=1e-1", "psoft:lr=1e-3", "mirror:lr=1e-2",
        ),
        words=("data.validation_fraction=0.02", "eval.max_new_tokens=12"),
    ),
    "gsm8k": Task(
        recipe="llm/gsm8k", steps=16, rows=64, words=("eval.max_new_tokens=160", "data.validation_split=test"),
        methods=(
            "mirror-scale:lr=1e-2", "lora:rank=8:lr=3e-3", "svft:lr=1e-1", "psoft:lr=1e-3", "mirror:lr=1e-2",
        ),
    ),
}  # fmt: skip
"""Sizes for one slow core: about five minutes a run of commonsense and ten of GSM8K when it is free."""


def command(name: str, folder: Path, options: argparse.Namespace) -> list[str]:
    """Return the words of a comparison after ``mirrortune``."""
    task = TASKS[name]
    first, *others = task.methods
    methods = [f"{first}:eval.before=true", *(f"{method}:eval.before=false" for method in others)]
    model = options.model or folder / "assets" / MODEL
    sizes = [f"train.max_steps={options.steps or task.steps}", f"eval.max_rows={options.rows or task.rows}"]
    return ["compare", task.recipe, *task.words, *sizes, "data.packing=false", "model.dtype=float32",
            "train.eval_every_steps=100000", "eval.protocol=dev-best", "-m", str(model), "--precision", "bf16",
            "--methods", ",".join(methods), "--seeds", "1", "--choose-by", "loss", "--extensions", "0",
            "-o", str(folder / name)]  # fmt: skip


def run(options: argparse.Namespace, source: Path) -> None:
    """Run every comparison; stop at the first that fails or is interrupted."""
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    if options.model is None:
        build(folder / "assets", [MODEL])
    with real_hub(source) as hub:
        for name in options.only or TASKS:
            words = [sys.executable, "-m", "mirrortune", *command(name, folder, options)]
            env = environment(hub.endpoint, folder, options.device)
            done = subprocess.run(words, check=False, env=env, cwd=folder, stdout=subprocess.DEVNULL)
            if done.returncode:
                raise SystemExit(done.returncode)


def read(folder: Path) -> dict[str, Any]:
    """Return by task what its runs have found: scores before and after, sizes and times, and the settings."""
    found = {}
    for name, task in TASKS.items():
        file = folder / name / "results.json"
        if not file.is_file():
            continue
        results = json.loads(file.read_text(encoding="utf-8"))
        methods = {}
        for label, own in results["tasks"][task.recipe]["methods"].items():
            if own["seeds"]:
                done = Cell(task.recipe, label, own["lr"], SEED).folder(folder / name) / "results.json"
                run = json.loads(done.read_text(encoding="utf-8"))
                kept = ("metrics", "metrics_before", "trainable_parameters", "adapter_bytes", "train_seconds")
                methods[plain(label)] = {"lr": own["lr"], **{key: run[key] for key in kept}}
        words = dict(word.split("=", 1) for word in results["command"].split() if "=" in word and ":" not in word)
        found[name] = {
            "methods": methods, "rows": int(words["eval.max_rows"]), "steps": int(words["train.max_steps"]),
            "environment": results["environment"], "command": results["command"].replace(f"{folder}/", ""),
        }  # fmt: skip
    return {name: own for name, own in found.items() if own["methods"]}


def plain(label: str) -> str:
    """Return the name of a method without its learning rates and evaluation."""
    return ":".join(part for part in label.split(":") if not part.startswith(("lr=", "eval.")))


def table(found: dict[str, Any]) -> str:
    """Return the results in Markdown."""
    lines = ["| task | method | lr | trainable parameters | adapter | perplexity | exact match | training |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, task in found.items():
        before = next((own["metrics_before"] for own in task["methods"].values() if own["metrics_before"]), None)
        if before:
            lines.append(f"| {name} | before training |  |  |  | {_scores(before, task['rows'])} |  |")
        for method, own in task["methods"].items():
            sizes = f"{own['trainable_parameters']:,} | {own['adapter_bytes'] / 1e3:,.0f} kB"
            scores = _scores(own["metrics"], task["rows"])
            minutes = f"{own['train_seconds'] / 60:.1f} min"
            lines.append(f"| {name} | `{method}` | {own['lr']:g} | {sizes} | {scores} | {minutes} |")
    lines += [
        "",
        "Exact match, times 100, ± its standard error for that number of rows, and perplexity of the reference "
        "answers. One seed; every method sees the same rows in the same order. mirror-scale and LoRA chose between "
        "two rates by the loss on the commonsense rows scored here; the others had one rate.",
    ]
    for name, task in found.items():
        env = task["environment"]
        lines += ["", f"{name}: {task['steps']} steps of 8 rows, {task['rows']} rows answered; {env.get('device')}, "
                  f"torch {env.get('torch')}. `{task['command']}`"]  # fmt: skip
    return "\n".join(lines) + "\n"


def _scores(metrics: dict[str, float], rows: int) -> str:
    share = metrics["exact_match"]
    error = math.sqrt(max(share * (1 - share), 1 / rows / 4) / rows)
    return f"{metrics['perplexity']:.2f} | {100 * share:.1f} ± {100 * error:.1f}"


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = command_line(__doc__, has_folder=True)
    parser.add_argument("--data", type=Path, help="the rows, see tests/bench/real_hub.py")
    parser.add_argument("--model", type=Path, help="folder of the weights; those of tests/bench/assets.py by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, help="of 8 rows, in place of a task's own")
    parser.add_argument("--rows", type=int, help="that are answered, in place of a task's own")
    parser.add_argument("--only", nargs="+", choices=TASKS, default=(), metavar="TASK")
    parser.add_argument("--list", action="store_true", help="print the commands")
    parser.add_argument("--report", action="store_true", help="train nothing")
    options = parser.parse_args(words)
    options.folder = options.folder.absolute()
    return options


def main() -> None:
    """Run what is missing; write the table, also when it is interrupted."""
    options = parse()
    if options.list:
        for name in options.only or TASKS:
            sys.stdout.write(f"mirrortune {' '.join(command(name, options.folder, options))}\n")
        return
    try:
        if options.report:
            for name, task in TASKS.items():
                refresh(options.folder / name, task.recipe, command(name, options.folder, options))
        else:
            source = data_folder(options.data)
            if source is None:
                raise SystemExit(f"no rows: name their folder with --data, or set {FOLDER_VARIABLE}")
            run(options, source)
    finally:
        if found := read(options.folder):
            write_and_print(options.output, found, table(found))


if __name__ == "__main__":
    main()
