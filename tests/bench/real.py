# SPDX-License-Identifier: Apache-2.0
"""The poster's comparisons on real data: tasks by methods by seeds, all through ``mirrortune compare``.

    python -m tests.bench.real FOLDER                        the next missing run of the plan, again and again
    python -m tests.bench.real FOLDER --device cuda          the same on a GPU, with the recipes' own epochs (--jobs 6)
    python -m tests.bench.real FOLDER --only rte trec        some tasks; --methods svft psoft: some methods
    python -m tests.bench.real FOLDER --kept RESULTS.json    only what that report of earlier runs lacks, beside it
    python -m tests.bench.real FOLDER --list                 the plan: commands in order; ? is a rate yet to be chosen
    python -m tests.bench.real FOLDER --report -o OUTPUT     tables and figures of the finished runs
    python -m tests.bench.real FOLDER --report --spectra trec -o OUTPUT    with the spectra of one task's adapters

FOLDER gets a comparison for each task, whose finished runs are kept: the same command continues. Methods of the first
wave run on every task before those of the second, so that a table of few methods is whole first; inside a task the
methods follow each other, each with all its seeds. TREC chooses each method's learning rate by the score of its first
seed: the rate that a larger comparison has chosen for the same model (``tests/bench/results``), or three times it,
since short runs want higher ones. (Not by the loss: it is as low at 1e-1 as at 3e-2 for mirror on TREC, where the
accuracy is lower.) The other texts take the rate that TREC has chosen (other pairs that of mirror pairs, so that
nothing but the pairs differs) or try rates of their own where it is too high, images the rate of Fashion-MNIST's
comparison, which has runs as short, or of a choice between it and a lower one (``tests/bench/results/image-rates``).
The data is that of ``tests/bench/real_hub.py``; MiniLM-L6 comes from a package, DINOv2-small from
``tests/bench/assets.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mirrortune.adapters.methods import preset
from mirrortune.compare.grid import ChooseBy, make_grid, slug, step_from
from mirrortune.compare.report import write_report as write_comparison
from mirrortune.compare.run import Comparison
from mirrortune.config.recipe import read_saved_recipe
from mirrortune.system.console import Reporter
from tests.bench.assets import build
from tests.bench.end_to_end import MODEL
from tests.bench.output import command_line
from tests.bench.real_claims import contrasts, spectra
from tests.bench.real_hub import FOLDER_VARIABLE, data_folder, real_hub
from tests.bench.real_report import Found, write_report
from tests.hub_fixtures import client_env

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
VISION = "dinov2-small"
ADAPTIVE_SCALE = "adaptive:scale_top_k=all:unit=weight"
"""``mirror-scale`` with adaptive pairs."""
WAVES: tuple[tuple[str, ...], ...] = (
    ("mirror", "mirror-scale", "svft", "lora:rank=8", "lora-sb", "none"),
    ("adaptive", "neighbor", "random", "adaptive:scale_top_k=all", ADAPTIVE_SCALE, "psoft"),
    ("mirror:unit=angle", "neighbor:unit=angle", "random:unit=angle"),
    ("scale", "lora:rank=1", "road", "lora-xs", "full", "mirror:scale_top_k=all"),
)
ORDER = tuple(method for wave in WAVES for method in wave)
_SHORT = ("train.max_steps=160", "eval.before=false")
_WHOLE = ("eval.protocol=dev-best", "eval.report_splits=[validation]", "train.eval_every_steps=100000")
"""For tasks whose test labels are not public: nothing is chosen, since the model is scored once, after the last step,
and the whole validation split is reported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task of the table.

    Attributes:
        recipe: shipped.
        tuned_on: the task whose learning rates it takes; its own name for one that chooses them, None for those of the
            comparisons that are kept.
        lrs: learning rates that a method tries here in place of the one of ``tuned_on``, which is too high for it.
        words: settings on every device.
        cpu: settings that make it fit two slow cores, in place of the recipe's epochs.
    """

    recipe: str
    tuned_on: str | None = "trec"
    lrs: Mapping[str, str] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    cpu: tuple[str, ...] = _SHORT

    @property
    def is_text(self) -> bool:
        """Whether its model is MiniLM-L6."""
        return not self.recipe.startswith("vision/")


def _image(recipe: str, *words: str) -> Task:
    return Task(recipe=recipe, tuned_on=None, words=("data.image_size=56", "train.precision=bf16", *words))


TASKS = {
    "trec": Task(recipe="trec"),
    "stsb": Task(
        recipe="glue/stsb",
        lrs={"lora:rank=8": "0.0003/0.001", "lora:rank=1": "0.001/0.003", "psoft": "0.001", "none": "1"},
        cpu=("train.max_steps=360", "eval.before=false"),
    ),
    "mrpc": Task(
        recipe="glue/mrpc",
        lrs={"lora:rank=8": "0.001/0.003", "lora:rank=1": "0.003/0.01"},
        cpu=("train.max_steps=230", "eval.before=false"),
    ),
    "sst2": Task(recipe="glue/sst2", words=(*_WHOLE, "data.max_train_rows=6000")),
    "cola": Task(
        recipe="glue/cola",
        lrs={
            "mirror": "0.01/0.03",
            "mirror-scale": "0.01/0.02",
            "svft": "0.01/0.03",
            "lora:rank=8": "0.001/0.003",
            "lora:rank=1": "0.003/0.01",
        },
        words=_WHOLE,
        cpu=("train.max_steps=800", "eval.before=false"),
    ),
    "rte": Task(recipe="glue/rte", words=_WHOLE, cpu=(*_SHORT, "data.max_length=128")),
    "flowers": _image("vision/flowers102", "train.eval_every_steps=80"),
    "dtd": _image("vision/dtd"),
    "cifar100": _image("vision/cifar100", "data.max_train_rows=1000"),
}
"""Of each kind, those first whose rows tell small differences apart: RTE reports 277 rows, where accuracies have a
standard error of 3 points, MRPC 1,725. After 160 steps, models predict a single class of MRPC and CoLA, and on STS-B
some have not started to learn: these train for two or three epochs."""


def plan(only: Sequence[str] = ()) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield (task, methods) of every comparison in its order, with the tasks that the chosen ones are tuned on."""
    wanted = set(only or TASKS)
    wanted |= {tuned for name in wanted if (tuned := TASKS[name].tuned_on)}
    methods: tuple[str, ...] = ()
    for wave in WAVES:
        methods += wave
        yield from ((name, methods) for name in TASKS if name in wanted)


