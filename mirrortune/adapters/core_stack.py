# SPDX-License-Identifier: Apache-2.0
"""Many cores of one kind as one module: a core for each expert, computed together."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from mirrortune.adapters.core import Coefficients, Core


class CoreStack(Core):
    """E cores of the same class and options, their numbers stacked: a parameter (n,) of one is (E, n) here.

    Every method takes and gives tensors with a leading dimension E. What one core computes is vectorised over the
    others (one after another for a core that ``branches``), so a core needs nothing of its own for it.

    Args:
        cores: E untrained cores.
    """

    S: Tensor

    def __init__(self, cores: Sequence[Core]) -> None:
        super().__init__()
        self.side, self.branches = cores[0].side, cores[0].branches
        self._one = [_Calls(copy.deepcopy(cores[0]))]  # in a list: its own numbers are no part of this module
        self._one[0].core.forget_own_pairs()
        with torch.no_grad():
            for name, first in cores[0].named_parameters():
                stacked = torch.stack([core.get_parameter(name) for core in cores])
                setattr(self, name, nn.Parameter(stacked, requires_grad=first.requires_grad))
            for name, _ in cores[0].named_buffers():
                self.register_buffer(name, torch.stack([c.get_buffer(name) for c in cores]), persistent=False)

    def coefficients(self, *, delta: bool) -> Coefficients:
        """See :class:`Core`; each tensor (E, ...)."""
        found: Coefficients = self._each("coefficients", delta=delta)
        return found

    def mix(self, z: Tensor, *coefficients: Tensor) -> Tensor:
        """See :class:`Core`; ``z`` (E, N, R)."""
        mixed: Tensor = self._each("mix", z, *coefficients)
        return mixed

    def beside_weight(self) -> Tensor | None:
        """See :class:`Core`; (E, O, I) or None."""
        if type(self._one[0].core).beside_weight is Core.beside_weight:
            return None
        found: Tensor = self._each("beside_weight")
        return found

    def angles(self) -> Tensor | None:
        """See :class:`Core`; (E, P) or None."""
        if self._one[0].core.angles() is None:
            return None
        found: Tensor = self._each("angles")
        return found

    @torch.no_grad()
    def delta_matrix(self) -> Tensor:
        """See :class:`Core`; (E, R, R)."""
        exact, (count, rank) = self.in_float64(), self.S.shape
        identity = torch.eye(rank, dtype=torch.float64).expand(count, -1, -1)
        return exact.mix(identity, *exact.coefficients(delta=True)).mT

    def _each(self, method: str, *stacked: Tensor, **options: Any) -> Any:
        numbers = {f"core.{n}": t for n, t in (*self.named_parameters(), *self.named_buffers())}

        def one(numbers: dict[str, Tensor], *given: Tensor) -> Any:
            return functional_call(self._one[0], numbers, (method, *given), options)

        if not self.branches:
            return vmap(one)(numbers, *stacked)
        found = [
            one({n: t[index] for n, t in numbers.items()}, *(t[index] for t in stacked)) for index in range(len(self.S))
        ]
        is_tuple = isinstance(found[0], tuple)
        return tuple(map(torch.stack, zip(*found, strict=True))) if is_tuple else torch.stack(found)


class _Calls(nn.Module):
    """A core whose methods ``functional_call`` can reach, which calls ``forward`` only."""

    def __init__(self, core: Core) -> None:
        super().__init__()
        self.core = core

    def forward(self, method: str, *args: Any, **options: Any) -> Any:
        """What the core's ``method`` gives."""
        return getattr(self.core, method)(*args, **options)
