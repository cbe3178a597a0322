# SPDX-License-Identifier: Apache-2.0
"""Predict a block of rows with a model, and return a table of the rows' columns and those of the predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mirrortune.data.dataset import Split
from mirrortune.data.examples import Examples
from mirrortune.data.files.arrow import is_string
from mirrortune.data.token_cache import uncached
from mirrortune.data.tokenize import Reading
from mirrortune.errors import DataError, VerificationError
from mirrortune.inference.prediction_file import ERROR, PREDICTION, append_columns, new_names
from mirrortune.inference.prediction_rows import part_of, with_words
from mirrortune.runs.checks import EvaluationSettings
from mirrortune.runs.target import Evaluable, check_ends, check_indices, eval_batch
from mirrortune.tasks.base import Task, TextTask
from mirrortune.tasks.predicting import Predictions, PredictOptions
from mirrortune.tasks.prompts import Around, unchanged
from mirrortune.training.evaluate import judge_split

_SPLIT, _SOURCE = "split", "source"


class _Alone:
    """A view of an accelerator with a single process, for processes that predict different blocks independently."""

    num_processes, process_index = 1, 0

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)


class BlockAnswers:
    """Turns a block of rows into a table with their predictions.

    Args:
        target: name of the model in messages.
        found: model with its task.
        settings: batch size and number of threads.
        options: options of prediction.
        accelerator: accelerate's ``Accelerator``.
        own: names of the rows' columns to keep, in all splits.
        has_splits: add a column with the name of the row's split.
        skips_errors: for rows that cannot be predicted, store the reason instead of raising.
        source: name of the data set, for a column of it; empty for none.
    """

    def __init__(
        self, target: str, found: Evaluable, settings: EvaluationSettings, options: PredictOptions, accelerator: Any,
        *, own: list[str], has_splits: bool, skips_errors: bool, source: str = "",
    ) -> None:  # fmt: skip
        self.accelerator = accelerator
        self.found, self.options = found, options
        self._target, self._skips_errors, self._has_splits = target, skips_errors, has_splits
        self.own, self._source = own, source
        self._checked = (-1, -1)
        self._batch = {**eval_batch(found, settings.eval), "num_workers": settings.eval.num_workers}
        self._reading = Reading(max_length=found.max_length, allow_missing=True)

    def rows_without_text(self, table: pa.Table) -> int:
        """Count the rows of a table from :meth:`table` in which a text that the model reads is missing or blank."""
        task = self.found.task
        names = [n for n in (task.text_columns if isinstance(task, TextTask) else ()) if n in table.column_names]
        lacking: Any = pa.scalar(value=False)
        for column in map(table.column, names):
            blank = pc.equal(pc.utf8_trim_whitespace(column), "") if is_string(column.type) else pc.is_null(column)
            lacking = pc.or_(lacking, pc.fill_null(blank, fill_value=True))
        return int(pc.sum(lacking).as_py() or 0)

    def table(self, name: str, rows: Split, first: int, on_batch: Callable[[int], None]) -> pa.Table:
        """Return a block of rows with their columns and those of the predictions.

        Args:
            name: name of the split.
            rows: rows of the block.
            first: index of the first row among all rows.
            on_batch: called with the number of rows after each batch.
        """
        with uncached():
            columns, errors = self._columns(with_words(rows, self.found.task), first, on_batch)
        columns = columns or {PREDICTION: [None] * len(errors)}
        if self._source:
            columns[_SOURCE] = [self._source] * len(errors)
        if self._has_splits:
            columns[_SPLIT] = [name] * len(errors)
        if self._skips_errors:
            columns[ERROR] = list(errors)
        own = rows.table.select([name for name in self.own if name in rows.table.column_names])
        names = self.names(columns)
        return append_columns(own, {names[name]: values for name, values in columns.items()})

    def names(self, columns: Iterable[str]) -> dict[str, str]:
        """Return names for new columns that do not clash with columns of the rows."""
        return new_names(columns, self.own)

    def _columns(
        self, rows: Split, first: int, on_batch: Callable[[int], None]
    ) -> tuple[Predictions, list[str | None]]:
        """Return the columns of predictions, and for each row the error or None; bad rows are found by bisection."""
        count = rows.table.num_rows
        try:
            return self._answers(rows, first, on_batch), [None] * count
        except (DataError, VerificationError) as error:
            if not self._skips_errors:
                raise
            if count == 1:
                return {}, [f"{error.where}: {error.problem}"]
        middle = count // 2
        halves = [
            self._columns(part_of(rows, start, stop - start), first + start, on_batch)
            for start, stop in ((0, middle), (middle, count))
        ]
        names = dict.fromkeys(name for columns, _ in halves for name in columns)
        joined = {
            name: [value for columns, errors in halves for value in columns.get(name, [None] * len(errors))]
            for name in names
        }
        return joined, [error for _, errors in halves for error in errors]

    def _answers(self, rows: Split, first: int, on_batch: Callable[[int], None]) -> Predictions:
        task, options = self.found.task, replace(self.options, first_row=first)
        examples = task.encode_to_predict(rows, self.found.processor, self._reading, options)
        judged = self.judge(task, examples, rows, on_batch, unchanged)
        return task.prediction_columns(judged, examples, rows, options)

    def judge(
        self, task: Task, examples: Examples, rows: Split, on_batch: Callable[[int], None], around: Around
    ) -> list[Any]:
        """Run the model on encoded rows; see :func:`judge_split`."""
        self._check(examples, rows.source)
        return judge_split(
            self.found.model, task, examples, _Alone(self.accelerator), **self._batch, on_batch=on_batch, around=around
        )

    def _check(self, examples: Examples, source: str) -> None:
        """Check the end tokens of a block, and its indices unless a block with longer rows and larger ids was checked
        before: repeating this slow check would find nothing new.
        """
        check_ends(self.found, examples, self._target, source)
        largest = max((int(ids.max()) for ids in examples.token_ids() if len(ids)), default=0)
        reach = (int(examples.lengths.max()), largest)
        if any(now > before for now, before in zip(reach, self._checked, strict=True)):
            check_indices(self.found, examples, self._target, source)
            self._checked = (max(reach[0], self._checked[0]), max(largest, self._checked[1]))
