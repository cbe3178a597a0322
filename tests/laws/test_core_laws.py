# SPDX-License-Identifier: Apache-2.0
"""Laws of every registered core, and of plane rotations against the paper's formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mirrortune.adapters.cores import Core
from mirrortune.adapters.factorize import factorize
from mirrortune.adapters.spectral_linear import delta_weight
from tests.spectral import INSIDE, VARIANTS, Problem, Variant, problems, relative, variants

ROTATIONS = [v for v in variants("givens") if "scale_top_k" not in dict(v.options)]
SCALED = [v for v in variants("givens") if "scale_top_k" in dict(v.options)]
# A few roundings of float64 in products of at most 12 terms; angles and scales themselves are given exactly.
EXACT = 1e-13
SEEDS = st.integers(0, 2**16)


def spectrum(problem: Problem, dtype: torch.dtype = torch.float64) -> Tensor:
    """The problem's leading singular values."""
    return factorize(problem.weight(), problem.rank).S.to(dtype)


def paper_rotation(core: Core, rank: int) -> Tensor:
    """R by the paper: R_ii = R_jj = cos, R_ij = -sin, R_ji = sin for each pair i < j, 1 elsewhere on the diagonal."""
    R = torch.eye(rank, dtype=torch.float64)
    theta = core.get_parameter("theta").detach().double()
    for angle, (i, j) in zip(theta, core.get_buffer("pairs").tolist(), strict=True):
        R[i, i] = R[j, j] = torch.cos(angle)
        R[i, j], R[j, i] = -torch.sin(angle), torch.sin(angle)
    return R


