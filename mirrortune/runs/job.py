# SPDX-License-Identifier: Apache-2.0
"""Assemble the parts of a run from its settings: model source, task, encoded splits, size and memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import nn

from mirrortune.adapters.spec import AdapterSpec
from mirrortune.data.dataset import DataSet, Split
from mirrortune.data.draws import (
    SourceDraws,
    describe_source,
    make_draws,
    repeated_rows,
    source_counts,
    stream_shares,
)
from mirrortune.data.examples import Examples
from mirrortune.data.loader import StreamedExamples
from mirrortune.data.mixture import source_numbers
from mirrortune.data.token_cache import uncached
from mirrortune.data.tokenize import Reading
from mirrortune.errors import ConfigError, all_of, counted
from mirrortune.models.load import (
    ModelSource,
    checkpoint_activations,
    describe_widening,
    empty_model,
    load_tokenizer,
    resolve_dtype,
)
from mirrortune.models.new_tokens import known_tokens, token_rows
from mirrortune.runs.checks import RunSettings
from mirrortune.runs.fit import Stage, Step, check_memory, describe_memory, disk_needs, quantised
from mirrortune.runs.index_checks import Lengths, check_end_tokens, check_rows, longest
from mirrortune.runs.memory import Footprint
from mirrortune.runs.rows import RunRows, choose_rows, describe_trained_on, num_trained_on, read_data
from mirrortune.runs.size import Plan, attach_empty, make_plan
from mirrortune.system.console import Reporter
from mirrortune.system.devices import default_device, is_set, resolve_precision, uses_cuda
from mirrortune.system.disk import check_disk
from mirrortune.tasks.base import TARGET_ROLES, Generates, Task, check_columns, labels_of
from mirrortune.tasks.classes import output_names, with_outputs
from mirrortune.tasks.objective import Objective, make_objective
from mirrortune.training.evaluate import generates
from mirrortune.training.optim import check_matrices, moments_per_number
from mirrortune.training.samples import Samples, choose_samples

_SHOWN = 8  # names of outputs in a note


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that is known about a run before its weights are loaded.

    Attributes:
        settings: settings of the run.
        spec: adapter, adjusted to what the base supports.
        source: source of the base model.
        dtype: dtype of the base weights.
        processor: tokenizer, image processor or feature extractor.
        task: task with its columns and labels.
        max_length: maximum row length in tokens; None for rows that are not text.
        train: training rows; for streamed rows, only the first ones.
        stream: all training rows if they are streamed, else None.
        validation: rows by which the checkpoint is selected.
        reported: rows on which the kept checkpoint is only scored, by name: :data:`HELD_OUT` or the name of a split.
        test_rows: number of rows in the test split, or None; they are checked, but not used in training.
        data_origin: origin of the data, for ``environment.json``.
        plan: adapted layers and numbers of parameters.
        footprint: estimated memory.
        eval_batch_size: maximum number of rows per batch in an evaluation.
        eval_max_positions: maximum number of positions per batch in an evaluation, or None.
        duplicated_rows: number of validation rows whose texts or files are also in the training rows.
        objective: training loss.
        samples: prompts that are answered at each evaluation, or None.
        draws: what an epoch draws from each source of a mixture; None where it is every row once.
        sources: path, weight and rows of each source of a mixture; empty for a single data set.
    """

    settings: RunSettings
    spec: AdapterSpec
    source: ModelSource
    dtype: torch.dtype
    processor: Any
    task: Task
    max_length: int | None
    train: Examples
    stream: StreamedExamples | None
    validation: Examples
    reported: dict[str, Examples]
    test_rows: int | None
    data_origin: dict[str, Any]
    plan: Plan
    footprint: Footprint
    eval_batch_size: int
    eval_max_positions: int | None
    duplicated_rows: int
    objective: Objective
    samples: Samples | None
    draws: SourceDraws | None
    sources: list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Base:
    """The base model without weights, and the processor of its rows."""

    source: ModelSource
    dtype: torch.dtype
    spec: AdapterSpec
    model: nn.Module
    plan: Plan
    processor: Any
    max_length: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Encoded:
    """The encoded splits of a run."""

    train: Examples
    stream: StreamedExamples | None
    validation: Examples
    reported: dict[str, Examples]

    @property
    def by_name(self) -> dict[str, Examples]:
        """All splits that training and evaluation use, by name."""
        return {"train": self.train, "validation": self.validation, **self.reported}


