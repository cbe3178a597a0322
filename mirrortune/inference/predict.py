# SPDX-License-Identifier: Apache-2.0
"""Predict the rows of a data set with a trained model, block by block (the ``predict`` command)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from mirrortune.data.dataset import DataSet, Split
from mirrortune.data.files.arrow import is_unreadable, refuse_unreadable
from mirrortune.data.loose import STDIN
from mirrortune.data.mixture import SOURCE_COLUMN
from mirrortune.errors import ConfigError, DataError, MirrortuneError, PeerError, counted
from mirrortune.inference.bank_answers import BankAnswers, BankRequest, RowAdapters, load_row_adapters
from mirrortune.inference.block_answers import BlockAnswers
from mirrortune.inference.prediction_file import ERROR, TableWriter, check_united, format_of, refuse_replacing, storable
from mirrortune.inference.prediction_parts import Parts, facts_of_rows, facts_of_target
from mirrortune.inference.prediction_rows import PredictionRows, RowRequest, all_fitted, rows_of_data, rows_of_request
from mirrortune.runs.checks import EvaluationSettings
from mirrortune.runs.evaluate import warn_of_changed_data
from mirrortune.runs.target import find_target, load_target
from mirrortune.system.claims import claimed
from mirrortune.system.console import Bar, Reporter
from mirrortune.system.distributed import sync
from mirrortune.system.distributed.processes import make_accelerator
from mirrortune.system.outputs import Input, check_file
from mirrortune.tasks.base import Task
from mirrortune.tasks.predicting import PredictOptions

_SMALLEST, _LARGEST = 64, 4096  # rows of a block
_BLOCKS = 64  # number of blocks, unless blocks would become smaller or larger than that


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictResult:
    """The ``--json`` object of ``predict``; ``errors`` is the number of rows without a prediction."""

    output: str
    rows: int
    errors: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Where predictions are written, and how rows that cannot be predicted are handled.

    Attributes:
        file: output file, whose suffix determines the format; None for standard output.
        format: format of standard output; None for csv or, with a file, for that of its name.
        skips_errors: for a row that cannot be predicted, write the reason to a column ``error`` instead of failing.
        resume: continue the unfinished output of an earlier command.
        overwrite: replace earlier predictions.
    """

    file: Path | None = None
    format: str | None = None
    skips_errors: bool = False
    resume: bool = False
    overwrite: bool = False

    def parts(self) -> Parts | None:
        """Return the parts of the output file, or None for standard output."""
        return None if self.file is None else Parts(self.file)

    def check(self) -> None:
        """Raise ConfigError for flags that contradict each other."""
        if self.resume and self.overwrite:
            raise ConfigError("--resume", "it excludes --overwrite", fix="Give one of the two")
        if self.file is None:
            for flag, given in (("--resume", self.resume), ("--overwrite", self.overwrite)):
                if given:
                    raise ConfigError(flag, "answers go to standard output", fix="Name a file with -o, or remove it")
            if self.format == "parquet":
                raise ConfigError("--format", "parquet cannot be written to standard output", fix="Name a file with -o")
        elif self.format not in (None, known := format_of(self.file)):
            raise ConfigError("--format", f"got {self.format}, and {self.file} is {known}", fix="Keep one of them")

    def kind(self) -> str:
        """Return the format of the output."""
        return self.format or "csv" if self.file is None else format_of(self.file)


