# SPDX-License-Identifier: Apache-2.0
"""causal-lm: next-token prediction on conversations, prompts with completions, instructions (Alpaca columns) or text.

Loss: cross-entropy of the learned tokens, including the end token of an answer. Metrics: perplexity and token accuracy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from torch import Tensor
from typing_extensions import override

from mirrortune.data.dataset import Split
from mirrortune.data.examples import (
    IGNORE_INDEX,
    OPTIONAL_ROLE,
    Batch,
    Examples,
    Padding,
    Rows,
    Targets,
    TokenExamples,
)  # fmt: skip
from mirrortune.data.files.arrow import Columns, cells, nulls, refuse_unreadable, rows_of
from mirrortune.data.files.row_places import RowPlaces
from mirrortune.data.labels import refuse_missing
from mirrortune.data.mixture import SOURCE_COLUMN, source_numbers
from mirrortune.data.token_cache import Tokens, ragged
from mirrortune.data.tokenize import Reading, is_blank_text, joined_tokens, resolve_max_length, tokenise_rows
from mirrortune.errors import ConfigError, DataError, NoRowsError, unknown_name
from mirrortune.models.load import ModelSource, forward_parameters, load_tokenizer, with_end_token
from mirrortune.tasks import base
from mirrortune.tasks.answer_formats import answer_format
from mirrortune.tasks.answered_rows import AnsweredExamples, expected_answers
from mirrortune.tasks.base import RARE, Answers, TextTask, WritesText, check_columns, without_targets
from mirrortune.tasks.chat import (
    Encoding,
    LostAnswerError,
    TextReader,
    encode_continuation,
    encode_conversation,
    encode_prompt,
    has_template,
    num_tools_lost,
    template_notes,
    turn_end_ids,
    writes_system,
)
from mirrortune.tasks.conversations import (
    CALLS,
    EMPTY,
    SILENT,
    additions,
    as_text,
    asked_conversation,
    begins_with_space,
    choose_layout,
    encoding_notes,
    last_answer,
    refuse_faults,
    row_conversation,
    row_weight,
)
from mirrortune.tasks.metrics import KINDS_OWN, Scores
from mirrortune.tasks.packing import PackedExamples
from mirrortune.tasks.predicting import GENERATION, Predictions, PredictOptions, refuse_no_tokens
from mirrortune.tasks.probes import text_probe
from mirrortune.tasks.prompts import PromptExamples, asked_text, halved_texts, prompt_examples
from mirrortune.tasks.token_scores import WEIGHT_UNIT, score_tokens, summed_loss, weighted_loss

_LONGEST = 1024  # default maximum length, in tokens, if the model supports more
_LONGEST_ANSWER = 256  # tokens
_OF_FORMAT = ("text_columns", "label_column", "added_columns", "layout", "loss_on", "is_spaced")
_FORMATS, _LOSSES = ("auto", "chat", "text"), ("completions", "all")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task(TextTask, WritesText, Answers):
    """Language modelling.

    Attributes:
        layout: what the columns hold: ``messages``, ``prompt`` (with its completion in ``label_column``), ``alpaca``
            (instruction and optional input, with the output in ``label_column``), ``turns`` (messages, and their
            answers in ``label_column``) or ``text``.
        loss_on: ``completions`` or ``all``.
        format: ``chat``, the tokenizer's template; ``text``, as it is; ``auto``, chat for messages, and for
            instructions if there is a template.
        packing: whether training rows share sequences.
        added_columns: columns that a split may have: a row's system prompt, tools, documents, earlier turns, weight.
        answer: format of the generated answers that are scored (:mod:`mirrortune.tasks.answer_formats`); None to score
            tokens only.
        max_new_tokens: maximum length of a generated answer, in tokens.
        is_spaced: whether answers begin with white space, so that no line break is inserted before them.
        formats: the fields of :data:`_OF_FORMAT` of each source of a mixture whose rows are written in different ways.
        system: system turn of conversations that have none.
    """

    text_columns: tuple[str, ...]
    label_column: str | None
    layout: str
    loss_on: str
    format: str
    packing: bool
    metric_names: tuple[str, ...]
    selection_metric: str
    added_columns: tuple[str, ...] = ()
    answer: str | None = None
    max_new_tokens: int = _LONGEST_ANSWER
    is_spaced: bool = False
    formats: tuple[dict[str, Any], ...] = field(default=(), metadata=RARE)
    system: str = field(default="", metadata=RARE)
    kind: str = "causal-lm"
    auto_class: str = "AutoModelForCausalLM"
    version: int = 5

    @classmethod
    @override
    def from_rows(
        cls, table: pa.Table, source: str, scores: Scores = KINDS_OWN, *,
        text_columns: tuple[str, ...] | None = None, label_column: str | None = None,
        loss_on: str | None = None, format: str | None = None, packing: bool | None = None,
        answer: str | None = None, max_new_tokens: int | None = None, system: str | None = None,
    ) -> tuple[Task, list[str]]:  # fmt: skip
        """Create the task; raise a DataError if no column holds text."""
        for key, value, allowed in (("loss_on", loss_on, _LOSSES), ("format", format, _FORMATS)):
            if value not in (None, *allowed):
                raise unknown_name(f"task.{key}", "value", str(value), allowed)
        layout, text, label, notes = choose_layout(table, text_columns, label_column, source)
        refuse_unreadable(table, [column for column in (*text, label) if column is not None])
        added = additions(table, layout, [c for c in (*text, label) if c is not None])
        notes += [f"also read: {', '.join(added)}"] if added else []
        loss_on = loss_on or ("all" if layout == "text" else "completions")
        if layout == "text" and loss_on == "completions":
            raise ConfigError("task.loss_on", f"plain text in column '{text[0]}' has no completions",
                              fix="Remove it, or name the completion with --label-column")  # fmt: skip
        if answer is not None:
            answer_format(answer)
            if loss_on == "all":
                raise ConfigError("task.answer", "with task.loss_on=all, prompts and answers are not distinguished",
                                  fix="Name the answers with --label-column, and remove task.loss_on")  # fmt: skip
        own = ("perplexity", "token_accuracy")
        chosen = scores.fields(("exact_match", *own), "written") if answer else scores.fields(own, "token")
        task = cls(
            text_columns=text, label_column=label, layout=layout, loss_on=loss_on, format=format or "auto",
            packing=bool(packing), added_columns=added, answer=answer,
            max_new_tokens=max_new_tokens or _LONGEST_ANSWER,
            is_spaced=layout == "prompt" and label is not None and begins_with_space(table, label),
            system=system or "", **chosen,
        )  # fmt: skip
        what = {"completions": "the answers (task.loss_on=all to change)", "all": "every token"}[loss_on]
        return task, [*notes, f"the loss is on {what}"]

    @override
    def united(self, others: Sequence[base.Task]) -> base.Task:
        """Return a task that reads each source with its columns and format."""
        if all(other == self for other in others):
            return self
        return replace(self, formats=tuple({n: getattr(t, n) for n in _OF_FORMAT} for t in (self, *others)))

    def _readers(self) -> list[Task]:
        """Return a task for each format of rows."""
        known: Any = ({n: tuple(v) if isinstance(v, list) else v for n, v in own.items()} for own in self.formats)
        return [replace(self, formats=(), **own) for own in known] or [self]

    def _parts(self, split: Split) -> list[tuple[Task, Split, Rows]]:
        """Return, for each source of rows, the task that reads it, its rows, and their indices in the split."""
        numbers = source_numbers(split.table) if self.formats else None
        if numbers is None:
            reader = self.narrowed(split.table.column_names)
            assert isinstance(reader, Task)
            if self.formats:
                check_columns(split, reader)
            return [(reader, split, np.arange(split.table.num_rows))]
        found = [(reader, numbers == number) for number, reader in enumerate(self._readers())]
        return [(reader, split.take(own), np.flatnonzero(own)) for reader, own in found if own.any()]

    @override
    def narrowed(self, columns: Collection[str]) -> base.Task:
        """Return the task of the format that these columns have, if rows come in several; else, of the first one."""
        if not self.formats or SOURCE_COLUMN in columns:
            return self
        readers, known = self._readers(), set(columns)
        whole = [r for r in readers if {*r.text_columns, *r.target_columns()} <= known]
        return [*whole, *(r for r in readers if set(r.text_columns) <= known), *readers][0]

    @override
    def columns(self) -> list[tuple[str, str]]:
        if self.formats:  # another data set may have those of one format alone
            return [(OPTIONAL_ROLE, c) for c in dict.fromkeys(c for r in self._readers() for _, c in r.columns())]
        own = [("text", c) for c in (*self.text_columns, self.label_column) if c is not None]
        return [*own, *((OPTIONAL_ROLE, c) for c in self.added_columns)]

    def needs_template(self) -> bool:
        """Return whether the rows require a chat template."""
        return self.format == "chat" or self.layout in ("messages", "turns")

    def writes_chat(self, tokenizer: Any) -> bool:
        """Return whether the tokenizer's chat template formats the rows."""
        return self.needs_template() or (self.format == "auto" and self.layout == "alpaca" and has_template(tokenizer))

    @override
    def load_processor(self, source: ModelSource) -> TextReader:
        """Load the tokenizer; raise a ConfigError if rows require a chat template and it has none."""
        tokenizer = with_end_token(load_tokenizer(source), source)
        is_able, readers = has_template(tokenizer), self._readers()
        if any(r.needs_template() for r in readers) and (not is_able or self.format == "text"):
            raise ConfigError(
                f"model '{source.name}'" if not is_able else "task.format",
                "its tokenizer has no chat template, which these rows need"
                if not is_able else "conversations cannot be written as plain text",
                fix="Use a model tuned for chat, or columns of prompts and completions",
            )  # fmt: skip
        is_chat = any(r.writes_chat(tokenizer) for r in readers)
        if self.system and not (is_chat and writes_system(tokenizer, self.system)):
            problem = "the model's chat template writes no system turn" if is_chat else "no rows are conversations"
            raise ConfigError("data.system", problem, fix="Remove it, or use another model or task.format=chat")
        taken = forward_parameters(self.auto_class, source.config)
        return TextReader(
            tokenizer=tokenizer, is_chat=is_chat,
            # Training needs no cache, and with one, even empty, the masks of transformers ignore packed rows.
            switches={"use_cache": False} if "use_cache" in taken else {}, takes_positions="position_ids" in taken,
        )  # fmt: skip

    @override
    def resolve_length(self, asked: int | None, processor: TextReader, config: Any) -> int:
        return resolve_max_length(asked, processor.tokenizer, config, default=_LONGEST)

    @override
    def encode(self, split: Split, processor: TextReader, reading: Reading) -> Examples:
        if self.packing and not processor.takes_positions:
            raise ConfigError("data.packing", "this model takes no positions, so rows would see each other",
                              fix="Set data.packing=false")  # fmt: skip
        found, lost = [], None
        for part in self._parts(split):
            try:
                found.append((part, part[0].tokens_of(part[1], processor, reading)))
            except NoRowsError as error:
                lost = error  # of one source, perhaps of all
        if lost is not None and not found:
            raise lost
        arrays, counts = joined_tokens([made for _, made in found])
        if len(arrays["offsets"]) < 2:
            problem = f"no answer begins within {reading.num_tokens} tokens"
            raise DataError(split.source, problem, fix="Raise --max-length")
        weights = arrays.pop("weights")
        rows = np.concatenate([own[made[0]["numbers"]] for (_, _, own), made in found]).astype(np.int64)
        del arrays["numbers"]
        kept = None if len(rows) == split.table.num_rows else rows
        trained = found if reading.for_training else []
        notes = [n for part, made in trained for n in part[0].template_notes(part[1], made[0]["numbers"], processor)]
        examples = self._examples(arrays, counts, processor, reading.num_tokens, kept, notes)
        if reading.for_training and (weights != WEIGHT_UNIT).any():
            examples.features["weights"] = np.repeat(weights, examples.lengths)
        if self.answer is not None and not reading.for_training:
            return self._answered(examples, found, processor)
        if not (self.packing and reading.for_training):
            return examples
        groups = source_numbers(split.table)
        return PackedExamples.of(examples, None if groups is None else groups[examples.split_rows])

    def tokens_of(self, split: Split, processor: TextReader, reading: Reading) -> Tokens:
        """Tokenise rows of one format; see :meth:`_tokenise`."""
        if self.label_column is not None and not reading.allow_missing:
            refuse_missing(nulls(split.table, self.label_column), split.places, self.label_column, "answer")
        tokenizer, places = processor.tokenizer, split.places
        own = replace(processor, is_chat=self.writes_chat(tokenizer))

        def make(columns: Columns, numbers: Rows) -> Tokens:
            return self._tokenise(columns, numbers, own, reading, places)

        facts: dict[str, object] = {
            "chat_template": tokenizer.chat_template if own.is_chat else None, "end_token": tokenizer.eos_token_id,
            "length": reading.num_tokens, "layout": self.layout, "loss_on": self.loss_on,
            "missing": reading.allow_missing, **({"system": self.system} if self.system else {}),
        }  # fmt: skip
        split = split.with_columns(self.added_columns)
        made = tokenise_rows(
            split, [c for _, c in self.columns()], tokenizer, reading, self.code, make,
            is_blank=lambda row: is_blank_text(row[: len(self.text_columns) + (self.label_column is not None)]),
            facts=facts,
        )  # fmt: skip
        faults = np.zeros(len(made.keep), dtype=np.int32)
        faults[made.keep] = made.arrays.pop("faults")
        refuse_faults(faults, places, self.label_column or self.text_columns[0])
        # Not cached: the same rows may be at other positions, between other blank ones.
        return made.arrays | {"numbers": np.flatnonzero(made.keep)[made.arrays.pop("used") > 0]}, made.counts

    def _answered(
        self, examples: TokenExamples, found: Sequence[tuple[tuple[Task, Split, Rows], Tokens]], processor: TextReader
    ) -> AnsweredExamples:
        """Return examples that are scored by generated answers; raise a DataError if an expected answer is missing."""
        assert self.answer is not None
        expected: list[str] = []
        for (reader, split, _), (arrays, _) in found:
            column, numbers = reader.label_column or reader.text_columns[0], arrays["numbers"].astype(np.int64)
            texts = [reader.answer_text(cell, learned=True) for cell in cells(split.table.take(numbers), column)]
            expected += expected_answers(texts, self.answer, split, numbers, column)
        shared = {f.name: getattr(examples, f.name) for f in fields(examples)}
        return AnsweredExamples(
            **shared, expected=tuple(expected), format=answer_format(self.answer), tokenizer=processor.tokenizer,
            stops=self._stops(processor), max_new_tokens=self.max_new_tokens,
        )  # fmt: skip

    def _stops(self, processor: TextReader) -> tuple[int, ...]:
        """Return the tokens that end an answer."""
        tokenizer = processor.tokenizer
        stops = turn_end_ids(tokenizer) if processor.is_chat else []
        if not all(r.writes_chat(tokenizer) for r in self._readers()):
            stops = [*dict.fromkeys([*stops, tokenizer.eos_token_id])]
        return tuple(stop for stop in stops if stop is not None)

    def template_notes(self, split: Split, numbers: npt.NDArray[Any], processor: TextReader) -> tuple[str, ...]:
        """Return the notes of :func:`mirrortune.tasks.chat.template_notes` on the first of the rows ``numbers``."""
        table = split.with_columns(self.added_columns).table.slice(0, int(numbers[:8].max(initial=-1)) + 1)
        own = replace(processor, is_chat=self.writes_chat(processor.tokenizer))
        rows = rows_of(table.take(numbers[:8]), [c for _, c in self.columns()])
        return template_notes(rows, self.added_columns, own, self.layout, self.system, split.source)

    def answer_text(self, cell: Any, *, learned: bool = False) -> str:
        """Return the text of an answer: the cell itself, or the last (learned) message of the assistant in it."""
        is_chat = self.layout in ("messages", "turns")
        return last_answer(cell, learned=learned) if is_chat else "" if cell is None else str(cell)

    @override
    def loss(self, inputs: Batch, outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of logits (B, L, V) against the next tokens in ``targets`` (B, L), summed over
        learned tokens; with a weight for every token, ``targets`` is (B, 2, L).
        """
        if targets.ndim == 3:
            return weighted_loss(outputs.logits, targets)
        return summed_loss(outputs.logits[:, :-1], targets[:, 1:])

    @override
    def judge(self, model: Any, inputs: Batch, outputs: Any, targets: Tensor) -> npt.NDArray[np.float64]:
        """Return the loss, the number of correct tokens and the number of tokens of each row; (B, 3) float64."""
        found: npt.NDArray[np.float64] = score_tokens(outputs.logits[:, :-1], targets[:, 1:]).numpy()
        return found

    @override
    def answers(self, judged: Sequence[Any], examples: Any) -> tuple[Targets, Targets]:
        """Return the loss and the number of correct tokens of each row (N, 2), and its number of tokens (N,); with
        generated answers, a third column that is 1 where the answer is correct.
        """
        if isinstance(examples, AnsweredExamples):
            found = np.stack([kept for kept, _ in judged])
            correct = [examples.num_correct(row, text) for row, (_, text) in enumerate(judged)]
            return np.column_stack([found[:, :2], correct]), found[:, 2]
        found = np.stack(judged)
        return found[:, :2], found[:, 2]

    @override
    def target_columns(self) -> list[str]:
        columns = (reader.label_column for reader in self._readers())
        return list(dict.fromkeys(column for column in columns if column is not None))

    @override
    def prediction_options(self) -> tuple[str, ...]:
        return GENERATION

    @override
    def encode_to_predict(
        self, split: Split, processor: TextReader, reading: Reading, options: PredictOptions
    ) -> PromptExamples:
        """Create prompts as in training: the text of a row before its last answer, or a complete plain text."""
        options.check(self.kind, self.prediction_options())
        tokenizer, places = processor.tokenizer, split.places
        split = without_targets(split, self)
        check_columns(split, self)
        prompts: dict[int, list[int]] = {}
        for reader, own, numbers in self._parts(split):
            columns = [*reader.text_columns, *reader.added_columns]
            rows = rows_of(own.with_columns(reader.added_columns).table, columns)
            speaker = replace(processor, is_chat=reader.writes_chat(tokenizer))
            for number, row in zip(numbers.tolist(), rows, strict=True):
                prompts[number] = reader.prompt_of(row, speaker, places.where(number))
        found = [prompts[number] for number in range(split.table.num_rows)]
        refuse_no_tokens(np.array([*map(len, found)]), places)
        return prompt_examples(
            found, places, tokenizer, options, max_length=reading.num_tokens, max_new_tokens=self.max_new_tokens,
            stops=self._stops(processor), cut=any(reader.layout == "text" for reader in self._readers()),
        )  # fmt: skip

    @override
    def prediction_columns(
        self, judged: Sequence[Any], examples: PromptExamples, split: Split, options: PredictOptions
    ) -> Predictions:
        """Return the generated answers, and whether each ended before the maximum length."""
        return examples.columns(judged, strip=any(reader.layout != "text" for reader in self._readers()))

    @override
    def asked(self, split: Split) -> tuple[Split, list[str]]:
        """Return the rows and their answers; plain texts are split in half."""
        found = [reader.asked_of(own) for reader, own, _ in self._parts(split)]
        if len(found) == 1:
            return found[0]
        table = pa.concat_tables([own.table for own, _ in found], promote_options="permissive")
        return replace(split, table=table), [text for _, texts in found for text in texts]

    def asked_of(self, split: Split) -> tuple[Split, list[str]]:
        """Return the same as :meth:`asked`, for rows of one format."""
        if self.layout != "text":
            column = self.label_column or self.text_columns[0]
            return split, [self.answer_text(cell) for cell in cells(split.table, column)]
        return halved_texts(split, self.text_columns[0])

    @override
    def probe(self, processor: TextReader, config: Any) -> Batch:
        return {**text_probe(processor.tokenizer, config), **processor.switches}

    def _tokenise(
        self, columns: Columns, numbers: Rows, processor: TextReader, reading: Reading, places: RowPlaces
    ) -> Tokens:
        """Tokenise rows; return tokens, targets and weights of those ``used`` (N,), and ``faults`` (N,): codes or 0."""
        ids, targets, weights, counts, max_length = [], [], [], Counter[str](), reading.max_length
        faults, used = (np.zeros(len(numbers), dtype=np.int32) for _ in range(2))
        for place, (number, *row) in enumerate(zip(numbers, *columns, strict=True)):
            where = places.where(number)
            own = row[: len(row) - len(self.added_columns)]
            added = dict(zip(self.added_columns, row[len(own) :], strict=True))
            try:
                row_ids, learned = self._encode_row(own, added, processor, reading, where, counts)
            except LostAnswerError as lost:
                faults[place] = CALLS if lost.kind == "calls" else EMPTY
                continue
            faults[place] = 0 if any(learned[1:]) else SILENT  # the first token is not predicted
            wanted = [token if use else IGNORE_INDEX for token, use in zip(row_ids, learned, strict=True)]
            wanted[:1] = [IGNORE_INDEX]
            counts["num_truncated"] += len(row_ids) > (max_length or 0)
            weight = round(row_weight(added, where) * WEIGHT_UNIT)
            is_seen = any(t != IGNORE_INDEX for t in wanted[:max_length])
            counts["num_answers_cut"] += not is_seen
            counts["num_weightless"] += is_seen and not weight
            if is_seen and weight:
                ids.append(row_ids[:max_length])
                targets.append(wanted[:max_length])
                weights.append(weight)
                used[place] = 1
        (flat, offsets), (answers, _) = ragged(ids), ragged(targets)
        counts["num_learned"] = int((answers != IGNORE_INDEX).sum())
        counts["num_tools_lost"] = num_tools_lost(
            columns, self.added_columns, processor, self.layout, self.system, places.source
        )
        arrays = {"input_ids": flat, "targets": answers, "offsets": offsets, "faults": faults, "used": used}
        return {**arrays, "weights": np.array(weights, dtype=np.int32)}, dict(counts)

    def prompt_of(self, row: Sequence[Any], processor: TextReader, where: str) -> list[int]:
        """Return the tokens of a row's prompt, from the cells of its text columns and of the added ones."""
        own = row[: len(self.text_columns)]
        added = dict(zip(self.added_columns, row[len(own) :], strict=True))
        if processor.is_chat:
            talk = asked_conversation(self.layout, own, added, where, self.system)
            return encode_prompt(processor.tokenizer, talk, where)
        prompt, before = asked_text(self.layout, [as_text(value, where) for value in own], added, where)
        if self.layout == "text":
            return encode_continuation(processor.tokenizer, "", prompt)[0][:-1]
        if prompt and not (prompt[-1].isspace() or self.is_spaced):
            prompt += "\n"  # as in training
        return encode_continuation(processor.tokenizer, prompt, "", before)[0][:-1]

    def _encode_row(
        self, row: Sequence[Any], added: dict[str, Any], processor: TextReader, reading: Reading, where: str,
        counts: Counter[str],
    ) -> Encoding:  # fmt: skip
        tokenizer, learn_all = processor.tokenizer, self.loss_on == "all"
        if processor.is_chat:
            return encode_conversation(
                tokenizer, row_conversation(self.layout, row, added, where, self.system), where, learn_all=learn_all,
                may_be_empty=reading.allow_missing, counts=counts,
            )  # fmt: skip
        texts = [as_text(value, where) for value in row]
        if self.layout == "text":
            return encode_continuation(tokenizer, "", texts[0])
        completion = texts.pop()
        if not (completion.strip() or learn_all or reading.allow_missing):
            raise LostAnswerError(where, "empty")
        prompt, before = asked_text(self.layout, texts, added, where)
        ids, learned = encode_continuation(tokenizer, prompt, completion, before)
        return ids, [True] * len(ids) if learn_all else learned

    def _examples(
        self, arrays: dict[str, Any], counts: dict[str, int], processor: TextReader, max_length: int,
        kept: Rows | None, notes: Sequence[str],
    ) -> TokenExamples:  # fmt: skip
        fill = Padding.of(processor.tokenizer).fill
        return TokenExamples(
            features=arrays, offsets=arrays.pop("offsets"), targets=None, max_length=max_length, kept=kept,
            padding=Padding(side="right", fill=fill),  # left padding is needed for generation only
            num_truncated=counts["num_truncated"],
            num_dropped=counts["num_answers_cut"] + counts["num_weightless"],
            switches=processor.switches,
            notes=(*encoding_notes(counts, len(arrays["targets"]), max_length), *dict.fromkeys(notes)),
        )  # fmt: skip
