# SPDX-License-Identifier: Apache-2.0
"""Which strategy a layer takes: by counting, by timing, and the same again after a resume."""

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
from mirrortune.adapters.kinds import Linear
from mirrortune.adapters.spec import AdapterSpec, build_core
from mirrortune.adapters.strategies import SMALLEST_WORK, Strategy, candidates, cheapest_strategy, cost
from mirrortune.adapters.targets import KINDS, Target, find_targets
from mirrortune.runs.size import strategies_of
from mirrortune.runs.strategy import Bench, by_strategy
from mirrortune.runs.timing import time_strategies
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
        assert allowed == ("branch",) or not (kind.is_packed or kind.name == "embedding")


def test_costs_are_those_of_the_products() -> None:
    # 4 : 1 layers, counted by hand: two products of D x 4D in place of one are 5/4 of it, forward and backward.
    big = 1 << 14
    assert cost("factored", 4 * big, big, big, 1024) == pytest.approx(2 * 1.25, rel=0.01)
    assert cost("factored", big, big, big, 1024) == pytest.approx(2 * 2, rel=0.02)
    assert cost("branch", big, big, big, 1024) - cost("factored", big, big, big, 1024) == 2
    assert cost("dense", big, big, big, 1 << 30) == pytest.approx(3, rel=0.01)
    assert cost("dense", big, big, big, big) == pytest.approx(5, rel=0.01)
    assert cost("dense", 64, 64, 64, SMALLEST_WORK // 64**2 - 1) == float("inf")


@pytest.mark.parametrize("method", ["mirror", "psoft", "svft"])
def test_every_candidate_is_timed(method: str) -> None:
    core = build_core(AdapterSpec(method=method, rank=8), torch.linspace(2, 1, 8), "w", (12, 8))
    allowed = candidates(12, 8, 8, F32)
    found = time_strategies((12, 8), core, allowed, rows=16, dtype=F32, device=torch.device("cpu"))
    assert tuple(found) == allowed
    assert all(seconds > 0 for seconds in found.values())
    assert all(p.grad is None for p in core.parameters()), "the core itself is not used"


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


def target(model: nn.Module, name: str) -> Target:
    return find_targets(model, AdapterSpec(target_modules=".*"), ()).layers[name]


def test_a_shape_is_timed_once_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[tuple[int, int]] = []

    def seconds(shape: tuple[int, int], core: Any, allowed: Any, **_: Any) -> dict[Strategy, float]:
        timed.append(shape)
        return dict(zip(allowed, answers, strict=True))

    monkeypatch.setattr("mirrortune.runs.strategy.time_strategies", seconds)
    model = linear_model(256)
    bench = Bench(spec=AdapterSpec(), dtype=F32, device=torch.device("cpu"), rows=1024, autocast=None)
    answers = [3.0, 1.0, 2.0]
    assert bench.fastest(target(model, "0"), "0", "dense") == "factored"
    assert bench.fastest(target(model, "0"), "another of this shape", "branch") == "factored"
    answers = [1.0, 0.97, 2.0]
    assert bench.fastest(target(model, "2"), "2", "branch") == "branch", "not clearly slower"
    assert timed == [(256, 256), (1024, 256)]
    other = Bench(spec=AdapterSpec(), dtype=F32, device=torch.device("cpu"), rows=2048, autocast=None)
    assert other.fastest(target(model, "2"), "2", "dense") == "factored"
    assert len(timed) == 3
    few = Bench(spec=AdapterSpec(), dtype=F32, device=torch.device("cpu"), rows=16, autocast=None)
    half = Bench(spec=AdapterSpec(), dtype=torch.bfloat16, device=torch.device("cpu"), rows=1024, autocast=None)
    assert few.fastest(target(model, "2"), "2", "factored") == "factored"
    assert half.fastest(target(model, "2"), "2", "branch") == "branch"
    assert len(timed) == 3, "nothing to choose from, or to gain"


def test_a_run_measures_keeps_its_choice_and_resumes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As if the smallest layers were worth a choice, and dense the fastest.
    monkeypatch.setattr("mirrortune.runs.strategy.SMALLEST_WORK", 0)
    monkeypatch.setattr(
        "mirrortune.runs.strategy.time_strategies",
        lambda shape, core, allowed, **_: {s: 0.5 if s == "dense" else 1.0 for s in allowed},
    )
    data = write_table(tmp_path / "reviews.csv", reviews(40))
    words = ["train", "-m", write_tiny_model(tmp_path / "model"), "-t", "text-classification", "-d", data, "--json",
             "-o", tmp_path / "run", "--max-steps", 2, "adapter.strategy=measured"]  # fmt: skip
    first = mirrortune(*words)
    assert first.exit_code == 0, first.stderr
    assert "strategies measured in" in first.said
    assert "13 of 13 layers compute otherwise" in first.said
    kept = json.loads((tmp_path / "run" / "environment.json").read_text(encoding="utf-8"))["strategies"]
    assert list(kept) == ["dense"]
    assert len(kept["dense"]) == 13
    monkeypatch.setattr("mirrortune.runs.strategy.time_strategies", None)  # whoever measures again, fails
    seen: list[Any] = []
    monkeypatch.setattr("mirrortune.runs.train.adapt_model", spied(seen))
    again = mirrortune(*words, "--resume")
    assert again.data["metrics"] == first.data["metrics"]
    assert by_strategy(seen[0]) == kept


def spied(seen: list[Any]) -> Any:
    from mirrortune.runs.load import adapt_model

    def adapting(*words: Any) -> Any:
        seen.append(words[-1])
        return adapt_model(*words)

    return adapting


def test_a_method_without_strategies_says_that_there_is_nothing_to_measure() -> None:
    model = linear_model(8)
    assert strategies_of(find_targets(model, AdapterSpec(), ()), replace(AdapterSpec(), method="lora"), F32, 64) == {}
    assert isinstance(target(model, "0").kind, Linear)
