# SPDX-License-Identifier: Apache-2.0
"""Laws of the basis: what another driver computed is repaired or refused, and never used as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mirrortune.adapters.files.adapter_file import read_adapter
from mirrortune.adapters.files.load import FingerprintBook, load_into
from mirrortune.adapters.fingerprint import Fingerprint, fingerprint
from mirrortune.adapters.inject import adapter_parameters, attach, plain_parameters, spectral_layers
from mirrortune.adapters.layers import delta_weight
from mirrortune.adapters.spec import AdapterSpec
from mirrortune.adapters.svd import Factors, complement, factorize
from mirrortune.errors import VerificationError
from tests.spectral import (
    LAYER_VARIANTS,
    Problem,
    Variant,
    align,
    draw_pairs,
    problems,
    relative,
    tall_problems,
    train_a_little,
)
from tests.tiny_models import tiny_bert
from tests.tiny_runs import HEAD, Adapted, adapt, logits

SEEDS = st.integers(0, 2**16)
SIDES = ["output", "input", "both"]
# The promise of basis.py: whatever is accepted has the adapter's effect to this share of itself.
EFFECT_TOLERANCE = 1e-4
QUERY = "bert.encoder.layer.0.attention.self.query"


def flip(factors: Factors, seed: int) -> Factors:
    """The same decomposition with random signs."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (factors.rank,), generator=generator) * 2.0 - 1.0
    return Factors(U=factors.U * signs, S=factors.S, Vh=factors.Vh * signs[:, None])


def by_gesvd(weight: Tensor, rank: int) -> Factors:
    """QR iteration instead of divide and conquer."""
    parts = scipy.linalg.svd(weight.double().numpy(), full_matrices=False, lapack_driver="gesvd")
    U, S, Vh = (torch.from_numpy(np.ascontiguousarray(part)) for part in parts)
    return Factors(U=U[:, :rank], S=S[:rank], Vh=Vh[:rank])


def by_gram_matrix(weight: Tensor, rank: int) -> Factors:
    """Eigenvectors of W W^T, or of W^T W where that is smaller; signs as they come."""
    matrix = weight.double()
    is_wide = matrix.shape[0] <= matrix.shape[1]
    values, vectors = torch.linalg.eigh(matrix @ matrix.T if is_wide else matrix.T @ matrix)
    S, leading = values.flip(0)[:rank].clamp(min=0).sqrt(), vectors.flip(1)[:, :rank]
    if is_wide:
        return Factors(U=leading, S=S, Vh=leading.T @ matrix / S[:, None])
    return Factors(U=matrix @ leading / S, S=S, Vh=leading.T)


def by_transposed(weight: Tensor, rank: int) -> Factors:
    """The decomposition of W^T, turned back."""
    found = factorize(weight.T.contiguous(), rank)
    return Factors(U=found.Vh.T, S=found.S, Vh=found.U.T)


def by_flipping(weight: Tensor, rank: int) -> Factors:
    """Our own, with random signs."""
    return flip(factorize(weight, rank), seed=weight.shape[0])


def completed(factors: Factors, rank: int) -> Factors:
    """A driver's decomposition with as many directions as asked for, as :func:`factorize` completes its own."""
    missing = rank - factors.rank
    if not missing:
        return factors
    U = torch.cat([factors.U, complement(factors.U)], dim=1)
    S, Vh = (torch.cat([t, t.new_zeros(missing, *t.shape[1:])]) for t in (factors.S, factors.Vh))
    return Factors(U=U, S=S, Vh=Vh)


def aligned_or_refused(factors: Factors, stored: Fingerprint) -> Factors | None:
    """Aligned factors, or None if they are refused."""
    try:
        return align(factors, stored, "layer")
    except VerificationError:
        return None


DRIVERS = {"gesvd": by_gesvd, "gram": by_gram_matrix, "transposed": by_transposed, "flipped": by_flipping}
Driver = Callable[[Tensor, int], Factors]


@pytest.mark.parametrize("side", SIDES)
@given(problem=problems(), seed=SEEDS)
def test_flipped_signs_are_repaired_exactly(side: str, problem: Problem, seed: int) -> None:
    weight = problem.weight()
    factors = factorize(weight, problem.rank)
    repaired = align(flip(factors, seed), fingerprint(weight, factors, side), "layer")
    assert torch.equal(repaired.U, factors.U)
    assert torch.equal(repaired.S, factors.S)
    assert torch.equal(repaired.Vh, factors.Vh)


