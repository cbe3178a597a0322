# SPDX-License-Identifier: Apache-2.0
"""Mixtures: several data sets joined to one table or stream, with a column for the source of each row."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from typing_extensions import override

from mirrortune.data.columns import is_nan, number_of
from mirrortune.data.dataset import DataSet, Split
from mirrortune.data.examples import IntArray
from mirrortune.data.files.arrow import is_json, is_list, is_string, json_array, python_values, text_array
from mirrortune.data.files.media import FileCells
from mirrortune.data.files.row_places import FileRows
from mirrortune.data.files.splits import SPLIT_NAMES
from mirrortune.data.files.tables import joined
from mirrortune.data.labels import as_name, feature_names, names_in
from mirrortune.data.row_stream import Place, RowStream
from mirrortune.errors import ConfigError, DataError
from mirrortune.system.paths import DataPlace

SOURCE_COLUMN = "mirrortune.source"
"""Column of a mixture with the index of each row's source, from 0."""
_FILE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_MOST_NAMED, _MOST_VALUES = 3, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """A data set of a recipe.

    Attributes:
        place: path, pattern, folder or Hub id.
        weight: number of times that each row is drawn per epoch, on average.
        revision: branch, tag or commit on the Hub, where ``data.revision`` does not give it.
        columns: settings that name its columns, where they differ from those of the recipe's ``data`` section.
        is_item: whether it is an item of a list, and not the only data set.
    """

    place: DataPlace
    weight: float = 1.0
    revision: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    is_item: bool = False

    @property
    def name(self) -> str:
        """The path or id given by the user."""
        return self.place.text


def mixture_problems(
    sources: Sequence[DataSource], *, of_hub: Mapping[str, str | None], of_classes: Mapping[str, bool]
) -> list[ConfigError]:
    """Return an error for each setting of a recipe that contradicts a list of data sets.

    Args:
        sources: the data sets.
        of_hub: values of ``data.config`` and ``data.revision``, by key, which apply to a single data set only.
        of_classes: settings that count or draw rows by class -> whether they are set.
    """
    if not any(source.is_item for source in sources):
        return []
    fixes = {"data.config": "Name it in the path, hf://ID:CONFIG", "data.revision": "Give each item its own revision"}
    found = [
        ConfigError(key, f"there is a list of data sets, got {value!r}", fix=fixes[key])
        for key, value in of_hub.items()
        if value is not None
    ]
    weighted = any(source.weight != 1 for source in sources)
    found += [
        ConfigError(key, "weights of data.path draw rows of some sources more often than others, which it ignores",
                    fix="Remove the weights, or this setting")
        for key, is_set in of_classes.items()
        if is_set and weighted
    ]  # fmt: skip
    return found


def joint_name(names: Sequence[str]) -> str:
    """Return a name for several data sets in messages."""
    more = f" + {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return " + ".join(names[:_MOST_NAMED]) + more


def source_numbers(table: pa.Table) -> IntArray | None:
    """Return the source of each row of a mixture, shape (N,), from 0; None for the rows of one data set."""
    if SOURCE_COLUMN not in table.column_names:
        return None
    return np.asarray(table.column(SOURCE_COLUMN).to_numpy())


@dataclass(frozen=True, slots=True, kw_only=True)
class Adjustment:
    """The changes that make the tables of one source match those of the others.

    Attributes:
        number: index of the source.
        names: original column name -> new name.
        dropped: columns that would be mistaken for those of other sources.
        features: class names of the columns that hold class indices, by new column name.
        as_text: new names of the columns whose values become text: class names, or numbers.
        files: new names of the columns of files.
        as_structs: whether files become structs of bytes and path, as in the datasets library.
        folder: base folder of relative paths.
    """

    number: int
    names: Mapping[str, str] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    features: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    as_text: frozenset[str] = frozenset()
    files: frozenset[str] = frozenset()
    as_structs: bool = False
    folder: Path | None = None

    def table(self, table: pa.Table) -> pa.Table:
        """Apply the changes to a table of the source."""
        kept = [name for name in table.column_names if name not in self.dropped]
        found = table.select(kept).rename_columns([self.names.get(name, name) for name in kept])
        found = found.replace_schema_metadata(None)
        for column in {*self.features, *self.as_text, *self.files} & set(found.column_names):
            place, values = found.column_names.index(column), found.column(column)
            if column in self.files:
                made = _files(values, self.folder, as_structs=self.as_structs)
            else:
                made = _texts(values, self.features.get(column))
            found = found.set_column(place, column, made)
        numbers = pa.array(np.full(found.num_rows, self.number, dtype=np.int32))
        return found.append_column(SOURCE_COLUMN, numbers)


