# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a model as a recipe describes and write a run directory (the ``train`` command)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from mirrortune.adapters.files.adapter_file import write_adapter
from mirrortune.adapters.files.load import FingerprintBook
from mirrortune.adapters.inject import head_parameters, trainable_parameters
from mirrortune.adapters.peft_bridge.tuners import remarks
from mirrortune.config.recipe import Resolved, flatten, with_absolute_paths
from mirrortune.errors import ConfigError, MirrortuneError
from mirrortune.models.load import checkpoint_activations
from mirrortune.reports.model_card import own_card
from mirrortune.runs.adapted_base import base_identity, by_strategy, load_adapted_base
from mirrortune.runs.checks import RunSettings, data_places, inputs_of, unpack
from mirrortune.runs.job import Job, assemble
from mirrortune.runs.prepare import remarks_on_steps
from mirrortune.runs.recorder import record_validation, recording
from mirrortune.runs.results import (
    RunResult,
    as_started,
    check_same_base,
    check_same_data,
    check_same_recipe,
    environment,
    other_defaults,
    peak_memory_bytes,
    peak_reserved_bytes,
    restore_kept,
    run_name,
    score_reported,
    write_results,
)
from mirrortune.system.compiler import compile_model
from mirrortune.system.console import Reporter, digits
from mirrortune.system.distributed import sync
from mirrortune.system.distributed.processes import describe_processes, make_accelerator, seed_everything
from mirrortune.system.distributed.sharding import Sharding
from mirrortune.system.outputs import restore
from mirrortune.system.paths import local_path
from mirrortune.system.run_directory import RunDirectory
from mirrortune.system.run_status import recorded_status
from mirrortune.tasks.base import ComparesRows, Task, generated_tokens, task_to_dict
from mirrortune.tasks.metrics import METRICS
from mirrortune.training.evaluate import EvalResult
from mirrortune.training.settings import FitResult, LoopSettings
from mirrortune.training.trainer import Trainer


def train(
    resolved: Resolved, reporter: Reporter, *, recipe_name: str | None, resume: bool = False, overwrite: bool = False
) -> RunResult:
    """Fine-tune a model as a recipe describes and write a run directory.

    Args:
        resolved: recipe with the origins of its values.
        reporter: prints notes and progress.
        recipe_name: name of the recipe, used in the default name of the run directory.
        resume: continue the run in the directory.
        overwrite: replace the run in the directory.
    """
    recipe = resolved.recipe
    settings = unpack(recipe)
    if resume and overwrite:
        raise ConfigError("--resume", "it excludes --overwrite", fix="Give one of the two")
    run = _run_to_write(resolved, settings, recipe_name, resume=resume)
    if resume:
        # A changed method or kind of task need not take the recorded defaults; the check below names the change.
        with suppress(MirrortuneError):
            settings = unpack(as_started(recipe, run))
    # Absolute paths, so that the saved recipe reproduces the run from any working directory.
    recipe = with_absolute_paths(recipe).model_copy(update={"output_dir": str(run.path)})
    settings = replace(
        settings, model=replace(settings.model, name=recipe.model.name),
        data=replace(settings.data, **data_places(recipe)), output_dir=recipe.output_dir,
    )  # fmt: skip
    accelerator = _meet(settings, reporter)
    inputs = inputs_of(resolved)
    with ExitStack() as held:

        def claim() -> None:
            held.enter_context(run.held(inputs, overwrite=overwrite, resume=resume))
            if resume:
                check_same_recipe(recipe, run)
                unpack(as_started(recipe, run))  # for the error that was suppressed, if nothing has been changed

        def create() -> None:
            card = own_card(run.path)
            run.create(inputs, overwrite=overwrite)
            if card is not None:
                run.write_file("README.md", lambda file: file.write_bytes(card))
                reporter.note(f"{run.path / 'README.md'} is kept, as it was written or edited by hand")

        sync.from_main(accelerator, claim)
        resolved = replace(resolved, recipe=recipe)
        return _train(settings, resolved, run, accelerator, reporter, None if resume else create)


def check_output(resolved: Resolved, *, recipe_name: str | None, resume: bool = False, overwrite: bool = False) -> None:
    """Check that :func:`train` may write its run directory. Nothing is written.

    Raises:
        ConfigError: it may not; the error says what to do instead.
    """
    run = _run_to_write(resolved, unpack(resolved.recipe), recipe_name, resume=resume)
    restore(run.path)  # leftovers of a killed process are cleaned up, not refused
    run.check(inputs_of(resolved), overwrite=overwrite, resume=resume)


