# SPDX-License-Identifier: Apache-2.0
"""Find layers for which the first dimension of the input is not the batch, by running the model on two rows and one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mirrortune.system.devices import evaluating
from mirrortune.tasks.drawn_inputs import drawn_inputs, first_that_runs


@torch.no_grad()
def layers_without_rows(model: nn.Module) -> frozenset[str]:
    """Return the names of modules for which the first dimension of the input is not the batch.

    Examples are layers of models with time as the first dimension, and experts that receive only some of the tokens.
    For a model whose inputs are unknown, the result is empty.
    """
    config = getattr(model, "config", None)
    if config is None:
        return frozenset()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def run(batch: Any) -> tuple[dict[str, int], dict[str, int]]:
        two = {key: t.to(device) for key, t in batch.items()}
        one = {key: t[:1] if t.dim() and t.shape[0] == 2 else t for key, t in two.items()}
        return _first_dimensions(model, two), _first_dimensions(model, one)

    with evaluating(model):
        found = first_that_runs(drawn_inputs(type(model), config), run)
    if isinstance(found, str) or not any(t.dim() and t.shape[0] == 2 for t in found[0].values()):
        return frozenset()
    of_two, of_one = found[1]
    return frozenset(
        name for name, size in of_two.items() if size != 2 * of_one.get(name, 0) and (size, of_one.get(name)) != (1, 1)
    )


def _first_dimensions(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, int]:
    """Run the model and return the size of the first dimension of every module's input."""
    sizes: dict[str, int] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].dim():
                sizes[name] = args[0].shape[0]

        return hook

    hooks = [m.register_forward_pre_hook(note(name)) for name, m in model.named_modules() if name]
    try:
        model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return sizes
