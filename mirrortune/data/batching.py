# SPDX-License-Identifier: Apache-2.0
"""Which rows form which batch, as pure functions of lengths, seed and epoch; and a batch on its way through a model.

The unit is the *global batch*: the rows of one optimizer step over all ranks and accumulation steps. It is drawn
without regard to how it will be cut, so 1 x 8, 2 x 4 and 8 x 1 (micro-batch x accumulation), on one process or two,
step through the same rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mirrortune.data.examples import Batch, Rows
from mirrortune.system.precision import autocast

# Global batches sorted together by length: enough to make padding small, few enough to leave the order random.
_BUCKET = 32


def epoch_batches(lengths: npt.NDArray[Any], global_batch_size: int, seed: int, epoch: int) -> list[Rows]:
    """The global batches of one epoch, in order: every row once, rows of similar length together.

    Args:
        lengths: tokens of each row, shape (N,).
        global_batch_size: rows of one optimizer step; the last batch may be smaller.
        seed: of the run.
        epoch: from 0; each has its own order.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    span = global_batch_size * _BUCKET
    batches: list[Rows] = []
    for start in range(0, len(order), span):
        bucket = order[start : start + span]
        bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
        batches += [bucket[i : i + global_batch_size] for i in range(0, len(bucket), global_batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


def micro_batches(batch: Rows, lengths: npt.NDArray[Any], *, num_micro: int, num_ranks: int, rank: int) -> list[Rows]:
    """The parts of a global batch that ``rank`` computes: exactly ``num_micro`` of them, some possibly empty.

    Rows are sorted by length first, so that each part is padded little.
    """
    ordered = batch[np.argsort(lengths[batch], kind="stable")]
    return np.array_split(ordered, num_micro * num_ranks)[rank::num_ranks]


def forward(model: nn.Module, batch: Batch, device: torch.device) -> tuple[Batch, Any, Tensor]:
    """Run a model on a batch: its inputs on ``device``, what the model gave, and the targets on ``device``."""
    inputs = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
    targets = inputs.pop("targets")
    with autocast(model):
        return inputs, model(**inputs), targets
