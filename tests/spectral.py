# SPDX-License-Identifier: Apache-2.0
"""Small weights, cores and layers for the laws, and what a layer must equal: dense formulas that plain autograd
differentiates.

Shapes: N rows, O out_features, I in_features, R rank.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import strategies as st
from torch import Tensor, nn

from mirrortune.adapters.cores import CORES, Core
from mirrortune.adapters.fingerprint import Fingerprint, try_align
from mirrortune.adapters.inject import SpectralLayer
from mirrortune.adapters.layers import SpectralLinear
from mirrortune.adapters.pairings.rules import PAIRINGS
from mirrortune.adapters.strategies import Strategy
from mirrortune.adapters.svd import Factors, factorize

# Options worth their own run of every law; a core that is not named here runs with its defaults.
_OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "givens": (
        {},
        {"side": "input"},
        {"scale_top_k": "all"},
        {"side": "input", "scale_top_k": 1},
        {"rounds": 3},
        {"side": "input", "rounds": 2, "scale_top_k": 1},
        {"unit": "angle", "scale_top_k": 1},
        {"unit": "weight", "scale_top_k": "all"},
    ),
    "scale": ({}, {"top_k": 1}),
    "svft": ({}, {"pattern": "banded"}, {"pattern": "random", "bands": 1}),
    "psoft": ({}, {"vectors": False}),
    "speclora": ({"top_k": 2, "lora_rank": 2, "lora_alpha": 3.0},),
}
_FOR_EVERY_PAIRING = ({}, {"rounds": 3})  # which pairs there are has no part in sides and scales


def draw_pairs(name: str, rank: int, seed: int, rounds: int = 1) -> Tensor:
    """The pairs of one pairing; one that is made from measured gradients or from a list gets random ones."""
    pairing = PAIRINGS.get(name, "test")
    generator = torch.Generator().manual_seed(seed)
    if rounds == 1 and not {"saliency", "listed"} & inspect.signature(pairing).parameters.keys():
        return pairing(rank, generator)
    noise = torch.randn(rank, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    given = {"rounds": rounds, "saliency": noise - noise.T, "listed": _draw_list(rank, rounds, seed)}
    asked = inspect.signature(pairing).parameters
    return pairing(rank, generator, **{name: value for name, value in given.items() if name in asked})


def _draw_list(rank: int, rounds: int, seed: int) -> list[list[list[int]]]:
    """Some pairs for each round, as a user would list them: in any order, and not of all directions."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(rank, generator=generator)[: rank - rank % 2].reshape(-1, 2) for _ in range(rounds)]
    return [order[: max(1, len(order) - 1)].tolist() for order in orders]


@dataclass(frozen=True, slots=True)
class Variant:
    """One core with its pairing (if it pairs) and options."""

    core: str
    pairing: str | None
    options: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        words = [self.core, self.pairing or "", *(f"{key}={value}" for key, value in self.options)]
        return "-".join(word for word in words if word)

    def build(self, S: Tensor, seed: int | None = None, shape: tuple[int, int] | None = None) -> Core:
        """The core for singular values ``S`` (R,) in their dtype; untrained without a ``seed``.

        ``shape`` (O, I) is of the layer, (R, R) where there is none.
        """
        core_class = CORES.get(self.core, "test")
        runtime: list[Any] = [S]
        if self.pairing is not None:
            runtime.append(draw_pairs(self.pairing, S.shape[0], 7, dict(self.options).get("rounds", 1)))
        if "shape" in inspect.signature(core_class).parameters:
            runtime.append(shape or (S.shape[0], S.shape[0]))
        if "generator" in inspect.signature(core_class).parameters:
            runtime.append(torch.Generator().manual_seed(7))
        core = core_class(*runtime, **dict(self.options))
        return core if seed is None else train_a_little(core, seed)


def variants(core: str) -> list[Variant]:
    """A core's pairings and option sets."""
    pairs = "pairs" in inspect.signature(CORES.get(core, "test")).parameters
    options = _OPTIONS.get(core, ({},))
    if not pairs:
        return [Variant(core, None, tuple(given.items())) for given in options]
    return [
        Variant(core, pairing, tuple(given.items()))
        for pairing in PAIRINGS.names()
        for given in options
        if pairing in ("mirror", "random") or given in _FOR_EVERY_PAIRING
    ]


VARIANTS = [variant for core in CORES.names() for variant in variants(core)]
# Without those that have a branch beside the singular basis (which keeps x, and moves W' without K).
INSIDE = [v for v in VARIANTS if CORES.get(v.core, "test").beside is Core.beside]
# For laws of the layer, to which all pairs are alike: random ones, whose order no wrong index could hit by chance, and
# listed ones, which leave directions alone.
LAYER_VARIANTS = [v for v in VARIANTS if v.pairing in (None, "random") or (v.pairing == "explicit" and not v.options)]


