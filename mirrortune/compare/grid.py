# SPDX-License-Identifier: Apache-2.0
"""The grid of a comparison (tasks, methods, learning rates, seeds), and which of its cells to run next.

The next cells are a function of the grid and the finished cells alone, so that a comparison can be interrupted and
continued anywhere. Imports no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mirrortune.adapters.methods import preset
from mirrortune.config import strict_yaml
from mirrortune.config.schema import AdapterSection, Recipe
from mirrortune.errors import ConfigError

Score = tuple[float, float]
"""Quality of a run, larger is better: its selection metric and its negated validation loss, in the order of
``ChooseBy``; the second breaks ties."""
ChooseBy = Literal["score", "loss"]

_WHERE = "--methods"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A method of a comparison, with its settings.

    Attributes:
        label: as given by the user, such as ``lora:rank=8``.
        settings: recipe settings over the task's recipe, by dotted key.
        lr_key: the learning rate to tune: the adapter's, or the head's if nothing else is trained.
        lrs: learning rates to try first, ascending.
    """

    label: str
    settings: dict[str, Any]
    lr_key: str
    lrs: tuple[float, ...]


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """A run of the grid."""

    task: str
    label: str
    lr: float
    seed: int

    def folder(self, root: Path) -> Path:
        """Return the run's directory."""
        return root / "cells" / slug(self.task) / slug(self.label) / f"lr-{self.lr:.0e}" / f"seed-{self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The runs of a comparison.

    Attributes:
        tasks: names of the tasks (recipes), in order.
        contenders: methods, in order; the others are tested against the first.
        seeds: of the reported runs.
        tune_seeds: of the runs that choose a learning rate; the first ones of ``seeds``.
        extensions: how many learning rates may be added while the best one lies at the edge of the grid.
        choose_by: what ranks learning rates, the task's metric or the validation loss; the other breaks ties.
    """

    tasks: tuple[str, ...]
    contenders: tuple[Contender, ...]
    seeds: tuple[int, ...]
    tune_seeds: tuple[int, ...]
    extensions: int
    choose_by: ChooseBy = "score"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The state of one method on one task.

    Attributes:
        lr: the best learning rate so far; None while tuning runs are missing.
        scores: mean score of each learning rate whose tuning runs have finished; -inf for one that diverged.
        missing: cells to run next, in order.
        is_at_edge: whether the best one is the lowest or highest that was tried.
    """

    lr: float | None
    scores: dict[float, Score]
    missing: tuple[Cell, ...]
    is_at_edge: bool


def parse_contender(word: str, base_head_lr: float, lr_grid: str | None = None) -> Contender:
    """Parse a method from the command line: ``NAME`` or ``NAME:key=value:...``.

    A key is a field of the recipe's adapter section (``rank``), a dotted recipe key (``train.epochs``), ``lr`` (rates
    to try, ``1e-3/3e-3``), or an option of the method (``scale_top_k``).

    Args:
        word: one of ``--methods``.
        base_head_lr: the recipe's learning rate of the head, the default for methods that train nothing else.
        lr_grid: learning rates for methods that name none; None for those around each method's default.

    Raises:
        ConfigError: an unknown method, or a part that is not ``key=value``.
    """
    name, *parts = word.split(":")
    chosen = preset(name, _WHERE)
    settings: dict[str, Any] = {"adapter.method": name}
    lrs: tuple[float, ...] = ()
    for part in parts:
        key, sign, text = part.partition("=")
        if not sign or not key:
            raise ConfigError(_WHERE, f"'{part}' in '{word}'", allowed="NAME:key=value, such as lora:rank=8")
        if key == "lr":
            lrs = parse_lrs(text, f"{_WHERE} {word}")
            continue
        dotted = key if "." in key else f"adapter.{'' if key in AdapterSection.model_fields else 'options.'}{key}"
        if dotted in settings:
            raise ConfigError(_WHERE, f"'{word}' sets {dotted} twice", fix="Keep one of them")
        settings[dotted] = strict_yaml.parse_scalar(text, f"{_WHERE} {word}")
    lr_key, default = ("train.head_lr", base_head_lr) if chosen.is_head_only else ("train.lr", chosen.lr)
    if not lrs:
        lrs = parse_lrs(lr_grid) if lr_grid is not None else around(float(settings.get(lr_key, default)))
    return Contender(label=word, settings=settings, lr_key=lr_key, lrs=lrs)


def parse_lrs(text: str, where: str = "--lr-grid") -> tuple[float, ...]:
    """Parse learning rates such as ``1e-3/3e-3`` or ``1e-3,3e-3``; return them ascending.

    Raises:
        ConfigError: not numbers, or not above 0.
    """
    try:
        found = sorted({float(word) for word in re.split(r"[/,]", text)})
    except ValueError:
        found = []
    if not found or not all(0 < lr < math.inf for lr in found):
        raise ConfigError(where, f"learning rates {text!r}", allowed="numbers above 0, such as 1e-3,3e-3,1e-2")
    return tuple(found)


