# SPDX-License-Identifier: Apache-2.0
"""SpectralLinear as a module: strategies, state, devices and casts; its mathematics is in tests/laws."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mirrortune.adapters.layers import SpectralLinear
from mirrortune.adapters.strategies import cheapest_strategy
from mirrortune.adapters.svd import Factors, factorize
from mirrortune.errors import ConfigError
from tests.spectral import VARIANTS, Problem, Variant, build_layer, dense_output, gradients

FULL, PART = Problem(6, 4, 4, seed=1), Problem(6, 4, 2, seed=1)
GIVENS = VARIANTS[0]
SCALED = next(v for v in VARIANTS if dict(v.options) == {"scale_top_k": "all"})


@pytest.mark.parametrize(
    ("rank", "dtype", "expected"),
    [
        (4, torch.float32, "factored"),
        (4, torch.float64, "factored"),
        (4, torch.bfloat16, "branch"),
        (4, torch.float16, "branch"),
        (3, torch.float32, "branch"),
    ],
)
def test_the_cheapest_strategy(rank: int, dtype: torch.dtype, expected: str) -> None:
    assert cheapest_strategy(6, 4, rank, dtype) == expected
    problem = Problem(6, 4, rank, seed=1)
    linear = nn.Linear(4, 6, dtype=dtype)
    factors = factorize(linear.weight, rank)
    assert SpectralLinear(linear, factors, GIVENS.build(factors.S.float())).strategy == expected
    assert problem.is_full == (rank == 4)


def test_factored_needs_every_direction() -> None:
    with pytest.raises(
        ConfigError, match=r"^adapter\.strategy: factored needs every singular direction, got rank 2 of 4"
    ):
        build_layer(PART, GIVENS, "factored")


def test_a_layer_looks_like_the_linear_layer_it_replaces() -> None:
    for strategy in ("branch", "factored"):
        layer = build_layer(FULL, GIVENS, strategy, dtype=torch.float32)
        assert (layer.in_features, layer.out_features) == (4, 6)
        assert layer.weight.shape == (6, 4)
        assert layer.weight.dtype == torch.float32
        assert layer.bias is layer.base_layer.bias
        assert repr(layer).startswith(f"SpectralLinear(\n  rank=4, strategy={strategy}")
    assert build_layer(FULL, GIVENS, "branch", bias=False).bias is None


def test_the_base_weight_is_never_changed() -> None:
    for strategy in ("branch", "factored"):
        layer = build_layer(FULL, GIVENS, strategy, dtype=torch.float32, seed=1)
        before = layer.base_layer.weight.detach().clone()
        optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
        layer(FULL.rows(5).float()).square().sum().backward()
        optimizer.step()
        assert torch.equal(layer.base_layer.weight, before)
        assert layer.base_layer.bias.grad is None
        assert layer.U.grad is layer.Vh.grad is None


def test_factored_keeps_no_weight_on_the_device() -> None:
    """Its product of factors stands for the weight: the weight neither moves with the model nor is saved with it."""
    branch, factored = (build_layer(FULL, GIVENS, s, dtype=torch.float32) for s in ("branch", "factored"))
    assert "base_layer.weight" in branch.state_dict()
    assert "base_layer.weight" not in factored.state_dict()
    assert [n for n, _ in factored.named_parameters() if n.endswith("weight")] == []
    assert factored.to(torch.bfloat16).base_layer.weight.dtype == torch.float32
    assert factored.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("strategy", ["branch", "factored"])
def test_a_copy_computes_the_same_and_shares_nothing_trained(strategy: str) -> None:
    layer = build_layer(FULL, GIVENS, strategy, seed=2)
    twin = copy.deepcopy(layer)
    x = FULL.rows(3)
    assert torch.equal(twin(x), layer(x))
    with torch.no_grad():
        twin.core.get_parameter("theta").add_(1)
    assert not torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("strategy", ["branch", "factored"])
def test_backward_gives_the_same_gradients_inside_and_outside_autocast(strategy: str) -> None:
    found = []
    for inside in (False, True):
        layer = build_layer(FULL, SCALED, strategy, dtype=torch.float32, seed=3)
        x = FULL.rows(7).float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = layer(x).float().square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found.append([x.grad, *(p.grad for p in layer.core.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("strategy", ["branch", "factored"])
def test_coefficients_are_computed_in_float32_under_autocast(strategy: str) -> None:
    series = Variant("psoft", None, (("neumann_terms", 5),))
    layer = build_layer(FULL, series, strategy, dtype=torch.float32, seed=3)
    found = []
    compute = layer.core.coefficients
    layer.core.coefficients = lambda **how: (found.append(compute(**how)), found[-1])[1]  # type: ignore[method-assign]
    x = FULL.rows(3).float()
    layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    assert torch.equal(found[0][0], found[1][0])


def test_no_gradient_is_asked_for_frozen_inputs() -> None:
    layer = build_layer(FULL, GIVENS, "factored", seed=1)
    layer(FULL.rows(3)).sum().backward()
    assert layer.core.get_parameter("theta").grad is not None
    with torch.no_grad():
        assert not layer(FULL.rows(3)).requires_grad


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    layer = build_layer(FULL, GIVENS, "branch", seed=1)
    x = FULL.rows(3).requires_grad_()
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


@pytest.mark.parametrize("strategy", ["branch", "factored"])
def test_a_bias_that_somebody_trains_learns(strategy: str) -> None:
    found = []
    for is_plain in (True, False):
        layer = build_layer(FULL, GIVENS, strategy, seed=1)
        layer.base_layer.bias.requires_grad_()
        x = FULL.rows(5).double()
        made = layer(x) if is_plain else nn.functional.linear(x, layer.adapted_weight(), layer.base_layer.bias)
        made.square().sum().backward()
        found.append(layer.base_layer.bias.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)


def test_hooks_on_a_frozen_layer_still_run() -> None:
    """Its product and ours are one where nobody listens in between, which changes no digit that counts."""
    layer, seen = build_layer(PART, GIVENS, "branch", seed=1), []
    x = PART.rows(5).double().requires_grad_()
    fused = layer(x)
    (fused_grad,) = torch.autograd.grad(fused.square().sum(), x)
    layer.base_layer.register_forward_hook(lambda *_: seen.append(1))
    apart = layer(x)
    (grad,) = torch.autograd.grad(apart.square().sum(), x)
    assert seen == [1]
    torch.testing.assert_close(fused, apart, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fused_grad, grad, rtol=1e-12, atol=1e-12)


WIDE, TALL = Problem(4, 9, 3, seed=1), Problem(9, 4, 3, seed=1)
INPUT = next(v for v in VARIANTS if dict(v.options) == {"side": "input"})


@pytest.mark.parametrize("variant", [GIVENS, INPUT, SCALED], ids=str)
@pytest.mark.parametrize(("problem", "side"), [(WIDE, "output"), (TALL, "input"), (Problem(6, 6, 3, seed=1), None)])
def test_a_branch_acts_on_the_smaller_side(problem: Problem, side: str | None, variant: Variant) -> None:
    layer = build_layer(problem, variant, "branch", seed=2)
    x = problem.rows(2, 3).requires_grad_()
    assert layer.cheaper_side == side
    output = layer(x)
    found = {"y": output, **gradients(output, layer, x)}
    expected = dense_output(layer, x)
    for name, value in {"y": expected, **gradients(expected, layer, x)}.items():
        torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-11)


def test_a_branch_takes_both_factors_where_one_would_not_do() -> None:
    approximate = build_layer(TALL, GIVENS, "branch", dtype=torch.float32)
    factors = approximate.factors
    noisy = Factors(U=factors.U + 1e-4 * torch.randn_like(factors.U), S=factors.S, Vh=factors.Vh)
    assert SpectralLinear(approximate.base_layer, factors, approximate.core).cheaper_side == "input"
    assert SpectralLinear(approximate.base_layer, noisy, approximate.core).cheaper_side is None
    assert build_layer(TALL, GIVENS, "branch", dtype=torch.bfloat16).cheaper_side is None
    weak = nn.Linear(4, 9)
    with torch.no_grad():
        weak.weight.mul_(torch.tensor([1.0, 1e-3, 1.0, 1.0]))
    factors = factorize(weak.weight, 4)
    assert SpectralLinear(weak, factors, GIVENS.build(factors.S.float()), "branch").cheaper_side is None


def test_an_input_without_a_gradient_needs_no_product_with_the_weight() -> None:
    layer = build_layer(TALL, GIVENS, "branch", seed=2)
    with torch.no_grad():
        silent = layer(TALL.rows(3))
    learning = layer(TALL.rows(3))
    assert type(learning.grad_fn).__name__ == "_AddedProductBackward"
    assert type(layer(TALL.rows(3).requires_grad_()).grad_fn).__name__ == "_OneSidedProductBackward"
    torch.testing.assert_close(silent, learning.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(("problem", "strategy"), [(FULL, "factored"), (FULL, "branch"), (PART, "branch")], ids=str)
def test_model_code_may_change_the_output_in_place(problem: Problem, strategy: str, variant: Variant) -> None:
    layer = build_layer(problem, variant, strategy, dtype=torch.float32)
    x = torch.ones(2, 3, problem.in_features)
    y = layer(x)
    y[:, 1] = 0  # as SpecAugment does
    y.sum().backward()
    changed = {name: p.grad for name, p in layer.core.named_parameters() if p.requires_grad}
    layer.zero_grad()
    layer(x)[:, ::2].sum().backward()
    for name, p in layer.core.named_parameters():
        torch.testing.assert_close(changed.get(name), p.grad)
