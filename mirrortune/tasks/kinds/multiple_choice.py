# SPDX-License-Identifier: Apache-2.0
"""multiple-choice: a context, optionally with the start of the next sentence, and several endings -> the right ending.

The model scores each ending after its context, as in SWAG (Zellers et al. 2018); cross-entropy over the endings of a
row, accuracy by default.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from typing_extensions import override

from mirrortune.data.columns import check_is_text, check_named, detected, is_nan, number_of, refuse_written_lists
from mirrortune.data.dataset import Split
from mirrortune.data.examples import Batch, Examples, IntArray, Padding, Rows, Targets, TokenExamples
from mirrortune.data.files.arrow import Columns, refuse_unreadable, row_chunks, rows_of
from mirrortune.data.files.row_places import RowPlaces
from mirrortune.data.labels import MISSING, as_name, refuse_missing
from mirrortune.data.token_cache import Tokens
from mirrortune.data.tokenize import Reading, pieces, resolve_max_length, tokenise_rows
from mirrortune.errors import DataError, counted, first_of
from mirrortune.tasks.base import TextTask
from mirrortune.tasks.classes import SmoothsLabels
from mirrortune.tasks.metrics import KINDS_OWN, Scores
from mirrortune.tasks.predicting import Predictions, PredictOptions, best_answers, check_numbers
from mirrortune.tasks.probes import SENTENCES

_CONTEXTS = (("sent1", "sent2"), ("ctx",), ("context",), ("premise", "question"), ("premise",), ("question",))
_LISTS = ("endings", "choices", "options")
_NUMBERED = re.compile(r"(ending|choice|option|answer|solution|sol)_?\d+|option_?[a-e]", re.IGNORECASE)
_LABELS = ("label", "labels", "answer", "answerkey", "answer_index", "gold")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceExamples(Examples):
    """Examples with several endings each, one of which is right.

    Attributes:
        endings: tokens of the endings of all rows, each after its context.
        firsts: shape (N + 1,); row i has the endings [firsts[i], firsts[i + 1]).
        targets: index of the right ending of each row, -1 if it is missing, shape (N,).
        num_truncated: number of truncated endings.
        num_unlabelled: number of rows without a label.
    """

    endings: TokenExamples
    firsts: IntArray
    targets: Targets
    num_truncated: int
    num_unlabelled: int

    @property
    @override
    def lengths(self) -> IntArray:
        return np.add.reduceat(self.endings.lengths, self.firsts[:-1])

    @override
    def __len__(self) -> int:
        return len(self.targets)

    @override
    def extremes(self) -> Rows:
        return np.unique(np.searchsorted(self.firsts, self.endings.extremes(), side="right") - 1)

    @override
    def token_ids(self) -> list[IntArray]:
        return self.endings.token_ids()

    @override
    def batch(self, rows: Rows, epoch: int | None = None) -> Batch:
        """Return tokens (B, C, L) and targets (B, 2): the index of the right ending, and the number of endings.

        C is the largest number of endings in the batch. A row with fewer is padded with copies of its last ending,
        which the loss ignores.
        """
        counts = np.diff(self.firsts)[rows]
        width = int(counts.max())
        places = self.firsts[rows][:, None] + np.minimum(np.arange(width), counts[:, None] - 1)
        flat = self.endings.batch(places.flatten())
        batch: Batch = {k: v.unflatten(0, (len(rows), width)) for k, v in flat.items() if k != "targets"}
        batch["targets"] = torch.from_numpy(np.stack([self.targets[rows].astype(np.int64), counts], axis=1))
        return batch

    @override
    def describe(self) -> str:
        return f"{counted(len(self), 'row')} of endings: {self.endings.describe()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task(TextTask, SmoothsLabels):
    """Choice of the right ending.

    Attributes:
        text_columns: the context, and optionally a text with which every ending starts.
        choice_columns: one column per ending, or one for all (a list, or ``{text: [...], label: [...]}``).
        label_column: index, letter or label of the right ending.
    """

    text_columns: tuple[str, ...]
    choice_columns: tuple[str, ...]
    label_column: str
    metric_names: tuple[str, ...]
    selection_metric: str
    kind: str = "multiple-choice"
    auto_class: str = "AutoModelForMultipleChoice"
    version: int = 1

    @classmethod
    @override
    def from_rows(
        cls, table: pa.Table, source: str, scores: Scores = KINDS_OWN, *,
        text_columns: tuple[str, ...] | None = None, choice_columns: tuple[str, ...] | None = None,
        label_column: str | None = None,
    ) -> tuple[Task, list[str]]:  # fmt: skip
        """Create the task; raise a DataError if columns of contexts, endings or labels are missing."""
        names = {n.lower(): n for n in table.column_names}
        named = {"--text-column": text_columns, "--label-column": label_column, "data.choice_columns": choice_columns}
        check_named(table, source, named)
        text = text_columns or next((tuple(names[n] for n in c) for c in _CONTEXTS if set(c) <= set(names)), ())
        lists = [(names[n],) for n in _LISTS if n in names]
        numbered = tuple(sorted((n for n in table.column_names if _NUMBERED.fullmatch(n)), key=_in_parts))
        choices = choice_columns or next(iter(lists), numbered)
        label = label_column or next((names[n] for n in _LABELS if n in names and names[n] not in choices), None)
        if not text or len(text) > 2 or not choices or label is None:
            refuse_unreadable(table, table.column_names)
            raise DataError(
                source, f"no columns of contexts, endings and labels; the columns are {first_of(names.values())}",
                allowed="a context, two endings or more, and the number of the right one",
                fix="Name them with --text-column, data.choice_columns and --label-column",
            )  # fmt: skip
        for column in text:
            check_is_text(table, column, source)
        refuse_unreadable(table, (*text, *choices, label))
        if len(choices) == 1:
            refuse_written_lists(table, choices[0], source)
        notes = [] if text_columns else [detected("text", ", ".join(text))]
        notes += [] if choice_columns else [f"endings {', '.join(choices)} (detected; data.choice_columns to change)"]
        notes += [] if label_column else [detected("label", label)]
        chosen = scores.fields(("accuracy",), "choice")
        return cls(text_columns=text, choice_columns=choices, label_column=label, **chosen), notes

    @override
    def columns(self) -> list[tuple[str, str]]:
        roles = {"text": self.text_columns, "choice": self.choice_columns, "label": (self.label_column,)}
        return [(role, column) for role, columns in roles.items() for column in columns]

    @override
    def strata(self, split: Split) -> None:
        missing, done = np.zeros(split.table.num_rows, dtype=bool), 0
        for chunk in row_chunks(split.table, [*self.choice_columns, self.label_column]):
            numbers = np.arange(done, done + len(chunk[0]))
            missing[numbers] = np.array(self._read(chunk, numbers, split.places)[1]) == MISSING
            done += len(numbers)
        refuse_missing(missing, split.places, self.label_column)

    @override
    def encode(self, split: Split, processor: Any, reading: Reading) -> ChoiceExamples:
        max_length, num_texts = reading.num_tokens, len(self.text_columns)

        def make(columns: Columns, numbers: Rows) -> Tokens:
            contexts, *begun = ([text or "" for text in column] for column in columns[:num_texts])
            rows, right = self._read(columns[num_texts:], numbers, split.places)
            begins = begun[0] if begun else [""] * len(rows)
            asked = [context for context, row in zip(contexts, rows, strict=True) for _ in row]
            endings = [f"{begin} {c}".strip() for begin, row in zip(begins, rows, strict=True) for c in row]
            arrays, counts = pieces([asked, endings], processor, max_length)
            sizes = np.array([len(row) for row in rows], dtype=np.int32)
            return {**arrays, "sizes": sizes, "right": np.array(right, dtype=np.int32)}, counts

        columns = [column for _, column in self.columns()]  # texts, choices, label
        facts: dict[str, object] = {"length": max_length, "num_texts": num_texts, "empty_endings": "left out"}
        made = tokenise_rows(split, columns, processor, reading, self.code, make, facts=facts)
        arrays = made.arrays
        targets, sizes = arrays.pop("right").astype(np.int64), arrays.pop("sizes")
        if not reading.allow_missing:
            refuse_missing(targets == MISSING, split.places, self.label_column)
        endings = TokenExamples(
            features=arrays, offsets=arrays.pop("offsets"), targets=None, padding=Padding.of(processor),
            max_length=max_length, num_truncated=made.counts["num_truncated"],
        )  # fmt: skip
        return ChoiceExamples(
            endings=endings,
            num_truncated=endings.num_truncated,
            firsts=np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]),
            targets=targets,
            num_unlabelled=int((targets == MISSING).sum()),
        )

    @override
    def loss(self, inputs: Batch, outputs: Any, targets: Tensor) -> tuple[Tensor, int]:
        """Return the cross-entropy of logits (B, C) over the endings of each row, summed over rows."""
        return F.cross_entropy(_masked(outputs, targets), targets[:, 0], reduction="sum"), targets.shape[0]

    @override
    def training_loss(
        self, outputs: Any, targets: Tensor, *, smoothing: float, weights: Tensor | None = None
    ) -> tuple[Tensor, int]:
        """Return the loss with a share of each target spread over the endings of the row; ``weights`` is ignored,
        because endings are not classes.
        """
        scores = _masked(outputs, targets).log_softmax(dim=-1)
        rights = scores.gather(1, targets[:, :1]).sum()
        spread = (scores.masked_fill(scores.isinf(), 0).sum(dim=-1) / targets[:, 1]).sum()
        return -((1 - smoothing) * rights + smoothing * spread), targets.shape[0]

    @override
    def judge(self, model: Any, inputs: Batch, outputs: Any, targets: Tensor) -> Sequence[npt.NDArray[np.float32]]:
        """Return the logits of the endings of each row."""
        logits = outputs.logits.float().cpu().numpy()
        return [row[:count] for row, count in zip(logits, targets[:, 1].tolist(), strict=True)]

    @override
    def answers(self, judged: Sequence[Any], examples: Any) -> tuple[Targets, Targets]:
        """Return the index of the ending with the largest logit, and of the right one, each (N,)."""
        return np.array([logits.argmax() for logits in judged]), examples.targets

    @override
    def prediction_options(self) -> tuple[str, ...]:
        return ("top",)

    @override
    def prediction_columns(
        self, judged: Sequence[Any], examples: Any, split: Split, options: PredictOptions
    ) -> Predictions:
        """Return the most probable endings and the text of the best one.

        Endings are given by their labels if the rows have some, else by their indices.
        """
        logits = np.full((len(judged), max(map(len, judged))), -np.inf, dtype=np.float32)
        for row, own in enumerate(judged):
            logits[row, : len(own)] = own
        check_numbers(logits, split.places)
        table, places = split.table, split.places
        rows = [_endings(row, places.where(n)) for n, row in enumerate(rows_of(table, self.choice_columns))]
        names: list[Sequence[Any]] = [labels or range(len(texts)) for texts, labels in rows]
        chosen = [texts[best] for (texts, _), best in zip(rows, logits.argmax(axis=1), strict=True)]
        return {**best_answers(logits, names, options.top or 1), "choice": chosen}

    @override
    def probe(self, processor: Any, config: Any) -> Batch:
        limit = resolve_max_length(None, processor, config)
        made = processor(
            list(SENTENCES), list(reversed(SENTENCES)), padding=True, truncation=True, max_length=limit,
            return_tensors="pt",
        )  # fmt: skip
        return {name: values.unflatten(0, (2, 2)) for name, values in made.items()}

    def _read(self, columns: Columns, numbers: Rows, places: RowPlaces) -> tuple[list[list[str]], list[int]]:
        """Return the endings of some rows, and the index of the right one of each (-1 if the label is missing).

        Args:
            columns: cells of the choice columns, then of the label column.
            numbers: indices of the rows in the split.
            places: places of the split's rows, for messages.
        """
        *choices, labels = columns
        rows, right = [], []
        for number, label, *row_cells in zip(numbers, labels, *choices, strict=True):
            where = places.where(number)
            texts, names = _endings(row_cells, where)
            rows.append(texts)
            right.append(_index(label, len(texts), names, where))
        return rows, right


def _in_parts(name: str) -> list[str | int]:
    """Return the texts and numbers in a column name, by which ``option10`` comes after ``option2``."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", name))]