def _texts(values: pa.ChunkedArray, features: tuple[str, ...] | None) -> pa.Array:
    """Convert labels, or lists of them, to text; class indices become class names, or null if there is none."""

    def text(value: Any) -> str | None:
        if features is not None and isinstance(value, int) and not isinstance(value, bool):
            return features[value] if 0 <= value < len(features) else None
        return as_name(value)

    cells = python_values(values)
    if not any(isinstance(cell, list) for cell in cells):
        return text_array([text(cell) for cell in cells])
    # A negative tag marks a row without tags.
    named = (None if cell is None else [text(part) for part in cell] for cell in cells)
    lists = [None if row is None or (row and all(name is None for name in row)) else row for row in named]
    return pa.array(lists, pa.list_(pa.string()))


def _files(values: pa.ChunkedArray, folder: Path | None, *, as_structs: bool) -> pa.Array:
    """Return files with absolute paths."""

    def absolute(path: str | None) -> str | None:
        return path if path is None or folder is None else str((folder / Path(path).expanduser()).absolute())

    cells = values.to_pylist()
    if not as_structs:
        return text_array([absolute(cell) for cell in cells])
    found = []
    for cell in cells:
        whole = cell if isinstance(cell, dict) else {"bytes" if isinstance(cell, bytes) else "path": cell}
        content = whole.get("bytes")
        found.append({"bytes": content, "path": absolute(whole.get("path")) if content is None else whole.get("path")})
    return pa.array(found, _FILE)


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedStream(RowStream):
    """Several streams read together: each block has a fixed number of rows of each, and a stream that ends restarts.

    Attributes:
        streams: streams of the sources.
        weights: relative shares of the sources in the rows.
    """

    streams: tuple[RowStream, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, streams: Sequence[RowStream], weights: Sequence[float]) -> MixedStream:
        """Create the mixture of several streams."""
        return cls(
            rows=None, flatten=lambda table: table, guard=nullcontext,
            source=joint_name([stream.source for stream in streams]), streams=tuple(streams), weights=tuple(weights),
        )  # fmt: skip

    def counts(self, size: int) -> list[int]:
        """Divide ``size`` rows among the sources by weight, rounded, with at least one row each."""
        exact = [size * weight / sum(self.weights) for weight in self.weights]
        found = [max(1, math.floor(count)) for count in exact]
        order = sorted(range(len(exact)), key=lambda i: found[i] - exact[i])
        for i in order[: max(0, size - sum(found))]:
            found[i] += 1
        return found

    @override
    def head(self, count: int) -> pa.Table:
        return _joined_tables([stream.head(count) for stream in self.streams], self.source)

    @override
    def in_order(self, size: int) -> Iterator[pa.Table]:
        for stream in self.streams:
            yield from stream.in_order(size)

    @override
    def shares_pieces(self, num_ranks: int) -> bool:
        return all(stream.shares_pieces(num_ranks) for stream in self.streams)

    @override
    def blocks(
        self, *, rank: int, num_ranks: int, size: int, seed: int, start: Place
    ) -> Iterator[tuple[Place, pa.Table]]:
        begins = [Place(epoch=start.epoch, piece=start.piece, row=start.row)]
        begins += [Place(epoch=epoch, piece=piece, row=row) for epoch, piece, row in start.others]
        begins += [Place()] * (len(self.streams) - len(begins))
        parts = [
            stream.whole_blocks(rank=rank, num_ranks=num_ranks, size=count, seed=seed, start=begin)
            for stream, count, begin in zip(self.streams, self.counts(size), begins, strict=True)
        ]
        for found in zip(*parts, strict=True):
            first, *others = (place for place, _ in found)
            place = replace(first, others=tuple((other.epoch, other.piece, other.row) for other in others))
            yield place, _joined_tables([table for _, table in found], self.source)


