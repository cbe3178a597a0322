# SPDX-License-Identifier: Apache-2.0
"""Sweep the learning rate for about a minute and propose one (``train --find-lr``); no run is written."""

from __future__ import annotations

import shlex
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from mirrortune.config.recipe import Resolved
from mirrortune.errors import ConfigError
from mirrortune.models.load import checkpoint_activations
from mirrortune.reports import html
from mirrortune.reports.lr_page import sweep_drawing, sweep_lines, sweep_page
from mirrortune.runs.adapted_base import load_adapted_base
from mirrortune.runs.checks import RunSettings, inputs_of, unpack
from mirrortune.runs.job import Job, assemble
from mirrortune.runs.results import run_name
from mirrortune.system.console import Reporter
from mirrortune.system.distributed.processes import make_accelerator, seed_everything
from mirrortune.system.distributed.sharding import Sharding
from mirrortune.system.paths import local_path
from mirrortune.system.run_directory import RunDirectory
from mirrortune.training.lr_sweep import Proposal, Sweep, propose, sweep_rates
from mirrortune.training.trainer import Trainer

_STEPS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class FindLrResult:
    """The ``--json`` object of ``train --find-lr``.

    Attributes:
        lr: proposed learning rate; None if the loss never fell.
        sureness, reason: how reliable the proposal is, and why.
        steepest: rate at which the loss falls fastest.
        tenth_of_lowest: a tenth of the rate at which the loss is lowest.
        rates, losses: points of the sweep.
        report: path of the page.
    """

    lr: float | None
    sureness: str
    reason: str
    steepest: float | None
    tenth_of_lowest: float | None
    rates: list[float]
    losses: list[float]
    report: str


def find_lr(resolved: Resolved, reporter: Reporter, *, recipe_name: str | None) -> tuple[FindLrResult, list[str]]:
    """Sweep the learning rate of a run; return the proposal and the lines that describe it.

    The page is written beside the run directory as ``NAME-lr.html``.

    Args:
        resolved: recipe with the origins of its values.
        reporter: prints notes and progress.
        recipe_name: name of the recipe, shown on the page.

    Raises:
        ConfigError: the method adapts nothing, or the run is sharded.
        DivergedError: the first loss is not finite.
    """
    settings = unpack(resolved.recipe)
    if not settings.loop.lr > 0:
        raise ConfigError("train.lr", f"got {settings.loop.lr:g}", allowed="a rate above 0, to sweep around")
    folder = local_path(settings.output_dir or f"runs/{run_name(settings, recipe_name)}")
    page = folder.with_name(f"{folder.name}-lr.html")
    if page.is_dir():
        raise ConfigError("--find-lr", f"its page would be {page}, which is a folder", fix="Choose another with -o")
    accelerator = make_accelerator(settings.model.precision, has_idle_parameters=settings.adapter.trains_base)
    reporter.is_main = accelerator.is_main_process
    if Sharding.of(accelerator).library or accelerator.num_processes > 1:
        raise ConfigError("--find-lr", "it runs in one process", fix="Leave --num-processes out")
    with ExitStack() as held:
        put = held.enter_context(html.page_output(page, inputs_of(resolved), "--output-dir"))
        job = assemble(settings, reporter)
        if not job.plan.trainable_parameters:
            problem = f"method '{settings.adapter.method}' trains only the head, at train.head_lr"
            raise ConfigError("--find-lr", problem, fix="Choose a method that adapts layers")
        sweep = _sweep(job, RunDirectory(folder), accelerator, reporter)
        found = propose(sweep)
        lines = _lines(found, settings)
        marks = {
            "falls fastest": found.steepest, "a tenth of the lowest": found.tenth_of_lowest, "proposed": found.lr
        }  # fmt: skip
        drawing = sweep_drawing(
            sweep.rates, sweep.losses, sweep.smoothed, {name: rate for name, rate in marks.items() if rate is not None}
        )
        put(sweep_page(f"{folder.name}: learning rate", lines, drawing, shlex.join(["mirrortune", *sys.argv[1:]])))
    result = FindLrResult(
        lr=found.lr, sureness=found.sureness, reason=found.reason, steepest=found.steepest,
        tenth_of_lowest=found.tenth_of_lowest, rates=sweep.rates, losses=sweep.losses, report=str(page),
    )  # fmt: skip
    return result, [*sweep_lines(sweep.rates, sweep.smoothed, found.lr), "", *lines, f"page: {page}"]


def _sweep(job: Job, run: RunDirectory, accelerator: Any, reporter: Reporter) -> Sweep:
    """Attach an adapter to the base model as in training, and sweep; nothing is written to ``run``."""
    loop = job.settings.loop
    seed_everything(loop.seed)
    model = load_adapted_base(job, run, accelerator, reporter, resume=False).model
    if job.settings.gradient_checkpointing:
        checkpoint_activations(model)
    seed_everything(loop.seed + 1)
    # By which groups of the adapter differ from all others.
    unit = next(rate for rate in (1.0, 2.0, 3.0) if rate not in (loop.head_lr, loop.also_train_lr))
    trainer = Trainer(
        model, job.task, train=job.stream or job.train, validation=job.validation,
        settings=replace(loop, lr=unit), run=run, write_adapter_files=lambda _: None, accelerator=accelerator,
        progress=reporter.training(), objective=job.objective, draws=job.draws,
    )  # fmt: skip
    with reporter.bar("learning rates", _STEPS) as bar:
        return sweep_rates(trainer, lr=loop.lr, num_steps=_STEPS, on_step=bar.advance)


def _lines(found: Proposal, settings: RunSettings) -> list[str]:
    if found.lr is None:
        return [f"no learning rate to propose: {found.reason}; it is {settings.loop.lr:g} now"]
    return [
        f"proposed: --lr {found.lr:g} ({found.sureness}; now {settings.loop.lr:g})",
        f"{found.reason[0].upper()}{found.reason[1:]}.",
    ]
