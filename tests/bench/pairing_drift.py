# SPDX-License-Identifier: Apache-2.0
"""Why pairs that are matched to gradients do or do not win: how the gradient drifts, and what pairs chosen anew bring.

    python -m tests.bench.pairing_drift FOLDER -o tests/bench/results/pairing-drift
    python -m tests.bench.pairing_drift FOLDER --recipe mine.yaml --steps 20 --seeds 1

Two parts, on the movie sentences by default. FOLDER keeps what was trained, so that a run that was stopped goes on.

- Drift: a head is trained alone, then mirror pairs for a quarter of ``--steps`` and for all of them, at a constant
  rate, and each is merged. For a weight W with gradient G, A = (U' G)(U' W)' - its transpose is the gradient of all
  rotations in the basis U of the weights of the beginning, in units of movement, in float64 from float32 gradients.
  Said are the cosines between them, over two disjoint halves of the batches (so that 1 would be reached by an estimate
  without noise alone), and how much squared gradient pairs of each kind carry, in units of mirror pairs.
- Anew: a method is trained for ``--steps`` at a constant rate and merged, and a second adapter of the same method is
  put on the result for as many steps with a decaying rate. ``adaptive`` chooses its pairs anew there, ``mirror`` and
  ``random`` get what else the second start brings: a fresh basis, a fresh optimizer and the warm-up.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from mirrortune.adapters.core import even_steps, plane_strengths
from mirrortune.adapters.pairings import rules
from mirrortune.adapters.pairings.matching import match
from mirrortune.config import strict_yaml
from mirrortune.config.recipe import Layer, resolve
from mirrortune.data.loader import epoch_batches, forward
from mirrortune.runs.checks import unpack
from mirrortune.runs.job import assemble
from mirrortune.system.console import Reporter
from tests.bench.contestants import hardware, versions
from tests.bench.output import command_line, write_and_print

METHODS = ("adaptive", "mirror", "random")
CONSTANT = "train.schedule=constant"


def train(place: Path, options: argparse.Namespace, *words: str, base: Path | None = None) -> Path:
    """Train, merge, and return the run; what is there already is kept."""
    merged = place.with_name(f"{place.name}-merged")
    if not (merged / "config.json").exists():
        model = ["-m", str(base)] if base else []
        common = [
            "--precision",
            options.precision,
            "eval.protocol=split-dev",
            f"train.eval_every_steps={options.steps}",
        ]
        for command in (
            ["train", options.recipe, *options.words, *common, *model, *words, "--overwrite", "-o", str(place)],
            ["merge", str(place), "-o", str(merged), "--overwrite"],
        ):
            subprocess.run([sys.executable, "-m", "mirrortune", *command, "-q"], check=True, stdout=subprocess.DEVNULL)
    return place


def gradients(
    run: Path, basis: dict[str, tuple[Tensor, Tensor]], job: Any, counts: Sequence[int]
) -> list[dict[str, Tensor]]:
    """Gradients of all planes, layer -> (R, R) antisymmetric, of so many batches each."""
    model = AutoModelForSequenceClassification.from_pretrained(f"{run}-merged").eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.removesuffix(".weight") in basis)
    examples, rows = job.train, job.recipe.train.batch_size
    batches = iter(epoch_batches(examples.lengths, rows, 11, 0))
    found = []
    for count in counts:  # one after the other in one order of the rows, so that no row is in two
        chosen = list(itertools.islice(batches, count))
        if len(chosen) < count:
            raise SystemExit(f"{sum(counts)} batches of {rows} rows are needed: take fewer (--batches), or more rows")
        for batch in chosen:
            inputs, outputs, targets = forward(model, examples.batch(batch), torch.device("cpu"))
            total, items = job.task.loss(inputs, outputs, targets)
            torch.autograd.backward(total / items / len(chosen))
        planes = {}
        for name, (U, S) in basis.items():
            weight = model.get_submodule(name).weight
            turned = (U.T @ weight.grad.double()) @ (U.T @ weight.detach().double()).T
            planes[name] = (turned - turned.T) * even_steps(plane_strengths(S), S)
            weight.grad = None
        found.append(planes)
    return found


def carried(pairs: dict[str, Tensor], planes: dict[str, Tensor]) -> float:
    """Squared gradient of the pairs, over all layers."""
    return sum(planes[n][p.reshape(-1, 2).unbind(1)].square().sum().item() for n, p in pairs.items())


def drift(place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Cosines, and what pairs carry."""
    runs = {"start": train(place / "head", options, "--method", "none", "--max-steps", "66", CONSTANT)}
    for steps in (options.steps // 4, options.steps):
        words = ["--method", "mirror", "--lr", options.lr, "--max-steps", str(steps)]
        runs[f"{steps} steps"] = train(place / f"mirror-{steps}", options, *words, CONSTANT)
    text = (runs[f"{options.steps} steps"] / "recipe.yaml").read_text(encoding="utf-8")
    recipe = resolve([Layer(values=strict_yaml.load(text, "recipe")[0], origin="recipe")]).recipe
    job = assemble(unpack(recipe), Reporter(verbosity=-1))
    first = AutoModelForSequenceClassification.from_pretrained(f"{runs['start']}-merged")
    basis = {}
    for name in job.plan.targets.layers:
        U, S, _ = torch.linalg.svd(first.get_submodule(name).weight.detach().double(), full_matrices=False)
        basis[name] = (U, S)
    few, many = options.batches
    found = {point: gradients(run, basis, job, (few, many, many)) for point, run in runs.items()}
    flat = {point: [torch.cat([g.flatten() for g in half.values()]) for half in f[1:]] for point, f in found.items()}
    cosines = {
        f"{a} and {b}": torch.nn.functional.cosine_similarity(flat[a][0], flat[b][1], dim=0).item()
        for a, b in itertools.combinations_with_replacement(flat, 2)
    }
    random = torch.Generator().manual_seed(0)
    kinds = {name: {n: getattr(rules, name)(len(S), random) for n, (_, S) in basis.items()}
             for name in ("mirror", "random")}  # fmt: skip
    for point, measured in found.items():
        for count, planes in zip(options.batches, measured, strict=False):
            kinds[f"matched at {point}, {count} batches"] = {n: match(g.abs()) for n, g in planes.items()}
    shares = {point: {kind: carried(pairs, f[2]) / carried(kinds["mirror"], f[2]) for kind, pairs in kinds.items()}
              for point, f in found.items()}  # fmt: skip
    return {"cosines": cosines, "squared gradient, of mirror pairs": shares}


def anew(place: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Loss and score on validation rows after both halves, for each method and seed."""

    def both(method: str, seed: int) -> dict[str, Any]:
        words = ["--method", method, "--lr", options.lr, "--max-steps", str(options.steps)]
        one = train(place / f"{method}-{seed}-1", options, *words, "--seed", str(seed), CONSTANT)
        base, again = Path(f"{one}-merged"), f"{seed + 100}"
        two = train(place / f"{method}-{seed}-2", options, *words, "--seed", again, base=base)
        halves = [json.loads((run / "results.json").read_text(encoding="utf-8"))["metrics"] for run in (one, two)]
        return {"method": method, "seed": seed, "halves": halves}

    with ThreadPoolExecutor(options.jobs) as pool:
        cells = list(itertools.product(options.methods, range(options.seeds)))
        return list(pool.map(lambda cell: both(*cell), cells))


def table(found: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = []
    if "drift" in found:
        lines += ["| gradients at | cosine |", "|---|---|"]
        lines += [f"| {pair} | {cosine:.2f} |" for pair, cosine in found["drift"]["cosines"].items()]
        shares = found["drift"]["squared gradient, of mirror pairs"]
        lines += ["", f"| squared gradient carried by pairs, of mirror pairs | {' | '.join(shares)} |",
                  "|" + "---|" * (1 + len(shares))]  # fmt: skip
        for kind in next(iter(shares.values())):
            lines.append(f"| {kind} | {' | '.join(f'{share[kind]:.2f}' for share in shares.values())} |")
        lines.append("")
    if found["anew"]:
        names = [n for n in found["anew"][0]["halves"][0] if n != "loss"]
        lines += [f"| method | loss, first half | loss, second half | {' | '.join(f'{n}, end' for n in names)} |",
                  "|" + "---|" * (3 + len(names))]  # fmt: skip
        for method in dict.fromkeys(cell["method"] for cell in found["anew"]):
            cells = [cell["halves"] for cell in found["anew"] if cell["method"] == method]
            said = [spread([half[i]["loss"] for half in cells]) for i in (0, 1)]
            said += [spread([half[1][name] for half in cells]) for name in names]
            lines.append(f"| {method} | {' | '.join(said)} |")
        lines.append("")
    made = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
    said_seeds = f"Mean and standard deviation over {found['seeds']} seeds. " if found["anew"] else ""
    lines.append(f"{said_seeds}{found['steps']} steps each half, rate {found['lr']}. {found['hardware']}; {made}.")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("place", type=Path, help="folder of what is trained")
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--words", nargs="*", default=["data.max_train_rows=null"], help="settings over the recipe")
    parser.add_argument("--steps", type=int, default=132, help="of each half")
    parser.add_argument("--lr", default="2e-2")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--batches", type=int, nargs=2, default=(8, 40), metavar=("FEW", "MANY"),
                        help="of which gradients are measured: as adaptive takes by default, and more")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time in the second part")
    parser.add_argument("--parts", nargs="+", choices=("drift", "anew"), default=("drift", "anew"))
    return parser.parse_args(words)


def main() -> None:
    """Measure, write, print."""
    options = parse()
    options.place.mkdir(parents=True, exist_ok=True)
    found = {"recipe": options.recipe, "steps": options.steps, "lr": options.lr, "seeds": options.seeds,
             "hardware": hardware("cpu"), "versions": versions(),
             "anew": anew(options.place, options) if "anew" in options.parts else []}  # fmt: skip
    if "drift" in options.parts:
        found["drift"] = drift(options.place, options)
    write_and_print(options.output, found, table(found))


if __name__ == "__main__":
    main()