def _joined_tables(tables: Sequence[pa.Table], source: str) -> pa.Table:
    return joined(_aligned(tables), source)


def joined_splits(splits: Sequence[Split], weights: Sequence[float] = ()) -> Split:
    """Join the adjusted rows of several sources, one after the other; streams by their ``weights``."""
    files: list[FileRows] = []
    kept, start = [], 0
    for split in splits:
        rows = split.table.num_rows
        own = np.arange(rows) if split.kept is None else split.kept
        known = split.files or (FileRows(name=split.source, count=int(own.max(initial=-1)) + 1),)
        files += known
        kept.append(own + start)
        start += sum(file.count for file in known)
    names = list(dict.fromkeys(split.source for split in splits))
    streams = [split.stream for split in splits if split.stream is not None]
    remarks = tuple(dict.fromkeys(remark for split in splits for remark in split.remarks))
    return Split(
        table=_joined_tables([split.table for split in splits], joint_name(names)), source=joint_name(names),
        files=tuple(files), kept=np.concatenate(kept), remarks=remarks, folder=splits[0].folder,
        stream=MixedStream.of(streams, weights) if len(streams) == len(splits) else None,
    )  # fmt: skip


def _aligned(tables: Sequence[pa.Table]) -> list[pa.Table]:
    """Return the tables with JSON in nested columns of different types: Arrow would give their rows the same keys."""
    known: dict[str, set[pa.DataType]] = {}
    for schema_field in itertools.chain.from_iterable(table.schema for table in tables):
        if not pa.types.is_null(schema_field.type):
            known.setdefault(schema_field.name, set()).add(schema_field.type)
    mixed = {
        name for name, kinds in known.items()
        if len(kinds) > 1 and all(_may_be_json(kind) for kind in kinds) and not all(is_string(kind) for kind in kinds)
    }  # fmt: skip
    found = []
    for whole in tables:
        table = whole
        for column in mixed & set(table.column_names):
            kind = table.schema.field(column).type
            if not (is_json(kind) or pa.types.is_null(kind)):
                place = table.column_names.index(column)
                table = table.set_column(place, column, json_array(python_values(table.column(column))))
        found.append(table)
    return found


def _may_be_json(kind: pa.DataType) -> bool:
    return bool(is_json(kind) or is_string(kind) or is_list(kind) or (pa.types.is_struct(kind) and kind != _FILE))


def joined_data(
    parts: Sequence[DataSet], adjust: Sequence[Callable[[Split], Split]], weights: Sequence[float], task: Any
) -> DataSet:
    """Join data sets split by split; a split has the rows of those sources that have it.

    Args:
        parts: data sets of the sources.
        adjust: for each source, the function that makes its splits match the others.
        weights: weights of the sources.
        task: task that reads all sources.
    """
    names = _joint_names(parts)
    found = [{names[own]: split for own, split in part.splits.items()} for part in parts]
    splits = {}
    for name in dict.fromkeys(names.values()):
        having = [i for i, own in enumerate(found) if name in own]
        splits[name] = joined_splits([adjust[i](found[i][name]) for i in having], [weights[i] for i in having])
    return DataSet(splits=splits, origin={"sources": [part.origin for part in parts]}, task=task)


def _joint_names(parts: Sequence[DataSet]) -> dict[str, str]:
    """Return the name of each split in the joint data set: one source's ``dev`` is another's ``validation``.

    A source that has two of such names keeps them apart.
    """
    names = list(dict.fromkeys(name for part in parts for name in part.splits))
    joint = {name: name for name in names}
    for group in SPLIT_NAMES.values():
        there = [name for name in names if name in group]
        if there and all(sum(name in part.splits for name in there) <= 1 for part in parts):
            joint |= dict.fromkeys(there, there[0])
    return joint


def root_folder(split: Split) -> Path | None:
    """Return the folder that all absolute paths of a split's files are in."""
    return None if split.folder is None else Path(split.folder.absolute().anchor)


