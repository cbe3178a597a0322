# SPDX-License-Identifier: Apache-2.0
"""The rows of a split as a model takes them: what the loop asks of any kind of rows, and sequences of tokens.

Sequences are kept unpadded, end to end, with offsets; padding belongs to batches. Shapes: N rows, B rows of a batch,
T tokens of all rows together, L tokens of the longest row of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mirrortune.errors import counted

IntArray = npt.NDArray[np.integer[Any]]
Targets = npt.NDArray[np.generic]
Rows = npt.NDArray[np.int64]
Batch = dict[str, Any]
"""What a model's forward takes, by name, and ``targets``: tensors whose first dimension is B, and plain switches."""
OPTIONAL_ROLE = "optional"
"""What :meth:`mirrortune.tasks.base.Task.columns` calls a column that a split may lack."""
IGNORE_INDEX = -100  # the target of a position that has none; what torch's cross-entropy ignores


class Examples(Protocol):
    """The rows of one split, ready to be made into batches."""

    @property
    def num_truncated(self) -> int:
        """Rows cut to the maximum length."""

    @property
    def num_unlabelled(self) -> int:
        """Rows without a target."""

    @property
    def lengths(self) -> IntArray:
        """Positions of each row in the model, shape (N,): rows of similar length are batched together."""

    def __len__(self) -> int: ...

    def extremes(self) -> Rows:
        """A few rows among which are the longest, and those with the largest index of every kind."""

    def batch(self, rows: Rows, epoch: int | None = None) -> Batch:
        """The given rows as tensors; ``epoch`` (from 0) if they are to be learned from, None if they are scored."""

    def describe(self) -> str:
        """Rows, lengths and what was cut or left out, in words."""

    def verify(self, model: nn.Module) -> None:
        """Refuse, by a ConfigError, a model that does not treat the batches as they mean it to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Padding:
    """How sequences are brought to one length.

    Attributes:
        side: ``"right"`` or ``"left"``.
        fill: name of a feature -> what its padding holds.
    """

    side: str
    fill: dict[str, int]

    @classmethod
    def of(cls, tokenizer: Any) -> Padding:
        """The padding that ``tokenizer`` itself would use; targets of padded positions are ignored."""
        types = tokenizer.pad_token_type_id
        fill = {
            "input_ids": tokenizer.pad_token_id or 0,
            "token_type_ids": types,
            "targets": IGNORE_INDEX,
            "weights": 0,
        }
        return cls(side=tokenizer.padding_side, fill=fill)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenExamples:
    """Rows of tokens; see :class:`Examples`.

    Attributes:
        features: name -> values of all rows end to end, shape (T,), int32: ``input_ids``, and where there are any
            ``token_type_ids``, one of the ``targets`` for every token, and its weight in the loss.
        offsets: shape (N + 1,), int64; row i is [offsets[i], offsets[i + 1]).
        targets: one a row, shape (N, ...), or None where every token has its own.
        padding: of batches.
        max_length: longest row allowed, in tokens.
        num_truncated: rows cut to ``max_length``.
        num_empty: rows whose texts are all blank.
        num_dropped: blank rows that were left out.
        num_unlabelled: rows without a target.
        switches: further arguments of the model's forward.
        notes: what else is worth knowing of the rows.
        references: what metrics compare with where that is not ``targets``; the kind's own.
    """

    features: dict[str, IntArray]
    offsets: IntArray
    targets: Targets | None
    padding: Padding
    max_length: int
    num_truncated: int = 0
    num_empty: int = 0
    num_dropped: int = 0
    num_unlabelled: int = 0
    switches: dict[str, bool] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    references: Any = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> IntArray:
        """Tokens of each row, shape (N,)."""
        return np.diff(self.offsets)

    def extremes(self) -> Rows:
        """See :class:`Examples`."""
        places = [int(values.argmax()) for name, values in self.features.items() if name not in ("targets", "weights")]
        rows = np.searchsorted(self.offsets, places, side="right") - 1
        return np.unique([*rows, int(self.lengths.argmax())])

    def batch(self, rows: Rows, epoch: int | None = None) -> Batch:
        """The given rows, padded to the longest of them.

        Returns:
            ``input_ids``, ``attention_mask`` (and ``token_type_ids``), each (B, L) int64, and ``targets``, (B, ...) or
            (B, L), with weights (B, 2, L).
        """
        batch, mask = pad_rows(self.features, self.offsets, rows, self.padding)
        if "weights" in batch:
            batch["targets"] = torch.stack([batch["targets"], batch.pop("weights")], dim=1)
        batch |= {"attention_mask": mask, **self.switches}
        if self.targets is not None:
            batch["targets"] = torch.from_numpy(np.ascontiguousarray(self.targets[rows]))
        return batch

    def describe(self) -> str:
        """Rows, lengths in tokens, and what was cut or left out."""
        median, longest = int(np.median(self.lengths)), int(self.lengths.max())
        text = f"{counted(len(self), 'row')}, {median} tokens (median), {longest} at most"
        if self.num_truncated:
            text += f"; {self.num_truncated} truncated to {self.max_length}"
        if self.num_empty:
            text += f"; {self.num_empty} blank ({'left out' if self.num_dropped else 'kept'})"
        return "; ".join((text, *self.notes))

    def verify(self, model: nn.Module) -> None:
        """Nothing: every model takes rows side by side."""


def pad_rows(features: dict[str, IntArray], offsets: IntArray, rows: Rows, padding: Padding) -> tuple[Batch, Tensor]:
    """Cut the given rows out of end-to-end ``features`` and pad them to the longest.

    Returns:
        Name -> (B, L) int64, and the attention mask (B, L) int64.
    """
    starts, lengths = offsets[rows], np.diff(offsets)[rows]
    width = int(lengths.max())
    left = padding.side == "left"
    batch: Batch = {}
    for name, values in features.items():
        padded = np.full((len(rows), width), padding.fill[name], dtype=np.int64)
        for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            padded[i, (width - length if left else 0) : (width if left else length)] = values[start : start + length]
        batch[name] = torch.from_numpy(padded)
    position = np.arange(width)
    mask = position >= (width - lengths)[:, None] if left else position < lengths[:, None]
    return batch, torch.from_numpy(mask.astype(np.int64))
