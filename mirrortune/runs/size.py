# SPDX-License-Identifier: Apache-2.0
"""Determine the size of a run on the meta device: adapted layers, trained parameters, memory."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mirrortune.adapters.effect import NUM_PROBES
from mirrortune.adapters.files.tensors import Form, usual_form
from mirrortune.adapters.inject import attach
from mirrortune.adapters.peft_bridge import tuners
from mirrortune.adapters.plain import RowRange
from mirrortune.adapters.spec import AdapterSpec, build_core, make_pairs, needs_saliency
from mirrortune.adapters.strategies import Strategy, cheapest_strategy
from mirrortune.adapters.svd import Factors
from mirrortune.adapters.targets import Target, Targets, find_targets
from mirrortune.data.examples import Batch
from mirrortune.errors import ConfigError, MirrortuneError
from mirrortune.merging.lora import SERVED_RANKS
from mirrortune.runs.memory import Footprint, rehearse
from mirrortune.system.devices import widen
from mirrortune.tasks.base import Task, scores_vocabulary

# Bytes of adapter.json and of the header of the tensors: fixed, and per layer in addition to its name.
_FILE_BYTES, _LAYER_BYTES = 1400, 100
_SCORED_ROWS = 64
_SCORED_LOGITS = 2**28
"""1 GiB in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The size of a run.

    Attributes:
        targets: adapted layers, head and skipped layers.
        trainable_parameters: number of trainable parameters, excluding the task head.
        head_parameters: number of trained parameters of the head.
        total_parameters: number of parameters of the model.
        rank: largest number of singular directions used in a layer; 0 without a core.
        factor_numbers: total number of elements of the singular vectors and values.
        has_own_bases: whether the adapter file has to hold its bases.
        beside_parameters: number of ``trainable_parameters`` that ``adapter.also_train`` chooses of the base.
        row_parameters: number of ``trainable_parameters`` in the embeddings of new tokens.
    """

    targets: Targets
    trainable_parameters: int
    head_parameters: int
    total_parameters: int
    rank: int
    factor_numbers: int
    has_own_bases: bool = False
    beside_parameters: int = 0
    row_parameters: int = 0

    def lines(self) -> list[str]:
        """Describe the plan in lines of text."""
        kinds = Counter(target.kind.name for target in self.targets.layers.values())
        adapted = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "none"
        head = f", plus {self.head_parameters:,} in the task head" if self.head_parameters else ""
        counts = [
            (self.beside_parameters, "chosen by adapter.also_train"),
            (self.row_parameters, "in embeddings of new tokens"),
        ]
        parts = [f"{count:,} {where}" for count, where in counts if count]
        beside = f", including {' and '.join(parts)}" if parts else ""
        share = percent(self.trainable_parameters / max(1, self.total_parameters))
        return [
            f"layers adapted: {adapted}{_left_alone(self.targets.skipped)}",
            *_clipped(self.targets.clipped),
            f"trainable parameters: {self.trainable_parameters:,} ({share} of the model){beside}{head}",
        ]

    def stored_as(self, form: Form, dtype: torch.dtype) -> str | None:
        """Describe the form and size of the adapter file, and the size in the other form; None without a core.

        Args:
            form: ``adapter.form`` of the recipe.
            dtype: dtype of the base weights, in which factors are stored.
        """
        layers = self.targets.layers
        if not self.rank:
            return None
        chosen = usual_form((t.shape, t.rank, t.count) for t in layers.values()) if form == "auto" else form
        trained = self.trainable_parameters + self.head_parameters
        kept = (len(n) + t.count * (4 * NUM_PROBES + t.rank // 8) for n, t in layers.items())
        compact = _FILE_BYTES + 4 * trained + _LAYER_BYTES * len(layers) + sum(kept)
        portable = compact + self.factor_numbers * dtype.itemsize
        if self.has_own_bases:
            return f"adapter file: about {_size(portable)}, with its bases, which are measured on the task"
        if chosen == "compact":
            size, other = _size(compact), f"adapter.form=portable, with its bases: {_size(portable)}"
        else:
            size, other = _size(portable), f"adapter.form=compact, without its bases: {_size(compact)}"
        return f"adapter file: about {size}, {chosen} form ({other})"

    def as_lora(self) -> str | None:
        """Describe the rank of a LoRA export, or return None if it is not known."""
        kinds = {target.kind.name for target in self.targets.layers.values()}
        if not self.rank or not kinds <= {"linear", "conv1d-linear"}:
            return None
        largest = SERVED_RANKS[-1]
        if self.rank > largest:
            return f"as a LoRA: rank {self.rank}, servers take at most {largest}: merge --format lora --rank {largest}"
        return f"as a LoRA: rank {next(r for r in SERVED_RANKS if r >= self.rank)}"


def percent(share: float) -> str:
    """Format a share in percent with three decimals, or with more if needed for two significant digits."""
    decimals = 3 if share <= 0 else max(3, 1 - math.floor(math.log10(100 * share)))
    return f"{100 * share:.{decimals}f}%"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:,.0f} kB"


def _left_alone(skipped: dict[str, str]) -> str:
    reasons = Counter(skipped.values()).most_common()
    others = sum(count for _, count in reasons[3:])
    said = [f"{count} ({reason})" for reason, count in reasons[:3]] + ([f"{others} others"] if others else [])
    return f"; left alone: {', '.join(said)}" if said else ""


def _clipped(names: tuple[str, ...]) -> list[str]:
    if not names:
        return []
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return [f"the rank is above min(out, in) of {len(names)} layers, which keep all their directions: {some}"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Everything besides the model and its adapter that determines the memory of a step.

    Attributes:
        batch: micro-batch of the longest training rows; only dtypes and shapes matter.
        scored: batch of the longest rows of an evaluation.
        loss: loss of the task.
        dtype: dtype of the base weights.
        is_16bit_compute: activations are in 16 bits.
        device: device type.
        tokens: tokens in a typical micro-batch, by which strategies are chosen; None if unknown.
        keeps_weights: an evaluation generates text, and holds the adapted weights of dense layers.
    """

    batch: Batch
    scored: Batch
    loss: Callable[[Batch, Any, Tensor], tuple[Tensor, Any]]
    dtype: torch.dtype
    is_16bit_compute: bool
    device: str
    tokens: int | None = None
    keeps_weights: bool = False