def predict(
    target: str, settings: EvaluationSettings, reporter: Reporter, *, output: Output, options: PredictOptions,
    row: RowRequest | None = None, bank: BankRequest | None = None, split: str | None = None,
    is_own_data: bool = False, named: Collection[str] = (), inputs: Sequence[Input] = (), force_base: bool = False,
) -> PredictResult:  # fmt: skip
    """Predict rows with a run directory, an adapter folder, a merged folder or any plain model.

    Rows keep their order and columns; labels are not read. Memory is bounded, since each block is written when it is
    done.

    Args:
        target: folder, or ``owner/name@revision:subfolder`` on the Hub.
        settings: data, batch size and, for a plain model, the task.
        reporter: prints notes, progress and, without an output file, the predictions.
        output: where predictions are written.
        options: options of prediction.
        row: a single row that replaces the data of ``settings``, or None.
        bank: adapters of the rows, for which the target is the base; or None.
        split: split of the data; None for all splits.
        is_own_data: the data is that of the target's recipe.
        named: names of the column settings that the user has set; other columns are detected if the data lacks them.
        inputs: files that are read and that the output must not replace.
        force_base: use an adapter on a base with different weights, and print the mismatches.

    Raises:
        ConfigError: a flag or setting does not fit, or the output may not be written.
        DataError: a row or column cannot be used.
        VerificationError: the adapter belongs to another base, or outputs of the model are NaN.
    """
    output.check()
    accelerator = make_accelerator(settings.model.precision)
    reporter.is_main = accelerator.is_main_process
    adapter_folder = _adapter_of(target, settings, bank, split, force_base=force_base, needs_data=row is None)
    with ExitStack() as held:
        if (parts := output.parts()) is not None:
            sync.from_main(accelerator, functools.partial(_claim, held, parts, output, inputs))
        sources = _open(settings, row, split, accelerator)
        data, settings = sources[0].data, _for_rows(settings, sources[0], named)
        adapters = None if bank is None else load_row_adapters(target, settings, bank, data, accelerator.device)
        found = adapters.base if adapters is not None else load_target(
            target, adapter_folder, settings, data, reporter, force_base=force_base, is_labelled=False
        )  # fmt: skip
        own, fitted = adapter_folder if is_own_data else None, []
        for rows, task in all_fitted(sources, found.task, reporter, are_named=bool(named)):
            fitted.append((rows.of_split(split, settings.data, task, is_own_data=is_own_data), task))
            warn_of_changed_data(own, rows.data, fitted[-1][0].data.splits.values(), reporter)
        every, task = [rows for rows, _ in fitted], fitted[0][1]
        options.check(task.kind, task.prediction_options())
        found.model.to(accelerator.device)
        answers_of = functools.partial(
            _answers_with(adapters, task, None if output.skips_errors else every[0].data),
            skips_errors=output.skips_errors,
            own=_kept(every, output, reporter), has_splits=any(len(rows.data.splits) > 1 for rows in every),
        )  # fmt: skip
        work = [
            (rows, answers_of(target, replace(found, task=own), settings, options, accelerator, source=rows.name))
            for rows, own in fitted
        ]
        facts = facts_of_target(target, adapter_folder, found, options, settings, bank)
        return _PredictionLoop(work, reporter, output, parts).run(facts | facts_of_rows(fitted))


def _adapter_of(
    target: str, settings: EvaluationSettings, bank: BankRequest | None, split: str | None, *, force_base: bool,
    needs_data: bool,
) -> Path | None:  # fmt: skip
    """Return the adapter folder of a target, or None for a plain model; see :func:`find_target`."""
    if bank is None:
        return find_target(target, settings, force_base=force_base, needs_data=needs_data)
    if force_base:
        raise ConfigError("--force-base", "a bank takes adapters of its base alone", fix="Remove it")
    if split is None and (count := len(settings.data.sources)) > 1:
        raise ConfigError("--bank", f"it reads one data set, got {count}", fix="Predict one after the other")
    return None


def _answers_with(adapters: RowAdapters | None, task: Task, data: DataSet | None) -> Callable[..., BlockAnswers]:
    """Return the function that creates the predictor of blocks; check the adapters named in ``data``, if given."""
    if adapters is None:
        return BlockAnswers
    adapters.prepare(task, data)
    return functools.partial(BankAnswers, adapters=adapters)


def _claim(held: ExitStack, parts: Parts, output: Output, inputs: Sequence[Input]) -> None:
    """Claim the output while the command runs, and check that it may be written."""
    check_file(parts.output, inputs, "-o")
    held.enter_context(claimed(parts.output))
    if output.resume and parts.is_joined():
        return
    refuse_replacing(parts.output, format_of(parts.output), overwrite=output.overwrite or parts.replaces)


def _open(
    settings: EvaluationSettings, row: RowRequest | None, split: str | None, accelerator: Any
) -> list[PredictionRows]:
    if row is not None:
        return [rows_of_request(row)]
    read = functools.partial(rows_of_data, settings.data, settings.task, split)
    # Only the main process reads standard input.
    return sync.from_main(accelerator, read) if STDIN in [s.place.name for s in settings.data.sources] else read()


