# SPDX-License-Identifier: Apache-2.0
"""Predict each row with its own adapter; a bank mixes the adapters in the batches of one base model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from mirrortune.adapters.files.adapter_file import AdapterFile
from mirrortune.adapters.files.find import adapter_to_score
from mirrortune.data.dataset import DataSet, Split
from mirrortune.data.files.arrow import cells, refuse_unreadable
from mirrortune.data.labels import as_name
from mirrortune.data.tokenize import Reading
from mirrortune.errors import ConfigError, DataError, MirrortuneError, VerificationError, did_you_mean, first_of
from mirrortune.inference.bank import AdapterBank
from mirrortune.inference.bank_file import ReadAdapter, open_bank
from mirrortune.inference.block_answers import BlockAnswers
from mirrortune.runs.checks import EvaluationSettings
from mirrortune.runs.target import Evaluable, load_base_of, task_of_run
from mirrortune.tasks.base import Generates, Task, scores_vocabulary
from mirrortune.tasks.predicting import Predictions
from mirrortune.tasks.prompts import PromptExamples

_MOST_NAMED = 8  # adapters in a message
_COLUMNS = ("_column", "_columns")


@dataclass(frozen=True, slots=True, kw_only=True)
class BankRequest:
    """The adapters for the rows of a data set.

    Attributes:
        path: saved bank, or folder of adapters.
        column: column with the name of each row's adapter.
    """

    path: Path
    column: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """How the rows of an adapter are read: its task, and its maximum row length in tokens."""

    task: Task
    max_length: int | None


class RowAdapters:
    """A bank with the rules by which rows choose their adapters.

    Args:
        bank: bank on the base model.
        base: base model, with the task of the first adapter.
        first: name of the first adapter.
        settings: settings with the columns that the user has named.
        column: column with the name of each row's adapter.
    """

    def __init__(
        self, bank: AdapterBank, base: Evaluable, first: str, settings: EvaluationSettings, column: str
    ) -> None:
        self.bank, self.base, self._first = bank, base, first
        self._settings, self._column = settings, column
        self._columns: dict[str, tuple[Any, Any]] = {}
        self._readers: dict[str | None, Reader] = {None: Reader(task=base.task, max_length=base.max_length)}

    def prepare(self, task: Task, data: DataSet | None) -> None:
        """Read rows with the columns of ``task``, and check the adapter names in ``data`` unless it is None.

        The columns are those of the first adapter, or the columns that were detected in their place.
        """
        known = {f.name: getattr(task, f.name) for f in fields(task)}  # type: ignore[arg-type]
        self._columns = {k: (getattr(self.base.task, k), v) for k, v in known.items() if k.endswith(_COLUMNS)}
        self.base = replace(self.base, task=task)
        self._readers[None] = Reader(task=task, max_length=self.base.max_length)
        if data is not None:
            self.check(data)

    def check(self, data: DataSet) -> None:
        """Read the adapters that the rows of ``data`` name.

        Raises:
            DataError: the bank lacks named adapters, or rows that need an adapter name none; all are reported together.
            ConfigError, VerificationError: an adapter cannot be used.
        """
        used: dict[str, None] = {}
        for split in data.splits.values():
            if split.stream is None:
                used |= dict.fromkeys(name for name in self.names_of(split) if name is not None)
        for name in used:
            self.reader(name)

    def names_of(self, rows: Split) -> list[str | None]:
        """Return the name of each row's adapter, or None for the base model.

        Raises:
            DataError: see :meth:`check`; also if the column cannot be read, such as one of mixed types.
        """
        table = rows.table
        if self._column not in table.column_names:
            raise DataError(
                rows.source, f"it has no column '{self._column}'.{did_you_mean(self._column, table.column_names)}",
                allowed=first_of(table.column_names), fix="Name the column of adapters with --adapter-column",
            )  # fmt: skip
        refuse_unreadable(table, [self._column])  # its cells are null, and the base model would answer all rows
        names = [as_name(value) for value in cells(table, self._column)]
        strange: dict[str | None, list[int]] = {}
        for row, name in enumerate(names):
            if (name is None and not self._answers_alone()) or (name is not None and name not in self.bank):
                strange.setdefault(name, []).append(row)
        if strange:
            self._refuse(rows, strange)
        return names

    def _answers_alone(self) -> bool:
        """Return whether the base model can answer without an adapter; the heads of most tasks come with an adapter."""
        return scores_vocabulary(self.base.task) or isinstance(self.base.task, Generates)

    def _refuse(self, rows: Split, strange: Mapping[str | None, list[int]]) -> None:
        empty = strange.get(None, [])
        listed = ", ".join(f"'{n}' ({rows.places.listed(found)})" for n, found in strange.items() if n is not None)
        problems = [f"the bank has no adapter {listed}"] if listed else []
        if empty:
            where = rows.places.listed(empty)
            problems.append(f"no adapter is named in {where}, and the base has no head for this task")
        raise DataError(
            f"{rows.source}, column '{self._column}'", "; ".join(problems),
            allowed=first_of(self.bank.names, _MOST_NAMED), fix="Correct these rows, or add the adapters to the bank",
        )  # fmt: skip

    def reader(self, name: str | None) -> Reader:
        """Return how the rows of an adapter are read; equal for adapters whose rows may share a batch."""
        if name not in self._readers:
            assert name is not None
            recorded, base = self.bank.recorded(name), self.base
            if recorded.get("task") is None:
                raise ConfigError(f"adapter '{name}'", "it was saved outside a task", fix="Use it in Python")
            task = task_of_run(recorded["task"], self._settings.task)
            if task.kind != base.task.kind:
                problem = f"it is for {task.kind}, and '{self._first}' for {base.task.kind}"
                raise ConfigError(f"adapter '{name}'", problem, fix="Predict the rows of each kind of task separately")
            chosen = {key: getattr(base.task, key) for key in ("metric_names", "selection_metric")}
            chosen |= {k: now for k, (trained, now) in self._columns.items() if getattr(task, k) == trained}
            asked = self._settings.data.max_length or recorded.get("max_length")
            length = task.resolve_length(asked, base.processor, base.model.config)
            self._readers[name] = Reader(task=replace(task, **chosen), max_length=length)  # type: ignore[type-var]
        return self._readers[name]

    def serving(self, names: Sequence[str | None]) -> Callable[[np.ndarray[Any, Any], int], Any]:
        """Return the context manager that :func:`judge_split` enters around each batch to choose the rows' adapters."""

        @contextmanager
        def around(rows: np.ndarray[Any, Any], count: int) -> Iterator[None]:
            own = [names[row] for row in rows.tolist()]
            copies = count // len(own)  # a row with several texts becomes several rows of the model
            with self.bank.rows([name for name in own for _ in range(copies)]):
                yield

        return around