def assemble(settings: RunSettings, reporter: Reporter, data: DataSet | None = None) -> Job:
    """Check the settings of a run against its data and model, tokenise the data, and estimate the size of the run.

    No weights are read. Problems of the data and of the model are found before rows are tokenised and are reported
    together.

    Args:
        settings: result of :func:`mirrortune.runs.checks.unpack`.
        reporter: prints notes.
        data: data set; read from ``settings.data`` by default.

    Raises:
        ConfigError: settings, model and data do not fit together.
        DataError: the data is damaged or lacks required columns or labels.
        HubError: the model or the data cannot be downloaded.
        ResourceError: the run does not fit into memory or on disk.
    """
    rows, source = all_of(
        lambda: choose_rows(settings, data or read_data(settings.data, settings.task), reporter), settings.model.find
    )
    source = _with_new_tokens(settings.data.add_tokens, source, rows.task, reporter)
    task, notes = rows.task.for_model(source)
    if len(labels_of(task)) == _outputs_of_head(source, task):  # training continues that head
        task, more = with_outputs(task, source.config, is_given=settings.task.labels is not None)
        notes = [*notes, *more]
    for text in (*notes, *_new_head_notes(source, task)):
        reporter.note(text)
    rows = replace(rows, task=task)
    base = _size(settings, rows, source, reporter)
    encoded = _encode(settings, rows, base, reporter)
    objective = make_objective(rows.task, settings.classes, encoded.train)
    for text in objective.notes():
        reporter.note(text)
    duplicated = _count_duplicates(rows, reporter)
    draws, sources = _mixture(settings, rows, encoded, reporter)
    samples = choose_samples(
        rows.task, rows.validation, base.processor, Reading(max_length=base.max_length), settings.eval.samples
    )  # fmt: skip
    footprint, eval_batch_size, eval_max_positions = _fit(settings, rows.task, encoded, samples, base, reporter)
    return Job(
        settings=settings, spec=base.spec, source=source, dtype=base.dtype, processor=base.processor, task=rows.task,
        max_length=base.max_length, train=encoded.train, stream=encoded.stream, validation=encoded.validation,
        reported=encoded.reported, test_rows=None if rows.test is None else rows.test.table.num_rows,
        data_origin=rows.origin, plan=base.plan, footprint=footprint, eval_batch_size=eval_batch_size,
        eval_max_positions=eval_max_positions, duplicated_rows=duplicated, objective=objective,
        samples=samples, draws=draws, sources=sources,
    )  # fmt: skip


def _outputs_of_head(source: ModelSource, task: Task) -> int | None:
    """Return the number of outputs of the checkpoint's head; None if it has no head of the task's kind."""
    names, outputs = getattr(source.config, "architectures", None) or (), getattr(source.config, "num_labels", None)
    kind = task.auto_class.removeprefix("AutoModel")
    return outputs if labels_of(task) and any(str(name).endswith(kind) for name in names) else None


def _new_head_notes(source: ModelSource, task: Task) -> Iterator[str]:
    """Yield a note if the head of the checkpoint is of the task's kind, but has another size and is replaced."""
    outputs, labels = _outputs_of_head(source, task), labels_of(task)
    if outputs is not None and outputs != len(labels):
        names = output_names(source.config)
        shown = f" ({', '.join(names[:_SHOWN])}{', ...' * (len(names) > _SHOWN)})" if names else ""
        text = f"the model's head has {counted(outputs, 'output')}{shown}, the data {len(labels)} classes: "
        # Many share no class with the data, such as those of ImageNet.
        can_continue = outputs > len(labels) and not {*map(str.casefold, labels)}.isdisjoint(map(str.casefold, names))
        yield (
            f"{text}a new head is trained"
            + f"; a list of {outputs} in task.labels continues the old one" * can_continue
        )


def _with_new_tokens(tokens: tuple[str, ...], source: ModelSource, task: Task, reporter: Reporter) -> ModelSource:
    """Return the source with those of ``tokens`` that its tokenizer lacks; the others are noted."""
    if not tokens:
        return source
    processor = task.load_processor(source)
    tokenizer = getattr(processor, "tokenizer", processor)
    if not hasattr(tokenizer, "get_vocab"):
        raise ConfigError("data.add_tokens", f"{task.kind} reads no text", fix="Remove it")
    if known := known_tokens(tokenizer, tokens):
        reporter.note(f"in the vocabulary already, and not added: {', '.join(known)}")
    return replace(source, new_tokens=tuple(token for token in tokens if token not in known))


