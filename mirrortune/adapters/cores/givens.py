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
    """Plane rotations: K = R(theta) diag(S) on the output side, K = diag(S) R(theta) on the input side.

    R = R_n ... R_1 with n = ``rounds``. Each round consists of disjoint plane rotations: R_ii = R_jj = cos(theta),
    R_ij = -sin(theta), R_ji = sin(theta) for each of its pairs i < j; unpaired axes are fixed. Initially theta = 0. The
    trained parameters are one angle per pair, P = floor(R / 2) per round (fewer if the pairing leaves directions
    unpaired), and k scales for ``scale_top_k``, which replaces S by S (1 + lambda) in the k leading directions.

    At full rank, the output side satisfies W' = (U R U^T) W: all singular values and the input-side geometry
    (W'^T W' = W^T W) are preserved, unless ``scale_top_k`` changes the singular values.

    One round reaches a torus of P dimensions in the rotation group SO(R), which has R (R - 1) / 2 dimensions. Rounds
    that contain every pair of directions once (R - 1 rounds of mirror pairs, or R for odd R) have as many angles as the
    group has dimensions. Their derivatives at theta = 0 span its Lie algebra, so they reach every rotation near the
    identity; since SO(R) is compact and connected, finitely many such cycles reach every rotation.

    ``unit`` is the unit of the trained parameters. With ``angle``, angles are in radians and scales relative to their
    singular value. An optimizer that makes equal steps in all parameters, like Adam, then moves the weight by
    sqrt(S_i^2 + S_j^2) per angle and S_i per scale: far in strong directions and hardly at all in weak ones. With
    ``movement``, parameters are multiplied by factors such that every step moves the weight as far as in a plane or
    direction of the layer's root mean square strength (:func:`~mirrortune.adapters.core.even_steps`); with ``weight``,
    such that a scale moves the weight by its own size in the Frobenius norm, in every layer, as do the parameters of
    SVFT and LoRA-SB, and an angle by sqrt(2) times its size. All units reach the same weights.

    Reference: mirror-paired rotation of the output-side singular subspace (Kim & Baik), with one round. It specifies
    neither the position of diag(S) nor the initial angles; only between U and diag(S) are the axes of R ordered by
    strength. Several rounds and the units ``movement`` and ``weight`` are additions of mirrortune. The scale is the
    rescaling half of SpecLoRA (arXiv 2505.23099), combined with the rotation here.
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
        unit: Literal["movement", "weight", "angle"] = "movement",
    ) -> None:
        super().__init__()
        if side not in ("output", "input"):
            raise ConfigError("adapter.options.side", f"got {side!r}", allowed="output, input")
        if unit not in ("movement", "weight", "angle"):
            raise ConfigError("adapter.options.unit", f"got {unit!r}", allowed="movement, weight, angle")
        self.side = side
        rank = S.shape[0]
        num_scales = checked_top_k(scale_top_k, rank, "adapter.options.scale_top_k")
        found = split_rounds(pairs)
        _check_pairs(pairs, len(found), rank, rounds)
        partner = torch.arange(rank).repeat(len(found), 1)
        # Unpaired axes have the first plane, with the sign 0.
        plane = torch.zeros(len(found), rank, dtype=torch.long)
        sign = torch.zeros(len(found), rank)
        done = 0
        for index, own in enumerate(found):
            lower, upper = own[:, 0], own[:, 1]
            partner[index, lower], partner[index, upper] = upper, lower
            plane[index, lower] = plane[index, upper] = torch.arange(done, done + len(own))
            sign[index, lower], sign[index, upper] = -1.0, 1.0
            done += len(own)
        # Mirror pairs reverse the order of directions, and reversing is several times faster than gathering.
        self._reverses = tuple(torch.equal(own, torch.arange(rank).flip(0)) for own in partner)
        buffers = {"S": S, "pairs": pairs, "partner": partner, "plane": plane, "sign": sign}
        buffers |= _steps(S, pairs.to(S.device), num_scales, unit)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer.to(S.device), persistent=False)
        self.theta = trained(S, pairs.shape[0])
        self.scale = trained(S, num_scales)

    def coefficients(self, *, delta: bool) -> Coefficients:
        """Return (a, b, partner), each (n, R): (K z)_i = a_i z_i + b_i z_partner(i), applied n times, round 1 first.

        diag(S) is part of the first round on the output side and of the last round on the input side. If ``delta``, a
        single round has a - S instead of a; several rounds have S as a fourth coefficient, subtracted at the end.
        """
        angle = self._signed_angles()
        scaled = self.S
        if self.scale.numel():
            scaled = self.S * (1 + zero_padded(self.scale * self.scale_step, self.S.shape[0]))
        is_exact = delta and len(angle) == 1
        if is_exact:
            # cos - 1 = -2 sin^2(angle / 2) avoids cancellation, so small angles keep all their digits.
            own = torch.sin(angle / 2).square() * (-2 * scaled)
            if self.scale.numel():
                own = own + (scaled - self.S)
        else:
            own = torch.cos(angle) * self._in_its_round(scaled)
        across = scaled[self.partner[0]] if self.side == "output" else scaled
        cross = torch.sin(angle) * self._in_its_round(across)
        return (own, cross, self.partner, self.S) if delta and not is_exact else (own, cross, self.partner)

    @override
    def relative_coefficients(self, side: Literal["output", "input"]) -> Coefficients | None:
        if len(self.partner) > 1:
            return None
        angle = self._signed_angles()
        own, cross = -2 * torch.sin(angle / 2).square(), torch.sin(angle)
        if self.scale.numel():
            change = zero_padded(self.scale * self.scale_step, self.S.shape[0])
            own = own * (1 + change) + change
            cross = cross * (1 + (change[self.partner[0]] if self.side == "output" else change))
        if side != self.side:
            across = self.S[self.partner[0]]
            cross = cross * (across / self.S if side == "input" else self.S / across)
        return own, cross, self.partner

    @override
    def angles(self) -> Tensor:
        # The parameters of a sharded model are gathered on the CPU, to be read; its buffers stay on the GPU.
        return self.theta * self.theta_step.to(self.theta.device)

    def _signed_angles(self) -> Tensor:
        """Return the angle of each axis in each round, (n, R): negative for the lower of a pair, zero for unpaired."""
        return self.angles()[self.plane] * self.sign if self.theta.numel() else self.sign

    @override
    def mix(self, z: Tensor, *coefficients: Tensor) -> Tensor:
        """Apply K with one exchange of partners and two element-wise products per round."""
        own, cross, partner, *start = coefficients
        turned = z
        for t in range(len(own)):
            turned = self._turned(turned, own[t], cross[t], partner, t)
        # The cancellation error is no larger than the rounding of the frozen layer's output, to which this is added.
        return turned - start[0] * z if start else turned

    @override
    def mix_rows(self, z: Tensor, dims: Sequence[int | None], *coefficients: Tensor) -> Tensor:
        # Avoids vmap, whose overhead exceeds the cost of the products for a few positions.
        own, cross, *rest = coefficients
        if any(dim is not None for dim in dims[2:]):  # pairs differ by row
            return super().mix_rows(z, dims, *coefficients)
        # (n, N, 1, R): rounds first, as mix takes them.
        turns = [c if d is None else c.movedim(0, 1)[:, :, None] for c, d in zip((own, cross), dims[:2], strict=True)]
        return self.mix(z, *turns, *rest)

    @override
    def mix_backward(self, z: Tensor, grad: Tensor, *coefficients: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Compute the gradients from z alone, recovering the input of each round by inverting the round.

        ``partner`` is its own inverse, and every round except the one with diag(S) is orthogonal, so its inverse has -b
        instead of b. The round with diag(S) need not be inverted: it is the first, whose input is z, or the last, whose
        output is not needed.
        """
        own, cross, partner, *start = coefficients
        entering = z
        for t in range(len(own) - 1):
            entering = self._turned(entering, own[t], cross[t], partner, t)
        grad_z, grad_own, grad_cross = grad, [], []
        for t in reversed(range(len(own))):
            across = self._swapped(grad_z, partner, t)
            # Not einsum, which computes these column sums as R products of length N and takes a third of a CPU step.
            product = grad_z * entering
            grad_own.append(product.sum(dim=0))
            torch.mul(across, entering, out=product)
            grad_cross.append(self._swapped(product.sum(dim=0), partner, t))
            across *= self._swapped(cross[t], partner, t)
            grad_z = torch.mul(own[t], grad_z, out=product)
            grad_z += across
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

    def _turned(self, z: Tensor, a: Tensor, b: Tensor, partner: Tensor, t: int) -> Tensor:
        """Return round ``t`` of ``z`` (..., R), a z_i + b z_partner(i).

        In place where it can be: on a CPU, getting new memory for (N, R) numbers takes longer than multiplying them.
        """
        across = self._swapped(z, partner, t)  # a copy
        across *= b
        turned = a * z
        turned += across
        return turned

    def _swapped(self, z: Tensor, partner: Tensor, t: int) -> Tensor:
        """Return ``z`` (..., R) with the partners of round ``t`` exchanged."""
        return z.flip(-1) if self._reverses[t] else z.index_select(-1, partner[t])

    def _in_its_round(self, scaled: Tensor) -> Tensor:
        """Return ``scaled`` (R,) as the factor of the round with diag(S), and ones for the other rounds, (n, R)."""
        if len(self.partner) == 1:
            return scaled
        others = scaled.new_ones(len(self.partner) - 1, len(scaled))
        return torch.cat([scaled[None], others] if self.side == "output" else [others, scaled[None]])


def _steps(
    S: Tensor, pairs: Tensor, num_scales: int, unit: Literal["movement", "weight", "angle"]
) -> dict[str, Tensor]:
    """Return the radians per unit of theta, and the relative change of the singular value per unit of scale."""
    if unit == "angle":
        return {"theta_step": S.new_ones(len(pairs)), "scale_step": S.new_ones(num_scales)}
    of_plane = plane_strengths(S)[pairs[:, 0], pairs[:, 1]]
    return {"theta_step": even_steps(of_plane, S, unit=unit), "scale_step": even_steps(S[:num_scales], S, unit=unit)}


def _check_pairs(pairs: Tensor, needed: int, rank: int, rounds: int) -> None:
    if rounds < needed:
        problem = f"got {rounds!r}, and the pairs overlap: they take {needed} rounds"
        raise ConfigError("adapter.options.rounds", problem, allowed=f"{needed} or more")
    is_ordered = bool((pairs[:, 0] < pairs[:, 1]).all())
    if not is_ordered or (len(pairs) and not 0 <= int(pairs.min()) <= int(pairs.max()) < rank):
        problem = "pairs i, j must have i < j, and name directions that are kept"
        raise ConfigError("adapter.pairing", problem, allowed=f"0 to {rank - 1}")
