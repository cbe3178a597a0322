# SPDX-License-Identifier: Apache-2.0
"""Scores of tokens from logits over a vocabulary, piece by piece: logits of a batch are large, and float32 copies of
all of them larger still.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mirrortune.data.examples import IGNORE_INDEX

_LARGEST_PIECE = 2**24
"""Logits that are converted to float32 at a time: 64 MiB."""


def score_tokens(logits: Tensor, targets: Tensor) -> Tensor:
    """Score every row of a batch.

    Args:
        logits: shape (B, L, V), any floating dtype.
        targets: the right token at each place, shape (B, L); ``IGNORE_INDEX`` where none is scored.

    Returns:
        Summed cross-entropy, number of places where the likeliest token is the right one, and number of places scored:
        shape (B, 3), float64, on the CPU.
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
    """Cross-entropy summed over all scored places of a batch, and their number; arguments as of :func:`score_tokens`.

    Where a gradient is wanted, it is one product over the scored places, on the device of ``logits``.
    """
    learned = targets != IGNORE_INDEX
    if torch.is_grad_enabled():
        return F.cross_entropy(logits[learned].float(), targets[learned], reduction="sum"), learned.sum()
    return score_tokens(logits, targets)[:, 0].sum(), learned.sum()
