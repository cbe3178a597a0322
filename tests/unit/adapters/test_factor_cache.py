# SPDX-License-Identifier: Apache-2.0
"""factor_cache: hits are bit-identical, and a file that is not what it should be is never used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from mirrortune.adapters.factor_cache import FactorCache, _digest
from mirrortune.adapters.svd import Factors, are_leading_triplets, factorize
from tests.spectral import Problem, relative

WEIGHT = Problem(8, 6, 6, seed=1).weight().float()


def files(folder: Path) -> list[Path]:
    """Every cached file."""
    return sorted(folder.rglob("*.safetensors"))


def equal(a: Factors, b: Factors) -> bool:
    """Whether two decompositions are the same, bit for bit."""
    return torch.equal(a.U, b.U) and torch.equal(a.S, b.S) and torch.equal(a.Vh, b.Vh)


@pytest.fixture
def filled(tmp_path: Path) -> tuple[Path, Factors]:
    """A cache that holds one weight's factors, and these."""
    folder = tmp_path / "factors"
    return folder, FactorCache(folder=folder)("layer", WEIGHT, 6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_second_run_reads_what_the_first_computed(tmp_path: Path, dtype: torch.dtype, rank: int) -> None:
    weight = WEIGHT.to(dtype)
    first, second = FactorCache(folder=tmp_path), FactorCache(folder=tmp_path)
    computed, read = first("layer", weight, rank), second("another.name", weight.clone(), rank)
    assert (first.hits, first.misses, second.hits, second.misses) == (0, 1, 1, 0)
    assert equal(computed, read)
    assert {read.U.dtype, read.S.dtype, read.Vh.dtype} == {torch.float64}
    exact = factorize(weight, rank)
    tolerance = 1e-13 if dtype is torch.float64 else 1e-7  # stored in float32 beside 32-bit and 16-bit weights
    assert relative(read.U, exact.U) <= tolerance
    assert relative(read.Vh, exact.Vh) <= tolerance
    assert torch.equal(read.S, exact.S)


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIRRORTUNE_CACHE", str(tmp_path / "elsewhere"))
    FactorCache()("layer", WEIGHT, 6)
    assert len(files(tmp_path / "elsewhere" / "factors")) == 1


def test_other_bytes_dtypes_and_ranks_are_other_entries(filled: tuple[Path, Factors]) -> None:
    folder, _ = filled
    changed = WEIGHT.clone()
    changed[0, 0] = torch.nextafter(changed[0, 0], torch.tensor(9.0))
    cache = FactorCache(folder=folder)
    for weight, rank in ((changed, 6), (WEIGHT.double(), 6), (WEIGHT, 5), (WEIGHT.T.contiguous(), 6)):
        cache("layer", weight, rank)
    assert (cache.hits, cache.misses) == (0, 4)
    assert len(files(folder)) == 5


def test_progress_is_told_after_each_layer(tmp_path: Path) -> None:
    told: list[str] = []
    cache = FactorCache(folder=tmp_path, on_layer=told.append)
    for name in ("a", "b"):
        cache(name, WEIGHT, 2)
    assert told == ["a", "b"]
    assert cache.seconds > 0


def damage(path: Path, how: str) -> None:
    """Break one cached file."""
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in ("U", "S", "Vh")}
    if how == "emptied":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "header":
        path.write_bytes(b"\xff" * 16 + data[16:])
    elif how == "zeros":  # blocks that a crash never wrote
        path.write_bytes(data[:header] + bytes(len(data) - header))
    elif how == "nan":
        save_file({name: t * float("nan") for name, t in tensors.items()}, path, metadata)
    elif how == "reversed":
        save_file({name: t.flip(0).contiguous() for name, t in tensors.items()}, path, metadata)
    elif how == "without Vh":
        save_file({name: t for name, t in tensors.items() if name != "Vh"}, path, metadata)
    elif how == "half turned":
        tensors["U"][:, 0] *= -1
        save_file(tensors, path, metadata)
    elif how == "scaled":
        save_file({**tensors, "U": tensors["U"] * 2, "S": tensors["S"] * 2}, path, metadata)
    elif how == "unsigned":
        save_file(tensors, path)
    else:
        path.unlink()
        path.mkdir()


