# SPDX-License-Identifier: Apache-2.0
"""Apply the cores of different adapters to the rows of one batch, between the shared products with Vh and U.

Shapes: N rows of the batch, T positions of a row, R rank, A adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from mirrortune.adapters.core import Coefficients, Core
from mirrortune.adapters.kinds import CallableKind, Linear
from mirrortune.inference.bank_bases import Held, stand_in
from mirrortune.inference.bank_entries import Entry, Part, Stacks

_LARGE = 64  # coefficients per direction from which one product per adapter is faster than one copy per row


class PartOfRows:
    """One adapted weight for the rows of a group.

    Args:
        layer: name of the layer.
        entries: adapter of each row.
        module: module that applies the weight.
        stacks: stacked parameters of the adapters.
    """

    def __init__(self, layer: str, entries: Sequence[Entry], module: nn.Module, stacks: Stacks) -> None:
        self.part = entries[0].structure.parts[layer]
        self.module = module
        self.held = self.part.basis.held
        factors = self.held.leading(self.part.rank)
        self.U, self.Vh = factors.U, factors.Vh
        rows: dict[Any, list[int]] = {}
        for row, entry in enumerate(entries):
            rows.setdefault(entry.structure.parts[layer].design, []).append(row)
        self.mixers = [
            Mixer(layer, [entries[row] for row in own], own if len(rows) > 1 else None, self.held, stacks)
            for own in rows.values()
        ]
        signs = [entry.structure.parts[layer].signs for entry in entries]
        self.signs: Tensor | None = None
        if any(own is not None for own in signs):
            ones = torch.ones(self.part.rank)
            self.signs = torch.stack([ones if s is None else s.cpu() for s in signs])[:, None].to(self.U.device)

    def mixed(self, x: Tensor, count: int) -> Tensor:
        """Return K z of every row for z = Vh x, (N * copies, ..., R), in the dtype of ``x`` or of the factors."""
        dtype = self._dtype(x)
        projected = self.part.kind.project(self.module, x, self.Vh.to(dtype))
        # As in SpectralLinear, cores compute in float32 even if the model runs in 16 bits.
        z = projected.reshape(count, -1, projected.shape[-1]).to(torch.promote_types(dtype, torch.float32))
        z = z if self.signs is None else z * self.signs
        if len(self.mixers) == 1:
            mixed = self.mixers[0].mix(z)
        else:
            mixed = torch.empty_like(z)
            for mixer in self.mixers:
                rows = torch.tensor(mixer.rows, device=z.device)
                mixed.index_copy_(0, rows, mixer.mix(z.index_select(0, rows)))
        mixed = mixed if self.signs is None else mixed * self.signs
        return mixed.to(projected.dtype).reshape(projected.shape)

    def added(self, x: Tensor, y: Tensor, count: int) -> Tensor:
        """Return the output ``y`` of the base layer with the change U (K - diag(S)) Vh x added."""
        dtype = self._dtype(x)
        kind, rows = self.part.kind, self.part.layout.rows
        with torch.autocast(x.device.type, enabled=False):
            mixed = self.mixed(x, count)
            is_fused = type(kind) is Linear and rows is None and y.dtype == dtype and not torch.compiler.is_compiling()
            if is_fused and y.is_contiguous():
                y.view(-1, y.shape[-1]).addmm_(mixed.reshape(-1, mixed.shape[-1]), self.U.to(dtype).T)
                return self.with_branch(x, y, count)
            change = self.with_branch(x, F.linear(mixed, self.U.to(dtype)), count)
        if rows is not None:
            own = change.reshape(*change.shape[:-1], rows.repeat, rows.stop - rows.start)
            change = F.pad(own, (rows.start, rows.period - rows.stop)).flatten(-2)
        return y + kind.output(self.module, change)

    def _dtype(self, x: Tensor) -> torch.dtype:
        return x.dtype if x.is_floating_point() else self.U.dtype

    def with_branch(self, x: Tensor, product: Tensor, count: int) -> Tensor:
        """Return ``product`` plus the part of the change that lies outside the singular basis."""
        for mixer in self.mixers:
            if not mixer.has_branch:
                continue
            if len(self.mixers) == 1:
                return product + mixer.beside(self.module, self.part.kind, x, count, self._dtype(x))
            rows = torch.tensor(mixer.rows, device=x.device)
            own = split(x, count).index_select(0, rows).flatten(0, 1)
            change = mixer.beside(self.module, self.part.kind, own, len(rows), self._dtype(x))
            own_change = split(change, len(rows)).to(product.dtype)
            product = split(product, count).index_add(0, rows, own_change).flatten(0, 1)
        return product


class Mixer:
    """Cores of one design with the parameters of all adapters that occur in some rows.

    Args:
        layer: name of the layer.
        entries: adapter of each row.
        rows: indices of these rows in the group; None for all.
        held: factors.
        stacks: stacked parameters of the adapters.
    """

    def __init__(
        self, layer: str, entries: Sequence[Entry], rows: list[int] | None, held: Held, stacks: Stacks
    ) -> None:
        self.rows = rows
        part: Part = entries[0].structure.parts[layer]
        self._of_row = list(dict.fromkeys(entries))
        places = {entry: place for place, entry in enumerate(self._of_row)}
        device = held.factors.U.device
        self._index = torch.tensor([places[entry] for entry in entries], device=device)
        self._numbers = {name: t.to(device) for name, t in stacks.numbers(self._of_row, layer).items()}
        cores = [held.core(part, entry.pairs.get(layer)) for entry in self._of_row]
        self.core = cores[0]
        if any(core is not self.core for core in cores):  # cores with different pairs
            self.core = stand_in(self.core, {})
            self.core.forget_own_pairs()
            buffers = [dict(core.named_buffers()) for core in cores]
            self._numbers |= {name: torch.stack([own[name] for own in buffers]) for name in buffers[0]}
        self.has_branch = type(self.core).beside is not Core.beside
        with torch.autocast(device.type, enabled=False):
            found, dims = self._all_coefficients(is_delta=part.strategy == "branch")
        dtype = torch.promote_types(held.factors.U.dtype, torch.float32)  # float64 for a float64 model, as in a layer
        self._coefficients = tuple(c.to(dtype) if c.is_floating_point() else c for c in found), dims
        self._of_rows: Coefficients | None = None

    @torch.no_grad()
    def _all_coefficients(self, *, is_delta: bool) -> tuple[Coefficients, list[int | None]]:
        """Return the coefficients of every row, and which of them differ by row (as ``in_dims`` of ``vmap``)."""
        count = len(self._of_row)

        def of_one(numbers: dict[str, Tensor]) -> Coefficients:
            return stand_in(self.core, numbers).coefficients(delta=is_delta)

        if count == 1 or self.core.branches:
            each = [of_one({name: t[place] for name, t in self._numbers.items()}) for place in range(count)]
            if count == 1:
                return each[0], [None] * len(each[0])
            return tuple(map(torch.stack, zip(*each, strict=True))), [0] * len(each[0])
        found: Coefficients = torch.vmap(of_one)(self._numbers)
        is_shared = [c.stride(0) == 0 for c in found]  # independent of trained parameters: pairs, singular values
        dims = [None if shared else 0 for shared in is_shared]
        return tuple(c[0] if shared else c for c, shared in zip(found, is_shared, strict=True)), dims

    def mix(self, z: Tensor) -> Tensor:
        """Return K z with the core of each row, for ``z`` (N, T, R)."""
        coefficients, dims = self._coefficients
        if len(self._of_row) == 1:
            return self.core.mix(z.flatten(0, 1), *coefficients).view_as(z)
        if max(c[0].numel() if d == 0 else 0 for c, d in zip(coefficients, dims, strict=True)) > _LARGE * z.shape[-1]:
            return self._one_by_one(z)
        if self._of_rows is None:
            rows = [c if d is None else c.index_select(0, self._index) for c, d in zip(coefficients, dims, strict=True)]
            self._of_rows = tuple(rows)
        return self.core.mix_rows(z, dims, *self._of_rows)

    def _one_by_one(self, z: Tensor) -> Tensor:
        """Compute :meth:`mix` adapter by adapter, without copying its matrices for each row."""
        coefficients, dims = self._coefficients
        mixed = torch.empty_like(z)
        for place in range(len(self._of_row)):
            rows = (self._index == place).nonzero().flatten()
            own = [c if d is None else c[place] for c, d in zip(coefficients, dims, strict=True)]
            found = self.core.mix(z.index_select(0, rows).flatten(0, 1), *own)
            mixed.index_copy_(0, rows, split(found, len(rows)))
        return mixed

    def beside(self, module: nn.Module, kind: CallableKind, x: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        """Return the part of the output outside the singular basis for the rows ``x`` (N * copies, ...)."""

        def of_one(x: Tensor, numbers: dict[str, Tensor]) -> Tensor:
            found = stand_in(self.core, numbers).beside(lambda A: kind.project(module, x, A.to(dtype)))
            assert found is not None
            return found

        if len(self._of_row) == 1:
            return of_one(x, {name: t[0] for name, t in self._numbers.items()})
        rows = {name: t.index_select(0, self._index) for name, t in self._numbers.items()}
        found: Tensor = torch.vmap(of_one)(split(x, count), rows)
        return found.flatten(0, 1)


def split(x: Tensor, count: int) -> Tensor:
    """Reshape ``x`` from (count * copies, ...) to (count, copies, ...)."""
    return x.reshape(count, x.shape[0] // count, *x.shape[1:])
