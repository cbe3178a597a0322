# SPDX-License-Identifier: Apache-2.0
"""basis: digests and sketches; repair and refusal are in tests/laws."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mirrortune.adapters.fingerprint import fingerprint, value_digest, weight_digest
from mirrortune.adapters.svd import Factors, factorize
from mirrortune.errors import VerificationError
from tests.spectral import Problem, align

WEIGHT = Problem(6, 4, 4, seed=1).weight().float()


def test_a_digest_is_the_hash_of_dtype_shape_and_bytes() -> None:
    expected = hashlib.sha256(b"torch.float32:(6, 4):" + WEIGHT.numpy().tobytes()).hexdigest()
    assert weight_digest(WEIGHT) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_digest_tells_dtypes_and_shapes_apart(dtype: torch.dtype) -> None:
    zeros = torch.zeros(2, 6)
    assert len({weight_digest(z) for z in (zeros, zeros.to(dtype), zeros.view(3, 4), torch.zeros(2, 3))}) == 4


@given(place=st.integers(0, 23), bit=st.integers(0, 31))
def test_a_digest_sees_every_bit(place: int, bit: int) -> None:
    changed = WEIGHT.clone()
    changed.view(torch.int32).view(-1)[place] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
    assert weight_digest(changed) != weight_digest(WEIGHT)


def test_a_digest_depends_on_values_and_not_on_memory() -> None:
    strided = torch.stack([WEIGHT, WEIGHT], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert weight_digest(strided) == weight_digest(torch.nn.Parameter(WEIGHT)) == weight_digest(WEIGHT)


@pytest.mark.parametrize(("side", "count"), [("output", 1), ("input", 1), ("both", 2)])
def test_a_fingerprint_holds_what_its_side_needs(side: str, count: int) -> None:
    factors = factorize(WEIGHT)
    found = fingerprint(WEIGHT, factors, side)
    assert found.side == side
    assert found.sketch.shape == (count, 4)
    assert found.sketch.dtype == torch.float32
    assert found.weight_hash == f"values:{value_digest(WEIGHT)}"


@given(size=st.integers(1, 48))
def test_the_probe_sees_every_direction(size: int) -> None:
    # The standard basis: the sketch is the probe itself, some of whose entries are near zero for most seeds.
    found = fingerprint(torch.eye(size), factorize(torch.eye(size)), "output")
    assert float(found.sketch.abs().min()) > 1e-3


def test_the_probe_is_the_same_on_every_machine() -> None:
    """A golden value: with another probe, no stored adapter could be aligned any more."""
    eye = torch.eye(3, dtype=torch.float64)
    found = fingerprint(eye, Factors(U=eye, S=torch.ones(3), Vh=eye), "both")
    assert found.probe_seeds == (0,)
    expected = [[1.764052, 0.400157, 0.978738], [2.240893, 1.867558, -0.977278]]
    torch.testing.assert_close(found.sketch, torch.tensor(expected), rtol=0, atol=1e-6)


def test_the_refusal_says_which_direction_and_what_to_do() -> None:
    factors = factorize(WEIGHT)
    stored = fingerprint(WEIGHT, factors, "output")
    order = torch.tensor([0, 2, 1, 3])
    swapped = Factors(U=factors.U[:, order], S=factors.S, Vh=factors.Vh[order])
    with pytest.raises(VerificationError) as caught:
        align(swapped, stored, "encoder.query")
    assert caught.value.exit_code == 5
    message = str(caught.value)
    assert message.startswith("encoder.query: the basis of this weight cannot be aligned")
    assert "direction 1 of 4" in message or "direction 2 of 4" in message
    assert "load it where it was trained" in message


def test_only_the_side_that_matters_is_compared() -> None:
    """On the output side, S Vh = U^T W follows from U, so that a null direction's Vh may be anything."""
    weight = torch.zeros(4, 4, dtype=torch.float64)
    weight[:3, :3] = Problem(3, 3, 3, seed=2).weight()
    factors = factorize(weight)
    other = Factors(U=factors.U, S=factors.S, Vh=torch.cat([factors.Vh[:3], -factors.Vh[3:]]))
    assert torch.equal(align(other, fingerprint(weight, factors, "output"), "layer").U, factors.U)
    # A direction of value zero has two vectors that nothing ties to each other; each is put back.
    repaired = align(other, fingerprint(weight, factors, "both"), "layer")
    assert torch.equal(repaired.Vh, factors.Vh)
    assert torch.equal(repaired.U, factors.U)
    mixed = Factors(U=factors.U, S=factors.S, Vh=torch.cat([-factors.Vh[:1], factors.Vh[1:]]))
    assert torch.equal(align(mixed, fingerprint(weight, factors, "output"), "layer").U, factors.U)
    with pytest.raises(VerificationError):
        align(mixed, fingerprint(weight, factors, "both"), "layer")
