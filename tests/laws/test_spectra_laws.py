# SPDX-License-Identifier: Apache-2.0
"""Laws of comparing a weight before and after: what was done to it is found again, whatever the signs and the order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mirrortune.adapters.pairings.rules import mirror
from mirrortune.adapters.svd import Factors
from mirrortune.analyze.spectra import spectra
from mirrortune.analyze.spectra.overlaps import (
    delta_energies,
    delta_ranks,
    full_factors,
    match_directions,
    overlaps,
    principal_angles,
)
from mirrortune.analyze.spectra.spectra import MatrixComparison, compare_matrices, curve_positions
from mirrortune.errors import DataError


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight U diag(S) V^T with a spectrum of our choice; all float64."""

    U: Tensor
    S: Tensor
    V: Tensor

    @property
    def matrix(self) -> Tensor:
        return self.U * self.S @ self.V.T

    @property
    def rank(self) -> int:
        return len(self.S)

    def with_values(self, S: Tensor) -> Tensor:
        return self.U * S @ self.V.T


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


def make_weight(out_features: int, in_features: int, seed: int, rank: int | None = None) -> Weight:
    """Well separated singular values from 4 down to 1/4; a rank below min(O, I) leaves a null space."""
    generator = torch.Generator().manual_seed(seed)
    size = rank or min(out_features, in_features)
    spectrum = torch.logspace(0.6, -0.6, size, dtype=torch.float64)
    return Weight(orthonormal(out_features, size, generator), spectrum, orthonormal(in_features, size, generator))


@st.composite
def weights(draw: st.DrawFn) -> Weight:
    """Wide, tall and square ones of 4 to 24 directions."""
    sizes = st.integers(4, 24)
    return make_weight(draw(sizes), draw(sizes), draw(st.integers(0, 2**16)))


def plane_rotation(rank: int, angles: Tensor) -> Tensor:
    """The mirror-paired rotation by one angle a pair."""
    R = torch.eye(rank, dtype=torch.float64)
    for (i, j), angle in zip(mirror(rank, torch.Generator()).tolist(), angles, strict=True):
        R[i, i] = R[j, j] = torch.cos(angle)
        R[i, j], R[j, i] = -torch.sin(angle), torch.sin(angle)
    return R


def must_compare(before: Tensor, after: Tensor, **settings: int) -> MatrixComparison:
    found = compare_matrices(before, after, **settings)
    assert found is not None
    return found


