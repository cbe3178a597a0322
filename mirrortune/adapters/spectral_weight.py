# SPDX-License-Identifier: Apache-2.0
"""The dense strategy: a weight that, wherever it is read, is W' = W + U (K - diag(S)) Vh.

For weights that nobody calls as a layer (fused experts, ``nn.MultiheadAttention``), for layers with a forward method of
their own, and for a weight that several modules share. W' is made once in each forward pass of its module, in float32,
and rounded once to the weight's dtype: what trains is what merges. Shapes: O out_features, I in_features, R rank, E
stacked matrices (a leading dimension of all, where there are several).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mirrortune.adapters.cores import Core
from mirrortune.adapters.layout import Layout
from mirrortune.adapters.spectral import Spectral
from mirrortune.adapters.svd import Factors


class SpectralWeight(Spectral):
    """W -> W', a parametrisation in the sense of ``torch.nn.utils.parametrize``.

    Args:
        weight: the frozen tensor, in the layout of its module.
        layout: how its numbers stand for matrices.
        factors: singular triplets; of a stack, with a leading dimension E.
        core: owns the trained numbers and K; a ``CoreStack`` for a stack.
    """

    strategy = "dense"

    def __init__(self, weight: Tensor, layout: Layout, factors: Factors, core: Core) -> None:
        super().__init__(factors, core, layout, weight)
        self._held: dict[bool, Tensor] | None = None

    def forward(self, weight: Tensor) -> Tensor:
        """W' of the shape and dtype of ``weight``; equal to it, bit for bit, for an untrained core."""
        if self._held is None or torch.compiler.is_compiling():
            return self.adapt(weight, weight.dtype)
        wants_graph = torch.is_grad_enabled()
        if wants_graph not in self._held:
            self._held[wants_graph] = self.adapt(weight, weight.dtype)
        return self._held[wants_graph]

    def hold(self, *, held: bool) -> None:
        """From now on compute W' once and give it to every reader, or forget it and compute it for each."""
        self._held = {} if held else None

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"rank={self.rank}, strategy=dense"


def replace_weight(owners: list[tuple[nn.Module, str]], spectral: SpectralWeight) -> None:
    """Put ``spectral`` over a weight in every place that holds it: (module, parameter name) each."""
    for module, parameter in owners:
        # unsafe leaves out a check that would compute W' once more, on whatever device the model was loaded on
        parametrize.register_parametrization(module, parameter, spectral, unsafe=True)
        # A loop over experts reads the whole stack for each of them.
        module.register_forward_pre_hook(_hold)
        module.register_forward_hook(_release, always_call=True)


def _hold(module: nn.Module, _: object) -> None:
    for spectral in _spectral_weights(module):
        spectral.hold(held=True)


def _release(module: nn.Module, *_: object) -> None:
    for spectral in _spectral_weights(module):
        spectral.hold(held=False)


def _spectral_weights(module: nn.Module) -> list[SpectralWeight]:
    # Found through the module and not remembered by the hooks, which a copy of the module shares with it.
    chains = module.get_submodule("parametrizations").children()
    return [p for chain in chains for p in chain.children() if isinstance(p, SpectralWeight)]
