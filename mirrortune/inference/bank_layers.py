# SPDX-License-Identifier: Apache-2.0
"""Modules of a base model that compute each row of a batch with the adapter of that row.

A module keeps its place, name and weights: only its class is exchanged for a subclass of it, whose forward looks up
which rows are being served in the calling thread. Rows are grouped by what is computed for them: the plain layer, the
layer with factors beside it or in its place, or the layer with parameters of the adapter's own (a classifier). Within a
group the large products U and Vh are made for all rows at once, and only what lies between them, the core, differs by
row: a vector or a small matrix.

Shapes: B rows of the batch, N rows of a group, T positions of a row, O out_features, I in_features, R rank, A adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from mirrortune.adapters.core import Coefficients, Core
from mirrortune.adapters.kinds import CallableKind, Linear
from mirrortune.errors import ConfigError
from mirrortune.inference.bank_bases import Held, stand_in
from mirrortune.inference.bank_entries import Entry, Part

_LARGE = 64  # coefficients a direction, from which on a product for each adapter beats a copy for each row


@dataclass(slots=True, eq=False)
class Seat:
    """One module of the model that a bank computes.

    Attributes:
        path: name of the module.
        module: the module.
        plain: its own class.
        serving: gives the rows that the calling thread serves, or None; raises where it should be serving some.
        peek: the same, and never raises.
        guarded: parameters that an adapter has of its own, or turns.
    """

    path: str
    module: nn.Module
    plain: type[nn.Module]
    serving: Callable[[], Serving | None]
    peek: Callable[[], Serving | None]
    guarded: frozenset[str] = frozenset()

    @classmethod
    def take(
        cls, path: str, module: nn.Module, serving: Callable[[], Serving | None], peek: Callable[[], Serving | None]
    ) -> Seat:
        """Exchange the class of ``module``; its forward serves rows from now on.

        Raises:
            ConfigError: another library has replaced the module's forward.
        """
        plain = type(module)
        seat = cls(path=path, module=module, plain=plain, serving=serving, peek=peek)
        module.__dict__["_mirrortune_seat"] = seat
        served = type(plain.__name__, (_Served, plain), {"__module__": plain.__module__})
        if "forward" in vars(module):
            if not hasattr(module, "_old_forward"):
                raise ConfigError(path, "its forward has been replaced by another library",
                                  fix="Make the bank before that")  # fmt: skip
            # accelerate, which moves inputs to the module's device, calls what it found there
            module.__dict__["_old_forward"] = served.forward.__get__(module)  # type: ignore[attr-defined]
        module.__class__ = served
        return seat

    def give_back(self) -> None:
        """Let the module be of its own class again."""
        if "forward" in vars(self.module):
            self.module.__dict__["_old_forward"] = self.plain.forward.__get__(self.module)
        self.module.__class__ = self.plain
        del self.module.__dict__["_mirrortune_seat"]


class Serving:
    """The rows that a thread serves: an adapter, or None, for each row of the batch.

    Args:
        names: of the adapters, for messages.
        entries: of the adapters.
    """

    def __init__(self, names: Sequence[str | None], entries: Sequence[Entry | None]) -> None:
        self.names, self.entries = tuple(names), tuple(entries)
        self.is_generating = False
        self.inside: nn.Module | None = None
        self._groups: dict[str, list[Group]] = {}

    def groups(self, seat: Seat) -> list[Group]:
        """Return the rows by what the module computes for them; made at the first call."""
        found = self._groups.get(seat.path)
        if found is None:
            by_way: dict[Any, list[int]] = {}
            for row, entry in enumerate(self.entries):
                by_way.setdefault(_way(seat.path, entry), []).append(row)
            found = [_group(seat, rows, self.entries, len(by_way) == 1) for rows in by_way.values()]
            self._groups[seat.path] = found
        return found

    def copies(self, seat: Seat, x: Tensor) -> int:
        """Return how many consecutive rows of ``x`` belong to one row of the batch.

        Raises:
            ConfigError: the first dimension of ``x`` is no multiple of the number of rows.
        """
        copies, rest = divmod(x.shape[0] if x.dim() else 0, len(self.entries))
        if rest or not copies:
            raise ConfigError(
                seat.path,
                f"the layer is given {tuple(x.shape)} numbers, and bank.rows() names {len(self.entries)} rows",
                allowed="a name for each row of the batch",
                fix="Name as many rows as the batch has",
            )
        return copies


def _way(path: str, entry: Entry | None) -> Any:
    """What the module computes for the rows of an adapter: equal for rows that go together."""
    if entry is None:
        return None
    if path in entry.structure.saved:
        return "saved"
    parts = entry.structure.by_module.get(path, ())
    return tuple((id(part.basis), part.rank, part.strategy, part.layer) for part in parts) or None


def _group(seat: Seat, rows: list[int], entries: Sequence[Entry | None], is_all: bool) -> Group:  # noqa: FBT001
    found = [entries[row] for row in rows]
    first = found[0]
    index = None if is_all else torch.tensor(rows)
    if first is None or _way(seat.path, first) is None:
        return Group(seat, index, len(rows))
    chosen = cast(list[Entry], found)
    if seat.path in first.structure.saved:
        return SavedGroup(seat, index, len(rows), chosen)
    parts = first.structure.by_module[seat.path]
    return SpectralGroup(seat, index, len(rows), [PartOfRows(part.layer, chosen, seat.module) for part in parts])


class Group:
    """Rows for which a module computes what it always does.

    Args:
        seat: the module.
        index: the rows, (N,), or None for all.
        count: N.
    """

    def __init__(self, seat: Seat, index: Tensor | None, count: int) -> None:
        self.seat, self.index, self.count = seat, index, count

    def take(self, x: Tensor, copies: int) -> Tensor:
        """Return this group's rows of ``x`` (B * copies, ...)."""
        if self.index is None:
            return x
        return split(x, x.shape[0] // copies).index_select(0, self.index.to(x.device)).flatten(0, 1)

    def __call__(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """Compute the module for the rows ``x`` (N * copies, ...)."""
        return self.plain(x, *args, **options)

    def plain(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """Compute the base module."""
        found: Tensor = self.seat.plain.forward(self.seat.module, x, *args, **options)
        return found


class SavedGroup(Group):
    """Rows whose adapters have parameters of their own for a module, such as a classifier; one adapter after another.

    Outputs of different widths are padded with minus infinity, which no softmax and no argmax chooses.
    """

    def __init__(self, seat: Seat, index: Tensor | None, count: int, entries: Sequence[Entry]) -> None:
        super().__init__(seat, index, count)
        self._rows: dict[Entry, list[int]] = {}
        for row, entry in enumerate(entries):
            self._rows.setdefault(entry, []).append(row)
        self._modules = {entry: self._own(entry) for entry in self._rows}

    def _own(self, entry: Entry) -> nn.Module:
        module, plain = self.seat.module, self.seat.plain
        like = next(module.parameters(recurse=False))
        own = {name: t.to(like.device, like.dtype) for name, t in entry.parameters(self.seat.path).items()}
        return stand_in(module, own, plain)

    def __call__(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """See :class:`Group`."""
        if len(self._rows) == 1:
            found: Tensor = next(iter(self._modules.values())).forward(x, *args, **options)
            return found
        rows = split(x, self.count)
        outputs = [
            self._modules[entry].forward(rows[own].flatten(0, 1), *args, **options) for entry, own in self._rows.items()
        ]
        order = [row for own in self._rows.values() for row in own]
        return in_order(outputs, order)


class SpectralGroup(Group):
    """Rows whose adapters turn the weight of a module in the same basis, with as many directions."""

    def __init__(self, seat: Seat, index: Tensor | None, count: int, parts: list[PartOfRows]) -> None:
        super().__init__(seat, index, count)
        self.parts = parts

    def __call__(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """See :class:`Group`."""
        module = cast(Any, self.seat.module)
        autocast = torch.is_autocast_enabled(x.device.type)
        first = self.parts[0]
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else first.U.dtype
        given = x.to(dtype) if x.is_floating_point() else x
        kind = first.part.kind
        if first.part.strategy == "factored":
            with torch.autocast(x.device.type, enabled=False):
                bias = getattr(module, "bias", None)
                mixed = first.mixed(given, self.count)
                y = F.linear(mixed, first.U.to(dtype), None if bias is None else bias.to(dtype))
            return kind.output(module, first.with_branch(given, y, self.count))
        y = self.plain(x, *args, **options)
        for part in self.parts:
            y = part.added(given, y, self.count)
        return y


class PartOfRows:
    """One adapted weight for the rows of a group.

    Args:
        layer: its name.
        entries: the adapter of each row.
        module: applies the weight.
    """

    def __init__(self, layer: str, entries: Sequence[Entry], module: nn.Module) -> None:
        self.part = entries[0].structure.parts[layer]
        self.module = module
        self.held = self.part.basis.held
        factors = self.held.leading(self.part.rank)
        self.U, self.Vh = factors.U, factors.Vh
        rows: dict[Any, list[int]] = {}
        for row, entry in enumerate(entries):
            rows.setdefault(entry.structure.parts[layer].design, []).append(row)
        self.mixers = [
            Mixer(layer, [entries[row] for row in own], own if len(rows) > 1 else None, self.held)
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
        # As in SpectralLinear, cores work in float32 even where the model runs in 16 bits.
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
        """Return ``product`` with what the cores add beside the singular basis."""
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
    """Cores of one design, with the numbers of as many adapters as there are among some rows.

    Args:
        layer: their layer.
        entries: the adapter of each row.
        rows: which rows of the group these are; None for all.
        held: the factors.
    """

    def __init__(self, layer: str, entries: Sequence[Entry], rows: list[int] | None, held: Held) -> None:
        self.rows = rows
        part: Part = entries[0].structure.parts[layer]
        self._of_row = list(dict.fromkeys(entries))
        places = {entry: place for place, entry in enumerate(self._of_row)}
        device = held.factors.U.device
        self._index = torch.tensor([places[entry] for entry in entries], device=device)
        numbers = [entry.numbers(layer) for entry in self._of_row]
        dtype = torch.promote_types(held.factors.U.dtype, torch.float32)
        self._numbers = {name: torch.stack([own[name] for own in numbers]).to(device, dtype) for name in numbers[0]}
        cores = [held.core(part, entry.pairs.get(layer)) for entry in self._of_row]
        self.core = cores[0]
        if any(core is not self.core for core in cores):  # each with pairs of its own
            self.core = stand_in(self.core, {})
            self.core.forget_own_pairs()
            buffers = [dict(core.named_buffers()) for core in cores]
            self._numbers |= {name: torch.stack([own[name] for own in buffers]) for name in buffers[0]}
        self.has_branch = type(self.core).beside is not Core.beside
        self._coefficients = self._all_coefficients(is_delta=part.strategy == "branch")
        self._of_rows: Coefficients | None = None

    @torch.no_grad()
    def _all_coefficients(self, *, is_delta: bool) -> tuple[Coefficients, list[int | None]]:
        """Return the coefficients of every row, and which of them differ by row (as dimensions for ``vmap``)."""
        count = len(self._of_row)

        def of_one(numbers: dict[str, Tensor]) -> Coefficients:
            return stand_in(self.core, numbers).coefficients(delta=is_delta)

        if count == 1 or self.core.branches:
            each = [of_one({name: t[place] for name, t in self._numbers.items()}) for place in range(count)]
            if count == 1:
                return each[0], [None] * len(each[0])
            return tuple(map(torch.stack, zip(*each, strict=True))), [0] * len(each[0])
        found: Coefficients = torch.vmap(of_one)(self._numbers)
        is_shared = [c.stride(0) == 0 for c in found]  # that depends on no trained number: pairs, singular values
        dims = [None if shared else 0 for shared in is_shared]
        return tuple(c[0] if shared else c for c, shared in zip(found, is_shared, strict=True)), dims

    def mix(self, z: Tensor) -> Tensor:
        """Return K z by row, for ``z`` (N, T, R)."""
        coefficients, dims = self._coefficients
        if len(self._of_row) == 1:
            return self.core.mix(z.flatten(0, 1), *coefficients).view_as(z)
        if max(c[0].numel() if d == 0 else 0 for c, d in zip(coefficients, dims, strict=True)) > _LARGE * z.shape[-1]:
            return self._one_by_one(z)
        if self._of_rows is None:
            rows = [c if d is None else c.index_select(0, self._index) for c, d in zip(coefficients, dims, strict=True)]
            self._of_rows = tuple(rows)
        mixed: Tensor = torch.vmap(self.core.mix, in_dims=(0, *dims))(z, *self._of_rows)
        return mixed

    def _one_by_one(self, z: Tensor) -> Tensor:
        """The same, adapter by adapter, without a copy of its matrices for each row."""
        coefficients, dims = self._coefficients
        mixed = torch.empty_like(z)
        for place in range(len(self._of_row)):
            rows = (self._index == place).nonzero().flatten()
            own = [c if d is None else c[place] for c, d in zip(coefficients, dims, strict=True)]
            found = self.core.mix(z.index_select(0, rows).flatten(0, 1), *own)
            mixed.index_copy_(0, rows, split(found, len(rows)))
        return mixed

    def beside(self, module: nn.Module, kind: CallableKind, x: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        """Return what the cores add beside the singular basis for the rows ``x`` (N * copies, ...)."""

        def of_one(x: Tensor, numbers: dict[str, Tensor]) -> Tensor:
            found = stand_in(self.core, numbers).beside(lambda A: kind.project(module, x, A.to(dtype)))
            assert found is not None
            return found

        if len(self._of_row) == 1:
            return of_one(x, {name: t[0] for name, t in self._numbers.items()})
        rows = {name: t.index_select(0, self._index) for name, t in self._numbers.items()}
        found: Tensor = torch.vmap(of_one)(split(x, count), rows)
        return found.flatten(0, 1)


class _Served(nn.Module):
    """Stands before a module's own class: its forward computes each row of the batch with the adapter of that row."""

    def forward(self, *args: Any, **options: Any) -> Any:
        """Return the module's output, each row as with its adapter alone."""
        seat: Seat = self.__dict__["_mirrortune_seat"]
        serving = seat.serving()
        groups = [] if serving is None else serving.groups(seat)
        if serving is None or all(type(group) is Group for group in groups):
            return seat.plain.forward(self, *args, **options)
        x, *args = args if args else [options.pop(next(iter(options)))]  # type: ignore[assignment]
        if isinstance(x, Tensor) and x.dim() > 1 and x.shape[0] == 1 < len(serving.entries):
            x = x.expand(len(serving.entries), *x.shape[1:])  # positions, which all rows have in common
        copies = serving.copies(seat, x)
        before, serving.inside = serving.inside, self
        try:
            outputs = [group(group.take(x, copies), *args, **options) for group in groups]
        finally:
            serving.inside = before
        if len(outputs) == 1:
            return outputs[0]
        order = [row for group in groups for row in cast(Tensor, group.index).tolist()]
        return in_order(outputs, order)

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        seat: Seat | None = self.__dict__.get("_mirrortune_seat")
        if seat is None or name not in seat.guarded or not isinstance(found, Tensor):
            return found
        serving = seat.peek()
        if serving is None or serving.inside is self:
            return found
        if all(type(group) is Group for group in serving.groups(seat)):
            return found
        return _Unread.of(found, f"{seat.path}.{name}")


class _Unread(Tensor):
    """A parameter outside its layer, where rows would need different ones: shape, dtype and device, no numbers."""

    place: str

    @classmethod
    def of(cls, parameter: Tensor, place: str) -> _Unread:
        """Stand for ``parameter``, called ``place``."""
        found = parameter.detach().new_empty(1).expand(parameter.shape).as_subclass(cls)
        found.place = place
        return found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer what needs no numbers, refuse the rest."""
        if func in _OUTLINE:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        place = next((a.place for a in args if isinstance(a, _Unread)), "a parameter")
        raise ConfigError(
            place, "the model reads it instead of calling its layer, so rows of a batch cannot have their own",
            fix="Merge the adapter, or leave this layer out with --target-modules when training",
        )  # fmt: skip


_PROPERTIES = ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_meta", "requires_grad", "nbytes")
_OUTLINE = {getattr(Tensor, name).__get__ for name in _PROPERTIES} | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.element_size, Tensor.is_floating_point, Tensor.__len__,
}  # fmt: skip


def in_order(outputs: Sequence[Tensor], order: Sequence[int]) -> Tensor:
    """Put the outputs of groups together as rows of one batch.

    Args:
        outputs: of each group, (N * copies, ...), the last dimension possibly of different widths.
        order: the row of the batch of each of their rows.
    """
    width = max(output.shape[-1] for output in outputs)
    wide = [F.pad(o, (0, width - o.shape[-1]), value=-torch.inf) if o.shape[-1] < width else o for o in outputs]
    joined = torch.cat(wide)
    places = torch.empty(len(order), dtype=torch.int64)
    places[torch.tensor(order)] = torch.arange(len(order))
    return split(joined, len(order)).index_select(0, places.to(joined.device)).flatten(0, 1)


def split(x: Tensor, count: int) -> Tensor:
    """Return ``x`` (count * copies, ...) as (count, copies, ...)."""
    return x.reshape(count, x.shape[0] // count, *x.shape[1:])
