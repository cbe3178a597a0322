# SPDX-License-Identifier: Apache-2.0
"""Open files or a Hub data set for streaming (``data.streaming``), reading only the first rows of every split."""

from __future__ import annotations

import glob
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from mirrortune.data.dataset import DataSet, Split, flat, names_and_sizes_sha256, open_hub, refuse_hub_settings
from mirrortune.data.files.readers import header_of, refuse_cells
from mirrortune.data.files.splits import files_by_split, files_left_out, matching_files
from mirrortune.data.row_stream import RowStream
from mirrortune.errors import ConfigError, DataError, MirrortuneError, first_line
from mirrortune.system.hub import hub_errors
from mirrortune.system.paths import DataPlace, table_suffix

HEAD_ROWS = 1000
"""Rows of a streamed training split from which columns, classes and lengths are derived."""
MAX_EVAL_ROWS = 10_000
"""Rows of any other split that are read, unless ``data.max_eval_rows`` is set."""
_PARQUET_ROWS = 65_536
"""Rows of a parquet file that are read at a time; ``datasets`` would take the size of the first row group, even 0."""
_BUILDERS = {
    ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow",
    ".txt": "text",
}  # fmt: skip


def stream_data(
    place: DataPlace,
    *,
    config: str | None,
    revision: str | None,
    encoding: str,
    train_split: str,
    max_eval_rows: int | None,
) -> DataSet:
    """Open a data set whose training split is streamed.

    Args:
        place: a file, a pattern or a folder of tables, ``shipped:NAME``, or a Hub id; see
            :func:`mirrortune.data.dataset.load_data`.
        config: configuration of a Hub data set.
        revision: branch, tag or commit of a Hub data set.
        encoding: of local text files.
        train_split: name of the split that is streamed.
        max_eval_rows: rows that are read of every other split.

    Raises:
        ConfigError: if a sample is asked for, or local data is given a configuration or revision.
        DataError: if files are missing, cannot be read, or are not tables.
        HubError: if the Hub refuses.
    """
    if place.rows is not None:
        raise ConfigError("--data", f"got #{place.rows}, and a stream is not sampled", fix="Use --max-steps")
    remarks: tuple[str, ...] = ()
    local = place.path() if place.is_local else None
    if local is None:
        streams, origin = _open_hub(place, config, revision, train_split)
    else:
        refuse_hub_settings(config, revision)
        streams, origin, remarks = _open_files(place, local, encoding, train_split)
    known = _without_rows(streams)
    train = known.require(train_split, "data.train_split")
    splits = {}
    for name, stream in streams.items():
        is_train = known.splits[name] is train
        table = stream.head(HEAD_ROWS if is_train else max_eval_rows or MAX_EVAL_ROWS)
        if not table.num_rows:
            raise DataError(stream.source, "it has no rows")
        folder = local if local is None or local.is_dir() else local.parent
        splits[name] = Split(
            table=table, source=stream.source, folder=folder, stream=stream if is_train else None, remarks=remarks
        )  # fmt: skip
    return DataSet(splits=splits, origin={**origin, "streamed": True})


def stream_problems(
    *, max_steps: int | None, max_train_rows: int | None, max_eval_rows: int | None, is_streamed: bool
) -> list[ConfigError]:
    """Return an error for each setting of a recipe that contradicts streaming."""
    if not is_streamed:
        unused = max_eval_rows is not None
        fix = "Remove it, or set data.streaming=true"
        return [ConfigError("data.max_eval_rows", "all rows are scored", fix=fix)] if unused else []
    found = []
    if max_steps is None:
        found.append(ConfigError("train.max_steps", "it is not set, and a stream has no known end", fix="Give it"))
    if max_train_rows is not None:
        problem = "a random subset of a stream is not known before its end"
        found.append(ConfigError("data.max_train_rows", problem, fix="Remove it, and use --max-steps"))
    return found


def _open_files(
    place: DataPlace, local: Path, encoding: str, train_split: str
) -> tuple[dict[str, RowStream], dict[str, Any], tuple[str, ...]]:
    """Open local tables; return a stream per split, their origin, and remarks on files left out."""
    remarks: tuple[str, ...] = ()
    if local.is_dir():
        found, remarks = files_by_split(local), files_left_out(local)
    elif place.kind == "pattern":
        matching = matching_files(place.name)
        found = {train_split: matching} if matching else {}
    else:
        found = {train_split: [local]} if local.is_file() else {}
    if not found:
        raise DataError(
            place.name, "no file to stream", allowed=f"files, or a folder of files, that end in {', '.join(_BUILDERS)}",
            fix="Check the path; a folder of images for each class cannot be streamed",
        )  # fmt: skip
    files = [file for listed in found.values() for file in listed]
    digest = names_and_sizes_sha256(files, map(str, files))
    origin = {"path": place.name, "files": len(files), "sha256_of_names_and_sizes": digest}
    streams = {name: _open_tables(files, name, place.name, encoding) for name, files in found.items()}
    return streams, origin, remarks