def _for_rows(settings: EvaluationSettings, rows: PredictionRows, named: Collection[str]) -> EvaluationSettings:
    """Return the settings without columns that the rows lack, except those that the user has named."""
    there = next(iter(rows.data.splits.values())).table.column_names
    given = dict(settings.task.given)
    for name, value in settings.task.columns.items():
        columns = (value,) if isinstance(value, str) else value or ()
        if name not in named and not set(columns) <= set(there):
            given[name] = None
    return replace(settings, task=replace(settings.task, given=given))


def _kept(sources: Sequence[PredictionRows], output: Output, reporter: Reporter) -> list[str]:
    """Return the columns of the rows that the output format can store, and print a note on the others.

    Raises:
        DataError: columns of the same name cannot be one in that format.
    """
    named = [(rows.name, split.table.schema) for rows in sources for split in rows.data.splits.values()]
    schemas = [schema for _, schema in named]
    kind = output.kind()
    left_out: dict[str, str] = {}
    for schema in schemas:
        kept = {*storable(schema, kind)}
        left_out |= {
            name: f"{kind} cannot hold bytes, such as those of images" for name in schema.names if name not in kept
        }
        left_out |= {field.name: _why_unread(schema, field) for field in schema if is_unreadable(field)}
    for name, why in left_out.items():
        reporter.note(f"warning: column '{name}' is left out of the output: {why}")
    if kind == "parquet":
        check_united([(name, pa.schema([f for f in schema if f.name not in left_out])) for name, schema in named])
    known = dict.fromkeys(name for schema in schemas for name in schema.names)
    return [name for name in known if name not in left_out and name != SOURCE_COLUMN]


