# SPDX-License-Identifier: Apache-2.0
"""causal-lm: next-token prediction on conversations, prompts with completions, instructions (Alpaca columns) or text.

Cross-entropy of every learned token; perplexity and token accuracy. The end token of an answer is learned with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from torch import Tensor
from typing_extensions import override

from mirrortune.data.dataset import Split
from mirrortune.data.examples import IGNORE_INDEX, OPTIONAL_ROLE, Batch, Examples, Padding, Rows, Targets, TokenExamples
from mirrortune.data.files.arrow import Columns, cells, nulls, refuse_unreadable, rows_of
from mirrortune.data.files.row_places import RowPlaces
from mirrortune.data.labels import refuse_missing
from mirrortune.data.token_cache import Tokens, ragged
from mirrortune.data.tokenize import Reading, is_blank_text, resolve_max_length, tokenise_rows
from mirrortune.errors import ConfigError, DataError, unknown_name
from mirrortune.models.load import ModelSource, forward_parameters, load_tokenizer, with_end_token
from mirrortune.tasks.answer_formats import answer_format
from mirrortune.tasks.answered_rows import AnsweredExamples, expected_answers
from mirrortune.tasks.base import Answers, TextTask, WritesText, check_columns, without_targets
from mirrortune.tasks.chat import (
    Encoding,
    LostAnswerError,
    alpaca_prompt,
    encode_continuation,
    encode_conversation,
    encode_prompt,
    save_turn_ends,
    turn_end_ids,
    writes_tools,
)
from mirrortune.tasks.conversations import (
    Conversation,
    Message,
    additions,
    as_messages,
    begins_with_space,
    choose_layout,
    conversation,
    meaning_of,
    row_weight,
)
from mirrortune.tasks.metrics import KINDS_OWN, Scores
from mirrortune.tasks.packing import PackedExamples
from mirrortune.tasks.predicting import GENERATION, Predictions, PredictOptions, refuse_no_tokens
from mirrortune.tasks.probes import text_probe
from mirrortune.tasks.prompts import PromptExamples, prompt_examples
from mirrortune.tasks.token_scores import WEIGHT_UNIT, score_tokens, summed_loss, weighted_loss

_LONGEST = 1024  # the default, where the model takes more
_LONGEST_ANSWER = 256  # tokens
_SILENT, _CALLS, _EMPTY = 1, 2, 3  # what is wrong with a row
_FORMATS, _LOSSES = ("auto", "chat", "text"), ("completions", "all")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextReader:
    """A tokenizer, and what the model's forward takes besides tokens.

    Attributes:
        tokenizer: of transformers.
        is_chat: whether rows are formatted by the tokenizer's chat template.
        switches: additional arguments of the model's forward.
        takes_positions: whether the forward takes ``position_ids``, so that rows can be packed.
    """

    tokenizer: Any
    is_chat: bool
    switches: dict[str, bool] = field(default_factory=dict)
    takes_positions: bool

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer's files, and the tokens that end generation: the end of a turn was learned as one."""
        self.tokenizer.save_pretrained(folder)
        if self.is_chat:
            save_turn_ends(self.tokenizer, Path(folder))


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
        answer: how answers are written (:mod:`mirrortune.tasks.answer_formats`) that the model generates when it is
            scored; None to score tokens alone.
        max_new_tokens: longest answer that is generated, in tokens.
        is_spaced: whether answers begin with white space of their own, so that no line break is put before them.
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
    kind: str = "causal-lm"
    auto_class: str = "AutoModelForCausalLM"
    version: int = 2

    @classmethod
    @override
    def from_rows(
        cls, table: pa.Table, source: str, scores: Scores = KINDS_OWN, *,
        text_columns: tuple[str, ...] | None = None, label_column: str | None = None,
        loss_on: str | None = None, format: str | None = None, packing: bool | None = None,
        answer: str | None = None, max_new_tokens: int | None = None,
    ) -> tuple[Task, list[str]]:  # fmt: skip
        """Create the task; DataError if no column holds text."""
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
                raise ConfigError("task.answer", "with task.loss_on=all, prompts and answers are not told apart",
                                  fix="Name the answers with --label-column, and remove task.loss_on")  # fmt: skip
        own = ("perplexity", "token_accuracy")
        chosen = scores.fields(("exact_match", *own), "written") if answer else scores.fields(own, "token")
        task = cls(
            text_columns=text, label_column=label, layout=layout, loss_on=loss_on, format=format or "auto",
            packing=bool(packing), added_columns=added, answer=answer,
            max_new_tokens=max_new_tokens or _LONGEST_ANSWER,
            is_spaced=layout == "prompt" and label is not None and begins_with_space(table, label), **chosen,
        )  # fmt: skip
        what = {"completions": "the answers (task.loss_on=all to change)", "all": "every token"}[loss_on]
        return task, [*notes, f"the loss is on {what}"]

    @override
    def columns(self) -> list[tuple[str, str]]:
        own = [("text", c) for c in (*self.text_columns, self.label_column) if c is not None]
        return [*own, *((OPTIONAL_ROLE, c) for c in self.added_columns)]

    @override
    def load_processor(self, source: ModelSource) -> TextReader:
        """Load the tokenizer; ConfigError if rows need a chat template and it has none."""
        tokenizer = with_end_token(load_tokenizer(source), source)
        has_template = tokenizer.chat_template is not None
        wants_chat = self.format == "chat" or self.layout in ("messages", "turns")
        if wants_chat and (not has_template or self.format == "text"):
            raise ConfigError(
                f"model '{source.name}'" if not has_template else "task.format",
                "its tokenizer has no chat template, which these rows need"
                if not has_template else "conversations cannot be written as plain text",
                fix="Use a model tuned for chat, or columns of prompts and completions",
            )  # fmt: skip
        taken = forward_parameters(self.auto_class, source.config)
        return TextReader(
            tokenizer=tokenizer,
            is_chat=wants_chat or (self.format == "auto" and self.layout == "alpaca" and has_template),
            # Training needs no cache, and even an empty one makes transformers' masks ignore packed rows.
            switches={"use_cache": False} if "use_cache" in taken else {},
            takes_positions="position_ids" in taken,
        )

    @override
    def resolve_length(self, asked: int | None, processor: TextReader, config: Any) -> int:
        return resolve_max_length(asked, processor.tokenizer, config, default=_LONGEST)

    @override
    def encode(self, split: Split, processor: TextReader, reading: Reading) -> Examples:
        if self.packing and not processor.takes_positions:
            raise ConfigError("data.packing", "this model takes no positions, so rows would see each other",
                              fix="Set data.packing=false")  # fmt: skip
        if self.label_column is not None and not reading.allow_missing:
            refuse_missing(nulls(split.table, self.label_column), split.places, self.label_column, "answer")
        max_length, tokenizer, places = reading.num_tokens, processor.tokenizer, split.places

        def make(columns: Columns, numbers: Rows) -> Tokens:
            return self._tokenise(columns, numbers, processor, reading, places)

        facts = {
            "chat_template": tokenizer.chat_template if processor.is_chat else None,
            "end_token": tokenizer.eos_token_id, "length": max_length, "layout": self.layout, "loss_on": self.loss_on,
            "missing": reading.allow_missing,
        }  # fmt: skip
        split = split.with_columns(self.added_columns)
        made = tokenise_rows(
            split, [c for _, c in self.columns()], tokenizer, reading, self.code, make,
            is_blank=lambda row: is_blank_text(row[: len(self.text_columns) + (self.label_column is not None)]),
            facts=facts,
        )  # fmt: skip
        faults = np.zeros(len(made.keep), dtype=np.int32)
        faults[made.keep] = made.arrays.pop("faults")
        self._refuse_faults(faults, places)
        if len(made.arrays["offsets"]) < 2:
            raise DataError(split.source, f"no answer begins within {max_length} tokens", fix="Raise --max-length")
        weights, numbers = made.arrays.pop("weights"), made.arrays.pop("numbers")
        examples = self._examples(made.arrays, made.counts, processor, max_length)
        if reading.for_training and (weights != WEIGHT_UNIT).any():
            examples.features["weights"] = np.repeat(weights, examples.lengths)
        if self.answer is not None and not reading.for_training:
            return self._answered(examples, split, numbers.astype(np.int64), processor)
        return PackedExamples.of(examples) if self.packing and reading.for_training else examples

    def _answered(
        self, examples: TokenExamples, split: Split, numbers: Rows, processor: TextReader
    ) -> AnsweredExamples:
        """Return rows that are scored by generated answers; DataError for rows without a readable expected answer."""
        assert self.answer is not None
        column, tokenizer = self.label_column or self.text_columns[0], processor.tokenizer
        texts = [self._answer_text(cell) for cell in cells(split.table.take(numbers), column)]
        expected = expected_answers(texts, self.answer, split, numbers, column)
        shared = {f.name: getattr(examples, f.name) for f in fields(examples)}
        return AnsweredExamples(
            **shared, expected=expected, format=answer_format(self.answer), tokenizer=tokenizer,
            stops=self._stops(processor), max_new_tokens=self.max_new_tokens,
        )  # fmt: skip

    def _stops(self, processor: TextReader) -> tuple[int, ...]:
        """Return the tokens that end an answer."""
        tokenizer = processor.tokenizer
        stops = turn_end_ids(tokenizer) if processor.is_chat else [tokenizer.eos_token_id]
        return tuple(stop for stop in stops if stop is not None)

    def _answer_text(self, cell: Any) -> str:
        """Return the text of a row's answer: the cell itself, or the last message of the assistant in it."""
        if self.layout not in ("messages", "turns"):
            return str(cell or "")
        said = [m for m in as_messages(cell, "task.answer") if m.get("role") == "assistant"]
        return str(said[-1].get("content") or "") if said else ""

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
        return [] if self.label_column is None else [self.label_column]

    @override
    def prediction_options(self) -> tuple[str, ...]:
        return GENERATION

    @override
    def encode_to_predict(
        self, split: Split, processor: TextReader, reading: Reading, options: PredictOptions
    ) -> PromptExamples:
        """Return what training read before a row's last answer as a prompt; of a plain text, all of it."""
        options.check(self.kind, self.prediction_options())
        tokenizer, places = processor.tokenizer, split.places
        split = without_targets(split, self)
        check_columns(split, self)
        columns = [*self.text_columns, *self.added_columns]
        rows = rows_of(split.with_columns(self.added_columns).table, columns)
        prompts = [self._prompt(row, processor, places.where(number)) for number, row in enumerate(rows)]
        refuse_no_tokens(np.array([*map(len, prompts)]), places)
        return prompt_examples(
            prompts, places, tokenizer, options, max_length=reading.num_tokens, max_new_tokens=self.max_new_tokens,
            stops=self._stops(processor), cut=self.layout == "text",
        )  # fmt: skip

    @override
    def prediction_columns(
        self, judged: Sequence[Any], examples: PromptExamples, split: Split, options: PredictOptions
    ) -> Predictions:
        """Return the generated answers, and whether each was finished rather than cut at its longest."""
        return examples.columns(judged, strip=self.layout != "text")

    @override
    def asked(self, split: Split) -> tuple[Split, list[str]]:
        """Return the rows and their answers; plain texts are cut in half."""
        if self.layout != "text":
            column = self.label_column or self.text_columns[0]
            return split, [self._answer_text(cell) for cell in cells(split.table, column)]
        texts = [str(cell or "") for cell in cells(split.table, self.text_columns[0])]
        places = [text.rfind(" ", 1, len(text) // 2 + 1) for text in texts]
        places = [len(text) // 2 if place < 0 else place for text, place in zip(texts, places, strict=True)]
        begun = pa.array([text[:place] for text, place in zip(texts, places, strict=True)], pa.string())
        table = split.table.set_column(
            split.table.column_names.index(self.text_columns[0]), self.text_columns[0], begun
        )
        return replace(split, table=table), [text[place:] for text, place in zip(texts, places, strict=True)]

    @override
    def probe(self, processor: TextReader, config: Any) -> Batch:
        return {**text_probe(processor.tokenizer, config), **processor.switches}

    def _tokenise(
        self, columns: Columns, numbers: Rows, processor: TextReader, reading: Reading, places: RowPlaces
    ) -> Tokens:
        """Tokenise some rows: tokens, targets, a weight per row, and in ``faults`` (N,) a code for what is wrong."""
        ids, targets, weights, kept, counts = [], [], [], [], Counter[str]()
        faults, max_length = np.zeros(len(numbers), dtype=np.int32), reading.max_length
        for place, (number, *row) in enumerate(zip(numbers, *columns, strict=True)):
            where = places.where(number)
            own = row[: len(row) - len(self.added_columns)]
            added = dict(zip(self.added_columns, row[len(own) :], strict=True))
            try:
                row_ids, learned = self._encode_row(own, added, processor, reading, where)
            except LostAnswerError as lost:
                faults[place] = _CALLS if lost.kind == "calls" else _EMPTY
                continue
            faults[place] = 0 if any(learned[1:]) else _SILENT  # the first token is not predicted
            wanted = [token if use else IGNORE_INDEX for token, use in zip(row_ids, learned, strict=True)]
            wanted[:1] = [IGNORE_INDEX]
            counts["num_truncated"] += len(row_ids) > (max_length or 0)
            weight = row_weight(added, where)
            is_seen = any(t != IGNORE_INDEX for t in wanted[:max_length])
            counts["num_answers_cut"] += not is_seen
            counts["num_weightless"] += is_seen and not weight
            if is_seen and weight:
                ids.append(row_ids[:max_length])
                targets.append(wanted[:max_length])
                weights.append(round(weight * WEIGHT_UNIT))
                kept.append(number)
        (flat, offsets), (answers, _) = ragged(ids), ragged(targets)
        counts["num_learned"] = int((answers != IGNORE_INDEX).sum())
        counts["num_tools_lost"] = self._tools_lost(columns, processor, places.source)
        arrays = {"input_ids": flat, "targets": answers, "offsets": offsets, "faults": faults}
        arrays |= {"weights": np.array(weights, dtype=np.int32), "numbers": np.array(kept, dtype=np.int64)}
        return arrays, dict(counts)

    def _prompt(self, row: Sequence[Any], processor: TextReader, where: str) -> list[int]:
        """Return the tokens of a row's prompt, from the cells of its text columns and of the added ones."""
        own = row[: len(self.text_columns)]
        added = dict(zip(self.added_columns, row[len(own) :], strict=True))
        if processor.is_chat:
            return encode_prompt(processor.tokenizer, self._asked(own, added, where), where)
        prompt, before = self._asked_text(["" if value is None else str(value) for value in own], added, where)
        if self.layout == "text":
            return encode_continuation(processor.tokenizer, "", prompt)[0][:-1]
        if prompt and not (prompt[-1].isspace() or self.is_spaced):
            prompt += "\n"  # as training does
        return encode_continuation(processor.tokenizer, prompt, "", before)[0][:-1]

    def _encode_row(
        self, row: Sequence[Any], added: dict[str, Any], processor: TextReader, reading: Reading, where: str
    ) -> Encoding:
        tokenizer, learn_all = processor.tokenizer, self.loss_on == "all"
        if processor.is_chat:
            return encode_conversation(
                tokenizer, self._conversation(row, added, where), where, learn_all=learn_all,
                may_be_empty=reading.allow_missing,
            )  # fmt: skip
        texts = ["" if value is None else str(value) for value in row]
        if self.layout == "text":
            return encode_continuation(tokenizer, "", texts[0])
        completion = texts.pop()
        if not (completion.strip() or learn_all or reading.allow_missing):
            raise LostAnswerError(where, "empty")
        prompt, before = self._asked_text(texts, added, where)
        ids, learned = encode_continuation(tokenizer, prompt, completion, before)
        return ids, [True] * len(ids) if learn_all else learned

    def _asked_text(self, texts: Sequence[str], added: dict[str, Any], where: str) -> tuple[str, list[Message]]:
        """Return the prompt in a row that is not formatted by a chat template, and the turns before it."""
        if self.layout == "text":
            return texts[0], []
        prompt = alpaca_prompt(texts[0], "".join(texts[1:])) if self.layout == "alpaca" else texts[0]
        before: list[Message] = []
        if any(added.values()):
            turns: list[Message] = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
            before = conversation(turns, added, where).messages[:-2]
        if self.layout == "alpaca":
            before = [{**m, "content": alpaca_prompt(m["content"], "")} if m["role"] == "user" else m for m in before]
        return prompt, before

    def _asked(self, row: Sequence[Any], added: dict[str, Any], where: str) -> Conversation:
        """Return the conversation in a row without its last answer; a text is what the user says."""
        if self.layout not in ("messages", "turns"):
            talk = self._conversation([*row, None], added, where)
            return replace(talk, messages=talk.messages[:-1])
        is_text = isinstance(row[0], str) and not row[0].lstrip().startswith("[")
        messages = [{"role": "user", "content": row[0]}] if is_text else as_messages(row[0], where)
        while self.layout == "messages" and messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise DataError(where, "the conversation has no turn to answer", fix="Add what the user says")
        return conversation(messages, added, where)

    def _conversation(self, row: Sequence[Any], added: dict[str, Any], where: str) -> Conversation:
        """Return the conversation in a row that is formatted by a chat template."""
        if self.layout == "messages":
            return conversation(as_messages(row[0], where), added, where)
        if self.layout == "turns":
            asked = [{**message, "weight": 0.0} for message in as_messages(row[0], where)]
            return conversation([*asked, *as_messages(row[1], where)], added, where)
        *texts, completion = ["" if value is None else str(value) for value in row]
        prompt = "\n\n".join(text for text in texts if text.strip())
        turns: list[Message] = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return conversation(turns, added, where)

    def _tools_lost(self, columns: Columns, processor: TextReader, source: str) -> int:
        """Return 1 if the chat template leaves out the tools of the first row that has any, else 0."""
        names = [n for n in self.added_columns if meaning_of(n) == "tools"]
        count = len(columns) - len(self.added_columns)
        for row in zip(*columns, strict=True) if names else ():
            added = dict(zip(self.added_columns, row[count:], strict=True))
            if any(added[name] for name in names):
                if not processor.is_chat:
                    return 1
                talk = self._conversation(row[:count], added, source)
                if talk.options.get("tools"):
                    return int(not writes_tools(processor.tokenizer, talk))
        return 0

    def _refuse_faults(self, faults: npt.NDArray[np.integer[Any]], places: RowPlaces) -> None:
        """Raise a DataError for rows from which nothing, or only the wrong thing, would be learned."""
        refuse_missing(faults == _SILENT, places, self.label_column or self.text_columns[0], "answer to learn")
        reasons = {
            _CALLS: ("tool calls, which the model's chat template does not write",
                     "Use a model whose chat template writes tool calls, or write the calls into the content"),
            _EMPTY: ("an empty answer, of which only its end would be learned", "Fill or remove these answers"),
        }  # fmt: skip
        for code, (what, fix) in reasons.items():
            if count := int((faults == code).sum()):
                rows = places.listed(np.flatnonzero(faults == code))
                raise DataError(places.source, f"{count} of {len(faults)} rows have {what} ({rows})", fix=fix)

    def _examples(
        self, arrays: dict[str, Any], counts: dict[str, int], processor: TextReader, max_length: int
    ) -> TokenExamples:
        notes = [f"{counts['num_learned']:,} of {len(arrays['targets']):,} tokens learned"]
        if counts["num_weightless"]:
            notes.append(f"{counts['num_weightless']} left out: their weight is 0")
        if counts["num_tools_lost"]:
            notes.append("the tools are not shown to the model: its chat template does not write them")
        if counts["num_answers_cut"]:
            notes.append(f"{counts['num_answers_cut']} left out: their answers begin after {max_length} tokens")
        padding = Padding.of(processor.tokenizer)
        return TokenExamples(
            features=arrays,
            offsets=arrays.pop("offsets"),
            targets=None,
            padding=Padding(side="right", fill=padding.fill),  # left padding is for generation
            max_length=max_length,
            num_truncated=counts["num_truncated"],
            num_dropped=counts["num_answers_cut"] + counts["num_weightless"],
            switches=processor.switches,
            notes=tuple(notes),
        )
