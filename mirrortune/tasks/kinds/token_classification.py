# SPDX-License-Identifier: Apache-2.0
"""token-classification: words -> a tag for each word (entities, parts of speech).

The loss is the cross-entropy at the first token of each word. Tags of the form B-X, I-X, O are scored by entities
(seqeval), and other tags by words.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from typing_extensions import override

from mirrortune.data.columns import check_named, detected, refuse_written_lists
from mirrortune.data.dataset import Split
from mirrortune.data.examples import IGNORE_INDEX, Batch, IntArray, Padding, Rows, TokenExamples
from mirrortune.data.files.arrow import Columns, cells, is_list, is_string, refuse_unreadable, rows_of
from mirrortune.data.labels import as_name, feature_names, in_order, label_fields, refuse_missing
from mirrortune.data.token_cache import Tokens, ragged
from mirrortune.data.tokenize import Reading, tokenise_rows
from mirrortune.errors import DataError, did_you_mean, first_of
from mirrortune.models.load import ModelSource, load_tokenizer
from mirrortune.tasks.base import TextTask
from mirrortune.tasks.classes import WeighsClasses
from mirrortune.tasks.metrics import KINDS_OWN, Scores
from mirrortune.tasks.predicting import Predictions, PredictOptions, plain_numbers, refuse_nan

_WORDS = ("tokens", "words", "text", "sentence")
_TAGS = ("ner_tags", "tags", "labels", "pos_tags", "ner", "pos", "label", "upos")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task(TextTask, WeighsClasses):
    """Tagging of words; ``labels`` are the tags."""

    text_columns: tuple[str, ...]
    label_column: str
    metric_names: tuple[str, ...]
    selection_metric: str
    labels: tuple[str, ...]
    kind: str = "token-classification"
    auto_class: str = "AutoModelForTokenClassification"
    version: int = 2

    @classmethod
    @override
    def from_rows(
        cls, table: pa.Table, source: str, scores: Scores = KINDS_OWN, *,
        text_columns: tuple[str, ...] | None = None, label_column: str | None = None,
        labels: tuple[str, ...] | None = None,
    ) -> tuple[Task, list[str]]:  # fmt: skip
        """Create the task; the tags are ``labels``, else those of the column's features, else its sorted values."""
        words, tags, notes = _choose(table, text_columns, label_column, source)
        found = {name for row in cells(table, tags) for name in map(as_name, row or ()) if name is not None}
        names = labels or feature_names(table, tags) or tuple(in_order(found))
        if len(names) < 2:
            raise DataError(source, f"tag column '{tags}' has one tag only", allowed="two tags or more",
                            fix="Name another column with --label-column")  # fmt: skip
        chosen = scores.fields(("entity_f1", "tag_accuracy") if _are_entities(names) else ("tag_accuracy",), "tags")
        return cls(text_columns=(words,), label_column=tags, labels=names, **chosen), notes

    @override
    def columns(self) -> list[tuple[str, str]]:
        return [("word", self.text_columns[0]), ("tag", self.label_column)]

    @override
    def strata(self, split: Split) -> None:
        features = feature_names(split.table, self.label_column)
        places, rows = split.places, enumerate(cells(split.table, self.label_column))
        missing = (self._indices(tags, features, places.where(n)) is None for n, tags in rows)
        known = np.fromiter(missing, dtype=bool, count=split.table.num_rows)
        refuse_missing(known, split.places, self.label_column, "tag")

    @override
    def config_fields(self) -> dict[str, Any]:
        return label_fields(self.labels)

    @override
    def load_processor(self, source: ModelSource) -> Any:
        """Load the tokenizer, with ``add_prefix_space`` if it needs this to tokenise single words."""
        tokenizer = load_tokenizer(source)
        try:
            tokenizer(["a"], is_split_into_words=True)
        except (AssertionError, ValueError):
            tokenizer = load_tokenizer(source, add_prefix_space=True)
        return tokenizer

    @override
    def encode(self, split: Split, processor: Any, reading: Reading) -> TokenExamples:
        max_length = reading.num_tokens
        features, places = feature_names(split.table, self.label_column), split.places

        def make(columns: Columns, numbers: Rows) -> Tokens:
            words = [_words(row) for row in columns[0]]
            tags = [self._indices(row, features, places.where(n)) for n, row in zip(numbers, columns[1], strict=True)]
            for number, given, wanted in zip(numbers, words, tags, strict=True):
                if wanted is not None and len(given) != len(wanted):
                    raise DataError(places.where(number), f"{len(given)} words and {len(wanted)} tags",
                                    allowed="a tag for every word", fix="Correct the row")  # fmt: skip
            return _tokenise(words, tags, processor, max_length)

        made = tokenise_rows(
            split, (self.text_columns[0], self.label_column), processor, reading, self.code, make,
            is_blank=lambda row: not row[0], facts={"length": max_length, "labels": self.labels},
        )  # fmt: skip
        arrays = made.arrays
        offsets, firsts, missing = arrays.pop("offsets"), arrays.pop("words"), arrays.pop("missing") > 0
        if not reading.allow_missing:
            refuse_missing(made.spread(missing), split.places, self.label_column, "tag")
        return TokenExamples(
            features=arrays, offsets=offsets, targets=None, padding=Padding.of(processor), max_length=max_length,
            num_truncated=made.counts["num_truncated"], num_empty=made.num_blank, num_dropped=made.num_dropped,
            num_unlabelled=int(missing.sum()), references=lambda: self._references(split, made.keep, firsts, offsets),
            kept=made.kept_rows,
        )  # fmt: skip

    @override
    def loss(self, inputs: Batch, outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of logits (B, L, C) against tags (B, L), summed over words."""
        logits = outputs.logits.float().flatten(0, 1)
        loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
        return loss, (targets != IGNORE_INDEX).sum()

    @override
    def training_loss(
        self, outputs: Any, targets: Tensor, *, smoothing: float, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        logits, tags = outputs.logits.float().flatten(0, 1), targets.flatten()
        losses = F.cross_entropy(logits, tags, ignore_index=IGNORE_INDEX, reduction="none", label_smoothing=smoothing)
        if weights is not None:  # the loss at positions without a tag is 0
            losses = losses * weights[tags.clamp(min=0)]
        return losses.sum(), (targets != IGNORE_INDEX).sum()

    @override
    def class_counts(self, examples: Any) -> npt.NDArray[np.int64]:
        tags = examples.features["targets"]
        return np.bincount(tags[tags != IGNORE_INDEX], minlength=len(self.labels))

    @override
    def judge(self, model: Any, inputs: Batch, outputs: Any, targets: Tensor) -> Sequence[Any]:
        """Return the tag and probability of each word of each row, (W,) each, without truncated words."""
        logits = outputs.logits.float()
        best = logits.argmax(dim=-1)
        shares = logits.softmax(dim=-1).amax(dim=-1).cpu().numpy()
        tags, seen = best.cpu().numpy(), (targets != IGNORE_INDEX).cpu().numpy()
        return [(tags[row][own], shares[row][own]) for row, own in enumerate(seen)]

    @override
    def answers(self, judged: Sequence[Any], examples: Any) -> tuple[Any, Any]:
        """Return the names of the predicted and true tags of each row. For words that were truncated or have no tokens,
        the prediction is ``O``, or the first tag if there is no ``O``.
        """
        found, references = [], []
        for (tags, _), (right, count, seen) in zip(judged, examples.references(), strict=True):
            found.append(self._names(tags, count, seen))
            references.append([] if right is None else [self.labels[tag] for tag in right])
        return found, references

    @override
    def prediction_columns(
        self, judged: Sequence[Any], examples: Any, split: Split, options: PredictOptions
    ) -> Predictions:
        """Return the entities and the tags of each row; if tags are not entities, the tags and their probabilities,
        which are None for truncated words.
        """
        tags, scores, entities, are_entities = [], [], [], _are_entities(self.labels)
        rows = zip(judged, examples.references(), cells(split.table, self.text_columns[0]), strict=True)
        for number, ((found, shares), (_, count, seen), words) in enumerate(rows):
            if np.isnan(shares).any():
                refuse_nan([number], split.places)
            tags.append(self._names(found, count, seen))
            known = dict(zip(seen, plain_numbers(shares), strict=True))
            scores.append([known.get(word) for word in range(count)])
            if are_entities:
                entities.append(entities_of(tags[-1], scores[-1], _words(words)))
        if are_entities:
            return {"prediction": entities, "tags": tags}
        return {"prediction": tags, "scores": scores}

    def _names(self, tags: npt.NDArray[np.integer[Any]], count: int, seen: Sequence[int]) -> list[str]:
        """Return the tags of ``count`` words, given those of the words ``seen``."""
        row = ["O" if "O" in self.labels else self.labels[0]] * count
        for word, tag in zip(seen, tags.tolist(), strict=True):
            row[word] = self.labels[tag]
        return row

    def _references(
        self, split: Split, keep: npt.NDArray[np.bool_], places: IntArray, offsets: IntArray
    ) -> Iterator[tuple[list[int] | None, int, list[int]]]:
        """Yield the tags of each row, the number of its words, and the words whose first token was not truncated."""
        features = feature_names(split.table, self.label_column)
        rows = rows_of(split.table, [column for _, column in self.columns()], keep)
        for (words, tags), (start, stop) in zip(rows, itertools.pairwise(offsets), strict=True):
            firsts = places[start:stop]
            yield self._indices(tags, features, split.source), len(words or ()), firsts[firsts >= 0].tolist()

    def _indices(self, row: list[Any] | None, features: tuple[str, ...] | None, where: str) -> list[int] | None:
        """Return the tags of a row as indices into ``labels``; None if the row has no tags."""
        if row is None or (features and any(isinstance(t, int) and t < 0 for t in row)):
            return None  # unlabelled test splits on the Hub have negative tags
        index = {name: i for i, name in enumerate(self.labels)}
        names = [features[t] if features and isinstance(t, int) else as_name(t) for t in row]
        if None in names:
            raise DataError(where, f"word {names.index(None) + 1} has no tag", allowed="a tag for every word",
                            fix="Correct the row")  # fmt: skip
        unknown = next((n for n in names if n not in index), None)
        if unknown is not None:
            raise DataError(
                where, f"tag {unknown!r} is not among the tags.{did_you_mean(unknown, self.labels)}",
                allowed=", ".join(self.labels), fix="Correct the row, or list every tag in task.labels",
            )  # fmt: skip
        return [index[n] for n in names if n is not None]


def _words(row: list[Any] | None) -> list[str]:
    """Return the words of a row; a missing one is empty, not the word None."""
    return ["" if word is None else str(word) for word in row or ()]


def _are_entities(names: Sequence[str]) -> bool:
    """Return whether tags have the form B-X, I-X, O (or a variant with E-, S-, L-, U-)."""
    return "O" in names and all(n == "O" or re.fullmatch(r"[BIESLU]-.+", n) for n in names)


def entities_of(tags: Sequence[str], scores: Sequence[float | None], words: Sequence[str]) -> list[dict[str, Any]]:
    """Find the entities in the tags of a row, as seqeval does.

    A word with I- (or E-, L-) continues the entity of the word before it if this has the same type and has not ended;
    otherwise it begins an entity.

    Returns:
        For each entity its type (the tag without prefix), the indices of its first word and of the word after its last,
        its words joined by spaces, and the mean of their probabilities.
    """
    spans: list[list[int]] = []
    before = "O"
    for place, tag in enumerate(tags):
        continues = tag[0] in "IEL" and before[0] in "BI" and tag[1:] == before[1:]
        if continues:
            spans[-1][1] = place + 1
        elif tag != "O":
            spans.append([place, place + 1])
        before = tag
    found = []
    for first, stop in spans:
        shares = [share for share in scores[first:stop] if share is not None]
        score = plain_numbers(np.array([sum(shares) / len(shares)]))[0] if shares else None
        text = " ".join(words[first:stop])
        found.append({"tag": tags[first][2:], "start": first, "end": stop, "text": text, "score": score})
    return found


def _tokenise(rows: list[list[str]], tags: list[list[int] | None], tokenizer: Any, max_length: int) -> Tokens:
    """Tokenise the words of rows.

    Additional fields: ``words``, the index of the word that a token begins, or -1; ``targets``, the tag of this word;
    ``missing`` (N,), 1 for rows without tags.
    """
    names = [n for n in tokenizer.model_input_names if n in ("input_ids", "token_type_ids")]
    options: dict[str, Any] = {"is_split_into_words": True, "verbose": False}
    made = tokenizer(rows, truncation=True, max_length=max_length, **options)
    firsts, targets, truncated = [], [], 0
    for i, (words, right) in enumerate(zip(rows, tags, strict=True)):
        pieces = made.word_ids(i)
        begun = [-1 if w is None or w == before else w for w, before in zip(pieces, [None, *pieces], strict=False)]
        firsts.append(begun)
        # A row without tags gets arbitrary targets, which are not scored, so that its words can be predicted.
        wanted = [0] * len(words) if right is None else right
        targets.append([IGNORE_INDEX if word < 0 else wanted[word] for word in begun])
        # A word inside a row may have no tokens; only words at its end can be truncated.
        truncated += len(pieces) == max_length and max(begun) < len(words) - 1
    arrays = {name: ragged(list(made[name]))[0] for name in names}
    arrays |= {"words": ragged(firsts)[0], "targets": ragged(targets)[0], "offsets": ragged(firsts)[1]}
    arrays["missing"] = np.array([right is None for right in tags], dtype=np.int32)
    return arrays, {"num_truncated": truncated}


def _choose(
    table: pa.Table, text: tuple[str, ...] | None, label: str | None, source: str
) -> tuple[str, str, list[str]]:
    """Return the columns of words and of tags, and notes on what was detected."""
    check_named(table, source, {"--text-column": text, "--label-column": label})
    lists = {n.lower(): n for n in table.column_names if is_list(table.schema.field(n).type)}
    texts = {k: n for k, n in lists.items() if is_string(table.schema.field(n).type.value_type)}
    for name in (*(text or ()), *(n for n in table.column_names if n.lower() in (*_WORDS[:2], *_TAGS))):
        refuse_written_lists(table, name, source)
    notes = []
    words = text[0] if text else next((texts[n] for n in _WORDS if n in texts), None)
    if words is not None and not text:
        notes.append(detected("text", words))
    tags = label or next((lists[n] for n in _TAGS if n in lists and lists[n] != words), None)
    if tags is not None and not label:
        notes.append(detected("label", tags))
    if words is None or tags is None or not {words, tags} <= set(lists.values()) or len(text or ("",)) > 1:
        refuse_unreadable(table, table.column_names)
        raise DataError(
            source,
            f"no two columns are lists of words and of tags; the columns are {first_of(table.column_names)}",
            allowed="a list of words and a list of tags in each row (json, jsonl, parquet, conll)",
            fix="Name them with --text-column and --label-column; convert spans of characters into a tag for each word",
        )
    refuse_unreadable(table, (words, tags))
    return words, tags, notes