def _run_to_write(
    resolved: Resolved, settings: RunSettings, recipe_name: str | None, *, resume: bool
) -> RunDirectory:  # fmt: skip
    folder = settings.output_dir or f"runs/{run_name(settings, recipe_name)}"
    return (_run_beside(resolved) if resume else None) or RunDirectory(local_path(folder))


def _run_beside(resolved: Resolved) -> RunDirectory | None:
    """Return the run whose saved recipe was given, if that recipe sets the output directory.

    The run may have been moved since, so its folder takes precedence over the recorded path.
    """
    for file in resolved.files:
        run = RunDirectory(file.parent)
        says_where = resolved.origins.get("output_dir", "").startswith(f"{file}:")
        if says_where and file.name == run.recipe.name and run.is_marked:
            return run
    return None


def _train(
    settings: RunSettings,
    resolved: Resolved,
    run: RunDirectory,
    accelerator: Any,
    reporter: Reporter,
    create: Callable[[], None] | None,
) -> RunResult:
    """Train in a claimed run directory; ``create`` creates it and is None if the run is resumed."""
    recipe, resume = resolved.recipe, create is None
    job = _assemble(settings, run if resume else None, accelerator, reporter)
    describe_processes(accelerator, reporter, run.path)
    seed_everything(settings.loop.seed)  # the head's initial weights
    adapted = load_adapted_base(job, run, accelerator, reporter, resume=resume)
    model = adapted.model
    # Only the main process, which may be replacing the run that the recipe is of.
    differing = other_defaults(job, resolved) if reporter.is_main and not resume else ()
    for text in (*remarks(model), *differing):
        reporter.note(text)

    def record() -> None:
        if create is None:
            check_same_base(adapted.weights, run)
        else:
            create()
            found = environment(job, resolved, accelerator, by_strategy(adapted.strategies), adapted.weights)
            run.write_json("environment.json", found)
        run.write_text(run.recipe.name, recipe.to_yaml())  # a resumed run may have changed settings

    # An earlier run is replaced only now that everything that could fail has been loaded.
    sync.from_main(accelerator, record)
    with recorded_status(run, is_main=accelerator.is_main_process):
        # Seeds dropout: independent of whether caches were filled, and different on each rank.
        seed_everything(settings.loop.seed + 1 + accelerator.process_index)
        num_trained, num_head = trainable_parameters(model), head_parameters(model)  # before they are sharded
        fitted, best = _fit(job, model, adapted.book, run, accelerator, reporter, flatten(recipe), resume=resume)
        for text in _remarks_on(fitted, job):
            reporter.note(text)
        restore_kept(model, run)
        reported = score_reported(job, model, run, accelerator, reporter)
        record_validation(job, model, run, accelerator, best)
        result = RunResult(
            **_rounded(fitted), run_dir=str(run.path), trainable_parameters=num_trained, head_parameters=num_head,
            adapter_bytes=sum(f.stat().st_size for f in run.adapter.iterdir()), peak_memory_bytes=peak_memory_bytes(),
            peak_reserved_bytes=peak_reserved_bytes(),
            reported=reported, pairing_seconds=adapted.pairing_seconds, protocol=settings.eval.protocol,
            selection_metric=job.task.selection_metric, sources=job.sources,
        )  # fmt: skip
        if accelerator.is_main_process:
            write_results(run, job, recipe, result)
    return result


def _assemble(settings: RunSettings, resumed: RunDirectory | None, accelerator: Any, reporter: Reporter) -> Job:
    """Assemble the job of a run, and check that it can be resumed on this data and launched in this way."""
    job = assemble(settings, reporter)
    if resumed is not None:
        sync.from_main(accelerator, lambda: check_same_data(job, resumed, reporter))
    if (library := Sharding.of(accelerator).library) and job.source.is_quantised:
        raise ConfigError("model.load_in", f"{library} is untested with quantised weights", fix="Use ddp")
    return job


def _rounded(fitted: FitResult) -> dict[str, Any]:
    """Return the fields of a result, with measured times rounded."""
    tokens, padding = fitted.tokens_per_second, fitted.padding_share
    return {
        **asdict(fitted),
        "train_seconds": round(fitted.train_seconds, 3),
        "samples_per_second": digits(fitted.samples_per_second),
        "tokens_per_second": None if tokens is None else digits(tokens),
        "padding_share": None if padding is None else digits(padding),
    }


def _remarks_on(result: FitResult, job: Job) -> Iterator[str]:
    """Yield remarks on the outcome of training."""
    if result.stopped_early:
        count = job.settings.loop.patience
        yield f"stopped early: {count} evaluation{'s' * (count != 1)} in a row without a better one"
    if result.skipped_steps:
        skipped = f"{result.skipped_steps} of {result.global_step} steps"
        yield f"{skipped} were skipped because their gradients overflowed in float16"
    name, before = job.task.selection_metric, result.metrics_before
    sign = 1 if METRICS[name].higher_is_better else -1
    if before is not None and sign * result.metrics[name] <= sign * before[name]:
        yield f"warning: no checkpoint has a better {name} than the model before training ({before[name]:.4f})"


