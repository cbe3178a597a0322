# SPDX-License-Identifier: Apache-2.0
"""Describe how a weight tensor stores matrices: orientation, stacks, parts of fused layers; lazily computed tensors.

Shapes: O out_features, I in_features, E stacked matrices (experts, convolution groups).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils._pytree import tree_map


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The rows of one part of a fused layer: rows ``start`` to ``stop`` of each of ``repeat`` periods."""

    repeat: int
    start: int
    stop: int
    period: int

    @property
    def count(self) -> int:
        """Number of rows of this part."""
        return self.repeat * (self.stop - self.start)

    @property
    def total(self) -> int:
        """Number of rows of the fused layer."""
        return self.repeat * self.period

    def take(self, whole: Tensor) -> Tensor:
        """Return these rows of ``whole`` (total, I)."""
        return whole.reshape(self.repeat, self.period, -1)[:, self.start : self.stop].flatten(0, 1)

    def put(self, part: Tensor) -> Tensor:
        """Return a matrix (total, I) with ``part`` (count, I) in these rows and zeros elsewhere."""
        rows = part.reshape(self.repeat, self.stop - self.start, -1)
        return F.pad(rows, (0, 0, self.start, self.period - self.stop)).flatten(0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a weight tensor stores one matrix W (O, I), or E of them.

    Attributes:
        shape: shape of the tensor.
        out_features: O of each matrix.
        count: number of matrices, E.
        is_transposed: the tensor has shape (..., I, O).
        rows: rows of the tensor that belong to the matrix; None for all.
    """

    shape: tuple[int, ...]
    out_features: int
    count: int = 1
    is_transposed: bool = False
    rows: Rows | None = None

    @property
    def in_features(self) -> int:
        """I of each matrix."""
        out_features = self.rows.total if self.rows else self.out_features
        return math.prod(self.shape) // (self.count * out_features)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(O, I) of each matrix."""
        return self.out_features, self.in_features

    def matrix(self, weight: Tensor) -> Tensor:
        """Return ``weight`` as (O, I), or as (E, O, I) for a stack; a view if possible."""
        stack = (self.count,) if self.count > 1 else ()
        out_features = self.rows.total if self.rows else self.out_features
        if self.is_transposed:
            whole = weight.reshape(*stack, self.in_features, out_features).mT
        else:
            whole = weight.reshape(*stack, out_features, self.in_features)
        return self.rows.take(whole) if self.rows else whole

    def tensor(self, matrix: Tensor) -> Tensor:
        """Invert :meth:`matrix`; rows that do not belong to the matrix are zero."""
        whole = self.rows.put(matrix) if self.rows else matrix
        return (whole.mT if self.is_transposed else whole).reshape(self.shape)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Layout:
        """Build the layout whose ``dataclasses.asdict`` is ``fields``, possibly read from JSON."""
        rows = fields["rows"]
        return cls(**{**fields, "shape": tuple(fields["shape"]), "rows": Rows(**rows) if rows else None})

    def split(self, sizes: Sequence[int], repeat: int) -> list[Layout]:
        """Return the layouts of the parts of one fused matrix.

        Args:
            sizes: relative sizes of the parts, such as [1, 1, 1] for thirds.
            repeat: number of times that the parts follow each other, such as the number of heads.

        Raises:
            ValueError: the number of outputs is not divisible accordingly.
        """
        unit, rest = divmod(self.out_features, repeat * sum(sizes))
        if rest or self.count > 1 or self.rows or min(sizes) < 1:
            raise ValueError(f"{self.out_features} outputs do not divide into {repeat} x {list(sizes)}")
        ends = list(itertools.accumulate(size * unit for size in sizes))
        parts = [Rows(repeat=repeat, start=s, stop=e, period=ends[-1]) for s, e in zip([0, *ends], ends, strict=False)]
        return [replace(self, rows=rows, out_features=rows.count) for rows in parts]


class LazyTensor(Tensor):
    """A tensor whose values are computed when an operation needs them; its shape, dtype and device are known before."""

    compute: Callable[[], Tensor]

    @classmethod
    def of(cls, shape: tuple[int, ...], like: Tensor, compute: Callable[[], Tensor]) -> LazyTensor:
        """Create one of ``shape`` with the dtype and device of ``like``; ``compute`` returns it."""
        lazy = like.new_empty(1).expand(shape).as_subclass(cls)  # takes no memory
        lazy.compute = compute
        return lazy

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer operations on metadata at once, and compute the values for all others."""
        if func in _OUTLINE:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        given = tree_map(lambda a: a.compute() if isinstance(a, LazyTensor) else a, (args, kwargs or {}))
        return func(*given[0], **given[1])


_PROPERTIES = ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_meta", "is_mps", "is_sparse",
               "is_quantized", "is_nested", "names", "itemsize", "nbytes")  # fmt: skip
_OUTLINE = {getattr(Tensor, name).__get__ for name in _PROPERTIES if hasattr(Tensor, name)} | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.is_floating_point,
    Tensor.is_complex, Tensor.get_device, Tensor.__len__,
}  # fmt: skip
"""Operations that do not need the values of a tensor."""
