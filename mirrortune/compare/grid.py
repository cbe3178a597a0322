# SPDX-License-Identifier: Apache-2.0
"""Define the grid of a comparison (tasks, methods, learning rates, seeds) and choose which cells to run next.

The next cells depend only on the grid and the finished cells, so a comparison can be interrupted at any time and
continued later. Imports no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mirrortune.adapters.methods import preset
from mirrortune.config import strict_yaml
from mirrortune.config.recipe import flatten
from mirrortune.config.schema import AdapterSection, Recipe
from mirrortune.errors import ConfigError

Score = tuple[float, float]
"""Quality of a run, larger is better: the selection metric and the negated validation loss. ``ChooseBy`` decides which
comes first; the other breaks ties."""
ChooseBy = Literal["score", "loss"]

_WHERE = "--methods"

# Settings that methods may have of their own: they change no scored row, reference or metric. trust_remote_code has an
# error of its own.
_OWN = (
    "adapter", "train", "model.attention", "model.dropout", "model.dtype", "model.load_in", "model.trust_remote_code",
    "data.augment", "data.blank_text", "data.contained", "data.image_size", "data.max_seconds", "data.max_train_rows",
    "data.packing", "data.prefix", "data.shuffle_buffer", "eval.batch_size", "eval.before", "eval.samples",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A method of a comparison, with its settings.

    Attributes:
        label: method as given by the user, such as ``lora:rank=8``.
        settings: settings by dotted key that override the task's recipe.
        lr_key: dotted key of the learning rate to tune: that of the adapter, or of the head if only it is trained.
        lrs: learning rates to try first, in ascending order.
        lrs_of_tasks: those of tasks by name; ``lrs`` for tasks that are not among them.
    """

    label: str
    settings: dict[str, Any]
    lr_key: str
    lrs: tuple[float, ...]
    lrs_of_tasks: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def first_lrs(self, task: str) -> tuple[float, ...]:
        """Return the learning rates to try first on a task, in ascending order."""
        return self.lrs_of_tasks.get(task, self.lrs)


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """One run of the grid."""

    task: str
    label: str
    lr: float
    seed: int

    def folder(self, root: Path) -> Path:
        """Return the run directory of the cell."""
        return root / "cells" / slug(self.task) / slug(self.label) / lr_folder(self.lr) / f"seed-{self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """All runs of a comparison.

    Attributes:
        tasks: names of the tasks (recipes), in order.
        contenders: methods, in order; the first is the reference against which the others are tested.
        seeds: seeds of the reported runs.
        tune_seeds: seeds of the runs by which a learning rate is chosen; the first ones of ``seeds``.
        extensions: number of learning rates that may be added while the best one is at the edge of the grid.
        choose_by: criterion for the best learning rate: the task's metric or the validation loss; the other breaks
            ties.
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
        lr: best learning rate so far; None while tuning runs are missing.
        scores: mean score of each learning rate whose tuning runs have finished; -inf if one of them diverged.
        missing: cells to run next, in order.
        is_at_edge: ``lr`` is the lowest or highest learning rate that was tried.
    """

    lr: float | None
    scores: dict[float, Score]
    missing: tuple[Cell, ...]
    is_at_edge: bool


def parse_contender(word: str, base_head_lr: float, lr_grid: str | None = None, kind: str | None = None) -> Contender:
    """Parse a method from the command line: ``NAME`` or ``NAME:key=value:...``.

    A key is a field of the recipe's adapter section (``rank``), a dotted key of the recipe (``train.epochs``), ``lr``
    (learning rates to try, ``1e-3/3e-3``), or an option of the method (``scale_top_k``).

    Args:
        word: one item of ``--methods``.
        base_head_lr: learning rate of the head in the recipe, the default for methods that train only the head.
        lr_grid: learning rates for methods that set none; by default, rates around the default of each method.
        kind: kind of task, which may determine that default.

    Raises:
        ConfigError: the method is unknown, a part is not ``key=value``, or a key is not one that methods may differ in.
    """
    name, *parts = word.split(":")
    chosen = preset(name, _WHERE)
    lr_key, default = ("train.head_lr", base_head_lr) if chosen.is_head_only else ("train.lr", chosen.default_lr(kind))
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
        _check_key(word, dotted, [*settings, lr_key, "train.seed"])
        settings[dotted] = strict_yaml.parse_scalar(text, f"{_WHERE} {word}")
    if lrs and lr_key in settings:
        raise ConfigError(_WHERE, f"'{word}' sets both lr and {lr_key}", fix="Keep one of them")
    if not lrs and lr_grid is not None and lr_key not in settings:
        lrs = parse_lrs(lr_grid)
    elif not lrs:
        lrs = parse_lrs(str(settings.get(lr_key, default)), f"{_WHERE} {word}")
        lrs = around(lrs[0]) if len(lrs) == 1 else lrs
    return Contender(label=word, settings=settings, lr_key=lr_key, lrs=lrs)


def _check_key(word: str, dotted: str, known: Iterable[str]) -> None:
    """Check a dotted key of a method.

    Args:
        word: method as given by the user.
        dotted: key that it sets.
        known: keys that are set before, or by the comparison.

    Raises:
        ConfigError: methods that differ in the key could not be compared, or the key is a section of a key in ``known``
            or the reverse.
    """
    section, _, name = dotted.partition(".")
    if dotted == "train.seed":
        raise ConfigError(_WHERE, f"'{word}' sets {dotted}", fix="Use --seeds: every method runs with the same ones")
    own = (section, f"{section}.{name.partition('.')[0]}")
    if own[1] in flatten(Recipe()) and not any(key in _OWN for key in own):
        named = [key for key in _OWN if "." in key and key != "model.trust_remote_code"]
        allowed = f"settings of adapter and train, {', '.join(named)}"
        problem = f"'{word}' sets {own[1]}, so that it could be scored on other rows or in another way than the others"
        raise ConfigError(_WHERE, problem, allowed=allowed, fix="Set it for all methods, outside of --methods")
    for key in known:
        if key.startswith(f"{dotted}.") or dotted.startswith(f"{key}."):
            value, inside = sorted((key, dotted), key=len)
            raise ConfigError(_WHERE, f"'{word}' sets {value} both as a value and, in {inside}, as a section")


def parse_lrs(text: str, where: str = "--lr-grid") -> tuple[float, ...]:
    """Parse learning rates such as ``1e-3/3e-3`` or ``1e-3,3e-3`` and return them in ascending order.

    Raises:
        ConfigError: a rate is not a positive number.
    """
    try:
        found = sorted({float(word) for word in re.split(r"[/,]", text)})
    except ValueError:
        found = []
    if not found or not all(0 < lr < math.inf for lr in found):
        raise ConfigError(where, f"learning rates {text!r}", allowed="numbers above 0, such as 1e-3,3e-3,1e-2")
    return tuple(found)


def around(lr: float) -> tuple[float, float, float]:
    """Return ``lr`` between its neighbours on the ladder ..., 1e-3, 3e-3, 1e-2, ..."""
    return next_from(lr, -1), lr, next_from(lr, 1)


def step_from(lr: float, steps: int) -> float:
    """Return the rate ``steps`` rungs away from the rate nearest to ``lr`` on the ladder ..., 1e-3, 3e-3, 1e-2, ..."""
    rung = round(2 * math.log10(lr)) + steps
    return float(f"{'1' if rung % 2 == 0 else '3'}e{math.floor(rung / 2)}")


def next_from(lr: float, sign: Literal[-1, 1]) -> float:
    """Return the first rate above (1) or below (-1) ``lr`` on that ladder: of 2e-2, which lies between two, 3e-2."""
    nearest = step_from(lr, 0)
    return nearest if sign * (nearest - lr) > 0 else step_from(lr, sign)


def choose(grid: Grid, task: str, contender: Contender, score: Callable[[Cell], Score | None]) -> Chosen:
    """Choose the learning rate of a method on a task, as far as the finished cells allow.

    Args:
        grid: grid of the comparison.
        task: task of the grid.
        contender: method of the grid.
        score: returns the score of a cell, or None if it has not finished.
    """
    lrs = list(contender.first_lrs(task))
    for added in range(grid.extensions + 1):
        scores = {lr: _mean_score(grid, task, contender, lr, score) for lr in lrs}
        missing = [c for lr in lrs for c in _cells(task, contender, lr, grid.tune_seeds) if score(c) is None]
        if missing:
            return Chosen(lr=None, scores=_known(scores), missing=tuple(missing), is_at_edge=False)
        known = _known(scores)
        # If scores are equal, the lower rate wins, because it changes the model less.
        best = max(sorted(known), key=lambda lr: known[lr])
        is_at_edge = best in (min(lrs), max(lrs))
        if not is_at_edge or added == grid.extensions:
            break
        lrs.append(next_from(best, 1 if best == max(lrs) and len(lrs) > 1 else -1))
    reported = [c for c in _cells(task, contender, best, grid.seeds) if score(c) is None]
    return Chosen(lr=best, scores=known, missing=tuple(reported), is_at_edge=is_at_edge)


def next_cells(grid: Grid, score: Callable[[Cell], Score | None]) -> list[Cell]:
    """Return all cells that can run now, in order; empty if the comparison is complete."""
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
        ConfigError: options are not valid; all problems are reported together.
    """
    contenders, errors = [], []
    for word in methods.split(","):
        try:
            # Default rates depend on the head's rate and the kind of task, so each recipe has its own.
            parsed = {
                task: parse_contender(word.strip(), recipe.train.head_lr, lr_grid, recipe.task.kind)
                for task, recipe in recipes.items()
            }
            own = {task: contender.lrs for task, contender in parsed.items()}
            contenders.append(replace(next(iter(parsed.values())), lrs_of_tasks=own))
        except ConfigError as error:
            errors.append(error)
    labels = [c.label for c in contenders]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        errors.append(ConfigError(_WHERE, f"{', '.join(twice)} named twice", fix="Name each once"))
    errors += _one_folder_each(_WHERE, labels, "Leave one out, or write one in another way")
    errors += _one_folder_each("RECIPE", recipes, "Rename one of the files, or compare each with a folder of its own")
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


def _one_folder_each(where: str, names: Iterable[str], fix: str) -> list[ConfigError]:
    """Return an error for each two names whose runs would be in the same folder."""
    found: dict[str, str] = {}
    errors = []
    for name in names:
        if (other := found.setdefault(slug(name), name)) != name:
            problem = f"the runs of '{other}' and '{name}' would be in the same folder, '{slug(name)}'"
            errors.append(ConfigError(where, problem, fix=fix))
    return errors


def lr_folder(lr: float) -> str:
    """Name the folder of a learning rate, with as many digits as it needs: ``lr-1e-02``, ``lr-1.4e-02``."""
    written = (f"{lr:.{digits}e}" for digits in range(17))
    return f"lr-{next(text for text in written if float(text) == lr)}"


def shown_lr(lr: float) -> str:
    """Format a learning rate with as many digits as it needs, so that different rates never look the same."""
    return short if float(short := f"{lr:g}") == lr else repr(lr)


def slug(name: str) -> str:
    """Convert a label to a folder name: ``lora:rank=8`` becomes ``lora-rank-8``."""
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