def _meet(settings: RunSettings, reporter: Reporter) -> Any:
    """Make accelerate's ``Accelerator`` and check that the settings suit the way it shards the model."""
    has_idle = settings.adapter.trains_base
    accelerator = make_accelerator(settings.model.precision, has_idle_parameters=has_idle)
    reporter.is_main = accelerator.is_main_process

    sharding = Sharding.of(accelerator)

    def check() -> None:
        if sharding.shards_weights and settings.form == "portable":
            problem = f"no process has whole factors under {sharding.name}"
            if settings.adapter.basis == "gradient":
                raise ConfigError("adapter.method", f"{problem}, and '{settings.adapter.method}' stores its own",
                                  allowed="another method", fix="Use ddp")  # fmt: skip
            raise ConfigError("adapter.form", problem, allowed="auto or compact")
        if sharding.library and settings.loop.optimizer != "adamw":
            problem = f"{settings.loop.optimizer} is untested under {sharding.name}"
            raise ConfigError("train.optimizer", problem, allowed="adamw", fix="Use ddp")
        if sharding.library and settings.loop.neftune_alpha is not None:
            raise ConfigError("train.neftune_alpha", f"it is untested under {sharding.name}", fix="Use ddp")
        if sharding.library and settings.data.add_tokens:
            raise ConfigError("data.add_tokens", f"it is untested under {sharding.name}", fix="Use ddp")

    sync.from_main(accelerator, check)
    return accelerator


def _fit(
    job: Job,
    model: nn.Module,
    book: FingerprintBook,
    run: RunDirectory,
    accelerator: Any,
    reporter: Reporter,
    flat_recipe: dict[str, Any],
    *,
    resume: bool,
) -> tuple[FitResult, EvalResult | None]:
    def write_adapter_files(folder: Path) -> int:
        base, task, form = base_identity(job), task_to_dict(job.task), job.settings.form
        extra = {"max_length": job.max_length}
        return write_adapter(folder, model, book.entries, base=base, task=task, extra=extra, form=form)

    def sample(step: int) -> None:
        if job.samples is not None:
            job.samples.answer(model, job.task, run, accelerator, step)

    if job.settings.gradient_checkpointing:
        checkpoint_activations(model)
    if job.settings.compile:
        compile_model(model, accelerator)
    with recording(job.settings.track, flat_recipe, model, run, accelerator, reporter) as progress:
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
            objective=job.objective,
            sample=sample if job.samples is not None else None,
            draws=job.draws,
        )
        rows = job.settings.loop.batch_size * accelerator.num_processes
        remarks_on_length = remarks_on_steps(job.settings.loop, trainer.total_steps, trainer.steps_per_epoch)
        for text in (*remarks_on_length, *_remarks_on_batches(job.task, rows)):
            reporter.note(text)
        if resume:
            trainer.resume()
        return trainer.fit(), trainer.best_result


def _remarks_on_batches(task: Task, rows: int) -> Iterator[str]:
    """Yield remarks on micro-batches of ``rows`` rows, counted over all processes."""
    texts = [column for role, column in task.columns() if role == "text"]
    if isinstance(task, ComparesRows) and rows == 1 and len(texts) == 2:  # a third one is a negative of the same row
        yield "warning: a batch of one row has no other rows to compare with, so nothing is learned: raise --batch-size"


def _settings(job: Job, accelerator: Any) -> LoopSettings:
    before = job.settings.eval.before
    return replace(
        job.settings.loop,
        eval_batch_size=job.eval_batch_size,
        eval_max_positions=job.eval_max_positions,
        eval_before=_costs_little(job, accelerator.num_processes) if before == "auto" else before,
    )


def _costs_little(job: Job, num_processes: int) -> bool:
    """Return whether scoring the validation rows takes less than a tenth of the run, counted in forward passes."""
    loop = job.settings.loop
    if job.settings.compile:  # evaluation would compile a second graph before the first step
        return False
    rows = loop.epochs * (len(job.train) if job.draws is None else job.draws.size)
    if loop.max_steps is not None:
        steps = loop.max_steps * loop.batch_size * loop.gradient_accumulation_steps * num_processes
        rows = steps if job.stream else min(rows, steps)
    trained = 3 * rows * float(job.train.lengths.mean())  # the backward pass costs as much as two forward passes
    # Tasks that generate answers call the decoder once per token.
    passes = 1 + generated_tokens(job.task)
    scored = passes * float(job.validation.lengths.sum())
    return scored < 0.1 * (scored + trained)