def load_row_adapters(
    target: str, settings: EvaluationSettings, request: BankRequest, data: DataSet, device: Any
) -> RowAdapters:
    """Load a base model and open the bank on it.

    Raises:
        ConfigError: the target is an adapter itself, or there is no bank.
    """
    if adapter_to_score(target) is not None:
        raise ConfigError("--bank", f"'{target}' holds an adapter of its own", fix="Name the base model of the bank")
    name, first = _first_adapter(open_bank(request.path), data, request.column)
    base = load_base_of(first, target, settings)
    base.model.to(device)
    bank = AdapterBank.load(base.model, request.path)
    return RowAdapters(bank, base, name, settings, request.column)


def _first_adapter(bank: Mapping[str, ReadAdapter], data: DataSet, column: str) -> tuple[str, AdapterFile]:
    """Return the first adapter of the bank that rows name and that can be read, or if they name none, the first.

    One that no row needs may be damaged, or of another kind of task.
    """
    tables = [split.table for split in data.splits.values() if column in split.table.column_names]
    asked = {as_name(value) for table in tables for value in cells(table, column)}
    problems: list[MirrortuneError] = []
    for name in [name for name in bank if name in asked] or bank:
        try:
            adapter = bank[name]()
        except (ConfigError, VerificationError) as error:
            problems.append(error)
        else:
            if adapter.task is not None:
                return name, adapter
            problems.append(ConfigError(f"adapter '{name}'", "it was saved outside a task", fix="Use it in Python"))
    raise problems[0]


class BankAnswers(BlockAnswers):
    """Turns a block of rows into a table with predictions, each by the adapter of the row.

    Args:
        arguments, options: arguments of :class:`BlockAnswers`.
        adapters: adapters of the rows.
    """

    def __init__(self, *arguments: Any, adapters: RowAdapters, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._adapters = adapters

    @override
    def _answers(self, rows: Split, first: int, on_batch: Callable[[int], None]) -> Predictions:
        names = self._adapters.names_of(rows)
        groups: list[tuple[Reader, list[int]]] = []  # few; not all readers can be hashed
        for row, reader in enumerate(map(self._adapters.reader, names)):
            known = next((numbers for other, numbers in groups if other == reader), None)
            if known is None:
                groups.append((reader, known := []))
            known.append(row)
        answers: Predictions = {}
        for reader, numbers in groups:
            found = self._group(reader, rows, names, np.array(numbers), first, on_batch)
            for column, values in found.items():
                whole = answers.setdefault(column, [None] * len(names))
                for row, value in zip(numbers, values, strict=True):
                    whole[row] = value
        return answers

    def _group(
        self, reader: Reader, rows: Split, names: Sequence[str | None], numbers: np.ndarray[Any, Any], first: int,
        on_batch: Callable[[int], None],
    ) -> Predictions:  # fmt: skip
        """Predict the rows ``numbers`` of a block, whose adapters read rows in the same way."""
        own = rows.take(np.isin(np.arange(len(names)), numbers))
        options, task = replace(self.options, first_row=first), reader.task
        options.check(task.kind, task.prediction_options())
        reading = Reading(max_length=reader.max_length, allow_missing=True)
        examples = task.encode_to_predict(own, self.found.processor, reading, options)
        if isinstance(examples, PromptExamples):
            examples = replace(examples, numbers=first + numbers)
        served = [names[numbers[row]] for row in examples.row_numbers.tolist()]
        judged = self.judge(task, examples, own, on_batch, self._adapters.serving(served))
        return task.prediction_columns(judged, examples, own, options)
