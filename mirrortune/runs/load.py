# SPDX-License-Identifier: Apache-2.0
"""Load a base with a new adapter for training, or the target of ``eval`` or ``predict``."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor, nn

from mirrortune.adapters.factor_cache import FactorCache
from mirrortune.adapters.files.adapter_file import AdapterFile, read_adapter
from mirrortune.adapters.files.load import FingerprintBook, adapt, stored_bases, stored_pairs
from mirrortune.adapters.fingerprint import sampled_digest
from mirrortune.adapters.spec import AdapterSpec, make_pairs, needs_saliency
from mirrortune.adapters.strategies import Strategy
from mirrortune.adapters.svd import Factors
from mirrortune.adapters.targets import Targets, complete_targets
from mirrortune.data.dataset import DataSet, Split
from mirrortune.data.labels import in_order
from mirrortune.errors import ConfigError, DataError
from mirrortune.merging.bases import as_computed_here, load_adapted, load_unadapted
from mirrortune.models.gaps import describe_missing
from mirrortune.models.load import (
    LoadedModel,
    ModelSource,
    describe_widening,
    find_model,
    load_model,
    pad_token_id,
    resolve_dtype,
)
from mirrortune.models.tensors import Layer, stored_layers
from mirrortune.runs.checks import EvaluationSettings, TaskRequest
from mirrortune.runs.fit import typical_tokens
from mirrortune.runs.job import Job
from mirrortune.runs.rows import any_split
from mirrortune.runs.size import strategies_of
from mirrortune.system.console import Reporter
from mirrortune.system.devices import default_device, factorising_device, widen
from mirrortune.system.distributed import sync
from mirrortune.system.distributed.sharding import Sharding
from mirrortune.system.paths import hub_place, read_json_object
from mirrortune.system.run_directory import RunDirectory
from mirrortune.tasks.base import (
    Answers,
    ComparesRows,
    HasLabels,
    Task,
    labels_of,
    settings_of,
    task_class,
    task_from_dict,
    with_columns,
)
from mirrortune.tasks.classes import OneOfClasses, output_names, with_outputs
from mirrortune.tasks.metrics import KINDS_OWN
from mirrortune.training.calibration import Calibration


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluable:
    """A model with its task, and notes for the user."""

    model: nn.Module
    task: Task
    processor: Any
    max_length: int | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A job's base model with a new head, and the layers that the job's adapter will change.

    ``missing`` are the parameters of the base that its checkpoint lacks.
    """

    model: nn.Module
    targets: Targets
    missing: tuple[str, ...]


def load_base(job: Job) -> Base:
    """Load the job's base model with a new head."""
    fields, pad = job.task.config_fields(), pad_token_id(job.processor)
    loaded = load_model(job.source, job.task.auto_class, fields, job.dtype, pad)
    model, new = _trimmed(job.task, loaded)
    job.train.verify(model)
    missing = tuple(name for name in loaded.missing if name in new)
    return Base(model=model, targets=complete_targets(job.plan.targets, model, job.spec, new), missing=missing)


def _trimmed(task: Task, loaded: LoadedModel) -> tuple[nn.Module, list[str]]:
    """Remove modules that the task does not use; return the model and the names of parameters the checkpoint lacks."""
    model = task.trim(loaded.model)
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return model, [name for name in loaded.new_parameters if name in names]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedBase:
    """A job's base model with a new adapter.

    Attributes:
        model: the model.
        book: fingerprints of its layers.
        strategies: how layers compute, by layer.
        pairing_seconds: time in which pairs or bases were measured; 0 if they were not.
        weights: digests of the base's weights: of samples of all, and of the adapted ones.
    """

    model: nn.Module
    book: FingerprintBook
    strategies: dict[str, Strategy]
    pairing_seconds: float
    weights: dict[str, str]


