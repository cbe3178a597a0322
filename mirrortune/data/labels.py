# SPDX-License-Identifier: Apache-2.0
"""Read columns of class labels: the class names, and the class of each row."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mirrortune.data.columns import holds_lists_as_text, is_nan, number_of
from mirrortune.data.files.arrow import cells, is_json, is_list, is_string, nulls
from mirrortune.data.files.row_places import RowPlaces
from mirrortune.errors import ConfigError, DataError, did_you_mean, first_of

MISSING = -1
# A column with more distinct values than this, and more than one for every two rows, is a text or an id, not a label.
_MANY_CLASSES = 50
_SHOWN = 4  # groups of classes in a warning
_FLAGS = frozenset(("0", "1", "True", "False", "true", "false"))  # entries of vectors that mark the classes of a row


def class_names(table: pa.Table, column: str, source: str, given: Sequence[str] | None) -> tuple[str, ...]:
    """Return the class names: ``given``, else those of the column's features, else its sorted values.

    Raises:
        DataError: the column does not hold classes, or only one.
        ConfigError: only one class is given.
    """
    names = tuple(given or ()) or feature_names(table, column) or names_in(table.column(column), source, column)
    if given and len(names) < 2:
        raise ConfigError("task.labels", f"got {list(names)}", allowed="two classes or more", fix="Name every class")
    if len(names) < 2:
        raise DataError(
            source,
            f"label column '{column}' has one class only ({names[0] if names else 'no value'!r})",
            allowed="two classes or more",
            fix="Add rows of another class, or name another column with --label-column",
        )
    return names


def label_remarks(table: pa.Table, column: str, names: Sequence[str]) -> list[str]:
    """Return notes on labels that may be misread: lists written as text, numbers used as classes, nan among numbers."""
    if feature_names(table, column) or pa.types.is_nested(table.schema.field(column).type):
        return []
    # A column may well be called spam, and hold spam and ham; one that is called "a great film" is a row.
    has_texts = any(len(name.split()) > 1 for name in table.column_names)
    notes = [headless(column, "one of its classes")] if column in names and has_texts else []
    if holds_lists_as_text(names):
        notes.append(
            f"label column '{column}' holds lists written as text, such as {names[0]!r}, each of which is one class; "
            "for several labels a row, write json, jsonl or parquet"
        )
    if all(number_of(name) is not None for name in names) and any("." in name for name in names):
        notes.append(
            f"label column '{column}' holds numbers, such as {names[0]}, each of which is one class; "
            "to predict numbers, use --task regression"
        )
    if alike := _alike(names):
        groups = (", ".join(repr(n) if unicodedata.is_normalized("NFC", n) else ascii(n) for n in g) for g in alike)
        notes.append(f"warning: classes that differ but look alike: {first_of(groups, _SHOWN, '; ')}")
    reading = LabelReading.of(table, column, names)
    if reading.nan_is_missing and (count := sum(is_nan(value) for value in cells(table, column))):
        notes.append(f"label column '{column}': {count:,} nan among numbers, read as no label")
    return notes


def _alike(names: Sequence[str]) -> list[list[str]]:
    """Return the groups of names that differ only in case, white space, invisible signs or the coding of accents."""
    found: dict[str, list[str]] = {}
    for name in names:
        seen = "".join(sign for sign in unicodedata.normalize("NFC", name) if unicodedata.category(sign) != "Cf")
        found.setdefault(" ".join(seen.casefold().split()), []).append(name)
    return [group for group in found.values() if len(group) > 1]


def headless(column: str, like: str) -> str:
    """Return a note on a label column that has the name of a value, as those of a file without a header have."""
    return (f"label column '{column}' is called like {like}: perhaps the file has no header, so that its first row is"
            " lost")  # fmt: skip


@dataclass(frozen=True, slots=True)
class LabelReading:
    """How the cells of a label column map to names of classes.

    Attributes:
        features: class names by index, or None.
        known: cell value -> class name.
        nan_is_missing: whether the text ``nan`` means a missing label, as it does if all classes are numbers.
        has_empty: whether the empty text is a class; csv files read it as null.
    """

    features: tuple[str, ...] | None
    known: dict[str, str]
    nan_is_missing: bool
    has_empty: bool

    @classmethod
    def of(cls, table: pa.Table, column: str, names: Sequence[str]) -> LabelReading:
        """Create the mapping from the cells of one column to the classes ``names``."""
        known = {name: name for name in names}
        for name in names:  # 1.0 is read as 1, unless both are classes
            number = number_of(name)
            if number is not None and number.is_integer():
                for other in (str(int(number)), f"{int(number)}.0"):
                    known.setdefault(other, name)
            if name.lower() in ("true", "false"):  # json and parquet have booleans, Excel writes TRUE
                for other in (name.lower(), name.title(), name.upper()):
                    known.setdefault(other, name)
        kind = table.schema.field(column).type
        is_text = is_string(kind.value_type if pa.types.is_dictionary(kind) else kind)
        are_numbers = all(number_of(name) is not None for name in names)
        return cls(feature_names(table, column), known, are_numbers, is_text and "" in known)

    def name(self, value: Any) -> str | None:
        """Return the class name in a cell, which may be unknown; None if there is no label."""
        if self.features is not None and isinstance(value, int) and not isinstance(value, bool):
            return self.features[value] if 0 <= value < len(self.features) else None
        if self.has_empty and (value is None or (isinstance(value, str) and not value.strip())):
            return ""
        name = as_name(value)
        if name is None or (self.nan_is_missing and name not in self.known and is_nan(name)):
            return None
        return self.known.get(name) or self.known.get(_whole(name), name)


def class_indices(table: pa.Table, column: str, names: Sequence[str], places: RowPlaces) -> npt.NDArray[np.int64]:
    """Return the class of each row as an index into ``names``, shape (N,); -1 for rows without a label.

    Raises:
        DataError: a label is not among the classes.
    """
    reading = LabelReading.of(table, column, names)
    index: dict[str | None, int] = {**{name: i for i, name in enumerate(names)}, None: MISSING}
    found, done = np.empty(table.num_rows, dtype=np.int64), 0
    for chunk in table.column(column).chunks:
        values = [reading.name(v) for v in chunk.to_pylist()]
        unknown = next((i for i, v in enumerate(values) if v not in index), None)
        if unknown is not None:
            raise _unknown_label(str(values[unknown]), names, places.where(done + unknown))
        found[done : done + len(chunk)] = [index[v] for v in values]
        done += len(chunk)
    return found


def label_sets(
    table: pa.Table, column: str, names: Sequence[str], places: RowPlaces
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Return which of the classes ``names`` each row has, for rows with any number of classes.

    Args:
        table: the rows; ``column`` holds lists of classes, or there is a column of 0 and 1 for each class.
        column: column of lists or of single classes, or the name of the first class.
        names: class names.
        places: places of the rows, for messages.

    Returns:
        0 and 1, shape (N, C), and whether each row lacks a label, (N,). A null is a missing label; an empty list is
        not.

    Raises:
        DataError: a label is not among the classes, or a cell is neither 0 nor 1.
    """
    if column in names and not is_list(table.schema.field(column).type):
        return _flags(table, names, places)
    refuse_multi_hot(table, column, places.source)
    reading, index = LabelReading.of(table, column, names), {name: i for i, name in enumerate(names)}
    found = np.zeros((table.num_rows, len(names)), dtype=np.float32)
    for number, row in enumerate(cells(table, column)):
        held = row if isinstance(row, list) else [] if row is None else [row]  # new rows may have one label each
        for name in map(reading.name, held):
            if name is not None and name not in index:
                raise _unknown_label(name, names, places.where(number))
            if name is not None:
                found[number, index[name]] = 1.0
    return found, nulls(table, column)


