# SPDX-License-Identifier: Apache-2.0
"""Detect the text, label, image and audio columns of a table by their names, else by their contents.

A label has few values, which repeat; a text is long and rarely repeats; an id never repeats. Each detected column comes
with a note that says why it was chosen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mirrortune.data.files.arrow import is_json, is_list, is_string, is_unreadable, refuse_unreadable
from mirrortune.errors import DataError, counted, did_you_mean, first_of

# Column names that are common among users and on the Hub, the most specific first.
_PAIR_NAMES = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
    ("text_a", "text_b"),
)
_TEXT_NAMES = ("text", "sentence", "content", "review", "document", "body", "comment", "message", "tweet")
# A title is the text only if no other column is.
_WEAK_TEXT_NAMES = ("title",)
_LABEL_NAMES = ("label", "labels", "class", "category", "target", "sentiment", "score", "rating", "stars", "y")
_FIRST = 100  # number of rows that are checked for lists written as text
_MEDIA_NAMES = {
    "image": ("image", "img", "picture", "photo"), "audio": ("audio", "speech", "recording", "sound"),
}  # fmt: skip
_PATH_NAMES = ("path", "file_name", "filename", "file")
# Columns of answers that TRL, LLaMA-Factory and ms-swift mark as wanted or not.
_MARKED = (
    ("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("instruction", "response"),
    ("question", "answer"), ("messages",), ("conversations",),
)  # fmt: skip
# Number of sampled rows, and of the slices that they come from: files are often sorted by class.
_SAMPLE, _PLACES = 4000, 80
# A label has few words, and each of its values occurs in several rows.
_LABEL_CHARACTERS, _LABEL_WORDS, _FEW = 80, 6, 5
_TEXT_WORDS, _TEXT_CHARACTERS = 3, 20
_LONGER = 10  # a column that is this many times as long as any other is taken as the text
_LIST = re.compile(r"""\s*(\[\s*(["'\d{\[-].*)?\]|\{\s*["'].*\})\s*""", re.DOTALL)

# Words in the names of labels, and in the names of columns that are not labels although their values may repeat.
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


def choose_columns(
    table: pa.Table, text: Sequence[str] | None, label: str | None, source: str, *, numbers: bool = False
) -> tuple[tuple[str, ...], str, list[str]]:
    """Find the text columns (one or two) and the label column of a table.

    Args:
        table: the training rows.
        text: text columns, or None to detect them.
        label: label column, or None to detect it.
        source: name of the table in messages.
        numbers: whether labels are numbers (regression) rather than classes.

    Returns:
        Text columns, label column, and a note for each detected column.

    Raises:
        DataError: a named column does not exist or cannot be read, or detection finds no column or several.
    """
    check_named(table, source, {"--text-column": text, "--label-column": label})
    notes, is_answer = [], label == "answer"
    if label is None:
        label, note = _detect_label(table, text, source, numbers=numbers)
        notes.append(note)
    if not text:
        text, note = detect_text(table, label, source)
        notes.append(note)
    if len(text) > 2:
        raise DataError(source, f"{len(text)} text columns, got {', '.join(text)}", allowed="one or two")
    if label in text:
        raise DataError(source, f"column '{label}' is both text and label", fix="Give --label-column another column")
    refuse_unreadable(table, (*text, label))
    for column in text:
        check_is_text(table, column, source)
    if not is_answer:
        _refuse_rejected(table, source)
    return tuple(text), label, notes


def choose_media_columns(
    table: pa.Table, role: str, column: str | None, label: str | None, source: str
) -> tuple[str, str, list[str]]:
    """Find the column of files (encoded, or paths) and the label column; see :func:`choose_columns`.

    Args:
        table: the training rows.
        role: type of the files, a key of ``_MEDIA_NAMES``.
        column: column of the files, or None to detect it.
        label: label column, or None to detect it.
        source: name of the table in messages.
    """
    names = _MEDIA_NAMES[role]
    check_named(table, source, {f"--{role}-column": column, "--label-column": label})
    notes = []
    if column is None:
        fitting = {n.lower(): n for n in table.column_names if n != label and _is_media(table.schema.field(n).type)}
        encoded = [n for n in fitting.values() if not is_string(table.schema.field(n).type)]
        known = (*names, *(f"{name}_{end}" for name in names for end in ("path", "file")), *_PATH_NAMES)
        column = next(iter([*encoded[: len(encoded) == 1], *(fitting[n] for n in known if n in fitting)]), None)
        if column is None:
            raise DataError(
                source,
                f"no column looks like {role}s" if role == "image" else "no column looks like recordings",
                allowed=f"one of the columns {first_of(table.column_names)}, with paths or encoded files",
                fix=f"Name it with --{role}-column",
            )
        notes.append(detected(role, column))
    elif not _is_media(table.schema.field(column).type):
        raise DataError(
            source, f"{role} column '{column}' holds {table.schema.field(column).type}",
            allowed="paths, or encoded files (bytes, or the datasets library's structs of bytes and path)",
        )  # fmt: skip
    if label is None:
        label, note = _detect_label(table, (column,), source)
        notes.append(note)
    if label == column:
        raise DataError(source, f"column '{label}' is both {role} and label", fix="Give --label-column another column")
    refuse_unreadable(table, (column, label))
    return column, label, notes


def check_named(table: pa.Table, source: str, named: Mapping[str, str | Sequence[str] | None]) -> None:
    """Check that the columns named by flags (flag -> column, columns or None) exist and are readable."""
    if not table.column_names:
        raise DataError(source, "it has no columns", fix="Give the file a header line")
    pairs = [(f, c) for f, found in named.items() for c in ([found] if isinstance(found, str) else found or ())]
    for flag, column in pairs:
        if column not in table.column_names:
            raise DataError(
                source,
                f"{flag} '{column}' is not a column.{did_you_mean(column, table.column_names)}",
                allowed=first_of(table.column_names),
            )
    refuse_unreadable(table, [column for _, column in pairs])


def detected(role: str, column: str, why: str = "") -> str:
    """Return the note on a detected column; ``why`` is the reason, empty if its name is the reason."""
    return f"{role} column '{column}' (detected{f': {why}' if why else ''}; --{role}-column to change)"


def _is_media(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return {"bytes", "path"} <= {field.name for field in kind}
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind)) or is_string(kind)


def _detect_label(
    table: pa.Table, text: Sequence[str] | None, source: str, *, numbers: bool = False
) -> tuple[str, str]:
    """Return the label column and the note on it."""
    names = [n for n in table.column_names if n not in (text or ())]
    texts = [n for n in names if n.lower() in (*_TEXT_NAMES, *_WEAK_TEXT_NAMES)]
    paired = {name for pair in _PAIR_NAMES for name in pair}
    known = {n: c for n, c in contents(table).items() if n in names and n not in texts and n.lower() not in paired}
    fitting = [c for c in known.values() if (c.may_be_target if numbers else c.may_be_label)]
    by_name = [n for wanted in _LABEL_NAMES for n in names if n.lower() == wanted]
    # A column with the name of a label is rejected only if it clearly holds something else and another holds labels.
    trusted = [n for n in by_name if n not in known or not _is_no_label(known[n], numbers=numbers)]
    if trusted or (by_name and not fitting):
        name = (trusted or by_name)[0]
        return name, detected("label", name)
    if text and len(names) == 1:
        return names[0], detected("label", names[0])
    if len(names) == 2 and len(texts) == 1:
        name = next(n for n in names if n not in texts)
        return name, detected("label", name)
    refuse_preferences(table, source)
    hinted = [column for column in fitting if column.has_hint] or fitting
    if numbers and len(hinted) > 1:
        hinted = [column for column in hinted if not column.is_whole] or hinted
    found = finest(hinted) if hinted and not numbers else hinted[0] if len(hinted) == 1 else None
    if found is not None:
        return found.name, detected("label", found.name, found.why_label())
    refuse_unreadable(table, table.column_names)  # the missing column may be one that could not be read
    several = first_of(f"'{c.name}' ({c.why_label()})" for c in hinted)
    raise DataError(
        source,
        f"several columns could be the label: {several}" if several else "no column looks like a label",
        allowed=f"one of the columns {first_of(table.column_names)}",
        fix="Name it with --label-column",
    )


def _is_no_label(column: Contents, *, numbers: bool) -> bool:
    """Return whether a column that has the name of a label does not hold labels."""
    if numbers:
        return column.share_of_numbers < 0.5
    is_measure = column.is_number and not column.is_whole and column.distinct > column.rows / 10
    return column.may_be_text or is_measure


def detect_text(table: pa.Table, label: str | None, source: str) -> tuple[tuple[str, ...], str]:
    """Detect the text columns among all columns except ``label``; return them and the note on them.

    Raises:
        DataError: there is no candidate, or several.
    """
    lowered = {n.lower(): n for n in table.column_names if n != label}
    for first, second in _PAIR_NAMES:
        if first in lowered and second in lowered:
            pair = lowered[first], lowered[second]
            return pair, f"text columns '{pair[0]}', '{pair[1]}' (detected; --text-column to change)"
    for wanted in _TEXT_NAMES:
        if wanted in lowered:
            return (lowered[wanted],), detected("text", lowered[wanted])
    strings = [n for n in lowered.values() if is_string(table.schema.field(n).type)]
    if len(strings) == 1:
        return (strings[0],), detected("text", strings[0])
    known = contents(table)
    fitting = [known[n] for n in strings if n in known and known[n].may_be_text]
    others = [column for column in fitting if column.name.lower() not in _WEAK_TEXT_NAMES]
    weak = next((known[lowered[n]].characters for n in _WEAK_TEXT_NAMES if lowered.get(n) in known), 0.0)
    others = [column for column in others if column.characters >= weak]
    found = longest_text(fitting) or longest_text(others)
    if found is not None:
        return (found.name,), detected(
            "text", found.name, f"{found.characters:.0f} characters in the mean, hardly repeated"
        )
    for wanted in _WEAK_TEXT_NAMES:
        if wanted in lowered and not others:
            return (lowered[wanted],), detected("text", lowered[wanted])
    refuse_unreadable(table, table.column_names)
    raise DataError(
        source,
        f"{'several columns' if strings else 'no column'} could be the text",
        allowed=f"one or two of the columns {first_of(c.name for c in fitting) or first_of(table.column_names)}",
        fix="Name it with --text-column",
    )


def refuse_written_lists(table: pa.Table, column: str, source: str) -> None:
    """Raise a DataError if a column holds lists or objects written as text."""
    if column in table.column_names and is_string(table.schema.field(column).type):
        sample = table.column(column).slice(0, _FIRST).to_pylist()
        if holds_lists_as_text(sample):
            shown = next(cell for cell in sample if cell)
            raise DataError(
                source, f"column '{column}' holds lists or objects written as text, such as {shown[:80]!r}",
                allowed="lists and objects of json, jsonl or parquet files; csv has none",
                fix="Write the rows as jsonl",
            )  # fmt: skip


def refuse_preferences(table: pa.Table, source: str) -> None:
    """Raise a DataError if rows hold preferences, so that no rejected answer is trained on as if it were plain text.

    Preferences have the columns chosen and rejected, or answers and a label of true and false.
    """
    lowered = {name.lower(): table.schema.field(name).type for name in table.column_names}
    marks = [name for name in ("label", "kto_tag") if pa.types.is_boolean(lowered.get(name, pa.null()))]
    answers = [names for names in _MARKED if marks and lowered.keys() >= {*names}]
    if {"chosen", "rejected"} <= lowered.keys():
        what = "columns chosen and rejected"
    elif answers:
        what = f"columns {', '.join(answers[0])} and a {marks[0]} of true and false"
    else:
        return
    raise DataError(
        source, f"it holds preferences ({what}), for methods such as DPO, ORPO and KTO, which mirrortune does not have",
        fix="Train on them with TRL around a model that mirrortune.attach() has adapted, "
        "or give rows with one right answer each",
    )  # fmt: skip


def _refuse_rejected(table: pa.Table, source: str) -> None:
    """Raise a DataError if annotators have rejected or left out rows, so that these are not taken for right ones.

    Prodigy writes their decision on the label of each row into the column answer.
    """
    if "answer" not in table.column_names or not is_string(table.schema.field("answer").type):
        return
    counts = {cell["values"]: cell["counts"] for cell in table.column("answer").value_counts().to_pylist()}
    counts.pop(None, None)
    if not counts.keys() <= {"accept", "reject", "ignore"} or counts.keys() <= {"accept"}:
        return
    lost = " and ".join(f"'{word}' for {counted(counts[word], 'row')}" for word in counts if word != "accept")
    raise DataError(
        source, f"column 'answer' of an annotator is {lost}, whose labels are wrong or unknown",
        allowed="rows with the answer 'accept'",
        fix="Leave the others out (jq -c 'select(.answer == \"accept\")' FILE.jsonl > rows.jsonl), or learn accept "
        "against reject with --label-column answer" if "accept" in counts else "Give rows that were accepted",
    )  # fmt: skip


def check_text_type(table: pa.Table, column: str, source: str) -> None:
    """Raise a DataError unless a column holds only text and nulls."""
    kind = table.schema.field(column).type
    if not (is_string(kind) or pa.types.is_null(kind)):
        raise DataError(
            source, f"text column '{column}' holds {kind}, not text", allowed="a column of strings",
            fix="Name another with --text-column",
        )  # fmt: skip


def check_is_text(table: pa.Table, column: str, source: str) -> None:
    """Raise a DataError if a column does not hold text, or holds only nulls."""
    check_text_type(table, column, source)
    if table.num_rows and table.column(column).null_count == table.num_rows:
        raise DataError(
            source, f"text column '{column}' is empty in all {counted(table.num_rows, 'row')}",
            allowed=first_of(table.column_names), fix="Name another with --text-column",
        )  # fmt: skip


def check_words_type(table: pa.Table, column: str, source: str) -> None:
    """Raise a DataError unless a column holds only lists (also as JSON) and nulls."""
    kind = table.schema.field(column).type
    if not (is_list(kind) or is_json(kind) or pa.types.is_null(kind)):
        raise DataError(
            source, f"column '{column}' holds {kind}, not words", allowed="lists of strings",
            fix="Write its values so, or name another column with --text-column",
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """Statistics of a sample of a column.

    Attributes:
        name: name of the column.
        rows: number of cells that are not null.
        distinct: number of distinct values among these cells.
        is_text: whether these cells are text, except text that reads as numbers.
        share_of_numbers: fraction of these cells that are numbers, or text that reads as a number, in [0, 1].
        is_number: whether all of these cells are numbers.
        is_whole: whether all of these cells are integers.
        is_sequence: whether these cells are strictly increasing integers, as an index is.
        characters, words: mean length of the texts, in characters and in words.
        codes: index of each sampled row's value among the distinct values, shape (S,); -1 for null.
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
        """The words of the column's name, in lower case."""
        split = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", self.name)
        return frozenset(re.split(r"[^a-z]+", split.lower()))

    @property
    def has_hint(self) -> bool:
        """Whether the name suggests a label."""
        return bool(self.tokens & _HINTS)

    @property
    def may_be_label(self) -> bool:
        """Whether the column looks like a label: it has few values, which repeat."""
        is_short = self.characters <= _LABEL_CHARACTERS and self.words <= _LABEL_WORDS
        is_class = self.is_whole if self.is_number else self.is_text and is_short
        few = self.distinct <= _FEW or self.distinct <= self.rows / 10 or self.has_hint
        is_other = bool(self.tokens & _OTHERS) and not self.has_hint
        repeats = 2 <= self.distinct <= self.rows / 2
        return is_class and few and repeats and not (self.is_sequence or is_other)

    @property
    def may_be_text(self) -> bool:
        """Whether the column looks like a text: its cells are long and rarely repeat."""
        is_long = self.words >= _TEXT_WORDS or (self.characters >= _TEXT_CHARACTERS and self.words > 1)
        return self.is_text and is_long and self.distinct > self.rows / 2

    @property
    def may_be_target(self) -> bool:
        """Whether the column looks like the target of a regression."""
        is_other = bool(self.tokens & _OTHERS) and not self.has_hint
        return self.is_number and self.distinct > 1 and not (self.is_sequence or is_other)

    def determines(self, other: Contents) -> bool:
        """Return whether rows with equal values in this column have equal values in ``other``."""
        pairs = np.unique(np.stack([self.codes, other.codes]), axis=1)
        return bool(pairs.shape[1] == len(np.unique(self.codes)))

    def why_label(self) -> str:
        """Return the reason for taking this column as the label, for a note."""
        return f"{counted(self.distinct, 'value')} in {counted(self.rows, 'row')} looked at"


def contents(table: pa.Table) -> dict[str, Contents]:
    """Return the statistics of the columns of text, numbers and booleans, by name."""
    names = [field.name for field in table.schema if _is_plain(field)]
    sample, size = table.select(names), _SAMPLE // _PLACES
    if table.num_rows > _SAMPLE:  # slices, which copy nothing
        starts = np.linspace(0, table.num_rows - size, _PLACES).astype(int)
        sample = pa.concat_tables(sample.slice(int(start), size) for start in starts)
    return {name: _contents(name, sample.column(name).to_pylist()) for name in names}


def holds_lists_as_text(cells: Sequence[Any]) -> bool:
    """Return whether most cells are lists or objects written as text, such as ``"['a', 'b']"``."""
    known = [cell for cell in cells if cell is not None]
    found = sum(isinstance(cell, str) and _LIST.fullmatch(cell) is not None for cell in known)
    return found > len(known) / 2


def longest_text(found: Sequence[Contents]) -> Contents | None:
    """Return the column whose texts are by far the longest; None if there is none."""
    ordered = sorted(found, key=lambda column: -column.characters)
    if not ordered or (len(ordered) > 1 and ordered[0].characters < _LONGER * ordered[1].characters):
        return None
    return ordered[0]


def finest(found: Sequence[Contents]) -> Contents | None:
    """Return the label column that determines all others, as ``fine_label`` does ``coarse_label``; None if none does.

    If two are equivalent, the one with names is returned rather than the one with numbers.
    """
    best = [column for column in found if all(column.determines(other) for other in found)]
    return min(best, key=lambda column: column.is_number) if best else None


def number_of(value: Any) -> float | None:
    """Convert a finite number, or a text that reads as one, to float; return None for any other value."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        return None
    try:
        number = None if isinstance(value, str) and "_" in value else float(value)
    except (ValueError, OverflowError):
        return None
    return number if number is not None and math.isfinite(number) else None


def is_nan(value: Any) -> bool:
    """Return whether a value is NaN, as a float or as text."""
    if isinstance(value, float):
        return math.isnan(value)
    return isinstance(value, str) and value.strip().lower() == "nan"


def _is_plain(field: pa.Field) -> bool:
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    return not is_unreadable(field) and bool(is_string(kind) or is_number or pa.types.is_boolean(kind))


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
