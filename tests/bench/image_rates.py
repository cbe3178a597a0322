# SPDX-License-Identifier: Apache-2.0
"""The choice between two learning rates on images, for the methods of ``tests/bench/real.py``.

    python -m tests.bench.image_rates [COMPARISON ...]

Adds the finished runs of comparisons of flowers, dtd or cifar100 that name the rate in the method
(``--methods svft:lr=0.01,svft:lr=0.03``) to ``tests/bench/results/image-rates``, chooses the rate with the higher mean
on the held-out halves of the tasks on which all rates of a method have run, and writes the table anew.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from tests.bench.real import RESULTS, TASKS

Scores = dict[str, dict[str, dict[str, dict[str, list[float]]]]]
"""Method, rate, task, split: the score of each seed."""
FOLDER = RESULTS / "image-rates"
CHOICE, TEST = "held-out half", "test"
_TASKS = tuple(name for name, task in TASKS.items() if not task.is_text)


def add(methods: Scores, comparison: dict[str, Any]) -> None:
    """Add the methods of a comparison's ``results.json`` to ``methods``."""
    for name in _TASKS:
        own = comparison["tasks"].get(TASKS[name].recipe, {"methods": {}})
        for label, found in own["methods"].items():
            method, _, rate = label.partition(":lr=")
            if found["seeds"]:
                scores = {split: found["reported"][split]["values"] for split in (CHOICE, TEST)}
                methods.setdefault(method, {}).setdefault(f"{float(rate):g}", {})[name] = scores


def shared(rates: dict[str, dict[str, Any]]) -> list[str]:
    """Return the tasks on which all rates of a method have run."""
    return [name for name in _TASKS if all(name in tasks for tasks in rates.values())]


def mean(tasks: dict[str, dict[str, list[float]]], names: Sequence[str], split: str) -> float:
    """Return the mean over tasks of the mean over seeds."""
    return fmean(fmean(tasks[name][split]) for name in names)


def choose(rates: dict[str, dict[str, Any]]) -> float:
    """Return the rate with the higher mean on the held-out halves of the shared tasks."""
    names = shared(rates)
    return float(max(rates, key=lambda rate: mean(rates[rate], names, CHOICE)))


def table(methods: Scores, chosen: dict[str, float]) -> str:
    """Return the table in Markdown."""
    heads = [f"{name}, {split}" for name in _TASKS for split in (CHOICE, TEST)]
    lines = [f"| method | lr | {' | '.join(heads)} | mean, {CHOICE} | mean, {TEST} |", "|" + "---|" * (len(heads) + 4)]
    for method, rates in methods.items():
        for rate, tasks in sorted(rates.items(), key=lambda item: float(item[0])):
            cells = [_cell(tasks, name, split) for name in _TASKS for split in (CHOICE, TEST)]
            whole = all(name in tasks for name in _TASKS)
            cells += [f"{100 * mean(tasks, _TASKS, split):.1f}" if whole else "" for split in (CHOICE, TEST)]
            star = " *" if float(rate) == chosen[method] else ""
            lines.append(f"| `{method}` | {rate}{star} | {' | '.join(cells)} |")
    lines += [
        "",
        "Accuracy, times 100, after 160 steps: mean of three seeds, with the standard deviation for test rows (600, "
        "300 and 4,000). * marks the chosen rate, with the higher mean on the held-out halves (353, 30 and 200 rows) "
        "of the tasks that have both rates; nothing else is chosen on those rows. The table of real tasks shows the "
        "chosen rates. torch 2.13.0+cpu.",
    ]
    return "\n".join(lines) + "\n"


def _cell(tasks: dict[str, dict[str, list[float]]], name: str, split: str) -> str:
    if name not in tasks:
        return ""
    values = [100 * value for value in tasks[name][split]]
    return f"{fmean(values):.1f}" if split == CHOICE else f"{fmean(values):.1f} ± {stdev(values):.1f}"


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The words of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparisons", nargs="*", type=Path, metavar="COMPARISON")
    return parser.parse_args(words)


def main() -> None:
    """Add comparisons, choose, and write."""
    options = parse()
    file = FOLDER / "results.json"
    methods: Scores = json.loads(file.read_text(encoding="utf-8"))["methods"]
    for comparison in options.comparisons:
        add(methods, json.loads((comparison / "results.json").read_text(encoding="utf-8")))
    chosen = {method: choose(rates) for method, rates in methods.items()}
    file.write_text(json.dumps({"chosen": chosen, "methods": methods}, indent=1) + "\n", encoding="utf-8")
    (FOLDER / "table.md").write_text(table(methods, chosen), encoding="utf-8")


if __name__ == "__main__":
    main()