DAMAGES = [
    "emptied",
    "truncated",
    "header",
    "zeros",
    "nan",
    "reversed",
    "without Vh",
    "half turned",
    "scaled",
    "unsigned",
]


@pytest.mark.parametrize("how", [*DAMAGES, "a folder"])
def test_a_damaged_file_is_computed_again(filled: tuple[Path, Factors], how: str) -> None:
    folder, computed = filled
    damage(files(folder)[0], how)
    cache = FactorCache(folder=folder)
    assert equal(cache("layer", WEIGHT, 6), computed)
    assert (cache.hits, cache.misses) == (0, 1)
    again = FactorCache(folder=folder)
    assert equal(again("layer", WEIGHT, 6), computed)
    assert again.hits == (0 if how == "a folder" else 1)


def test_another_weights_file_in_its_place_is_computed_again(filled: tuple[Path, Factors]) -> None:
    folder, computed = filled
    (own,) = files(folder)
    FactorCache(folder=folder)("other", Problem(8, 6, 6, seed=2).weight().float(), 6)
    (other,) = set(files(folder)) - {own}
    own.write_bytes(other.read_bytes())
    cache = FactorCache(folder=folder)
    assert equal(cache("layer", WEIGHT, 6), computed)
    assert cache.misses == 1


@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_changes_nothing(tmp_path_factory: pytest.TempPathFactory, place: int, bit: int) -> None:
    folder = tmp_path_factory.mktemp("factors")
    computed = FactorCache(folder=folder)("layer", WEIGHT, 6)
    (path,) = files(folder)
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << bit
    path.write_bytes(data)
    cache = FactorCache(folder=folder)
    assert equal(cache("layer", WEIGHT, 6), computed)


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "factors").write_text("a file where the folder should be")
    cache = FactorCache(folder=tmp_path / "factors")
    factors = cache("layer", WEIGHT, 6)
    assert relative(factors.U @ torch.diag(factors.S) @ factors.Vh, WEIGHT) <= 1e-6
    assert cache.misses == 1


@pytest.mark.parametrize("weight", [torch.zeros(4, 3), torch.eye(4), torch.ones(4, 4)], ids=["zero", "eye", "ones"])
def test_degenerate_weights_are_cached_too(tmp_path: Path, weight: torch.Tensor) -> None:
    first, second = FactorCache(folder=tmp_path), FactorCache(folder=tmp_path)
    assert equal(first("layer", weight, min(weight.shape)), second("layer", weight, min(weight.shape)))
    assert second.hits == 1


