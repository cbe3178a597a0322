# SPDX-License-Identifier: Apache-2.0
"""Read data sets from a file, folder or Hub id into splits, and divide rows into training and validation rows."""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mirrortune.data.files.arrow import is_string
from mirrortune.data.files.class_folders import ClassFolder, class_folder, holds_media, refuse_lost_links
from mirrortune.data.files.readers import READERS, read_rows
from mirrortune.data.files.row_places import FileRows, IntArray, RowPlaces
from mirrortune.data.files.splits import SPLIT_NAMES, files_by_split, files_left_out, matching_files, metadata_files
from mirrortune.data.files.tables import joined, take_rows
from mirrortune.data.row_stream import RowStream
from mirrortune.errors import ConfigError, DataError, HubError, did_you_mean, first_line
from mirrortune.system.hub import hub_errors, resolve_commit
from mirrortune.system.paths import (
    DataPlace,
    is_system,
    sha256_of,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Rows of one split.

    Attributes:
        table: the rows; for a stream, its first rows.
        source: name of the rows in messages (a path, or ``id split``).
        folder: base folder of relative paths in the rows, or None.
        stream: stream of all rows, if they are streamed.
        files: files that the rows were read from, if known.
        kept: indices of the rows in the files, shape (N,); None for all rows.
        remarks: notes on files that were left out when the split was read.
        is_contained: whether files named in the rows must be in ``folder``.
        known: values that were computed from the rows, each (N,): hashes of cells by column, and those of
            :meth:`once`. :meth:`take` carries them over; any other copy begins without.
    """

    table: pa.Table
    source: str
    folder: Path | None = None
    stream: RowStream | None = None
    files: tuple[FileRows, ...] = ()
    kept: IntArray | None = None
    remarks: tuple[str, ...] = ()
    is_contained: bool = False
    known: dict[Hashable, npt.NDArray[Any]] = field(init=False, repr=False, compare=False, default_factory=dict)

    @property
    def places(self) -> RowPlaces:
        """The files and lines of the rows."""
        return RowPlaces(source=self.source, files=self.files, kept=self.kept)

    def take(self, keep: npt.NDArray[np.bool_]) -> Split:
        """Return the rows where ``keep`` (N,) is true, in order."""
        part = replace(self, table=take_rows(self.table, keep), kept=self.places.take(keep).kept)
        part.known.update((key, values[keep]) for key, values in self.known.items())
        return part

    def once(self, key: Hashable, read: Callable[[Split], npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """Return what ``read`` returns for the rows, (N,); it is called once for them and the parts taken of them."""
        if key not in self.known:
            self.known[key] = read(self)
        return self.known[key]

    def changed(self, change: Callable[[pa.Table], pa.Table]) -> Split:
        """Return the rows with ``change`` applied to their table and to those that a stream will yield."""
        stream = self.stream
        if stream is not None:
            flatten = stream.flatten
            stream = replace(stream, flatten=lambda table: change(flatten(table)))
        return replace(self, table=change(self.table), stream=stream)

    def with_columns(self, columns: Iterable[str]) -> Split:
        """Return the split with a column of nulls added for each missing one of ``columns``."""
        table = self.table
        for column in columns:
            if column not in table.column_names:
                table = table.append_column(column, pa.nulls(table.num_rows))
        return self if table is self.table else replace(self, table=table)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """The splits of a data set.

    Attributes:
        splits: splits by name.
        origin: origin of the data set, for environment.json.
        task: task that reads the rows, if joining several data sets had to find it; else None.
        notes: notes on how the task was found.
    """

    splits: dict[str, Split]
    origin: dict[str, Any] = field(default_factory=dict)
    task: Any = None
    notes: tuple[str, ...] = ()

    def find(self, wanted: str) -> Split | None:
        """Return the split called ``wanted``, or by another common name of it; None if there is none."""
        for name in (wanted, *_names_of(wanted)):
            if name in self.splits:
                return self.splits[name]
        return None

    def name_of(self, split: Split) -> str:
        """Return the name of one of the splits."""
        return next(name for name, own in self.splits.items() if own is split)

    def require(self, wanted: str, where: str) -> Split:
        """Return the split called ``wanted``, see :meth:`find`; raise a DataError that lists the splits if none is."""
        found = self.find(wanted)
        if found is None:
            problem = f"there is no split '{wanted}'.{did_you_mean(wanted, self.splits)}"
            raise DataError(where, problem, allowed=", ".join(self.splits))
        return found


def may_be_same_split(one: str, other: str) -> bool:
    """Return whether two names may stand for the same split, such as ``validation`` and ``dev``."""
    return one == other or other in _names_of(one)


def _names_of(split: str) -> tuple[str, ...]:
    """Return the common names of the split with this name; empty if it is not a common one."""
    return next((names for names in SPLIT_NAMES.values() if split in names), ())


def load_data(
    place: DataPlace, *, config: str | None = None, revision: str | None = None, encoding: str = "utf-8",
    least_rows: int = 2,
) -> DataSet:  # fmt: skip
    """Read a data set.

    Args:
        place: a file; a pattern for several files; a folder with train/validation/test files, or with a folder of
            images for each class; ``shipped:NAME`` for data inside this package; a Hub id, or ``hf://ID:CONFIG:SPLIT``.
            If it has a number of rows, at most that many training rows are used.
        config: configuration of a Hub data set (``sst2`` of ``nyu-mll/glue``).
        revision: branch, tag or commit of a Hub data set.
        encoding: encoding of local text files.
        least_rows: smallest number of rows that may be taken.

    Raises:
        DataError: files are missing or cannot be read.
        ConfigError: a configuration or revision is given for local data.
        HubError: the Hub cannot be reached, or refuses the request.
    """
    if not place.is_local:
        return _sampled(_load_from_hub(place, config, revision), place.rows, least_rows)
    refuse_hub_settings(config, revision)
    local = place.path()
    if place.kind == "pattern":
        found = _load_files(place.name, encoding)
    else:
        found = _load_folder(local, encoding) if local.is_dir() else _load_file(local, encoding)
    return _sampled(found, place.rows, least_rows)


def refuse_hub_settings(config: str | None, revision: str | None) -> None:
    """Raise a ConfigError if a configuration or revision is given; called for local data."""
    for key, value in (("data.config", config), ("data.revision", revision)):
        if value is not None:
            raise ConfigError(key, f"local data has none, got {value!r}", fix="Remove it")


def _sampled(data: DataSet, count: int | None, least: int) -> DataSet:
    """Return the data set with at most ``count`` training rows, drawn with a fixed seed."""
    train = data.find("train")
    if count is None or train is None:
        return data
    if count < least:
        if least == 1:
            raise ConfigError("data.validation_path", f"got #{count}", allowed="#1 or more")
        raise ConfigError("--data", f"got #{count}", allowed="#2 or more: rows to train on and rows to validate on")
    name = next(n for n, split in data.splits.items() if split is train)
    fewer = {**data.splits, name: take_subset(train, count, 0)}
    return DataSet(splits=fewer, origin={**data.origin, "sample": count})


def _load_files(pattern: str, encoding: str) -> DataSet:
    """Read all files that match a pattern such as ``rows/*.jsonl`` as one split, in the order of their names."""
    files = matching_files(pattern)
    if not files:
        raise DataError(pattern, "no file matches", fix="Check the pattern given to --data, and quote it in the shell")
    split = _read_files(files, pattern, files[0].parent, encoding)
    return DataSet(splits={"train": split}, origin={"path": pattern, "sha256": {str(f): sha256_of(f) for f in files}})


def _read_files(files: Sequence[Path], source: str, folder: Path, encoding: str) -> Split:
    """Read one or more files in the given order as one split."""
    tables, rows = zip(*(read_rows(file, encoding) for file in files), strict=True)
    return Split(table=flat(joined(tables, source)), source=source, folder=folder, files=rows)


def set_aside(split: Split, fraction: float, seed: int, strata: npt.NDArray[np.generic] | None) -> tuple[Split, Split]:
    """Divide a training split at random into training and validation rows, optionally stratified.

    Args:
        split: split with at least two rows.
        fraction: share of the rows for validation, in (0, 1).
        seed: seed of the draw, which determines the rows.
        strata: group of each row, or None. A group of at least two rows has rows in both parts.

    Returns:
        Training and validation rows, each in their original order.
    """
    rows = split.table.num_rows
    if rows < 2:
        raise DataError(split.source, f"{rows} row cannot be split into training and validation", allowed="2 or more")
    random = np.random.default_rng(seed)
    groups = [np.arange(rows)] if strata is None else [np.flatnonzero(strata == g) for g in np.unique(strata)]
    chosen: list[int] = []
    for members in groups:
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        chosen += list(random.permutation(members)[:count])
    if not chosen:  # each group has a single row: draw one of them
        chosen = [int(random.integers(rows))]
    held = np.zeros(rows, dtype=bool)
    held[chosen] = True
    return split.take(~held), split.take(held)


def take_subset(split: Split, limit: int | None, seed: int) -> Split:
    """Return a random subset of at most ``limit`` rows in their original order; ``seed`` determines it."""
    rows = split.table.num_rows
    if limit is None or limit >= rows:
        return split
    keep = np.zeros(rows, dtype=bool)
    keep[np.random.default_rng([seed, rows]).permutation(rows)[:limit]] = True
    return split.take(keep)


def flat(table: pa.Table) -> pa.Table:
    """Return the table with structs of texts (``translation: {en, ro}``) flattened to columns (``translation.en``)."""
    names = [
        f.name for f in table.schema if pa.types.is_struct(f.type) and all(is_string(part.type) for part in f.type)
    ]
    for name in names:
        parts = table.select([name]).flatten()
        if {*parts.column_names} & {*table.column_names}:
            continue  # it stays as it is, beside the column that has the name of a part
        table = table.remove_column(table.column_names.index(name))
        for part in parts.column_names:
            table = table.append_column(part, parts.column(part))
    return table


def _load_file(path: Path, encoding: str) -> DataSet:
    split = _read_files([path], str(path), path.parent, encoding)
    return DataSet(splits={"train": split}, origin={"path": str(path), "sha256": {path.name: sha256_of(path)}})


def _load_folder(folder: Path, encoding: str) -> DataSet:
    splits: dict[str, Split] = {}
    hashes: dict[str, str] = {}
    remarks: tuple[str, ...] = ()
    for name, files in files_by_split(folder).items():
        source = str(files[0]) if len(files) == 1 else f"{folder} {name}"
        splits[name] = _read_files(files, source, folder, encoding)
        hashes |= {str(f.relative_to(folder)): sha256_of(f) for f in files}
    if splits:
        remarks = files_left_out(folder)
    else:
        splits, remarks = _class_folders(folder)
        if all(len(split.table.column("label").unique()) < 2 for split in splits.values()) and metadata_files(folder):
            splits = {}  # a folder of files that the table beside it names, and no class
        paths = {name: (split.folder or folder, split.table.column(0).to_pylist()) for name, split in splits.items()}
        hashes = {name: names_and_sizes_sha256([at / f for f in found], found) for name, (at, found) in paths.items()}
    for name, file in ({} if splits else metadata_files(folder)).items():
        splits[name] = _read_files([file], str(file), file.parent, encoding)
        hashes[str(file.relative_to(folder))] = sha256_of(file)
        remarks = tuple(remark for remark in remarks if remark.partition(":")[0] in SPLIT_NAMES.keys() - {name})
    if not splits:
        names = sorted(p.name for p in folder.iterdir() if not is_system(p.name))
        raise DataError(
            str(folder),
            f"no train, validation or test file; it holds {', '.join(names[:12]) or 'nothing'}"
            + "".join(f"; {remark}" for remark in remarks),
            allowed=f"train, validation, test with one of {', '.join(READERS)}, a folder of images for each class, "
            "or a folder that the datasets library saved",
            fix="Rename the files, or give a single file to --data",
        )
    first = next(iter(splits))
    splits[first] = replace(splits[first], remarks=remarks)
    return DataSet(splits=splits, origin={"path": str(folder), "sha256": hashes})


def _class_folders(folder: Path) -> tuple[dict[str, Split], tuple[str, ...]]:
    """Read one folder for each class, or folders train, validation and test of such folders; also return remarks.

    A folder named ``train`` is a class if no other is named as a split, it holds images but no folders of them, and it
    is beside other folders of images. (A folder ``test`` of images alone rather lacks their classes.)
    """
    subs = {p.name.lower(): p for p in folder.iterdir() if p.is_dir() and not is_system(p.name)}
    parts = {split: next(subs[n] for n in names if n in subs) for split, names in SPLIT_NAMES.items()
             if any(n in subs for n in names)}  # fmt: skip
    found: dict[str, ClassFolder] = {}
    remarks: list[str] = []
    for name, part in (parts or {"train": folder}).items():
        found[name] = class_folder(part)
        remarks += [f"{name}: {remark}" if parts else remark for remark in found[name].remarks]
        if parts and found[name].table is None:
            remarks.append(f"{name}: {part} has no folder of images or recordings for each class")
    if parts.keys() == {"train"} and found["train"].table is None:
        part = next(iter(parts.values()))
        if holds_media(part) and any(holds_media(sub) for sub in subs.values() if sub != part):
            whole = class_folder(folder)
            note = f"'{part.name}' is read as a class, not as a split, as it holds no folders"
            found, parts, remarks = {"train": whole}, {}, [note, *whole.remarks]
    if parts and any(own.table is not None for own in found.values()):
        refuse_lost_links(folder, folder.iterdir())
    others = sorted(p.name for p in subs.values() if parts and p not in parts.values())
    remarks += [f"left out, as they are not splits: {', '.join(others)}"] if others else []
    tables = {n: (parts.get(n, folder), c.table) for n, c in found.items() if c.table is not None}
    splits = {n: Split(table=t, source=str(part), folder=part) for n, (part, t) in tables.items()}
    return splits, tuple(remarks)


def _load_from_hub(place: DataPlace, config: str | None, revision: str | None) -> DataSet:
    loaded, origin = open_hub(place, config, revision)
    name, split = place.name, place.split
    commit, used = origin["commit"], _cached_commit(loaded)
    if used is not None and used != commit:
        # Offline, the library falls back to any cached revision, not only to the requested one.
        raise HubError(
            f"data set '{name}'",
            f"commit {commit[:12]} is not in the local cache (it holds {used[:12]})",
            fix="Run prepare online",
        )
    splits = {n: Split(table=_arrow(loaded[n]), source=f"{name} {n}") for n in loaded}
    found = DataSet(splits=splits, origin=origin)
    if not split:
        return found
    return DataSet(splits={"train": found.require(split, "--data")}, origin={**origin, "split": split})


def open_hub(
    place: DataPlace, config: str | None, revision: str | None, *, streaming: bool = False
) -> tuple[Any, dict[str, Any]]:
    """Load a Hub data set with the datasets library.

    Args:
        place: an id or address.
        config: configuration, unless the address names one.
        revision: branch, tag or commit.
        streaming: open the data set without downloading it.

    Returns:
        The splits by name, and the origin of the data set.

    Raises:
        ConfigError: ``config`` differs from the configuration in the address.
    """
    name, own = place.name, place.config
    if own is not None and config not in (None, own):
        raise ConfigError("data.config", f"got '{config}', and {place.text}", fix="Give one of the two")
    config = own or config
    commit = resolve_commit(name, name, revision, "dataset", "--data")
    with hub_errors(f"data set '{name}'", flag="--data"):
        import datasets  # noqa: PLC0415  (takes a second)

        datasets.disable_progress_bars()
        with _hub_data_errors(name):
            loaded = datasets.load_dataset(name, config, revision=commit, streaming=streaming)
    return loaded, {"repository": name, "config": config, "commit": commit}


@contextmanager
def _hub_data_errors(path: str) -> Iterator[None]:
    """Convert exceptions of ``datasets`` about the files of a data set to DataErrors; let failures of the Hub pass."""
    import datasets  # noqa: PLC0415

    where = f"data set '{path}'"
    try:
        yield
    except ValueError as error:
        if "BuilderConfig" in str(error) or "Config name is missing" in str(error):
            raise DataError(where, first_line(error, 2000), fix="Set data.config") from error
        if "Data files don't belong to" in str(error):
            raise DataError(
                where, "its README.md names files outside of the repository", fix="Set data.revision to another commit"
            ) from error  # fmt: skip
        raise
    except RuntimeError as error:
        if "scripts are no longer supported" in str(error):
            raise DataError(
                where, "it is a loading script, which the datasets library no longer runs",
                fix="Set data.revision=refs/convert/parquet, where the Hub keeps it as files",
            ) from error  # fmt: skip
        raise
    except datasets.exceptions.DatasetGenerationError as error:
        raise DataError(where, first_line(error.__cause__ or error, 2000)) from error
    except StopIteration as error:  # datasets takes the features of JSON from its first row
        raise DataError(where, "one of its splits has no rows", fix="Set data.config or data.revision") from error
    except (zipfile.BadZipFile, ImportError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(where, f"its files cannot be read ({first_line(error)})") from error


def _arrow(rows: Any) -> pa.Table:
    # with_format keeps the names of ClassLabel in the metadata of the schema, where tasks read them.
    table = rows.with_format("arrow")[:]
    return flat(table.replace_schema_metadata(rows.features.arrow_schema.metadata))


def _cached_commit(loaded: Any) -> str | None:
    """Return the commit in the path of the library's cache, or None."""
    for rows in loaded.values():
        for file in rows.cache_files:
            if re.fullmatch(r"[0-9a-f]{40}", Path(file["filename"]).parent.name):
                return Path(file["filename"]).parent.name
    return None


def names_and_sizes_sha256(files: Iterable[Path], names: Iterable[str]) -> str:
    """Return a hash of names and sizes, for files whose contents may be many gigabytes."""
    lines = [f"{name} {file.stat().st_size}" for file, name in zip(files, names, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
