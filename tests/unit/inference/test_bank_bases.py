# SPDX-License-Identifier: Apache-2.0
"""bank_bases: factors that are held once, whatever order, rank and signs adapters come with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mirrortune
from mirrortune.adapters import inject
from mirrortune.adapters.svd import Factors, factorize
from mirrortune.inference import bank_bases
from tests.bank_cases import Cases, logits_of, save_trained, token_ids
from tests.tiny_models import tiny_bert

RANKS: dict[str, dict[str, Any]] = {
    "low": {"method": "lora-xs", "rank": 3}, "middle": {"method": "psoft", "rank": 9}, "full": {"method": "mirror"},
}  # fmt: skip


def held(bank: mirrortune.AdapterBank) -> list[list[int]]:
    """The ranks of the bases of every layer."""
    return [[basis.held.rank for basis in layer.bases] for layer in bank._admission.layers.values()]


@pytest.mark.parametrize("order", [["low", "middle", "full"], ["full", "low", "middle"], ["middle", "full", "low"]])
def test_the_largest_rank_is_held_once(order: list[str], tmp_path: Path) -> None:
    cases = Cases.make(tiny_bert(), tmp_path, {"input_ids": token_ids(4, 6)}, RANKS, logits_of)
    bank = mirrortune.AdapterBank(copy.deepcopy(cases.base))
    for count, name in enumerate(order, start=1):
        bank.add(name, tmp_path / name)
        cases.check(bank, [*order[:count], None], list(range(count + 1)))
    assert held(bank) == [[32]] * 13
    assert bank.shared_nbytes() == sum(
        4 * (o + i + 1) * 32 for o, i in [(32, 32)] * 9 + [(64, 32)] * 2 + [(32, 64)] * 2
    )


def other_driver(name: str, weight: Tensor, rank: int) -> Factors:
    """A decomposition that is as right as ours: every third vector has its other sign."""
    found = factorize(weight, rank, name=name)
    signs = torch.where(torch.arange(rank) % 3 == 0, -1.0, 1.0).double()
    return Factors(U=found.U * signs, S=found.S, Vh=found.Vh * signs[:, None])


@pytest.mark.parametrize(
    "own", [{"method": "mirror"}, {"method": "psoft", "rank": 7}, {"method": "lora-xs", "rank": 4}]
)
def test_adapters_trained_elsewhere_share_what_is_held(
    own: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = Cases.make(tiny_bert(), tmp_path, {"input_ids": token_ids(4, 6)}, {"here": {"method": "mirror"}}, logits_of)
    with monkeypatch.context() as patched:
        patched.setattr("mirrortune.api.FactorCache", lambda: other_driver)
        elsewhere = Cases.make(tiny_bert(), tmp_path, cases.batch, {"there": own}, logits_of)
    for order in (["here", "there"], ["there", "here"]):
        bank = mirrortune.AdapterBank(copy.deepcopy(cases.base))
        for name in order:
            bank.add(name, tmp_path / name)
        both = Cases(cases.base, tmp_path, cases.batch, {**cases.alone, **elsewhere.alone}, logits_of)
        both.check(bank, ["here", "there", None, "there"], [0, 1, 2, 3])
        assert held(bank) == [[32]] * 13


def test_a_basis_that_is_another_one_is_held_beside_the_first(tmp_path: Path) -> None:
    base = tiny_bert()
    with torch.no_grad():  # numbers of 16 bits in 32
        for parameter in base.parameters():
            parameter.copy_(parameter.bfloat16().float())
    cases = Cases.make(base, tmp_path, {"input_ids": token_ids(4, 6)}, {"wide": {"method": "mirror"}}, logits_of)
    save_trained(copy.deepcopy(base).bfloat16(), tmp_path / "narrow", 1, method="mirror")
    alone = mirrortune.load_adapter(copy.deepcopy(base), tmp_path / "narrow").eval()
    bank = mirrortune.AdapterBank(copy.deepcopy(base))
    for name in ("wide", "narrow"):
        bank.add(name, tmp_path / name)
    assert held(bank) == [[32, 32]] * 13, "factors that were rounded to 16 bits are others"
    with torch.no_grad(), bank.rows(["wide", "narrow"]):
        found = logits_of(bank.model, {"input_ids": cases.batch["input_ids"][:2]})
        expected = alone(input_ids=cases.batch["input_ids"][1:2]).logits
        with bank.rows(["narrow", "narrow"]):  # exact factors could replace the weight for them
            both = logits_of(bank.model, {"input_ids": cases.batch["input_ids"][1:3]})
    torch.testing.assert_close(found[0], cases.alone["wide"][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1:], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(both[:1], expected, rtol=1e-6, atol=1e-6)


def test_a_second_adapter_factorises_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(2):
        save_trained(tiny_bert(), tmp_path / str(index), index, method="mirror")
    bank = mirrortune.AdapterBank(tiny_bert())
    bank.add("0", tmp_path / "0")
    asked: list[str] = []
    monkeypatch.setattr(bank._admission, "source", lambda name, weight, rank: asked.append(name))
    monkeypatch.setattr(inject, "factorize", lambda *args, **kwargs: asked.append("factorize"))
    bank.add("1", tmp_path / "1")
    assert asked == []


@pytest.mark.parametrize("kept", [1, 128])
def test_pairs_of_ones_own(kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank_bases, "_KEPT_CORES", kept)
    own = {str(seed): {"method": "random", "seed": seed} for seed in range(3)}
    cases = Cases.make(tiny_bert(), tmp_path, {"input_ids": token_ids(4, 6)}, own, logits_of)
    bank = cases.bank()
    for _ in range(2):
        cases.check(bank, ["2", None, "0", "1", "0"], [0, 1, 2, 3, 0])
    assert all(len(layer.bases[0].held._cores) <= kept for layer in bank._admission.layers.values())
