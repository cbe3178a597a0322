# SPDX-License-Identifier: Apache-2.0
"""PSOFT: a Cayley-parametrised rotation of the principal subspace, with two vectors that relax orthogonality."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from mirrortune.adapters.core import CORES, Coefficients, MatrixCore
from mirrortune.errors import ConfigError
from mirrortune.system.devices import to_float64


@CORES.register("psoft")
class Psoft(MatrixCore):
    """K = diag(S) diag(beta) R^T diag(alpha) with the rotation R = (I - Q)(I + Q)^-1, Q skew-symmetric.

    There are r(r-1)/2 + 2r trainable parameters for r directions. Initially Q = 0 and alpha = beta = 1. The paper's
    convention is h = W^T x, so a factor on the left of R there is on the right of R^T here: R rotates the INPUT side,
    before diag(S).

    Options: with ``neumann_terms`` > 0, the inverse is replaced by the series I - Q + Q^2 - ... of that degree, as
    published (with K = 5); ||Q|| >= 1 is refused, because the series diverges. With 0, the default, the inverse is
    exact. ``vectors: false`` fixes alpha and beta at 1.

    Reference: PSOFT (arXiv 2505.11235, ICLR 2026), eq. of section 3. Differs: exact Cayley by default (so does PEFT).
    """

    S: Tensor
    lower: Tensor
    upper: Tensor
    side = "input"
    default_lr = 1e-3
    default_rank = 46

    def __init__(self, S: Tensor, *, neumann_terms: int = 0, vectors: bool = True) -> None:
        super().__init__()
        if not isinstance(neumann_terms, int) or isinstance(neumann_terms, bool) or neumann_terms < 0:
            raise ConfigError("adapter.options.neumann_terms", f"got {neumann_terms!r}", allowed="0 (exact) or more")
        rank = S.shape[0]
        self.neumann_terms = neumann_terms
        self.branches = neumann_terms > 0  # the norm is checked before the series is used
        upper, lower = torch.triu_indices(rank, rank, offset=1)
        for name, buffer in (("S", S), ("upper", upper.to(S.device)), ("lower", lower.to(S.device))):
            self.register_buffer(name, buffer, persistent=False)
        self.skew = nn.Parameter(S.new_zeros(rank * (rank - 1) // 2))
        self.alpha = nn.Parameter(S.new_ones(rank if vectors else 0))
        self.beta = nn.Parameter(S.new_ones(rank if vectors else 0))

    def turned(self) -> Tensor:
        """Compute R - I, shape (R, R), without cancellation, so that it is exactly zero for Q = 0."""
        rank = self.S.shape[0]
        Q = self.S.new_zeros(rank, rank).index_put((self.upper, self.lower), self.skew)
        Q = Q - Q.T
        identity = torch.eye(rank, dtype=Q.dtype, device=Q.device)
        if self.neumann_terms:
            self._check_norm(Q)
            inverse, power = identity, identity
            for _ in range(self.neumann_terms):
                power = -power @ Q
                inverse = inverse + power
            return (identity - Q) @ inverse - identity
        # (I - Q)(I + Q)^-1 - I = -2 Q (I + Q)^-1, and Q commutes with the inverse.
        solved: Tensor = torch.linalg.solve(identity + Q, -2 * Q)
        return solved

    def coefficients(self, *, delta: bool) -> Coefficients:
        """Return (K,) or (K - diag(S),), shape (R, R)."""
        turned = self.turned()
        if self.alpha.numel():
            scale = self.beta[:, None] * self.alpha
            # beta R^T alpha - I = beta (R^T - I) alpha + (beta alpha - 1) on the diagonal.
            turned = scale * turned.T + torch.diag(self.beta * self.alpha - 1)
        else:
            turned = turned.T
        change = self.S[:, None] * turned
        return (change if delta else change + torch.diag(self.S),)

    @override
    @torch.no_grad()
    def angles(self) -> Tensor:
        """Return the angles of the planes that R rotates, from the eigenvalues +-i tan(angle / 2) of Q."""
        # On the CPU: the parameters of a sharded model are gathered there, to be read, and its buffers stay on the GPU;
        # and not every build of torch has eigenvalues of a general matrix for GPUs.
        rank, skew = self.S.shape[0], self.skew.cpu()
        Q = skew.new_zeros(rank, rank).index_put((self.upper.cpu(), self.lower.cpu()), skew)
        tangents: Tensor = torch.linalg.eigvals((Q - Q.T).double()).imag
        return 2 * tangents.sort(descending=True).values[: rank // 2].clamp(min=0).atan()

    @torch.no_grad()
    def _check_norm(self, Q: Tensor) -> None:
        norm = float(torch.linalg.matrix_norm(to_float64(Q), ord=2))
        if norm >= 1:
            raise ConfigError(
                "adapter.options.neumann_terms",
                f"the series diverges: the skew matrix has norm {norm:.2f}",
                allowed="norms below 1",
                fix="Use neumann_terms=0 (exact), or lower --lr",
            )
