# SPDX-License-Identifier: Apache-2.0
"""``torch.compile`` and gradient checkpointing of adapted modules: no graph break, the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mirrortune.adapters.inject import adapter_parameters
from mirrortune.adapters.strategies import Strategy
from tests.laws.test_kind_laws import CASES, METHODS, STRATEGIES, adapted
from tests.spectral import relative

# The loop over an expert stack and the fast path of attention are not ours to keep free of breaks.
COMPILED = ["linear", "conv2d", "embedding", "split linear"]


def numbers(model: nn.Module, output: Tensor) -> list[Tensor]:
    """The output, and the gradients of its square for every core."""
    output.square().sum().backward()
    found = [output.detach(), *(p.grad for p in adapter_parameters(model).values())]
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize(
    ("name", "method", "strategy"),
    [
        # What a core does is the same in every strategy, and what a strategy does with every core.
        *(("linear", method, None) for method in METHODS if "series" not in method),
        *(("linear", "mirror", strategy) for strategy in STRATEGIES[1:]),
        *((name, "random input", strategy) for name in COMPILED[1:] for strategy in STRATEGIES[::2]),
        pytest.param("transposed experts", "mirror", None, marks=pytest.mark.slow),
    ],
)
def test_compiling_breaks_no_graph_and_changes_nothing(name: str, method: str, strategy: Strategy | None) -> None:
    model, x = adapted(CASES[name], METHODS[method], strategy), CASES[name].input()
    expected = numbers(model, model(x))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = numbers(model, compiled(x))
    assert all(relative(a, b) < 1e-12 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    for strategy in STRATEGIES:
        model, x = adapted(CASES[name], METHODS["mirror"], strategy), CASES[name].input()
        expected = numbers(model, model(x))
        found = numbers(model, checkpoint(model, x, use_reentrant=False))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
