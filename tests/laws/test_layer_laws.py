# SPDX-License-Identifier: Apache-2.0
"""Laws of the adapted layer, for every core and both strategies: what it computes, differentiates, keeps and merges."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mirrortune.adapters.layers import SpectralLinear
from mirrortune.adapters.strategies import Strategy
from tests.spectral import (
    INSIDE,
    LAYER_VARIANTS,
    Problem,
    Variant,
    build_layer,
    dense_output,
    gradients,
    problems,
    strategies,
)

SEEDS = st.integers(0, 2**16)
# Relative to the norm of the output. float64: a few roundings in sums of at most 12 terms. float32: the same, and the
# factors' own rounding. bfloat16 keeps 8 bits (2^-8 = 3.9e-3): x, W, U, Vh are given in it, z, the branch, the base
# output and their sum are each rounded once, and factored replaces W by U S Vh with both factors rounded.
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
OUTPUT_TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4e-2, torch.float16: 5e-3}
# z is rounded before the core's gradient is summed over rows, so gradients carry the same roundings once more.
GRADIENT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-2}


def scale_of(layer: SpectralLinear, x: Tensor) -> float:
    """Size of the terms whose sum the output is: roundings are relative to this, and the sum itself may cancel."""
    terms = [
        x.double().norm() * layer.base_layer.weight.double().norm(),
        x.double().norm() * layer.delta_weight().norm(),
    ]
    return float(sum(terms)) + 1.0


def check_identity(layer: SpectralLinear, x: Tensor) -> None:
    """The law of an untrained branch: the base layer, bit for bit."""
    assert torch.equal(layer(x), layer.base_layer(x))
    assert not layer.delta_weight().any()


def check_output(layer: SpectralLinear, x: Tensor, dtype: torch.dtype) -> None:
    """The law of the forward pass, for a layer and inputs of ``dtype``."""
    found = layer(x)
    expected = dense_output(layer, x)
    assert found.shape == expected.shape == (*x.shape[:-1], layer.out_features)
    assert found.dtype == dtype
    error = float((found.detach().double() - expected.detach()).norm())
    assert error <= OUTPUT_TOLERANCE[dtype] * scale_of(layer, x)


def check_gradients(layer: SpectralLinear, x: Tensor, dtype: torch.dtype) -> None:
    """The law of the backward pass: what plain autograd finds for the dense float64 formula."""
    x = x.detach().requires_grad_()
    expected = gradients(dense_output(layer, x), layer, x)
    found = gradients(layer(x), layer, x)
    assert found.keys() == expected.keys()
    size = 1.0 + max(float(g.norm()) for g in expected.values())
    for name, gradient in found.items():
        assert gradient.shape == expected[name].shape
        assert float((gradient - expected[name]).norm()) <= GRADIENT_TOLERANCE[dtype] * size, name


@contextmanager
def saved_tensors() -> Iterator[list[Tensor]]:
    """Every tensor that autograd keeps for a backward pass while the context lasts."""
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


@pytest.mark.parametrize("variant", LAYER_VARIANTS, ids=str)
@given(dtype=st.sampled_from(DTYPES), problem=problems(out=True))
def test_an_untrained_branch_is_exactly_the_base_layer(dtype: torch.dtype, variant: Variant, problem: Problem) -> None:
    check_identity(build_layer(problem, variant, "branch", dtype=dtype), problem.rows(3, 2).to(dtype))


@pytest.mark.parametrize("variant", LAYER_VARIANTS, ids=str)
@given(dtype=st.sampled_from([torch.float32, torch.float64]), problem=problems(full=True, out=True))
def test_an_untrained_factored_layer_is_the_base_layer_to_rounding(
    dtype: torch.dtype, variant: Variant, problem: Problem
) -> None:
    layer = build_layer(problem, variant, "factored", dtype=dtype)
    x = problem.rows(3, 2).to(dtype)
    error = float((layer(x) - layer.base_layer(x)).detach().norm())
    assert error <= OUTPUT_TOLERANCE[dtype] * scale_of(layer, x)
    assert not layer.delta_weight().any()


@pytest.mark.parametrize("variant", LAYER_VARIANTS, ids=str)
@given(
    dtype=st.sampled_from(DTYPES),
    problem=problems(out=True),
    seed=SEEDS,
    leading=st.sampled_from([(5,), (2, 3), (2, 1, 4), (), (0,)]),
    bias=st.booleans(),
)
def test_the_output_is_the_dense_one(
    dtype: torch.dtype, variant: Variant, problem: Problem, seed: int, leading: tuple[int, ...], bias: bool
) -> None:
    for strategy in strategies(problem):
        layer = build_layer(problem, variant, strategy, dtype=dtype, seed=seed, bias=bias)
        check_output(layer, problem.rows(*leading).to(dtype), dtype)


@pytest.mark.parametrize("variant", LAYER_VARIANTS, ids=str)
@given(
    dtype=st.sampled_from(DTYPES),
    problem=problems(out=True),
    seed=SEEDS,
    leading=st.sampled_from([(5,), (2, 3)]),
    bias=st.booleans(),
)
def test_the_gradients_are_those_of_the_dense_formula(
    dtype: torch.dtype, variant: Variant, problem: Problem, seed: int, leading: tuple[int, ...], bias: bool
) -> None:
    for strategy in strategies(problem):
        layer = build_layer(problem, variant, strategy, dtype=dtype, seed=seed, bias=bias)
        check_gradients(layer, problem.rows(*leading).to(dtype), dtype)


@pytest.mark.parametrize("variant", LAYER_VARIANTS, ids=str)
@pytest.mark.parametrize("strategy", ["branch", "factored"])
def test_gradcheck(strategy: Strategy, variant: Variant) -> None:
    problem = Problem(4, 5, 4, seed=1)
    layer = build_layer(problem, variant, strategy, seed=2)
    numbers = {f"core.{name}": p for name, p in layer.core.named_parameters() if p.numel()}

    def output(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(numbers, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, (problem.rows(2, 3).requires_grad_(), *numbers.values()))


@pytest.mark.parametrize("variant", LAYER_VARIANTS, ids=str)
@pytest.mark.parametrize("strategy", ["branch", "factored"])
@given(problem=problems(full=True, out=True), seed=SEEDS)
def test_autocast_is_the_dense_formula_to_bfloat16(
    strategy: Strategy, variant: Variant, problem: Problem, seed: int
) -> None:
    layer = build_layer(problem, variant, strategy, dtype=torch.float32, seed=seed)
    x = problem.rows(2, 3).float()
    with torch.autocast("cpu", torch.bfloat16):
        check_output(layer, x, torch.bfloat16)
        check_gradients(layer, x, torch.bfloat16)


@pytest.mark.parametrize("variant", LAYER_VARIANTS, ids=str)
@given(dtype=st.sampled_from(DTYPES), problem=problems(out=True), seed=SEEDS)
def test_the_merged_weight_gives_the_same_output(
    dtype: torch.dtype, variant: Variant, problem: Problem, seed: int
) -> None:
    x = problem.rows(4).to(dtype)
    for strategy in strategies(problem):
        layer = build_layer(problem, variant, strategy, dtype=dtype, seed=seed)
        delta = layer.delta_weight()
        assert delta.dtype == torch.float64
        merged = (layer.base_layer.weight.double() + delta).to(dtype)
        error = float((layer(x) - nn.functional.linear(x, merged, layer.bias)).detach().double().norm())
        assert error <= OUTPUT_TOLERANCE[dtype] * scale_of(layer, x)


@pytest.mark.parametrize("variant", INSIDE, ids=str)
@pytest.mark.parametrize("autocast", [False, True])
@given(problem=problems(out=True, largest=10), seed=SEEDS)
def test_no_input_is_kept_for_the_backward_pass(autocast: bool, variant: Variant, problem: Problem, seed: int) -> None:
    rows = 17  # no side of a weight here and no core's count of numbers, so that a kept row of x shows by its shape
    x = problem.rows(rows).float().requires_grad_()
    for strategy in strategies(problem):
        layer = build_layer(problem, variant, strategy, dtype=torch.float32, seed=seed)
        with saved_tensors() as kept, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = layer(x)
        # z (rows, R), and nothing else with a row for every row of x, whatever its shape
        assert [t.shape for t in kept if t.numel() >= rows and t.shape[0] == rows] == [(rows, problem.rank)]
        addresses = {t.untyped_storage().data_ptr() for t in kept if t.numel()}
        assert x.untyped_storage().data_ptr() not in addresses
        assert output.untyped_storage().data_ptr() not in addresses


@pytest.mark.parametrize("variant", LAYER_VARIANTS, ids=str)
@pytest.mark.parametrize("strategy", ["branch", "factored"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_trained_numbers_stay_float32_in_a_16_bit_model(
    half: torch.dtype, strategy: Strategy, variant: Variant
) -> None:
    problem = Problem(6, 4, 4, seed=5)
    layer = build_layer(problem, variant, strategy, dtype=torch.float32, seed=3)
    before = copy.deepcopy(layer.core.state_dict()), layer.core.get_buffer("S").clone()
    model = nn.Sequential(layer).to(half)
    assert layer.U.dtype == layer.Vh.dtype == half
    assert {p.dtype for p in layer.core.parameters()} == {torch.float32}
    assert all(torch.equal(value, before[0][name]) for name, value in layer.core.state_dict().items())
    assert torch.equal(layer.core.get_buffer("S"), before[1])
    check_output(layer, problem.rows(5).to(half), half)
    assert {p.dtype for p in model.double()[0].core.parameters()} == {torch.float64}


@pytest.mark.parametrize("strategy", ["branch", "factored"])
def test_only_the_core_asks_for_gradients(strategy: Strategy) -> None:
    layer = build_layer(Problem(4, 6, 4, seed=0), LAYER_VARIANTS[0], strategy, seed=1)
    asking = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert asking == {f"core.{name}" for name, p in layer.core.named_parameters() if p.numel()}
