# SPDX-License-Identifier: Apache-2.0
"""Measure gradients of the frozen weights on the task: the saliency of pairs of singular directions (the gradients of
their rotations at angle zero), and bases made of the gradients themselves.

The head is warmed up first, since gradients behind an untrained head carry no information; then gradients are
accumulated over a few batches. The head is restored afterwards, so that a run with measured pairs starts like any
other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mirrortune.adapters.core import even_steps, plane_strengths
from mirrortune.adapters.inject import FactorSource
from mirrortune.adapters.pairings.matching import rotation_gradient
from mirrortune.adapters.svd import Factors, factorize
from mirrortune.adapters.targets import Targets
from mirrortune.data.draws import SourceDraws
from mirrortune.data.examples import Examples
from mirrortune.data.loader import epoch_batches, forward
from mirrortune.errors import ConfigError, DataError
from mirrortune.system.devices import factorising_device
from mirrortune.system.distributed.sharding import Sharding
from mirrortune.tasks.objective import Objective

# Number of distinct batches through which the warm-up cycles. With MiniLM-L6 on the movie sentences, pairs matched
# after 60 steps over 40 batches had 2.1 times the gradient of mirror pairs on other rows; over 16 batches, 1.8 times.
_WARMUP_BATCHES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSettings:
    """How gradients are measured.

    Attributes:
        saliency: of pairs: ``mean``, the sum of the gradients of the batches' mean losses, so that each batch weighs
            the same, whatever its number of rows or tokens; or ``rms``, the root of the sum of their squares, in which
            opposite gradients do not cancel.
        num_batches: number of calibration batches.
        warmup_steps: optimizer steps of the head before calibration.
        batch_size: rows per batch.
        head_lr: learning rate of the warm-up.
        side: side of the weight that the core rotates; None for a core without pairs.
        unit: unit of the trained parameters, see the core; None for a core without pairs.
        seed: seed of the choice of rows.
    """

    saliency: Literal["mean", "rms"]
    num_batches: int
    warmup_steps: int
    batch_size: int
    head_lr: float
    side: str | None
    unit: Literal["movement", "weight", "angle"] | None
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Measures the gradients of a base model's weights on training rows; the model is left as it was.

    Attributes:
        model: base model without an adapter.
        targets: layers and head.
        objective: training loss.
        examples: training rows.
        settings: how gradients are measured.
        accelerator: accelerate's ``Accelerator``, which provides device and precision.
        draws: what an epoch draws from each source of a mixture.
    """

    model: nn.Module
    targets: Targets
    objective: Objective
    examples: Examples
    settings: CalibrationSettings
    accelerator: Any
    draws: SourceDraws | None = None

    def measure_saliency(self, factor_source: FactorSource) -> dict[str, Tensor]:
        """Measure the saliency of every pair of directions of every target layer.

        Args:
            factor_source: computes or caches the factors of each layer.

        Returns:
            The saliency of each layer by name, shape (R, R), or (E, R, R) for a stack of E matrices; float64 on the
            CPU, antisymmetric for ``mean`` and symmetric for ``rms``.

        Raises:
            ConfigError: a layer is quantised, so its weight has no gradient.
        """
        if packed := next((n for n, target in self.targets.layers.items() if target.kind.is_quantised), None):
            raise ConfigError(
                "adapter.pairing", f"pairs are measured by gradients of weights, and {packed} is quantised",
                allowed="mirror, neighbor, random, or pairs that you list",
                fix="Measure on the model in full precision",
            )  # fmt: skip
        found: dict[str, Tensor] = {}
        is_rms = self.settings.saliency == "rms"
        with self._gradients() as batches:
            for _ in batches:
                if is_rms:
                    self._add(found, factor_source)
            if not is_rms:
                self._add(found, factor_source)
        return {name: s.sqrt() if is_rms else s for name, s in found.items()}

    def measure_bases(self) -> dict[str, Factors]:
        """Compute the leading singular triplets of -sign(G) of every target layer, G the gradient of its weight.

        Adam's first step is -lr sign(G): these triplets are its best approximation of their rank. Collective: each
        process measures its share of the batches, and gradients are summed over all processes.

        Returns:
            Layer name -> factors, float64 on the CPU, on the main process; empty on the others.

        Raises:
            DataError: a gradient is not finite.
        """
        found: dict[str, Factors] = {}
        with self._gradients(is_shared=True) as batches:
            for _ in batches:
                pass
            weights = {id(w): w for target in self.targets.layers.values() for w in [target.weight(self.model)]}
            for weight in weights.values():
                own = torch.zeros_like(weight) if weight.grad is None else weight.grad
                weight.grad = self.accelerator.reduce(own, reduction="sum")
            for name, target in self.targets.layers.items() if self.accelerator.is_main_process else ():
                slope = target.weight(self.model).grad
                assert slope is not None
                if not bool(torch.isfinite(slope).all()):
                    fix = "Use --precision fp32, or another base"
                    raise DataError(name, "the gradient of this weight is not finite", fix=fix)
                step = -target.matrix(slope).sign()
                made = factorize(step, target.rank, name=name, device=factorising_device(self.accelerator.device))
                found[name] = made.to(device=torch.device("cpu"), dtype=torch.float64)
        return found

    @contextmanager
    def _gradients(self, *, is_shared: bool = False) -> Iterator[Iterator[None]]:
        """Yield an iterator that adds the gradient of one more batch to those of the target weights at each step.

        With ``is_shared``, a process takes only its share of the batches.
        """
        model, device = self.model, self.accelerator.device
        wanted = {p: p.requires_grad for p in model.parameters()}
        was_training = model.training
        model.to(device).eval()  # without dropout: the gradient of the model that evaluation sees
        rows = self._batches()
        head = {n: p for n, p in model.named_parameters() if n in set(self.targets.head)}
        start = {n: p.detach().clone() for n, p in head.items()}
        _only(model, list(head.values()))
        with _autocast(self.accelerator):
            self._warm_up(list(head.values()), rows)
        _only(model, [target.weight(model) for target in self.targets.layers.values()])
        first, step = (self.accelerator.process_index, self.accelerator.num_processes) if is_shared else (0, 1)

        def batches() -> Iterator[None]:
            for batch in itertools.islice(rows, first, self.settings.num_batches, step):
                with _autocast(self.accelerator):
                    self._backward(batch)
                yield

        yield batches()
        _only(model, [])
        with torch.no_grad():
            for name, parameter in head.items():
                parameter.copy_(start[name])
        for parameter, wants_gradient in wanted.items():
            parameter.requires_grad_(wants_gradient)
        model.train(was_training)

    def _batches(self) -> Iterator[Any]:
        """Yield the rows of one batch after another, epoch by epoch without end."""
        lengths, size, seed = self.examples.lengths, self.settings.batch_size, self.settings.seed
        for epoch in itertools.count():
            drawn = None if self.draws is None else self.draws.rows(seed, epoch)
            yield from epoch_batches(lengths, size, seed, epoch, self.objective.classes, drawn)

    def _warm_up(self, head: list[nn.Parameter], rows: Iterator[Any]) -> None:
        """Train only the head; the frozen base computes each batch once, regardless of the number of steps."""
        steps = self.settings.warmup_steps
        if not head or not steps:
            return
        batches = list(itertools.islice(rows, min(steps, _WARMUP_BATCHES)))
        optimizer = torch.optim.AdamW(head, lr=self.settings.head_lr)
        with _remembered_base(self.model) as of_batch:
            for step in range(steps):
                of_batch(step % len(batches))
                self._backward(batches[step % len(batches)])
                optimizer.step()
                optimizer.zero_grad()

    def _backward(self, rows: Any) -> None:
        inputs, outputs, targets = forward(self.model, self.examples.batch(rows), self.accelerator.device)
        total, items = self.objective.loss(inputs, outputs, targets)
        torch.autograd.backward(total / items)

    def _add(self, found: dict[str, Tensor], factor_source: FactorSource) -> None:
        """Project the accumulated gradients onto the angles, add them to ``found``, squared for rms, and clear."""
        for name, target in self.targets.layers.items():
            weight = target.weight(self.model)
            assert weight.grad is not None
            factors = factor_source(name, target.matrix(weight), target.rank)
            exact = factors.to(device=weight.device, dtype=torch.float32)
            slope = target.matrix(weight.grad).float()
            assert self.settings.side is not None
            gradient = rotation_gradient(slope, exact.U, exact.S, exact.Vh, self.settings.side).cpu().double()
            if self.settings.unit in ("movement", "weight"):
                S = factors.S.cpu().double()
                gradient *= even_steps(plane_strengths(S), S, unit=self.settings.unit)
            found[name] = found.get(name, 0) + (gradient.square() if self.settings.saliency == "rms" else gradient)
        for target in self.targets.layers.values():  # only after all layers: parts of a fused weight share its gradient
            target.weight(self.model).grad = None


