# SPDX-License-Identifier: Apache-2.0
"""Packing: several short rows in one sequence, which do not attend to each other.

Rows are separated by ``position_ids`` that restart at 0, without an attention mask or a cache. The attention masks and
flash attention of transformers detect packed rows in this way. In a model that does not, rows would attend to each
other without an error, so :meth:`PackedExamples.verify` tests it before training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from typing_extensions import override

from mirrortune.data.examples import IGNORE_INDEX, Batch, Examples, IntArray, Rows, TokenExamples
from mirrortune.errors import ConfigError
from mirrortune.system.devices import autocast, rounding_unit


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedExamples(Examples):
    """Sequences of packed rows; each row of these examples is a sequence.

    Attributes:
        documents: rows to pack, with a target for each token.
        bins: indices of the rows in each sequence.
        num_truncated: number of rows truncated before packing.
        num_unlabelled: 0, because rows without an answer are not packed.
    """

    documents: TokenExamples
    bins: tuple[Rows, ...]
    num_truncated: int
    num_unlabelled: int = 0

    @classmethod
    def of(cls, documents: TokenExamples, groups: IntArray | None = None) -> PackedExamples:
        """Pack rows into sequences of at most ``max_length``; rows of different ``groups`` (N,) are kept apart."""
        lengths, longest = documents.lengths, documents.max_length
        found = np.zeros(len(documents)) if groups is None else groups
        parts = [np.flatnonzero(found == group) for group in np.unique(found)]
        bins = tuple(own[rows] for own in parts for rows in best_fit(lengths[own], longest))
        return cls(documents=documents, bins=bins, num_truncated=documents.num_truncated)

    @property
    @override
    def lengths(self) -> IntArray:
        ends = np.cumsum([0, *map(len, self.bins)])
        return np.add.reduceat(self.documents.lengths[np.concatenate(self.bins)], ends[:-1])

    @override
    def __len__(self) -> int:
        return len(self.bins)

    @property
    @override
    def split_rows(self) -> Rows:
        rows = self.documents.split_rows
        return np.array([rows[own[0]] for own in self.bins], dtype=np.int64)

    @property
    @override
    def used_rows(self) -> Rows:
        return self.documents.used_rows

    @override
    def extremes(self) -> Rows:
        found = {int(row) for row in self.documents.extremes()}
        holding = [number for number, rows in enumerate(self.bins) if found & {int(row) for row in rows}]
        return np.unique([*holding, int(self.lengths.argmax())])

    @override
    def token_ids(self) -> list[IntArray]:
        return self.documents.token_ids()

    @override
    def batch(self, rows: Rows, epoch: int | None = None) -> Batch:
        """Return ``input_ids``, ``position_ids`` and ``targets`` of the given sequences, each (B, L) int64; ``targets``
        is (B, 2, L) with weights.
        """
        documents, fill = self.documents, self.documents.padding.fill
        lengths = self.documents.lengths
        width = max(int(lengths[self.bins[row]].sum()) for row in rows)
        ids = np.full((len(rows), width), fill["input_ids"], dtype=np.int64)
        targets, positions = np.full_like(ids, IGNORE_INDEX), np.zeros_like(ids)
        weights = np.zeros_like(ids) if "weights" in documents.features else None
        for i, row in enumerate(rows):
            start = 0
            for document in self.bins[row]:
                piece = slice(documents.offsets[document], documents.offsets[document + 1])
                stop = start + piece.stop - piece.start
                ids[i, start:stop] = documents.features["input_ids"][piece]
                targets[i, start:stop] = documents.features["targets"][piece]
                if weights is not None:
                    weights[i, start:stop] = documents.features["weights"][piece]
                targets[i, start] = IGNORE_INDEX  # the first token must not be predicted from the row before
                positions[i, start:stop] = np.arange(stop - start)
                start = stop
        made = {"input_ids": ids, "position_ids": positions, "targets": targets}
        if weights is not None:
            made["targets"] = np.stack([targets, weights], axis=1)
        return {**{name: torch.from_numpy(values) for name, values in made.items()}, **documents.switches}

    @override
    def describe(self) -> str:
        full = self.lengths.sum() / (len(self) * self.documents.max_length)
        return f"{self.documents.describe()}; packed into {len(self):,} sequences, {full:.0%} full"

    @torch.no_grad()
    @override
    def verify(self, model: nn.Module) -> None:
        """Compare the outputs of a packed sequence with those of its rows; raise a ConfigError if they differ."""
        several = [rows for rows in self.bins if len(rows) > 1]
        if not several:
            return
        pair = several[0][:2]
        device, was_training = next(model.parameters()).device, model.training
        model.eval()
        packed = replace(self, bins=(pair,))
        logits = [_logits(model, packed.batch(np.array([0])), device)]
        logits += [_logits(model, self.documents.batch(np.array([row])), device) for row in pair]
        model.train(was_training)
        apart = torch.cat(logits[1:], dim=1)
        error, largest = float((logits[0] - apart).abs().max()), float(apart.abs().max())
        if not error <= max(1e-3, 32 * rounding_unit(model)) * max(1.0, largest):
            raise ConfigError(
                "data.packing", f"this model lets packed rows see each other (its outputs differ by {error:.2g})",
                fix="Set data.packing=false",
            )  # fmt: skip


def best_fit(lengths: IntArray, capacity: int) -> list[Rows]:
    """Distribute rows over bins by best-fit decreasing: the longest first, each to the fullest bin that it fits into.

    Args:
        lengths: lengths of the rows, shape (N,), each at most ``capacity``.
        capacity: capacity of a bin.

    Returns:
        Row indices of each bin, ascending; the bins are in the order of their first row.
    """
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # bins by remaining capacity
    counts = np.zeros(capacity + 1, dtype=np.int64)
    for row in np.argsort(-lengths, kind="stable"):
        length = int(lengths[row])
        room = length + int(np.argmax(counts[length:] > 0))
        if counts[room] and room >= length:
            index = with_room[room].pop()
            counts[room] -= 1
        else:
            index, room = len(bins), capacity
            bins.append([])
        bins[index].append(int(row))
        with_room[room - length].append(index)
        counts[room - length] += 1
    found = [np.sort(np.array(rows, dtype=np.int64)) for rows in bins]
    return sorted(found, key=lambda rows: int(rows[0]))


def _logits(model: Any, batch: Batch, device: torch.device) -> torch.Tensor:
    inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items() if k != "targets"}
    with autocast(model):
        return torch.as_tensor(model(**inputs).logits).float()
