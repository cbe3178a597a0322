# SPDX-License-Identifier: Apache-2.0
"""The proposal of a sweep on curves whose answer is known, and the sweep itself on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mirrortune.errors import DivergedError
from mirrortune.training.lr_sweep import Sweep, _smooth, propose, sweep_rates
from tests.tiny_runs import make_trainer

RATES = np.geomspace(1e-5, 1, 100)


def sweep(losses: Any, noise: float = 0.0) -> Sweep:
    """A sweep with the given losses and normal noise."""
    noisy = (losses + noise * np.random.default_rng(0).standard_normal(len(losses))).tolist()
    return Sweep(rates=RATES[: len(noisy)].tolist(), losses=noisy, smoothed=_smooth(noisy, 100).tolist())


def valley(middle: float, lowest: float, width: float = 3.0) -> Any:
    """Losses that fall fastest at one rate and rise beyond another."""
    logs = np.log10(RATES)
    fall = 1 / (1 + np.exp(width * (logs - np.log10(middle))))
    return 0.3 + 0.4 * fall + 2 * np.maximum(0, logs - np.log10(lowest)) ** 2


def test_it_proposes_a_rate_between_the_steepest_and_a_tenth_of_the_lowest() -> None:
    found = propose(sweep(valley(5e-3, 5e-2), noise=0.01))

    assert found.steepest == pytest.approx(5e-3, rel=0.5)
    assert found.tenth_of_lowest == pytest.approx(5e-3, rel=0.7)
    assert found.lr is not None
    assert min(found.steepest, found.tenth_of_lowest) * 0.9 <= found.lr
    assert found.lr <= max(found.steepest, found.tenth_of_lowest) * 1.1
    assert found.sureness == "sure"


def test_it_is_unsure_where_the_two_are_far_apart() -> None:
    assert propose(sweep(valley(1e-4, 5e-1, width=9.0))).sureness == "unsure"


@pytest.mark.parametrize(
    "losses", [np.full(100, 0.7), np.linspace(0.7, 2, 100), np.full(3, 0.7)], ids=["flat", "rising", "short"]
)
def test_it_proposes_nothing_where_the_loss_never_fell(losses: Any) -> None:
    found = propose(sweep(losses, noise=0.02))

    assert found.lr is None
    assert found.sureness == "unsure"
    assert found.reason == "the loss did not fall by more than its noise"


def test_a_sweep_raises_the_adapters_rate_alone(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, lr=1.0, head_lr=1e-2)
    rates, step = [], trainer.stepper.update.step

    def watched(*args: Any) -> Any:
        rates.append(sorted({group["lr"] for group in trainer.optimizer.param_groups}))
        return step(*args)

    trainer.stepper.update.step = watched  # type: ignore[method-assign]
    seen: list[int] = []
    found = sweep_rates(trainer, lr=3e-2, num_steps=12, on_step=lambda: seen.append(1))

    assert len(found.losses) == len(found.smoothed) == len(found.rates) <= len(seen) <= 12
    assert found.rates[0] == pytest.approx(3e-5)
    for rate, pair in zip(found.rates, rates, strict=False):
        assert pair == pytest.approx(sorted({rate, 1e-2}))
    assert not any(tmp_path.glob("checkpoints/*")), "nothing is saved"
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_model_that_is_broken_from_the_start_is_reported(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, lr=1.0)
    with torch.no_grad():
        trainer.bare_model.get_parameter("classifier.bias").fill_(float("nan"))

    with pytest.raises(DivergedError, match="step 1: the first loss is not finite"):
        sweep_rates(trainer, lr=3e-2, num_steps=12, on_step=lambda: None)
