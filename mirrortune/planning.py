# SPDX-License-Identifier: Apache-2.0
"""What a run will do, from names and shapes alone: layers, trained numbers, memory. Made on the meta device, before any
weight.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mirrortune import peft_tuners
from mirrortune.adapters.spec import AdapterSpec, build_core, check_spec, make_pairs, needs_saliency
from mirrortune.adapters.spectral_linear import cheapest_strategy
from mirrortune.adapters.targets import Target, Targets, find_targets
from mirrortune.errors import ConfigError

_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The run's size.

    Attributes:
        targets: adapted layers, head and skipped layers.
        trainable_parameters: trained numbers besides the head.
        head_parameters: trained numbers of the head.
        total_parameters: all numbers of the model.
        estimated_memory_bytes: weights, factors, gradients, optimizer and activations of one training step.
    """

    targets: Targets
    trainable_parameters: int
    head_parameters: int
    total_parameters: int
    estimated_memory_bytes: int

    def lines(self) -> list[str]:
        """The plan in words."""
        kinds = Counter(target.kind.name for target in self.targets.layers.values())
        adapted = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "none"
        head = f"{self.head_parameters:,} of the task head"
        share = 100 * self.trainable_parameters / max(1, self.total_parameters)
        return [
            f"layers adapted: {adapted}{_left_alone(self.targets.skipped)}",
            *_clipped(self.targets.clipped),
            f"trained numbers: {self.trainable_parameters:,} ({share:.3f}% of the model), and {head}",
            f"memory, estimated: {self.estimated_memory_bytes / _MIB:,.0f} MiB",
        ]


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


def make_plan(
    model: nn.Module,
    spec: AdapterSpec,
    *,
    new_parameters: tuple[str, ...] = (),
    dtype: torch.dtype,
    rows: int,
    length: int,
    is_16bit_compute: bool,
) -> Plan:
    """Size a run.

    Args:
        model: on the meta device or loaded; not changed.
        spec: the adapter.
        new_parameters: names that no checkpoint fills, where known.
        dtype: of the base weights.
        rows: of a micro-batch.
        length: of its longest row, in positions (tokens, or patches of an image).
        is_16bit_compute: activations in 16 bits.

    Raises:
        ConfigError: unknown names, nothing to adapt, a rank that does not fit.
    """
    check_spec(spec)
    targets = find_targets(model, spec, new_parameters)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    head = sum(sizes[n] for n in targets.head)
    trained = sum(sizes[n] for n in targets.plain)
    factors = 0  # numbers on the device beside the base model's own
    if spec.preset.peft is not None:
        tuned, factors = peft_tuners.count_trained(model, spec, new_parameters)
        trained += tuned
    counts: dict[tuple[int, tuple[int, int], int], int] = {}
    for name, target in targets.layers.items() if spec.preset.core else ():
        rank, shape = target.rank, target.shape
        pairs = _pairs(spec, rank, name)
        kind = (rank, shape, 0 if pairs is None else len(pairs))
        if kind not in counts:  # a core's size depends on nothing else
            core = build_core(spec, torch.zeros(rank), name, shape, pairs)
            counts[kind] = sum(p.numel() for p in core.parameters())
        trained += target.count * counts[kind]
        factors += target.count * rank * sum(shape)
        if target.count == 1 and (spec.strategy or _strategy(target, dtype)) == "factored":
            factors -= math.prod(shape)  # the factors stand for the weight on the device
    if not trained + head:
        raise ConfigError("adapter.method", f"'{spec.method}' trains nothing on this kind of task, which has no head")
    total = sum(sizes.values())
    width = torch.finfo(dtype).bits // 8
    fixed = (total + factors) * width + (trained + head) * 12  # gradient and two moments in float32
    activations = rows * length * _activation_numbers(model) * (2 if is_16bit_compute else 4)
    return Plan(
        targets=targets,
        trainable_parameters=trained,
        head_parameters=head,
        total_parameters=total,
        estimated_memory_bytes=fixed + activations,
    )


def _pairs(spec: AdapterSpec, rank: int, name: str) -> Tensor | None:
    """Pairs as many as the core will have, or None for one that pairs nothing."""
    if spec.resolved_pairing is None:
        return None
    # What is measured later pairs as many directions as mirror does.
    return make_pairs(replace(spec, pairing="mirror") if needs_saliency(spec) else spec, rank, name)


def _strategy(target: Target, dtype: torch.dtype) -> str:
    return cheapest_strategy(*target.shape, target.rank, dtype, target.kind)


def _activation_numbers(model: nn.Module) -> int:
    # Kept for backward, a token: the z of every linear layer, and about as much again for norms, softmax and dropout.
    # An estimate from shapes alone, of tensors only: what Python and its libraries take comes on top. On the quickstart
    # it says 656 MiB where the whole process peaked at 1,850 MiB; it has not been compared with a GPU's allocator yet.
    return sum(2 * max(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear))