def load_adapted_base(
    job: Job, run: RunDirectory, accelerator: Any, reporter: Reporter, *, resume: bool
) -> AdaptedBase:
    """Load a job's base model and attach its adapter; pairs and strategies of a resumed run are those it began with."""
    loaded = load_base(job)
    if loaded.missing:
        reporter.note(describe_missing(loaded.missing))
    weights = {"sampled": sampled_digest(loaded.model, loaded.targets.head)}
    cache = FactorCache(on_remark=reporter.note, device=factorising_device(accelerator.device))
    if layers := _layers(job, loaded):  # together with the other processes of the run; none waits for another here
        _share(job, layers, cache, reporter.bar, accelerator.process_index, accelerator.num_processes)
    started = time.perf_counter()
    pairs = choose_pairs(job, loaded, cache, run, accelerator, reporter, resume=resume)
    bases = choose_bases(job, loaded, run, accelerator, reporter, resume=resume)
    pairing_seconds = time.perf_counter() - started if pairs or bases else 0.0
    strategies = choose_strategies(job, loaded.targets, run, accelerator, resume=resume)
    book = adapt_model(loaded, job.spec, cache, pairs, strategies, bases)
    hashes = json.dumps({name: entry.weight_hash for name, entry in sorted(book.entries.items())})
    weights["adapted"] = hashlib.sha256(hashes.encode()).hexdigest()
    return AdaptedBase(
        model=loaded.model, book=book, strategies=strategies, pairing_seconds=pairing_seconds, weights=weights
    )


def adapt_model(
    loaded: Base,
    spec: AdapterSpec,
    cache: FactorCache,
    pairs: dict[str, Tensor] | None = None,
    strategies: Mapping[str, Strategy] | None = None,
    bases: Mapping[str, Factors] | None = None,
) -> FingerprintBook:
    """Attach a new adapter to a loaded base model.

    Args:
        loaded: base from :func:`load_base`.
        spec: adapter.
        cache: cache of factors.
        pairs: measured or stored pairs by layer, or None.
        strategies: strategy of each layer, or None.
        bases: measured or stored factors by layer, in place of those of the weights, or None.
    """
    widen(loaded.model, (*loaded.targets.head, *loaded.targets.plain))
    return adapt(
        loaded.model, spec, targets=loaded.targets, factor_source=cache, pairs=pairs, bases=bases, strategies=strategies
    )


def factorise(job: Job, cache: FactorCache, show_bar: Callable[[str, int], Any]) -> None:
    """Fill the cache with the factors of every adapted layer of a job.

    Weights are read from the files one at a time. The model is loaded only if its weights cannot be read or verified
    that way.
    """
    layers = None
    if job.spec.basis == "weight" and not job.settings.data.packing:
        targets = job.plan.targets.layers
        layers = stored_layers(job.source, job.task.auto_class, job.task.config_fields(), targets, job.dtype)
    if layers is None:
        layers = _layers(job, load_base(job))
    if layers:
        _share(job, layers, cache, show_bar, 0, 1)
        for name, matrix, rank in layers:  # reads and verifies cached factors
            cache(name, matrix(), rank)
        cache.hits = len(layers) - cache.misses


def _share(
    job: Job, layers: list[Layer], cache: FactorCache, show_bar: Callable[[str, int], Any], index: int, count: int
) -> None:
    largest = max(math.prod(target.shape) * target.count for target in job.plan.targets.layers.values())
    with show_bar("singular value decompositions", len(layers)) as bar:
        cache.on_layer = bar.advance
        # Keep at most the size of the model, which need not be in memory itself.
        cache.share(layers, index, count, largest=largest, room=job.plan.total_parameters * job.dtype.itemsize)
    cache.on_layer = None


def _layers(job: Job, loaded: Base) -> list[Layer]:
    """Return the layers that the job factorises."""
    if job.spec.basis != "weight":
        return []
    return [(name, partial(target.read, loaded.model), target.rank) for name, target in loaded.targets.layers.items()]


def choose_pairs(
    job: Job,
    loaded: Base,
    cache: FactorCache,
    run: RunDirectory,
    accelerator: Any,
    reporter: Reporter,
    *,
    resume: bool,
) -> dict[str, Tensor] | None:
    """Return the pairs of each layer, equal on all ranks: stored ones of a resumed run, or measured ones.

    Returns None for a pairing that does not use saliency.
    """
    if not needs_saliency(job.spec):
        return None
    steps = run.saved_steps()
    if resume and steps:
        return stored_pairs(read_adapter(run.checkpoint(steps[-1])))
    started = time.perf_counter()
    pairs = sync.from_main(accelerator, lambda: _measured_pairs(job, loaded, cache, accelerator))
    reporter.note(f"pairs measured on the task in {time.perf_counter() - started:.1f} s")
    return pairs