def kept_rates(task: Task) -> dict[str, float]:
    """Return the learning rate of each method, as chosen for the model of a task by the comparisons that are kept.

    Adaptive pairs with scales were in none and take the rate of mirror pairs with scales, rotations in radians (the
    published unit) that of the same pairs in units of movement, mirror-scale and LoRA-SB their defaults, and
    mirror-scale with adaptive pairs that of mirror-scale. On images, some methods have chosen between two rates by
    held-out halves (``tests/bench/results/image-rates``).
    """
    found: dict[str, float] = {}
    for name in ("movie-sentences",) if task.is_text else ("movie-sentences", "fashion-mnist"):
        for folder in (RESULTS / "rates" / name, RESULTS / name):
            (own,) = json.loads((folder / "results.json").read_text(encoding="utf-8"))["tasks"].values()
            found |= {_plain(label): method["lr"] for label, method in own["methods"].items()}
    found["adaptive:scale_top_k=all"] = found["mirror:scale_top_k=all"]
    found |= {f"{pairing}:unit=angle": found[pairing] for pairing in ("mirror", "neighbor", "random")}
    kind = "text-classification" if task.is_text else "image-classification"
    found |= {name: preset(name).default_lr(kind) for name in ("mirror-scale", "lora-sb")}
    if not task.is_text:
        found |= json.loads((RESULTS / "image-rates" / "results.json").read_text(encoding="utf-8"))["chosen"]
    return found | {ADAPTIVE_SCALE: found["mirror-scale"]}


def rates(name: str, methods: Sequence[str], folder: Path, earlier: Found) -> dict[str, str]:
    """Return the learning rates that each method tries on a task: two on one that chooses, the chosen one on others."""
    task = TASKS[name]
    kept = kept_rates(task)
    if task.tuned_on is None:
        return {method: f"{kept[method]:g}" for method in methods}
    if name == task.tuned_on:
        return {method: f"{kept[method]:g}/{step_from(kept[method], 1):g}" for method in methods}
    file = folder / task.tuned_on / "results.json"
    own = json.loads(file.read_text(encoding="utf-8"))["tasks"][TASKS[task.tuned_on].recipe] if file.is_file() else {}
    both = {**own.get("methods", {}), **earlier.get(task.tuned_on, {}).get("methods", {})}
    chosen = {_plain(label): f"{found['lr']:g}" for label, found in both.items() if found["lr"]}
    tried: dict[str, str] = {}
    for method in methods:
        mirror = _with_mirror_pairs(method)
        tried[method] = task.lrs.get(method) or task.lrs.get(mirror) or chosen.get(mirror, "?")
    return tried


