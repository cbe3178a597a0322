# SPDX-License-Identifier: Apache-2.0
"""Which learning rate of a method does well everywhere: the evidence behind the defaults, from finished comparisons.

    python -m tests.bench.rates "movie sentences=DIR" "clothes=DIR,DIR" -o tests/bench/results/rates

Each pair of model and task is a name and the folders that ``mirrortune compare`` wrote for it; a method with rates of
its own (``mirror:lr=2e-2``) joins the method. A cell is the validation
loss at that rate, on the rows for choosing, in units of the method's best on that pair, one number for each pair in
their order: 1.00 is the best, and a rate with small numbers throughout is a good default. ``least`` is the rate whose
worst pair is least above its best, among those that all pairs tried.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mirrortune.adapters.methods import preset
from tests.bench.output import command_line, write_and_print

_FAR = 2.0
"""Losses beyond so many times the best are not told apart."""


def read(pairs: Sequence[str]) -> dict[str, dict[str, dict[float, float]]]:
    """Method -> pair -> rate -> loss, in units of the best of that method on that pair."""
    found: dict[str, dict[str, dict[float, float]]] = {}
    for pair in pairs:
        name, _, folders = pair.partition("=")
        for folder in folders.split(","):
            results = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))
            (task,) = results["tasks"].values()
            for written, result in task["methods"].items():
                method = ":".join(part for part in written.split(":") if not part.startswith("lr="))
                losses = found.setdefault(method, {}).setdefault(name, {})
                losses |= {float(rate): judged["loss"] for rate, judged in result["tuning"].items()}
    return {
        method: {name: {r: loss / min(losses.values()) for r, loss in losses.items()} for name, losses in named.items()}
        for method, named in found.items()
    }


def least(by_pair: dict[str, dict[float, float]]) -> tuple[float, float] | None:
    """The rate whose worst pair is best, and how far that is above its own best."""
    shared = set.intersection(*(set(losses) for losses in by_pair.values()))
    worst = {rate: max(losses[rate] for losses in by_pair.values()) for rate in shared}
    return min(((rate, ratio) for rate, ratio in worst.items()), key=lambda found: found[1], default=None)


def rows(found: dict[str, dict[str, dict[float, float]]], pairs: Sequence[str]) -> list[dict[str, Any]]:
    """A row of the table for each method that more than one pair tried."""
    made = []
    for method, by_pair in found.items():
        if len(by_pair) < 2 or method.startswith("none"):
            continue
        made.append({"method": method, "default": preset(method.partition(":")[0]).lr, "least": least(by_pair),
                     "losses": {pair: by_pair.get(pair, {}) for pair in pairs}})  # fmt: skip
    return made


def table(made: list[dict[str, Any]], pairs: Sequence[str]) -> str:
    """The results in Markdown."""
    rates = sorted({rate for row in made for losses in row["losses"].values() for rate in losses})
    lines = [f"| method | {' | '.join(f'{rate:g}' for rate in rates)} | least | default |",
             "|" + "---|" * (len(rates) + 3)]  # fmt: skip
    for row in made:
        cells = []
        for rate in rates:
            ratios = [losses.get(rate) for losses in row["losses"].values()]
            cells.append(" ".join(map(shown, ratios)) if any(ratios) else "")
        best = "" if row["least"] is None else f"{row['least'][0]:g} ({row['least'][1]:.2f})"
        lines.append(f"| `{row['method']}` | {' | '.join(cells)} | {best} | {row['default']:g} |")
    lines += ["", f"Validation loss by learning rate, in units of the method's best: {', '.join(pairs)}."]
    return "\n".join(lines) + "\n"


def shown(ratio: float | None) -> str:
    """A loss in units of the best."""
    if ratio is None:
        return "-"
    return f"{ratio:.2f}" if ratio < _FAR else f">{_FAR:g}"


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("pairs", nargs="+", metavar="NAME=FOLDER,...", help="a pair of model and task")
    return parser.parse_args(words)


def main() -> None:
    """Read, write, print."""
    options = parse()
    names = [pair.partition("=")[0] for pair in options.pairs]
    made = rows(read(options.pairs), names)
    write_and_print(options.output, made, table(made, names))


if __name__ == "__main__":
    main()
