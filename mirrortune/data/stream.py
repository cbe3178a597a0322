# SPDX-License-Identifier: Apache-2.0
"""``data.streaming``: opens files or a Hub data set without reading them; of every split the first rows are read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from mirrortune.data.dataset import (
    DataSet,
    Split,
    files_by_split,
    files_left_out,
    flat,
    hub_data_errors,
    matching_files,
)
from mirrortune.data.files.readers import delimiter_of
from mirrortune.data.row_stream import RowStream
from mirrortune.errors import ConfigError, DataError, MirrortuneError
from mirrortune.system.hub import hub_errors, resolve_commit
from mirrortune.system.paths import (
    HUB_SCHEME,
    hub_address,
    is_pattern,
    local_path,
    looks_like_path,
    shipped_folder,
    split_sample,
    table_suffix,
)

HEAD_ROWS = 1000
"""Rows of a streamed training split from which columns, classes and lengths are known."""
MAX_EVAL_ROWS = 10_000
"""Rows of any other split that are read, unless ``data.max_eval_rows`` says otherwise."""
_BUILDERS = {
    ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow",
    ".txt": "text",
}  # fmt: skip


def stream_data(
    path: str, *, config: str | None, revision: str | None, encoding: str, train_split: str, max_eval_rows: int | None
) -> DataSet:
    """Open a data set of which the training split is streamed.

    Args:
        path: a file, a pattern or a folder of tables, ``shipped:NAME``, or a Hub id, as of :func:`data.load_data`.
        config: the Hub data set's configuration.
        revision: branch, tag or commit of a Hub data set.
        encoding: of local text files.
        train_split: name of the split that is streamed; its first rows are its table.
        max_eval_rows: rows of every other split, its first ones.

    Raises:
        ConfigError: a sample, or a configuration of local data.
        DataError: files that are missing, cannot be read, or are no tables.
        HubError: whatever the Hub refused.
    """
    path, sample = split_sample(path)
    if sample is not None:
        raise ConfigError("--data", f"got #{sample}, and a stream is not sampled", fix="Use --max-steps")
    is_shipped = path.startswith("shipped:")
    local = shipped_folder() / path.removeprefix("shipped:") if is_shipped else local_path(path)
    remarks: tuple[str, ...] = ()
    if path.startswith(HUB_SCHEME) or not (local.exists() or looks_like_path(path)):
        streams, origin = _open_hub(path, config, revision, train_split)
    else:
        for key, value in (("data.config", config), ("data.revision", revision)):
            if value is not None:
                raise ConfigError(key, f"local data has none, got {value!r}", fix="Remove it")
        streams, origin, remarks = _open_files(path, local, encoding, train_split)
    known = DataSet(splits={name: Split(table=pa.table({}), source=s.source) for name, s in streams.items()})
    train = known.require(train_split, "data.train_split")
    splits = {}
    for name, stream in streams.items():
        is_train = known.splits[name] is train
        table = stream.head(HEAD_ROWS if is_train else max_eval_rows or MAX_EVAL_ROWS)
        if not table.num_rows:
            raise DataError(stream.source, "it has no rows")
        folder = local if local.is_dir() else local.parent
        splits[name] = Split(
            table=table, source=stream.source, folder=folder, stream=stream if is_train else None, remarks=remarks
        )  # fmt: skip
    return DataSet(splits=splits, origin={**origin, "streamed": True})


def stream_problems(
    *, max_steps: int | None, max_train_rows: int | None, max_eval_rows: int | None, is_streamed: bool
) -> list[ConfigError]:
    """What the settings of a recipe say of a stream that cannot be."""
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
    path: str, local: Path, encoding: str, train_split: str
) -> tuple[dict[str, RowStream], dict[str, Any], tuple[str, ...]]:
    """Every split of local tables, and remarks on what was left out."""
    remarks: tuple[str, ...] = ()
    if local.is_dir():
        found, remarks = files_by_split(local), files_left_out(local)
    elif is_pattern(path):
        matching = matching_files(path)
        found = {train_split: matching} if matching else {}
    else:
        found = {train_split: [local]} if local.is_file() else {}
    if not found:
        raise DataError(
            path, "no file to stream", allowed=f"files, or a folder of files, that end in {', '.join(_BUILDERS)}",
            fix="Check the path; a folder of images for each class cannot be streamed",
        )  # fmt: skip
    listed = [f"{file} {file.stat().st_size}" for files in found.values() for file in files]
    origin = {"path": path, "files": len(listed), "sha256_of_names_and_sizes": _sha256(listed)}
    streams = {name: _open_tables(files, name, path, encoding) for name, files in found.items()}
    return streams, origin, remarks


def _open_tables(files: list[Path], name: str, path: str, encoding: str) -> RowStream:
    """The files of one split, a piece each."""
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
        if builder == "csv":  # all cells are strings and empty ones are null, as where tables are read whole
            columns, delimiter, skipped = delimiter_of(files[0], encoding)
            text = datasets.Features(dict.fromkeys(columns, datasets.Value("string")))
            options |= {"sep": delimiter, "features": text, "keep_default_na": False, "na_values": [""]}
            options |= {"skiprows": skipped} if skipped else {}
        rows = datasets.load_dataset(
            builder, data_files={"train": [str(f.absolute()) for f in files]}, split="train", streaming=True, **options
        )
    return RowStream(rows=rows, flatten=flat, guard=guard, source=source)


def _open_hub(
    path: str, config: str | None, revision: str | None, train_split: str
) -> tuple[dict[str, RowStream], dict[str, Any]]:
    split = ""
    if path.startswith(HUB_SCHEME):
        path, config, split = hub_address(path, config)
    commit = resolve_commit(path, path, revision, "dataset", "--data")
    guard: Callable[[], AbstractContextManager[object]] = partial(hub_errors, f"data set '{path}'", flag="--data")
    with guard():
        import datasets  # noqa: PLC0415

        datasets.disable_progress_bars()
        with hub_data_errors(path):
            loaded = datasets.load_dataset(path, config, revision=commit, streaming=True)
    wanted = {train_split: loaded[split]} if split in loaded else dict(loaded)
    streams = {n: RowStream(rows=r, flatten=flat, guard=guard, source=f"{path} {n}") for n, r in wanted.items()}
    return streams, {"repository": path, "config": config, "commit": commit}


@contextmanager
def _file_errors(source: str) -> Iterator[None]:
    """Whatever readers of files raise as a DataError at ``source``."""
    try:
        yield
    except MirrortuneError:
        raise
    except (pa.ArrowException, ValueError, OSError, EOFError, RuntimeError) as error:
        # datasets wraps what went wrong in errors that say only that something did.
        reason = error.__cause__ or error
        raise DataError(
            source, f"a row or file cannot be read ({_sentence(reason)})",
            fix="Repair it; without data.streaming its line is named",
        ) from error  # fmt: skip


def _sentence(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")[:200] or type(error).__name__


def _sha256(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