def _measured_pairs(job: Job, loaded: Base, cache: FactorCache, accelerator: Any) -> dict[str, Tensor]:
    spec, targets = job.spec, loaded.targets
    saliency = _calibration(job, loaded, accelerator).measure_saliency(cache)
    return {name: make_pairs(spec, s.shape[-1], name, s, targets.layers[name].count) for name, s in saliency.items()}


def choose_bases(
    job: Job, loaded: Base, run: RunDirectory, accelerator: Any, reporter: Reporter, *, resume: bool
) -> dict[str, Factors] | None:
    """Return factors by layer, equal on all ranks: those of a resumed run, or measured ones; None where they are those
    of the weights.
    """
    if job.spec.basis != "gradient":
        return None
    steps = run.saved_steps()
    if resume and steps:
        return stored_bases(read_adapter(run.checkpoint(steps[-1])))
    started = time.perf_counter()
    bases = sync.from_all(accelerator, _calibration(job, loaded, accelerator).measure_bases)
    reporter.note(f"bases measured on the task in {time.perf_counter() - started:.1f} s")
    return bases


def _calibration(job: Job, loaded: Base, accelerator: Any) -> Calibration:
    settings = job.settings.calibration
    assert settings is not None
    return Calibration(
        model=loaded.model, targets=loaded.targets, objective=job.objective, examples=job.train, settings=settings,
        accelerator=accelerator, draws=job.draws,
    )  # fmt: skip


def choose_strategies(
    job: Job, targets: Targets, run: RunDirectory, accelerator: Any, *, resume: bool
) -> dict[str, Strategy]:
    """Return the strategy of each layer of ``targets`` by name; a resumed run keeps its strategies.

    Strategies give the same output up to rounding. The one with the fewest multiplications is chosen for speed.

    Args:
        job: assembled job.
        targets: layers of the loaded model.
        run: run directory.
        accelerator: accelerate's ``Accelerator``.
        resume: continue the run.
    """
    if resume:
        return sync.from_main(accelerator, lambda: _stored_strategies(run))
    # The dense strategy replaces weights where they are read, which is untested for sharded weights.
    is_sharded = Sharding.of(accelerator).shards_weights
    tokens = None if is_sharded else typical_tokens(job.train, job.settings.loop.batch_size)
    return strategies_of(targets, job.spec, job.dtype, tokens)


def by_strategy(strategies: Mapping[str, Strategy]) -> dict[str, list[str]]:
    """Group layer names by strategy, the form in which ``environment.json`` stores them."""
    return {s: [name for name, own in strategies.items() if own == s] for s in sorted({*strategies.values()})}


