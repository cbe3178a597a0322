# SPDX-License-Identifier: Apache-2.0
"""Token-level loss and accuracy from logits over a vocabulary, computed in pieces so that the logits of a batch, which
are large, are never copied to float32 all at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mirrortune.data.examples import IGNORE_INDEX

_LARGEST_PIECE = 2**24
"""Number of logits converted to float32 at a time: 64 MiB."""

WEIGHT_UNIT = 1_000_000  # weights in the loss are stored as integers, in millionths


def score_tokens(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the token-level loss and accuracy of each row of a batch.

    Args:
        logits: shape (B, L, V), any floating-point dtype.
        targets: target token at each position, shape (B, L); ``IGNORE_INDEX`` at positions that are not scored.

    Returns:
        Summed cross-entropy, number of correct predictions, and number of scored positions: shape (B, 3), float64, on
        the CPU.
    """
    length = max(1, _LARGEST_PIECE // logits.shape[-1])
    rows = []
    for row_logits, row_targets in zip(logits, targets, strict=True):
        loss, right, count = 0.0, 0, 0
        for piece, wanted in zip(row_logits.split(length), row_targets.split(length), strict=True):
            learned = wanted != IGNORE_INDEX
            scores, tokens = piece[learned].float(), wanted[learned]
            loss += float(F.cross_entropy(scores, tokens, reduction="sum"))
            right += int((scores.argmax(dim=-1) == tokens).sum())
            count += len(tokens)
        rows.append((loss, right, count))
    return torch.tensor(rows, dtype=torch.float64)


def summed_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy summed over the scored positions of a batch, and the number of these positions.

    The arguments are those of :func:`score_tokens`. With gradients enabled, all positions are computed at once.
    """
    learned = targets != IGNORE_INDEX
    if torch.is_grad_enabled():
        return F.cross_entropy(logits[learned].float(), targets[learned], reduction="sum"), learned.sum()
    return score_tokens(logits, targets)[:, 0].sum(), learned.sum()


def weighted_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of the cross-entropy and the sum of the weights.

    Args:
        logits: shape (B, L, V).
        targets: target tokens and their weights in millionths, shape (B, 2, L).
    """
    wanted, weights = targets[:, 0, 1:], targets[:, 1, 1:]
    learned = wanted != IGNORE_INDEX
    each = F.cross_entropy(logits[:, :-1][learned].float(), wanted[learned], reduction="none")
    weights = weights[learned].to(each.dtype) / WEIGHT_UNIT
    return (each * weights).sum(), weights.sum()