def _with_mirror_pairs(method: str) -> str:
    pairing, *options = method.split(":")
    if method == ADAPTIVE_SCALE:
        return "mirror-scale"
    return ":".join(("mirror" if pairing in ("neighbor", "random", "adaptive") else pairing, *options))


def command(name: str, methods: Sequence[str], folder: Path, options: argparse.Namespace) -> list[str]:
    """Return the words of a comparison after ``mirrortune``."""
    task = TASKS[name]
    tried = rates(name, methods, folder, options.earlier)
    model = MODEL if task.is_text else str((options.assets or folder / "assets") / VISION)
    words = [*task.words, *(task.cpu if options.device == "cpu" else ())]
    words += ["--jobs", str(options.jobs)] if options.jobs else []
    return ["compare", task.recipe, *words, "-m", model, "--seeds", str(options.seeds), "--choose-by", "score",
            "--methods", ",".join(f"{method}:lr={tried[method]}" for method in methods), "--extensions", "0",
            "-o", str(folder / name)]  # fmt: skip


def missing(name: str, methods: Sequence[str], options: argparse.Namespace) -> list[str]:
    """Return those of the methods that are asked for and that the report of earlier runs has not finished."""
    finished = {label for label, own in options.earlier.get(name, {}).get("methods", {}).items()
                if len(own["seeds"]) >= options.seeds}  # fmt: skip
    return [method for method in methods if method in (options.methods or methods) and method not in finished]


def environment(endpoint: str, folder: Path, device: str) -> dict[str, str]:
    """Return the environment of a comparison: the Hub of the rows, caches in the folder, this checkout's code."""
    env = {**client_env(endpoint, folder / "hub-cache"), "MIRRORTUNE_CACHE": str(folder / "cache")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
    return env | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})


