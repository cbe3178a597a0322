# SPDX-License-Identifier: Apache-2.0
"""sentence-similarity: texts -> embeddings, whose cosines order pairs by score, or rank the right text first.

Rows are pairs with a score (CoSENT, Huang et al. 2024; Spearman and Pearson correlation of cosines by default), or an
anchor, a text that belongs to it, and optionally texts that do not (cross-entropy with in-batch negatives, as
sentence-transformers' MultipleNegativesRankingLoss; NDCG, reciprocal rank and recall by default). A text's embedding is
pooled from its token vectors as the model's sentence-transformers folder says.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from typing_extensions import override

from mirrortune.data.columns import check_is_text, check_named, contents, detect_text, detected, number_of
from mirrortune.data.dataset import Split
from mirrortune.data.examples import Batch, Examples, IntArray, Padding, Rows, Targets, TokenExamples
from mirrortune.data.files.arrow import Columns, cells, refuse_unreadable
from mirrortune.data.labels import has_class, refuse_missing
from mirrortune.data.token_cache import Tokens
from mirrortune.data.tokenize import Reading, is_blank_text, pieces, resolve_max_length, tokenise_rows
from mirrortune.errors import DataError, counted, first_of
from mirrortune.models.load import ModelSource, forward_parameters, load_tokenizer
from mirrortune.models.pooling import SentenceModules, pool, read_modules, without_pooler
from mirrortune.tasks.base import ComparesRows, TextTask, TokenizerReader
from mirrortune.tasks.metrics import KINDS_OWN, Scores
from mirrortune.tasks.predicting import Predictions, PredictOptions, check_numbers, plain_numbers
from mirrortune.tasks.probes import text_probe

_PAIRS = (
    ("anchor", "positive"), ("query", "positive"), ("query", "document"), ("query", "passage"), ("question", "answer"),
)  # fmt: skip
_SCORED = (("sentence1", "sentence2"), ("text1", "text2"), ("text_a", "text_b"), ("question1", "question2"))
_SCORES = ("score", "similarity", "similarity_score", "is_duplicate", "label")
_CONTRADICTS = "contradiction"  # a class of natural language inference, whose index is no score
_NEGATIVE = re.compile(r"(hard_)?negative_?\d*", re.IGNORECASE)
_CORRELATION = ("spearmanr", "pearson"), "number"
_RANKING = ("ndcg_at_10", "mrr_at_10", "recall_at_1", "recall_at_10"), "rank"
_SCALE = 20.0  # scale of the cosines in both losses, the default of sentence-transformers
_BLOCK = 1 << 22  # number of cosines in memory at a time in ranking
_ABSENT = 0  # digest of a missing text


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingReader(TokenizerReader):
    """A tokenizer, and the settings in the sentence-transformers folder of a model.

    Attributes:
        modules: settings read from the folder.
    """

    modules: SentenceModules

    @override
    def save_pretrained(self, folder: str | Path) -> None:
        """Save the tokenizer, and the files that sentence-transformers reads."""
        TokenizerReader.save_pretrained(self, folder)
        self.modules.write(Path(folder))

    def prepared(self, text: str | None) -> str:
        """Return a text prepared for tokenisation."""
        whole = self.modules.prompt + (text or "")
        return whole.lower() if self.modules.lowercase else whole


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedExamples(Examples):
    """Rows of T texts, each of which gets an embedding.

    Attributes:
        texts: texts of all rows, row by row.
        num_texts: T, the number of texts of a row.
        targets: score of each pair, shape (N,), NaN if it is missing; or digests of the texts, shape (N, T), which are
            equal for equal texts.
        num_truncated: number of truncated texts.
        num_unlabelled: number of pairs without a score.
        num_empty, num_dropped: number of rows with a blank text among their first two, and of such rows left out.
        switches: additional arguments of the model's ``forward``.
        kept: indices of the rows in the split, shape (N,); None for all rows.
    """

    texts: TokenExamples
    num_texts: int
    targets: Targets
    num_truncated: int
    num_unlabelled: int
    num_empty: int
    num_dropped: int
    switches: dict[str, bool]
    kept: Rows | None = None

    @property
    @override
    def lengths(self) -> IntArray:
        """Number of positions of the texts of each row, all padded to the longest."""
        return np.asarray(self.texts.lengths.reshape(-1, self.num_texts).max(axis=1) * self.num_texts)

    @property
    @override
    def num_tokens(self) -> IntArray:
        return np.asarray(self.texts.lengths.reshape(-1, self.num_texts).sum(axis=1))

    @override
    def __len__(self) -> int:
        return len(self.targets)

    @override
    def extremes(self) -> Rows:
        return np.unique(self.texts.extremes() // self.num_texts)

    @override
    def token_ids(self) -> list[IntArray]:
        return self.texts.token_ids()

    @override
    def input_ids(self, row: int) -> IntArray:
        """Return the token ids of the row's first two texts."""
        first = row * self.num_texts
        return np.concatenate([self.texts.input_ids(text) for text in range(first, first + min(2, self.num_texts))])

    @override
    def batch(self, rows: Rows, epoch: int | None = None) -> Batch:
        """Return tokens (B * T, L), row by row, and targets (B,) or (B, T)."""
        places = rows[:, None] * self.num_texts + np.arange(self.num_texts)
        targets = torch.from_numpy(np.ascontiguousarray(self.targets[rows]))
        return {**self.texts.batch(places.flatten()), **self.switches, "targets": targets}

    @override
    def describe(self) -> str:
        blank = f"; {self.num_empty} with a blank text ({'left out' if self.num_dropped else 'kept'})"
        texts = self.texts.describe().partition(", ")[2]
        return f"{counted(len(self), 'row')} of {self.num_texts} texts: {texts}{blank if self.num_empty else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task(TextTask, ComparesRows):
    """Embedding of texts.

    Attributes:
        text_columns: two texts with a score; or an anchor, a positive text, and optionally negative texts.
        label_column: column of the score; None for pairs without a score.
        pooling: pooling of token vectors to an embedding, read from the model's folder.
        is_normalised: whether embeddings have unit length, read from the model's folder.
    """

    text_columns: tuple[str, ...]
    label_column: str | None
    metric_names: tuple[str, ...]
    selection_metric: str
    pooling: tuple[str, ...] = ("mean",)
    is_normalised: bool = False
    kind: str = "sentence-similarity"
    auto_class: str = "AutoModel"
    version: int = 1

    @classmethod
    @override
    def from_rows(
        cls, table: pa.Table, source: str, scores: Scores = KINDS_OWN, *,
        text_columns: tuple[str, ...] | None = None, label_column: str | None = None,
    ) -> tuple[Task, list[str]]:  # fmt: skip
        """Create the task; DataError if there are no columns of pairs."""
        check_named(table, source, {"--text-column": text_columns, "--label-column": label_column})
        text = text_columns or _find_texts(table, has_score=label_column is not None)
        label = label_column or _find_score(table, text)
        if len(text) < 2 or (label is not None and len(text) > 2) or label in text:
            refuse_unreadable(table, table.column_names)
            found = f"the texts are {', '.join(text)}" if text else f"the columns are {first_of(table.column_names)}"
            raise DataError(
                source, f"no columns of pairs of texts; {found}" + (f", the score is '{label}'" if label else ""),
                allowed="two texts and a score; or an anchor, a text that belongs to it, and texts that do not",
                fix="Name the texts with --text-column, once for each, and a score with --label-column",
            )  # fmt: skip
        for column in text:
            check_is_text(table, column, source)
        refuse_unreadable(table, (*text, *([] if label is None else [label])))
        notes = [] if text_columns else [f"text columns {', '.join(text)} (detected; --text-column to change)"]
        notes += [] if label_column or label is None else [detected("label", label, "the score of a pair")]
        if label is None:
            notes.append(f"no score: learning which '{text[1]}' belongs to each '{text[0]}', among those of its batch")
            verdicts = [n for n in table.column_names if n.lower() in _SCORES and has_class(table, n, _CONTRADICTS)]
            how = f"marks rows of {_CONTRADICTS}, which are learned as pairs that belong together: leave them out"
            notes += [f"warning: column '{name}' {how}" for name in verdicts]
        compared = label or text[1]
        if len(text) == 2 and table.num_rows > 1 and len(table.column(compared).unique()) < 2:
            notes.append(f"warning: column '{compared}' has the same value in every row: there is nothing to learn")
        own, target = _RANKING if label is None else _CORRELATION
        return cls(text_columns=text, label_column=label, **scores.fields(own, target)), notes

    @override
    @classmethod
    def to_predict(
        cls, table: pa.Table, source: str, text_columns: tuple[str, ...] | None = None
    ) -> tuple[Task, list[str]]:
        check_named(table, source, {"--text-column": text_columns})
        text, notes = text_columns or _find_texts(table, has_score=False), list[str]()
        if not text:
            text, note = detect_text(table, None, source)
            notes.append(note)
        for column in text:
            check_is_text(table, column, source)
        return cls(text_columns=tuple(text), label_column=None, **KINDS_OWN.fields(*_RANKING)), notes

    @override
    def columns(self) -> list[tuple[str, str]]:
        label = [] if self.label_column is None else [("label", self.label_column)]
        return [*(("text", column) for column in self.text_columns), *label]

    @override
    def strata(self, split: Split) -> None:
        self._targets(split, allow_missing=False)

    @override
    def for_model(self, source: ModelSource) -> tuple[Task, list[str]]:
        modules = read_modules(source)
        task = replace(self, pooling=modules.modes, is_normalised=modules.is_normalised)
        return task, list(modules.notes)

    @override
    def trim(self, model: nn.Module) -> nn.Module:
        return without_pooler(model)

    @override
    def load_processor(self, source: ModelSource) -> EmbeddingReader:
        switches = {"use_cache": False} if "use_cache" in forward_parameters(self.auto_class, source.config) else {}
        return EmbeddingReader(tokenizer=load_tokenizer(source), modules=read_modules(source), switches=switches)

    @override
    def resolve_length(self, asked: int | None, processor: EmbeddingReader, config: Any) -> int:
        stated = processor.modules.max_length
        own = {} if stated is None else {"default": stated}
        return resolve_max_length(asked, processor.tokenizer, config, **own)

    @override
    def encode(self, split: Split, processor: EmbeddingReader, reading: Reading) -> EmbeddedExamples:
        max_length, count, modules = reading.num_tokens, len(self.text_columns), processor.modules

        def make(columns: Columns, numbers: Rows) -> Tokens:
            texts = [text for row in zip(*columns, strict=True) for text in row]
            arrays, counts = pieces([[processor.prepared(text) for text in texts]], processor.tokenizer, max_length)
            return {**arrays, "digests": np.array([_digest(text) for text in texts], dtype=np.int64)}, counts

        scores = self._targets(split, allow_missing=reading.allow_missing)
        facts = {"length": max_length, "num_texts": count, "prompt": modules.prompt, "lowercase": modules.lowercase}
        made = tokenise_rows(
            split, self.text_columns, processor.tokenizer, reading, self.code, make, is_blank=_has_blank, facts=facts
        )
        arrays = made.arrays
        digests = arrays.pop("digests").reshape(-1, count)
        targets = digests if scores is None else scores[made.keep]
        texts = TokenExamples(
            features=arrays, offsets=arrays.pop("offsets"), targets=None, padding=Padding.of(processor.tokenizer),
            max_length=max_length, num_truncated=made.counts["num_truncated"],
        )  # fmt: skip
        return EmbeddedExamples(
            texts=texts, num_texts=count, targets=targets, num_truncated=texts.num_truncated,
            num_unlabelled=0 if scores is None else int(np.isnan(targets).sum()), num_empty=made.num_blank,
            num_dropped=made.num_dropped, switches=processor.switches, kept=made.kept_rows,
        )  # fmt: skip

    def embeddings(self, inputs: Batch, outputs: Any) -> Tensor:
        """Return the embedding of each text, (B * T, D) float32, as defined in the model's folder."""
        vectors = outputs.last_hidden_state
        return pool(vectors, inputs["attention_mask"], self.pooling, is_normalised=self.is_normalised)

    @override
    def vectors(self, inputs: Batch, outputs: Any) -> Tensor:
        """Return the embeddings of each row, normalised to unit length, (B, T, D)."""
        found = F.normalize(self.embeddings(inputs, outputs), dim=-1)
        return found.reshape(-1, len(self.text_columns), found.shape[-1])

    @override
    def loss(self, inputs: Batch, outputs: Any, targets: Tensor) -> tuple[Tensor, int]:
        """Return the loss of rows that are compared with each other only."""
        vectors, count = self.vectors(inputs, outputs), targets.shape[0]
        is_row = torch.ones(count, dtype=torch.bool, device=targets.device)
        return self.loss_of_rows(vectors, targets, is_row, slice(0, count))

    @override
    def loss_of_rows(self, vectors: Tensor, targets: Tensor, is_row: Tensor, own: slice) -> tuple[Tensor, int]:
        count = own.stop - own.start
        with torch.autocast(vectors.device.type, enabled=False):
            if self.label_column is None:
                return _ranking_loss(vectors, targets, is_row, own), count
            # The loss is a single value for all rows; each row gets an equal share of it.
            return _cosent(vectors, targets, is_row) * count, count

    @override
    def loss_of_split(self, judged: Sequence[Any], examples: EmbeddedExamples) -> float:
        if self.label_column is None:
            return float(_ranks(_unit(judged), examples.targets)[1].mean())
        return _cosent_of_split(_cosines(_unit(judged)), examples.targets)

    @override
    def judge(self, model: Any, inputs: Batch, outputs: Any, targets: Tensor) -> npt.NDArray[np.float32]:
        """Return the embeddings of each row, (B, T, D)."""
        found = self.embeddings(inputs, outputs)
        return np.asarray(found.reshape(-1, len(self.text_columns), found.shape[-1]).cpu().numpy())

    @override
    def answers(self, judged: Sequence[Any], examples: EmbeddedExamples) -> tuple[Targets, Targets]:
        """Return the cosine of the first two texts, and the score or the rank of the second one, each (N,)."""
        vectors = _unit(judged)
        ranked = examples.targets if self.label_column else _ranks(vectors, examples.targets)[0]
        return _cosines(vectors), ranked

    @override
    def difficulty(self, predictions: Targets, references: Targets) -> npt.NDArray[np.float64]:
        """Return the rank of the right text, or the difference between the ranks of a pair by score and by cosine."""
        from scipy.stats import rankdata  # noqa: PLC0415

        if self.label_column is None:
            return references.astype(np.float64)
        return np.asarray(np.abs(rankdata(predictions) - rankdata(references)) / len(predictions))

    @override
    def narrowed(self, columns: Collection[str]) -> Task:
        """Return the task for rows with only some of its text columns, such as a corpus to embed."""
        there = tuple(name for name in self.text_columns if name in columns)
        return replace(self, text_columns=there) if there else self

    @override
    def prediction_columns(
        self, judged: Sequence[Any], examples: EmbeddedExamples, split: Split, options: PredictOptions
    ) -> Predictions:
        """Return the cosine of the first two texts and the embedding of each, or of a single text its embedding."""
        vectors = np.stack(judged)
        check_numbers(vectors, split.places)
        found = [[plain_numbers(vector) for vector in vectors[:, text]] for text in range(vectors.shape[1])]
        if len(found) == 1:
            return {"prediction": found[0]}
        cosines = plain_numbers(_cosines(_unit(judged)))
        return {"prediction": cosines, **{f"embedding_{i}": column for i, column in enumerate(found, start=1)}}

    @override
    def probe(self, processor: EmbeddingReader, config: Any) -> Batch:
        return {**text_probe(processor.tokenizer, config), **processor.switches}

    @override
    def compared(self, inputs: Batch, outputs: Any) -> dict[str, Tensor]:
        """Return the token vectors and the embeddings; the pooled output of the model is not used."""
        features = self.embeddings(inputs, outputs)
        return {"last_hidden_state": outputs.last_hidden_state, "pooled_features": features}

    def _targets(self, split: Split, *, allow_missing: bool) -> npt.NDArray[np.float32] | None:
        """Return the scores, (N,), NaN if missing; None if the task has no scores."""
        found = None if self.label_column is None else split.once((self.label_column, "scores"), self._scores)
        if found is not None and not allow_missing:
            refuse_missing(np.isnan(found), split.places, self.label_column or "", "score")
        return found

    def _scores(self, split: Split) -> npt.NDArray[np.float32]:
        found = np.full(split.table.num_rows, np.nan, dtype=np.float32)
        for row, value in enumerate(cells(split.table, self.label_column or "")):
            number = {"true": 1.0, "false": 0.0}.get(str(value).strip().lower(), number_of(value))
            if number is None and value is not None and str(value).strip().lower() not in ("", "nan"):
                problem = f"score {value!r} in column '{self.label_column}' is not a number"
                fix = "Correct the row, or name another column with --label-column"
                raise DataError(split.places.where(row), problem, fix=fix)
            found[row] = np.nan if number is None else number
        return found


