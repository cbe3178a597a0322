# SPDX-License-Identifier: Apache-2.0
"""question-answering: question and context -> the words of the context that answer, or nothing where nothing does.

Contexts that are too long are read through windows that overlap; a question is scored once, by its best span over all
of its windows (Devlin et al. 2019, section 4.2 and 4.3: no answer where the first token scores higher).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mirrortune.columns import check_named, detected
from mirrortune.data import Split
from mirrortune.errors import ConfigError, DataError
from mirrortune.examples import Batch, IntArray, Padding, TokenExamples
from mirrortune.labels import refuse_missing
from mirrortune.metrics import KINDS_OWN, Scores
from mirrortune.model import ModelSource, load_tokenizer
from mirrortune.probes import text_probe
from mirrortune.token_cache import TokenKey, cached_tokens, data_digest, ragged
from mirrortune.tokens import Reading, resolve_max_length

_LONGEST = 384  # tokens of a window, the default
_STRIDE = 128
_N_BEST, _MAX_ANSWER = 20, 30  # spans considered per window end; tokens of an answer

Answer = tuple[str, int]  # text and its first character in the context; -1 if it was not said where


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What scoring needs to know of a row.

    Attributes:
        context: the text that spans are cut out of.
        answers: every right one; none if there is none.
        windows: numbers of its windows.
    """

    context: str
    answers: tuple[str, ...]
    windows: range


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """See :class:`mirrortune.tasks.Task`.

    Attributes:
        text_columns: question and context.
        label_column: answers: the Hub's ``{text: [...], answer_start: [...]}``, a list of texts, or a text.
        may_lack_answer: whether some questions of the training rows have no answer.
        stride: tokens that neighbouring windows share; None for 128, or a third of a short window.
    """

    text_columns: tuple[str, ...]
    label_column: str
    may_lack_answer: bool
    stride: int | None
    metric_names: tuple[str, ...]
    selection_metric: str
    kind: str = "question-answering"
    auto_class: str = "AutoModelForQuestionAnswering"
    version: int = 1

    @classmethod
    def from_rows(
        cls, table: pa.Table, source: str, scores: Scores = KINDS_OWN, *,
        text_columns: tuple[str, ...] | None = None, label_column: str | None = None,
        stride: int | None = None,
    ) -> tuple[Task, list[str]]:  # fmt: skip
        """The task; DataError if there are no columns of questions, contexts and answers."""
        names = {n.lower(): n for n in table.column_names}
        text = text_columns or tuple(names[n] for n in ("question", "context") if n in names)
        label = label_column or next((names[n] for n in ("answers", "answer") if n in names), None)
        check_named(table, [*((c, "--text-column") for c in text), (label, "--label-column")], source)
        if len(text) != 2 or label is None:
            raise DataError(
                source, f"no columns of questions, contexts and answers; the columns are {', '.join(names.values())}",
                allowed="question, context and answers",
                fix="Name them with --text-column (question, then context) and --label-column",
            )  # fmt: skip
        notes = [] if text_columns else [detected("text", text[0]), detected("text", text[1])]
        notes += [] if label_column else [detected("label", label)]
        chosen = scores.fields(("squad_f1", "exact_match"), "answers")
        may_lack_answer = any(a is not None and not a for a in _answers(table, label, source))
        task = cls(text_columns=text, label_column=label, may_lack_answer=may_lack_answer, stride=stride, **chosen)
        return task, notes

    def columns(self) -> list[tuple[str, str]]:
        """See :class:`mirrortune.tasks.Task`."""
        return [("question", self.text_columns[0]), ("context", self.text_columns[1]), ("answer", self.label_column)]

    def strata(self, split: Split) -> None:
        """None: rows are split at random."""
        answers = _answers(split.table, self.label_column, split.source)
        refuse_missing(np.array([a is None for a in answers]), split.source, self.label_column, "answer")

    def config_fields(self) -> dict[str, Any]:
        """A head of two: where a span begins, and where it ends."""
        return {"num_labels": 2}

    def load_processor(self, source: ModelSource) -> Any:
        """The tokenizer."""
        return load_tokenizer(source)

    def resolve_length(self, asked: int | None, processor: Any, config: Any) -> int:
        """See :class:`mirrortune.tasks.Task`; of a window."""
        length = resolve_max_length(asked, processor, config, default=_LONGEST)
        if self.stride is not None and self.stride >= length // 2:
            raise ConfigError("data.stride", f"got {self.stride}, windows have {length} tokens",
                              allowed=f"less than {length // 2}")  # fmt: skip
        return length

    def encode(self, split: Split, processor: Any, reading: Reading) -> TokenExamples:
        """See :class:`mirrortune.tasks.Task`; a row becomes one window or more."""
        max_length = reading.max_length
        assert max_length is not None
        # Leading white space is no part of the question, and would fill windows of its own (SQuAD has some).
        questions, contexts = ([str(t or "") for t in split.table.column(c).to_pylist()] for c in self.text_columns)
        questions = [q.lstrip() for q in questions]
        answers = _answers(split.table, self.label_column, split.source)
        missing = np.array([a is None for a in answers])
        if not reading.allow_missing:
            refuse_missing(missing, split.source, self.label_column, "answer")
        stride = min(_STRIDE, max_length // 3) if self.stride is None else self.stride
        key = TokenKey.of(
            reading.rows(split), data_digest([[questions, contexts]]), processor, columns=self.text_columns,
            length=max_length, stride=stride, task=(self.kind, self.version),
        )  # fmt: skip
        arrays, _ = cached_tokens(
            key, lambda: iter([_windows(questions, contexts, processor, max_length, stride)]), reading.tell
        )
        offsets, owners = arrays.pop("offsets"), arrays.pop("owners")
        places = np.stack([arrays.pop("starts"), arrays.pop("ends")], axis=1)  # (T, 2); -1 outside the context
        firsts = np.searchsorted(owners, np.arange(len(questions) + 1))
        counts = np.diff(firsts)
        return TokenExamples(
            features=arrays,
            offsets=offsets,
            targets=_spans(places, offsets, [_located(answers[o], contexts[o]) for o in owners]),
            padding=Padding.of(processor),
            max_length=max_length,
            num_unlabelled=int(missing[owners].sum()),
            notes=(f"{len(questions):,} questions, {int((counts > 1).sum()):,} of them read through several windows",),
            references=_Scoring(
                questions=[
                    Question(context=c, answers=tuple(t for t, _ in a or ()), windows=range(first, first + n))
                    for c, a, first, n in zip(contexts, answers, firsts, counts, strict=False)
                ],
                places=places,
                offsets=offsets,
            ),
        )

    def loss(self, outputs: Any, targets: Tensor) -> tuple[Tensor, int]:
        """Mean of the cross-entropies of begin and end (B, 2), summed over windows."""
        both = torch.cat([outputs.start_logits.float(), outputs.end_logits.float()])
        return F.cross_entropy(both, targets.T.flatten(), reduction="sum") / 2, targets.shape[0]

    def judge(self, model: Any, inputs: Batch, outputs: Any, targets: Tensor) -> Sequence[Any]:
        """Begin and end logits (2, L) of each window."""
        both = torch.stack([outputs.start_logits, outputs.end_logits], dim=1).float().cpu().numpy()
        masks = inputs["attention_mask"].bool().cpu().numpy()
        return [logits[:, mask] for logits, mask in zip(both, masks, strict=True)]

    def answers(self, judged: Sequence[Any], examples: Any) -> tuple[list[str], list[tuple[str, ...]]]:
        """The best answer of every question ("" for none), and its right ones."""
        scoring: _Scoring = examples.references
        said = [scoring.best(q, judged, may_lack_answer=self.may_lack_answer) for q in scoring.questions]
        return said, [question.answers for question in scoring.questions]

    def probe(self, processor: Any, config: Any) -> Batch:
        """See :class:`mirrortune.tasks.Task`."""
        return text_probe(processor, config, num_texts=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scoring:
    """Questions, and where in its context every token of every window stands: characters (T, 2), -1 outside of it."""

    questions: list[Question]
    places: IntArray
    offsets: IntArray

    def best(self, question: Question, judged: Sequence[Any], *, may_lack_answer: bool) -> str:
        """The span that scores highest over all windows, or "" where having none scores higher."""
        spans, none = [], float("inf")
        for window in question.windows:
            places = self.places[self.offsets[window] : self.offsets[window + 1]]
            starts, ends = judged[window]
            none = min(none, float(starts[0] + ends[0]))
            spans += _best_spans(starts, ends, places)
        score, low, high = max(spans, default=(-np.inf, 0, 0))
        return "" if may_lack_answer and none > score else question.context[low:high]


def _best_spans(starts: npt.NDArray[Any], ends: npt.NDArray[Any], places: IntArray) -> list[tuple[float, int, int]]:
    """(score, first character, character behind the last) of spans of a window that lie in its context."""
    inside = np.flatnonzero(places[:, 1] > 0)
    begin = inside[np.argsort(-starts[inside])[:_N_BEST]]
    finish = inside[np.argsort(-ends[inside])[:_N_BEST]]
    return [
        (float(starts[i] + ends[j]), int(places[i, 0]), int(places[j, 1]))
        for i in begin
        for j in finish
        if i <= j < i + _MAX_ANSWER
    ]


def _spans(places: IntArray, offsets: IntArray, located: Sequence[Answer | None]) -> IntArray:
    """First and last token (N, 2) of each window's answer; the window's first token where it has not all of it."""
    found = np.zeros((len(located), 2), dtype=np.int64)
    for window, answer in enumerate(located):
        if answer is None:
            continue
        low, high = answer[1], answer[1] + len(answer[0])
        inside = places[offsets[window] : offsets[window + 1]]
        tokens = np.flatnonzero((inside[:, 1] > low) & (inside[:, 0] < high) & (inside[:, 1] > 0))
        if len(tokens) and inside[tokens[0], 0] <= low and inside[tokens[-1], 1] >= high:
            found[window] = tokens[0], tokens[-1]
    return found


def _located(answers: tuple[Answer, ...] | None, context: str) -> Answer | None:
    """The first answer, with its place in the context; None if there is none, or it does not occur."""
    for text, start in answers or ():
        is_there = start >= 0 and context.startswith(text, start)  # some data sets count bytes, or other white space
        place = start if is_there else context.find(text)
        if text and place >= 0:
            return text, place
    return None


def _answers(table: pa.Table, column: str, source: str) -> list[tuple[Answer, ...] | None]:
    """The right answers of each row; none for a question without one, None where the label is missing."""
    found: list[tuple[Answer, ...] | None] = []
    for number, value in enumerate(table.column(column).to_pylist(), start=1):
        if isinstance(value, dict) and "text" in value:
            texts, starts = value["text"] or [], value.get("answer_start") or []
            found.append(tuple(zip(texts, [*starts, *([-1] * (len(texts) - len(starts)))], strict=True)))
        elif isinstance(value, list):
            parts = [v if isinstance(v, dict) else {"text": v} for v in value]
            found.append(tuple((str(p.get("text", "")), int(p.get("answer_start", -1))) for p in parts))
        elif isinstance(value, str) or value is None:
            found.append(None if value is None else ((value, -1),) if value.strip() else ())
        else:
            raise DataError(f"{source} row {number}", f"answers are {str(value)[:120]!r}",
                            allowed="{text: [...], answer_start: [...]}, a list of texts, or a text")  # fmt: skip
    return found


def _windows(
    questions: list[str], contexts: list[str], tokenizer: Any, max_length: int, stride: int, chunk: int = 1024
) -> tuple[dict[str, IntArray], dict[str, int]]:
    names = [n for n in tokenizer.model_input_names if n in ("input_ids", "token_type_ids")]
    parts: dict[str, list[Any]] = {n: [] for n in (*names, "starts", "ends")}
    owners: list[int] = []
    for start in range(0, len(questions), chunk):
        # A question may fill no more than half of a window.
        asked = tokenizer(questions[start : start + chunk], add_special_tokens=False, truncation=True,
                          max_length=max(1, max_length // 2 - 4), return_offsets_mapping=True)  # fmt: skip
        places = zip(questions[start : start + chunk], asked["offset_mapping"], strict=True)
        cut = [question[: pieces[-1][1]] if pieces else "" for question, pieces in places]
        made = tokenizer(
            cut, contexts[start : start + chunk], truncation="only_second", max_length=max_length, stride=stride,
            return_overflowing_tokens=True, return_offsets_mapping=True, verbose=False,
        )  # fmt: skip
        for i, owner in enumerate(made["overflow_to_sample_mapping"]):
            owners.append(start + owner)
            inside = [part == 1 for part in made.sequence_ids(i)]
            offsets = made["offset_mapping"][i]
            parts["starts"].append([low if use else -1 for (low, _), use in zip(offsets, inside, strict=True)])
            parts["ends"].append([high if use else -1 for (_, high), use in zip(offsets, inside, strict=True)])
        for name in names:
            parts[name] += list(made[name])
    arrays = {name: ragged(values)[0] for name, values in parts.items()}
    arrays |= {"offsets": ragged(parts["input_ids"])[1], "owners": np.array(owners, dtype=np.int64)}
    return arrays, {"windows": len(owners)}