def run(options: argparse.Namespace, source: Path) -> None:
    """Run every comparison of the plan; stop at the first that fails or is interrupted."""
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    with real_hub(source) as hub:
        for name, planned in plan(options.only):
            methods = missing(name, planned, options)
            if not methods:
                continue
            if not TASKS[name].is_text and options.assets is None:
                build(folder / "assets", [VISION])
            words = command(name, methods, folder, options)
            env = environment(hub.endpoint, folder, options.device)
            python = [sys.executable, "-m", "mirrortune"]
            done = subprocess.run([*python, *words], check=False, env=env, cwd=folder, stdout=subprocess.DEVNULL)
            if done.returncode:
                raise SystemExit(done.returncode)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = command_line(__doc__, has_folder=True, output="folder of the tables and figures; FOLDER/report by default")
    parser.add_argument("--data", type=Path, help="the rows, see tests/bench/real_hub.py")
    parser.add_argument("--assets", type=Path, help="folder of tests/bench/assets.py; FOLDER/assets by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, help="runs at a time, such as 6 on a large GPU; one on each GPU by default")
    parser.add_argument("--only", nargs="+", choices=TASKS, default=(), metavar="TASK")
    parser.add_argument("--methods", nargs="+", default=(), metavar="METHOD")
    parser.add_argument("--kept", type=Path, metavar="RESULTS", help="results.json of earlier runs that are gone")
    parser.add_argument("--list", action="store_true", help="print the plan")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--spectra", choices=TASKS, metavar="TASK", help="with --report: analyze its adapters too")
    options = parser.parse_args(words)
    options.folder = options.folder.absolute()
    options.earlier = json.loads(options.kept.read_text(encoding="utf-8")) if options.kept else {}
    return options


def main() -> None:
    """Run what is missing; write tables and figures, also when it is interrupted."""
    options = parse()
    folder: Path = options.folder
    if options.list:
        for name, planned in plan(options.only):
            if methods := missing(name, planned, options):
                sys.stdout.write(f"mirrortune {' '.join(command(name, methods, folder, options))}\n")
        return
    output = options.output or folder / "report"
    files = {name: folder / name / "results.json" for name in TASKS}
    if options.report:
        for name, task in TASKS.items():
            known = rates(name, missing(name, ORDER, options), folder, options.earlier)
            methods = [method for method, tried in known.items() if tried != "?"]
            refresh(folder / name, task.recipe, command(name, methods, folder, options))
        report(files, folder, output, options.earlier, analysed=options.spectra)
        return
    source = data_folder(options.data)
    if source is None:
        raise SystemExit(f"no rows: name their folder with --data, or set {FOLDER_VARIABLE}")
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("torch sees no GPU here")
    try:
        run(options, source)
    finally:
        report(files, folder, output, options.earlier)


def refresh(root: Path, task: str, words: Sequence[str]) -> None:
    """Report the finished runs of a comparison in its ``results.json``, which one that still runs has not written.

    Args:
        root: folder of the comparison.
        task: the recipe's name.
        words: of its command, after ``mirrortune``.
    """
    file = root / "recipes" / f"{slug(task)}.yaml"
    if not file.is_file():
        return
    recipe = read_saved_recipe(file)
    methods, seeds, choose_by = (words[words.index(option) + 1] for option in ("--methods", "--seeds", "--choose-by"))
    by: ChooseBy = "loss" if choose_by == "loss" else "score"
    grid = make_grid({task: recipe}, methods, seeds=int(seeds), tune_seeds=1, choose_by=by, lr_grid=None, extensions=0)
    comparison = Comparison(root=root, grid=grid, recipes={task: recipe}, reporter=Reporter())
    write_comparison(comparison, f"mirrortune {shlex.join(words)}")


def report(files: dict[str, Path], folder: Path, output: Path, earlier: Found, *, analysed: str | None = None) -> None:
    """Write the tables and figures of what has finished, beside the kept comparisons of the same models."""
    found = merge(earlier, read(files))
    if not found:
        return
    write_report(found, folder, output)
    (output / "contrasts.md").write_text(contrasts({**found, **kept_comparisons()}), encoding="utf-8")
    if analysed in found:
        (output / "spectra.md").write_text(spectra(found, folder, analysed), encoding="utf-8")


def merge(earlier: Found, found: Found) -> Found:
    """Return the tasks of an earlier report with the methods that have finished since, in the order of the plan.

    The tests are those of the earlier report: to test a new method against the reference needs the answers of both to
    every row, and those of the earlier runs are gone.
    """
    merged: Found = {}
    for name in TASKS:
        old, new = earlier.get(name), found.get(name)
        if old is None or new is None:
            if own := old or new:
                merged[name] = own
            continue
        every = {**new["methods"]}
        for label, own in old["methods"].items():
            if label not in every or len(own["seeds"]) >= len(every[label]["seeds"]):
                every[label] = own
        places = {label: ORDER.index(label) if label in ORDER else len(ORDER) for label in every}
        merged[name] = {**old, "methods": {label: every[label] for label in sorted(every, key=places.__getitem__)}}
    return merged


def kept_comparisons() -> dict[str, dict[str, Any]]:
    """Return the comparisons that chose the learning rates, as further tasks for contrasts."""
    found = {}
    for name in ("movie-sentences", "fashion-mnist"):
        results = json.loads((RESULTS / name / "results.json").read_text(encoding="utf-8"))
        (own,) = results["tasks"].values()
        found[name] = {**own, "methods": {_plain(label): method for label, method in own["methods"].items()}}
    return found


def read(files: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Return the finished comparisons by task, without the rates in the names of methods."""
    found = {}
    for name, file in files.items():
        if not file.is_file():
            continue
        results = json.loads(file.read_text(encoding="utf-8"))
        own = results["tasks"][TASKS[name].recipe]
        if not own["splits"]:
            continue
        methods = {_plain(label): {**m, "label": label} for label, m in own["methods"].items() if m["seeds"]}
        tests = {split: [{**t, "label": _plain(t["label"])} for t in ts] for split, ts in own["tests"].items()}
        found[name] = {
            **own, "methods": methods, "tests": tests, "model": "text" if TASKS[name].is_text else "images",
            "environment": results["environment"], "command": results["command"].replace(f"{file.parents[1]}/", ""),
        }  # fmt: skip
    return found


def _plain(label: str) -> str:
    return ":".join(part for part in label.split(":") if not part.startswith("lr="))


if __name__ == "__main__":
    main()