@pytest.mark.parametrize("side", SIDES)
@given(problem=problems(largest=16), seed=SEEDS)
def test_a_fingerprint_is_the_same_every_time(side: str, problem: Problem, seed: int) -> None:
    weight = problem.weight()
    first, second = (fingerprint(weight, factorize(weight, problem.rank), side) for _ in range(2))
    assert torch.equal(first.sketch, second.sketch)
    assert (first.weight_hash, first.probe_seeds) == (second.weight_hash, second.probe_seeds)


@pytest.mark.parametrize("variant", LAYER_VARIANTS, ids=str)
@given(name=st.sampled_from(sorted(DRIVERS)), problem=problems(), seed=SEEDS)
def test_any_drivers_basis_gives_the_same_effect(name: str, variant: Variant, problem: Problem, seed: int) -> None:
    driver = DRIVERS[name]
    weight = problem.weight()
    factors = factorize(weight, problem.rank)
    core = variant.build(factors.S, seed, (problem.out_features, problem.in_features))
    effect = delta_weight(factors, core)
    aligned = align(driver(weight, problem.rank), fingerprint(weight, factors, core.side), "layer")
    # Singular values are well apart here, so that drivers agree to about 1e-12; the promise leaves room for real ones.
    assert relative(delta_weight(aligned, core), effect) <= EFFECT_TOLERANCE / 1e4


@pytest.mark.parametrize("variant", LAYER_VARIANTS, ids=str)
@given(
    problem=problems(largest=16).filter(lambda p: p.rank >= 2),
    seed=SEEDS,
    place=st.integers(0, 30),
    exponent=st.floats(-9, 0),
)
def test_a_mixed_basis_is_refused_or_harmless(
    variant: Variant, problem: Problem, seed: int, place: int, exponent: float
) -> None:
    # Two equal singular values: any rotation of their plane is as correct a decomposition as ours.
    i = place % (problem.rank - 1)
    factors = factorize(problem.weight(), problem.rank)
    S = factors.S.clone()
    S[i + 1] = S[i]
    factors = Factors(U=factors.U, S=S, Vh=factors.Vh)
    weight = factors.U @ torch.diag(S) @ factors.Vh
    core = variant.build(S, seed, tuple(weight.shape))
    stored = fingerprint(weight, factors, core.side)
    angle = torch.tensor(10.0**exponent, dtype=torch.float64)
    turn = torch.eye(problem.rank, dtype=torch.float64)
    turn[i : i + 2, i : i + 2] = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
    mixed = Factors(U=factors.U @ turn, S=S, Vh=turn.T @ factors.Vh)
    assert relative(mixed.U @ torch.diag(S) @ mixed.Vh, weight) <= 1e-13
    # A probe entry of 1/10, rarely less, times the angle is what the sketch moves by.
    largest_probe = float(stored.sketch[:, i : i + 2].abs().max())
    aligned = aligned_or_refused(mixed, stored)
    if aligned is None:
        assert float(angle) * largest_probe > 1e-6
    else:
        assert relative(delta_weight(aligned, core), delta_weight(factors, core)) <= EFFECT_TOLERANCE


def shuffled(rank: int, seed: int) -> Tensor:
    """An order of directions that is not theirs."""
    order = torch.randperm(rank, generator=torch.Generator().manual_seed(seed)).roll(1)
    return order.flip(0) if torch.equal(order, torch.arange(rank)) else order


@pytest.mark.parametrize("side", SIDES)
@given(problem=problems().filter(lambda p: p.rank >= 2), seed=SEEDS)
def test_a_permuted_and_flipped_basis_is_put_back_exactly(side: str, problem: Problem, seed: int) -> None:
    weight = problem.weight()
    factors = factorize(weight, problem.rank)
    order = shuffled(problem.rank, seed)
    permuted = flip(Factors(U=factors.U[:, order], S=factors.S[order], Vh=factors.Vh[order]), seed)
    repaired = align(permuted, fingerprint(weight, factors, side), "layer")
    assert torch.equal(repaired.U, factors.U)
    assert torch.equal(repaired.S, factors.S)
    assert torch.equal(repaired.Vh, factors.Vh)


@pytest.mark.parametrize("side", SIDES)
@given(problem=problems().filter(lambda p: p.rank >= 2), seed=SEEDS)
def test_vectors_of_other_singular_values_are_refused(side: str, problem: Problem, seed: int) -> None:
    weight = problem.weight()
    factors = factorize(weight, problem.rank)
    order = shuffled(problem.rank, seed)
    permuted = Factors(U=factors.U[:, order], S=factors.S, Vh=factors.Vh[order])
    with pytest.raises(VerificationError, match=r"^the\.layer: "):
        align(permuted, fingerprint(weight, factors, side), "the.layer")


