# SPDX-License-Identifier: Apache-2.0
"""Which strategy a layer takes: by counting, and the same again after a resume."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mirrortune.adapters.files.load import adapt
from mirrortune.adapters.inject import spectral_layers
from mirrortune.adapters.spec import AdapterSpec
from mirrortune.adapters.strategies import SMALLEST_WORK, Strategy, candidates, cheapest_strategy, cost
from mirrortune.adapters.targets import KINDS, find_targets
from mirrortune.runs.adapted_base import by_strategy
from mirrortune.runs.size import strategies_of
from tests.cli.console import mirrortune, reviews, write_table
from tests.tiny_models import write_tiny_model

F32 = torch.float32


@pytest.mark.parametrize(
    ("shape", "rank", "rows", "expected"),
    [
        ((768, 768), 768, 256, "factored"),
        ((768, 768), 768, 1024, "factored"),
        ((768, 768), 768, 4096, "dense"),
        ((768, 768), 768, None, "factored"),
        ((768, 768), 384, 4096, "dense"),
        ((768, 768), 384, None, "branch"),
        ((3072, 768), 768, 4096, "factored"),
        ((768, 3072), 768, 4096, "factored"),
        ((768, 768), 64, 65536, "branch"),
        ((32, 32), 32, 4096, "factored"),
    ],
)
def test_the_number_of_rows_has_a_say(shape: tuple[int, int], rank: int, rows: int | None, expected: Strategy) -> None:
    assert cheapest_strategy(*shape, rank, F32, rows=rows) == expected


def test_16_bits_packed_weights_and_embeddings_are_left_as_they_are() -> None:
    assert candidates(768, 768, 768, torch.bfloat16) == ("branch",)
    assert candidates(768, 768, 768, torch.float16) == ("branch",)
    assert candidates(768, 768, 768, F32) == ("branch", "factored", "dense")
    assert candidates(768, 768, 767, F32) == ("branch", "dense")
    for kind in KINDS:
        allowed = candidates(768, 768, 768, F32, kind)
        assert ("dense" in allowed) == (kind.name in ("linear", "conv1d-linear"))
        assert allowed == ("branch",) or not (kind.is_quantised or kind.name == "embedding")


def test_costs_are_those_of_the_products() -> None:
    # 4 : 1 layers, counted by hand: two products of D x 4D in place of one are 5/4 of it, forward and backward.
    big = 1 << 14
    assert cost("factored", 4 * big, big, big, 1024) == pytest.approx(2 * 1.25, rel=0.01)
    assert cost("factored", big, big, big, 1024) == pytest.approx(2 * 2, rel=0.02)
    assert cost("branch", big, big, big, 1024) - cost("factored", big, big, big, 1024) == 2
    assert cost("dense", big, big, big, 1 << 30) == pytest.approx(3, rel=0.01)
    assert cost("dense", big, big, big, big) == pytest.approx(5, rel=0.01)
    assert cost("dense", 64, 64, 64, SMALLEST_WORK // 64**2 - 1) == float("inf")


def linear_model(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4 * width)).requires_grad_(False)


def test_strategies_that_are_chosen_by_layer_compute_the_same() -> None:
    x, spec = torch.randn(5, 24), AdapterSpec(target_modules=".*")
    outputs = {}
    for pair in itertools.product(("branch", "factored", "dense"), repeat=2):
        torch.manual_seed(0)
        model = linear_model(24)
        chosen: dict[str, Strategy] = dict(zip(("0", "2"), pair, strict=True))  # type: ignore[arg-type]
        from mirrortune.adapters.svd import factorize

        adapt(model, spec, factor_source=lambda name, w, rank: factorize(w, rank, name=name), strategies=chosen)
        assert {name: layer.strategy for name, layer in spectral_layers(model).items()} == chosen
        for layer in spectral_layers(model).values():
            nn.init.normal_(next(layer.core.parameters()), generator=torch.Generator().manual_seed(1))
        outputs[pair] = model(x)
    for found in outputs.values():
        torch.testing.assert_close(found, outputs["branch", "branch"], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("quick_figures")
def test_a_resumed_run_keeps_its_strategies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As if the smallest layers were worth a choice, and dense the cheapest.
    monkeypatch.setattr("mirrortune.adapters.strategies.SMALLEST_WORK", 0)
    monkeypatch.setattr("mirrortune.adapters.strategies.cost", lambda strategy, *_: float(strategy != "dense"))
    data = write_table(tmp_path / "reviews.csv", reviews(40))
    words = ["train", "-m", write_tiny_model(tmp_path / "model"), "-t", "text-classification", "-d", data, "--json",
             "-o", tmp_path / "run", "--max-steps", 2]  # fmt: skip
    first = mirrortune(*words)
    assert first.exit_code == 0, first.stderr
    kept = json.loads((tmp_path / "run" / "environment.json").read_text(encoding="utf-8"))["strategies"]
    assert list(kept) == ["dense"]
    assert len(kept["dense"]) == 13
    seen: list[Any] = []
    monkeypatch.setattr("mirrortune.runs.adapted_base.adapt_model", spied(seen))
    monkeypatch.setattr("mirrortune.runs.adapted_base.strategies_of", None)  # counting again would fail
    again = mirrortune(*words, "--resume")
    assert again.data["metrics"] == first.data["metrics"]
    assert by_strategy(seen[0]) == kept


def spied(seen: list[Any]) -> Any:
    from mirrortune.runs.adapted_base import adapt_model

    def adapting(*words: Any) -> Any:
        seen.append(words[4])
        return adapt_model(*words)

    return adapting


def test_timing_is_no_strategy() -> None:
    outcome = mirrortune("train", "-t", "text-classification", "adapter.strategy=measured")
    assert outcome.exit_code == 2
    assert "got 'measured'. Allowed: 'auto', 'branch', 'factored' or 'dense'" in outcome.said


def test_a_method_without_a_core_has_no_strategies() -> None:
    targets = find_targets(linear_model(8), AdapterSpec(), ())
    assert strategies_of(targets, replace(AdapterSpec(), method="lora"), F32, 64) == {}
