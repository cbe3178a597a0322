# SPDX-License-Identifier: Apache-2.0
"""Load the base of a run and attach its adapter, with the pairs, bases and strategies that it is trained with."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from mirrortune.adapters.factor_cache import FactorCache
from mirrortune.adapters.files.adapter_file import read_adapter
from mirrortune.adapters.files.load import FingerprintBook, adapt, stored_bases, stored_pairs
from mirrortune.adapters.fingerprint import sampled_digest
from mirrortune.adapters.spec import AdapterSpec, make_pairs, needs_saliency
from mirrortune.adapters.strategies import Strategy
from mirrortune.adapters.svd import Factors
from mirrortune.adapters.targets import Targets, complete_targets
from mirrortune.models.gaps import describe_missing
from mirrortune.models.load import LoadedModel, load_model, pad_token_id
from mirrortune.models.tensors import Layer, stored_layers
from mirrortune.runs.fit import typical_tokens
from mirrortune.runs.job import Job
from mirrortune.runs.size import strategies_of
from mirrortune.system.console import Reporter
from mirrortune.system.devices import factorising_device, widen
from mirrortune.system.distributed import sync
from mirrortune.system.distributed.sharding import Sharding
from mirrortune.system.paths import read_json_object
from mirrortune.system.run_directory import RunDirectory
from mirrortune.tasks.base import Task
from mirrortune.training.calibration import Calibration


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
    model, new = trimmed(job.task, loaded)
    job.train.verify(model)
    missing = tuple(name for name in loaded.missing if name in new)
    return Base(model=model, targets=complete_targets(job.plan.targets, model, job.spec, new), missing=missing)


def trimmed(task: Task, loaded: LoadedModel) -> tuple[nn.Module, list[str]]:
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
    job: Job, loaded: Base, cache: FactorCache, run: RunDirectory, accelerator: Any, reporter: Reporter, *, resume: bool
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
