# SPDX-License-Identifier: Apache-2.0
"""Finds a data set (file, folder or Hub id), reads its splits and, where there is none, sets rows aside for
validation.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mirrortune.data.columns import is_string
from mirrortune.data.files.class_folders import ClassFolder, class_folder
from mirrortune.data.files.readers import READERS, read_rows
from mirrortune.data.files.row_places import FileRows, IntArray, RowPlaces
from mirrortune.data.files.tables import joined, take_rows
from mirrortune.data.files.text_files import first_line
from mirrortune.data.row_stream import RowStream
from mirrortune.errors import ConfigError, DataError, HubError, did_you_mean
from mirrortune.system.hub import hub_errors, resolve_commit
from mirrortune.system.paths import (
    HUB_SCHEME,
    hub_address,
    is_pattern,
    is_system,
    local_path,
    looks_like_path,
    shipped_folder,
    split_sample,
    table_suffix,
)

# Names under which people keep the three splits.
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
# Suffixes of tables and archives of tables that are not read: a split may not vanish because it is in one of them.
_OTHER_TABLES = frozenset((
    ".7z", ".avro", ".bz2", ".db", ".dta", ".feather", ".h5", ".hdf5", ".ndjson", ".npy", ".npz", ".ods", ".orc",
    ".pickle", ".pkl", ".rar", ".rds", ".sav", ".sqlite", ".tab", ".tar", ".tgz", ".xls", ".xlsx", ".xml", ".xz",
    ".zip", ".zst",
))  # fmt: skip

# What save_to_disk of the datasets library writes beside its Arrow files: of several splits, and of each.
_SAVED_SPLITS, _SAVED = "dataset_dict.json", "state.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Rows of one split.

    Attributes:
        table: the rows.
        source: the name that messages give them (a path, or ``id split``).
        folder: where relative paths in the rows begin, or None.
        stream: all rows, where ``table`` holds only the first ones.
        files: the files that the rows were read from, where that is known.
        kept: which rows of the files these are, shape (N,); None for all of them.
        remarks: a line for each thing that was left out when the split was read.
        is_contained: whether files that the rows name must lie in ``folder``.
    """

    table: pa.Table
    source: str
    folder: Path | None = None
    stream: RowStream | None = None
    files: tuple[FileRows, ...] = ()
    kept: IntArray | None = None
    remarks: tuple[str, ...] = ()
    is_contained: bool = False

    @property
    def places(self) -> RowPlaces:
        """Where the rows stand in their files."""
        return RowPlaces(source=self.source, files=self.files, kept=self.kept)

    def take(self, keep: npt.NDArray[np.bool_]) -> Split:
        """The rows where ``keep`` (N,) is true, in order."""
        return replace(self, table=take_rows(self.table, keep), kept=self.places.take(keep).kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """The splits of a data set by their own names, and where they came from (for environment.json)."""

    splits: dict[str, Split]
    origin: dict[str, Any] = field(default_factory=dict)

    def find(self, wanted: str) -> Split | None:
        """The split called ``wanted``, or by one of the usual other names for it."""
        for name in (wanted, *_SPLIT_NAMES.get(wanted, ())):
            if name in self.splits:
                return self.splits[name]
        return None

    def require(self, wanted: str, where: str) -> Split:
        """Like :meth:`find`; DataError with the splits that exist when there is none."""
        found = self.find(wanted)
        if found is None:
            raise DataError(
                where,
                f"there is no split '{wanted}'.{did_you_mean(wanted, self.splits)}",
                allowed=", ".join(self.splits),
            )
        return found


def load_data(
    path: str,
    *,
    config: str | None = None,
    revision: str | None = None,
    encoding: str = "utf-8",
) -> DataSet:
    """Read a data set.

    Args:
        path: a file; a pattern for several; a folder with train/validation/test files, or with a folder of images for
            each class; ``shipped:NAME`` for data inside this package; a Hub id, or ``hf://ID:CONFIG:SPLIT``. ``#500``
            behind it takes 500 of the training rows.
        config: the Hub data set's configuration (``sst2`` of ``nyu-mll/glue``).
        revision: branch, tag or commit of a Hub data set.
        encoding: of local text files.

    Raises:
        DataError: unreadable or missing files.
        ConfigError: a configuration or revision for local data.
        HubError: whatever the Hub refused.
    """
    path, sample = split_sample(path)
    if path.startswith(HUB_SCHEME):
        return _sampled(_load_address(path, config, revision), sample)
    is_shipped = path.startswith("shipped:")
    local = shipped_folder() / path.removeprefix("shipped:") if is_shipped else local_path(path)
    if not (local.is_file() or local.is_dir() or looks_like_path(path)):
        return _sampled(_load_from_hub(path, config, revision), sample)
    for key, value in (("data.config", config), ("data.revision", revision)):
        if value is not None:
            raise ConfigError(key, f"local data has none, got {value!r}", fix="Remove it")
    if is_pattern(path):
        return _sampled(_load_files(path, encoding), sample)
    return _sampled(_load_folder(local, encoding) if local.is_dir() else _load_file(local, encoding), sample)


def _sampled(data: DataSet, count: int | None) -> DataSet:
    """The data set with at most ``count`` rows in its training split, always the same ones."""
    train = data.find("train")
    if count is None or train is None:
        return data
    if count < 2:
        raise ConfigError("--data", f"got #{count}", allowed="#2 or more: rows to learn from and rows to validate on")
    name = next(n for n, split in data.splits.items() if split is train)
    fewer = {**data.splits, name: take_subset(train, count, 0)}
    return DataSet(splits=fewer, origin={**data.origin, "sample": count})


def _load_address(address: str, config: str | None, revision: str | None) -> DataSet:
    """``hf://owner/name:config:split``, whose split is trained on; the latter two may be missing."""
    name, config, split = hub_address(address, config)
    found = _load_from_hub(name, config, revision)
    if not split:
        return found
    return DataSet(splits={"train": found.require(split, "--data")}, origin={**found.origin, "split": split})


def _load_files(pattern: str, encoding: str) -> DataSet:
    """All files that a pattern such as ``rows/*.jsonl`` stands for, in the order of their names, as one split."""
    files = matching_files(pattern)
    if not files:
        raise DataError(pattern, "no file matches", fix="Check the pattern given to --data, and quote it in the shell")
    split = _read_files(files, pattern, files[0].parent, encoding)
    return DataSet(
        splits={"train": split}, origin={"path": pattern, "sha256": {str(f): _file_sha256(f) for f in files}}
    )


def matching_files(pattern: str) -> list[Path]:
    """What a pattern stands for, in the order of names; hidden and system files only where it names them."""
    place = local_path(pattern)
    named = [part for part in place.parts if is_system(part)]
    found = [Path(name) for name in sorted(glob.glob(str(place), recursive=True))]  # noqa: PTH207

    def is_meant(part: str) -> bool:
        return not is_system(part) or any(fnmatch.fnmatchcase(part, pattern) for pattern in named)

    return [path for path in found if all(map(is_meant, path.parts))]


def _read_files(files: Sequence[Path], source: str, folder: Path, encoding: str) -> Split:
    """The rows of one file or more, one file after the other."""
    tables, rows = zip(*(read_rows(file, encoding) for file in files), strict=True)
    return Split(table=flat(joined(tables, source)), source=source, folder=folder, files=rows)


def set_aside(split: Split, fraction: float, seed: int, strata: npt.NDArray[np.generic] | None) -> tuple[Split, Split]:
    """Cut validation rows from a training split, at random but the same for a seed, groups of ``strata`` in proportion.

    Args:
        split: at least two rows.
        fraction: share of the rows for validation, in (0, 1).
        seed: of the draw.
        strata: group of every row, or None; every group of two rows or more keeps some in both parts.

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
    if not chosen:  # every group has a single row: take one all the same
        chosen = [int(random.integers(rows))]
    held = np.zeros(rows, dtype=bool)
    held[chosen] = True
    return split.take(~held), split.take(held)


def take_subset(split: Split, limit: int | None, seed: int) -> Split:
    """A seeded random subset of at most ``limit`` rows, in their original order; the split itself without a limit."""
    rows = split.table.num_rows
    if limit is None or limit >= rows:
        return split
    keep = np.zeros(rows, dtype=bool)
    keep[np.random.default_rng([seed, rows]).permutation(rows)[:limit]] = True
    return split.take(keep)


def flat(table: pa.Table) -> pa.Table:
    """The table with structs of texts (such as ``translation: {en, ro}``) as columns (``translation.en``)."""
    names = [
        f.name for f in table.schema if pa.types.is_struct(f.type) and all(is_string(part.type) for part in f.type)
    ]
    for name in names:
        parts = table.select([name]).flatten()
        table = table.remove_column(table.column_names.index(name))
        for part in parts.column_names:
            table = table.append_column(part, parts.column(part))
    return table


def _load_file(path: Path, encoding: str) -> DataSet:
    split = _read_files([path], str(path), path.parent, encoding)
    return DataSet(splits={"train": split}, origin={"path": str(path), "sha256": {path.name: _file_sha256(path)}})


def _load_folder(folder: Path, encoding: str) -> DataSet:
    splits: dict[str, Split] = {}
    hashes: dict[str, str] = {}
    remarks: tuple[str, ...] = ()
    for name, files in files_by_split(folder).items():
        source = str(files[0]) if len(files) == 1 else f"{folder} {name}"
        splits[name] = _read_files(files, source, folder, encoding)
        hashes |= {str(f.relative_to(folder)): _file_sha256(f) for f in files}
    if splits:
        remarks = files_left_out(folder)
    else:
        splits, remarks = _class_folders(folder)
        hashes = {name: _paths_sha256(split) for name, split in splits.items()}
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


def files_by_split(folder: Path) -> dict[str, list[Path]]:
    """The tables in a folder by the split that their names begin with, or those that ``save_to_disk`` of the datasets
    library wrote there; DataError for the latter if they are damaged.
    """
    if (folder / _SAVED_SPLITS).is_file():
        names = _saved(folder / _SAVED_SPLITS).get("splits", [])
        return {name: _saved_files(folder / Path(name).name) for name in names}
    if (folder / _SAVED).is_file():
        return {"train": _saved_files(folder)}
    found: dict[str, list[Path]] = {}
    for path in sorted(p for p in folder.iterdir() if table_suffix(p) is not None and not is_system(p.name)):
        split = _split_of(path)
        if split is not None:
            found.setdefault(split, []).append(path)
    return found


def _is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` of the datasets library wrote the folder."""
    return (folder / _SAVED_SPLITS).is_file() or (folder / _SAVED).is_file()


def _saved(path: Path) -> dict[str, Any]:
    """What a file of ``save_to_disk`` says."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(str(path), f"it cannot be read ({first_line(error)})", fix="Save the data set again") from error
    if not isinstance(found, dict):
        raise DataError(str(path), f"got {type(found).__name__}", allowed="an object", fix="Save the data set again")
    return found


def _saved_files(folder: Path) -> list[Path]:
    """The Arrow files of one data set that ``save_to_disk`` wrote, in the order of its rows."""
    state = _saved(folder / _SAVED)
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise DataError(
            str(folder), "its rows are chosen by a file of indices", fix="Call flatten_indices() before save_to_disk"
        )
    entries = state.get("_data_files", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(str(folder / _SAVED), "its _data_files is no list of files", fix="Save the data set again")
    files = [folder / Path(str(entry.get("filename"))).name for entry in entries]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        problem = f"{missing[0]} is missing" if missing else f"{_SAVED} names no files"
        raise DataError(str(folder), problem, fix="Copy the whole folder, or save the data set again")
    return files


def files_left_out(folder: Path) -> tuple[str, ...]:
    """A remark on the tables of a folder that :func:`files_by_split` leaves out.

    Raises:
        DataError: a split of whose files none is of a type that is read.
    """
    if _is_saved(folder):
        return ()
    read, lost, beside = files_by_split(folder), [], []
    for path in sorted(p for p in folder.iterdir() if p.is_file() and not is_system(p.name)):
        split, is_other = _split_of(path), path.suffix.lower() in _OTHER_TABLES
        if is_other and split is not None and split not in read:
            lost.append(path.name)
        elif (is_other and split is not None) or (split is None and table_suffix(path) is not None):
            beside.append(path.name)
    if lost:
        raise DataError(
            str(folder), f"of unknown file type: {', '.join(lost)}", allowed=", ".join(READERS),
            fix="Convert the files, or move them away",
        )  # fmt: skip
    shown = ", ".join(beside[:12]) + (f" and {len(beside) - 12} more" if len(beside) > 12 else "")
    return (f"left out, as they are not of a split: {shown}",) if beside else ()


def _split_of(path: Path) -> str | None:
    """The split that a file is of by its name: train-00000-of-00002.csv.gz is train."""
    stem = re.split(r"[-_]\d", path.name.lower().split(".")[0], maxsplit=1)[0]
    return next((split for split, names in _SPLIT_NAMES.items() if stem in names), None)


def _class_folders(folder: Path) -> tuple[dict[str, Split], tuple[str, ...]]:
    """A folder for each class, or folders train, validation and test of such folders; and what was left out."""
    subs = {p.name.lower(): p for p in folder.iterdir() if p.is_dir() and not is_system(p.name)}
    parts = {split: next(subs[n] for n in names if n in subs) for split, names in _SPLIT_NAMES.items()
             if any(n in subs for n in names)}  # fmt: skip
    found: dict[str, ClassFolder] = {}
    remarks: list[str] = []
    for name, part in (parts or {"train": folder}).items():
        found[name] = class_folder(part)
        remarks += [f"{name}: {remark}" if parts else remark for remark in found[name].remarks]
        if parts and found[name].table is None:
            remarks.append(f"{name}: nothing in {part} is an image or a recording")
    others = sorted(p.name for p in subs.values() if parts and p not in parts.values())
    remarks += [f"left out, as they are no split: {', '.join(others)}"] if others else []
    tables = {n: (parts.get(n, folder), c.table) for n, c in found.items() if c.table is not None}
    splits = {n: Split(table=t, source=str(part), folder=part) for n, (part, t) in tables.items()}
    return splits, tuple(remarks)


def _paths_sha256(split: Split) -> str:
    """Of the names and sizes of a class folder's files: their content may be many gigabytes."""
    assert split.folder is not None
    paths = split.table.column(0).to_pylist()
    lines = [f"{path} {(split.folder / path).stat().st_size}" for path in paths]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _load_from_hub(path: str, config: str | None, revision: str | None) -> DataSet:
    commit = resolve_commit(path, path, revision, "dataset", "--data")
    with hub_errors(f"data set '{path}'", flag="--data"):
        import datasets  # noqa: PLC0415  (a second to import, and only Hub data needs it)

        datasets.disable_progress_bars()
        with hub_data_errors(path):
            loaded = datasets.load_dataset(path, config, revision=commit)
    used = _cached_commit(loaded)
    if used is not None and used != commit:
        # The library falls back to whatever it has cached when it cannot reach the Hub, whichever revision was asked
        # for.
        raise HubError(
            f"data set '{path}'",
            f"commit {commit[:12]} is not in the local cache (it holds {used[:12]})",
            fix="Run prepare online",
        )
    splits = {n: Split(table=_arrow(loaded[n]), source=f"{path} {n}") for n in loaded}
    return DataSet(splits=splits, origin={"repository": path, "config": config, "commit": commit})


@contextmanager
def hub_data_errors(path: str) -> Iterator[None]:
    """What a data set's own files make ``datasets`` raise as a DataError; failures of the Hub are let through."""
    import datasets  # noqa: PLC0415

    where = f"data set '{path}'"
    try:
        yield
    except ValueError as error:
        if "BuilderConfig" in str(error) or "Config name is missing" in str(error):
            raise DataError(where, _first_sentence(error), fix="Set data.config") from error
        if "Data files don't belong to" in str(error):
            raise DataError(
                where, "its README.md names files outside of the repository", fix="Set data.revision to another commit"
            ) from error  # fmt: skip
        raise
    except RuntimeError as error:
        if "scripts are no longer supported" in str(error):
            raise DataError(
                where, "it is a script, which is no longer run",
                fix="Set data.revision=refs/convert/parquet, where the Hub keeps it as files",
            ) from error  # fmt: skip
        raise
    except datasets.exceptions.DatasetGenerationError as error:
        raise DataError(where, _first_sentence(error.__cause__ or error)) from error
    except (zipfile.BadZipFile, ImportError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(where, f"its files cannot be read ({_first_sentence(error)})") from error


def _arrow(rows: Any) -> pa.Table:
    # with_format keeps ClassLabel names in the schema's metadata, where the tasks look for them.
    table = rows.with_format("arrow")[:]
    return flat(table.replace_schema_metadata(rows.features.arrow_schema.metadata))


def _cached_commit(loaded: Any) -> str | None:
    """The commit in the path of the library's own cache, where it has one."""
    for rows in loaded.values():
        for file in rows.cache_files:
            if re.fullmatch(r"[0-9a-f]{40}", Path(file["filename"]).parent.name):
                return Path(file["filename"]).parent.name
    return None


def _first_sentence(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