def paper_core(core: Core) -> Tensor:
    """K of a Givens core, dense: R on the left of diag(S (1 + lambda)) on the output side, on its right on the input
    side."""
    S = core.get_buffer("S").double()
    scale = core.get_parameter("scale").detach().double()
    scaled = torch.diag(torch.cat([S[: len(scale)] * (1 + scale), S[len(scale) :]]))
    R = paper_rotation(core, len(S))
    return R @ scaled if core.side == "output" else scaled @ R


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@given(dtype=st.sampled_from([torch.float32, torch.float64]), problem=problems(), seed=SEEDS)
def test_an_untrained_core_is_exactly_the_identity(
    variant: Variant, dtype: torch.dtype, problem: Problem, seed: int
) -> None:
    S = spectrum(problem, dtype)
    core = variant.build(S)
    z = torch.randn(5, problem.rank, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    assert torch.equal(core.mix(z, *core.coefficients(delta=True)), torch.zeros_like(z))
    assert torch.equal(core.mix(z, *core.coefficients(delta=False)), S * z)
    assert not core.delta_matrix().any()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@given(problem=problems(), seed=SEEDS)
def test_the_delta_is_k_less_the_singular_values(variant: Variant, problem: Problem, seed: int) -> None:
    S = spectrum(problem)
    core = variant.build(S, seed)
    eye = torch.eye(problem.rank, dtype=torch.float64)
    K = core.mix(eye, *core.coefficients(delta=False)).T
    assert core.delta_matrix().shape == (problem.rank, problem.rank)
    assert relative(core.delta_matrix() + torch.diag(S), K) <= EXACT
    assert relative(core.mix(eye, *core.coefficients(delta=True)).T, core.delta_matrix()) <= EXACT


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@given(problem=problems(), seed=SEEDS)
def test_mix_is_linear_and_treats_rows_alone(variant: Variant, problem: Problem, seed: int) -> None:
    core = variant.build(spectrum(problem), seed)
    coefficients = core.coefficients(delta=False)
    a, b = torch.randn(2, 4, problem.rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    whole = core.mix(a, *coefficients)
    assert relative(core.mix(2 * a - 3 * b, *coefficients), 2 * whole - 3 * core.mix(b, *coefficients)) <= EXACT
    assert relative(core.mix(a[2:3], *coefficients), whole[2:3]) <= EXACT


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@given(delta=st.booleans(), problem=problems(), seed=SEEDS)
def test_the_written_backward_is_the_derived_one(variant: Variant, delta: bool, problem: Problem, seed: int) -> None:
    core = variant.build(spectrum(problem), seed)
    coefficients = [c.detach() for c in core.coefficients(delta=delta)]
    z, grad = torch.randn(2, 6, problem.rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    written_z, written = core.mix_backward(z, grad, *coefficients)
    derived_z, derived = Core.mix_backward(core, z, grad, *coefficients)
    assert relative(written_z, derived_z) <= EXACT
    assert (
        [g is None for g in written]
        == [g is None for g in derived]
        == [not c.is_floating_point() for c in coefficients]
    )
    for own, expected in zip(written, derived, strict=True):
        assert own is expected is None or relative(own, expected) <= EXACT


@pytest.mark.parametrize("variant", INSIDE, ids=str)
@given(problem=problems(), seed=SEEDS)
def test_every_trained_number_moves_k(variant: Variant, problem: Problem, seed: int) -> None:
    core = variant.build(spectrum(problem))
    before = core.delta_matrix()
    for parameter in core.parameters():
        for index in range(parameter.numel()):
            with torch.no_grad():
                parameter.view(-1)[index] += 0.1
            assert relative(core.delta_matrix(), before) > 1e-3
            with torch.no_grad():
                parameter.zero_()


@pytest.mark.parametrize("variant", variants("givens"), ids=str)
@given(problem=problems(), seed=SEEDS)
def test_givens_is_the_papers_formula(variant: Variant, problem: Problem, seed: int) -> None:
    core = variant.build(spectrum(problem), seed)
    expected = paper_core(core)
    assert relative(core.delta_matrix() + torch.diag(core.get_buffer("S")), expected) <= EXACT


@pytest.mark.parametrize("variant", variants("givens"), ids=str)
@given(problem=problems(), seed=SEEDS)
def test_givens_trains_one_angle_a_pair_and_its_scales(variant: Variant, problem: Problem, seed: int) -> None:
    core = variant.build(spectrum(problem), seed)
    top_k = dict(variant.options).get("scale_top_k", 0)
    assert core.get_parameter("theta").numel() == problem.rank // 2
    assert core.get_parameter("scale").numel() == (problem.rank if top_k == "all" else top_k)


@pytest.mark.parametrize("variant", ROTATIONS, ids=str)
@given(rank=st.integers(1, 16), seed=SEEDS, size=st.sampled_from([1e-4, 1.0, 100.0]))
def test_rotations_are_orthogonal_for_any_angle(variant: Variant, rank: int, seed: int, size: float) -> None:
    core = variant.build(torch.ones(rank), seed)  # with S = 1, K is R
    with torch.no_grad():
        core.get_parameter("theta").mul_(size)
    eye = torch.eye(rank)
    R = core.delta_matrix() + eye.double()
    assert float((R.T @ R - eye.double()).abs().max()) <= EXACT
    # In the float32 of the forward pass: sine and cosine are each good to one rounding.
    K = core.mix(eye, *core.coefficients(delta=False)).detach()
    assert float((K.T @ K - eye).abs().max()) <= 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("variant", ROTATIONS, ids=str)
@given(rank=st.integers(1, 16), seed=SEEDS)
def test_the_opposite_angle_is_the_transposed_rotation(variant: Variant, rank: int, seed: int) -> None:
    core = variant.build(torch.ones(rank, dtype=torch.float64), seed)
    forth = core.delta_matrix()
    with torch.no_grad():
        core.get_parameter("theta").neg_()
    assert torch.equal(core.delta_matrix(), forth.T)


@pytest.mark.parametrize("variant", ROTATIONS, ids=str)
@given(problem=problems(), seed=SEEDS)
def test_rotations_keep_singular_values_and_the_other_side(variant: Variant, problem: Problem, seed: int) -> None:
    weight = problem.weight()
    factors = factorize(weight, problem.rank)
    core = variant.build(factors.S, seed)
    turned = weight + delta_weight(factors, core)
    before, after = torch.linalg.svdvals(weight), torch.linalg.svdvals(turned)
    assert float((after - before).abs().max()) <= EXACT * float(before[0])
    R = paper_rotation(core, problem.rank)
    if core.side == "output":
        # W' = (I + U (R - I) U^T) W, which is (U R U^T) W at full rank with O <= I.
        assert relative(turned.T @ turned, weight.T @ weight) <= EXACT
        rotation = factors.U @ R @ factors.U.T
        rest = weight - factors.U @ (factors.U.T @ weight)
        assert relative(turned, rotation @ weight + rest) <= EXACT
        if problem.is_full:
            assert relative(turned, rotation @ weight) <= EXACT
    else:
        assert relative(turned @ turned.T, weight @ weight.T) <= EXACT
        if problem.is_full:
            assert relative(turned, weight @ (factors.Vh.T @ R @ factors.Vh)) <= EXACT


@pytest.mark.parametrize("variant", SCALED, ids=str)
@given(problem=problems(), seed=SEEDS)
def test_scales_stretch_exactly_the_leading_directions(variant: Variant, problem: Problem, seed: int) -> None:
    S = spectrum(problem)
    core = variant.build(S, seed)
    with torch.no_grad():
        core.get_parameter("theta").zero_()
    scale = core.get_parameter("scale").detach()
    expected = torch.cat([S[: len(scale)] * scale, torch.zeros(problem.rank - len(scale))])
    assert relative(core.delta_matrix(), torch.diag(expected)) <= EXACT


@given(exponent=st.integers(1, 12))
def test_small_angles_keep_their_digits(exponent: int) -> None:
    angle = 10.0**-exponent
    core = variants("givens")[0].build(torch.ones(2))
    with torch.no_grad():
        core.get_parameter("theta").fill_(angle)
    own = core.coefficients(delta=True)[0]
    exact = -2 * torch.sin(core.get_parameter("theta").double() / 2).square()
    # cos - 1 in float32 would be 0 from an angle of 2e-4 down.
    assert relative(own, exact.expand(2)) <= 4 * torch.finfo(torch.float32).eps