def _autocast(accelerator: Any) -> AbstractContextManager[object]:
    """Return the autocast context of the run, or float32 for a float16 run, in which unscaled gradients underflow."""
    return nullcontext() if accelerator.scaler is not None else Sharding.of(accelerator).autocast()


@contextmanager
def _remembered_base(model: nn.Module) -> Iterator[Callable[[int], None]]:
    """Cache the output of a transformers model's base for each batch while the block runs.

    Yields a function that sets the index of the next batch. If the model has no separate base, nothing is cached.
    """
    base = getattr(model, getattr(model, "base_model_prefix", "") or "-", None)
    if not isinstance(base, nn.Module):
        yield lambda _: None
        return
    compute, outputs, current = base.forward, dict[int, Any](), [0]

    def forward(*args: Any, **kwargs: Any) -> Any:
        if current[0] not in outputs:
            with torch.no_grad():
                found = compute(*args, **kwargs)
            if getattr(found, "past_key_values", None) is not None:
                found.past_key_values = None  # not needed, and as large as the activations
            outputs[current[0]] = found
        return outputs[current[0]]

    base.forward = forward
    try:
        yield lambda batch: current.__setitem__(0, batch)
    finally:
        del base.forward


def _only(model: nn.Module, trained: list[nn.Parameter]) -> None:
    chosen = {id(p) for p in trained}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
        parameter.grad = None