@pytest.mark.parametrize("side", SIDES)
@given(problem=problems().filter(lambda p: p.rank >= 2))
def test_a_basis_of_another_rank_or_with_nan_is_refused(side: str, problem: Problem) -> None:
    weight = problem.weight()
    factors = factorize(weight, problem.rank)
    stored = fingerprint(weight, factors, side)
    with pytest.raises(VerificationError, match=r"^the\.layer: .* rank"):
        align(factorize(weight, problem.rank - 1), stored, "the.layer")
    broken = Factors(U=factors.U * float("nan"), S=factors.S, Vh=factors.Vh * float("nan"))
    with pytest.raises(VerificationError, match=r"^the\.layer: "):
        align(broken, stored, "the.layer")


OUTPUT_VARIANTS = [v for v in LAYER_VARIANTS if v.core == "givens" and "side" not in dict(v.options)]


@pytest.mark.parametrize("variant", OUTPUT_VARIANTS, ids=str)
@given(name=st.sampled_from(sorted(DRIVERS)), problem=tall_problems(), seed=SEEDS)
def test_any_drivers_basis_of_all_outputs_gives_the_same_effect(
    name: str, variant: Variant, problem: Problem, seed: int
) -> None:
    weight = problem.weight()
    factors = factorize(weight, "out")
    core = variant.build(factors.S, seed)
    other = completed(DRIVERS[name](weight, problem.in_features), problem.out_features)
    aligned = align(other, fingerprint(weight, factors, core.side), "layer")
    assert relative(delta_weight(aligned, core), delta_weight(factors, core)) <= EFFECT_TOLERANCE / 1e4


@given(problem=tall_problems(), seed=SEEDS)
def test_another_basis_of_what_no_input_reaches_is_refused(problem: Problem, seed: int) -> None:
    weight = problem.weight()
    factors = factorize(weight, "out")
    noise = torch.randn(problem.out_features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    # A reflection that leaves every left vector of the weight where it is.
    axis = factors.U[:, problem.in_features :] @ noise[problem.in_features :]
    if len(noise) - problem.in_features < 2:  # one vector has a sign and nothing else
        return
    turned = factors.U - 2 * torch.outer(axis, axis @ factors.U) / axis.square().sum()
    assert relative(turned @ torch.diag(factors.S) @ factors.Vh, weight) <= 1e-13
    aligned = aligned_or_refused(Factors(U=turned, S=factors.S, Vh=factors.Vh), fingerprint(weight, factors, "output"))
    assert aligned is None or relative(aligned.U, factors.U) <= EFFECT_TOLERANCE


SPECS = [
    AdapterSpec(),
    AdapterSpec(rank=7),
    AdapterSpec(rank="out"),
    AdapterSpec(method="random", options={"rounds": 3}),
    AdapterSpec(pairing=[[0, 5], [7, 1]]),
    AdapterSpec(
        pairing={"dense": [[[3, 2]], [[0, 1]]], "all-linear": [[[0, 1]], [[2, 1], [0, 3]]]}, options={"rounds": 2}
    ),
    AdapterSpec(method="neighbor", options={"scale_top_k": "all"}),
    AdapterSpec(method="random", seed=3, options={"side": "input"}),
]


@pytest.fixture(params=SPECS, ids=lambda s: f"{s.method}-{s.rank}-{s.pairing}-{s.options}")
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Adapted, Path]:
    """A trained adapter and its folder."""
    adapted = adapt(request.param)
    return adapted, adapted.save(tmp_path / "adapter")


def test_save_and_load_are_bit_exact(saved: tuple[Adapted, Path]) -> None:
    adapted, folder = saved
    loaded = tiny_bert()
    book = load_into(loaded, read_adapter(folder), lambda name, weight, rank: factorize(weight, rank))
    for read in (adapter_parameters, plain_parameters):
        before, after = read(adapted.model), read(loaded)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(adapted.logits(), logits(loaded))
    again = Adapted(loaded, book).save(folder.parent / "again")
    assert (again / "adapter.safetensors").read_bytes() == (folder / "adapter.safetensors").read_bytes()
    described = [json.loads((place / "adapter.json").read_text()) for place in (folder, again)]
    for own in described:  # the first was attached without the digests of the base's other weights
        del own["frozen"], own["description_sha256"]
    assert described[0] == described[1]