def _why_unread(schema: pa.Schema, field: pa.Field) -> str:
    try:
        refuse_unreadable(schema.empty_table(), [field.name])
    except DataError as error:
        return f"{error.where}: {error.problem}"
    return "it cannot be read"


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows that are predicted together.

    Attributes:
        first: index of the first row among all rows.
        split: name of their split.
        rows: the rows.
        answers: predicts them.
    """

    first: int
    split: str
    rows: Split
    answers: BlockAnswers


class _PredictionLoop:
    """The loop over blocks of rows: each of n processes predicts every n-th block, and the main one writes in order.

    Args:
        work: the rows of each data set, and what predicts a block of them.
        reporter: shows progress and, without an output file, the predictions.
        output: where predictions are written.
        parts: finished blocks of the output file; None for standard output.
    """

    def __init__(
        self, work: Sequence[tuple[PredictionRows, BlockAnswers]], reporter: Reporter, output: Output,
        parts: Parts | None,
    ) -> None:  # fmt: skip
        self._work, self._reporter, self._output, self._parts = work, reporter, output, parts
        self._answers = work[0][1]
        self._accelerator = self._answers.accelerator
        self._writer: TableWriter | None = None
        self._held: list[pa.Table] = []
        self._is_whole = False
        self._without_text = 0

    def run(self, facts: dict[str, Any]) -> PredictResult:
        """Predict all rows that are not done, and return the result."""
        counts = [rows.count for rows, _ in self._work]
        total = None if None in counts else sum(filter(None, counts))
        size = _LARGEST if total is None else min(_LARGEST, max(_SMALLEST, -(-total // _BLOCKS)))
        facts = {**facts, "rows": total, "block": size}
        done = sync.from_main(self._accelerator, functools.partial(self._begin, facts))
        if done:
            self._reporter.note(f"continuing after {counted(done, 'row')}")
        with self._reporter.bar("predict", total, done=done, unit="rows") as bar:
            try:
                done, errors = self._predict(size, done, bar)
                self._release()
                if self._parts is not None:
                    errors = sync.from_main(self._accelerator, self._join)
            except (KeyboardInterrupt, MirrortuneError):
                self._keep()
                raise
        if self._without_text:
            count = counted(self._without_text, "row")
            self._reporter.note(f"warning: {count} without a text got the answer of an empty one")
        return PredictResult(
            output="-" if self._output.file is None else str(self._output.file), rows=done, errors=errors
        )

    def _begin(self, facts: dict[str, Any]) -> int:
        """Prepare the output, and return the number of rows that are done already."""
        if self._parts is None:
            return 0
        if not self._output.resume:
            self._parts.begin(facts, overwrite=self._output.overwrite)
            return 0
        done = self._parts.resume(facts)
        self._is_whole = self._parts.is_joined()
        return done

    def _predict(self, size: int, done: int, bar: Bar) -> tuple[int, int]:
        """Predict the rows after the first ``done``; return the number of all rows and of those with an error."""
        blocks = self._numbered(size, done)
        number, rank = self._accelerator.num_processes, self._accelerator.process_index
        errors = 0
        while group := list(itertools.islice(blocks, number)):
            made, failure = self._attempt(group[rank], bar) if rank < len(group) else (None, None)
            for block, table in zip(group, self._gathered(made, failure), strict=False):
                if isinstance(table, int):
                    raise failure or PeerError(table)
                errors += self._write(block, table)
                done += block.rows.table.num_rows
                bar.advance_to(done)
        return done, errors

    def _numbered(self, size: int, done: int) -> Iterator[_Block]:
        """Yield the blocks that are not done."""
        first = 0
        for source, answers in self._work:
            for name, rows in source.blocks(size):
                if first >= done:
                    yield _Block(first, name, rows, answers)
                first += rows.table.num_rows

    def _attempt(self, block: _Block, bar: Bar) -> tuple[pa.Table | None, MirrortuneError | None]:
        """Return a block with its answers, or the error that prevents them."""
        left = block.rows.table.num_rows

        def show(count: int) -> None:
            nonlocal left  # rows near a bad one are predicted more than once
            bar.advance_by(min(count, left))
            left -= min(count, left)

        try:
            return block.answers.table(block.split, block.rows, block.first, show), None
        except MirrortuneError as error:
            return None, error

    def _gathered(self, made: pa.Table | None, failure: MirrortuneError | None) -> list[pa.Table | int]:
        """Gather the results of all processes, each a table or an exit code."""
        own = made if failure is None else failure.exit_code
        if self._accelerator.num_processes == 1:
            return [own]
        packed = _packed(own) if isinstance(own, pa.Table) else own
        found = sync.gather_lists(self._accelerator, [packed])
        return [_unpacked(one) if isinstance(one, bytes) else one for one in found]

    def _write(self, block: _Block, table: pa.Table) -> int:
        """Write a block on the main process; return the number of its rows with an error."""
        name = self._answers.names([ERROR])[ERROR]
        errors = table.num_rows - table.column(name).null_count if name in table.column_names else 0
        answered = table.filter(table.column(name).is_null()) if errors else table
        self._without_text += block.answers.rows_without_text(answered)
        if not self._accelerator.is_main_process:
            return errors
        if self._parts is not None:
            self._parts.add(block.first, table)
            return errors
        self._held.append(table)
        if errors < table.num_rows:
            self._release()
        return errors

    def _release(self) -> None:
        """Print the tables that wait for the names of all columns: rows with errors alone do not have them."""
        if self._held and self._writer is None:
            names = dict.fromkeys([*self._answers.own, *(n for table in self._held for n in table.column_names)])
            last = self._answers.names([ERROR])[ERROR]
            self._writer = TableWriter(self._reporter.data, self._output.kind(), sorted(names, key=last.__eq__))
        for table in self._held:
            assert self._writer is not None
            self._writer.write(table)
        self._held.clear()

    def _join(self) -> int:
        """Join the parts to the output file; return the number of rows with an error."""
        assert self._parts is not None
        if self._is_whole:
            self._parts.discard()
            return 0
        last = self._answers.names([ERROR])[ERROR]
        return self._parts.join(own=self._answers.own, last=last)

    def _keep(self) -> None:
        """Print a note on what is kept of an unfinished output."""
        if self._parts is None or not self._accelerator.is_main_process:
            return
        if rows := self._parts.rows():
            self._reporter.note(
                f"kept {counted(rows, 'predicted row')} in {self._parts.folder}; continue with --resume"
            )
        else:
            self._parts.discard()


def _packed(table: pa.Table) -> bytes:
    """Serialise a table; pickle would include the whole table of which it is a slice."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _unpacked(content: bytes) -> pa.Table:
    with pa.ipc.open_stream(content) as reader:
        return reader.read_all()