def _size(settings: RunSettings, rows: RunRows, source: ModelSource, reporter: Reporter) -> _Base:
    """Build the model on the meta device, count its trained parameters, and load the processor."""
    task, spec = rows.task, settings.adapter
    if source.is_quantised and spec.preset.core is not None and spec.strategy is None:
        spec = replace(spec, strategy="branch")  # the only strategy that does not change packed weights
    if spec.basis == "gradient":
        _check_measurable(spec, source)
    if source.new_tokens:
        spec = replace(spec, new_rows=token_rows(load_tokenizer(source), source.new_tokens))
    dtype = resolve_dtype(settings.model.dtype, source.config, default_device())
    if said := describe_widening(settings.model.dtype, source.config, default_device()):
        reporter.note(said)
    model = task.trim(empty_model(source, task.auto_class, task.config_fields()))
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    asked = settings.data.max_length
    plan, (processor, max_length), _ = all_of(
        lambda: make_plan(model, spec),
        lambda: _processor(task, source, asked),
        lambda: _check_splits(rows),
    )
    if settings.loop.optimizer == "muon":
        adapted = copy.deepcopy(model)
        attach_empty(adapted, spec, plan.targets, dtype=dtype)
        check_matrices(adapted, settings.loop.optimizer)
    max_length = _fitting_length(asked, task, model, processor, source, max_length, reporter)
    return _Base(
        source=source, dtype=dtype, spec=spec, model=model, plan=plan, processor=processor, max_length=max_length
    )


def _check_measurable(spec: AdapterSpec, source: ModelSource) -> None:
    """Refuse weights that have no gradients."""
    if source.is_quantised:
        raise ConfigError(
            "adapter.method", f"the bases of '{spec.method}' are gradients of weights, and {source.name} is quantised",
            allowed="another method", fix="Use the model in full precision",
        )  # fmt: skip


def _processor(task: Task, source: ModelSource, asked: int | None) -> tuple[Any, int | None]:
    processor = task.load_processor(source)
    return processor, task.resolve_length(asked, processor, source.config)


def _check_splits(rows: RunRows) -> None:
    splits = [rows.train, rows.validation, *rows.reported.values(), *([] if rows.test is None else [rows.test])]
    all_of(*(partial(check_columns, split, rows.task) for split in splits))


def _fitting_length(
    asked: int | None, task: Task, model: nn.Module, processor: Any, source: ModelSource, max_length: int | None,
    reporter: Reporter,
) -> int | None:  # fmt: skip
    """Return ``max_length``, reduced to the model's number of positions if ``asked`` is None.

    Raises:
        ConfigError: the requested length of rows or target texts exceeds the model's position table.
    """
    if max_length is None:
        return None
    targets = task.max_target_length if isinstance(task, Generates) else None
    found = longest(model, task.probe(processor, source.config), Lengths(tokens=max_length, targets=targets))
    if targets is not None and found.targets is not None and found.targets < targets:
        raise ConfigError("task.max_target_length", f"got {targets}, the model takes at most {found.targets} tokens",
                          allowed=f"1 to {found.targets}")  # fmt: skip
    if found.tokens < max_length:
        if asked is not None:
            raise ConfigError("data.max_length", f"got {max_length}, the model takes at most {found.tokens} tokens",
                              allowed=f"4 to {found.tokens}")  # fmt: skip
        reporter.note(f"  the model has positions for {found.tokens} tokens: longer rows are cut")
    return found.tokens


def _encode(settings: RunSettings, rows: RunRows, base: _Base, reporter: Reporter) -> _Encoded:
    """Encode all splits and check their indices against the model's embedding tables."""
    task, processor = rows.task, base.processor
    scored = Reading(
        max_length=base.max_length, seed=settings.data.seed, tell=lambda text: reporter.detail(f"  {text}")
    )
    learned = replace(scored, for_training=True, drop_blank=settings.data.blank_text == "drop")
    encoded = _Encoded(
        train=task.encode(rows.train, processor, learned),
        validation=task.encode(rows.validation, processor, scored),
        reported={name: task.encode(split, processor, scored) for name, split in rows.reported.items()},
        stream=_streamed(settings.data.shuffle_buffer, rows.train, task, base, learned),
    )
    for name, examples in encoded.by_name.items():
        reporter.note(f"  {name}: {examples.describe()}")
    if rows.test is not None:
        _check_test(rows.test, task, processor, scored, reporter)
    where, is_text = f"model '{base.source.name}'", base.max_length is not None
    check = partial(check_rows, base.model, processor=processor, where=where, is_text=is_text)
    all_of(*(partial(check, examples, source=f"the {name} rows") for name, examples in encoded.by_name.items()))
    return encoded


def _streamed(block_rows: int, rows: Split, task: Task, base: _Base, reading: Reading) -> StreamedExamples | None:
    """Return the rows of a streamed split, or None; they are encoded in a separate thread with its own processor."""
    if rows.stream is None:
        return None
    own, where = copy.deepcopy(base.processor), f"model '{base.source.name}'"

    def encode(table: pa.Table, seed: int) -> Examples:
        # The order of the files changes every epoch, so rows are numbered within their block.
        source = f"{rows.source} (a block of the stream)"
        block = replace(rows, table=table, stream=None, source=source, files=(), kept=None)
        with uncached():
            examples = task.encode(block, own, replace(reading, seed=seed))
        check_end_tokens(base.model, examples, own, where=where, source=source)
        return examples

    return StreamedExamples(stream=rows.stream, encode=encode, block_rows=block_rows)


