# SPDX-License-Identifier: Apache-2.0
"""A new method is one class: registered by its decorator, it has a name on the command line and passes every law."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mirrortune
from mirrortune.adapters.core import CORES, Coefficients, Core
from mirrortune.adapters.inject import adapter_parameters
from tests.cli import console
from tests.laws.test_layer_laws import DTYPES, check_gradients, check_identity, check_output
from tests.spectral import Problem, Variant, build_layer, strategies
from tests.tiny_runs import logits


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> type[Core]:
    """Everything that a new core takes; it has not even a backward pass of its own."""
    monkeypatch.setattr(CORES, "_items", dict(CORES._items))

    @CORES.register("toy")
    class Toy(Core):
        """K = diag(S) (I + gain M), M free."""

        default_rank = 4

        def __init__(self, S: Tensor, *, gain: float = 1.0) -> None:
            super().__init__()
            self.register_buffer("S", S, persistent=False)
            self.gain = gain
            self.M = nn.Parameter(torch.zeros(len(S), len(S), dtype=S.dtype))

        def coefficients(self, *, delta: bool) -> Coefficients:
            change = self.S[:, None] * self.M * self.gain
            return (change if delta else change + torch.diag(self.S),)

        def mix(self, z: Tensor, *coefficients: Tensor) -> Tensor:
            return z @ coefficients[0].T

    return Toy


@pytest.mark.usefixtures("toy")
def test_it_passes_the_laws_of_the_layer() -> None:
    variant = Variant("toy", None, (("gain", 0.5),))
    for problem in (Problem(3, 5, 3, seed=1), Problem(6, 4, 2, seed=2), Problem(5, 3, 5, 4), Problem(1, 1, 1, seed=3)):
        for dtype in DTYPES:
            x = problem.rows(2, 3).to(dtype)
            check_identity(build_layer(problem, variant, "branch", dtype=dtype), x)
            for strategy in strategies(problem):
                layer = build_layer(problem, variant, strategy, dtype=dtype, seed=4)
                check_output(layer, x, dtype)
                check_gradients(layer, x, dtype)


@pytest.mark.usefixtures("toy")
def test_it_trains_evaluates_and_merges_from_the_command_line(desk: Path, tiny_model_dir: Path) -> None:
    words = ("-m", tiny_model_dir, "-t", "text-classification", "-d", "reviews.csv", "--method", "toy", "-o", "run")
    words = (*words, "--max-steps", 3, "adapter.options.gain=0.5", "--json")
    trained = console.mirrortune("train", *words).data
    assert trained["trainable_parameters"] == 13 * 4 * 4
    assert "adapter: method: toy" in " ".join((desk / "run" / "recipe.yaml").read_text().split())
    scored = console.mirrortune("eval", "run", "--json").data
    assert scored["metrics"] == pytest.approx(trained["metrics"], abs=1e-5)
    assert console.mirrortune("merge", "run", "-o", "merged", "--json").data["verification"]["passed"]


@pytest.mark.usefixtures("toy")
def test_its_options_and_name_are_known_to_messages(desk: Path, tiny_model_dir: Path) -> None:
    words = ("train", "-m", tiny_model_dir, "-t", "text-classification", "-d", "reviews.csv", "--method")
    wrong_option = console.mirrortune(*words, "toy", "adapter.options.gian=1")
    assert "core 'toy' has no option 'gian'. Did you mean 'gain'?" in wrong_option.said
    assert "unknown method 'tooy'. Did you mean 'toy'?" in console.mirrortune(*words, "tooy").said


@pytest.mark.usefixtures("toy")
def test_it_is_attached_saved_and_loaded_in_python(tiny_model_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    def base() -> nn.Module:
        torch.manual_seed(1)
        model = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir)
        assert isinstance(model, nn.Module)
        return model

    model = mirrortune.attach(base(), method="toy", rank=6, gain=2.0)
    assert mirrortune.trainable_parameters(model) == 13 * 36
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.normal_(std=0.1)
    mirrortune.save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(mirrortune.load_adapter(base(), tmp_path / "adapter")), logits(model))