def _find_texts(table: pa.Table, *, has_score: bool) -> tuple[str, ...]:
    """Find the text columns by their names: an anchor, a positive text and any negative texts, or a scored pair."""
    names = {name.lower(): name for name in table.column_names}
    pairs = (*_SCORED, *_PAIRS) if has_score else (*_PAIRS, *_SCORED)
    pair = next((tuple(names[n] for n in pair) for pair in pairs if set(pair) <= names.keys()), ())
    negatives = [name for name in table.column_names if _NEGATIVE.fullmatch(name) and not has_score]
    return (*pair, *negatives) if pair else ()


def _find_score(table: pa.Table, text: Sequence[str]) -> str | None:
    """Find the column with the name of a score, as which a ``label`` needs numbers or booleans; None without a pair."""
    if len(text) != 2 or text[1].lower() == "positive":
        return None
    known = {name.lower(): column for name, column in contents(table).items() if name not in text and column.rows}
    # Pairs with a score that cannot be read (4,2 or 90%) would be learned as pairs that belong together.
    own = "label" in known and pa.types.is_boolean(table.schema.field(known["label"].name).type)
    fitting = [known[n].name for n in _SCORES if n in known and (known[n].is_number or n != "label" or own)]
    return next((name for name in fitting if not has_class(table, name, _CONTRADICTS)), None)


