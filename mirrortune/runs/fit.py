# SPDX-License-Identifier: Apache-2.0
"""Check that a run fits into memory and on disk before weights are downloaded; if not, suggest settings that do."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mirrortune.adapters.spec import AdapterSpec
from mirrortune.adapters.targets import Targets
from mirrortune.data.examples import Batch, Examples
from mirrortune.errors import ConfigError, ResourceError
from mirrortune.models.load import ModelSource
from mirrortune.runs.memory import Footprint
from mirrortune.runs.size import Load, Plan, default_eval_batch, footprint, strategies_of
from mirrortune.system.atomic import write_text_atomically
from mirrortune.system.devices import has_bf16, is_slow, peak_resident_bytes
from mirrortune.system.disk import mebibytes
from mirrortune.system.paths import cache_folder, read_json_object
from mirrortune.tasks.base import Task

LIMIT_VARIABLE = "MIRRORTUNE_DEVICE_MEMORY"
_GIB = 2**30
_SMALL_EVALUATION = 2**28
"""Memory of an evaluation, in bytes, below which its batch is not reduced even if a training step takes less."""
_VERSION = 3
"""Part of the cache key of a footprint; increment it when the estimate of a step changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The settings that determine the memory of a training step and of an evaluation.

    Attributes:
        spec: adapter.
        dtype: dtype of the base weights.
        rows: rows per micro-batch.
        accumulation: micro-batches per optimizer step.
        length: maximum row length in positions, or None for that of the data.
        scored: rows per batch in an evaluation, or None for as many as fit.
        is_16bit_compute: compute under bfloat16 autocast.
    """

    spec: AdapterSpec
    dtype: torch.dtype
    rows: int
    accumulation: int
    is_16bit_compute: bool
    length: int | None = None
    scored: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """The parts of a run that all its candidate steps share: a model without weights, rows, and a device.

    Attributes:
        model: model on the meta device.
        config: configuration of the model as a dict.
        task: task, which defines the loss.
        train: training rows.
        scored: rows of every split that is scored.
        has_length: this kind of task has a maximum length.
        spec: adapter of the run; a candidate step may have another.
        targets: layers that ``spec`` adapts.
        device: device type.
        keeps_weights: see :class:`~mirrortune.runs.size.Load`.
    """

    model: nn.Module
    config: dict[str, Any]
    task: Task
    train: Examples
    scored: tuple[Examples, ...]
    has_length: bool
    spec: AdapterSpec
    targets: Targets
    device: str
    keeps_weights: bool = False

    @property
    def smallest_rank(self) -> int:
        """Number of singular directions of the narrowest adapted layer."""
        return min((min(target.shape) for target in self.targets.layers.values()), default=0)

    def footprint(self, step: Step) -> Footprint:
        """Estimate the memory of ``step``."""
        return self.sized(step)[0]

    def sized(self, step: Step) -> tuple[Footprint, int, int | None]:
        """Estimate the memory of ``step``, and choose the maximum rows and positions of a batch in an evaluation.

        The defaults are those of :func:`~mirrortune.runs.size.default_eval_batch`; they are reduced if an evaluation
        would take more memory than a training step.
        """
        most = max(len(examples) for examples in self.scored)
        if step.scored is not None:
            return self._count(step, min(step.scored, most)), step.scored, None
        longest = self._cut(self.train, step.length)
        rows, positions = default_eval_batch(self.task, step.rows, longest)
        assert positions is not None
        own = max(self._cut(examples, step.length) for examples in self.scored)
        fitting = max(1, min(rows, positions // own, most))
        found = self._count(step, fitting)
        if not found.is_counted:  # it is only known that an evaluation takes less than a training step of the same size
            return found, min(rows, step.rows), step.rows * longest
        room = max(found.step, _SMALL_EVALUATION)
        of_batch = found.evaluation - found.kept
        if of_batch > room and fitting > 1:
            fitting = max(1, fitting * room // of_batch)
            positions = fitting * own
            found = self._count(step, fitting)
        return found, rows, positions

    def _cut(self, examples: Examples, length: int | None) -> int:
        """Return the number of positions of the longest row, at most ``length``."""
        longest = max(1, int(examples.lengths.max()))
        return longest if length is None else min(longest, length)

    def _count(self, step: Step, num_scored: int) -> Footprint:
        batch = _longest(self.train, step.rows, step.length)
        longest = max(self.scored, key=lambda examples: int(examples.lengths.max()))
        scored = _longest(longest, num_scored, step.length)
        shapes = [
            {k: (list(v.shape), str(v.dtype)) if isinstance(v, Tensor) else v for k, v in given.items()}
            for given in (batch, scored)
        ]
        kind = type(self.task).__module__
        known: list[Any] = [self.config, kind, self.task.config_fields(), step.spec.to_dict(), shapes]
        known += [list(step.spec.layers)] if step.spec.layers is not None else []
        known += [str(step.dtype), step.is_16bit_compute, self.device, step.spec.strategy]
        known.append(any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules()))
        known.append(getattr(getattr(self.model, "config", None), "_attn_implementation", None))
        known += ["kept"] if self.keeps_weights else []
        tokens = typical_tokens(self.train, step.rows, step.length)
        known += [tokens, _VERSION, *(metadata.version(name) for name in ("torch", "transformers"))]
        key = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()
        load = Load(
            batch=batch, scored=scored, loss=self.task.loss, dtype=step.dtype, is_16bit_compute=step.is_16bit_compute,
            device=self.device, tokens=tokens, keeps_weights=self.keeps_weights,
        )  # fmt: skip
        targets = self.targets if step.spec == self.spec else None
        return _remembered(key, lambda: footprint(self.model, step.spec, load, targets))

    def positions(self) -> int:
        """Return the number of positions of the longest training row."""
        return int(self.train.lengths.max())


def typical_tokens(train: Examples, rows: int, length: int | None = None) -> int | None:
    """Return the number of tokens in a typical micro-batch as a power of two, or None for rows without tokens.

    Args:
        train: training rows.
        rows: rows per micro-batch.
        length: length to which longer rows are truncated.
    """
    if "input_ids" not in train.batch(np.array([0])):
        return None
    lengths = train.lengths if length is None else np.minimum(train.lengths, length)
    return int(2 ** round(math.log2(max(1.0, rows * float(lengths.mean())))))


def _remembered(key: str, count: Callable[[], Footprint]) -> Footprint:
    """Return the cached result for ``key``, or call ``count``, which takes about a second, and cache its result."""
    path = cache_folder() / "footprints" / key[:2] / f"{key}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):  # the cache entry is missing or damaged
        return Footprint(**read_json_object(path))
    found = count()
    write_text_atomically(path, json.dumps(asdict(found)) + "\n", optional=True)
    return found


def quantised(found: Footprint, load_in: str | None, plan: Plan, dtype: torch.dtype) -> Footprint:
    """Return ``found`` with the weights of adapted layers quantised to ``8bit`` or ``4bit``."""
    if load_in is None:
        return found
    numbers = sum(math.prod(target.layout.shape) for target in plan.targets.layers.values())
    stored = numbers // (2 if load_in == "4bit" else 1)
    return replace(found, weights=max(0, found.weights - numbers * dtype.itemsize) + stored)


def describe_memory(found: Footprint, step: Step, stage: Stage, plan: Plan) -> str:
    """Describe the estimate in one line."""
    sizes = {name: size for name, size in found.parts().items() if size or name != "evaluation"}
    parts = ", ".join(f"{name} {mebibytes(size)}" for name, size in sizes.items())
    chosen = strategies_of(plan.targets, step.spec, step.dtype, typical_tokens(stage.train, step.rows, step.length))
    how = "".join(f"; {count} layers {name}" for name, count in Counter(chosen.values()).items())
    guess = "" if found.is_counted else " (a guess from the widths of the layers)"
    return (
        f"memory, estimated: {mebibytes(found.total)} MiB{guess} for {step.rows} x {stage.positions()} positions: "
        f"{parts}{how}"
    )


def check_memory(found: Footprint, step: Step, stage: Stage) -> None:
    """Check that a training step and an evaluation fit on the device.

    Raises:
        ResourceError: they do not; the error suggests settings that would.
    """
    limit, name = device_memory(stage.device)
    if found.total <= limit:
        return
    ways = list(_ways_to_fit(step, stage, limit))
    what = "an evaluation" if found.evaluation > found.step else "a training step"
    fix = f"Any of these makes it fit: {'; '.join(ways)}" if ways else "Use a smaller model or a larger device"
    raise ResourceError(
        "memory",
        f"{what} takes about {found.total / _GIB:,.2f} GiB, {name} has {limit / _GIB:,.2f} GiB",
        fix=fix,
    )


def device_memory(device: str) -> tuple[int, str]:
    """Return the number of bytes that a step may take, and a description of where the limit comes from.

    It comes from the environment variable, the GPU, or the machine's memory less that of this process.
    """
    asked = os.environ.get(LIMIT_VARIABLE)
    if asked:
        with contextlib.suppress(ValueError, OverflowError):
            if (limit := int(float(asked) * _GIB)) > 0:
                return limit, f"{LIMIT_VARIABLE}={asked}"
        raise ConfigError(LIMIT_VARIABLE, f"got {asked!r}", allowed="a number of GiB above 0")
    if device == "cuda":
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory), "the GPU"
    import psutil  # noqa: PLC0415

    total = int(psutil.virtual_memory().total)
    with contextlib.suppress(OSError, ValueError):  # no cgroup limit, or "max"
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return total - peak_resident_bytes(), "this machine, beside what the program itself takes,"


def disk_needs(
    source: ModelSource, plan: Plan, *, output_dir: Path, keep: int, moments: float
) -> dict[Path, dict[str, int]]:
    """Return the bytes that the run will write, by folder and purpose: downloaded weights, factors, checkpoints."""
    needs = {cache_folder(): {"factors": 4 * plan.factor_numbers}}
    stored = str(getattr(source.config, "dtype", None) or "float32").removeprefix("torch.")
    width = 2 if "16" in stored else 4
    if not source.is_local and not _has_weights(source):
        from huggingface_hub.constants import HF_HUB_CACHE  # noqa: PLC0415

        needs[Path(HF_HUB_CACHE)] = {"the model's weights": plan.total_parameters * width}
    trained = 4 * (plan.trainable_parameters + plan.head_parameters)
    # A checkpoint holds parameters and moments, and is written before an older one is deleted.
    needs[output_dir] = {"checkpoints": math.ceil((1 + moments) * trained) * (keep + 2) + trained}
    return needs


def _has_weights(source: ModelSource) -> bool:
    import huggingface_hub  # noqa: PLC0415

    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    found = (huggingface_hub.try_to_load_from_cache(source.location, n, revision=source.commit) for n in names)
    return any(isinstance(path, str) for path in found)


def _longest(train: Examples, rows: int, length: int | None) -> Batch:
    """Return a batch of ``rows`` views of the longest row, truncated to ``length``, without copying values."""
    lengths = train.lengths
    one = train.batch(np.array([int(lengths.argmax())]))
    # A row of several texts takes more positions than its longest text.
    width = one["input_ids"].shape[-1] if "input_ids" in one else int(lengths.max())
    batch: Batch = {}
    for name, value in one.items():
        if isinstance(value, Tensor):
            shape = [min(length, size) if length is not None and size == width else size for size in value.shape[1:]]
            batch[name] = torch.empty((), dtype=value.dtype).expand(rows * value.shape[0], *shape)
        else:
            batch[name] = value
    return batch


def _ways_to_fit(step: Step, stage: Stage, limit: int) -> Iterator[str]:
    """Yield flags that bring a step below ``limit`` bytes (each alone, or else all together) and its memory then."""
    found: list[tuple[str, Step]] = []
    changes = [
        _fewer_scored(step, stage), _fewer_rows(step), _shorter(step, stage), _half(step, stage),
        _half_compute(step, stage), _lower_rank(step, stage),
    ]  # fmt: skip
    for options in filter(None, changes):
        if stage.footprint(options[-1][1]).total > limit:  # even the smallest value of this setting
            found.append(options[-1])
            continue
        words, changed = next((w, c) for w, c in options if stage.footprint(c).total <= limit)
        yield f"{words} ({stage.footprint(changed).total / _GIB:,.2f} GiB)"
    if found and len(found) == sum(map(bool, changes)):  # no single setting suffices
        words, together = " ".join(w for w, _ in found), step
        for _, changed in found:
            own = {f: getattr(changed, f) for f in Step.__slots__ if getattr(changed, f) != getattr(step, f)}
            together = replace(together, **own)
        total = stage.footprint(together).total
        if total <= limit:
            yield f"{words} together ({total / _GIB:,.2f} GiB)"


def _fewer_scored(step: Step, stage: Stage) -> list[tuple[str, Step]]:
    """Return smaller evaluation batches if an evaluation takes more memory than a training step."""
    found = stage.footprint(step)
    if step.scored is None or found.evaluation <= found.step:
        return []
    sizes = [step.scored // 2**n for n in range(1, step.scored.bit_length())]
    return [(f"eval.batch_size={rows}", replace(step, scored=rows)) for rows in sizes]


def _fewer_rows(step: Step) -> list[tuple[str, Step]]:
    options, rows, accumulation = [], step.rows, step.accumulation
    while rows > 1:
        rows, accumulation = rows // 2, accumulation * 2
        words = f"--batch-size {rows} --gradient-accumulation-steps {accumulation}"
        options.append((words, replace(step, rows=rows, accumulation=accumulation)))
    return options


def _shorter(step: Step, stage: Stage) -> list[tuple[str, Step]]:
    lengths = [n for n in (2048, 1024, 512, 256, 128) if n < stage.positions()] if stage.has_length else []
    return [(f"--max-length {n}", replace(step, length=n)) for n in lengths]


def _half(step: Step, stage: Stage) -> list[tuple[str, Step]]:
    can = step.dtype == torch.float32 and not is_slow(torch.bfloat16, torch.device(stage.device))
    can &= step.spec.preset.plain != "all"  # which holds every weight in float32
    return [("model.dtype=bfloat16", replace(step, dtype=torch.bfloat16))] if can else []


def _half_compute(step: Step, stage: Stage) -> list[tuple[str, Step]]:
    is_cuda = stage.device == "cuda"
    can = is_cuda or not is_slow(torch.bfloat16, torch.device(stage.device))
    name = "fp16" if is_cuda and not has_bf16() else "bf16"
    return [(f"--precision {name}", replace(step, is_16bit_compute=True))] if can and not step.is_16bit_compute else []


def _lower_rank(step: Step, stage: Stage) -> list[tuple[str, Step]]:
    if step.spec.preset.core is None or step.spec.resolved_rank != "full" or step.spec.pair_lists is not None:
        return []
    ranks = [rank for rank in (64, 16) if rank < stage.smallest_rank]
    return [(f"--rank {r}", replace(step, spec=replace(step.spec, rank=r, strategy=None))) for r in ranks]
