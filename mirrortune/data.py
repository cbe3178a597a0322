# SPDX-License-Identifier: Apache-2.0
"""Finds a data set (file, folder or Hub id), reads its splits and, where there is none, sets rows aside for
validation.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mirrortune.class_folders import class_folder
from mirrortune.columns import is_string
from mirrortune.errors import ConfigError, DataError, HubError, did_you_mean
from mirrortune.hub import hub_errors, resolve_commit
from mirrortune.locations import (
    HUB_SCHEME,
    hub_address,
    is_pattern,
    looks_like_path,
    shipped_folder,
    split_sample,
    table_suffix,
)
from mirrortune.row_chunks import row_chunks
from mirrortune.row_places import FileRows, IntArray, RowPlaces
from mirrortune.row_stream import RowStream
from mirrortune.table_parts import joined, take_rows
from mirrortune.tables import READERS, read_rows
from mirrortune.text_files import first_line

# Names under which people keep the three splits.
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}

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
    """

    table: pa.Table
    source: str
    folder: Path | None = None
    stream: RowStream | None = None
    files: tuple[FileRows, ...] = ()
    kept: IntArray | None = None

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
    local = shipped_folder() / path.removeprefix("shipped:") if is_shipped else Path(path).expanduser()
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
    files = [Path(name) for name in sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))]  # noqa: PTH207
    if not files:
        raise DataError(pattern, "no file matches", fix="Check the pattern given to --data, and quote it in the shell")
    split = _read_files(files, pattern, files[0].parent, encoding)
    return DataSet(
        splits={"train": split}, origin={"path": pattern, "sha256": {str(f): _file_sha256(f) for f in files}}
    )


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


def rows_in_both(train: pa.Table, validation: pa.Table, columns: Sequence[str]) -> int:
    """How many rows of ``validation`` have the same cells in ``columns`` as a row of ``train``; 0 where a column holds
    files.
    """
    kinds = [table.schema.field(c).type for c in columns for table in (train, validation)]
    if not kinds or any(pa.types.is_binary(k) or (pa.types.is_struct(k) and k.get_field_index("bytes") >= 0)
                        for k in kinds):  # fmt: skip
        return 0
    return int(np.isin(_row_hashes(validation, columns), _row_hashes(train, columns)).sum())


def _row_hashes(table: pa.Table, columns: Sequence[str]) -> npt.NDArray[np.int64]:
    """One number of 64 bits for each row (N,), good within this process: rows may be more than memory holds."""
    rows = (row for chunk in row_chunks(table, columns) for row in zip(*chunk, strict=True))
    hashes = (hash(tuple(cell if isinstance(cell, str | None) else repr(cell) for cell in row)) for row in rows)
    return np.fromiter(hashes, dtype=np.int64, count=table.num_rows)


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
    for name, files in files_by_split(folder).items():
        source = str(files[0]) if len(files) == 1 else f"{folder} {name}"
        splits[name] = _read_files(files, source, folder, encoding)
        hashes |= {str(f.relative_to(folder)): _file_sha256(f) for f in files}
    if not splits:
        splits = _class_folders(folder)
        hashes = {name: _paths_sha256(split) for name, split in splits.items()}
    if not splits:
        names = sorted(p.name for p in folder.glob("[!.]*"))
        raise DataError(
            str(folder),
            f"no train, validation or test file; it holds {', '.join(names[:12]) or 'nothing'}",
            allowed=f"train, validation, test with one of {', '.join(READERS)}, a folder of images for each class, "
            "or a folder that the datasets library saved",
            fix="Rename the files, or give a single file to --data",
        )
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
    for path in sorted(p for p in folder.iterdir() if table_suffix(p) is not None):
        # train-00000-of-00002.csv.gz is train
        stem = re.split(r"[-_]\d", path.name.lower().split(".")[0], maxsplit=1)[0]
        for split, names in _SPLIT_NAMES.items():
            if stem in names:
                found.setdefault(split, []).append(path)
    return found


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
    files = [folder / Path(str(entry.get("filename"))).name for entry in state.get("_data_files", [])]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        problem = f"{missing[0]} is missing" if missing else f"{_SAVED} names no files"
        raise DataError(str(folder), problem, fix="Copy the whole folder, or save the data set again")
    return files


def _class_folders(folder: Path) -> dict[str, Split]:
    """A folder for each class, or folders train, validation and test of such folders."""
    subs = {p.name.lower(): p for p in folder.iterdir() if p.is_dir()}
    parts = {split: subs[n] for split, names in _SPLIT_NAMES.items() for n in names if n in subs}
    found = {name: (part, class_folder(part)) for name, part in (parts or {"train": folder}).items()}
    return {n: Split(table=t, source=str(part), folder=part) for n, (part, t) in found.items() if t is not None}


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
        try:
            loaded = datasets.load_dataset(path, config, revision=commit)
        except ValueError as error:
            if "BuilderConfig" in str(error) or "Config name is missing" in str(error):
                raise DataError(f"data set '{path}'", _first_sentence(error), fix="Set data.config") from error
            raise
        except RuntimeError as error:
            if "scripts are no longer supported" in str(error):
                raise DataError(
                    f"data set '{path}'", "it is a script, which is no longer run",
                    fix="Set data.revision=refs/convert/parquet, where the Hub keeps it as files",
                ) from error  # fmt: skip
            raise
        except datasets.exceptions.DatasetGenerationError as error:
            raise DataError(f"data set '{path}'", _first_sentence(error.__cause__ or error)) from error
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
