# SPDX-License-Identifier: Apache-2.0
"""Laws of every registered core, and of plane rotations against the paper's formula."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mirrortune.adapters.core import CoreStack, plane_strengths
from mirrortune.adapters.cores import Core
from mirrortune.adapters.cores.givens import Givens
from mirrortune.adapters.layers import delta_weight
from mirrortune.adapters.pairings.encoding import split_rounds
from mirrortune.adapters.svd import factorize
from tests.spectral import (
    INSIDE,
    VARIANTS,
    Problem,
    Variant,
    draw_pairs,
    problems,
    relative,
    tall_problems,
    train_a_little,
    variants,
)

ROTATIONS = [v for v in variants("givens") if "scale_top_k" not in dict(v.options)]
SCALED = [v for v in variants("givens") if "scale_top_k" in dict(v.options)]
# A few roundings of float64 in products of at most 12 terms; angles and scales themselves are given exactly.
EXACT = 1e-13
SEEDS = st.integers(0, 2**16)


def spectrum(problem: Problem, dtype: torch.dtype = torch.float64) -> Tensor:
    """The problem's leading singular values."""
    return factorize(problem.weight(), problem.rank).S.to(dtype)


def paper_rotation(core: Core, rank: int) -> Tensor:
    """R by the paper, R_ii = R_jj = cos, R_ij = -sin, R_ji = sin for each pair i < j, 1 elsewhere on the diagonal: one
    plane after the other, whatever the rounds."""
    R = torch.eye(rank, dtype=torch.float64)
    theta = core.get_parameter("theta").detach().double() * core.get_buffer("theta_step").double()
    for angle, (i, j) in zip(theta, core.get_buffer("pairs").tolist(), strict=True):
        plane = torch.eye(rank, dtype=torch.float64)
        plane[i, i] = plane[j, j] = torch.cos(angle)
        plane[i, j], plane[j, i] = -torch.sin(angle), torch.sin(angle)
        R = plane @ R
    return R


