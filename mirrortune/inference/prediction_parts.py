# SPDX-License-Identifier: Apache-2.0
"""Keep the finished blocks of predictions until all are there, and what they depend on.

While ``answers.csv`` is being written, its rows are kept in the folder ``.answers.csv.parts`` beside it, one file per
block of rows, so that a process that is killed loses at most one block. The folder holds a marker, and the parts are in
Arrow's format whatever the format of the output. They are continued only if nothing that they depend on has changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from mirrortune import __version__
from mirrortune.data.files.media import named_files
from mirrortune.errors import ConfigError, DataError, MirrortuneError
from mirrortune.inference.bank_answers import BankRequest
from mirrortune.inference.bank_file import adapter_folders
from mirrortune.inference.prediction_file import ERROR, format_of, open_writer, refuse_replacing, united
from mirrortune.inference.prediction_rows import PredictionRows
from mirrortune.runs.checks import EvaluationSettings
from mirrortune.runs.target import Evaluable
from mirrortune.system.atomic import clear_leftovers, discard, write_atomically, write_files_atomically
from mirrortune.system.hub import ADAPTER_FILES
from mirrortune.system.outputs import PARTS, Marker, holds_nothing, read_marker, write_marker
from mirrortune.system.paths import ModelPlace, json_object_or_none, sha256_of
from mirrortune.tasks.base import Task, task_to_dict
from mirrortune.tasks.predicting import PredictOptions

_STATE = "state.json"
_NAME = re.compile(r"rows-(\d+)-(\d+)\.arrow")
_RESERVED = Marker(PARTS.name, frozenset())
_HASHED = 1 << 26  # bytes; larger files are identified by size and modification time instead of content
_DIGEST = re.compile("[0-9a-f]{64}")  # of SHA-256
_MOST_NAMED = 3  # differences listed for one value
_VERSION = "version of mirrortune"  # name of a fact


class Parts:
    """The finished blocks of an incomplete output.

    Args:
        output: file to which the blocks will be joined; the caller holds a claim on it.
    """

    def __init__(self, output: Path) -> None:
        self.output, self.folder = output, output.with_name(f".{output.name}.parts")

    def begin(self, facts: dict[str, Any], *, overwrite: bool) -> None:
        """Create the folder; with ``overwrite``, discard the unfinished predictions of an earlier command.

        Args:
            facts: everything that the predictions depend on, as JSON data.
            overwrite: discard unfinished predictions.

        Raises:
            ConfigError: the path holds something else, or unfinished predictions and ``overwrite`` is not set.
            ResourceError: the folder cannot be written.
        """
        self._check_ours()
        if self.folder.is_dir():
            rows = self.rows()
            if rows and not overwrite:
                raise ConfigError(
                    "-o", f"{self.folder} holds {rows:,} predicted rows of {self.output.name}, which was not finished",
                    fix="Continue with --resume, start over with --overwrite, or choose another name",
                )  # fmt: skip
            self.discard()
        try:
            write_marker(self.folder, _RESERVED)
            self._write_state({"facts": facts, "overwrite": overwrite})
        except MirrortuneError:
            self.discard()
            raise

    def resume(self, facts: dict[str, Any]) -> int:
        """Continue unfinished predictions and return the number of finished rows.

        Raises:
            ConfigError: there is nothing to continue, or it depends on other facts; the error names the differences.
        """
        self._check_ours()
        state, facts = self.state(), _as_stored(facts)
        if state is None and self._found():
            raise ConfigError(
                "--resume", f"the record of what the rows in {self.folder} were predicted with is damaged",
                fix="Start over with --overwrite",
            )  # fmt: skip
        if state is None:
            fix = "Start it without --resume"
            raise ConfigError("--resume", f"there are no unfinished predictions of {self.output}", fix=fix)
        before = self._with_added(state["facts"], facts)
        changed = [name for name in {**before, **facts} if before.get(name) != facts.get(name)]
        if changed:
            told = "; ".join(_difference(name, before.get(name), facts.get(name)) for name in changed)
            first = "Continue with that version" if _VERSION in told else "Give what the first command was given"
            raise ConfigError(
                "--resume", f"the finished rows of {self.output} were made otherwise: {told}",
                fix=f"{first}, or start over with --overwrite",
            )  # fmt: skip
        for _, _, path in self._found():  # all of them now, not after hours of predicting
            if not _is_readable(path):
                path.unlink()  # its rows are predicted again
        self._write_state({**state, "facts": facts})
        return self.rows()

    def _with_added(self, before: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
        """Return the facts ``before`` with the adapters that were added to the bank since: no finished row has them.

        But not if rows with errors were kept, which may be those of rows that name these adapters.
        """
        bank, kept = before.get("bank"), (path for _, _, path in self._found() if _is_readable(path))
        if not isinstance(bank, dict) or any(ERROR in _schema(path).names for path in kept):
            return before
        return {**before, "bank": {**facts.get("bank", {}), **bank}}

    def state(self) -> dict[str, Any] | None:
        """Return the recorded state of the folder, or None if it is missing or damaged."""
        found = json_object_or_none(self.folder / _STATE)
        return found if found is not None and isinstance(found.get("facts"), dict) else None

    @property
    def replaces(self) -> bool:
        """Whether the command that started the parts had ``--overwrite``."""
        return bool((self.state() or {}).get("overwrite"))

    def is_joined(self) -> bool:
        """Return whether the parts were joined to ``output`` already, by a process that was killed just afterwards."""
        digest = (self.state() or {}).get("joined")
        return digest is not None and self.output.is_file() and digest == sha256_of(self.output)

    def add(self, first: int, table: pa.Table) -> None:
        """Write a block whose first row has the index ``first``."""

        def write(file: Path) -> None:
            with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)

        self._write(self.folder / f"rows-{first:012}-{table.num_rows:06}.arrow", write)

    def rows(self) -> int:
        """Return the number of finished rows."""
        return sum(count for _, count, _ in self._found())

    def join(self, *, own: Sequence[str], last: str) -> int:
        """Write all rows to the output and remove the folder.

        Args:
            own: names of the rows' columns, which come first.
            last: name of the column of errors, which comes last.

        Returns:
            The number of rows with an error.
        """
        paths, errors, kind = [path for _, _, path in self._found()], 0, format_of(self.output)
        schema = united([_schema(path) for path in paths], own, last, kind)

        def write(file: Path) -> None:
            nonlocal errors
            with open_writer(file, kind, schema) as add:
                for path in paths:
                    table = _table(path)
                    errors += table.num_rows - table.column(last).null_count if last in table.column_names else 0
                    add(table)
            self._write_state({**(self.state() or {}), "joined": sha256_of(file)})

        if not self.is_joined():  # check again, since predicting may have taken hours
            refuse_replacing(self.output, kind, overwrite=self.replaces)
        clear_leftovers(self.output.parent, {self.output.name}.__contains__)  # of a join that was killed
        self._write(self.output, write)
        self.discard()
        return errors

    def discard(self) -> None:
        """Delete mirrortune's files in the folder, and the folder if it is then empty."""
        discard(self.folder, is_ours=_RESERVED.owns)

    def _check_ours(self) -> None:
        marker = None if self.folder.is_symlink() else read_marker(self.folder)
        is_broken = self.folder.is_symlink() and not self.folder.exists()
        is_free = holds_nothing(self.folder, PARTS) and not is_broken
        if not is_free and (marker is None or marker.kind != PARTS.name):
            raise ConfigError("-o", f"{self.folder} is in the way", fix="Move it elsewhere, or choose another name")

    def _found(self) -> list[tuple[int, int, Path]]:
        """Return the first row, number of rows and file of each part, up to the first gap."""
        named = sorted((int(m[1]), int(m[2]), p) for p in self.folder.glob("rows-*") if (m := _NAME.fullmatch(p.name)))
        found, done = [], 0
        for first, count, path in named:
            if first != done:
                break
            found.append((first, count, path))
            done += count
        return found

    def _write_state(self, state: dict[str, Any]) -> None:
        write_files_atomically(self.folder, {_STATE: (json.dumps(state, indent=1) + "\n").encode()})

    def _write(self, path: Path, write: Callable[[Path], None]) -> None:
        try:
            write_atomically(path, write)
        except DataError:
            raise  # the values do not fit the format
        except MirrortuneError as error:
            fix = "Free space or permit writing, then continue with --resume"
            raise type(error)(str(self.output), error.problem, fix=fix) from error