def _has_blank(row: tuple[Any, ...]) -> bool:
    return any(is_blank_text([text]) for text in row[:2])


def _digest(text: str | None) -> int:
    """Return an integer that is equal for equal texts, ignoring white space around them."""
    plain = (text or "").strip().encode("utf-8", "surrogatepass")
    if not plain:
        return _ABSENT
    return int.from_bytes(hashlib.blake2b(plain, digest_size=8).digest(), "little", signed=True)


def _ranking_loss(vectors: Tensor, digests: Tensor, is_row: Tensor, own: slice) -> Tensor:
    """Return the cross-entropy of the second text of each anchor among the texts of all rows, summed over ``own``.

    Args:
        vectors: embeddings of unit length, shape (N, T, D).
        digests: digests of the texts, shape (N, T).
        is_row: False for placeholders, shape (N,).
        own: slice of the rows to sum over.
    """
    per_row = vectors.shape[1] - 1
    cosines = vectors[own, 0] @ vectors[:, 1:].flatten(0, 1).T
    anchors, right, others = digests[own, 0, None], digests[own, 1, None], digests[:, 1:].flatten()
    is_absent = (others == _ABSENT) | ~is_row.repeat_interleave(per_row)
    # A positive text of the same anchor in another row is not a negative, and neither is the anchor itself.
    belongs = torch.zeros(len(digests), per_row, dtype=torch.bool, device=digests.device)
    belongs[:, 0] = True
    is_another = (anchors == digests[:, 0].repeat_interleave(per_row)) & belongs.flatten()
    left_out = is_absent | is_another | (others == right) | (others == anchors)
    places = torch.arange(own.start, own.stop, device=digests.device) * per_row
    left_out = left_out.scatter(1, places[:, None], value=False)
    logits = (_SCALE * cosines).masked_fill(left_out, -torch.inf)
    return F.cross_entropy(logits, places, reduction="sum")


