# SPDX-License-Identifier: Apache-2.0
"""token-classification: words -> a tag for each (entities, parts of speech). Cross-entropy on the first piece of every
word; whole entities are scored by seqeval where the tags have the form B-X, I-X, O, single words otherwise.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mirrortune.columns import check_named, detected, is_string
from mirrortune.data import Split
from mirrortune.errors import DataError, NoRowsError, did_you_mean
from mirrortune.examples import IGNORE_INDEX, Batch, IntArray, Padding, TokenExamples
from mirrortune.labels import as_name, feature_names, in_order, is_list, label_fields, refuse_missing
from mirrortune.metrics import KINDS_OWN, Scores
from mirrortune.model import ModelSource, load_tokenizer
from mirrortune.probes import text_probe
from mirrortune.token_cache import TokenKey, cached_tokens, data_digest, ragged
from mirrortune.tokens import Reading, resolve_max_length

_WORDS = ("tokens", "words", "text", "sentence")
_TAGS = ("ner_tags", "tags", "labels", "pos_tags", "ner", "pos", "label", "upos")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """See :class:`mirrortune.tasks.Task`. ``labels`` are the tags, in the order of the model's outputs."""

    text_columns: tuple[str, ...]
    label_column: str
    metric_names: tuple[str, ...]
    selection_metric: str
    labels: tuple[str, ...]
    kind: str = "token-classification"
    auto_class: str = "AutoModelForTokenClassification"
    version: int = 1

    @classmethod
    def from_rows(
        cls, table: pa.Table, source: str, scores: Scores = KINDS_OWN, *,
        text_columns: tuple[str, ...] | None = None, label_column: str | None = None,
        labels: tuple[str, ...] | None = None,
    ) -> tuple[Task, list[str]]:  # fmt: skip
        """The task with tags from ``labels``, else the column's own features, else those found, sorted."""
        words, tags, notes = _choose(table, text_columns, label_column, source)
        found = {name for row in table.column(tags).to_pylist() for name in map(as_name, row or ()) if name is not None}
        names = labels or feature_names(table, tags) or tuple(in_order(found))
        if len(names) < 2:
            raise DataError(source, f"tag column '{tags}' has one tag only", allowed="two tags or more",
                            fix="Name another column with --label-column")  # fmt: skip
        chosen = scores.fields(("entity_f1", "tag_accuracy") if _are_entities(names) else ("tag_accuracy",), "tags")
        return cls(text_columns=(words,), label_column=tags, labels=names, **chosen), notes

    def columns(self) -> list[tuple[str, str]]:
        """See :class:`mirrortune.tasks.Task`."""
        return [("word", self.text_columns[0]), ("tag", self.label_column)]

    def strata(self, split: Split) -> None:
        """None: rows are split at random."""
        refuse_missing(np.array([tags is None for tags in self._tags(split)]), split.source, self.label_column, "tag")

    def config_fields(self) -> dict[str, Any]:
        """See :class:`mirrortune.tasks.Task`."""
        return label_fields(self.labels)

    def load_processor(self, source: ModelSource) -> Any:
        """The tokenizer; told to begin words with a space where it must be, to take words at all."""
        tokenizer = load_tokenizer(source)
        try:
            tokenizer(["a"], is_split_into_words=True)
        except (AssertionError, ValueError):
            tokenizer = load_tokenizer(source, add_prefix_space=True)
        return tokenizer

    def resolve_length(self, asked: int | None, processor: Any, config: Any) -> int:
        """See :class:`mirrortune.tasks.Task`."""
        return resolve_max_length(asked, processor, config)

    def encode(self, split: Split, processor: Any, reading: Reading) -> TokenExamples:
        """See :class:`mirrortune.tasks.Task`."""
        max_length = reading.max_length
        assert max_length is not None
        words = [[str(w) for w in row or ()] for row in split.table.column(self.text_columns[0]).to_pylist()]
        tags = self._tags(split)
        if not reading.allow_missing:
            refuse_missing(np.array([t is None for t in tags]), split.source, self.label_column, "tag")
        for row, (given, wanted) in enumerate(zip(words, tags, strict=True), start=1):
            if wanted is not None and len(given) != len(wanted):
                raise DataError(f"{split.source} row {row}", f"{len(given)} words and {len(wanted)} tags",
                                allowed="a tag for every word", fix="Correct the row")  # fmt: skip
        empty = [not row for row in words]
        keep = [i for i, is_empty in enumerate(empty) if not (is_empty and reading.drop_blank)]
        if not keep:
            raise NoRowsError(split.source, f"all {len(words)} rows have no words", fix="Name another --text-column")
        kept = [words[i] for i in keep]
        key = TokenKey.of(
            reading.rows(split), data_digest([[[json.dumps(row) for row in kept]]]), processor,
            columns=self.text_columns, length=max_length, task=(self.kind, self.version),
        )  # fmt: skip
        arrays, counts = cached_tokens(key, lambda: iter([_tokenise(kept, processor, max_length)]), reading.tell)
        offsets, places = arrays.pop("offsets"), arrays.pop("words")
        seen = [places[a:b][places[a:b] >= 0].tolist() for a, b in itertools.pairwise(offsets)]
        right = [tags[i] for i in keep]
        arrays["targets"] = np.full(len(places), IGNORE_INDEX, dtype=np.int32)
        arrays["targets"][places >= 0] = [
            row[word] if row is not None else IGNORE_INDEX
            for row, words_seen in zip(right, seen, strict=True)
            for word in words_seen
        ]
        return TokenExamples(
            features=arrays, offsets=offsets, targets=None, padding=Padding.of(processor), max_length=max_length,
            num_truncated=counts["num_truncated"], num_empty=sum(empty), num_dropped=len(words) - len(keep),
            num_unlabelled=sum(row is None for row in right), references=list(zip(right, seen, strict=True)),
        )  # fmt: skip

    def loss(self, outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of logits (B, L, C) against tags (B, L), summed over words."""
        logits = outputs.logits.float().flatten(0, 1)
        loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
        return loss, (targets != IGNORE_INDEX).sum()

    def judge(self, model: Any, inputs: Batch, outputs: Any, targets: Tensor) -> Sequence[Any]:
        """The tag of every word of each row, as far as it was not cut off."""
        best = outputs.logits.argmax(dim=-1)
        return [row[wanted != IGNORE_INDEX].cpu().tolist() for row, wanted in zip(best, targets, strict=True)]

    def answers(self, judged: Sequence[Any], examples: Any) -> tuple[Any, Any]:
        """Tags by name, of the words of each row; a word that was cut off, or that has no pieces, is tagged as none is
        (``O``, or the first tag).
        """
        none = "O" if "O" in self.labels else self.labels[0]
        found = []
        for tags, (right, seen) in zip(judged, examples.references, strict=True):
            row = [none] * len(right)
            for word, tag in zip(seen, tags, strict=True):
                row[word] = self.labels[tag]
            found.append(row)
        return found, [[self.labels[tag] for tag in right] for right, _ in examples.references]

    def probe(self, processor: Any, config: Any) -> Batch:
        """See :class:`mirrortune.tasks.Task`."""
        return text_probe(processor, config)

    def _tags(self, split: Split) -> list[list[int] | None]:
        """The tags of each row as indices into ``labels``; None where there are none."""
        index = {name: i for i, name in enumerate(self.labels)}
        features = feature_names(split.table, self.label_column)
        found: list[list[int] | None] = []
        for number, row in enumerate(split.table.column(self.label_column).to_pylist(), start=1):
            names = [features[t] if features and isinstance(t, int) and t >= 0 else as_name(t) for t in row or ()]
            unknown = next((n for n in names if n not in index), None) if row is not None else None
            if row is not None and features and any(isinstance(t, int) and t < 0 for t in row):
                found.append(None)  # the Hub's unlabelled test splits
                continue
            if unknown is not None:
                raise DataError(
                    f"{split.source} row {number}",
                    f"tag {unknown!r} is not among the tags.{did_you_mean(unknown, self.labels)}",
                    allowed=", ".join(self.labels), fix="Correct the row, or list every tag in task.labels",
                )  # fmt: skip
            found.append(None if row is None else [index[n] for n in names if n is not None])
        return found


def _are_entities(names: Sequence[str]) -> bool:
    """Whether tags have the form B-X, I-X, O (or a relative with E-, S-, L-, U-)."""
    return "O" in names and all(n == "O" or re.fullmatch(r"[BIESLU]-.+", n) for n in names)


def _tokenise(
    rows: list[list[str]], tokenizer: Any, max_length: int, chunk: int = 4096
) -> tuple[dict[str, IntArray], dict[str, int]]:
    names = [n for n in tokenizer.model_input_names if n in ("input_ids", "token_type_ids")]
    parts: dict[str, list[list[int]]] = {n: [] for n in (*names, "words")}
    truncated = 0
    for start in range(0, len(rows), chunk):
        batch = rows[start : start + chunk]
        options: dict[str, Any] = {"is_split_into_words": True, "verbose": False}
        made = tokenizer(batch, truncation=True, max_length=max_length, **options)
        for i, words in enumerate(batch):
            pieces = made.word_ids(i)
            firsts = [-1 if w is None or w == before else w for w, before in zip(pieces, [None, *pieces], strict=False)]
            parts["words"].append(firsts)
            # A word in the middle of a row may have no pieces; only the last ones can have been cut off.
            truncated += len(pieces) == max_length and max(firsts) < len(words) - 1
        for name in names:
            parts[name] += list(made[name])
    arrays = {name: ragged(values)[0] for name, values in parts.items()}
    return {**arrays, "offsets": ragged(parts["input_ids"])[1]}, {"num_truncated": truncated}


def _choose(
    table: pa.Table, text: tuple[str, ...] | None, label: str | None, source: str
) -> tuple[str, str, list[str]]:
    """The columns of words and of tags, and notes on what was detected."""
    check_named(table, [*((c, "--text-column") for c in text or ()), (label, "--label-column")], source)
    lists = {n.lower(): n for n in table.column_names if is_list(table.schema.field(n).type)}
    texts = {k: n for k, n in lists.items() if is_string(table.schema.field(n).type.value_type)}
    notes = []
    words = text[0] if text else next((texts[n] for n in _WORDS if n in texts), None)
    if words is not None and not text:
        notes.append(detected("text", words))
    tags = label or next((lists[n] for n in _TAGS if n in lists and lists[n] != words), None)
    if tags is not None and not label:
        notes.append(detected("label", tags))
    if words is None or tags is None or not {words, tags} <= set(lists.values()) or len(text or ("",)) > 1:
        raise DataError(
            source,
            f"no two columns are lists of words and of tags; the columns are {', '.join(table.column_names)}",
            allowed="a list of words and a list of tags in each row (json, jsonl or parquet)",
            fix="Name them with --text-column and --label-column",
        )
    return words, tags, notes
