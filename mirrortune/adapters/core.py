# SPDX-License-Identifier: Apache-2.0
"""The interface of a core: the small trained matrix K (R, R) between the frozen factors, W' = W + U (K - diag(S)) Vh.

A core is a class, registered under the name that ``--method`` takes. Its positional parameters are ``S`` (R,) and, if
it declares them, ``pairs`` (T, 2), the pairs of all ``rounds`` one round after the other, ``shape`` (O, I), and
``generator``, the layer's own of random numbers. Its keyword-only parameters are its recipe options. A core computes
*coefficients* (a few small tensors) from its parameters with ordinary autograd and defines how they act on z = Vh x.
The layer's autograd function does the rest; it saves z for the backward pass instead of x.

Shapes: N rows, R rank, T pairs, O out_features, I in_features.
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from typing_extensions import override

from mirrortune.adapters.methods import CORES
from mirrortune.errors import ConfigError

__all__ = [
    "CORES", "Coefficients", "Core", "checked_top_k", "even_steps", "plane_strengths", "trained", "zero_padded"
]  # fmt: skip

Coefficients = tuple[Tensor, ...]


class Core(nn.Module, metaclass=abc.ABCMeta):
    """Base class of all cores.

    Parameters stay in float32 even if the model is cast to 16 bits, since bfloat16 has only two to three digits.
    """

    side: Literal["output", "input", "both"] = "both"
    """Which singular vectors the core's effect depends on apart from their product with S: U, Vh, or both."""
    basis: Literal["weight", "gradient"] = "weight"
    """Whose singular vectors U and Vh are: of the weight, or of gradients measured on the task, which the adapter file
    then carries."""
    branches: bool = False
    """Whether control flow depends on values of tensors, so that methods cannot be vectorised over cores."""
    default_lr: float = 3e-2
    """Learning rate of the method that has the name of this core; the default suits angles and relative scales."""
    image_lr: float | None = None
    """The same for image classification; None if it is ``default_lr``."""
    default_rank: int | Literal["full"] = "full"
    """Number of leading directions that this method uses."""
    rank_option: str | None = None
    """Option of this method that ``rank`` sets, if its paper calls something other than the number of directions the
    rank."""
    default_pairing: str | None = None
    """Pairing of this method, for a core with a parameter ``pairs``."""

    @abc.abstractmethod
    def coefficients(self, *, delta: bool) -> Coefficients:
        """Compute the tensors with which :meth:`mix` applies K or, if ``delta``, K - diag(S).

        K - diag(S) is exactly zero for an untrained core.
        """

    def relative_coefficients(self, side: Literal["output", "input"]) -> Coefficients | None:
        """Compute the tensors by which :meth:`mix` applies (K - diag(S)) diag(S)^-1 for the output side, or
        diag(S)^-1 (K - diag(S)) for the input side; None if the core does not provide them.

        With these M, W' = (1 + U M U^T) W, or W (1 + V M V^T): the layer changes the output or the input of the frozen
        weight, and needs one of the two factors.
        """
        return None

    @abc.abstractmethod
    def mix(self, z: Tensor, *coefficients: Tensor) -> Tensor:
        """Return K z for every row of ``z`` (N, R), shape (N, R)."""

    def mix_rows(self, z: Tensor, dims: Sequence[int | None], *coefficients: Tensor) -> Tensor:
        """Compute K z with different coefficients for each of N rows, shape (N, T, R).

        Args:
            z: input of N rows with T positions, shape (N, T, R).
            dims: for each coefficient, 0 if it has a leading dimension N, or None if all rows share it.
            coefficients: coefficients as from :meth:`coefficients`.
        """
        mixed: Tensor = vmap(self.mix, in_dims=(0, *dims))(z, *coefficients)
        return mixed

    def mix_backward(self, z: Tensor, grad: Tensor, *coefficients: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Compute the gradients of ``(grad * mix(z, *coefficients)).sum()`` for z and each coefficient.

        The default implementation recomputes ``mix`` under autograd, so that a new core need not define a backward
        pass.
        """
        with torch.enable_grad():
            inputs = [z.detach().requires_grad_()]
            inputs += [c.detach().requires_grad_(c.is_floating_point()) for c in coefficients]
            mixed = self.mix(*inputs)
            wanted = [t for t in inputs if t.requires_grad]
            found = iter(torch.autograd.grad(mixed, wanted, grad, allow_unused=True))
        grads = [next(found) if t.requires_grad else None for t in inputs]
        grad_z = grads[0] if grads[0] is not None else torch.zeros_like(z)
        return grad_z, tuple(grads[1:])

    def beside(self, project: Callable[[Tensor], Tensor]) -> Tensor | None:
        """Return the part of the core's output outside the singular basis, (..., O), or None if there is none.

        Args:
            project: applies a matrix A (n, I) to the layer's input and returns (..., n).
        """
        return None

    def beside_weight(self) -> Tensor | None:
        """Return the weight (O, I) that :meth:`beside` applies, or None."""
        return None

    @classmethod
    def seeded(cls, options: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """Return the options of a new core, with those that follow from the seed of its run unless they are given."""
        return dict(options)

    def start(self) -> dict[str, Tensor]:
        """Return the parameters, by name, with which training starts; the others start as they are built.

        A core is built untrained, so that it changes nothing, and may start elsewhere.
        """
        return {}

    def angles(self) -> Tensor | None:
        """Return the angles in radians of the planes that the core rotates, shape (P,), or None if it rotates none."""
        return None

    def forget_own_pairs(self) -> None:
        """Stop relying on the pairs given at construction, because :class:`CoreStack` will pass those of other cores.

        A core with a shortcut for certain pairs must not use it afterwards.
        """

    @torch.no_grad()
    def delta_matrix(self) -> Tensor:
        """Return K - diag(S) in float64 on the CPU, shape (R, R)."""
        exact = self.in_float64()
        rank = exact.get_buffer("S").shape[0]
        return exact.mix(torch.eye(rank, dtype=torch.float64), *exact.coefficients(delta=True)).T

    def in_float64(self) -> Core:
        """Return a copy in float64 on the CPU."""
        return copy.deepcopy(self).cpu().double()  # in this order: an Apple GPU has no float64

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Core:  # noqa: FBT001, FBT002  (torch's signature)
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype in (torch.bfloat16, torch.float16):
                return tensor.to(moved.device)
            return moved

        super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        return self


class MatrixCore(Core):
    """A core whose only coefficient is a dense matrix: K, or K - diag(S), shape (R, R)."""

    @override
    def mix(self, z: Tensor, *coefficients: Tensor) -> Tensor:
        return z @ coefficients[0].T

    @override
    def mix_rows(self, z: Tensor, dims: Sequence[int | None], *coefficients: Tensor) -> Tensor:
        return z @ coefficients[0].mT


def trained(S: Tensor, count: int) -> nn.Parameter:
    """Return a parameter of ``count`` zeros in the dtype and on the device of ``S``.

    An empty parameter does not require a gradient, for which DistributedDataParallel would otherwise wait.
    """
    return nn.Parameter(S.new_zeros(count), requires_grad=count > 0)


def checked_top_k(top_k: Any, rank: int, where: str) -> int:
    """Return the number of leading directions that ``top_k`` (a number or ``"all"``) selects.

    Raises:
        ConfigError: ``top_k`` is neither; the error names ``where``.
    """
    if top_k == "all":
        return rank
    if not isinstance(top_k, int) or isinstance(top_k, bool) or not 0 <= top_k <= rank:
        raise ConfigError(where, f"got {top_k!r}", allowed=f"0 to {rank}, or all")
    return top_k


def zero_padded(values: Tensor, rank: int) -> Tensor:
    """Return ``values`` (k,) followed by zeros, shape (rank,)."""
    return torch.cat([values, values.new_zeros(rank - values.shape[0])])


def plane_strengths(S: Tensor) -> Tensor:
    """Compute the strength sqrt((S_i^2 + S_j^2) / 2) of the plane of each pair of directions, shape (..., R, R).

    Rotating the plane by a small angle changes the weight by sqrt(2) times its strength per radian, in Frobenius norm.
    The plane of two directions of equal strength has this strength.

    Args:
        S: singular values (..., R).
    """
    square = S.square()
    return ((square[..., :, None] + square[..., None, :]) / 2).sqrt()


def even_steps(
    strength: Tensor, S: Tensor, *, unit: Literal["movement", "weight"] = "movement", largest: float = 10.0
) -> Tensor:
    """Compute factors rms(S) / strength, with which steps of all parameters change the weight by the same amount.

    Factors are bounded for directions of strength near zero, where larger steps would gain next to nothing and could
    turn an angle by more than half a turn.

    Args:
        strength: strength of each parameter, shape (..., n) or (..., R, R).
        S: singular values, shape (..., R).
        unit: ``movement`` for changes that are equal within a layer and proportional to rms(S) across layers;
            ``weight`` for the factors 1 / strength, with which changes are equal in all layers.
        largest: upper bound of the factors.
    """
    average = S.square().mean(dim=-1).sqrt()
    if unit == "weight":
        average = torch.ones_like(average)
    average = average.reshape(*average.shape, *[1] * (strength.ndim - average.ndim))
    is_weak = strength * largest <= average
    return torch.where(is_weak, largest, average / strength.masked_fill(is_weak, 1.0))


class CoreStack(Core):
    """E cores of the same class and options with stacked parameters: a parameter (n,) of one core is (E, n) here.

    Every method takes and returns tensors with a leading dimension E. The methods of a single core are vectorised over
    the stack, or called one after another for a core that ``branches``, so a core needs no code for stacks.

    Args:
        cores: E untrained cores.
    """

    S: Tensor

    def __init__(self, cores: Sequence[Core]) -> None:
        super().__init__()
        self.side, self.branches, self.basis = cores[0].side, cores[0].branches, cores[0].basis
        self._one = [_Calls(copy.deepcopy(cores[0]))]  # in a list, so that its parameters are not part of this module
        self._one[0].core.forget_own_pairs()
        with torch.no_grad():
            for name, first in cores[0].named_parameters():
                stacked = torch.stack([core.get_parameter(name) for core in cores])
                setattr(self, name, nn.Parameter(stacked, requires_grad=first.requires_grad))
            for name, _ in cores[0].named_buffers():
                self.register_buffer(name, torch.stack([c.get_buffer(name) for c in cores]), persistent=False)

    @override
    def coefficients(self, *, delta: bool) -> Coefficients:
        """Compute the coefficients of all cores; each tensor (E, ...)."""
        found: Coefficients = self._each("coefficients", delta=delta)
        return found

    @override
    def mix(self, z: Tensor, *coefficients: Tensor) -> Tensor:
        """Return K z of each core, for ``z`` (E, N, R)."""
        mixed: Tensor = self._each("mix", z, *coefficients)
        return mixed

    @override
    def beside_weight(self) -> Tensor | None:
        """Return the weights (E, O, I), or None."""
        if type(self._one[0].core).beside_weight is Core.beside_weight:
            return None
        found: Tensor = self._each("beside_weight")
        return found

    @override
    def start(self) -> dict[str, Tensor]:
        if type(self._one[0].core).start is Core.start:
            return {}
        found: dict[str, Tensor] = self._each("start")
        return found

    @override
    def angles(self) -> Tensor | None:
        """Return the angles (E, P), or None."""
        if self._one[0].core.angles() is None:
            return None
        found: Tensor = self._each("angles")
        return found

    @override
    @torch.no_grad()
    def delta_matrix(self) -> Tensor:
        """Return K - diag(S) of each core, (E, R, R)."""
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
    """Makes the methods of a core reachable for ``functional_call``, which only calls ``forward``."""

    def __init__(self, core: Core) -> None:
        super().__init__()
        self.core = core

    def forward(self, method: str, *args: Any, **options: Any) -> Any:
        """Return the result of the core's ``method``."""
        return getattr(self.core, method)(*args, **options)