def _cosent(vectors: Tensor, scores: Tensor, is_row: Tensor) -> Tensor:
    """Return log(1 + sum of exp(scale (c_j - c_i))) over all pairs of rows in which i has the higher score."""
    cosines = _SCALE * (vectors[:, 0] * vectors[:, 1]).sum(dim=-1)
    is_ordered = (scores[:, None] > scores) & is_row[:, None] & is_row
    differences = (cosines - cosines[:, None]).masked_fill(~is_ordered, -torch.inf)
    return torch.cat([differences.new_zeros(1), differences.flatten()]).logsumexp(dim=0)


def _cosent_of_split(cosines: npt.NDArray[np.float64], scores: Targets) -> float:
    """Return the same as :func:`_cosent`, in O(N log N)."""
    order = np.argsort(scores, kind="stable")
    scaled, ordered = _SCALE * cosines[order], scores[order]
    above = np.append(np.logaddexp.accumulate(-scaled[::-1])[::-1], -np.inf)  # of the rows from each place on
    terms = scaled + above[np.searchsorted(ordered, ordered, side="right")]
    return float(np.logaddexp.reduce(np.append(terms, 0.0)))


def _unit(judged: Sequence[Any]) -> npt.NDArray[np.float32]:
    """Return embeddings (N, T, D), normalised to unit length."""
    vectors = np.stack(judged)
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12))


