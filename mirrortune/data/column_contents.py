# SPDX-License-Identifier: Apache-2.0
"""Judges columns by what they hold: a label repeats few values, a text is long and hardly repeats, an id never does."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mirrortune.data.files.column_problems import is_unreadable
from mirrortune.errors import counted

# Rows that are looked at, in so many places over the whole table: files are often sorted by class.
_SAMPLE, _PLACES = 4000, 80
# A label has words by the handful, and each of its values stands in several rows.
_LABEL_CHARACTERS, _LABEL_WORDS, _FEW = 80, 6, 5
_TEXT_WORDS, _TEXT_CHARACTERS = 3, 20
_LONGER = 10  # how many times as long as any other text the one is that is taken
_LIST = re.compile(r"""\s*(\[\s*(["'\d{\[-].*)?\]|\{\s*["'].*\})\s*""", re.DOTALL)

# Words in the names of labels, and names of what is none although it may repeat.
_HINTS = frozenset({
    "label", "labels", "class", "classes", "category", "categories", "target", "targets", "sentiment", "intent",
    "topic", "tag", "type", "kind", "genre", "emotion", "polarity", "verdict", "outcome", "stars", "rating", "score",
    "grade", "toxic", "spam", "is", "has", "answer", "gold",
})  # fmt: skip
_OTHERS = frozenset({
    "id", "ids", "idx", "index", "guid", "uuid", "uid", "key", "split", "fold", "subset", "partition", "date",
    "datetime", "time", "timestamp", "year", "month", "day", "length", "len", "count", "url", "link", "user", "author",
    "source", "lang", "language", "version", "unnamed", "column",
})  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a sample of a column holds.

    Attributes:
        name: of the column.
        rows: cells that are not null.
        distinct: different values among them.
        is_text: whether they are text that is not numbers.
        share_of_numbers: how many of them are numbers, as such or as text, in [0, 1].
        is_number: whether all of them are.
        is_whole: whether they are whole numbers.
        is_sequence: whether they are whole numbers that only rise, as an index does.
        characters, words: of a text, in the mean.
        codes: the number of each sampled row's value, shape (S,); -1 for null.
    """

    name: str
    rows: int
    distinct: int
    is_text: bool
    share_of_numbers: float
    is_number: bool
    is_whole: bool
    is_sequence: bool
    characters: float
    words: float
    codes: npt.NDArray[np.int64]

    @property
    def tokens(self) -> frozenset[str]:
        """The words of the name, in small letters."""
        split = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", self.name)
        return frozenset(re.split(r"[^a-z]+", split.lower()))

    @property
    def has_hint(self) -> bool:
        """Whether the name says that it is a label."""
        return bool(self.tokens & _HINTS)

    @property
    def may_be_label(self) -> bool:
        """Whether few values repeat."""
        is_short = self.characters <= _LABEL_CHARACTERS and self.words <= _LABEL_WORDS
        is_class = self.is_whole if self.is_number else self.is_text and is_short
        few = self.distinct <= _FEW or self.distinct <= self.rows / 10 or self.has_hint
        is_other = bool(self.tokens & _OTHERS) and not self.has_hint
        repeats = 2 <= self.distinct <= self.rows / 2
        return is_class and few and repeats and not (self.is_sequence or is_other)

    @property
    def may_be_text(self) -> bool:
        """Whether the cells are long and hardly repeat."""
        is_long = self.words >= _TEXT_WORDS or (self.characters >= _TEXT_CHARACTERS and self.words > 1)
        return self.is_text and is_long and self.distinct > self.rows / 2

    @property
    def may_be_target(self) -> bool:
        """Whether the cells are numbers that something else may be predicted to be."""
        is_other = bool(self.tokens & _OTHERS) and not self.has_hint
        return self.is_number and self.distinct > 1 and not (self.is_sequence or is_other)

    def determines(self, other: Contents) -> bool:
        """Whether rows that are alike here are alike there."""
        pairs = np.unique(np.stack([self.codes, other.codes]), axis=1)
        return bool(pairs.shape[1] == len(np.unique(self.codes)))

    def why_label(self) -> str:
        """What speaks for a label, for a note."""
        return f"{counted(self.distinct, 'value')} in {counted(self.rows, 'row')} looked at"

    def why_text(self) -> str:
        """What speaks for a text, for a note."""
        return f"{self.characters:.0f} characters in the mean, hardly repeated"


def contents(table: pa.Table) -> dict[str, Contents]:
    """The columns of text, numbers and truth values, by name."""
    names = [field.name for field in table.schema if _is_plain(field)]
    sample, size = table.select(names), _SAMPLE // _PLACES
    if table.num_rows > _SAMPLE:  # slices, of which nothing is copied
        starts = np.linspace(0, table.num_rows - size, _PLACES).astype(int)
        sample = pa.concat_tables(sample.slice(int(start), size) for start in starts)
    return {name: _contents(name, sample.column(name).to_pylist()) for name in names}


def holds_lists_as_text(cells: Sequence[Any]) -> bool:
    """Whether most cells are lists or objects that were written as text, as in ``"['a', 'b']"``."""
    known = [cell for cell in cells if cell is not None]
    found = sum(isinstance(cell, str) and _LIST.fullmatch(cell) is not None for cell in known)
    return found > len(known) / 2


def longest(found: Sequence[Contents]) -> Contents | None:
    """The one column that is by far the longest text; None if there is none."""
    ordered = sorted(found, key=lambda column: -column.characters)
    if not ordered or (len(ordered) > 1 and ordered[0].characters < _LONGER * ordered[1].characters):
        return None
    return ordered[0]


def finest(found: Sequence[Contents]) -> Contents | None:
    """The one of several label columns from which all others follow (``fine_label`` beside ``coarse_label``), with
    names rather than numbers where two say the same; None if there is none.
    """
    best = [column for column in found if all(column.determines(other) for other in found)]
    return min(best, key=lambda column: column.is_number) if best else None


def number_of(value: Any) -> float | None:
    """The finite number that a value is, or that a text writes; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        return None
    try:
        number = None if isinstance(value, str) and "_" in value else float(value)
    except (ValueError, OverflowError):
        return None
    return number if number is not None and math.isfinite(number) else None


def is_nan(value: Any) -> bool:
    """Whether a value is no number, as a float or as its text."""
    if isinstance(value, float):
        return math.isnan(value)
    return isinstance(value, str) and value.strip().lower() == "nan"


def _is_plain(field: pa.Field) -> bool:
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    return not is_unreadable(field) and bool(is_text or is_number or pa.types.is_boolean(kind))


def _contents(name: str, cells: list[Any]) -> Contents:
    known = [cell for cell in cells if cell is not None and not (isinstance(cell, str) and not cell.strip())]
    codes: dict[Any, int] = {}
    numbered = np.array([-1 if cell is None else codes.setdefault(cell, len(codes)) for cell in cells], dtype=np.int64)
    numbers = [number_of(cell) for cell in known if not is_nan(cell)]
    found = [number for number in numbers if number is not None]
    is_number = bool(found) and len(found) == len(numbers)
    values = np.array(found if is_number else [], dtype=np.float64)
    is_whole = is_number and bool((values == np.floor(values)).all())
    is_text = not is_number and any(isinstance(cell, str) for cell in known)
    is_flag = bool(known) and all(isinstance(cell, bool) for cell in known)
    texts = [cell for cell in known if isinstance(cell, str)]
    count = max(1, len(texts))
    return Contents(
        name=name,
        rows=len(known),
        distinct=len({*known}),
        is_text=is_text or is_flag,
        share_of_numbers=len(found) / max(1, len(numbers)),
        is_number=is_number,
        is_whole=is_whole,
        is_sequence=is_whole and len(values) > 2 and bool((np.diff(values) > 0).all()),
        characters=sum(map(len, texts)) / count,
        words=sum(len(text.split()) for text in texts) / count,
        codes=numbered,
    )