def _schema(path: Path) -> pa.Schema:
    with pa.OSFile(str(path), "rb") as source, pa.ipc.open_stream(source) as reader:
        return reader.schema


def _table(path: Path) -> pa.Table:
    with pa.OSFile(str(path), "rb") as source, pa.ipc.open_stream(source) as reader:
        return reader.read_all()


def _is_readable(path: Path) -> bool:
    try:
        _table(path)
    except (OSError, pa.ArrowException):
        return False
    return True


def facts_of_target(
    target: str, adapter_folder: Path | None, found: Evaluable, options: PredictOptions, settings: EvaluationSettings,
    bank: BankRequest | None,
) -> dict[str, Any]:  # fmt: skip
    """Return the facts about target, bank, options and settings that predictions depend on."""
    place = adapter_folder
    if place is None and (known := ModelPlace.parse(target)).is_local:
        place = known.path()
    config, model = getattr(found.model, "config", None), settings.model
    files = sorted(file for file in place.iterdir() if file.is_file()) if place is not None and place.is_dir() else []
    facts = {
        _VERSION: __version__,
        "base": [getattr(config, name, None) for name in ("_name_or_path", "_commit_hash")],
        "target": {file.name: _fingerprint(file) for file in files if not file.name.startswith(".")},
        "length": found.max_length,
        "options": asdict(options),
        "encoding": settings.data.encoding,
        "precision": model.precision,
        "dtype": model.dtype,
        "quantisation": model.load_in,
        "attention": model.attention,
    }
    return facts if bank is None else {**facts, "bank": _adapters_of(bank.path), "column of adapters": bank.column}


