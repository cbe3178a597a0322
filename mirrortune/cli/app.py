# SPDX-License-Identifier: Apache-2.0
"""Define the commands and parse the command line. Nothing heavy is imported until a command runs."""

from __future__ import annotations

import functools
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup
from typing_extensions import override

from mirrortune import __version__
from mirrortune.cli import recipes as recipe_commands
from mirrortune.cli.chat import chat
from mirrortune.cli.doctor import doctor
from mirrortune.cli.exports import merge, push
from mirrortune.cli.flags import (
    NOT_FOR_EVAL,
    OF_EACH_RUN,
    Debug,
    Json,
    OnceEach,
    Quiet,
    Verbose,
    given_flags,
    refuse_training_only,
    refuse_words,
    with_recipe_flags,
)
from mirrortune.cli.predictions import predict
from mirrortune.cli.reports import analyze, besides_head, report, train_lines
from mirrortune.config.data_paths import is_same_data, short_name
from mirrortune.errors import ConfigError, MirrortuneError, PeerError, all_of, counted, known_error
from mirrortune.system.console import Reporter, describe_metrics, end_if_unwritten, keep_standard_files
from mirrortune.system.paths import check_working_directory, local_path, shown_path, table_suffix
from mirrortune.system.signals import await_launcher

if TYPE_CHECKING:
    from mirrortune.config.recipe import Layer, Resolved
    from mirrortune.config.schema import Recipe

# Commands of other tools, and what to use instead.
_ELSEWHERE = dict.fromkeys(
    ("generate", "serve"),
    "Talk to a run with mirrortune chat; to serve it, merge it (mirrortune merge RUN -o merged; --format gguf for "
    "llama.cpp) and open the result with transformers, vLLM or llama.cpp",
)  # fmt: skip


class _Commands(TyperGroup):
    """The commands; the name of another tool's command gives an error that says what to use instead."""

    @override
    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] in _ELSEWHERE and args[0] not in self.commands:
            Reporter().error(str(ConfigError(args[0], "mirrortune has no such command", fix=_ELSEWHERE[args[0]])))
            raise typer.Exit(ConfigError.exit_code)
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="mirrortune",
    cls=_Commands,
    help="Fine-tune any transformers model by rotating and rescaling the singular directions of its weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        # Accept --batch_size for --batch-size, as other tools do.
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)