def _stored_strategies(run: RunDirectory) -> dict[str, Strategy]:
    """Return the strategies that the run started with; empty if ``environment.json`` is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
        kept: dict[Strategy, list[str]] = read_json_object(run.path / "environment.json").get("strategies", {})
        return {name: strategy for strategy, names in kept.items() for name in names}
    return {}


def base_identity(job: Job) -> dict[str, Any]:
    """Describe the base of a job for the adapter file."""
    return {
        "name": job.source.name,
        "revision": job.source.revision,
        "commit": job.source.commit,
        "dtype": str(job.dtype).removeprefix("torch."),
        "auto_class": job.task.auto_class,
        **({"load_in": job.source.load_in} if job.source.load_in else {}),
        **({"quantised": True} if job.source.is_stored_packed else {}),
        **({"new_tokens": list(job.source.new_tokens)} if job.source.new_tokens else {}),
    }


def load_evaluable(
    target: str,
    adapter_folder: Path | None,
    settings: EvaluationSettings,
    data: DataSet,
    *,
    remarks: list[str] | None = None,
    is_labelled: bool = True,
) -> Evaluable:
    """Load the target of ``eval`` or ``predict`` with its task.

    Args:
        target: folder or Hub id of a plain model; ignored if there is an adapter.
        adapter_folder: adapter folder from :func:`adapter_to_score`, or None for a plain model.
        settings: settings of the base, if the user named one, and of the task of a plain model.
        data: data set from which columns and labels are read for a plain model.
        remarks: list to which mismatches between adapter and base are appended; None to raise for them.
        is_labelled: the rows have targets. If not, the labels of a plain model are those of its configuration.
    """
    if adapter_folder is not None:
        return _load_run(adapter_folder, settings, remarks, to_predict=not is_labelled)
    place = hub_place(target)
    request = settings.model
    source = find_model(
        place.repository, revision=place.revision or request.revision, trust_remote_code=request.trust_remote_code
    )
    make_task = _plain_task if is_labelled else _unlabelled_task
    made, notes = make_task(settings, data, source.config)
    task, _ = made.for_model(source)
    processor = task.load_processor(source)
    dtype = resolve_dtype(request.dtype, source.config, default_device())
    loaded = load_model(source, task.auto_class, {}, dtype, pad_token_id(processor))
    model, new = _trimmed(task, loaded)
    if new:
        raise ConfigError(
            target,
            f"it has no trained head for this task ({', '.join(new[:3])} are missing)",
            fix="Evaluate a run directory, a merged folder or a fine-tuned model",
        )
    max_length = task.resolve_length(settings.data.max_length, processor, source.config)
    notes += filter(None, [describe_widening(request.dtype, source.config, default_device())])
    return Evaluable(model=model.eval(), task=task, processor=processor, max_length=max_length, notes=tuple(notes))


def _load_run(
    adapter_folder: Path, settings: EvaluationSettings, remarks: list[str] | None, *, to_predict: bool
) -> Evaluable:
    adapter = read_adapter(adapter_folder)
    if adapter.task is None:
        raise ConfigError(
            str(adapter_folder), "the adapter was saved outside a task", fix="Merge it and evaluate the merged model"
        )
    task = task_of_run(adapter.task, settings.task, to_predict=to_predict)
    name = settings.model.name or adapter.base.get("name")
    if name is None:
        raise ConfigError(str(adapter_folder), "the adapter does not say what its base is", fix="Name it with --model")
    is_named = name == adapter.base.get("name")  # the recorded commit is not valid for another source of the base
    source = find_model(
        name,
        revision=adapter.base.get("commit") or adapter.base.get("revision") if is_named else settings.model.revision,
        trust_remote_code=settings.model.trust_remote_code,
        load_in=adapter.base.get("load_in"),
        new_tokens=adapter.base.get("new_tokens", ()),
    )
    load = partial(load_adapted, factor_source=FactorCache(), remarks=remarks)
    return _of_adapter(adapter, source, task, settings, load)


def _of_adapter(
    adapter: AdapterFile, source: ModelSource, task: Task, settings: EvaluationSettings, load: Callable[..., nn.Module]
) -> Evaluable:
    """Load the base of an adapter, with or without it, and widen it to float32 if 16 bits are slow here."""
    processor = task.load_processor(source)
    model, notes = as_computed_here(load(adapter, source, task, pad_token_id(processor)), adapter, source)
    asked = settings.data.max_length or adapter.extra.get("max_length")
    max_length = task.resolve_length(asked, processor, source.config)
    return Evaluable(model=model.eval(), task=task, processor=processor, max_length=max_length, notes=notes)


def load_base_of(adapter: AdapterFile, target: str, settings: EvaluationSettings) -> Evaluable:
    """Load the model ``target`` as the base of an adapter, without attaching it, with the adapter's task.

    Args:
        adapter: adapter that determines dtype, model class and task.
        target: folder or Hub id of the base.
        settings: settings that override columns and maximum length.

    Raises:
        ConfigError: the adapter was saved without a task.
    """
    if adapter.task is None:
        raise ConfigError(str(adapter.folder), "the adapter was saved outside a task", fix="Use it in Python")
    task, place = task_of_run(adapter.task, settings.task), hub_place(target)
    source = find_model(
        place.repository, revision=place.revision or settings.model.revision,
        trust_remote_code=settings.model.trust_remote_code, load_in=adapter.base.get("load_in"),
    )  # fmt: skip
    return _of_adapter(adapter, source, task, settings, load_unadapted)


def task_of_run(stored: dict[str, Any], request: TaskRequest, *, to_predict: bool = False) -> Task:
    """Return the task that an adapter was trained for, with columns replaced by those in ``request``; see
    :func:`~mirrortune.tasks.base.with_columns`.
    """
    if request.kind not in (None, stored["kind"]):
        raise ConfigError("--task", f"the run was trained for {stored['kind']}, got {request.kind}")
    return with_columns(task_from_dict(stored), request.columns, to_predict=to_predict)


def _plain_task(settings: EvaluationSettings, data: DataSet, config: Any) -> tuple[Task, list[str]]:
    """Create the task of a plain model, with classes in the order of the model's outputs; return it with notes."""
    task = data.task or _of_few_classes(settings.task, any_split(settings.data, data), output_names(config))
    task, notes = with_outputs(task, config, is_given=settings.task.labels is not None)
    outputs, wanted = getattr(config, "num_labels", None), task.config_fields().get("num_labels")
    if wanted is not None and outputs != wanted:
        raise ConfigError(
            "task",
            f"the model has {outputs} outputs, the task has {wanted}",
            fix="Use the data it was trained for, or set task.labels",
        )
    return task, notes


