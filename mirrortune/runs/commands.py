# SPDX-License-Identifier: Apache-2.0
"""train, evaluate: what the CLI's commands do, as functions from a recipe to a result."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from mirrortune.adapters.factor_cache import FactorCache
from mirrortune.adapters.files.adapter_file import write_adapter
from mirrortune.adapters.files.find import adapter_to_score
from mirrortune.adapters.files.load import FingerprintBook
from mirrortune.adapters.inject import head_parameters, trainable_parameters
from mirrortune.adapters.methods import preset
from mirrortune.adapters.peft_bridge.tuners import remarks
from mirrortune.adapters.targets import find_targets
from mirrortune.config.recipe import Resolved
from mirrortune.config.schema import Recipe
from mirrortune.data.dataset import DataSet, Split, set_aside
from mirrortune.data.examples import Examples
from mirrortune.data.files.media import remarks_on
from mirrortune.data.tokenize import Reading
from mirrortune.errors import ConfigError
from mirrortune.models.load import checkpoint_activations
from mirrortune.runs.checks import adapter_spec, check_recipe, inputs_of, loop_settings, read_data
from mirrortune.runs.index_checks import check_rows
from mirrortune.runs.job import Job, assemble
from mirrortune.runs.load import (
    Evaluable,
    adapt_model,
    base_identity,
    choose_pairs,
    load_base,
    load_evaluable,
    share_factors,
)
from mirrortune.runs.predictions import (
    check_labels,
    check_replaceable,
    prediction_file,
    predictions_output,
    write_predictions,
)
from mirrortune.runs.recorder import record_validation, recording
from mirrortune.runs.results import (
    check_same_recipe,
    environment,
    peak_memory_bytes,
    pin_paths,
    run_name,
    score_kept,
    write_results,
)
from mirrortune.runs.size import default_eval_batch
from mirrortune.runs.strategy import by_strategy, choose_strategies
from mirrortune.system.compiler import compile_model
from mirrortune.system.console import Reporter, digits
from mirrortune.system.devices import factorising_device
from mirrortune.system.distributed import deepspeed, sync
from mirrortune.system.distributed.processes import describe_processes, make_accelerator, seed_everything
from mirrortune.system.outputs import Input, check_file
from mirrortune.system.paths import local_path
from mirrortune.system.run_directory import RunDirectory
from mirrortune.system.run_status import recorded_status
from mirrortune.tasks.base import Task, check_columns, task_to_dict, with_label_columns
from mirrortune.tasks.metrics import METRICS
from mirrortune.training.evaluate import EvalResult, evaluate_split
from mirrortune.training.settings import FitResult, LoopSettings
from mirrortune.training.trainer import Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """The ``--json`` object of train; ``trainable_parameters`` counts what is trained besides the head."""

    run_dir: str
    metrics: dict[str, float]
    trainable_parameters: int
    head_parameters: int
    adapter_bytes: int
    train_seconds: float
    samples_per_second: float
    tokens_per_second: float | None
    metrics_before: dict[str, float] | None
    peak_memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateResult:
    """The ``--json`` object of eval; ``predictions`` is there where answers were written."""

    metrics: dict[str, float]
    split: str
    rows: int
    predictions: str | None = None


def train(
    resolved: Resolved, reporter: Reporter, *, recipe_name: str | None, resume: bool = False, overwrite: bool = False
) -> TrainResult:
    """Fine-tune by a recipe and write a run directory.

    Args:
        resolved: the recipe and the origins of its values.
        reporter: is told.
        recipe_name: for the default name of the run directory.
        resume: continue the run that is there.
        overwrite: replace the run that is there.
    """
    recipe = resolved.recipe
    check_recipe(recipe, adapter_spec(recipe))
    if resume and overwrite:
        raise ConfigError("--resume", "it excludes --overwrite", fix="Give one of the two")
    run = (_run_beside(resolved) if resume else None) or RunDirectory(
        local_path(recipe.output_dir or f"runs/{run_name(recipe, recipe_name)}")
    )
    recipe = pin_paths(recipe, run)
    accelerator = _meet(recipe, reporter)
    inputs = inputs_of(resolved)
    with ExitStack() as held:

        def claim() -> None:
            held.enter_context(run.held(inputs, overwrite=overwrite, resume=resume))
            if resume:
                check_same_recipe(recipe, run)

        def create() -> None:
            run.check(inputs, overwrite=overwrite, resume=False)  # again: loading may have taken hours
            run.create()

        sync.from_main(accelerator, claim)
        return _train(replace(resolved, recipe=recipe), run, accelerator, reporter, None if resume else create)


def _run_beside(resolved: Resolved) -> RunDirectory | None:
    """The run whose own recipe says where to write. It may have been moved or copied since, and another lie there."""
    for file in resolved.files:
        run = RunDirectory(file.parent)
        says_where = resolved.origins.get("output_dir", "").startswith(f"{file}:")
        if says_where and file.name == run.recipe.name and run.is_marked:
            return run
    return None


def _train(
    resolved: Resolved, run: RunDirectory, accelerator: Any, reporter: Reporter, create: Callable[[], None] | None
) -> TrainResult:
    """Train into a run directory that is claimed; ``create`` makes it, or is None for one that is continued."""
    recipe, resume = resolved.recipe, create is None
    job = assemble(recipe, reporter)
    if deepspeed.stage_of(accelerator) and job.source.is_quantised:
        raise ConfigError("model.load_in", "DeepSpeed was not tried with quantised weights", fix="Use ddp")
    describe_processes(accelerator, reporter, run.path)
    seed_everything(recipe.train.seed)  # the head's initial weights
    loaded = load_base(job)
    cache = FactorCache(on_remark=reporter.note, device=factorising_device(accelerator.device))
    share_factors(job, loaded, cache, accelerator, reporter.bar)
    started = time.perf_counter()
    pairs = choose_pairs(job, loaded, cache, run, accelerator, reporter, resume=resume)
    pairing_seconds = time.perf_counter() - started if pairs else 0.0
    targets = find_targets(loaded.model, job.spec, loaded.new_parameters)
    strategies = choose_strategies(job, targets, run, accelerator, reporter, resume=resume)
    book = adapt_model(loaded, job.spec, cache, pairs, strategies)
    model = loaded.model
    for text in remarks(model):
        reporter.note(text)

    def record() -> None:
        if create is not None:
            create()
            run.write_json("environment.json", environment(job, resolved, accelerator, by_strategy(strategies)))
        run.write_text(run.recipe.name, recipe.to_yaml())  # a continued run may have been given other free settings

    # Only now, when everything that can fail has been loaded, is an earlier run there replaced.
    sync.from_main(accelerator, record)
    with recorded_status(run, is_main=accelerator.is_main_process):
        # Dropout: the same from a cold and a warm cache, another on each rank.
        seed_everything(recipe.train.seed + 1 + accelerator.process_index)
        counts = trainable_parameters(model), head_parameters(model)  # before processes share them
        outcome, best = _fit(job, model, book, run, accelerator, reporter, resume=resume)
        for text in _remarks_on(outcome, job):
            reporter.note(text)
        reported = score_kept(job, model, run, accelerator, reporter)
        record_validation(job, model, run, accelerator, best)
        result = _train_result(run, outcome, *counts)
        if accelerator.is_main_process:
            more = {"reported": reported, "pairing_seconds": pairing_seconds}
            write_results(run, job, {**asdict(outcome), **asdict(result), **more})
    return result


def _remarks_on(outcome: FitResult, job: Job) -> Iterator[str]:
    """What a user should know of how training ended besides the scores."""
    if outcome.stopped_early:
        count = job.recipe.train.patience
        yield f"stopped early: {count} evaluation{'s' * (count != 1)} in a row without a better one"
    name, before = job.task.selection_metric, outcome.metrics_before
    sign = 1 if METRICS[name].higher_is_better else -1
    if before is not None and sign * outcome.metrics[name] <= sign * before[name]:
        yield f"warning: no checkpoint has a better {name} than the model before training ({before[name]:.4f})"


def _meet(recipe: Recipe, reporter: Reporter) -> Any:
    """The object that owns this process and its peers."""
    # Cores and heads take part in every loss; a base model trained as it is may hold weights that do not.
    has_idle = preset(recipe.adapter.method).plain != "none"
    accelerator = make_accelerator(recipe.train.precision, has_idle_parameters=has_idle)
    reporter.is_main = accelerator.is_main_process

    def check() -> None:
        kind = "FSDP2" if accelerator.is_fsdp2 else "ZeRO-3" if deepspeed.stage_of(accelerator) == 3 else None
        if kind and recipe.adapter.form == "portable":
            raise ConfigError("adapter.form", f"no process has whole factors under {kind}", allowed="auto or compact")

    sync.from_main(accelerator, check)
    return accelerator


def _train_result(run: RunDirectory, outcome: FitResult, num_trained: int, num_head: int) -> TrainResult:
    return TrainResult(
        run_dir=str(run.path),
        metrics=outcome.metrics,
        trainable_parameters=num_trained,
        head_parameters=num_head,
        adapter_bytes=sum(f.stat().st_size for f in run.adapter.iterdir()),
        train_seconds=round(outcome.train_seconds, 3),
        samples_per_second=digits(outcome.samples_per_second),
        tokens_per_second=None if outcome.tokens_per_second is None else digits(outcome.tokens_per_second),
        metrics_before=outcome.metrics_before,
        peak_memory_bytes=peak_memory_bytes(),
    )


def _fit(
    job: Job,
    model: nn.Module,
    book: FingerprintBook,
    run: RunDirectory,
    accelerator: Any,
    reporter: Reporter,
    *,
    resume: bool,
) -> tuple[FitResult, EvalResult | None]:
    def write_adapter_files(folder: Path) -> int:
        base, task, form = base_identity(job), task_to_dict(job.task), job.recipe.adapter.form
        extra = {"max_length": job.max_length}
        return write_adapter(folder, model, book.entries, base=base, task=task, extra=extra, form=form)

    if job.recipe.train.gradient_checkpointing:
        checkpoint_activations(model)
    if job.recipe.train.compile:
        compile_model(model, accelerator)
    with recording(job, model, run, accelerator, reporter) as progress:
        trainer = Trainer(
            model,
            job.task,
            train=job.stream or job.train,
            validation=job.validation,
            settings=_settings(job, accelerator),
            run=run,
            write_adapter_files=write_adapter_files,
            accelerator=accelerator,
            progress=progress,
        )
        if resume:
            trainer.resume()
        return trainer.fit(), trainer.best_result


def _settings(job: Job, accelerator: Any) -> LoopSettings:
    before = job.recipe.eval.before
    return loop_settings(
        job.recipe,
        eval_batch_size=job.eval_batch_size,
        eval_max_positions=job.eval_max_positions,
        eval_before=_costs_little(job, accelerator.num_processes) if before == "auto" else before,
    )


def _costs_little(job: Job, num_processes: int) -> bool:
    """Whether scoring the validation rows once takes under a tenth of the run, by the number of forward passes."""
    section = job.recipe.train
    if section.compile:  # it would compile another graph before the first step
        return False
    rows = section.epochs * len(job.train)
    if section.max_steps is not None:
        steps = section.max_steps * section.batch_size * section.gradient_accumulation_steps * num_processes
        rows = steps if job.stream else min(rows, steps)
    trained = 3 * rows * float(job.train.lengths.mean())  # backward costs two forward passes
    # Kinds whose answers are written call the decoder once for each token.
    passes = 1 + getattr(job.task, "max_target_length", 0)
    scored = passes * float(job.validation.lengths.sum())
    return scored < 0.1 * (scored + trained)


def evaluate(
    target: str,
    recipe: Recipe,
    reporter: Reporter,
    *,
    split: str | None = None,
    is_own_data: bool = True,
    predictions: Path | None = None,
    inputs: Sequence[Input] = (),
    overwrite: bool = False,
    force_base: bool = False,
) -> EvaluateResult:
    """Score a run directory, an adapter folder, a merged folder or any plain model on a split.

    Args:
        target: what to score; a folder, or ``owner/name@revision:subfolder`` on the Hub.
        recipe: data and batch size (for a run or a merged folder, its own recipe with the flags over it); for a plain
            model the task too.
        reporter: is told.
        split: ``train``, ``validation``, ``test``, or a data set's own name for a split; None for the validation rows,
            or for all rows of other data that has none.
        is_own_data: whether the data is what the target was trained on, as far as its recipe says.
        predictions: file for every row's answer, or a folder for the file that the recipe names for the split; rows
            without a label are answered too then, and nothing is scored.
        inputs: everything that is read, where no predictions are written.
        overwrite: replace earlier predictions.
        force_base: score an adapter on a base with other weights, and say what does not fit.
    """
    with ExitStack() as held:

        def claim(file: Path) -> None:
            held.enter_context(predictions_output(file, inputs, overwrite=overwrite))

        if predictions is not None and not predictions.is_dir():
            check_file(predictions, inputs, "--predictions")
            prediction_file(predictions, "", {})
        return _evaluate(
            target, recipe, reporter, claim, split=split, is_own_data=is_own_data, predictions=predictions,
            overwrite=overwrite, force_base=force_base,
        )  # fmt: skip


def _evaluate(
    target: str,
    recipe: Recipe,
    reporter: Reporter,
    claim: Callable[[Path], None],
    *,
    split: str | None,
    is_own_data: bool,
    predictions: Path | None,
    overwrite: bool,
    force_base: bool,
) -> EvaluateResult:
    accelerator = make_accelerator(recipe.train.precision)
    reporter.is_main = accelerator.is_main_process
    adapter_folder = adapter_to_score(target)
    if force_base and adapter_folder is None:
        raise ConfigError("--force-base", f"'{target}' holds no adapter that could have another base", fix="Remove it")
    needed = {"--data": recipe.data.path, "--task": recipe.task.kind or adapter_folder}
    if missing := " and ".join(flag for flag, value in needed.items() if value is None):
        raise ConfigError(
            target, f"it is no run here, and {missing} not given", fix=f"Check the path, or give {missing}"
        )
    data = read_data(recipe)
    remarks: list[str] | None = [] if force_base else None
    found = load_evaluable(target, adapter_folder, recipe, data, remarks=remarks)
    by_force = (f"by force: {remark}" for remark in remarks or ())
    for note in (*by_force, *filter(None, [found.note]), *remarks_on(data, found.task.columns())):
        reporter.note(note)
    rows, name = evaluation_rows(recipe, data, split, found.task, is_own_data=is_own_data)
    if predictions is not None:
        own = next((key for key, known in data.splits.items() if known is rows), name)  # what the data set calls it
        rows, predictions = _to_be_answered(rows, own, found.task, recipe, predictions)
        sync.from_main(accelerator, functools.partial(claim, predictions))
    examples = _encoded(found, rows, target, name)
    if (count := examples.num_unlabelled) and predictions is not None:
        reporter.note(f"{name}: {count:,} of {len(examples):,} rows have no label: nothing is scored")
    found.model.to(accelerator.device)
    with reporter.bar(f"evaluate {name}", len(examples)) as bar:
        outcome = evaluate_split(
            found.model, found.task, examples, accelerator, **_eval_batch(found, recipe), source=rows.source,
            num_workers=recipe.train.num_workers, on_batch=bar.advance_by, allow_missing=predictions is not None,
        )  # fmt: skip
    if predictions is not None and accelerator.is_main_process:
        check_replaceable(predictions, overwrite=overwrite)  # again: scoring may have taken hours
        _write_answers(predictions, outcome, found.task, recipe)
    written = None if predictions is None else str(predictions)
    return EvaluateResult(metrics=outcome.metrics, split=name, rows=outcome.rows, predictions=written)


def _eval_batch(found: Evaluable, recipe: Recipe) -> dict[str, Any]:
    """The arguments of :func:`evaluate_split` that bound the batches of ``eval``."""
    if recipe.eval.batch_size is not None:
        return {"batch_size": recipe.eval.batch_size}
    size = getattr(getattr(found.model, "config", None), "vocab_size", None)
    rows, positions = default_eval_batch(found.task, recipe.train.batch_size, found.max_length, size)
    return {"batch_size": rows, "max_positions": positions}


def _encoded(found: Evaluable, rows: Split, target: str, split: str) -> Examples:
    """The rows as the model takes them; refuses those that its tables do not hold."""
    check_columns(rows, found.task)
    examples = found.task.encode(rows, found.processor, Reading(max_length=found.max_length, allow_missing=True))
    check_rows(
        found.model, examples, getattr(found.processor, "tokenizer", found.processor), where=f"model '{target}'",
        source=f"the {split} rows", is_text=found.max_length is not None,
    )  # fmt: skip
    return examples


def _write_answers(file: Path, outcome: EvalResult, task: Task, recipe: Recipe) -> None:
    write_predictions(file, outcome.predictions, _answer_names(task, recipe), recipe.eval.prediction_bounds)


def _to_be_answered(rows: Split, name: str, task: Task, recipe: Recipe, place: Path) -> tuple[Split, Path]:
    """The rows, which need no targets, and the file for their answers; ConfigError before anything is scored."""
    if hasattr(task, "write"):
        raise ConfigError("--predictions", f"{task.kind} scores tokens, and has no answer for a row")
    check_labels(_answer_names(task, recipe) or ())
    return with_label_columns(rows, task), prediction_file(place, name, recipe.eval.prediction_files)


def _answer_names(task: Task, recipe: Recipe) -> tuple[str, ...] | None:
    """What is written of a class: its name, or None for its index."""
    return getattr(task, "labels", None) if recipe.eval.prediction_labels == "names" else None


def evaluation_rows(
    recipe: Recipe, data: DataSet, split: str | None, task: Task, *, is_own_data: bool
) -> tuple[Split, str]:
    """The rows to score, and the name of their split.

    Training sets validation rows aside where its data has none; on that data they are cut again, the same for the same
    seed. Other data without a validation split is scored whole.
    """
    names = {
        "train": recipe.data.train_split,
        "validation": recipe.data.validation_split,
        "test": recipe.data.test_split,
    }
    has_validation = data.find(recipe.data.validation_split) is not None
    if split is None and not has_validation and not is_own_data:
        wanted = recipe.data.train_split if data.find(recipe.data.train_split) else recipe.data.test_split
        return data.require(wanted, "--split"), "all"
    split = split or "validation"
    if is_own_data and not has_validation and split in ("train", "validation"):
        rows = data.require(recipe.data.train_split, "--split")
        check_columns(rows, task)
        parts = set_aside(rows, recipe.data.validation_fraction, recipe.train.seed, task.strata(rows))
        return parts[0] if split == "train" else parts[1], split
    named = names.get(split, split)
    # Other data may call its splits otherwise: GLUE's diagnostic set has a test split, MNLI two of other names.
    return data.require(named if data.find(named) else split, "--split"), split
