# SPDX-License-Identifier: Apache-2.0
"""Open files or a Hub data set for streaming (``data.streaming``), reading only the first rows of every split."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from mirrortune.data.dataset import DataSet, Split, flat, names_and_sizes_sha256, open_hub, refuse_hub_settings
from mirrortune.data.files.readers import delimiter_of
from mirrortune.data.files.splits import files_by_split, files_left_out, matching_files
from mirrortune.data.row_stream import RowStream
from mirrortune.errors import ConfigError, DataError, MirrortuneError, first_line
from mirrortune.system.hub import hub_errors
from mirrortune.system.paths import DataPlace, table_suffix

HEAD_ROWS = 1000
"""Rows of a streamed training split from which columns, classes and lengths are derived."""
MAX_EVAL_ROWS = 10_000
"""Rows of any other split that are read, unless ``data.max_eval_rows`` is set."""
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
    known = DataSet(splits={name: Split(table=pa.table({}), source=s.source) for name, s in streams.items()})
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
    guard = partial(_file_errors, source)
    with guard():
        import datasets  # noqa: PLC0415  (a second to import)

        datasets.disable_progress_bars()
        options: dict[str, Any] = {} if builder in ("parquet", "arrow") else {"encoding": encoding}
        if builder == "csv":  # all cells are strings and empty ones null, as in tables that are read whole
            columns, delimiter, skipped = delimiter_of(files[0], encoding)
            text = datasets.Features(dict.fromkeys(columns, datasets.Value("string")))
            options |= {"sep": delimiter, "features": text, "keep_default_na": False, "na_values": [""]}
            options |= {"skiprows": skipped} if skipped else {}
        rows = datasets.load_dataset(
            builder, data_files={"train": [str(f.absolute()) for f in files]}, split="train", streaming=True, **options
        )
    return RowStream(rows=rows, flatten=flat, guard=guard, source=source)


def _open_hub(
    place: DataPlace, config: str | None, revision: str | None, train_split: str
) -> tuple[dict[str, RowStream], dict[str, Any]]:
    loaded, origin = open_hub(place, config, revision, streaming=True)
    name, split = place.name, place.split
    guard: Callable[[], AbstractContextManager[object]] = partial(hub_errors, f"data set '{name}'", flag="--data")
    wanted = {train_split: loaded[split]} if split in loaded else dict(loaded)
    streams = {n: RowStream(rows=r, flatten=flat, guard=guard, source=f"{name} {n}") for n, r in wanted.items()}
    return streams, origin


@contextmanager
def _file_errors(source: str) -> Iterator[None]:
    """Raise the exceptions of file readers as a DataError at ``source``."""
    try:
        yield
    except MirrortuneError:
        raise
    except (pa.ArrowException, ValueError, OSError, EOFError, RuntimeError) as error:
        # datasets wraps the cause in errors that say only that something failed.
        reason = error.__cause__ or error
        raise DataError(
            source, f"a row or file cannot be read ({first_line(reason)})",
            fix="Repair it; without data.streaming its line is named",
        ) from error  # fmt: skip