def refuse_multi_hot(table: pa.Table, column: str, source: str) -> None:
    """Raise a DataError if the lists of a column are vectors of 0 and 1, an entry for each class.

    Read as lists of classes they would be sets of two classes, ``0`` and ``1``. Lists of classes do not repeat a class.
    """
    if feature_names(table, column):
        return
    repeats, lengths, shown = False, set[int](), list[Any]()
    for row in cells(table, column):
        if row is None:
            continue
        if not isinstance(row, list) or not row or any(as_name(value) not in _FLAGS for value in row):
            return
        lengths.add(len(row))
        if len({as_name(value) for value in row}) < len(row):
            repeats, shown = True, shown or row
    if repeats and len(lengths) == 1:
        (length,) = lengths
        raise DataError(
            source, f"column '{column}' holds lists of 0 and 1 for {length} classes, such as {str(shown)[:80]}",
            allowed="lists of the classes that a row has, such as ['b', 'c'] or [1, 2]; "
            "or a column of 0 and 1 for each class, named by task.labels",
            fix="Write the rows so",
        )  # fmt: skip


def _unknown_label(name: str, names: Sequence[str], where: str) -> DataError:
    return DataError(
        where, f"label {name!r} is not among the classes.{did_you_mean(name, names)}", allowed=", ".join(names),
        fix="Correct the row, or list every class in task.labels",
    )  # fmt: skip


