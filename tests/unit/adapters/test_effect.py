# SPDX-License-Identifier: Apache-2.0
"""The numbers by which an adapter's effect on a weight is known again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mirrortune.adapters import effect as effects
from mirrortune.adapters.cores.givens import Givens
from mirrortune.adapters.effect import EXACT_EFFECT_TOLERANCE, change_error, effect, effect_error
from mirrortune.adapters.layers import delta_weight
from mirrortune.adapters.pairings.rules import mirror
from mirrortune.adapters.svd import Factors


def some_factors(out: int, rank: int, *stack: int) -> Factors:
    """Orthonormal factors in float32, as a layer holds them."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(*stack, size, rank, generator=generator))[0] for size in (out, rank + 20))
    return Factors(U=U, S=torch.linspace(9, 1, rank).expand(*stack, rank).clone(), Vh=V.mT.contiguous())


def test_the_effect_of_many_directions_is_exact() -> None:
    """A layer saves it from factors in float32, and loading computes it from the same numbers in float64."""
    factors = some_factors(420, 400)
    core = Givens(factors.S, mirror(400, None))
    core.theta.data.normal_(std=0.1)
    exact = effect(factors.to(device=torch.device("cpu"), dtype=torch.float64), core)
    assert effect_error(effect(factors, core), exact) <= EXACT_EFFECT_TOLERANCE / 1e5


@pytest.mark.parametrize("stack", [(), (3,)])
def test_blocks_add_up(monkeypatch: pytest.MonkeyPatch, stack: Any) -> None:
    factors = some_factors(50, 24, *stack)
    whole = effects.probed(factors)
    monkeypatch.setattr(effects, "_BLOCK", 7 * 24 * (stack or (1,))[0])
    parts = effects.probed(factors)
    probes = effects._probes(50, 0)
    torch.testing.assert_close(whole.left, probes @ factors.U.double(), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(parts.left, whole.left, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(parts.right, whole.right, rtol=1e-13, atol=1e-13)


def test_a_change_of_weights_is_known_by_its_effect() -> None:
    factors, before = some_factors(50, 24), torch.randn(50, 44, generator=torch.Generator().manual_seed(1)).bfloat16()
    core = Givens(factors.S, mirror(24, None))
    core.theta.data.normal_(std=1e-3)
    expected, delta = effect(factors, core).float(), delta_weight(factors, core)
    assert change_error(before, before.double() + delta, expected) < 1e-6
    assert change_error(before, before.double() + 0.95 * delta, expected) == pytest.approx(0.05, rel=1e-4)
    assert change_error(before, before.double() - delta, expected) == pytest.approx(2, rel=1e-4)
    assert change_error(before, before.double(), expected) == pytest.approx(1, rel=1e-4)
    stacked = [torch.stack([a, 2 * a]) for a in (before, before.double() + delta)]
    assert change_error(*stacked, torch.cat([expected, 2 * expected])) < 1e-6
    assert change_error(*stacked, torch.cat([expected, expected])) == pytest.approx(1, rel=1e-4)


def test_rounding_errors_in_float64_are_no_change() -> None:
    before = torch.randn(50, 44, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert change_error(before, before * (1 + 1e-15), torch.zeros(1, 16)) == 0
    assert change_error(before, before * (1 + 1e-9), torch.zeros(1, 16)) == float("inf")
