# SPDX-License-Identifier: Apache-2.0
"""Laws of the best approximations: a core finds its own change again, no core of its kind does better, and numerical
optimisers agree.
"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mirrortune.adapters.cores import CORES, Core
from mirrortune.adapters.layers import delta_weight
from mirrortune.adapters.svd import factorize
from mirrortune.analyze.spectra.approximations import (
    APPROXIMATIONS,
    Approximation,
    Change,
    approximate,
    plane_gains,
    psoft_error,
    sizes,
)
from mirrortune.analyze.spectra.overlaps import delta_energies
from tests.spectral import Problem, draw_pairs, problems

EVERY = problems(full=True, largest=14)


def change_of(problem: Problem, delta: Tensor) -> Change:
    factors = factorize(problem.weight())
    return Change(
        M=factors.U.T @ delta @ factors.Vh.T,
        S=factors.S,
        energies=delta_energies(delta),
        shape=(problem.out_features, problem.in_features),
    )


def noise(problem: Problem, seed: int = 5, size: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(problem.seed + seed)
    return size * torch.randn(problem.out_features, problem.in_features, generator=generator, dtype=torch.float64)


def by_method(change: Change) -> dict[str, list[Approximation]]:
    found: dict[str, list[Approximation]] = {}
    for entry in approximate(change):
        found.setdefault(entry.method, []).append(entry)
    return found


def build(name: str, S: Tensor, seed: int, size: float, **options: object) -> Core:
    """A core with random numbers of a size that training could reach."""
    arguments = [S] + ([draw_pairs("mirror", len(S), 0)] if name == "givens" else [])
    core = CORES.get(name, "test")(*arguments, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return core


CASES = {
    "mirror": ("givens", {}),
    "mirror, input side": ("givens", {"side": "input"}),
    "mirror + scale": ("givens", {"scale_top_k": "all"}),
    "scale": ("scale", {}),
    "svft banded": ("svft", {"pattern": "banded", "bands": 1}),
    "lora-xs": ("lora-xs", {}),
}


@pytest.mark.parametrize("method", CASES)
@given(problem=EVERY, seed=st.integers(0, 2**16))
def test_a_core_finds_its_own_change_again(method: str, problem: Problem, seed: int) -> None:
    core, options = CASES[method]
    factors = factorize(problem.weight())
    if method.startswith("svft") and factors.rank < 2:
        return
    delta = delta_weight(factors, build(core, factors.S, seed, 0.4, **options))
    entries = by_method(change_of(problem, delta))[method]
    best = entries[0] if method.startswith("svft") else entries[-1]

    assert best.captured == pytest.approx(float(delta.square().sum()), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("method", CASES)
@given(problem=EVERY, seed=st.integers(0, 2**16), size=st.sampled_from([0.02, 0.3]))
def test_no_core_of_its_kind_does_better(method: str, problem: Problem, seed: int, size: float) -> None:
    core, options = CASES[method]
    factors, delta = factorize(problem.weight()), noise(problem)
    if method.startswith("svft") and factors.rank < 2:
        return
    entries = by_method(change_of(problem, delta))[method]
    best = entries[0] if method.startswith("svft") else entries[-1]
    other = delta_weight(factors, build(core, factors.S, seed, size, **options))

    assert float(delta.square().sum()) - best.captured <= float((delta - other).square().sum()) + 1e-9


@given(EVERY)
def test_what_is_captured_is_between_nothing_and_all_and_grows(problem: Problem) -> None:
    delta = noise(problem)
    energy = float(delta.square().sum())
    for method, entries in by_method(change_of(problem, delta)).items():
        captured = [e.captured for e in entries]
        assert min(captured) >= -1e-9 * energy
        assert max(captured) <= energy * (1 + 1e-9)
        assert [e.size for e in entries] == sorted({e.size for e in entries})
        assert [e.parameters for e in entries] == sorted(e.parameters for e in entries)
        if method in ("scale", "lora", "lora-xs", "svft banded"):
            assert captured == sorted(captured), "each size contains the smaller ones"


@given(EVERY)
def test_lora_is_the_truncated_decomposition(problem: Problem) -> None:
    delta = noise(problem)
    U, S, Vh = np.linalg.svd(delta.numpy(), full_matrices=False)
    for entry in by_method(change_of(problem, delta))["lora"]:
        r = entry.size
        error = np.square(delta.numpy() - U[:, :r] * S[:r] @ Vh[:r]).sum()
        assert float(delta.square().sum()) - entry.captured == pytest.approx(error, abs=1e-9)
        assert entry.parameters == r * (problem.out_features + problem.in_features)


@given(st.integers(2, 9), st.integers(0, 2**16), st.floats(0.01, 5))
def test_the_gain_of_every_plane_is_that_of_its_best_angle(rank: int, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    M = size * torch.randn(rank, rank, generator=generator, dtype=torch.float64)
    S = torch.logspace(0.6, -0.6, rank, dtype=torch.float64)
    gains = plane_gains(M, S)
    i, j = sorted(torch.randperm(rank, generator=generator)[:2].tolist())
    T = (M + torch.diag(S))[[i, j]][:, [i, j]].numpy()
    strengths = np.diag(S[[i, j]].numpy())

    def error(theta: float) -> float:
        c, s = np.cos(theta), np.sin(theta)
        return float(np.square(T - np.array([[c, -s], [s, c]]) @ strengths).sum())

    grid = np.linspace(-np.pi, np.pi, 721)
    start = grid[np.argmin([error(t) for t in grid])]
    best = scipy.optimize.minimize_scalar(error, bounds=(start - 0.02, start + 0.02), method="bounded",
                                          options={"xatol": 1e-12})  # fmt: skip
    assert float(gains[i, j]) == pytest.approx(error(0.0) - best.fun, abs=1e-8)
    assert torch.equal(gains, gains.T)


@given(st.integers(2, 8), st.integers(0, 2**16))
def test_psoft_finds_a_rotation_exactly(rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    S = torch.logspace(0.6, -0.6, rank, dtype=torch.float64)
    core = CORES.get("psoft", "test")(S, vectors=False)
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    T = core.delta_matrix() + torch.diag(S)

    assert psoft_error(T, S) == pytest.approx(0, abs=1e-9)


@given(st.integers(2, 8), st.integers(0, 2**16), st.floats(0.01, 0.5))
def test_psoft_beats_its_parts(rank: int, seed: int, size: float) -> None:
    """It contains every diagonal change in the leading directions, and rotations alone."""
    generator = torch.Generator().manual_seed(seed)
    S = torch.logspace(0.6, -0.6, rank, dtype=torch.float64)
    T = torch.diag(S) + size * torch.randn(rank, rank, generator=generator, dtype=torch.float64)
    found = psoft_error(T, S)
    U, _, Vh = np.linalg.svd(T.numpy() * S.numpy()[:, None])
    turn = U @ Vh
    if np.linalg.det(turn) < 0:
        turn = (U * np.where(np.arange(rank) == rank - 1, -1, 1)) @ Vh

    assert 0 <= found <= float(np.square(T.numpy() - S.numpy()[:, None] * turn).sum()) + 1e-9


def test_parameters_are_the_cores_own() -> None:
    """What the table counts is what the core trains."""
    problem = Problem(out_features=24, in_features=16, rank=16, seed=0)
    S = factorize(problem.weight()).S
    found = by_method(change_of(problem, noise(problem)))
    expected = {
        "mirror": build("givens", S, 0, 0.0),
        "mirror + scale": build("givens", S, 0, 0.0, scale_top_k="all"),
        "scale": build("scale", S, 0, 0.0),
        "lora-xs": build("lora-xs", S, 0, 0.0),
        "psoft": build("psoft", S, 0, 0.0),
    }
    for method, core in expected.items():
        assert found[method][-1].parameters == sum(p.numel() for p in core.parameters())
    banded = {e.size: e.parameters for e in found["svft banded"]}
    for bands, parameters in banded.items():
        core = build("svft", S, 0, 0.0, pattern="banded", bands=bands)
        assert parameters == sum(p.numel() for p in core.parameters())


def test_directions_of_no_strength_cannot_be_scaled() -> None:
    S = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    M = torch.eye(3, dtype=torch.float64)
    change = Change(M=M, S=S, energies=torch.ones(3, dtype=torch.float64), shape=(3, 3))
    assert max(e.captured for e in by_method(change)["scale"]) == pytest.approx(2)
    assert max(e.captured for e in by_method(change)["lora-xs"]) == pytest.approx(2)


def test_the_best_pairs_capture_at_least_half_of_what_any_could() -> None:
    problem = Problem(out_features=20, in_features=20, rank=20, seed=1)
    found = by_method(change_of(problem, noise(problem)))
    best = found["best pairs"][-1].captured
    assert all(best >= found[other][-1].captured / 2 for other in ("mirror", "neighbor", "random"))


def test_sizes_double_up_to_the_end() -> None:
    assert sizes(1) == [1]
    assert sizes(6) == [1, 2, 4, 6]
    assert sizes(8) == [1, 2, 4, 8]
    assert sizes(384, 128) == [1, 2, 4, 8, 16, 32, 64, 128]
    assert "full" in APPROXIMATIONS.names()