_OVERRIDE = re.compile(r"[A-Za-z_][\w-]*(?:\.[\w-]+)*=")

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE] [KEY.SUB=VALUE]...",
        help="A shipped recipe or YAML file, and settings that override it.",
        show_default=False,
    ),
]
Target = Annotated[
    str,
    typer.Argument(
        metavar="TARGET", help="Run directory, adapter folder, merged folder or any model.", show_default=False
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output of an earlier run.")]
TaskName = Annotated[
    str | None,
    typer.Option("-t", "--task", metavar="TEXT", help="A shipped task (glue/sst2) or a kind (text-classification, image-classification, ...).",
                 rich_help_panel="Model and data", show_default=False),
]  # fmt: skip


def _guard(command: Callable[..., None]) -> Callable[..., None]:
    """Print errors that a user can act on to stderr and exit with their code; show a traceback only with --debug."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            check_working_directory()
            _check_words(kwargs)
            command(*args, **kwargs)
        except MirrortuneError as error:
            if kwargs.get("debug"):
                traceback.print_exc()
            if not isinstance(error, PeerError):  # reported by the process that failed
                Reporter().error(str(error))
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            Reporter().error("interrupted")
            raise typer.Exit(130) from None
        except (MemoryError, RuntimeError, OSError) as error:
            await_launcher(error)
            known = known_error(error)
            if known is None or kwargs.get("debug"):
                raise
            Reporter().error(str(known))
            raise typer.Exit(known.exit_code) from None

    return guarded


def _check_words(given: dict[str, Any]) -> None:
    """Raise an error for arguments that are not UTF-8, such as a path from a system with another encoding.

    The files of a run (recipe, model card, log) are UTF-8 and could not hold them.
    """
    words = [word for value in given.values() for word in (value if isinstance(value, list) else [value])]
    odd = [word for word in words if isinstance(word, str) and shown_path(word) != word]
    if odd:
        named = ", ".join(f"'{shown_path(word)}'" for word in odd)
        raise ConfigError("command line", f"{named} is not UTF-8", fix="Rename the file or folder, or link to it")


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"mirrortune {__version__}")
        raise typer.Exit


@app.command(cls=OnceEach)
@_guard
@with_recipe_flags("output_dir")
def prepare(
    words: Words = None, *, task: TaskName = None, dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop before downloading the weights.")] = False,
    show: Annotated[int, typer.Option("--show", min=0, metavar="N", help="Show N training rows as the model will see them: text, ids, mask, labels.")] = 0,
    json: Json = False, quiet: Quiet = False, verbose: Verbose = False, debug: Debug = False, **given: Any,
) -> None:  # fmt: skip
    """Check all settings, download, tokenise and factorise, so that train starts from the caches.

    mirrortune prepare --model roberta-base --task glue/sst2
    """
    reporter = _reporter(json=json, quiet=quiet, verbose=verbose)
    resolved, _ = _resolve(words, task, given, reporter)
    from mirrortune.runs import prepare as preparing  # noqa: PLC0415

    result = preparing.prepare(resolved, reporter, dry_run=dry_run, show=show)
    factorised = f"factorised {result.svd_cache['misses']} matrices, read {result.svd_cache['hits']} from the cache, in {result.svd_seconds:.1f} s"
    lines = [
        f"{result.targets} layers, {result.trainable_parameters:,} trainable parameters{besides_head(result)}",
        *([factorised] if any(result.svd_cache.values()) else []),
        "  ".join(f"{name} {counted(count, 'row')}" for name, count in result.rows.items()),
    ]
    reporter.result(result.summary(), lines)


@app.command(cls=OnceEach)
@_guard
@with_recipe_flags()
def train(
    words: Words = None, *, task: TaskName = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in the output directory.")] = False, overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check and plan; download no weights, train nothing.")] = False,
    find_lr: Annotated[bool, typer.Option("--find-lr", help="Run a short learning-rate sweep and propose a rate; train nothing.")] = False,
    num_processes: Annotated[int | None, typer.Option("--num-processes", min=1, metavar="N", rich_help_panel="Processes", show_default=False, help="Number of processes on this machine: one per GPU, or sharing the CPU cores.")] = None,
    accelerate_config: Annotated[str | None, typer.Option("--accelerate-config", metavar="NAME", rich_help_panel="Processes", show_default=False, help="How the processes share the work: ddp (default), fsdp2, zero2, zero3, cpu-2, or an accelerate config file.")] = None,
    json: Json = False, quiet: Quiet = False, verbose: Verbose = False, debug: Debug = False, **given: Any,
) -> None:  # fmt: skip
    """Fine-tune, and write a run directory with the adapter, its metrics and its curves.

    mirrortune train --model roberta-base --task glue/sst2
    """
    reporter = _reporter(json=json, quiet=quiet, verbose=verbose)
    resolved, name = _resolve(words, task, given, reporter)
    if not dry_run:
        _launch_if_asked(num_processes, accelerate_config)
    if find_lr:
        _find_lr(resolved, name, reporter, {"--resume": resume, "--overwrite": overwrite, "--dry-run": dry_run})
        return
    from mirrortune.runs import prepare as preparing  # noqa: PLC0415
    from mirrortune.runs import train as training  # noqa: PLC0415

    if dry_run:
        training.check_output(resolved, recipe_name=name, resume=resume, overwrite=overwrite)
        plan = preparing.prepare(resolved, reporter, dry_run=True, num_processes=num_processes or 1)
        reporter.result(
            plan.summary(),
            [
                f"would adapt {plan.targets} layers and train {plan.trainable_parameters:,} parameters{besides_head(plan)}"
            ],
        )
        return
    result = training.train(resolved, reporter, recipe_name=name, resume=resume, overwrite=overwrite)
    reporter.result(result.summary(), train_lines(result))


def _find_lr(resolved: Resolved, name: str | None, reporter: Reporter, excluded: dict[str, bool]) -> None:
    """Sweep learning rates instead of training; raise an error for flags of ``excluded`` that were given."""
    if given := [flag for flag, is_given in excluded.items() if is_given]:
        raise ConfigError("--find-lr", f"it trains nothing and excludes {', '.join(given)}", fix="Give one of them")
    from mirrortune.runs import find_lr as sweeping  # noqa: PLC0415

    result, lines = sweeping.find_lr(resolved, reporter, recipe_name=name)
    reporter.result(asdict(result), lines)


@app.command("eval", cls=OnceEach)
@_guard
@with_recipe_flags("output_dir", *NOT_FOR_EVAL)
def evaluate(
    target: Target, words: Words = None, *, task: TaskName = None,
    split: Annotated[str | None, typer.Option("--split", metavar="TEXT", show_default=False, help="train, validation (default), test, or the data set's own name.")] = None,
    batch_size: Annotated[str | None, typer.Option("--batch-size", metavar="N", show_default=False, help="Rows per device.")] = None,
    predictions: Annotated[str | None, typer.Option("--predictions", metavar="FILE", show_default=False, help="Write the prediction of every row, unlabelled rows too, in GLUE's submission format, to a file or folder (FOLDER/ creates it).")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace earlier predictions in that file.")] = False,
    force_base: Annotated[bool, typer.Option("--force-base", rich_help_panel="Dangerous options", help="Score an adapter on a base (--model) whose weights differ from those it was trained on.")] = False,
    json: Json = False, quiet: Quiet = False, verbose: Verbose = False, debug: Debug = False, **given: Any,
) -> None:  # fmt: skip
    """Score a run, a merged folder or any plain model with the task's metrics.

    mirrortune eval runs/sst2-roberta-base-mirror-scale
    """
    reporter = _reporter(json=json, quiet=quiet, verbose=verbose)
    own = _recipe_of(target, reporter)
    resolved, _ = _resolve(
        words, task, {**given, "eval__batch_size": batch_size}, reporter, beneath=own, has_target=True
    )
    if own and (named := _describe_data(resolved, own)):
        reporter.note(named)
    is_own_data = _is_own_data(resolved, own)
    from mirrortune.merging import bases  # noqa: PLC0415
    from mirrortune.runs import evaluate as evaluation  # noqa: PLC0415
    from mirrortune.runs.checks import inputs_of  # noqa: PLC0415

    file = local_path(predictions) if predictions else None
    inputs = [*inputs_of(resolved), *bases.inputs_of_targets(target)] if file else []
    result = evaluation.evaluate(
        target, resolved.recipe, reporter, split=split, is_own_data=is_own_data, predictions=file, inputs=inputs,
        makes_folder=bool(predictions) and str(predictions).endswith(("/", os.sep)), overwrite=overwrite,
        force_base=force_base,
    )  # fmt: skip
    said = describe_metrics(result.metrics) or "no labels, nothing scored"
    lines = [f"{result.split}: {said}  ({counted(result.rows, 'row')})"]
    lines += [f"predictions: {result.predictions}"] if file else []
    reporter.result({name: value for name, value in asdict(result).items() if value is not None}, lines)


@app.command(cls=OnceEach)
@_guard
@with_recipe_flags(*OF_EACH_RUN)
def compare(
    words: Annotated[list[str] | None, typer.Argument(metavar="[RECIPE]... [KEY.SUB=VALUE]...", help="Shipped recipes or YAML files, one per task, and settings that override them.", show_default=False)] = None, *,
    methods: Annotated[str, typer.Option("--methods", metavar="A,B:key=value,...", help="Methods, each with optional settings; the others are tested against the first.", show_default=False)],
    output_dir: Annotated[str, typer.Option("-o", "--output-dir", metavar="TEXT", help="Folder of the comparison; finished runs in it are kept.")] = "comparison",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Number of seeds per method, one reported run each.")] = 5,
    tune_seeds: Annotated[int, typer.Option("--tune-seeds", min=1, help="Number of seeds per learning rate when choosing it.")] = 1,
    choose_by: Annotated[Literal["score", "loss"], typer.Option("--choose-by", help="Choose learning rates by score or by loss, which is less noisy on few rows.")] = "score",
    lr_grid: Annotated[str | None, typer.Option("--lr-grid", metavar="X,Y,...", help="Learning rates to try for every method; by default a grid around its own rate.", show_default=False)] = None,
    extensions: Annotated[int, typer.Option("--extensions", min=0, help="Maximum number of rates to add while the best lies at the edge of the grid.")] = 2,
    jobs: Annotated[int | None, typer.Option("--jobs", min=1, help="Number of parallel runs; one per GPU by default.", show_default=False)] = None,
    report_only: Annotated[bool, typer.Option("--report-only", help="Train nothing; rebuild the report from the finished runs.")] = False,
    task: TaskName = None, json: Json = False, quiet: Quiet = False, verbose: Verbose = False, debug: Debug = False, **given: Any,
) -> None:  # fmt: skip
    """Train several methods with tuned learning rates and the same seeds, and test their differences.

    mirrortune compare quickstart --methods mirror,random,lora:rank=8,none
    """
    reporter = _reporter(json=json, quiet=quiet, verbose=verbose)
    names = [w for w in words or [] if not _OVERRIDE.match(w)]
    overrides = [w for w in words or [] if _OVERRIDE.match(w)]
    # Split the validation rows by default: rows that choose a learning rate must not be used to report its score.
    if not any(w.startswith("eval.protocol=") for w in overrides):
        overrides = ["eval.protocol=split-dev", *overrides]
    asked = [[n, *overrides] for n in names] or [overrides]
    found = all_of(*(functools.partial(_resolve, own, task, given, reporter) for own in asked))
    refuse_words(overrides, found[0][0].origins, "each run of a comparison has its own", OF_EACH_RUN)
    labels = names or [found[0][1] or short_name(found[0][0].recipe.data.path) or "task"]
    from mirrortune.compare.grid import make_grid  # noqa: PLC0415

    recipes = {name: resolved.recipe for name, (resolved, _) in zip(labels, found, strict=True)}
    grid = make_grid(
        recipes, methods, seeds=seeds, tune_seeds=tune_seeds, choose_by=choose_by, lr_grid=lr_grid,
        extensions=extensions,
    )  # fmt: skip
    from mirrortune.compare import report as comparison_report  # noqa: PLC0415
    from mirrortune.runs.checks import inputs_of  # noqa: PLC0415

    root = local_path(output_dir)
    results = comparison_report.compare(
        root, grid, recipes, reporter, inputs=[given for resolved, _ in found for given in inputs_of(resolved)],
        jobs=jobs, report_only=report_only, command=shlex.join(["mirrortune", *sys.argv[1:]]),
    )  # fmt: skip
    table = (root / "table.md").read_text(encoding="utf-8")
    lines = [*table.split("\n"), f"tables, figures and runs: {output_dir}"]
    reporter.result(results, lines)


for _command in (predict, merge, chat, push, analyze, report, doctor):
    app.command(cls=OnceEach)(_guard(_command))
recipes = typer.Typer(help="List, print and copy the shipped recipes, and print their schema.", no_args_is_help=True)
for _command in (recipe_commands.ls, recipe_commands.cat, recipe_commands.cp, recipe_commands.schema):
    recipes.command(cls=OnceEach)(_guard(_command))
app.add_typer(recipes, name="recipes")


def main() -> None:
    """Run ``mirrortune`` or ``python -m mirrortune``, and close the connections to the other processes of a run."""
    keep_standard_files()
    try:
        app()
    except SystemExit as ended:  # raised on success, too; after other exceptions, peers may still wait for this process
        torch: Any = sys.modules.get("torch")  # if torch was not imported, there is nothing to close
        is_open = torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
        # NCCL waits for all processes there, and if this one has failed alone, they wait for it in the middle of a step.
        if is_open and not (ended.code and "nccl" in str(torch.distributed.get_backend())):
            torch.distributed.destroy_process_group()  # torch warns at exit if they are still open
        raise
    except OSError:
        end_if_unwritten()
        raise


def _launch_if_asked(num_processes: int | None, profile: str | None) -> None:
    """Run this command in several processes and exit with their code; do nothing in a process so launched."""
    if profile is not None or (num_processes or 1) > 1:
        from mirrortune.system.distributed import launch  # noqa: PLC0415

        if not launch.is_launched():
            raise typer.Exit(launch.launch(sys.argv[1:], num_processes=num_processes, profile=profile))


def _reporter(*, json: bool, quiet: bool, verbose: bool) -> Reporter:
    return Reporter(verbosity=-1 if quiet else int(verbose), as_json=json)


def _resolve(
    words: list[str] | None, task: str | None, given: dict[str, Any], reporter: Reporter, beneath: Layer | None = None,
    *, has_target: bool = False,
) -> tuple[Resolved, str | None]:  # fmt: skip
    """Resolve the recipe from all layers; return it with the name of the recipe or task that was given.

    Args:
        words: recipe and ``key=value`` settings.
        task: value of ``--task``.
        given: values of the flags.
        reporter: prints the settings.
        beneath: the lowest layer.
        has_target: leave the model of the task's recipe out, since the command names the one that it uses.

    Raises:
        ConfigError: settings are unknown or invalid; the problems of all layers are reported together.
    """
    from mirrortune.config import recipe  # noqa: PLC0415
    from mirrortune.registry import task_kinds  # noqa: PLC0415

    overrides = [w for w in words or [] if _OVERRIDE.match(w)]
    names = [w for w in words or [] if not _OVERRIDE.match(w)]
    _refuse_tables(names)
    kinds = task_kinds()
    layers = [beneath] if beneath else []
    errors: list[ConfigError] = []

    def add(make: Callable[[], Layer]) -> None:
        try:
            layers.append(make())
        except ConfigError as error:
            errors.append(error)

    if len(names) > 1:
        problem = f"one recipe at most, got {', '.join(names)}"
        errors.append(ConfigError("arguments", problem, fix="Settings are written key.sub=value"))
    elif task is not None and task not in kinds:
        add(lambda: recipe.task_layer(task, kinds, has_model=not has_target))
    if names:
        add(lambda: recipe.read_recipe(names[0]))
    flags = given_flags(given, errors)
    if task is not None and task in kinds:
        flags["task.kind"] = ("--task", task)
    layers += [recipe.override_layer(overrides, errors), recipe.flag_layer(flags)]
    more = None if beneath else _problems_of_names
    if errors:
        try:
            rest = recipe.resolve(layers, more).recipe
            errors += more(rest) if more else []
        except ConfigError as error:
            errors.append(error)
        raise ConfigError.several(errors)
    resolved = recipe.resolve(layers, more)
    if has_target:
        refuse_training_only(overrides, resolved.origins)
    for key, value in recipe.flatten(resolved.recipe).items():
        reporter.detail(f"{key} = {value!r}  ({resolved.origins.get(key, 'default')})")
    shipped = task if task is not None and task not in kinds else None
    return resolved, Path(names[0]).stem if names else shipped


def _refuse_tables(names: list[str]) -> None:
    """Raise ConfigError for words that stand where a recipe does, but are names of tables."""
    tables = [name for name in names if table_suffix(Path(name)) not in (None, ".json", ".txt")]  # these may hold YAML
    if tables:
        problem = f"got {', '.join(tables)}, and a recipe is YAML"
        raise ConfigError("arguments", problem, fix=f"Name rows with --data {shlex.quote(tables[0])}")


def _problems_of_names(recipe: Recipe) -> list[ConfigError]:
    from mirrortune.config.schema import Recipe as Defaults  # noqa: PLC0415

    plain = Defaults()
    if (recipe.adapter, recipe.task, recipe.model.attention) == (plain.adapter, plain.task, None):
        return []  # no names to check: avoid the slow import below
    from mirrortune.runs.checks import problems_of_names  # noqa: PLC0415  (takes seconds; only needed after errors)

    return problems_of_names(recipe)


def _recipe_of(target: str, reporter: Reporter) -> Layer | None:
    """Read the accepted settings of the recipe inside a run directory, a merged folder or an adapter folder.

    An adapter folder without a recipe has that of the run it belongs to.
    """
    from mirrortune.config.recipe import read_target_recipe  # noqa: PLC0415
    from mirrortune.system.outputs import restore  # noqa: PLC0415

    folder = restore(local_path(target))
    path = folder / "recipe.yaml"
    if not path.is_file() and (folder / "adapter.json").is_file():
        from mirrortune.system.run_directory import run_of  # noqa: PLC0415

        run = run_of(folder)
        path = run.recipe if run else path
    if not path.is_file():
        return None
    layer, ignored = read_target_recipe(path)
    if ignored:
        reporter.detail(f"of {path} not followed: {', '.join(ignored)}")
    return layer


def _is_own_data(resolved: Resolved, own: Layer | None) -> bool:
    """Return whether the data is that of the target's recipe.

    Raises:
        ConfigError: the recipe names data or validation rows by a pattern that is not followed, and the user named
            none; other rows, such as those that were trained on, must not take their place.
    """
    asked, withheld = resolved.recipe.data.path, own.withheld if own else {}
    trained_on = withheld.get("path") or ((own.values.get("data") or {}).get("path") if own else None)
    is_own = is_same_data(trained_on, asked)
    needed = {"path": asked is None, "validation_path": is_own and resolved.recipe.data.validation_path is None}
    for key, pattern in withheld.items():
        if own and needed[key]:
            flag = "--data" if key == "path" else f"data.{key}"
            typed = f"--data '{pattern}'" if key == "path" else f"'data.{key}={pattern}'"
            problem = f"the recipe's pattern '{pattern}' may search the whole disk, and {flag} not given"
            raise ConfigError(own.place(("data", key)), problem, fix=f"To follow it, give {typed}")
    return is_own


def _describe_data(resolved: Resolved, beneath: Layer) -> str | None:
    """Describe the data set that the recipe of a target names, or return None if the user named another one."""
    from mirrortune.config.schema import DataSection  # noqa: PLC0415

    named = {key: where for key, where in resolved.origins.items() if where.startswith(f"{beneath.origin}:")}
    if "data.path" not in named:
        return None
    default, data = dict(DataSection()), dict(resolved.recipe.data)
    says = [f"{key} {_plainly(data[key])}" for key in data if f"data.{key}" in named and data[key] != default[key]]
    return f"data named by {beneath.origin}: {', '.join(says)}"


def _plainly(value: object) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