def around(lr: float) -> tuple[float, float, float]:
    """Return ``lr``, rounded to the ladder 1, 3, 10, 30, ..., between its neighbours there."""
    return step_from(lr, -1), step_from(lr, 0), step_from(lr, 1)


def step_from(lr: float, steps: int) -> float:
    """Return the rate ``steps`` rungs from the one nearest to ``lr`` on the ladder ..., 1e-3, 3e-3, 1e-2, ..."""
    rung = round(2 * math.log10(lr)) + steps
    return float(f"{'1' if rung % 2 == 0 else '3'}e{math.floor(rung / 2)}")


def choose(grid: Grid, task: str, contender: Contender, score: Callable[[Cell], Score | None]) -> Chosen:
    """Choose the learning rate of a method on a task, as far as the finished cells allow.

    Args:
        grid: of the comparison.
        task: one of its tasks.
        contender: one of its methods.
        score: returns the score of a cell; None if it has not finished.
    """
    lrs = list(contender.lrs)
    for added in range(grid.extensions + 1):
        scores = {lr: _mean_score(grid, task, contender, lr, score) for lr in lrs}
        missing = [c for lr in lrs for c in _cells(task, contender, lr, grid.tune_seeds) if score(c) is None]
        if missing:
            return Chosen(lr=None, scores=_known(scores), missing=tuple(missing), is_at_edge=False)
        known = _known(scores)
        # Of two rates with equal scores the lower: it changed the model less.
        best = max(sorted(known), key=lambda lr: known[lr])
        is_at_edge = best in (min(lrs), max(lrs))
        if not is_at_edge or added == grid.extensions:
            break
        lrs.append(step_from(best, 1 if best == max(lrs) and len(lrs) > 1 else -1))
    reported = [c for c in _cells(task, contender, best, grid.seeds) if score(c) is None]
    return Chosen(lr=best, scores=known, missing=tuple(reported), is_at_edge=is_at_edge)


def next_cells(grid: Grid, score: Callable[[Cell], Score | None]) -> list[Cell]:
    """Return every cell that can run now, in order; empty if the comparison is complete."""
    return [c for task in grid.tasks for who in grid.contenders for c in choose(grid, task, who, score).missing]


def make_grid(
    recipes: Mapping[str, Recipe],
    methods: str,
    *,
    seeds: int,
    tune_seeds: int,
    choose_by: ChooseBy = "score",
    lr_grid: str | None,
    extensions: int,
) -> Grid:
    """Build the grid from the options of ``mirrortune compare``.

    Raises:
        ConfigError: all problems at once.
    """
    head_lr = next(iter(recipes.values())).train.head_lr
    contenders, errors = [], []
    for word in methods.split(","):
        try:
            contenders.append(parse_contender(word.strip(), head_lr, lr_grid))
        except ConfigError as error:
            errors.append(error)
    labels = [c.label for c in contenders]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        errors.append(ConfigError(_WHERE, f"{', '.join(twice)} named twice", fix="Name each once"))
    if tune_seeds > seeds:
        errors.append(ConfigError("--tune-seeds", f"got {tune_seeds}", allowed=f"1 to {seeds}, the number of seeds"))
    if errors:
        raise ConfigError.several(errors)
    return Grid(
        tasks=tuple(recipes),
        contenders=tuple(contenders),
        seeds=tuple(range(seeds)),
        tune_seeds=tuple(range(tune_seeds)),
        choose_by=choose_by,
        extensions=extensions,
    )


def slug(name: str) -> str:
    """Return a name for a folder: ``lora:rank=8`` becomes ``lora-rank-8``."""
    return re.sub(r"[^A-Za-z0-9.+_]+", "-", name).strip("-")


def _cells(task: str, contender: Contender, lr: float, seeds: Sequence[int]) -> list[Cell]:
    return [Cell(task, contender.label, lr, seed) for seed in seeds]


def _mean_score(
    grid: Grid, task: str, contender: Contender, lr: float, score: Callable[[Cell], Score | None]
) -> Score | None:
    found = [score(cell) for cell in _cells(task, contender, lr, grid.tune_seeds)]
    known = [s for s in found if s is not None]
    if len(known) < len(found):
        return None
    return sum(s[0] for s in known) / len(known), sum(s[1] for s in known) / len(known)


def _known(scores: Mapping[float, Score | None]) -> dict[float, Score]:
    return {lr: value for lr, value in sorted(scores.items()) if value is not None}