def default_eval_batch(
    task: Task, train_rows: int, longest: int | None, vocabulary: int | None = None
) -> tuple[int, int | None]:
    """Return the default numbers of rows and positions of a batch in an evaluation.

    Args:
        task: task. If it computes logits over a vocabulary, which take as much memory as everything else, a batch has
            no more rows than in training.
        train_rows: rows per micro-batch in training.
        longest: positions of the longest training row; None if all rows have the same size.
        vocabulary: number of logits per position; limits their total if no training step was checked to fit.
    """
    if not scores_vocabulary(task):
        return _SCORED_ROWS, None if longest is None else _SCORED_ROWS * longest
    rows = min(_SCORED_ROWS, train_rows)
    bounds = [] if longest is None else [rows * longest]
    bounds += [] if vocabulary is None else [max(1, _SCORED_LOGITS // vocabulary)]
    return rows, min(bounds, default=None)


def make_plan(model: nn.Module, spec: AdapterSpec) -> Plan:
    """Make the plan of a run.

    Args:
        model: model on the meta device or loaded; not changed.
        spec: validated adapter.

    Raises:
        ConfigError: there is no layer to adapt, or the rank does not fit.
    """
    targets = find_targets(model, spec)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    head = sum(sizes[n] for n in targets.head)
    whole = sum(sizes[n] for n in targets.plain if n in sizes)
    widths = {name: p.shape[-1] for name, p in model.named_parameters() if p.ndim}
    rows = sum((r.stop - r.first) * widths[r.weight] for r in filter(None, map(RowRange.parse, targets.plain)))
    trained = whole + rows
    if spec.preset.peft is not None:
        trained += tuners.count_trained(model, spec, targets)[0]
    counts: dict[tuple[int, tuple[int, int], int], int] = {}
    largest = factors = 0
    for name, target in targets.layers.items() if spec.preset.core else ():
        rank, shape = target.rank, target.shape
        pairs = planned_pairs(spec, rank, name)
        kind = (rank, shape, 0 if pairs is None else len(pairs))
        if kind not in counts:  # the size of a core depends only on these values
            core = build_core(spec, torch.zeros(rank), name, shape, pairs)
            counts[kind] = sum(p.numel() for p in core.parameters())
        trained += target.count * counts[kind]
        largest, factors = max(largest, rank), factors + target.count * rank * (sum(shape) + 1)
    if not trained + head:
        raise ConfigError("adapter.method", f"'{spec.method}' trains nothing on this kind of task, which has no head")
    return Plan(
        targets=targets,
        trainable_parameters=trained,
        head_parameters=head,
        total_parameters=sum(sizes.values()),
        rank=largest,
        factor_numbers=factors,
        has_own_bases=spec.basis == "gradient",
        beside_parameters=whole if spec.also_train else 0,
        row_parameters=rows,
    )


def footprint(model: nn.Module, spec: AdapterSpec, load: Load, targets: Targets | None = None) -> Footprint:
    """Estimate the memory of a training step and of an evaluation.

    Args:
        model: model without an adapter on the meta device; not changed.
        spec: adapter that fits the model.
        load: batches, dtypes and device.
        targets: layers of ``model`` that ``spec`` adapts; determined by default.
    """
    targets = targets or find_targets(model, spec)
    adapted = copy.deepcopy(model)
    for parameter in (*adapted.parameters(), *adapted.buffers()):
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(load.dtype)
    base = {name for name, _ in (*adapted.named_parameters(), *adapted.named_buffers())}
    try:
        attach_empty(adapted, spec, targets, dtype=load.dtype, tokens=load.tokens)
        return rehearse(
            adapted, load.batch, load.scored, load.loss, is_base=_base_names(base), device=load.device,
            is_16bit_compute=load.is_16bit_compute, keeps_weights=load.keeps_weights,
        )  # fmt: skip
    except MirrortuneError:
        if spec.preset.peft is None:
            raise
        return _guess(model, spec, load)  # a tuner that reads weights, such as shira; make_plan has tried it with zeros
    except Exception:  # noqa: BLE001  (model code that needs values: estimate from widths)
        return _guess(model, spec, load)


def _base_names(names: set[str]) -> Callable[[str], bool]:
    """Return a predicate for names of tensors in the adapted model that belong to the base.

    Such a tensor has its original name, or that of a ``base_layer`` or of the original of a parametrization.
    """

    def is_base(name: str) -> bool:
        plain = name.replace(".base_layer.", ".").replace(".parametrizations.", ".").removesuffix(".original")
        return plain in names

    return is_base


def attach_empty(
    model: nn.Module, spec: AdapterSpec, targets: Targets, *, dtype: torch.dtype, tokens: int | None = None
) -> None:
    """Attach the adapter to a model on the meta device, without values.

    Args:
        model: model; changed in place.
        spec: adapter.
        targets: layers to adapt.
        dtype: dtype of the base weights.
        tokens: tokens per micro-batch, by which strategies are chosen; None if unknown.
    """
    if spec.preset.peft is not None:
        with torch.device("meta"):
            tuners.attach_tuner(model, spec, targets=targets, config=tuners.plain_start(spec))
    else:
        ranks = {name: target.rank for name, target in targets.layers.items()} if needs_saliency(spec) else {}
        pairs = {name: found for name, rank in ranks.items() if (found := planned_pairs(spec, rank, name)) is not None}
        chosen = strategies_of(targets, spec, dtype, tokens)
        attach(model, spec, targets=targets, factor_source=_no_factors, pairs=pairs, strategies=chosen)
    widen(model, (*targets.head, *targets.plain))


def _no_factors(name: str, matrix: Tensor, rank: int) -> Factors:
    *stack, outputs, inputs = matrix.shape
    return Factors(
        U=torch.empty(*stack, outputs, rank, dtype=torch.float64, device="meta"),
        S=torch.ones(*stack, rank, dtype=torch.float64),
        Vh=torch.empty(*stack, rank, inputs, dtype=torch.float64, device="meta"),
    )


def strategies_of(targets: Targets, spec: AdapterSpec, dtype: torch.dtype, tokens: int | None) -> dict[str, Strategy]:
    """Choose the strategy of each layer: that of the spec, or the one with the fewest multiplications.

    Args:
        targets: layers.
        spec: adapter.
        dtype: dtype of the base weights.
        tokens: tokens per micro-batch; None if unknown.
    """

    def of(target: Target) -> Strategy:
        if target.count > 1:
            return "dense"
        return spec.strategy or cheapest_strategy(*target.shape, target.rank, dtype, target.kind, tokens)

    return {name: of(target) for name, target in targets.layers.items()} if spec.preset.core else {}


def planned_pairs(spec: AdapterSpec, rank: int, name: str) -> Tensor | None:
    """Return pairs of the number that the core will have, or None for a core without pairs."""
    if spec.resolved_pairing is None:
        return None
    # Measured pairings have as many pairs as mirror.
    return make_pairs(replace(spec, pairing="mirror") if needs_saliency(spec) else spec, rank, name)


def _guess(model: nn.Module, spec: AdapterSpec, load: Load) -> Footprint:
    """Estimate memory from the widths of layers: the outputs of all linear layers, doubled for norms, softmax and
    dropout.
    """
    plan = make_plan(model, spec)
    width = torch.finfo(load.dtype).bits // 8
    factors = kept = 0
    if spec.preset.peft is not None:
        factors = tuners.count_trained(model, spec, plan.targets)[1]
    for name, strategy in strategies_of(plan.targets, spec, load.dtype, load.tokens).items():
        target = plan.targets.layers[name]
        factors += target.count * target.rank * sum(target.shape)
        kept += target.count * math.prod(target.shape) if strategy == "dense" and load.keeps_weights else 0
    positions = max(math.prod(v.shape) for v in load.batch.values() if isinstance(v, Tensor))
    numbers = sum(2 * max(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear))
    gradients = 4 * (plan.trainable_parameters + plan.head_parameters)
    activations = positions * numbers * (2 if load.is_16bit_compute else 4)
    return Footprint(
        weights=plan.total_parameters * width,
        factors=factors * width,
        gradients=gradients,
        optimizer=2 * gradients,
        activations=activations,
        evaluation=activations + kept * width if kept else 0,
        kept=kept * width,
        is_counted=False,
    )
