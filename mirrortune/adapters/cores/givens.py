# SPDX-License-Identifier: Apache-2.0
"""Givens (plane) rotations of paired singular directions, in one round or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from mirrortune.adapters.core import (
    CORES,
    Coefficients,
    Core,
    checked_top_k,
    even_steps,
    plane_strengths,
    trained,
    zero_padded,
)
from mirrortune.adapters.pairings.encoding import split_rounds
from mirrortune.errors import ConfigError


@CORES.register("givens")
class Givens(Core):
    """Rotation by plane rotations, K = R(theta) diag(S) on the output side, diag(S) R(theta) on the input side.

    R = R_n ... R_1, n = ``rounds``, each round made of non-overlapping plane rotations: R_ii = R_jj = cos, R_ij = -sin,
    R_ji = sin for each of its pairs i < j; unpaired axes stay. theta = 0 at the start. Trained numbers: one angle per
    pair, P = floor(R / 2) a round (fewer where the pairing pairs fewer), plus k for ``scale_top_k``, which puts
    S (1 + lambda) in place of S for the k leading directions.

    At full rank the output side satisfies W' = (U R U^T) W: every singular value and the whole input-side geometry
    (W'^T W' = W^T W) are kept, unless ``scale_top_k`` changes the singular values.

    One round reaches a torus of P dimensions inside the rotation group SO(R), which has R (R - 1) / 2. Rounds that
    contain every pair of directions once (R - 1 rounds of mirror pairs, R for odd R) have as many angles as the group
    has dimensions, and their derivatives at theta = 0 span its Lie algebra, so that they reach every rotation near the
    identity; SO(R) is compact and connected, so that finitely many such cycles reach every rotation.

    ``unit`` is the unit of the trained numbers. ``angle``: radians, and scales relative to their singular value.
    ``movement``: each number is multiplied so that a step moves the weight as far as it would in a plane, or a
    direction, of the layer's root mean square strength (:func:`~mirrortune.adapters.core.even_steps`). An optimizer
    that makes equal steps in all parameters, as Adam does, otherwise moves the weight by sqrt(S_i^2 + S_j^2) per angle
    and S_i per scale: far in the strong directions and hardly in the weak ones. Both units reach the same weights.

    Reference: mirror-paired rotation of the output-side singular subspace (Kim & Baik), one round. It states neither
    where diag(S) goes nor the initial angles; R between U and diag(S) is the one place where axes are ordered by
    strength. Several rounds and the unit ``movement`` are additions of mirrortune. The scale is the rescaling half of
    SpecLoRA (arXiv 2505.23099), composed with the rotation here.
    """

    S: Tensor
    pairs: Tensor
    partner: Tensor
    plane: Tensor
    sign: Tensor
    theta_step: Tensor
    scale_step: Tensor
    side: Literal["output", "input", "both"] = "output"
    default_lr = 2e-2
    default_pairing = "mirror"

    def __init__(
        self,
        S: Tensor,
        pairs: Tensor,
        *,
        side: Literal["output", "input"] = "output",
        rounds: int = 1,
        scale_top_k: int | Literal["all"] = 0,
        unit: Literal["movement", "angle"] = "movement",
    ) -> None:
        super().__init__()
        if side not in ("output", "input"):
            raise ConfigError("adapter.options.side", f"got {side!r}", allowed="output, input")
        if unit not in ("movement", "angle"):
            raise ConfigError("adapter.options.unit", f"got {unit!r}", allowed="movement, angle")
        self.side = side
        rank = S.shape[0]
        num_scales = checked_top_k(scale_top_k, rank, "adapter.options.scale_top_k")
        found = split_rounds(pairs)
        _check_pairs(pairs, len(found), rank, rounds)
        partner = torch.arange(rank).repeat(len(found), 1)
        # The extra plane at the end is the zero angle of unpaired axes.
        plane = torch.full((len(found), rank), pairs.shape[0])
        sign = torch.zeros(len(found), rank)
        done = 0
        for index, own in enumerate(found):
            lower, upper = own[:, 0], own[:, 1]
            partner[index, lower], partner[index, upper] = upper, lower
            plane[index, lower] = plane[index, upper] = torch.arange(done, done + len(own))
            sign[index, lower], sign[index, upper] = -1.0, 1.0
            done += len(own)
        # Mirror pairs are the reversed order, and reversing is several times as fast as gathering.
        self._reverses = tuple(torch.equal(own, torch.arange(rank).flip(0)) for own in partner)
        buffers = {"S": S, "pairs": pairs, "partner": partner, "plane": plane, "sign": sign}
        buffers |= _steps(S, pairs.to(S.device), num_scales, unit)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer.to(S.device), persistent=False)
        self.theta = trained(S, pairs.shape[0])
        self.scale = trained(S, num_scales)

    def coefficients(self, *, delta: bool) -> Coefficients:
        """Return (a, b, partner), each (n, R): (K z)_i = a_i z_i + b_i z_partner(i), applied n times, round 1 first.

        diag(S) is a factor of the first round on the output side and of the last on the input side. When ``delta``, a
        single round has a - S in place of a; several rounds have S as a fourth coefficient, subtracted at the end.
        """
        angle = torch.cat([self.angles(), self.theta.new_zeros(1)])[self.plane] * self.sign
        scaled = self.S
        if self.scale.numel():
            scaled = self.S * (1 + zero_padded(self.scale * self.scale_step, self.S.shape[0]))
        is_exact = delta and len(angle) == 1
        if is_exact:
            # cos - 1 = -2 sin^2(angle / 2) without cancellation, so small angles keep all their digits.
            own = -2 * torch.sin(angle / 2).square() * scaled + (scaled - self.S)
        else:
            own = torch.cos(angle) * self._in_its_round(scaled)
        across = scaled[self.partner[0]] if self.side == "output" else scaled
        cross = torch.sin(angle) * self._in_its_round(across)
        return (own, cross, self.partner, self.S) if delta and not is_exact else (own, cross, self.partner)

    @override
    def angles(self) -> Tensor:
        return self.theta * self.theta_step

    @override
    def mix(self, z: Tensor, *coefficients: Tensor) -> Tensor:
        """Apply K by one exchange of partners and two products per round."""
        own, cross, partner, *start = coefficients
        turned = z
        for t, (a, b) in enumerate(zip(own, cross, strict=True)):
            turned = a * turned + b * self._swapped(turned, partner, t)
        # This cancels, but to no more than the rounding of the frozen layer's own output, to which it is added.
        return turned - start[0] * z if start else turned

    @override
    def mix_rows(self, z: Tensor, dims: Sequence[int | None], *coefficients: Tensor) -> Tensor:
        # Without vmap, which costs more than the products of a few positions.
        own, cross, *rest = coefficients
        if any(dim is not None for dim in dims[2:]):  # pairs of their own
            return super().mix_rows(z, dims, *coefficients)
        # (n, N, 1, R): rounds first, as mix takes them.
        turns = [c if d is None else c.movedim(0, 1)[:, :, None] for c, d in zip((own, cross), dims[:2], strict=True)]
        return self.mix(z, *turns, *rest)

    @override
    def mix_backward(self, z: Tensor, grad: Tensor, *coefficients: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Compute the gradients from z alone: the input of each round is recovered by inverting the round.

        Uses that ``partner`` is its own inverse, and that every round but the one that holds diag(S) is orthogonal, so
        that its inverse has -b in place of b. The exception is the first round, whose input is z, or the last, whose
        output is not needed.
        """
        own, cross, partner, *start = coefficients
        entering = z
        for t, (a, b) in enumerate(zip(own[:-1], cross[:-1], strict=True)):
            entering = a * entering + b * self._swapped(entering, partner, t)
        grad_z, grad_own, grad_cross = grad, [], []
        for t in reversed(range(len(own))):
            # Not einsum: it makes R products of length N of these column sums and takes a third of a CPU step for it.
            grad_own.append((grad_z * entering).sum(dim=0))
            grad_cross.append((grad_z * self._swapped(entering, partner, t)).sum(dim=0))
            grad_z = own[t] * grad_z + self._swapped(cross[t] * grad_z, partner, t)
            if t > 1:
                back = self._swapped(entering, partner, t - 1)
                entering = own[t - 1] * entering - cross[t - 1] * back
            else:
                entering = z
        found: tuple[Tensor | None, ...] = (torch.stack(grad_own[::-1]), torch.stack(grad_cross[::-1]), None)
        if start:
            grad_z = grad_z - start[0] * grad
            found = (*found, -(grad * z).sum(dim=0))
        return grad_z, found

    @override
    def forget_own_pairs(self) -> None:
        self._reverses = (False,) * len(self._reverses)

    def _swapped(self, z: Tensor, partner: Tensor, t: int) -> Tensor:
        """Return ``z`` (..., R) with the partners of round ``t`` exchanged."""
        return z.flip(-1) if self._reverses[t] else z.index_select(-1, partner[t])

    def _in_its_round(self, scaled: Tensor) -> Tensor:
        """Return ``scaled`` (R,) as the factor of the round that holds diag(S), ones for the others; (n, R)."""
        others = scaled.new_ones(len(self.partner) - 1, len(scaled))
        return torch.cat([scaled[None], others] if self.side == "output" else [others, scaled[None]])


def _steps(S: Tensor, pairs: Tensor, num_scales: int, unit: str) -> dict[str, Tensor]:
    """Return the radians per unit of theta, and the share of the singular value per unit of scale."""
    if unit == "angle":
        return {"theta_step": S.new_ones(len(pairs)), "scale_step": S.new_ones(num_scales)}
    of_plane = plane_strengths(S)[pairs[:, 0], pairs[:, 1]]
    return {"theta_step": even_steps(of_plane, S), "scale_step": even_steps(S[:num_scales], S)}


def _check_pairs(pairs: Tensor, needed: int, rank: int, rounds: int) -> None:
    if rounds < needed:
        problem = f"got {rounds!r}, and the pairs overlap: they take {needed} rounds"
        raise ConfigError("adapter.options.rounds", problem, allowed=f"{needed} or more")
    is_ordered = bool((pairs[:, 0] < pairs[:, 1]).all())
    if not is_ordered or (len(pairs) and not 0 <= int(pairs.min()) <= int(pairs.max()) < rank):
        problem = "pairs i, j must have i < j, and name directions that are kept"
        raise ConfigError("adapter.pairing", problem, allowed=f"0 to {rank - 1}")
