# SPDX-License-Identifier: Apache-2.0
"""Adapters of tiny models with random numbers in them, and what a model computes with each of them alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mirrortune
from mirrortune.adapters.inject import plain_parameters, spectral_layers
from tests.spectral import train_a_little

Run = Callable[[nn.Module, dict[str, Tensor]], Tensor]
"""(model, batch) -> outputs, a row for each row of the batch."""


@torch.no_grad()
def save_trained(base: nn.Module, folder: Path, numbers: int, **settings: Any) -> nn.Module:
    """Save an adapter with random numbers, of a size that training could reach; returns the adapted copy of ``base``.

    Args:
        base: is left as it is.
        folder: is made.
        numbers: their seed.
        settings: of ``attach``; ``form`` is of ``save_adapter``.
    """
    form = settings.pop("form", "auto")
    model = mirrortune.attach(copy.deepcopy(base), **settings).eval()
    for index, layer in enumerate(spectral_layers(model).values()):
        train_a_little(layer.core, 1000 * numbers + index)
        for parameter in layer.core.parameters():
            parameter.mul_(0.3)
    generator = torch.Generator().manual_seed(numbers)
    for parameter in plain_parameters(model).values():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    mirrortune.save_adapter(model, folder, form=form)
    return model


@dataclass(frozen=True, slots=True)
class Cases:
    """Saved adapters of one base, a batch, and the output of every row of it with every adapter alone.

    Attributes:
        base: the base model.
        folder: holds a folder for each adapter.
        batch: inputs.
        alone: outputs by adapter, None for the base.
        run: computes a model.
        rounding: by how much outputs of the largest size 1 differ where a model computes a batch and not row by row.
    """

    base: nn.Module
    folder: Path
    batch: dict[str, Tensor]
    alone: Mapping[str | None, Tensor]
    run: Run
    rounding: float = 0.0

    @classmethod
    def make(
        cls, base: nn.Module, folder: Path, batch: dict[str, Tensor], settings: Mapping[str, dict[str, Any]], run: Run
    ) -> Cases:
        """Save an adapter for each of ``settings``, and compute with each."""
        alone: dict[str | None, Tensor] = {None: row_by_row(base, batch, run)}
        rounding = 0.0
        for number, (name, own) in enumerate(settings.items()):
            bases = {"base": base, **own}
            model = save_trained(bases.pop("base"), folder / name, number, **bases)
            alone[name] = row_by_row(model, batch, run)
            with torch.no_grad():
                rounding = max(rounding, difference(run(model, batch), alone[name]))
        return cls(base, folder, batch, alone, run, rounding)

    @property
    def names(self) -> list[str]:
        """Names of the adapters."""
        return [name for name in self.alone if name is not None]

    def bank(self, names: list[str] | None = None) -> mirrortune.AdapterBank:
        """A bank with a copy of the base and the named adapters, or all."""
        bank = mirrortune.AdapterBank(copy.deepcopy(self.base))
        for name in self.names if names is None else names:
            bank.add(name, self.folder / name)
        return bank

    def check(self, bank: mirrortune.AdapterBank, names: list[str | None], rows: list[int]) -> None:
        """Rows of the batch with adapters of their own are what each is alone, to 1e-6 of the largest number, and as
        much again as batches of other shapes are rounded otherwise.
        """
        with torch.no_grad(), bank.rows(names):
            found = self.run(bank.model, {key: t[rows] for key, t in self.batch.items()})
        for place, (name, row) in enumerate(zip(names, rows, strict=True)):
            expected = self.alone[name][row]
            own = found[place][..., : expected.shape[-1]]
            error = difference(own, expected)
            assert error <= 1e-6 + self.rounding, f"row {place}, {name}: {error:.1e}, {self.rounding:.1e}"
            assert (found[place][..., expected.shape[-1] :] == -torch.inf).all()


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest number, or to 1."""
    return float((found - expected).abs().max()) / max(1.0, float(expected.abs().max()))


@torch.no_grad()
def row_by_row(model: nn.Module, batch: dict[str, Tensor], run: Run) -> Tensor:
    """Outputs of every row in a batch of its own."""
    count = len(next(iter(batch.values())))
    return torch.cat([run(model.eval(), {key: t[row : row + 1] for key, t in batch.items()}) for row in range(count)])


def logits_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The logits of a model of transformers."""
    found: Tensor = model(**batch).logits
    return found


def token_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids (rows, length)."""
    return torch.randint(5, 45, (rows, length), generator=torch.Generator().manual_seed(seed))


def with_classes(base: nn.Module, count: int) -> nn.Module:
    """A copy of a classifier with as many classes."""
    copied = copy.deepcopy(base)
    linear = copied.get_submodule("classifier")
    assert isinstance(linear, nn.Linear)
    copied.classifier = nn.Linear(linear.in_features, count)
    copied.num_labels = count
    return copied
