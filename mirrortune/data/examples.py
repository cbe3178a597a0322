# SPDX-License-Identifier: Apache-2.0
"""Encoded rows: the interface that training uses for all types of rows, and its implementation for tokens.

Token sequences are stored concatenated without padding, with offsets; batches are padded. Shapes: N rows, B rows of a
batch, T tokens of all rows, L tokens of the longest row of a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from typing_extensions import override

from mirrortune.errors import counted

IntArray = npt.NDArray[np.integer[Any]]
Targets = npt.NDArray[np.generic]
Rows = npt.NDArray[np.int64]
Batch = dict[str, Any]
"""Arguments of a model's ``forward`` by name, and ``targets``: tensors whose first dimension is B, and flags."""
OPTIONAL_ROLE = "optional"
"""Role of a column that may be missing in a split; see :meth:`mirrortune.tasks.base.Task.columns`."""
IGNORE_INDEX = -100  # target of positions that are not scored; ignored by torch's cross-entropy


class Examples(ABC):
    """The encoded rows of one split, from which batches are made.

    Attributes:
        num_truncated: number of rows truncated to the maximum length.
        num_unlabelled: number of rows without a target.
    """

    __slots__ = ()
    num_truncated: int
    num_unlabelled: int

    @property
    @abstractmethod
    def lengths(self) -> IntArray:
        """Number of model positions of each row, shape (N,); rows of similar length are batched together."""

    @property
    def num_tokens(self) -> IntArray:
        """Number of tokens of each row without padding, shape (N,)."""
        return self.lengths

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, rows: Rows, epoch: int | None = None) -> Batch:
        """Return a batch of the given rows; ``epoch`` (from 0) is given in training, and None in evaluation."""

    @abstractmethod
    def describe(self) -> str:
        """Return a line with the number of rows, their lengths, and the numbers truncated and left out."""

    @property
    def row_numbers(self) -> Rows:
        """Index of each row's source among the kept rows of the split, shape (N,)."""
        return np.arange(len(self))

    @property
    def split_rows(self) -> Rows:
        """Index of each row's source among all rows of the split, shape (N,); the first if several share a sequence."""
        kept: Rows | None = getattr(self, "kept", None)
        return self.row_numbers if kept is None else kept[self.row_numbers]

    @property
    def used_rows(self) -> Rows:
        """Indices of the rows of the split that were not left out."""
        return np.unique(self.split_rows)

    def extremes(self) -> Rows:
        """Return the indices of a few rows, among them the longest and those with the largest index of each type."""
        return np.array([int(self.lengths.argmax())])

    def token_ids(self) -> list[IntArray]:
        """Return the token ids of all rows, as arrays of any length; an empty list for rows that are not text."""
        return []

    def input_ids(self, row: int) -> IntArray | None:
        """Return the token ids of one row, shape (L,); None if it is not a single text or pair."""
        return None

    def verify(self, model: nn.Module) -> None:
        """Check that a model processes these batches correctly; raise a ConfigError if it does not."""
        return


@dataclass(frozen=True, slots=True, kw_only=True)
class Padding:
    """How the sequences of a batch are padded to the same length.

    Attributes:
        side: ``"right"`` or ``"left"``.
        fill: padding value of each feature, by name.
    """

    side: str
    fill: dict[str, int]

    @classmethod
    def of(cls, tokenizer: Any) -> Padding:
        """Return the padding that ``tokenizer`` uses; targets at padded positions are ignored."""
        types = tokenizer.pad_token_type_id
        fill = {
            "input_ids": tokenizer.pad_token_id or 0,
            "token_type_ids": types,
            "targets": IGNORE_INDEX,
            "weights": 0,
        }
        return cls(side=tokenizer.padding_side, fill=fill)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenExamples(Examples):
    """Tokenised rows.

    Attributes:
        features: values of all rows by name, concatenated, shape (T,), int32: ``input_ids`` and, depending on the kind
            of task, ``token_type_ids``, the target of each token (``targets``) and its loss weight (``weights``).
        offsets: shape (N + 1,), int64; row i is [offsets[i], offsets[i + 1]).
        targets: target of each row, shape (N, ...); None if each token has a target.
        padding: padding of batches.
        max_length: maximum length of a row, in tokens.
        num_truncated: number of rows truncated to ``max_length``.
        num_empty: number of rows whose texts are all blank.
        num_dropped: number of blank rows that were left out.
        num_unlabelled: number of rows without a target.
        switches: additional arguments of the model's ``forward``.
        notes: further remarks on the rows.
        references: references of the metrics, if these are not ``targets``; the type depends on the kind of task.
        kept: indices of the rows in the split, shape (N,); None for all rows.
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
    kept: Rows | None = None

    @override
    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    @override
    def lengths(self) -> IntArray:
        return np.diff(self.offsets)

    @override
    def token_ids(self) -> list[IntArray]:
        return [self.features["input_ids"]]

    @override
    def input_ids(self, row: int) -> IntArray:
        return self.features["input_ids"][self.offsets[row] : self.offsets[row + 1]]

    @override
    def extremes(self) -> Rows:
        places = [int(values.argmax()) for name, values in self.features.items() if name not in ("targets", "weights")]
        rows = np.searchsorted(self.offsets, places, side="right") - 1
        return np.unique([*rows, int(self.lengths.argmax())])

    @override
    def batch(self, rows: Rows, epoch: int | None = None) -> Batch:
        """Return a batch of the given rows, padded to the longest of them.

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

    @override
    def describe(self) -> str:
        median, longest = int(np.median(self.lengths)), int(self.lengths.max())
        text = f"{counted(len(self), 'row')}, {median} tokens (median), {longest} at most"
        if self.num_truncated:
            text += f"; {self.num_truncated} truncated to {self.max_length}"
        if self.num_empty:
            text += f"; {self.num_empty} blank ({'left out' if self.num_dropped else 'kept'})"
        return "; ".join((text, *self.notes))


def pad_rows(features: dict[str, IntArray], offsets: IntArray, rows: Rows, padding: Padding) -> tuple[Batch, Tensor]:
    """Pad the given rows of concatenated ``features`` to the longest of them.

    Returns:
        Values by name, (B, L) int64, and the attention mask, (B, L) int64.
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