def _cosines(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Return the cosine of the first two texts of each row, (N,)."""
    return np.asarray((vectors[:, 0].astype(np.float64) * vectors[:, 1]).sum(axis=-1))


def _ranks(vectors: npt.NDArray[np.float32], digests: Targets) -> tuple[Targets, npt.NDArray[np.float64]]:
    """Rank the second text of each row among all distinct texts of a split, without its column of anchors.

    Other texts that belong to the same anchor are left out, and so is the anchor itself. Ties get the worst rank.

    Args:
        vectors: embeddings of unit length, shape (N, T, D).
        digests: digests of the texts, shape (N, T).

    Returns:
        Ranks of the right text, from 1, and its cross-entropies, both (N,).
    """
    anchors, others = digests[:, 0], digests[:, 1:].flatten()
    distinct, first = np.unique(others, return_index=True)
    table = vectors[:, 1:].reshape(len(others), -1)[first]
    absent = np.flatnonzero(distinct == _ABSENT)
    places = np.searchsorted(distinct, digests[:, 1])
    belonging: dict[int, list[int]] = {}
    for anchor, place in zip(anchors.tolist(), places.tolist(), strict=True):
        belonging.setdefault(anchor, []).append(place)
    for anchor in belonging:
        place = int(np.searchsorted(distinct, anchor))
        belonging[anchor] += [place] if place < len(distinct) and distinct[place] == anchor else []
    ranks, losses = np.empty(len(anchors), dtype=np.int64), np.empty(len(anchors))
    for rows in _blocks(len(anchors), len(distinct)):
        cosines = (vectors[rows, 0] @ table.T).astype(np.float64)
        own = cosines[np.arange(len(rows)), places[rows]]
        cosines[:, absent] = -np.inf
        for row, anchor in enumerate(anchors[rows].tolist()):
            cosines[row, belonging[anchor]] = -np.inf
        ranks[rows] = 1 + (~(cosines < own[:, None])).sum(axis=1)  # NaN gets the worst rank
        with np.errstate(invalid="ignore"):
            losses[rows] = np.logaddexp(0.0, np.logaddexp.reduce(_SCALE * (cosines - own[:, None]), axis=1))
    return ranks, losses


def _blocks(count: int, width: int) -> Iterator[Rows]:
    """Yield row indices in blocks, so that the cosines with ``width`` texts fit into a bounded memory."""
    size = max(1, _BLOCK // max(1, width))
    for start in range(0, count, size):
        yield np.arange(start, min(start + size, count))