def _of_few_classes(request: TaskRequest, rows: Split, names: tuple[str, ...]) -> Task:
    """Create the task from rows that may all be of one class, if the model names its classes."""
    try:
        return request.make(rows)[0]
    except DataError:
        if request.labels is not None or not names:
            raise
        return request.make(rows, labels=tuple(in_order(set(names))))[0]


def detect_columns(task: Task, rows: Split) -> tuple[Task, list[str]]:
    """Detect the columns of the task in ``rows``; return the task with these columns and a note for each.

    Rows may lack targets.

    Raises:
        DataError: no column of ``rows`` matches a column of the task, or several do.
    """
    request = TaskRequest(
        kind=task.kind, labels=labels_of(task) or None, scores=KINDS_OWN, given=dict.fromkeys(settings_of(task.kind))
    )
    found, notes = _make_unlabelled(request, rows, has_several=getattr(task, "multi_label", False))
    named = {
        name: getattr(found, name)
        for name in settings_of(task.kind)
        if name.endswith(("_column", "_columns")) and name != "label_column"
    }
    # Nothing is trained here, so what the loss would be computed on is no news.
    return with_columns(task, named, to_predict=True), [note for note in notes if not note.startswith("the loss is on")]


def _unlabelled_task(settings: EvaluationSettings, data: DataSet, config: Any) -> tuple[Task, list[str]]:
    """Create the task of a plain model for rows without targets, with the classes of its configuration; no notes."""
    id2label = getattr(config, "id2label", None) or {}
    labels = settings.task.labels or tuple(str(id2label[i]) for i in sorted(id2label))
    has_several = getattr(config, "problem_type", None) == "multi_label_classification"
    request = replace(settings.task, labels=labels)
    return _make_unlabelled(request, any_split(settings.data, data), has_several=has_several)[0], []


def _make_unlabelled(request: TaskRequest, rows: Split, *, has_several: bool) -> tuple[Task, list[str]]:
    """Create a task from rows whose targets are not read; return it with notes on what was detected."""
    assert request.kind is not None
    kind = task_class(request.kind)
    if issubclass(kind, Answers):  # rows need no answer
        return request.make(rows)
    if issubclass(kind, ComparesRows):
        return kind.to_predict(rows.table, rows.source, request.given.get("text_columns"))
    column = request.given.get("label_column") or "label"
    has_tags = issubclass(kind, HasLabels) and not issubclass(kind, OneOfClasses)
    empty = pa.nulls(rows.table.num_rows, pa.list_(pa.string()) if has_tags or has_several else pa.string())
    table = rows.table.select([name for name in rows.table.column_names if name != column])
    given = {**request.given, "label_column": column, "labels": request.labels}
    return replace(request, given=given).make(replace(rows, table=table.append_column(column, empty)))