def facts_of_rows(fitted: Sequence[tuple[PredictionRows, Task]]) -> dict[str, Any]:
    """Return facts that identify the rows and the files that they name, and the columns by which they are read."""
    each = [
        {"task": task_to_dict(task), "data": rows.data.origin, "files of rows": named_files(rows.data, task.columns())}
        for rows, task in fitted
    ]
    if len(each) == 1:
        return each[0]
    names = [f"{number} ({rows.name})" for number, (rows, _) in enumerate(fitted, 1)]
    return {key: {name: own[key] for name, own in zip(names, each, strict=True)} for key in each[0]}


def _adapters_of(path: Path) -> dict[str, Any]:
    """Return fingerprints of the files of each adapter in a bank, or of the file that holds them all."""
    if path.is_file():
        return {"file": _fingerprint(path)}
    return {
        name: {file: _fingerprint(folder / file) for file in ADAPTER_FILES if (folder / file).is_file()}
        for name, folder in adapter_folders(path).items()
    }


def _fingerprint(file: Path) -> list[Any]:
    """Return the digest of a file or, for a large file, its size and modification time."""
    known = file.stat()
    if known.st_size > _HASHED:
        return [known.st_size, known.st_mtime_ns]
    return [sha256_of(file)]


def _as_stored(facts: dict[str, Any]) -> dict[str, Any]:
    """Return JSON data as it will be when it is read back."""
    found: dict[str, Any] = json.loads(json.dumps(facts))
    return found


def _difference(name: str, before: Any, now: Any) -> str:
    if name == "version" and isinstance(before, int) and isinstance(now, int):  # of a kind of task
        return f"another {_VERSION} read the rows (version {before} of its code before, {now} now)"
    if isinstance(before, str | int | float | None) and isinstance(now, str | int | float | None):
        if all(isinstance(value, str) and _DIGEST.fullmatch(value) for value in (before, now)):
            return f"{name} has changed"
        was, is_now = ("not given" if value is None else value for value in (before, now))
        return f"{name} ({was} before, {is_now} now)"
    if isinstance(before, dict) and isinstance(now, dict):
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        more = ", ..." if len(changed) > _MOST_NAMED else ""
        parts = ", ".join(_difference(key, before.get(key), now.get(key)) for key in changed[:_MOST_NAMED])
        return f"{parts}{more}" if name == "sha256" else f"{name}: {parts}{more}"  # its keys are files
    return name