def refuse_outside(split: Split, column: str, role: str) -> None:
    """Raise a DataError for the first file outside the folder of the split, if the split must not name such files."""
    files = FileCells.of(split, column, role=role, readable="")
    for row in files.outside() if split.is_contained else ():
        files.open(row)


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelValues:
    """The labels of one source.

    Attributes:
        name: name of the source.
        column: column of the labels.
        features: class names of a column of class indices, or None.
        names: values of the column as class names, sorted.
        kind: type of the values: ``text``, ``numbers`` or ``lists``.
    """

    name: str
    column: str
    features: tuple[str, ...] | None
    names: tuple[str, ...]
    kind: str

    @classmethod
    def of(cls, table: pa.Table, column: str, name: str, *, are_classes: bool = True) -> LabelValues:
        """Read the labels of a source; raise a DataError if ``are_classes`` and they are not classes."""
        features, are_lists, values = feature_names(table, column), is_list(table.schema.field(column).type), set()
        for chunk in table.column(column).chunks:
            for cell in python_values(chunk):
                are_lists |= isinstance(cell, list)
                parts = cell if isinstance(cell, list) else [cell]
                values |= {part for part in parts if not isinstance(part, (dict, list))}
        if are_classes and features is None and not are_lists:
            names_in(table.column(column), name, column)
        found = features or tuple(sorted({known for value in values if (known := as_name(value)) is not None}))
        plain = [value for value in found if not is_nan(value)]
        are_numbers = features is None and all(number_of(value) is not None for value in plain)
        return cls(
            name=name, column=column, features=features, names=found,
            kind="lists" if are_lists else "numbers" if are_numbers and plain else "text",
        )  # fmt: skip

    def describe(self) -> str:
        """Return a text with the number of labels and the first of them."""
        more = ", ..." if len(self.names) > _MOST_VALUES else ""
        return f"{len(self.names)} of {self.name} ({', '.join(self.names[:_MOST_VALUES])}{more})"


def check_labels_match(labels: Sequence[LabelValues]) -> None:
    """Check that the labels of all sources have the same type, and not 0 and 1 in one and names in another.

    Raises:
        DataError: the types differ; the error names two such sources.
    """
    known = [own for own in labels if own.names]
    for own in known[1:]:
        first = known[0]
        if own.kind != first.kind:
            raise DataError(
                f"{first.name} and {own.name}",
                f"the labels of one are {first.kind} ({', '.join(first.names[:_MOST_VALUES])}; column "
                f"'{first.column}'), those of the other {own.kind} ({', '.join(own.names[:_MOST_VALUES])}; column "
                f"'{own.column}')",
                allowed="labels of one set, written in one way",
                fix="Write the same labels in both, or name another label_column in data.path",
            )  # fmt: skip


def united_names(labels: Sequence[LabelValues]) -> tuple[str, ...] | None:
    """Return the class names of all sources if one of them defines a list; None to read them from the rows."""
    if not any(own.features for own in labels):
        return None
    return tuple(dict.fromkeys(name for own in sorted(labels, key=lambda own: not own.features) for name in own.names))


def label_notes(labels: Sequence[LabelValues]) -> list[str]:
    """Return a note on the union of classes if the sources have different classes."""
    sets = [set(own.names) for own in labels if own.names]
    if len(sets) < 2 or all(found == sets[0] for found in sets):
        return []
    union = set.union(*sets)
    both = set.intersection(*sets)
    said = "no class is in all of them" if not both else f"{len(both)} in all of them"
    return [f"classes united: {'; '.join(own.describe() for own in labels)}; {len(union)} together, {said}"]


def strata_of_sources(table: pa.Table, strata: npt.NDArray[np.generic] | None) -> npt.NDArray[np.generic] | None:
    """Return the groups in which rows are divided: by source, and within it by ``strata`` (N,), if there are any."""
    numbers = source_numbers(table)
    if numbers is None:
        return strata
    if strata is None:
        return numbers
    _, groups = np.unique(strata, return_inverse=True)
    return np.asarray(numbers.astype(np.int64) * (int(groups.max(initial=0)) + 1) + groups)


def rows_of_sources(split: Split, chosen: Sequence[int], *, are_taken: bool = True) -> Split:
    """Return the rows of the chosen sources, or, unless ``are_taken``, of all others."""
    numbers = source_numbers(split.table)
    assert numbers is not None
    return split.take(np.isin(numbers, chosen) == are_taken)
