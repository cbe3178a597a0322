# SPDX-License-Identifier: Apache-2.0
"""question-answering: question and context -> the span of the context that answers, or no answer.

Long contexts are split into overlapping windows. A question is scored once, by the best span over its windows; the
answer is none if the first token scores higher (Devlin et al. 2019, sections 4.2 and 4.3).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from typing_extensions import override

from mirrortune.data.columns import check_is_text, check_named, detected, refuse_written_lists
from mirrortune.data.dataset import Split
from mirrortune.data.examples import Batch, IntArray, Padding, Rows, TokenExamples
from mirrortune.data.files.arrow import Columns, cells, is_string, nulls, refuse_unreadable, rows_of
from mirrortune.data.labels import refuse_missing
from mirrortune.data.token_cache import Tokens, ragged
from mirrortune.data.tokenize import Reading, resolve_max_length, tokenise_rows
from mirrortune.errors import ConfigError, DataError, NoRowsError, counted, first_of
from mirrortune.tasks.base import TextTask
from mirrortune.tasks.metrics import KINDS_OWN, Scores
from mirrortune.tasks.predicting import Predictions, PredictOptions, plain_numbers, probabilities, refuse_nan

_LONGEST = 384  # default length of a window, in tokens
_STRIDE = 128
_N_BEST, _MAX_ANSWER = 20, 30  # begins and ends considered per window; maximum length of an answer, in tokens

_SPAN_FIELDS = ("score", "start", "end")

Answer = tuple[str, int]  # text, and its first character in the context (-1 if not given)


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowExamples(TokenExamples):
    """Windows of questions; ``references`` maps them to their questions."""

    @property
    @override
    def row_numbers(self) -> Rows:
        counts = self.references.counts
        return np.repeat(np.arange(len(counts)), counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task(TextTask):
    """Extraction of an answer from a context.

    Attributes:
        text_columns: question and context.
        label_column: the answers: ``{text: [...], answer_start: [...]}`` as on the Hub, a list of texts, or a text,
            which is empty for a question without answer.
        may_lack_answer: whether some training questions have no answer.
        stride: overlap of neighbouring windows, in tokens; None for 128, or a third of a short window.
    """

    text_columns: tuple[str, ...]
    label_column: str
    may_lack_answer: bool
    stride: int | None
    metric_names: tuple[str, ...]
    selection_metric: str
    kind: str = "question-answering"
    auto_class: str = "AutoModelForQuestionAnswering"
    version: int = 2

    @classmethod
    @override
    def from_rows(
        cls, table: pa.Table, source: str, scores: Scores = KINDS_OWN, *,
        text_columns: tuple[str, ...] | None = None, label_column: str | None = None,
        stride: int | None = None,
    ) -> tuple[Task, list[str]]:  # fmt: skip
        """Create the task; raise a DataError if columns of questions, contexts or answers are missing."""
        names = {n.lower(): n for n in table.column_names}
        text = text_columns or tuple(names[n] for n in ("question", "context") if n in names)
        label = label_column or next((names[n] for n in ("answers", "answer") if n in names), None)
        check_named(table, source, {"--text-column": text, "--label-column": label})
        if len(text) != 2 or label is None:
            refuse_unreadable(table, table.column_names)
            raise DataError(
                source, f"no columns of questions, contexts and answers; the columns are {first_of(names.values())}",
                allowed="question, context and answers",
                fix="Name them with --text-column (question, then context) and --label-column",
            )  # fmt: skip
        for column in text:
            check_is_text(table, column, source)
        refuse_unreadable(table, (*text, label))
        refuse_written_lists(table, label, source)
        notes = [] if text_columns else [detected("text", text[0]), detected("text", text[1])]
        notes += [] if label_column else [detected("label", label)]
        chosen = scores.fields(("squad_f1", "exact_match"), "answers")
        # Invalid cells are reported by strata, with their rows.
        num_empty = int(_empty_cells(table, label).sum())
        if num_empty == table.num_rows:
            num_empty = 0  # rows without labels
        if num_empty:
            notes.append(f"{counted(num_empty, 'row')} with an empty '{label}': questions without an answer")
        may_lack_answer = num_empty > 0 or any(_is_answered(value) is False for value in cells(table, label))
        task = cls(text_columns=text, label_column=label, may_lack_answer=may_lack_answer, stride=stride, **chosen)
        return task, notes

    @override
    def columns(self) -> list[tuple[str, str]]:
        return [("question", self.text_columns[0]), ("context", self.text_columns[1]), ("answer", self.label_column)]

    @override
    def strata(self, split: Split) -> None:
        places = split.places
        for row, value in enumerate(cells(split.table, self.label_column)):
            _answers(value, places.where(row))
        refuse_missing(self._missing(split), split.places, self.label_column, "answer")

    def _missing(self, split: Split, *, for_training: bool = False) -> npt.NDArray[np.bool_]:
        """Return which rows have no label, (N,).

        An empty cell means that the question has no answer, if some training questions have none and the split has
        answers at all.
        """
        missing = nulls(split.table, self.label_column)
        if not self.may_lack_answer or (missing.all() and not for_training):
            return missing
        return missing & ~_empty_cells(split.table, self.label_column)

    @override
    def config_fields(self) -> dict[str, Any]:
        """Return the configuration of a head with two outputs: begin and end of a span."""
        return {"num_labels": 2}

    @override
    def resolve_length(self, asked: int | None, processor: Any, config: Any) -> int:
        """Return the length of a window."""
        length = resolve_max_length(asked, processor, config, default=_LONGEST)
        if self.stride is not None and self.stride >= length // 2:
            raise ConfigError("data.stride", f"got {self.stride}, windows have {length} tokens",
                              allowed=f"less than {length // 2}")  # fmt: skip
        return length

    @override
    def encode(self, split: Split, processor: Any, reading: Reading) -> TokenExamples:
        """Split each row into windows, at least one; the windows are the rows of the result.

        Training rows are left out if their context holds none of their answers, as they would teach to give none.
        """
        max_length = reading.num_tokens
        missing, places = self._missing(split, for_training=reading.for_training), split.places
        if not reading.allow_missing:
            refuse_missing(missing, split.places, self.label_column, "answer")
        stride = min(_STRIDE, max_length // 3) if self.stride is None else self.stride

        def make(columns: Columns, numbers: Rows) -> Tokens:
            contexts = [str(text or "") for text in columns[1]]
            answers = [_answers(v, places.where(n)) for n, v in zip(numbers, columns[2], strict=True)]
            located = [_located(answer, context) for answer, context in zip(answers, contexts, strict=True)]
            is_lost = np.array([bool(answer) and place is None for answer, place in zip(answers, located, strict=True)])
            # Leading white space is not part of the question and would take up room in the windows (SQuAD has some).
            questions = [str(text or "").lstrip() for text in columns[0]]
            keep = ~is_lost if reading.for_training else np.ones_like(is_lost)
            arrays = _windows(questions, contexts, located, keep, processor, max_length, stride)
            return arrays, {"lost": int(is_lost.sum())}

        made = tokenise_rows(
            split, [*self.text_columns, self.label_column], processor, reading, self.code, make,
            facts={"length": max_length, "stride": stride, "all_questions": not reading.for_training},
        )  # fmt: skip
        arrays = made.arrays
        offsets, counts = arrays.pop("offsets"), arrays.pop("windows")
        notes = [f"{len(counts):,} questions, {int((counts > 1).sum()):,} of them read through several windows"]
        if lost := made.counts["lost"]:
            listed = f"left out ({places.listed(np.flatnonzero(counts == 0))})" if reading.for_training else "scored"
            notes.append(f"{lost:,} whose context holds none of their answers: {listed}")
        if not counts.any():
            raise NoRowsError(
                split.source, f"no context holds an answer of its question, as in {places.where(0)}",
                fix="Write answers as the context does, with its capitals",
            )  # fmt: skip
        scoring = _Scoring(
            split=split, columns=(self.text_columns[1], self.label_column), counts=counts,
            starts=arrays.pop("starts"), ends=arrays.pop("ends"), offsets=offsets,
        )  # fmt: skip
        return WindowExamples(
            features=arrays,
            offsets=offsets,
            targets=np.stack([arrays.pop("first"), arrays.pop("last")], axis=1).astype(np.int64),
            padding=Padding(side="right", fill=Padding.of(processor).fill),  # targets are positions in the window
            max_length=max_length,
            num_unlabelled=int(counts[missing].sum()),
            notes=tuple(notes),
            references=scoring,
        )

    @override
    def loss(self, inputs: Batch, outputs: Any, targets: Tensor) -> tuple[Tensor, int]:
        """Return the mean of the cross-entropies of begin and end, targets (B, 2), summed over windows.

        Padding is no answer, so that the loss of a window does not depend on the others of its batch.
        """
        both = torch.cat([outputs.start_logits.float(), outputs.end_logits.float()])
        is_padding = inputs["attention_mask"] == 0
        both = both.masked_fill(torch.cat([is_padding, is_padding]), -math.inf)
        return F.cross_entropy(both, targets.T.flatten(), reduction="sum") / 2, targets.shape[0]

    @override
    def judge(self, model: Any, inputs: Batch, outputs: Any, targets: Tensor) -> Sequence[Any]:
        """Return the begin and end logits (2, L) of each window."""
        both = torch.stack([outputs.start_logits, outputs.end_logits], dim=1).float().cpu().numpy()
        masks = inputs["attention_mask"].bool().cpu().numpy()
        return [logits[:, mask] for logits, mask in zip(both, masks, strict=True)]

    @override
    def answers(self, judged: Sequence[Any], examples: Any) -> tuple[list[str], list[tuple[str, ...]]]:
        """Return the predicted answer of every question ("" for none), and its true answers."""
        scoring: _Scoring = examples.references
        said, right = [], []
        for context, answers, windows in scoring.questions():
            (low, high), _ = scoring.ranked(context, windows, judged, may_lack_answer=self.may_lack_answer)[0]
            said.append(context[low:high])
            right.append(tuple(text for text, _ in answers or ()))
        return said, right

    @override
    def prediction_options(self) -> tuple[str, ...]:
        return ("top",)

    @override
    def prediction_columns(
        self, judged: Sequence[Any], examples: Any, split: Split, options: PredictOptions
    ) -> Predictions:
        """Return the best answers of each question: text, probability among the considered spans, and begin and end in
        characters of the context (end exclusive). No answer has the text "", and None as begin and end.
        """
        scoring: _Scoring = examples.references
        top = options.top or 1
        suffixes = [f"_{place + 1}" if place else "" for place in range(top)]
        columns: Predictions = {f"{n}{suffix}": [] for suffix in suffixes for n in ("prediction", *_SPAN_FIELDS)}
        for row, (context, _, windows) in enumerate(scoring.questions()):
            if any(np.isnan(judged[window]).any() for window in windows):
                refuse_nan([row], split.places)
            found = scoring.ranked(context, windows, judged, may_lack_answer=self.may_lack_answer)
            shares = plain_numbers(probabilities(np.array([score for _, score in found])))
            for place, suffix in enumerate(suffixes):
                text, share, low, high = None, None, None, None
                if place < len(found):
                    text, share = context[slice(*found[place][0])], shares[place]
                    low, high = found[place][0] if text else (None, None)
                for name, value in zip(("prediction", *_SPAN_FIELDS), (text, share, low, high), strict=True):
                    columns[f"{name}{suffix}"].append(value)
        return columns


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scoring:
    """Data needed to convert the logits of windows to answers of questions.

    Attributes:
        split, columns: the contexts and answers.
        counts: number of windows of each question, shape (N,).
        starts, ends: range of characters of the context that each token covers, -1 outside the context, shape (T,).
        offsets: shape (number of windows + 1,); window i has the tokens [offsets[i], offsets[i + 1]).
    """

    split: Split
    columns: tuple[str, str]
    counts: IntArray
    starts: IntArray
    ends: IntArray
    offsets: IntArray

    def questions(self) -> Iterator[tuple[str, tuple[Answer, ...] | None, range]]:
        """Yield the context of each question, its true answers, and the indices of its windows."""
        stop = 0
        rows = rows_of(self.split.table, self.columns)
        for count, (context, value) in zip(self.counts.tolist(), rows, strict=True):
            stop += count
            yield str(context or ""), _answers(value, self.split.source), range(stop - count, stop)

    def ranked(
        self, context: str, windows: range, judged: Sequence[Any], *, may_lack_answer: bool
    ) -> list[tuple[tuple[int, int], float]]:
        """Return spans of the context (begin and end in characters) with their scores, the best first.

        Tokens of some tokenizers begin with white space; spans do not.
        ``(0, 0)``, no answer, is included if ``may_lack_answer`` or if there is no other span.
        """
        spans, none = [], float("inf")
        for window in windows:
            begin, end = self.offsets[window : window + 2]
            starts, ends = judged[window]
            none = min(none, float(starts[0] + ends[0]))
            spans += _best_spans(starts, ends, np.stack([self.starts[begin:end], self.ends[begin:end]], axis=1))
        found: dict[tuple[int, int], float] = {}
        for score, low, high in sorted(spans, reverse=True):
            begin = high - len(context[low:high].lstrip())
            if begin < high:
                found.setdefault((begin, high), score)  # windows overlap, so two may contain the same span
        if may_lack_answer or not found:
            found[0, 0] = none
        # Among equal scores, later spans come first, and no answer last.
        return sorted(found.items(), key=lambda item: item[1], reverse=True)


def _best_spans(starts: npt.NDArray[Any], ends: npt.NDArray[Any], places: IntArray) -> list[tuple[float, int, int]]:
    """Return (score, begin, end) of the best spans of a window within its context; begin and end in characters."""
    inside = np.flatnonzero(places[:, 1] > 0)
    begin = inside[np.argsort(-starts[inside])[:_N_BEST]]
    finish = inside[np.argsort(-ends[inside])[:_N_BEST]]
    return [
        (float(starts[i] + ends[j]), int(places[i, 0]), int(places[j, 1]))
        for i in begin
        for j in finish
        if i <= j < i + _MAX_ANSWER
    ]


def _span(places: IntArray, answer: Answer | None) -> tuple[int, int]:
    """Return the first and last token of the answer in a window; 0, 0 if the window does not contain all of it.

    Args:
        places: range of characters of the context that each token covers, shape (L, 2).
        answer: the answer, or None.
    """
    if answer is None:
        return 0, 0
    low, high = answer[1], answer[1] + len(answer[0])
    tokens = np.flatnonzero((places[:, 1] > low) & (places[:, 0] < high) & (places[:, 1] > 0))
    if len(tokens) and places[tokens[0], 0] <= low and places[tokens[-1], 1] >= high:
        return int(tokens[0]), int(tokens[-1])
    return 0, 0


def _located(answers: tuple[Answer, ...] | None, context: str) -> Answer | None:
    """Return the first answer that occurs in the context, with its place there; None if none does."""
    for text, start in answers or ():
        if start >= 0 and context.startswith(text, start):
            return text, start
        # Some data sets count bytes, or strip white space: the place that is nearest to the given one is meant.
        wanted = max(start, 0)
        found = [context.rfind(text, 0, wanted + len(text)), context.find(text, wanted)]
        if places := [place for place in found if place >= 0]:
            return text, min(places, key=lambda place: abs(place - wanted))
    return None


def _answers(value: Any, where: str) -> tuple[Answer, ...] | None:
    """Return the answers in a cell that are not blank, none for a question without answer; None for a missing label."""
    if value is None:
        return None
    if isinstance(value, str):
        return ((value, -1),) if value.strip() else ()
    if isinstance(value, dict):
        texts, starts = _listed(value.get("text")), _listed(value.get("answer_start"))
    else:
        parts = [part if isinstance(part, dict) else {"text": part} for part in _listed(value)]
        texts, starts = [part.get("text") for part in parts], [part.get("answer_start") for part in parts]
    places = [-1 if start is None else start for start in starts] + [-1] * (len(texts) - len(starts))
    fits = len(texts) == len(places) and all(isinstance(text, str) for text in texts)
    are_whole = all(isinstance(p, int) or (isinstance(p, float) and p.is_integer()) for p in places)
    if not (fits and are_whole):
        raise DataError(where, f"answers are {str(value)[:120]!r}",
                        allowed="{text: [...], answer_start: [...]}, a list of texts, or a text")  # fmt: skip
    return tuple((text, int(place)) for text, place in zip(texts, places, strict=True) if text.strip())


def _empty_cells(table: pa.Table, column: str) -> npt.NDArray[np.bool_]:
    """Return which cells say by being empty that a question has no answer, (N,).

    A csv cannot say it otherwise. A file that holds empty texts can, and a null in it is a missing label.
    """
    empty = nulls(table, column)
    is_text = is_string(table.schema.field(column).type)
    return empty if is_text and not any(value == "" for value in cells(table, column)) else np.zeros_like(empty)


def _is_answered(value: Any) -> bool | None:
    """Return whether a cell holds an answer; None if the label is missing or unreadable."""
    try:
        answers = _answers(value, "")
    except DataError:
        return None
    return None if answers is None else bool(answers)


def _listed(value: Any) -> list[Any]:
    """Return a list unchanged, None as an empty list, and any other value as a list of one."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _windows(
    questions: list[str],
    contexts: list[str],
    located: list[Answer | None],
    keep: npt.NDArray[np.bool_],
    tokenizer: Any,
    max_length: int,
    stride: int,
) -> dict[str, IntArray]:
    """Tokenise questions and contexts into windows, none for a question that ``keep`` leaves out.

    Additional fields: ``starts`` and ``ends`` (T,), the range of characters of the context that each token covers, -1
    outside the context; ``first`` and ``last``, the first and last answer token of each window; ``windows``, the
    number of windows of each question.
    """
    names = [n for n in tokenizer.model_input_names if n in ("input_ids", "token_type_ids")]
    kept = np.flatnonzero(keep)
    if not len(kept):
        none = {name: np.zeros(0, np.int32) for name in (*names, "starts", "ends", "first", "last")}
        return {**none, "offsets": np.zeros(1, np.int64), "windows": np.zeros(len(keep), np.int32)}
    questions, contexts = [questions[i] for i in kept], [contexts[i] for i in kept]
    # A question may fill at most half of a window.
    asked = tokenizer(questions, add_special_tokens=False, truncation=True, max_length=max(1, max_length // 2 - 4),
                      return_offsets_mapping=True)  # fmt: skip
    ends = (pieces[-1][1] if pieces else 0 for pieces in asked["offset_mapping"])
    cut = [question[:end] for question, end in zip(questions, ends, strict=True)]
    made = tokenizer(
        cut, contexts, truncation="only_second", max_length=max_length, stride=stride,
        return_overflowing_tokens=True, return_offsets_mapping=True, verbose=False,
    )  # fmt: skip
    owners = np.array(made["overflow_to_sample_mapping"], dtype=np.int64)
    places, spans = [], []
    for window, owner in enumerate(owners):
        inside = np.array([part == 1 for part in made.sequence_ids(window)])
        places.append(np.where(inside[:, None], np.array(made["offset_mapping"][window]), -1))
        spans.append(_span(places[-1], located[kept[owner]]))
    starts_and_ends, first_and_last = np.concatenate(places).astype(np.int32), np.array(spans, dtype=np.int32)
    arrays = {name: ragged(list(made[name]))[0] for name in names}
    arrays |= {"starts": starts_and_ends[:, 0], "ends": starts_and_ends[:, 1], "offsets": ragged(made["input_ids"])[1]}
    arrays |= {"first": first_and_last[:, 0], "last": first_and_last[:, 1]}
    arrays["windows"] = np.bincount(kept[owners], minlength=len(keep)).astype(np.int32)
    return arrays