@dataclass(frozen=True, slots=True)
class Problem:
    """A layer's sizes and the seed of its numbers."""

    out_features: int
    in_features: int
    rank: int
    seed: int

    @property
    def is_full(self) -> bool:
        """Whether no direction is left out."""
        return self.rank >= min(self.out_features, self.in_features)

    def weight(self) -> Tensor:
        """Float64 (O, I) with well separated singular values between about 1/4 and 4."""
        generator = torch.Generator().manual_seed(self.seed)
        size = min(self.out_features, self.in_features)
        left, right = (
            torch.linalg.qr(torch.randn(n, size, generator=generator, dtype=torch.float64))[0]
            for n in (self.out_features, self.in_features)
        )
        spectrum = torch.logspace(0.6, -0.6, size, dtype=torch.float64)
        return left @ torch.diag(spectrum) @ right.T

    def rows(self, *leading: int) -> Tensor:
        """Float64 inputs (*leading, I)."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(*leading, self.in_features, generator=generator, dtype=torch.float64)


@st.composite
def problems(draw: st.DrawFn, *, full: bool = False, out: bool = False, largest: int = 12) -> Problem:
    """Shapes from 1 x 1 up in both orientations; rank 1, odd, even or full, and with ``out`` as many as outputs."""
    sizes = st.integers(1, largest)
    out_features, in_features = draw(sizes), draw(sizes)
    limit = min(out_features, in_features)
    ranks = [st.just(limit)]
    if not full:
        ranks.append(st.integers(1, limit))
    if out:
        ranks.append(st.just(out_features))
    return Problem(out_features, in_features, draw(st.one_of(ranks)), draw(st.integers(0, 2**16)))


def tall_problems() -> st.SearchStrategy[Problem]:
    """More outputs than inputs, and as many directions as outputs."""
    sizes = st.tuples(st.integers(1, 9), st.integers(1, 6), st.integers(0, 2**16))
    return sizes.map(lambda s: Problem(s[0] + s[1], s[0], s[0] + s[1], s[2]))


@torch.no_grad()
def train_a_little(core: Core, seed: int) -> Core:
    """Give every parameter of ``core`` random numbers of a size that training could reach (standard deviation 1/2)."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in core.parameters():
        parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return core


def build_layer(
    problem: Problem,
    variant: Variant,
    strategy: Strategy,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int | None = None,
    bias: bool = True,
) -> SpectralLinear:
    """An adapted layer whose base weight and factors are ``problem``'s, rounded to ``dtype``.

    The core is float64 beside a float64 weight and float32 otherwise.
    """
    linear = nn.Linear(problem.in_features, problem.out_features, bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(problem.weight())
        if bias:
            linear.bias.copy_(torch.linspace(-1, 1, problem.out_features))
    factors = factorize(linear.weight, problem.rank)
    core_dtype = torch.promote_types(dtype, torch.float32)
    return SpectralLinear(
        linear, factors, variant.build(factors.S.to(core_dtype), seed, tuple(linear.weight.shape)), strategy
    )


def strategies(problem: Problem) -> list[Strategy]:
    """The strategies that can compute this problem."""
    return ["branch", "factored"] if problem.is_full else ["branch"]


def dense_output(layer: SpectralLinear, x: Tensor) -> Tensor:
    """What ``layer`` must give for ``x`` (..., I), by a dense W' in float64 that plain autograd differentiates.

    K is the core's ``mix`` applied to the identity, so this checks the layer and not the core; cores have laws of their
    own.
    """
    base = layer.base_layer
    weight = base.weight.double() + dense_change(layer)
    return F.linear(x.double(), weight, None if base.bias is None else base.bias.double())


def dense_change(layer: SpectralLayer) -> Tensor:
    """W' - W in float64 by its formula, (O, I), or (E, O, I) of a stack; plain autograd differentiates it."""
    core = layer.core
    S = core.get_buffer("S").double()
    coefficients = [c.double() if c.is_floating_point() else c for c in core.coefficients(delta=False)]
    identity = torch.eye(layer.rank, dtype=torch.float64).expand(*S.shape[:-1], -1, -1)
    K = core.mix(identity, *coefficients).mT
    change = layer.U.double() @ (K - torch.diag_embed(S)) @ layer.Vh.double()
    beside = core.beside_weight()
    return change if beside is None else change + beside.double()


def gradients(output: Tensor, layer: SpectralLinear, x: Tensor) -> dict[str, Tensor]:
    """Gradients of a fixed random functional of ``output`` for x and every number of the core."""
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    trained = {name: p for name, p in layer.core.named_parameters() if p.numel()}
    wanted = {"x": x, **trained}
    found = torch.autograd.grad((output.double() * weights).sum(), list(wanted.values()))
    return {name: g.double() for name, g in zip(wanted, found, strict=True)}


def relative(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||; an absolute norm where ``expected`` is zero."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm()) / (float(expected.norm()) or 1.0)


def align(factors: Factors, stored: Fingerprint, name: str) -> Factors:
    """``factors`` in the basis that ``stored`` describes; VerificationError if they cannot be aligned."""
    aligned, error = try_align(factors, stored, name)
    if error is not None:
        raise error
    return aligned
