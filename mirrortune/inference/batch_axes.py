# SPDX-License-Identifier: Apache-2.0
"""Which dimension of a layer's input is the batch: found by running the model on two rows, and on the first of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mirrortune.tasks.drawn_inputs import drawn_inputs, first_that_runs


@torch.no_grad()
def layers_without_rows(model: nn.Module) -> frozenset[str]:
    """Return names of modules whose input does not begin with the rows of the batch.

    Such are layers of models that put time first, and experts that are given some of the tokens. Of a model whose
    inputs are not known nothing is said.
    """
    config = getattr(model, "config", None)
    if config is None:
        return frozenset()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    was_training = model.training
    model.eval()
    try:

        def run(batch: Any) -> tuple[dict[str, int], dict[str, int]]:
            two = {key: t.to(device) for key, t in batch.items()}
            one = {key: t[:1] if t.dim() and t.shape[0] == 2 else t for key, t in two.items()}
            return _first_dimensions(model, two), _first_dimensions(model, one)

        found = first_that_runs(drawn_inputs(type(model), config), run)
    finally:
        model.train(was_training)
    if isinstance(found, str) or not any(t.dim() and t.shape[0] == 2 for t in found[0].values()):
        return frozenset()
    of_two, of_one = found[1]
    return frozenset(
        name for name, size in of_two.items() if size != 2 * of_one.get(name, 0) and (size, of_one.get(name)) != (1, 1)
    )


def _first_dimensions(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, int]:
    """Run the model; the size of the first dimension of every module's input."""
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
