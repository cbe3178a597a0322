# SPDX-License-Identifier: Apache-2.0
"""Make modules of a base model compute each row of a batch with the adapter of that row.

A module keeps its place, name and weights; only its class is replaced by a subclass whose forward looks up which rows
the calling thread serves. Rows are grouped by what is computed for them: the plain layer, the layer with factors beside
it or instead of it, or the layer with parameters of the adapter, such as a classifier. Within a group, the large
products with U and Vh are computed for all rows at once; only the core between them, a vector or a small matrix,
differs by row.

Shapes: B rows of the batch, N rows of a group, T positions of a row, O out_features, I in_features, R rank, A adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from typing_extensions import override

from mirrortune.errors import ConfigError
from mirrortune.inference.bank_bases import stand_in
from mirrortune.inference.bank_entries import Entry, Stacks
from mirrortune.inference.bank_mixing import PartOfRows, split


@dataclass(slots=True, eq=False)
class Seat:
    """One module of the model that a bank computes.

    Attributes:
        path: name of the module.
        module: module.
        plain: original class of the module.
        serving: returns the rows that the calling thread serves, or None; raises if it should be serving some.
        peek: like ``serving``, but never raises.
        guarded: names of parameters that adapters replace or change.
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
        """Replace the class of ``module``, so that its forward serves rows.

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
            # accelerate, which moves inputs to the module's device, calls the forward stored under this name
            module.__dict__["_old_forward"] = served.forward.__get__(module)  # type: ignore[attr-defined]
        module.__class__ = served
        return seat

    def give_back(self) -> None:
        """Restore the original class of the module."""
        if "forward" in vars(self.module):
            self.module.__dict__["_old_forward"] = self.plain.forward.__get__(self.module)
        self.module.__class__ = self.plain
        del self.module.__dict__["_mirrortune_seat"]


class Serving:
    """The rows that a thread serves: an adapter or None for each row of the batch.

    Args:
        names: name of each row's adapter, for messages.
        entries: each row's adapter.
    """

    def __init__(self, names: Sequence[str | None], entries: Sequence[Entry | None]) -> None:
        self.names, self.entries = tuple(names), tuple(entries)
        self.is_generating = False
        self.inside: nn.Module | None = None
        self._groups: dict[str, list[Group]] = {}
        self._stacks = Stacks()

    def groups(self, seat: Seat) -> list[Group]:
        """Return the groups of rows for which the module computes the same; cached after the first call."""
        found = self._groups.get(seat.path)
        if found is None:
            by_way: dict[Any, list[int]] = {}
            for row, entry in enumerate(self.entries):
                by_way.setdefault(_way(seat.path, entry), []).append(row)
            found = [self._group(seat, rows, is_all=len(by_way) == 1) for rows in by_way.values()]
            self._groups[seat.path] = found
        return found

    def _group(self, seat: Seat, rows: list[int], *, is_all: bool) -> Group:
        found = [self.entries[row] for row in rows]
        first = found[0]
        index = None if is_all else torch.tensor(rows)
        if first is None or _way(seat.path, first) is None:
            return Group(seat, index, len(rows))
        own = cast(list[Entry], found)
        if seat.path in first.structure.saved:
            return SavedGroup(seat, index, len(rows), own)
        parts = [
            PartOfRows(part.layer, own, seat.module, self._stacks) for part in first.structure.by_module[seat.path]
        ]
        return SpectralGroup(seat, index, len(rows), parts)

    def copies(self, seat: Seat, x: Tensor) -> int:
        """Return how many consecutive rows of ``x`` belong to each row of the batch.

        Raises:
            ConfigError: the first dimension of ``x`` is not a multiple of the number of rows.
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
    """Return a key of what the module computes for the rows of an adapter; rows with equal keys form a group."""
    if entry is None:
        return None
    if path in entry.structure.saved:
        return "saved"
    parts = entry.structure.by_module.get(path, ())
    return tuple((id(part.basis), part.rank, part.strategy, part.layer) for part in parts) or None