def _flags(
    table: pa.Table, names: Sequence[str], places: RowPlaces
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Return the same as :func:`label_sets`, for a column of 0 and 1 for each class."""
    found = np.zeros((table.num_rows, len(names)), dtype=np.float32)
    missing = np.ones(table.num_rows, dtype=bool)
    for place, name in enumerate(names):
        for row, value in enumerate(cells(table, name)):
            flag = _flag(value)
            if flag is None and as_name(value) is not None and not is_nan(value):
                raise DataError(
                    places.where(row), f"column '{name}' of a class holds {value!r}", allowed="0 and 1, false and true"
                )
            found[row, place] = flag or 0.0
            missing[row] &= flag is None
    return found, missing


def _flag(value: Any) -> float | None:
    """Convert a boolean, a number or the text of one to 0 or 1 (1.0 to 1, -1 to 0); return None for other values."""
    if isinstance(value, bool) or str(value).strip().lower() in ("true", "false"):
        return float(str(value).strip().lower() == "true")
    number = number_of(value)
    return None if number not in (-1.0, 0.0, 1.0) else max(number, 0.0)


def refuse_missing(missing: npt.NDArray[np.bool_], places: RowPlaces, column: str, what: str = "label") -> None:
    """Raise a DataError that lists the first rows without a target, if ``missing`` (N,) is true for any row."""
    count = int(missing.sum())
    if count:
        raise DataError(
            places.source,
            f"{count} of {len(missing)} rows have no {what} in column '{column}' "
            f"({places.listed(np.flatnonzero(missing))})",
            allowed=f"{'an' if what[0] in 'aeiou' else 'a'} {what} in every row used for training or validation",
            fix="Fill or remove these rows",
        )


def without_labels(table: pa.Table, column: str, missing: str) -> pa.Table:
    """Return the table with null in ``column`` where the value is ``missing``, compared as class name or number."""
    if column not in table.column_names or pa.types.is_nested(table.schema.field(column).type):
        return table
    import pyarrow.compute as pc  # noqa: PLC0415

    found, kind = table.column(column), table.schema.field(column).type
    if pa.types.is_dictionary(kind):
        found, kind = found.cast(kind.value_type), kind.value_type
    names = {value: as_name(value) for value in found.unique().to_pylist()}
    number = number_of(missing)
    gone = [v for v, name in names.items() if name and (name == missing or number_of(name) == number is not None)]
    if not gone:
        return table
    kept = pc.if_else(pc.is_in(found, value_set=pa.array(gone, kind)), pa.scalar(None, kind), found)
    return table.set_column(table.column_names.index(column), pa.field(column, kind), kept)


def _whole(name: str) -> str:
    """Return ``2`` for ``2.0``, which pandas writes in columns with missing values, and other names unchanged."""
    return name.partition(".")[0] if re.fullmatch(r"-?\d+\.0+", name) else name


def label_fields(names: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a transformers configuration for a head with these classes."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }


def feature_names(table: pa.Table, column: str) -> tuple[str, ...] | None:
    """Return the class names stored by the datasets library for a column of ClassLabel or lists of it, or None."""
    stored = (table.schema.metadata or {}).get(b"huggingface")
    try:
        feature = json.loads(stored)["info"]["features"].get(column) if stored else None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):  # written by another program
        return None
    while isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
        feature = feature["feature"]
    names = feature.get("names") if isinstance(feature, dict) else None
    is_valid = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if names and is_valid else None


def has_class(table: pa.Table, column: str, name: str) -> bool:
    """Return whether ``name`` is a class of a column, by the names stored for it or by its values."""
    if names := feature_names(table, column):
        return name in names
    values = table.column(column)
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind)) and name in values.unique().to_pylist()


def as_name(value: Any) -> str | None:
    """Convert a label value to a class name: text is stripped, and 1.0 is the same as 1.

    Returns None for null, empty text and a float NaN. The text "nan" is a class name (it may be the bread).
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bytes):  # what some writers of parquet store as text
        value = value.decode("utf-8", "backslashreplace")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() or None


def in_order(names: set[str]) -> list[str]:
    """Sort class names, as numbers if all of them are numbers ("10" after "9"), else as text."""
    found = sorted(names)
    if found and all(number_of(v) is not None for v in found):
        found.sort(key=float)
    return found


def names_in(column: pa.ChunkedArray, source: str, name: str) -> tuple[str, ...]:
    """Return the sorted class names in a column; raise a DataError if it does not hold classes."""
    kind = column.type
    if pa.types.is_nested(kind) or is_json(kind):
        what = "values of different types" if is_json(kind) else str(kind)
        raise DataError(
            source, f"label column '{name}' holds {what}", allowed="one class a row, as text or a whole number"
        )
    values = (v for chunk in column.chunks for v in set(chunk.to_pylist()))
    found = in_order({v for v in map(as_name, values) if v is not None})
    others = [number_of(v) for v in found if not is_nan(v)]
    numbers = [number for number in others if number is not None]
    if numbers and len(numbers) == len(others):
        found = [v for v in found if not is_nan(v)]  # among numbers, nan is a missing label
        if all(number.is_integer() for number in numbers):
            found = in_order({_whole(value) for value in found})
        are_few = is_string(kind) and len(found) <= min(_MANY_CLASSES, len(column) / 2)
        if not (all(n.is_integer() for n in numbers) or are_few):
            raise DataError(
                source, f"label column '{name}' holds real numbers (such as {found[0]}), not classes",
                allowed="classes as text or whole numbers",
                fix="Use --task regression or another --label-column; if they are classes, list them as text: "
                f'task.labels=["{found[0]}", "{found[-1]}", ...]',
            )  # fmt: skip
    if len(found) > _MANY_CLASSES and len(found) > 0.5 * len(column):
        raise DataError(
            source, f"label column '{name}' has {len(found)} different values in {len(column)} rows",
            allowed="classes that repeat", fix="Name another column with --label-column, or use --task regression",
        )  # fmt: skip
    return tuple(found)
