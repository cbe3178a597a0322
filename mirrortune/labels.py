# SPDX-License-Identifier: Apache-2.0
"""A column of class labels: which classes there are, and which one each row has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mirrortune.errors import DataError, did_you_mean
from mirrortune.row_chunks import cells, nulls

MISSING = -1
# More classes than this, in more than half of the rows each its own, is a text or an id and not a label.
_MANY_CLASSES = 50


def class_names(table: pa.Table, column: str, source: str, given: Sequence[str] | None) -> tuple[str, ...]:
    """Names of the classes: ``given``, else the column's own features, else the values found, sorted.

    Raises:
        DataError: if the column holds no classes, or one only.
    """
    names = tuple(given or ()) or feature_names(table, column) or _names_in(table.column(column), source, column)
    if len(names) < 2:
        raise DataError(
            source,
            f"label column '{column}' has one class only ({names[0] if names else 'no value'!r})",
            allowed="two classes or more",
            fix="Add rows of another class, or name another column with --label-column",
        )
    return names


def class_indices(
    table: pa.Table, column: str, names: Sequence[str], source: str, *, allow_missing: bool
) -> npt.NDArray[np.int64]:
    """The class of every row as an index into ``names``, shape (N,); -1 where there is none, if that is allowed.

    Raises:
        DataError: a label that is no class, with its row, or rows without one.
    """
    features = feature_names(table, column)
    index: dict[str | None, int] = {**{name: i for i, name in enumerate(names)}, None: MISSING}
    found, done = np.empty(table.num_rows, dtype=np.int64), 0
    for chunk in table.column(column).chunks:
        values = [_indexed(v, features) for v in chunk.to_pylist()]
        unknown = next((i for i, v in enumerate(values) if v not in index), None)
        if unknown is not None:
            name = str(values[unknown])
            raise DataError(
                f"{source} row {done + unknown + 1}",
                f"label {name!r} is not among the classes.{did_you_mean(name, names)}",
                allowed=", ".join(names),
                fix="Correct the rows, or list every class in task.labels",
            )
        found[done : done + len(chunk)] = [index[v] for v in values]
        done += len(chunk)
    if not allow_missing:
        refuse_missing(found == MISSING, source, column)
    return found


def label_sets(
    table: pa.Table, column: str, names: Sequence[str], source: str
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Which of the classes ``names`` each row has.

    Args:
        table: the rows; ``column`` holds lists of classes, or there is a column of 0 and 1 for each class.
        column: of lists, or the name of the first class.
        names: the classes.
        source: for messages.

    Returns:
        0 and 1, shape (N, C), and which rows have no label at all (N,): null, which is not an empty list.

    Raises:
        DataError: a class that is not among them, or a cell that is neither 0 nor 1.
    """
    if column in names and not is_list(table.schema.field(column).type):
        named = np.array([[as_name(v) for v in cells(table, name)] for name in names], dtype=object).T
        known = {"0": 0.0, "1": 1.0, "False": 0.0, "True": 1.0, "false": 0.0, "true": 1.0, "-1": 0.0, None: 0.0}
        for row, cell in ((r, c) for r, line in enumerate(named, start=1) for c in line if c not in known):
            raise DataError(f"{source} row {row}", f"a column of a class holds {cell!r}", allowed="0 and 1")
        return np.array([[known[c] for c in line] for line in named], np.float32), (named == None).all(axis=1)  # noqa: E711
    index, features = {name: i for i, name in enumerate(names)}, feature_names(table, column)
    found = np.zeros((table.num_rows, len(names)), dtype=np.float32)
    for number, row in enumerate(cells(table, column)):
        for name in (_indexed(value, features) for value in row or ()):
            if name is not None and name not in index:
                raise DataError(
                    f"{source} row {number + 1}",
                    f"label {name!r} is not among the classes.{did_you_mean(name, names)}",
                    allowed=", ".join(names), fix="Correct the row, or list every class in task.labels",
                )  # fmt: skip
            if name is not None:
                found[number, index[name]] = 1.0
    return found, nulls(table, column)