def paper_core(core: Core) -> Tensor:
    """K of a Givens core, dense: R on the left of diag(S (1 + lambda)) on the output side, on its right on the input
    side."""
    S = core.get_buffer("S").double()
    scale = core.get_parameter("scale").detach().double() * core.get_buffer("scale_step").double()
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
    top_k, rounds = (dict(variant.options).get(key, default) for key, default in (("scale_top_k", 0), ("rounds", 1)))
    angles = core.get_parameter("theta").numel()
    assert angles == len(core.get_buffer("pairs")) <= rounds * (problem.rank // 2)
    if variant.pairing in ("mirror", "random", "adaptive"):
        assert angles == rounds * (problem.rank // 2)
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
    # In the float32 of the forward pass: sine and cosine are each good to one rounding, in every round.
    K = core.mix(eye, *core.coefficients(delta=False)).detach()
    rounds = dict(variant.options).get("rounds", 1)
    assert float((K.T @ K - eye).abs().max()) <= 4 * rounds * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("variant", ROTATIONS, ids=str)
@given(rank=st.integers(1, 16), seed=SEEDS)
def test_the_opposite_angle_is_the_transposed_rotation(variant: Variant, rank: int, seed: int) -> None:
    S = torch.ones(rank, dtype=torch.float64)
    core = variant.build(S, seed)
    back = Givens(
        S, core.get_buffer("pairs").flip(0), **dict(variant.options)
    )  # several rounds from the last to the first
    with torch.no_grad():
        back.theta.copy_(-core.get_parameter("theta").flip(0))
    assert relative(back.delta_matrix(), core.delta_matrix().T) <= EXACT
    if "rounds" not in dict(variant.options):
        assert torch.equal(back.delta_matrix(), core.delta_matrix().T)


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


OUTPUT = [v for v in ROTATIONS if "side" not in dict(v.options)]


@pytest.mark.parametrize("variant", OUTPUT, ids=str)
@given(problem=tall_problems(), seed=SEEDS)
def test_rotations_of_all_outputs_turn_the_whole_weight(variant: Variant, problem: Problem, seed: int) -> None:
    """W' = (U R U^T) W with a square U, although I directions of it alone belong to W."""
    weight = problem.weight()
    factors = factorize(weight, "out")
    core = variant.build(factors.S, seed)
    turned = weight + delta_weight(factors, core)
    rotation = factors.U @ paper_rotation(core, problem.out_features) @ factors.U.T
    assert relative(turned, rotation @ weight) <= EXACT
    assert relative(turned.T @ turned, weight.T @ weight) <= EXACT
    before, after = torch.linalg.svdvals(weight), torch.linalg.svdvals(turned)
    assert float((after - before).abs().max()) <= EXACT * float(before[0])


@given(problem=tall_problems())
def test_a_pair_of_directions_that_no_input_reaches_is_inert(problem: Problem) -> None:
    S = factorize(problem.weight(), "out").S
    core = Givens(S, draw_pairs("mirror", len(S), 0))
    for index, (strong, _) in enumerate(core.pairs.tolist()):
        with torch.no_grad():
            core.theta.zero_()
            core.theta[index] = 0.5
        assert core.delta_matrix().any() == (strong < problem.in_features)


@pytest.mark.parametrize("variant", SCALED, ids=str)
@given(problem=problems(), seed=SEEDS)
def test_scales_stretch_exactly_the_leading_directions(variant: Variant, problem: Problem, seed: int) -> None:
    S = spectrum(problem)
    core = variant.build(S, seed)
    with torch.no_grad():
        core.get_parameter("theta").zero_()
    scale = core.get_parameter("scale").detach() * core.get_buffer("scale_step")
    expected = torch.cat([S[: len(scale)] * scale, torch.zeros(problem.rank - len(scale))])
    assert relative(core.delta_matrix(), torch.diag(expected)) <= EXACT


@given(problem=problems(), seed=SEEDS, unit=st.sampled_from(["movement", "weight"]))
def test_equal_numbers_move_the_weight_equally(
    problem: Problem, seed: int, unit: Literal["movement", "weight"]
) -> None:
    S = spectrum(problem)
    core = Givens(S, draw_pairs("random", problem.rank, seed), scale_top_k="all", unit=unit)
    average = S.square().mean().sqrt() if unit == "movement" else torch.tensor(1.0)
    for parameter, strengths, moved in (
        (core.theta, plane_strengths(S)[core.pairs[:, 0], core.pairs[:, 1]], 2**0.5),
        (core.scale, S, 1.0),
    ):
        for index, strength in enumerate(strengths):
            with torch.no_grad():
                parameter[index] = 1e-6
                found = core.delta_matrix().norm() / 1e-6
                parameter[index] = 0.0
            # A weak direction is not turned further than ten times as far as an average one.
            expected = moved * torch.minimum(average, 10 * strength)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)


@given(problem=problems(), seed=SEEDS, unit=st.sampled_from(["movement", "weight"]))
def test_all_units_reach_the_same_weights(problem: Problem, seed: int, unit: Literal["movement", "weight"]) -> None:
    S, pairs = spectrum(problem), draw_pairs("mirror", problem.rank, seed)
    moved = train_a_little(Givens(S, pairs, scale_top_k="all", unit=unit), seed)
    turned = Givens(S, pairs, scale_top_k="all", unit="angle")
    with torch.no_grad():
        turned.theta.copy_(moved.theta * moved.theta_step)
        turned.scale.copy_(moved.scale * moved.scale_step)
    assert relative(turned.delta_matrix(), moved.delta_matrix()) <= EXACT
    torch.testing.assert_close(turned.angles(), moved.angles())


def test_a_weight_of_zeros_has_finite_steps() -> None:
    core = Givens(torch.zeros(4), draw_pairs("mirror", 4, 0), scale_top_k="all")
    assert core.theta_step.tolist() == [10.0, 10.0]
    assert core.scale_step.tolist() == [10.0] * 4


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


def turning(pairing: str, rank: int, rounds: int, seed: int | None = None) -> Givens:
    """A core whose K is R; untrained without a ``seed``."""
    core = Givens(torch.ones(rank, dtype=torch.float64), draw_pairs(pairing, rank, 3, rounds), rounds=rounds)
    if seed is not None:
        train_a_little(core, seed)
    return core


def dense(core: Core) -> Tensor:
    """K (R, R), with its graph."""
    eye = torch.eye(len(core.get_buffer("S")), dtype=torch.float64)
    return core.mix(eye, *core.coefficients(delta=False)).T


def derivative(core: Givens) -> tuple[Tensor, Tensor]:
    """The entries of K (R * R,), and their derivatives for every angle (R * R, T)."""
    entries = dense(core).flatten()
    rows = [torch.autograd.grad(entry, core.theta, retain_graph=True)[0] for entry in entries]
    return entries.detach(), torch.stack(rows)


def reached(core: Givens) -> int:
    """In how many dimensions the core's angles, as they are, can move K."""
    return int(torch.linalg.matrix_rank(derivative(core)[1]))


@pytest.mark.parametrize("rank", [2, 3, 4, 5, 6, 7])
def test_a_cycle_of_mirror_rounds_moves_every_way_from_the_start(rank: int) -> None:
    cycle = rank - 1 + rank % 2
    for rounds in range(1, cycle + 1):
        core = turning("mirror", rank, rounds)
        assert reached(core) == core.theta.numel() == rounds * (rank // 2)
    assert reached(core) == rank * (rank - 1) // 2  # dimensions of the rotation group


@pytest.mark.parametrize("rank", [2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize(("pairing", "cycles"), [("mirror", 1), ("neighbor", 1), ("random", 3), ("adaptive", 1)])
def test_enough_rounds_of_any_pairing_move_every_way(pairing: str, cycles: int, rank: int) -> None:
    # At generic angles: rounds of neighbors repeat their planes, which at theta = 0 count once.
    assert reached(turning(pairing, rank, cycles * rank, seed=1)) == rank * (rank - 1) // 2


@pytest.mark.parametrize(
    ("pairing", "rounds", "fits"), [("mirror", 3, True), ("neighbor", 4, True), ("mirror", 2, False)]
)
def test_a_cycle_of_rounds_fits_a_rotation_far_from_the_start(pairing: str, rounds: int, fits: bool) -> None:
    target = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0]
    target[0] *= torch.linalg.det(target)
    assert float((target - torch.eye(4)).norm()) > 1
    core = turning(pairing, 4, rounds, seed=0)
    for _ in range(60):  # Gauss-Newton, in half steps
        entries, rows = derivative(core)
        with torch.no_grad():
            core.theta -= 0.5 * torch.linalg.pinv(rows) @ (entries - target.flatten())
    assert (float((dense(core) - target).detach().norm()) < 1e-9) is fits


@given(rank=st.integers(2, 12), rounds=st.integers(1, 40), seed=SEEDS)
def test_many_rounds_are_differentiated_from_their_input_alone(rank: int, rounds: int, seed: int) -> None:
    """The backward pass turns the last round's input back, round after round, in float32 too."""
    pairs = draw_pairs("random", rank, seed, rounds)
    for dtype, tolerance in ((torch.float64, EXACT), (torch.float32, 1e-6)):
        core = train_a_little(Givens(torch.linspace(3, 1, rank, dtype=dtype), pairs, rounds=rounds), seed)
        coefficients = [c.detach() for c in core.coefficients(delta=True)]
        z, grad = torch.randn(2, 6, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found = core.mix_backward(z.to(dtype), grad.to(dtype), *coefficients)
        exact = Core.mix_backward(core, z, grad, *[c.double() if c.is_floating_point() else c for c in coefficients])
        assert relative(found[0], exact[0]) <= tolerance * rounds
        for own, expected in zip(found[1], exact[1], strict=True):
            assert own is expected is None or relative(own, expected) <= tolerance * rounds


@given(rank=st.integers(2, 12), rounds=st.integers(1, 4), seed=SEEDS)
def test_reversing_in_place_of_gathering_changes_no_bit(rank: int, rounds: int, seed: int) -> None:
    core = train_a_little(
        Givens(torch.linspace(3, 1, rank), draw_pairs("mirror", rank, 0, rounds), rounds=rounds), seed
    )
    coefficients = [c.detach() for c in core.coefficients(delta=False)]
    z, grad = torch.randn(2, 6, rank, generator=torch.Generator().manual_seed(seed))
    reversed_ = [core.mix(z, *coefficients), *flat(core.mix_backward(z, grad, *coefficients))]
    core.forget_own_pairs()
    gathered = [core.mix(z, *coefficients), *flat(core.mix_backward(z, grad, *coefficients))]
    assert len(reversed_) == len(gathered) == 4
    assert all(map(torch.equal, reversed_, gathered))


def flat(found: tuple[Tensor, tuple[Tensor | None, ...]]) -> list[Tensor]:
    """Gradients of ``mix_backward``, one after the other."""
    return [t for t in (found[0], *found[1]) if t is not None]


@pytest.mark.parametrize("mirrored", [0, 1])
def test_a_stack_asks_each_core_for_its_own_pairs(mirrored: int) -> None:
    """What one of them may do because its pairs are mirror pairs, the others may not."""
    all_pairs = [torch.tensor([[0, 1], [2, 3]])] * 2
    all_pairs[mirrored] = torch.tensor([[0, 3], [1, 2]])
    cores = [train_a_little(Givens(torch.linspace(3, 1, 4), pairs), i) for i, pairs in enumerate(all_pairs)]
    stack, z = CoreStack(cores), torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    mixed = stack.mix(z, *stack.coefficients(delta=False))
    for own, core, rows in zip(mixed, cores, z, strict=True):
        assert relative(own, core.mix(rows, *core.coefficients(delta=False))) <= 1e-6


def test_pairs_that_overlap_are_rounds_of_their_own() -> None:
    pairs = torch.tensor([[0, 1], [2, 3], [1, 2], [0, 3], [0, 1]])
    assert [len(own) for own in split_rounds(pairs)] == [2, 2, 1]
    assert [len(own) for own in split_rounds(pairs[:0])] == [0]