@pytest.mark.parametrize("driver", DRIVERS.values(), ids=list(DRIVERS))
def test_a_model_loads_with_any_drivers_basis(saved: tuple[Adapted, Path], driver: Driver) -> None:
    adapted, folder = saved
    loaded = tiny_bert()

    def source(name: str, weight: Tensor, rank: int) -> Factors:
        return completed(driver(weight.detach(), min(rank, *weight.shape)), rank)

    load_into(loaded, read_adapter(folder), source)
    reference = spectral_layers(adapted.model)
    for name, layer in spectral_layers(loaded).items():
        effect = reference[name].delta_weight()
        # Gram matrices square the spread of singular values and lose half of the digits of small ones.
        assert relative(layer.delta_weight(), effect) <= EFFECT_TOLERANCE, name
    assert relative(logits(loaded), adapted.logits()) <= EFFECT_TOLERANCE
    if driver is by_flipping:
        assert torch.equal(logits(loaded), adapted.logits())


def test_a_flipped_sign_would_not_go_unnoticed(saved: tuple[Adapted, Path]) -> None:
    """What alignment is for: without it the effect is wrong by more than itself."""
    adapted, _ = saved
    for layer in spectral_layers(adapted.model).values():
        with torch.no_grad():
            layer.core.get_parameter("scale").zero_()  # the angles' effect alone
        factors = Factors(U=layer.U.double(), S=layer.core.get_buffer("S").double(), Vh=layer.Vh.double())
        signs = torch.ones(layer.rank, dtype=torch.float64)
        signs[layer.core.get_buffer("pairs")[:, 1]] = -1  # one of each pair, so that every angle turns the other way
        flipped = Factors(U=factors.U * signs, S=factors.S, Vh=factors.Vh * signs[:, None])
        assert relative(delta_weight(flipped, layer.core), delta_weight(factors, layer.core)) > 1


def test_a_base_with_one_changed_bit_is_refused_by_name(saved: tuple[Adapted, Path]) -> None:
    _, folder = saved
    other = tiny_bert()
    weight = other.get_submodule(QUERY).weight
    with torch.no_grad():
        weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(9.0))
    with pytest.raises(VerificationError, match=rf"^{QUERY}: the base weight is not the one") as caught:
        load_into(other, read_adapter(folder), lambda name, weight, rank: factorize(weight, rank))
    assert caught.value.exit_code == 5


def test_a_base_in_fewer_bits_is_refused_by_name(saved: tuple[Adapted, Path]) -> None:
    _, folder = saved
    with pytest.raises(VerificationError, match=rf"^{QUERY}: .*float32"):
        load_into(tiny_bert().bfloat16(), read_adapter(folder), lambda name, weight, rank: factorize(weight, rank))


def test_a_degenerate_base_is_refused_by_name(saved: tuple[Adapted, Path]) -> None:
    _, folder = saved

    def mixing(name: str, weight: Tensor, rank: int) -> Factors:
        factors = factorize(weight, rank)
        if name != QUERY:
            return factors
        turn = torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64))[0]
        U, Vh = factors.U.clone(), factors.Vh.clone()
        U[:, 1:3], Vh[1:3] = U[:, 1:3] @ turn, turn.T @ Vh[1:3]
        return Factors(U=U, S=factors.S, Vh=Vh)

    said = rf"^{QUERY}: the adapter changes this weight differently .* Its basis cannot be found"
    with pytest.raises(VerificationError, match=said):
        load_into(tiny_bert(), read_adapter(folder), mixing)


@pytest.mark.parametrize("method", ["mirror", "random", "adaptive"])
def test_pairs_of_any_origin_travel_with_the_adapter(tmp_path: Path, method: str) -> None:
    """Pairs that no seed would give again, such as those matched to a task's gradients."""
    spec = AdapterSpec(method=method)
    names = spectral_layers(adapt().model)
    pairs = {name: draw_pairs("adaptive", 32, seed) for seed, name in enumerate(names)}
    model, book = tiny_bert(), FingerprintBook()
    attach(model, spec, new_parameters=HEAD, pairs=pairs, on_layer=book)
    for layer in spectral_layers(model).values():
        train_a_little(layer.core, 1)
    folder = Adapted(model, book).save(tmp_path / "adapter")
    loaded = tiny_bert()
    load_into(loaded, read_adapter(folder), lambda name, weight, rank: factorize(weight, rank))
    for name, layer in spectral_layers(loaded).items():
        assert torch.equal(layer.core.get_buffer("pairs"), pairs[name])
    assert torch.equal(logits(loaded), logits(model))


def test_pairs_are_stored_where_the_rank_does_not_tell_them(tmp_path: Path) -> None:
    adapted = adapt(AdapterSpec(method="random", seed=3))
    folder = adapted.save(tmp_path / "adapter")
    stored = {name for name in read_adapter(folder).tensors if name.startswith("pairs.")}
    assert stored == {f"pairs.{name}" for name in spectral_layers(adapted.model)}
    mirror = adapt().save(tmp_path / "mirror")
    assert not [name for name in read_adapter(mirror).tensors if name.startswith("pairs.")]