class Group:
    """A group of rows for which a module computes the same as without a bank.

    Args:
        seat: module.
        index: row indices, shape (N,), or None for all rows.
        count: number of rows, N.
    """

    def __init__(self, seat: Seat, index: Tensor | None, count: int) -> None:
        self.seat, self.index, self.count = seat, index, count

    def take(self, x: Tensor, copies: int) -> Tensor:
        """Return the rows of this group from ``x`` (B * copies, ...), as (N * copies, ...)."""
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
    """A group of rows whose adapters replace parameters of a module, such as a classifier; computed adapter by adapter.

    Outputs of different widths are padded with minus infinity, which softmax and argmax ignore.
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

    @override
    def __call__(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        if len(self._rows) == 1:
            found: Tensor = next(iter(self._modules.values())).forward(x, *args, **options)
            return found
        rows = split(x, self.count)
        outputs = [
            self._modules[entry].forward(rows[own].flatten(0, 1), *args, **options) for entry, own in self._rows.items()
        ]
        order = [row for own in self._rows.values() for row in own]
        return _in_order(outputs, order)


class SpectralGroup(Group):
    """A group of rows whose adapters change the weight of a module in the same basis, with the same rank."""

    def __init__(self, seat: Seat, index: Tensor | None, count: int, parts: list[PartOfRows]) -> None:
        super().__init__(seat, index, count)
        self.parts = parts

    @override
    def __call__(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
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


class _Served(nn.Module):
    """The first base class of a served module's class; its forward computes each row with the adapter of that row."""

    def forward(self, *args: Any, **options: Any) -> Any:
        """Compute the output of the module, each row as with its adapter alone."""
        seat: Seat = self.__dict__["_mirrortune_seat"]
        serving = seat.serving()
        groups = [] if serving is None else serving.groups(seat)
        if serving is None or all(type(group) is Group for group in groups):
            return seat.plain.forward(self, *args, **options)
        x, *args = args if args else [options.pop(next(iter(options)))]  # type: ignore[assignment]
        if isinstance(x, Tensor) and x.dim() > 1 and x.shape[0] == 1 < len(serving.entries):
            x = x.expand(len(serving.entries), *x.shape[1:])  # positions, which all rows share
        copies = serving.copies(seat, x)
        before, serving.inside = serving.inside, self
        try:
            outputs = [group(group.take(x, copies), *args, **options) for group in groups]
        finally:
            serving.inside = before
        if len(outputs) == 1:
            return outputs[0]
        order = [row for group in groups for row in cast(Tensor, group.index).tolist()]
        return _in_order(outputs, order)

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
    """A stand-in for a parameter that is read outside its layer, where rows would need different values.

    It has shape, dtype and device, but no values.
    """

    place: str

    @classmethod
    def of(cls, parameter: Tensor, place: str) -> _Unread:
        """Create a stand-in for ``parameter``, which is called ``place`` in errors."""
        found = parameter.detach().new_empty(1).expand(parameter.shape).as_subclass(cls)
        found.place = place
        return found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run operations that need no values, and raise an error for all others."""
        if func in _OUTLINE:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        place = next((a.place for a in args if isinstance(a, _Unread)), "a parameter")
        raise ConfigError(
            place, "the model reads it instead of calling its layer, so rows of a batch cannot have their own",
            fix="Merge the adapter, or leave this layer out (target_modules) when training",
        )  # fmt: skip


_PROPERTIES = ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_meta", "requires_grad", "nbytes")
_OUTLINE = {getattr(Tensor, name).__get__ for name in _PROPERTIES} | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.element_size, Tensor.is_floating_point, Tensor.__len__,
}  # fmt: skip


def _in_order(outputs: Sequence[Tensor], order: Sequence[int]) -> Tensor:
    """Combine the outputs of groups into one batch.

    Args:
        outputs: output of each group, (N * copies, ...); the last dimension may differ.
        order: batch row of each row of the concatenated outputs.
    """
    width = max(output.shape[-1] for output in outputs)
    wide = [F.pad(o, (0, width - o.shape[-1]), value=-torch.inf) if o.shape[-1] < width else o for o in outputs]
    joined = torch.cat(wide)
    places = torch.empty(len(order), dtype=torch.int64)
    places[torch.tensor(order)] = torch.arange(len(order))
    return split(joined, len(order)).index_select(0, places.to(joined.device)).flatten(0, 1)