@pytest.mark.parametrize("largest", [0, 1 << 40])  # as many at a time as there are cores; one
def test_matrices_are_factorised_side_by_side_and_once(tmp_path: Path, largest: int) -> None:
    weights = [torch.randn(7, 5) for _ in range(6)]
    layers = [(f"layer{i}", lambda weight=weight: weight, 5) for i, weight in enumerate([*weights, weights[0]])]
    told: list[str] = []
    cores = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for index in (0, 1):
            cache = FactorCache(folder=tmp_path, on_layer=told.append)
            cache.share(layers, index, 2, largest=largest)
            assert cache.misses == (0 if index else 6)
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(cores)
    assert sorted(told) == sorted([name for name, _, _ in layers] * 2)
    alone = FactorCache(folder=tmp_path / "other")
    for name, weight, rank in layers:
        assert torch.equal(cache(name, weight(), rank).U, alone(name, weight(), rank).U)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_where_it_is_computed_changes_nothing(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # No device of this machine but the CPU computes; what one cannot do is done where the weight is.
    monkeypatch.setattr("mirrortune.adapters.factor_cache._SMALLEST_SIDE", 4)
    cache = FactorCache(folder=tmp_path, device=torch.device(device))
    assert equal(cache("layer", WEIGHT, 6), FactorCache(folder=tmp_path / "other")("layer", WEIGHT, 6))
    assert cache.misses == 1


def forged(factors: Factors, how: str) -> Factors:
    """Factors that somebody else put there, whole and well hashed."""
    U, S, Vh = factors.U.float(), factors.S.clone(), factors.Vh.float()
    if how == "of another weight":
        other = factorize(WEIGHT.flip(0).roll(1, 1) + 1, S.shape[-1])
        U, S, Vh = other.U.float(), other.S, other.Vh.float()
    elif how == "a turned direction":
        U[:, [0, 1]] = U[:, [0, 1]] @ torch.tensor([[0.8, -0.6], [0.6, 0.8]])
    elif how == "weak directions for strong ones":
        every = factorize(WEIGHT, 6)
        keep = slice(6 - S.shape[-1], 6)
        U, S, Vh = every.U[:, keep].float(), every.S[keep], every.Vh[keep].float()
    elif how == "a stretched pair":
        U, Vh = U * 2, Vh / 2
    elif how == "not finite":
        U[0, 0] = torch.nan
    else:
        S = S * 1.01
    return Factors(U=U.contiguous(), S=S, Vh=Vh.contiguous())


@pytest.mark.parametrize("rank", [3, 6])
@pytest.mark.parametrize(
    "how", ["of another weight", "a turned direction", "weak directions for strong ones", "a stretched pair",
            "not finite", "other values"],
)  # fmt: skip
def test_factors_that_are_not_of_the_weight_are_not_believed(tmp_path: Path, rank: int, how: str) -> None:
    if how.startswith("weak") and rank == 6:
        return
    own = FactorCache(folder=tmp_path)("layer", WEIGHT, rank)
    path = files(tmp_path)[0]
    with safe_open(path, framework="pt") as file:
        key = file.metadata()["key"]
    false = forged(own, how)
    save_file({"U": false.U, "S": false.S, "Vh": false.Vh}, path, {"key": key, "sha256": _digest(false)})
    cache = FactorCache(folder=tmp_path)
    assert equal(cache("layer", WEIGHT, rank), own)
    assert (cache.hits, cache.misses) == (0, 1)


@given(problem=st.builds(Problem, st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), seed=st.integers(0, 99)),
       scale=st.sampled_from([0.0, 1e-30, 1.0, 1e30]), dtype=st.sampled_from([torch.float64, torch.float32]),
       count=st.sampled_from([0, 2]))  # fmt: skip
def test_factors_of_the_weight_are_believed(problem: Problem, scale: float, dtype: torch.dtype, count: int) -> None:
    weight = (problem.weight() * scale).to(dtype)
    weight = torch.stack([weight] * count) if count else weight
    for rank in {1, min(weight.shape[-2:]), weight.shape[-2]}:
        found = factorize(weight, rank)
        stored = Factors(U=found.U.to(dtype), S=found.S, Vh=found.Vh.to(dtype))
        assert are_leading_triplets(stored, weight)


def test_an_entry_of_another_user_that_others_may_write_is_not_used(
    filled: tuple[Path, Factors], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, own = filled
    files(folder)[0].chmod(0o666)
    assert FactorCache(folder=folder)("layer", WEIGHT, 6) is not None
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    said: list[str] = []
    cache = FactorCache(folder=folder, on_remark=said.append)
    assert equal(cache("layer", WEIGHT, 6), own)
    assert (cache.hits, cache.misses) == (0, 1)
    assert said == [f"{files(folder)[0]} is not used: it is a link, or another user's that others may write"]


def test_an_entry_that_is_a_link_is_not_followed(filled: tuple[Path, Factors], tmp_path: Path) -> None:
    folder, own = filled
    (path,) = files(folder)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    cache = FactorCache(folder=folder)
    assert equal(cache("layer", WEIGHT, 6), own)
    assert (cache.hits, cache.misses, path.is_symlink()) == (0, 1, False)