def _check_test(test: Split, task: Task, processor: Any, reading: Reading, reporter: Reporter) -> None:
    """Read the test rows as ``eval`` will, so that an unknown label is found before training."""
    examples = task.encode(test, processor, replace(reading, allow_missing=True))
    count = examples.num_unlabelled
    without = f"; {count:,} without a label, which can be answered and not scored" if count else ""
    reporter.note(f"  test: {examples.describe()}{without}")


def _count_duplicates(rows: RunRows, reporter: Reporter) -> int:
    """Return how many validation rows are also training rows; print this number for every scored split."""
    splits = {"validation": rows.validation, **rows.reported, **({} if rows.test is None else {"test": rows.test})}
    found = {name: num_trained_on(rows.train, split, rows.task) for name, split in splits.items()}
    for name, count in found.items():
        if count:
            reporter.note(f"  {describe_trained_on(count, f'{name} row')}")
    return found["validation"]


def _mixture(
    settings: RunSettings, rows: RunRows, encoded: _Encoded, reporter: Reporter
) -> tuple[SourceDraws | None, list[dict[str, Any]]]:
    """Return what an epoch draws from each source of a mixture, and the counts of each, which are printed."""
    sources, table = settings.data.sources, rows.train.table
    if source_numbers(table) is None:
        return None, []
    if encoded.stream is not None:
        shares = stream_shares(sources)
        for found in shares:
            reporter.note(f"  source {found['path']}: streamed, {found['share']:.1%} of the rows")
        return None, shares
    draws = make_draws(table, encoded.train, [source.weight for source in sources])
    counts = source_counts(sources, table, encoded.train, draws)
    inputs = [(role, column) for role, column in rows.task.columns() if role not in TARGET_ROLES]
    for found, repeated in zip(counts, repeated_rows(rows.train, inputs, len(sources)), strict=True):
        found["repeated"] = repeated
        reporter.note(describe_source(found))
    return draws, counts


def _fit(
    settings: RunSettings, task: Task, encoded: _Encoded, samples: Samples | None, base: _Base, reporter: Reporter
) -> tuple[Footprint, int, int | None]:
    """Estimate the memory of the run, and choose the maximum rows and positions of a batch in an evaluation.

    Raises:
        ResourceError: the run does not fit on the device or on the disks.
    """
    plan, loop = base.plan, settings.loop
    for line in (*plan.lines(), *settings.unused):
        reporter.note(line)
    if stored_as := plan.stored_as(settings.form, base.dtype):
        reporter.note(stored_as)
    if as_lora := plan.as_lora():
        reporter.detail(as_lora)
    stage = Stage(
        model=base.model, config=base.source.config.to_dict(), task=task, train=encoded.train,
        scored=(encoded.validation, *encoded.reported.values()), has_length=base.max_length is not None,
        spec=base.spec, targets=plan.targets,
        device="cuda" if uses_cuda() else "cpu",
        keeps_weights=samples is not None
        or any(generates(task, examples) for examples in (encoded.validation, *encoded.reported.values())),
    )  # fmt: skip
    step = Step(
        spec=base.spec, dtype=base.dtype, rows=min(loop.batch_size, len(stage.train)),
        accumulation=loop.gradient_accumulation_steps,
        is_16bit_compute=resolve_precision(settings.model.precision) != "fp32", scored=settings.eval.batch_size,
    )  # fmt: skip
    estimate, scored_rows, scored_positions = stage.sized(step)
    moments = moments_per_number(loop.optimizer, is_of_matrices=base.spec.preset.plain == "all")
    found = quantised(estimate, base.source.load_in, plan, base.dtype)
    found = replace(found, optimizer=int(moments * found.gradients))  # in place of AdamW's two moments
    reporter.note(describe_memory(found, step, stage, plan))
    needs = disk_needs(
        base.source, plan, output_dir=Path(settings.output_dir or "runs"), keep=loop.keep, moments=moments
    )
    # FSDP and DeepSpeed divide memory by the number of processes, which is not known before they have connected.
    is_cut = is_set("ACCELERATE_USE_FSDP") or is_set("ACCELERATE_USE_DEEPSPEED")
    checks = [] if is_cut else [lambda: check_memory(found, step, stage)]
    all_of(*checks, lambda: check_disk(needs))
    return found, scored_rows, scored_positions
