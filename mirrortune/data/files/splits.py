# SPDX-License-Identifier: Apache-2.0
"""Assign files to splits, by their names or as recorded by the datasets library."""

from __future__ import annotations

import fnmatch
import glob
import re
from pathlib import Path
from typing import Any

from mirrortune.errors import DataError, first_line, first_of
from mirrortune.system.paths import TABLE_SUFFIXES, is_system, local_path, read_json_object, table_suffix

# Common names of the three splits.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
# Suffixes of tables and archives that cannot be read. They are reported, so that a split in one of them is not missed.
_OTHER_TABLES = frozenset((
    ".7z", ".avro", ".bz2", ".db", ".dta", ".feather", ".h5", ".hdf5", ".ndjson", ".npy", ".npz", ".ods", ".orc",
    ".pickle", ".pkl", ".rar", ".rds", ".sav", ".sqlite", ".tab", ".tar", ".tgz", ".xls", ".xlsx", ".xml", ".xz",
    ".zip", ".zst",
))  # fmt: skip

# Files that save_to_disk of the datasets library writes beside its Arrow files: one for all splits, and one in each.
_SAVED_SPLITS, _SAVED = "dataset_dict.json", "state.json"


def matching_files(pattern: str) -> list[Path]:
    """Return the paths that match a pattern, sorted; hidden and system files only if the pattern names them.

    Raises:
        DataError: it would search the whole file system.
    """
    place = local_path(pattern)
    wild = [any(sign in part for sign in "*?[") for part in place.parts[1:]]
    if place.is_absolute() and wild and wild[0] and ("**" in place.parts or sum(wild) > 3):
        raise DataError(
            pattern, "the pattern searches every folder of this machine", fix="Name the folder that holds the data"
        )
    named = [part for part in place.parts if is_system(part)]
    found = [Path(name) for name in sorted(glob.glob(str(place), recursive=True))]  # noqa: PTH207

    def is_meant(part: str) -> bool:
        return not is_system(part) or any(fnmatch.fnmatchcase(part, pattern) for pattern in named)

    return [path for path in found if all(map(is_meant, path.parts))]


def files_by_split(folder: Path) -> dict[str, list[Path]]:
    """Return the tables in a folder by split, assigned by name or as recorded by ``save_to_disk`` of ``datasets``.

    Raises:
        DataError: a folder that ``save_to_disk`` wrote is damaged.
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
    for split, paths in found.items():
        _refuse_doubled(folder, split, paths)
    return found


def metadata_files(folder: Path) -> dict[str, Path]:
    """Return by split the tables that name the files beside them, as ImageFolder and AudioFolder of ``datasets`` read
    them: ``metadata.csv``, ``.jsonl`` or ``.parquet`` in the folder, or in its folders named as splits.
    """
    subs = {path.name.lower(): path for path in folder.iterdir() if path.is_dir()}
    named = {split: next((subs[n] for n in names if n in subs), None) for split, names in SPLIT_NAMES.items()}
    found = {split: None if sub is None else _metadata_in(sub) for split, sub in named.items()}
    by_split = {split: path for split, path in found.items() if path is not None}
    return by_split or ({} if (own := _metadata_in(folder)) is None else {"train": own})


def _metadata_in(folder: Path) -> Path | None:
    paths = (folder / f"metadata{suffix}" for suffix in (".csv", ".jsonl", ".parquet"))
    return next((path for path in paths if path.is_file()), None)


def _refuse_doubled(folder: Path, split: str, paths: list[Path]) -> None:
    """Raise a DataError for files that differ only in their format: in all likelihood, the same rows."""
    known: dict[str, Path] = {}
    for path in paths:
        stem = path.name.lower().removesuffix(".gz").removesuffix(table_suffix(path) or "")
        other = known.setdefault(stem, path)
        if other is not path:
            raise DataError(
                str(folder), f"{other.name} and {path.name} have one name, so rows of {split} may be there twice",
                allowed="one file of each name", fix="Move one of them away, or rename it if its rows are others",
            )  # fmt: skip


def _saved(path: Path) -> dict[str, Any]:
    """Read a file of ``save_to_disk``."""
    try:
        return read_json_object(path)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(str(path), f"it cannot be read ({first_line(error)})", fix="Save the data set again") from error


def _saved_files(folder: Path) -> list[Path]:
    """Return the Arrow files of one data set that ``save_to_disk`` wrote, in the order of its rows."""
    state = _saved(folder / _SAVED)
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise DataError(
            str(folder), "its rows are chosen by a file of indices", fix="Call flatten_indices() before save_to_disk"
        )
    entries = state.get("_data_files", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(str(folder / _SAVED), "its _data_files is not a list of files", fix="Save the data set again")
    files = [folder / Path(str(entry.get("filename"))).name for entry in entries]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        problem = f"{missing[0]} is missing" if missing else f"{_SAVED} names no files"
        raise DataError(str(folder), problem, fix="Copy the whole folder, or save the data set again")
    return files


def files_left_out(folder: Path) -> tuple[str, ...]:
    """Return remarks on the tables of a folder that :func:`files_by_split` leaves out, and on those that it joins.

    Joined files are named if more than a number distinguishes them: one may be a copy, such as
    ``train.sync-conflict-20261130-120000-ABC.csv`` of Syncthing or ``train.old.csv``.

    Raises:
        DataError: if none of the files of a split can be read.
    """
    if (folder / _SAVED_SPLITS).is_file() or (folder / _SAVED).is_file():  # of datasets' save_to_disk
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
            str(folder), f"unknown file type: {', '.join(lost)}", allowed=", ".join(TABLE_SUFFIXES),
            fix="Convert the files, or move them away",
        )  # fmt: skip
    joined = [
        f"read as {split}: {first_of((path.name for path in paths), 12)}"
        for split, paths in read.items()
        if len({re.sub(r"\d+", "", path.name) for path in paths}) > 1
    ]
    return (*joined, *([f"left out, as they are not of a split: {first_of(beside, 12)}"] if beside else []))


def _split_of(path: Path) -> str | None:
    """Return the split that a file belongs to by its name: train-00000-of-00002.csv.gz and, of a treebank,
    en_ewt-ud-train.conllu are train.
    """
    stem = path.name.lower().split(".")[0]
    if table_suffix(path) == ".conllu":
        stem = stem.rpartition("-ud-")[2]
    stem = re.split(r"[-_]\d", stem, maxsplit=1)[0]
    return next((split for split, names in SPLIT_NAMES.items() if stem in names), None)
