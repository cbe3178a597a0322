# SPDX-License-Identifier: Apache-2.0
"""seq2seq: text -> text (summaries, translations) by an encoder and a decoder. The loss is the cross-entropy of the
target tokens; the default metric is ROUGE of greedily generated text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from typing_extensions import override

from mirrortune.data.columns import check_named, detected, refuse_preferences
from mirrortune.data.dataset import Split
from mirrortune.data.examples import IGNORE_INDEX, Batch, Examples, IntArray, Padding, Rows, TokenExamples, pad_rows
from mirrortune.data.files.arrow import Columns, cells, is_string, nulls, refuse_unreadable
from mirrortune.data.labels import refuse_missing
from mirrortune.data.token_cache import Tokens, ragged
from mirrortune.data.tokenize import Reading, encode_texts, resolve_max_length, tokenise_rows
from mirrortune.errors import ConfigError, DataError, first_of
from mirrortune.models.load import ModelSource, forward_parameters, load_tokenizer, with_end_token
from mirrortune.tasks.base import Generates, TextTask, TokenizerReader, WritesText
from mirrortune.tasks.metrics import KINDS_OWN, Scores
from mirrortune.tasks.predicting import GENERATION, Predictions, PredictOptions, refuse_no_tokens
from mirrortune.tasks.probes import text_probe
from mirrortune.tasks.prompts import PromptExamples
from mirrortune.tasks.token_scores import summed_loss

_PAIRS = (
    ("document", "summary"), ("article", "highlights"), ("article", "summary"), ("dialogue", "summary"),
    ("text", "summary"), ("source", "target"), ("input", "target"), ("input", "output"), ("text", "target"),
)  # fmt: skip
_LONGEST_TARGET = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class PairReader(TokenizerReader):
    """A tokenizer, and the start token of the decoder.

    Attributes:
        start_id: id of the start token.
    """

    start_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PairExamples(Examples):
    """Rows of a source text and a target text.

    Attributes:
        sources: tokens of the source texts.
        targets: concatenated tokens of the target texts.
        target_offsets: shape (N + 1,); row i has the targets [target_offsets[i], target_offsets[i + 1]).
        references: returns the target texts.
        reader: has the start token of the decoder.
        num_truncated: number of truncated source texts.
        num_unlabelled: number of rows without a target text.
        num_cut: number of truncated target texts.
    """

    sources: TokenExamples
    targets: IntArray
    target_offsets: IntArray
    references: Callable[[], list[str]]
    reader: PairReader
    num_truncated: int
    num_unlabelled: int
    num_cut: int

    @property
    @override
    def lengths(self) -> IntArray:
        return self.sources.lengths + np.diff(self.target_offsets)

    @override
    def __len__(self) -> int:
        return len(self.sources)

    @property
    def kept(self) -> Rows | None:
        """Indices of the rows in the split, shape (N,); None for all rows."""
        return self.sources.kept

    @override
    def extremes(self) -> Rows:
        lengths = np.diff(self.target_offsets)
        largest = np.searchsorted(self.target_offsets, int(self.targets.argmax()), side="right") - 1
        return np.unique([*self.sources.extremes(), int(largest), int(lengths.argmax())])

    @override
    def token_ids(self) -> list[IntArray]:
        return [*self.sources.token_ids(), self.targets]

    @override
    def input_ids(self, row: int) -> IntArray:
        return self.sources.input_ids(row)

    @override
    def batch(self, rows: Rows, epoch: int | None = None) -> Batch:
        """Return source tokens, decoder inputs and targets of the given rows, each padded separately."""
        batch = self.sources.batch(rows)
        right = Padding(side="right", fill={"targets": IGNORE_INDEX})
        made, _ = pad_rows({"targets": self.targets}, self.target_offsets, rows, right)
        shifted = made["targets"].roll(1, dims=1)
        shifted[:, 0] = self.reader.start_id
        batch["decoder_input_ids"] = shifted.masked_fill(
            shifted == IGNORE_INDEX, self.sources.padding.fill["input_ids"]
        )
        return {**batch, **made, **self.reader.switches}

    @override
    def describe(self) -> str:
        lengths = np.diff(self.target_offsets)
        cut = f", {self.num_cut} cut" if self.num_cut else ""
        return f"{self.sources.describe()}; targets of {int(np.median(lengths))} tokens, {lengths.max()} at most{cut}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task(TextTask, WritesText, Generates):
    """Generation of a target text from a source text.

    Attributes:
        text_columns: the source text.
        label_column: the target text.
        prefix: text prepended to each source text, such as ``summarize:``, with which T5 was trained.
        max_target_length: maximum length of targets and of generated texts, in tokens.
    """

    text_columns: tuple[str, ...]
    label_column: str
    prefix: str
    max_target_length: int
    metric_names: tuple[str, ...]
    selection_metric: str
    kind: str = "seq2seq"
    auto_class: str = "AutoModelForSeq2SeqLM"
    version: int = 1

    @classmethod
    @override
    def from_rows(
        cls, table: pa.Table, source: str, scores: Scores = KINDS_OWN, *,
        text_columns: tuple[str, ...] | None = None, label_column: str | None = None,
        prefix: str | None = None, max_target_length: int | None = None,
    ) -> tuple[Task, list[str]]:  # fmt: skip
        """Create the task; raise a DataError if the columns of source or target texts are missing."""
        names = {n.lower(): n for n in table.column_names}
        check_named(table, source, {"--text-column": text_columns, "--label-column": label_column})
        if not text_columns:
            refuse_preferences(table, source)
        pair = next((p for p in _PAIRS if set(p) <= set(names)), None)
        text = text_columns or ((names[pair[0]],) if pair else ())
        label = label_column or (names[pair[1]] if pair and names[pair[1]] not in text else None)
        fitting = [n for n in table.column_names if is_string(table.schema.field(n).type)]
        if len(text) != 1 or label is None or not {*text, label} <= set(fitting):
            refuse_unreadable(table, table.column_names)
            raise DataError(
                source, f"no columns of source and target texts; the columns are {first_of(table.column_names)}",
                allowed="two columns of text", fix="Name them with --text-column and --label-column",
            )  # fmt: skip
        refuse_unreadable(table, (*text, label))
        task = cls(
            text_columns=text, label_column=label, prefix=prefix or "",
            max_target_length=max_target_length or _LONGEST_TARGET,
            **scores.fields(("rougeL", "rouge1", "rouge2"), "text"),
        )  # fmt: skip
        notes = [] if text_columns else [detected("text", text[0])]
        return task, notes if label_column else [*notes, detected("label", label)]

    @override
    def columns(self) -> list[tuple[str, str]]:
        return [("text", self.text_columns[0]), ("target", self.label_column)]

    @override
    def strata(self, split: Split) -> None:
        refuse_missing(nulls(split.table, self.label_column), split.places, self.label_column, "target")

    @override
    def load_processor(self, source: ModelSource) -> PairReader:
        """Load the tokenizer; raise a ConfigError if the model's configuration has no start token of the decoder."""
        config = source.config
        known = (getattr(config, name, None) for name in ("decoder_start_token_id", "bos_token_id"))
        start = next((i for i in known if isinstance(i, int)), None)
        if start is None:
            raise ConfigError(f"model '{source.name}'", "its config has no decoder_start_token_id",
                              allowed="an encoder-decoder model, such as T5 or BART")  # fmt: skip
        taken = forward_parameters(self.auto_class, config)
        switches = {"use_cache": False} if "use_cache" in taken else {}
        tokenizer = load_tokenizer(source)
        if tokenizer.sep_token_id is None:
            tokenizer = with_end_token(tokenizer, source)
        return PairReader(tokenizer=tokenizer, start_id=start, switches=switches)

    @override
    def resolve_length(self, asked: int | None, processor: PairReader, config: Any) -> int:
        """Return the maximum length of source texts."""
        return resolve_max_length(asked, processor.tokenizer, config)

    @override
    def encode(self, split: Split, processor: PairReader, reading: Reading) -> PairExamples:
        missing, tokenizer = nulls(split.table, self.label_column), processor.tokenizer
        if not reading.allow_missing:
            refuse_missing(missing, split.places, self.label_column, "target")
        sources, keep = encode_texts(
            split, self.text_columns, None, missing, tokenizer, reading, self.code, prefix=self.prefix
        )

        def make(columns: Columns, numbers: Rows) -> Tokens:
            return _target_tokens([str(text or "") for text in columns[0]], tokenizer, self.max_target_length)

        made = tokenise_rows(
            split, [self.label_column], tokenizer, reading, self.code, make, keep=keep, what=", targets",
            facts={"length": self.max_target_length, "side": "target"},
        )  # fmt: skip
        return PairExamples(
            sources=sources, targets=made.arrays["targets"], target_offsets=made.arrays["offsets"], reader=processor,
            references=lambda: [str(text or "") for text in cells(split.table, self.label_column, keep)],
            num_truncated=sources.num_truncated, num_unlabelled=sources.num_unlabelled,
            num_cut=made.counts["num_truncated"],
        )  # fmt: skip

    @override
    def loss(self, inputs: Batch, outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of logits (B, L, V) against targets (B, L), summed over tokens."""
        return summed_loss(outputs.logits, targets)

    @override
    def judge(self, model: Any, inputs: Batch, outputs: Any, targets: Tensor) -> Sequence[Any]:
        """Generate a text for each row, and return its tokens."""
        asked = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
        written = model.generate(**asked, max_new_tokens=self.max_target_length, num_beams=1, do_sample=False)
        return list(written.cpu().numpy())

    @override
    def answers(self, judged: Sequence[Any], examples: Any) -> tuple[list[str], list[str]]:
        """Return the generated texts and the target texts."""
        tokenizer = examples.reader.tokenizer
        return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in judged], examples.references()

    @override
    def asked(self, split: Split) -> tuple[Split, list[str]]:
        return split, [str(text or "") for text in cells(split.table, self.label_column)]

    @override
    def prediction_options(self) -> tuple[str, ...]:
        return GENERATION

    @override
    def encode_to_predict(
        self, split: Split, processor: PairReader, reading: Reading, options: PredictOptions
    ) -> PromptExamples:
        examples = TextTask.encode_to_predict(self, split, processor, reading, options)
        assert isinstance(examples, PairExamples)
        refuse_no_tokens(examples.sources.lengths, split.places)
        shared = {f.name: getattr(examples.sources, f.name) for f in fields(examples.sources)}
        return PromptExamples(
            **shared, tokenizer=processor.tokenizer, options=options, is_continued=False,
            max_new_tokens=options.max_new_tokens or self.max_target_length,
        )  # fmt: skip

    @override
    def prediction_columns(
        self, judged: Sequence[Any], examples: PromptExamples, split: Split, options: PredictOptions
    ) -> Predictions:
        """Return the generated texts, and whether each ended before the maximum length."""
        return examples.columns(judged)

    @override
    def probe(self, processor: PairReader, config: Any) -> Batch:
        batch = text_probe(processor.tokenizer, config)
        batch = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
        begin = torch.full_like(batch["input_ids"][:, :1], processor.start_id)
        return {
            **batch,
            "decoder_input_ids": torch.cat([begin, batch["input_ids"][:, :-1]], dim=1),
            **processor.switches,
        }


def _target_tokens(texts: list[str], tokenizer: Any, max_length: int) -> Tokens:
    ids = tokenizer(text_target=texts, truncation=False, verbose=False)["input_ids"]
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    ids = [row if row[-1:] == [end] else [*row, end] for row in ids]  # some tokenizers do not add it
    # A truncated target also ends with the end token, which is learned.
    cut = [row if len(row) <= max_length else [*row[: max_length - 1], end] for row in ids]
    flat, offsets = ragged(cut)
    return {"targets": flat, "offsets": offsets}, {"num_truncated": sum(len(row) > max_length for row in ids)}