def is_list(kind: pa.DataType) -> bool:
    """Whether a column of this type holds lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def refuse_missing(missing: npt.NDArray[np.bool_], source: str, column: str, what: str = "label") -> None:
    """DataError with the first rows if any row lacks its target; ``missing`` has shape (N,)."""
    count = int(missing.sum())
    if count:
        first = ", ".join(str(i + 1) for i in np.flatnonzero(missing)[:5]) + (", ..." if count > 5 else "")
        raise DataError(
            source,
            f"{count} of {len(missing)} rows have no {what} in column '{column}' (rows {first})",
            allowed=f"{'an' if what[0] in 'aeiou' else 'a'} {what} in every row used for training or validation",
            fix="Fill or remove these rows",
        )


def without_labels(table: pa.Table, column: str, missing: str) -> pa.Table:
    """The table with null in ``column`` wherever its value is ``missing``, as a class or as a number."""
    if column not in table.column_names or pa.types.is_nested(table.schema.field(column).type):
        return table
    import pyarrow.compute as pc  # noqa: PLC0415

    found, kind = table.column(column), table.schema.field(column).type
    if pa.types.is_dictionary(kind):
        found, kind = found.cast(kind.value_type), kind.value_type
    names = {value: as_name(value) for value in found.unique().to_pylist()}
    number = _number(missing)
    gone = [v for v, name in names.items() if name and (name == missing or _number(name) == number is not None)]
    if not gone:
        return table
    kept = pc.if_else(pc.is_in(found, value_set=pa.array(gone, kind)), pa.scalar(None, kind), found)
    return table.set_column(table.column_names.index(column), pa.field(column, kind), kept)


def label_fields(names: Sequence[str]) -> dict[str, Any]:
    """Fields of the transformers config for a head with these classes."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }


def feature_names(table: pa.Table, column: str) -> tuple[str, ...] | None:
    """Class names that the datasets library stored with the column (ClassLabel, or a list of it), or None."""
    stored = (table.schema.metadata or {}).get(b"huggingface")
    feature = json.loads(stored).get("info", {}).get("features", {}).get(column) if stored else None
    while isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
        feature = feature["feature"]
    names = feature.get("names") if isinstance(feature, dict) else None
    return tuple(names) if names else None


def as_name(value: Any) -> str | None:
    """A class name for one label value: text stripped, 1.0 the same class as 1; None where there is no label."""
    if value is None or (isinstance(value, float) and value != value):  # noqa: PLR0124  (NaN)
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    name = str(value).strip()
    return name if name and name.lower() != "nan" else None


def in_order(names: set[str]) -> list[str]:
    """Class names sorted: as numbers if all of them are ("10" after "9"), else as text."""
    found = sorted(names)
    if found and all(_number(v) is not None for v in found):
        found.sort(key=float)
    return found


def _indexed(value: Any, features: tuple[str, ...] | None) -> str | None:
    if features is not None and isinstance(value, int) and not isinstance(value, bool):
        return features[value] if 0 <= value < len(features) else None
    return as_name(value)


def _names_in(column: pa.ChunkedArray, source: str, name: str) -> tuple[str, ...]:
    kind = column.type
    if pa.types.is_nested(kind):
        raise DataError(
            source, f"label column '{name}' holds {kind}", allowed="one class a row, as text or a whole number"
        )
    values = (v for chunk in column.chunks for v in set(chunk.to_pylist()))
    found = in_order({v for v in map(as_name, values) if v is not None})
    numbers = [_number(v) for v in found]
    is_fraction = any(n is not None and not n.is_integer() for n in numbers)
    if found and all(n is not None for n in numbers) and is_fraction:
        raise DataError(
            source, f"label column '{name}' holds real numbers (such as {found[0]}), not classes",
            allowed="classes as text or whole numbers", fix="Use --task regression, or another --label-column",
        )  # fmt: skip
    if len(found) > _MANY_CLASSES and len(found) > 0.5 * len(column):
        raise DataError(
            source, f"label column '{name}' has {len(found)} different values in {len(column)} rows",
            allowed="classes that repeat", fix="Name another column with --label-column, or use --task regression",
        )  # fmt: skip
    return tuple(found)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