def _endings(row_cells: Sequence[Any], where: str) -> tuple[list[str], list[str] | None]:
    """Return the endings in the choice columns of a row, and their labels if the row has some.

    Empty cells after the last ending are no endings, so that rows of a table can have different numbers of them.
    """
    first = row_cells[0]
    named = first.get("label") if isinstance(first, dict) else None
    texts = (first.get("text") if isinstance(first, dict) else first) if len(row_cells) == 1 else list(row_cells)
    if not isinstance(texts, list) or not all(text is None or isinstance(text, str) for text in texts):
        raise DataError(where, f"its endings are {str(texts)[:120]!r}", allowed="two texts or more")
    filled = [place for place, text in enumerate(texts, start=1) if text and text.strip()]
    count = max(filled, default=0)
    if len(filled) < count:
        empty = min({*range(1, count)} - {*filled})
        raise DataError(
            where, f"ending {empty} is empty and ending {count} is not", allowed="empty endings behind all others",
            fix="Fill it, or move the later endings up, together with the label",
        )  # fmt: skip
    if count < 2:
        raise DataError(where, f"its endings are {str(texts)[:120]!r}", allowed="two texts or more")
    return texts[:count], [str(name) for name in named[:count]] if named else None


def _index(value: Any, count: int, names: list[str] | None, where: str) -> int:
    text, number = as_name(int(value) if isinstance(value, bool) else value), number_of(value)
    if text is None or number == -1 or is_nan(value):
        return MISSING
    if names and text in names:
        return names.index(text)
    if number is not None and number.is_integer() and 0 <= number < count:
        return int(number)  # pandas writes 1 as 1.0 in a column with missing labels
    if len(text) == 1 and 0 <= ord(text.upper()) - ord("A") < count:
        return ord(text.upper()) - ord("A")
    raise DataError(
        where, f"label {value!r} is not one of its {count} endings",
        allowed=f"0 to {count - 1}, or A to {chr(ord('A') + count - 1)}",
    )  # fmt: skip


def _masked(outputs: Any, targets: Tensor) -> Tensor:
    """Return the logits (B, C), with minus infinity for the padding of rows with fewer endings."""
    logits: Tensor = outputs.logits.float()
    numbers = torch.arange(logits.shape[1], device=logits.device)
    return logits.masked_fill(numbers >= targets[:, 1:], -torch.inf)
