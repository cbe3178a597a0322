# SPDX-License-Identifier: Apache-2.0
"""Draw the rows of an epoch from the sources of a mixture by weight, and count the rows of each source."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mirrortune.data.dataset import Split
from mirrortune.data.duplicates import rows_in_both
from mirrortune.data.examples import Examples, IntArray, Rows
from mirrortune.data.mixture import DataSource, source_numbers
from mirrortune.errors import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceDraws:
    """The rows that an epoch draws from each source.

    From a source of n rows and weight w, n w rows are drawn per epoch, rounded, and at least one. Over epochs, all rows
    of a source are drawn before any is drawn again, each time in a different random order: at weight 2 each row twice
    per epoch, at weight 0.5 one half of the rows in one epoch and the other half in the next.

    Attributes:
        sources: source of each row, shape (N,), from 0.
        weights: of the sources.
    """

    sources: IntArray
    weights: tuple[float, ...]

    @property
    def counts(self) -> list[int]:
        """Number of rows of each source in an epoch."""
        rows = np.bincount(self.sources, minlength=len(self.weights)).tolist()
        return [max(1, math.floor(n * w + 0.5)) if n else 0 for n, w in zip(rows, self.weights, strict=True)]

    @property
    def size(self) -> int:
        """Number of rows of an epoch."""
        return sum(self.counts)

    def rows(self, seed: int, epoch: int) -> Rows:
        """Return the row indices of an epoch, source by source; they depend only on the arguments."""
        drawn = [np.zeros(0, dtype=np.int64)]
        for number, count in enumerate(self.counts):
            own = np.flatnonzero(self.sources == number)
            first = epoch * count
            while first < (epoch + 1) * count:
                turn, begin = divmod(first, len(own))
                order = np.random.default_rng([seed, number, turn]).permutation(own)
                drawn.append(order[begin : begin + (epoch + 1) * count - first])
                first += len(drawn[-1])
        return np.concatenate(drawn)


def make_draws(table: pa.Table, examples: Examples, weights: Sequence[float]) -> SourceDraws | None:
    """Return the draws of an epoch; None if each row is drawn once.

    Args:
        table: training rows.
        examples: examples encoded from these rows.
        weights: weights of the sources.
    """
    numbers = source_numbers(table)
    if numbers is None or all(weight == 1 for weight in weights):
        return None
    return SourceDraws(sources=numbers[examples.split_rows], weights=tuple(weights))


def source_counts(
    sources: Sequence[DataSource], table: pa.Table, examples: Examples, draws: SourceDraws | None
) -> list[dict[str, Any]]:
    """Return path, weight, training rows, used ones and those of an epoch for each source; empty for one data set.

    Rows are ``used`` if they were not left out, being blank or too long. An epoch counts what is drawn: rows,
    windows of long contexts, or packed sequences.
    """
    numbers = source_numbers(table)
    if numbers is None:
        return []
    rows = np.bincount(numbers, minlength=len(sources))
    used = np.bincount(numbers[examples.used_rows], minlength=len(sources))
    drawn = np.bincount(numbers[examples.split_rows], minlength=len(sources)) if draws is None else draws.counts
    return [
        {"path": source.name, "weight": source.weight, "rows": int(rows[i]), "used": int(used[i]),
         "rows_per_epoch": int(drawn[i])}
        for i, source in enumerate(sources)
    ]  # fmt: skip


def describe_source(counts: Mapping[str, Any]) -> str:
    """Return a line on the counts of a source: rows, used ones, weight, and those of an epoch."""
    used = "" if counts["used"] == counts["rows"] else f" ({counts['used']:,} used)"
    drawn = "" if counts["weight"] == 1 else f", weight {counts['weight']:g}: {counts['rows_per_epoch']:,} an epoch"
    repeated = f"; {counts['repeated']:,} also in a source before it" if counts["repeated"] else ""
    return f"  source {counts['path']}: {counted(counts['rows'], 'row')}{used}{drawn}{repeated}"


def stream_shares(sources: Sequence[DataSource]) -> list[dict[str, Any]]:
    """Return path, weight and share of the rows of each streamed source."""
    total = sum(source.weight for source in sources)
    return [{"path": s.name, "weight": s.weight, "share": round(s.weight / total, 6)} for s in sources]


def repeated_rows(split: Split, columns: Sequence[tuple[str, str]], count: int) -> list[int]:
    """Return how many rows of each of ``count`` sources are also in a source before it.

    Args:
        split: rows of a mixture.
        columns: (role, column) of what is compared.
        count: number of sources.
    """
    numbers = source_numbers(split.table)
    assert numbers is not None
    chosen = [(np.flatnonzero(numbers < number), np.flatnonzero(numbers == number)) for number in range(1, count)]
    return [0, *(rows_in_both(split, split, columns, rows) for rows in chosen)]