def _open_tables(files: list[Path], name: str, path: str, encoding: str) -> RowStream:
    """Open the files of one split as a stream with a piece per file."""
    source = str(files[0]) if len(files) == 1 else f"{path} {name}"
    builders = {_BUILDERS.get(table_suffix(file) or "") for file in files}
    builder = builders.pop()
    if builders or builder is None:
        raise DataError(source, "the files are not of one kind of table", allowed=", ".join(_BUILDERS))
    guard = partial(_file_errors, source, "Repair it; without data.streaming its line is named")
    with guard():
        import datasets  # noqa: PLC0415  (a second to import)

        datasets.disable_progress_bars()
        options: dict[str, Any] = {} if builder in ("parquet", "arrow") else {"encoding": encoding}
        if builder == "parquet":
            options |= {"batch_size": _PARQUET_ROWS}
        if builder == "text":
            refuse_cells(files[0], encoding)
        if builder == "csv":  # all cells are strings and empty ones null, as in tables that are read whole
            options |= {**_delimited(files, encoding), "keep_default_na": False, "na_values": [""]}
        paths = [glob.escape(str(file.absolute())) for file in files]  # load_dataset takes patterns
        rows = datasets.load_dataset(builder, data_files={"train": paths}, split="train", streaming=True, **options)
    return RowStream(rows=rows, flatten=flat, guard=guard, source=source)


def _delimited(files: list[Path], encoding: str) -> dict[str, Any]:
    """Return the options of pandas and ``datasets`` for csv and tsv files, so that their columns have the names that
    :func:`mirrortune.data.files.readers.read_rows` gives them; columns with one name are not read.
    """
    import datasets  # noqa: PLC0415

    first = header, names, delimiter, skipped = header_of(files[0], encoding)
    known = [name for name in names if names.count(name) == 1]
    features = datasets.Features(dict.fromkeys(known, datasets.Value("string")))
    # Without index_col, pandas takes the first of the cells of longer rows for the name of the row.
    options: dict[str, Any] = {"sep": delimiter, "features": features, "index_col": False}
    options |= {"skiprows": skipped} if skipped else {}
    is_plain = known == header
    for file in files[1:]:
        cells, _, *others = found = header_of(file, encoding)
        if not (set(known) <= set(cells) and others == [delimiter, skipped] if is_plain else found == first):
            raise DataError(
                str(file), f"its header is not that of {files[0]}", allowed=f"the columns {', '.join(known)}",
                fix="Give all files one header, or set data.streaming=false",
            )  # fmt: skip
    if is_plain:
        return options
    unique = [name if name in known else f"{name}.{place}" for place, name in enumerate(names)]
    return {**options, "names": unique, "header": 0}


def _open_hub(
    place: DataPlace, config: str | None, revision: str | None, train_split: str
) -> tuple[dict[str, RowStream], dict[str, Any]]:
    loaded, origin = open_hub(place, config, revision, streaming=True)
    name, split = place.name, place.split
    guard: Callable[[], AbstractContextManager[object]] = partial(_hub_errors, name)
    streams = {n: RowStream(rows=r, flatten=flat, guard=guard, source=f"{name} {n}") for n, r in loaded.items()}
    if not split:
        return streams, origin
    known = _without_rows(streams)
    return {train_split: streams[known.name_of(known.require(split, "--data"))]}, {**origin, "split": split}


def _without_rows(streams: dict[str, RowStream]) -> DataSet:
    return DataSet(splits={name: Split(table=pa.table({}), source=s.source) for name, s in streams.items()})


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Raise the exceptions of a stream from the Hub as a HubError or, if they are about its files, as a DataError."""
    where = f"data set '{name}'"
    with _file_errors(where, "Set data.revision to another commit, or data.config"), hub_errors(where, flag="--data"):
        yield


@contextmanager
def _file_errors(source: str, fix: str) -> Iterator[None]:
    """Raise the exceptions of file readers as a DataError at ``source``, also pandas' warning that it drops cells."""
    logger = logging.getLogger("datasets")  # logs what it then raises
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Length of header or names does not match length of data")
            yield
    except MirrortuneError:
        raise
    except StopIteration as error:  # datasets takes the features of JSON from its first row
        raise DataError(source, "it has no rows") from error
    except Warning as error:
        raise DataError(source, "a row has more cells than the header", fix=fix) from error
    except (pa.ArrowException, ValueError, LookupError, TypeError, OSError, EOFError, RuntimeError) as error:
        # datasets wraps the cause in errors that say only that something failed.
        reason = error.__cause__ or error
        raise DataError(source, f"a row or file cannot be read ({first_line(reason)})", fix=fix) from error
    finally:
        logger.setLevel(level)