@given(weights(), st.floats(1.05, 6), st.integers(1, 6))
def test_scaling_of_the_top_is_amplification_and_nothing_else(weight: Weight, factor: float, k: int) -> None:
    k = min(k, weight.rank // 4) or 1
    S = weight.S.clone()
    S[:k] *= factor
    found = must_compare(weight.matrix, weight.with_values(S), top_k=k)

    assert found.shares["amplification"] == pytest.approx(1, abs=1e-9)
    assert found.shares["new"] == pytest.approx(0, abs=1e-9)
    assert found.value_change["top"] == pytest.approx(factor - 1, rel=1e-9)
    assert found.top_change == pytest.approx([factor - 1] * k, rel=1e-9)
    assert found.value_change["tail"] == pytest.approx(0, abs=1e-9)
    assert found.amplification_by_rank["top"] == pytest.approx(1, abs=1e-9)
    assert found.turned["output"] == pytest.approx([0] * k, abs=1e-4)
    assert found.num_new == 0
    assert found.delta["rank_90"] <= k


@given(weights(), st.integers(0, 2**16))
def test_values_that_change_places_are_followed(weight: Weight, seed: int) -> None:
    order = torch.randperm(weight.rank, generator=torch.Generator().manual_seed(seed))
    after = weight.with_values(weight.S[order])
    found = compare_matrices(weight.matrix, after)
    if found is None or float((weight.S[order] - weight.S).abs().max()) == 0:
        return

    # The direction that had position i now has the value of position order[i], and stands there.
    assert found.counterparts == [int(order[i]) + 1 for i in range(found.top_k)]
    assert found.overlaps == pytest.approx([1] * found.top_k, abs=1e-9)
    assert found.shares["amplification"] == pytest.approx(1, abs=1e-9)
    assert found.value_change["tail"] == pytest.approx(0, abs=1e-9), "by rank nothing has changed"
    top = order[: found.top_k]
    assert found.crossings == sum(int(top[i] > top[j]) for i in range(len(top)) for j in range(i + 1, len(top)))


@given(weights(), st.floats(0.01, 1.0), st.booleans(), st.integers(0, 2**16))
def test_rotation_is_reorientation_by_its_angles(weight: Weight, largest: float, on_input: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    angles = (0.2 + 0.8 * torch.rand(weight.rank // 2, generator=generator, dtype=torch.float64)) * largest
    R = plane_rotation(weight.rank, angles)
    after = weight.with_values(weight.S)
    after = (weight.U * weight.S) @ R @ weight.V.T if on_input else (weight.U @ R) * weight.S @ weight.V.T
    found = must_compare(weight.matrix, after)
    turned, stayed = ("input", "output") if on_input else ("output", "input")

    assert found.shares["reorientation"] == pytest.approx(1, abs=1e-8)
    assert found.value_change_size["top"] == pytest.approx(0, abs=1e-9)
    expected = angles[: found.top_k].rad2deg()
    assert found.turned[turned] == pytest.approx(expected.tolist(), abs=1e-4)
    assert found.turned[stayed] == pytest.approx([0] * found.top_k, abs=1e-4)
    # A leading subspace and the weak directions that it is paired with share no axis: its angles are the planes' own.
    for size, sides in found.principal_angles.items():
        assert sides[f"{turned}_mean"] == pytest.approx(float(angles[:size].mean().rad2deg()), abs=1e-6)
        assert sides[f"{stayed}_largest"] == pytest.approx(0, abs=1e-6)


@given(st.integers(6, 20), st.integers(6, 20), st.floats(0.3, 20), st.integers(0, 2**16))
def test_what_acts_where_nothing_was_is_new(out_features: int, in_features: int, strength: float, seed: int) -> None:
    rank = min(out_features, in_features) // 2
    weight = make_weight(out_features, in_features, seed, rank)
    generator = torch.Generator().manual_seed(seed + 1)
    u, v = (torch.randn(n, 1, generator=generator, dtype=torch.float64) for n in (out_features, in_features))
    u, v = u - weight.U @ (weight.U.T @ u), v - weight.V @ (weight.V.T @ v)
    found = must_compare(weight.matrix, weight.matrix + strength * (u / u.norm()) @ (v / v.norm()).T)

    assert found.shares["new"] == pytest.approx(1, abs=1e-9)
    assert found.num_new == 1
    assert found.new_directions[0]["position"] == int((strength < weight.S).sum()) + 1
    assert found.new_directions[0]["value"] == pytest.approx(strength)
    assert found.new_directions[0]["familiarity"] == pytest.approx(0, abs=1e-9)
    assert found.delta == pytest.approx({"stable_rank": 1, "effective_rank": 1, "rank_90": 1}, abs=1e-4)


def test_a_strong_direction_across_a_full_basis_is_new_too() -> None:
    # In a square weight every direction is a mixture of old ones; a strong rank-one update is new all the same.
    generator = torch.Generator().manual_seed(0)
    weight = make_weight(64, 64, 3)
    u, v = (torch.randn(64, generator=generator, dtype=torch.float64) for _ in range(2))
    found = must_compare(weight.matrix, weight.matrix + 12 * torch.outer(u / u.norm(), v / v.norm()))

    assert found.num_new == 1
    assert found.new_directions[0]["position"] == 1
    assert found.shares["new"] > 0.9


@given(weights(), st.integers(0, 2**16), st.floats(1e-4, 0.3))
def test_the_parts_sum_to_the_change(weight: Weight, seed: int, size: float) -> None:
    noise = torch.randn(weight.matrix.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = must_compare(weight.matrix, 1.05 * weight.matrix + size * noise)

    assert sum(found.shares.values()) == pytest.approx(1, abs=1e-9)
    assert min(found.shares.values()) >= 0
    assert sum(found.amplification_by_rank.values()) == pytest.approx(found.shares["amplification"], abs=1e-9)
    for shares in found.subspace_energy.values():
        assert 0 <= shares["both"] <= min(shares["output"], shares["input"]) + 1e-12
    full = [a for a in found.approximations if a.method == "full"]
    assert full[0].captured == pytest.approx(found.energy)


@given(weights(), st.integers(0, 2**16))
def test_signs_and_orientation_do_not_matter(weight: Weight, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    after = weight.matrix + 0.1 * torch.randn(weight.matrix.shape, generator=generator, dtype=torch.float64)
    base, tuned = full_factors(weight.matrix), full_factors(after)
    flips = torch.where(torch.rand(weight.rank, generator=generator) < 0.5, -1.0, 1.0).double()
    flipped = Factors(U=tuned.U * flips, S=tuned.S, Vh=tuned.Vh * flips[:, None])

    assert torch.allclose(overlaps(base, flipped).product(), overlaps(base, tuned).product(), atol=1e-12)
    found, turned = must_compare(weight.matrix, after), must_compare(weight.matrix.T, after.T)
    negated = must_compare(-weight.matrix, -after)
    for other in (turned, negated):
        assert other.shares == pytest.approx(found.shares, abs=1e-9)
        assert other.counterparts == found.counterparts
        assert other.value_change == pytest.approx(found.value_change, abs=1e-9)
    assert turned.turned["output"] == pytest.approx(found.turned["input"], abs=1e-5)
    for size, sides in found.principal_angles.items():
        assert turned.principal_angles[size]["input_mean"] == pytest.approx(sides["output_mean"], abs=1e-6)


@given(weights(), st.integers(0, 2**16))
def test_there_and_back_again(weight: Weight, seed: int) -> None:
    noise = torch.randn(weight.matrix.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    after = weight.matrix + 0.05 * noise
    there, back = must_compare(weight.matrix, after), must_compare(after, weight.matrix)

    assert back.norms["delta"] == pytest.approx(there.norms["delta"])
    assert back.delta == pytest.approx(there.delta)
    for size, sides in there.principal_angles.items():
        assert back.principal_angles[size] == pytest.approx(sides, abs=1e-6)
    assert torch.allclose(torch.tensor(back.overlap_output), torch.tensor(there.overlap_output).T, atol=2e-4)


@given(st.integers(3, 30), st.integers(1, 6), st.floats(1e-9, 1.5), st.integers(0, 2**16))
def test_principal_angles_agree_with_scipy(rows: int, k: int, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    k = min(k, rows)
    first = orthonormal(rows, k, generator)
    second = torch.linalg.qr(first + size * torch.randn(rows, k, generator=generator, dtype=torch.float64))[0]

    found = principal_angles(first, second)
    assert found.tolist() == sorted(found.tolist())
    expected = np.sort(scipy.linalg.subspace_angles(first.numpy(), second.numpy()))
    assert found.numpy() == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_matching_is_the_best_of_all_permutations() -> None:
    import itertools

    product = torch.rand(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    found = match_directions(product)
    best = max(sum(abs(float(product[i, p[i]])) for i in range(6)) for p in itertools.permutations(range(6)))

    assert sorted(found.tuned.tolist()) == list(range(6))
    assert float(found.overlap.sum()) == pytest.approx(best)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**16))
def test_energies_and_ranks_of_a_change(out_features: int, in_features: int, seed: int) -> None:
    delta = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    energies = delta_energies(delta)
    values = np.linalg.svd(delta.numpy(), compute_uv=False)
    ranks = delta_ranks(energies)
    p = values / values.sum()

    assert energies.numpy() == pytest.approx(values**2, abs=1e-9)
    assert ranks["stable_rank"] == pytest.approx((values**2).sum() / values[0] ** 2)
    assert ranks["effective_rank"] == pytest.approx(float(np.exp(-(p * np.log(p + 1e-300)).sum())), rel=1e-4)
    assert ranks["rank_90"] == 1 + int((np.cumsum(values**2) / (values**2).sum() < 0.9).sum())


def test_a_change_without_preference_finds_chance() -> None:
    generator = torch.Generator().manual_seed(5)
    weight = make_weight(120, 80, 1)
    noise = torch.randn(120, 80, generator=generator, dtype=torch.float64)
    found = must_compare(weight.matrix, weight.matrix + 1e-3 * noise)

    for shares in found.subspace_energy.values():
        for side in ("output", "input"):
            assert shares[side] == pytest.approx(shares[f"{side}_chance"], rel=0.5)
    # Outside the column space of a tall weight lies what its 80 directions cannot hold of 120.
    assert found.outside == pytest.approx(1 - 80 / 120, abs=0.03)


def test_sixteen_bits_and_tiny_or_empty_weights() -> None:
    W = make_weight(8, 6, 0).matrix
    half = must_compare(W.to(torch.bfloat16), (1.5 * W).to(torch.bfloat16))
    assert half.value_change["top"] == pytest.approx(0.5, abs=0.02)
    assert compare_matrices(W, W.clone()) is None
    one = must_compare(torch.tensor([[2.0]]), torch.tensor([[3.0]]))
    assert one.shares["amplification"] == pytest.approx(1)
    from_nothing = must_compare(torch.zeros(5, 4), W[:5, :4])
    assert from_nothing.shares["new"] == pytest.approx(1)
    to_nothing = must_compare(W, torch.zeros(8, 6))
    assert to_nothing.shares["amplification"] == pytest.approx(1)
    with pytest.raises(DataError, match=r"layer.*NaN"):
        compare_matrices(W, torch.full((8, 6), float("nan")), name="layer")


def test_a_curve_has_few_points_that_start_and_end_at_the_ends() -> None:
    for rank in (1, 2, 5, 384, 4096):
        positions = curve_positions(rank)
        assert positions == sorted(set(positions))
        assert (positions[0], positions[-1]) == (1, rank)
        assert len(positions) <= spectra._CURVE_POINTS + 1
