# SPDX-License-Identifier: Apache-2.0
"""How the energy of a change, its squared Frobenius norm, spreads over its singular directions."""

from __future__ import annotations

import torch
from torch import Tensor


def delta_energies(delta: Tensor) -> Tensor:
    """Squared singular values of ``delta`` (O, I) in descending order, shape (min(O, I),).

    Eigenvalues of the smaller Gram matrix: energies are what is wanted, so nothing is lost by squaring, at a fifth of
    the time of a decomposition.
    """
    tall = delta if delta.shape[0] >= delta.shape[1] else delta.T
    energies: Tensor = torch.linalg.eigvalsh(tall.T @ tall)
    return energies.flip(0).clamp(min=0)


def delta_ranks(energies: Tensor) -> dict[str, float]:
    """Stable rank, effective rank (Roy & Vetterli 2007) and the 90% rank of a matrix from its squared singular values,
    descending, not all zero.
    """
    values = energies.sqrt()
    chance = values / values.sum()
    entropy = -(chance * chance.clamp(min=torch.finfo(chance.dtype).tiny).log()).sum()
    reached = energies.cumsum(0) / energies.sum()
    return {
        "stable_rank": float(energies.sum() / energies[0]),
        "effective_rank": float(entropy.exp()),
        "rank_90": int((reached < 0.9).sum()) + 1,
    }
