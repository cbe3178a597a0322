# SPDX-License-Identifier: Apache-2.0
"""Tokenise rows in chunks, with a cache on disk; shared by all kinds of task that read text."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from mirrortune.data.columns import check_text_type
from mirrortune.data.dataset import Split
from mirrortune.data.duplicates import hashed_chunks
from mirrortune.data.examples import IntArray, Padding, Rows, Targets, TokenExamples
from mirrortune.data.files.arrow import Columns, row_chunks
from mirrortune.data.token_cache import Chunk, TokenKey, Tokens, cached_tokens, data_digest, ragged
from mirrortune.errors import ConfigError, NoRowsError


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How the rows of a split are encoded.

    Attributes:
        max_length: maximum length of a row in tokens, including special tokens; longer rows are truncated and counted.
            None for rows that are not text.
        for_training: whether the rows are training rows.
        drop_blank: leave out rows whose texts are empty or white space (they are counted in any case).
        allow_missing: keep rows without a label, as in a test split.
        seed: seed of random draws in training, such as augmentation.
        tell: called with a line that says whether the tokens came from the cache, and if not, why.
    """

    max_length: int | None
    for_training: bool = False
    drop_blank: bool = False
    allow_missing: bool = False
    seed: int = 0
    tell: Callable[[str], object] = str

    @property
    def num_tokens(self) -> int:
        """``max_length`` of rows that are text."""
        assert self.max_length is not None
        return self.max_length

    def rows(self, split: Split) -> str:
        """Return the name of the rows of ``split`` in messages."""
        return f"{split.source} ({'training' if self.for_training else 'other'} rows)"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRows:
    """Tokenised rows; large arrays are memory-mapped.

    Attributes:
        arrays: arrays returned by ``make``, concatenated over rows.
        counts: counts returned by ``make``, summed over rows.
        keep: whether each row of the split was tokenised, shape (N,).
        num_blank: number of blank rows in the split.
    """

    arrays: dict[str, IntArray]
    counts: dict[str, int]
    keep: npt.NDArray[np.bool_]
    num_blank: int

    @property
    def num_dropped(self) -> int:
        """Number of rows that were left out."""
        return int((~self.keep).sum())

    @property
    def kept_rows(self) -> Rows | None:
        """The rows that were tokenised, shape (N,); None for all rows of the split."""
        return np.flatnonzero(self.keep) if self.num_dropped else None

    def spread(self, flags: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Expand flags of the kept rows to all rows of the split, with False for the others."""
        found = np.zeros(len(self.keep), dtype=bool)
        found[self.keep] = flags
        return found


def tokenise_rows(
    split: Split,
    columns: Sequence[str],
    tokenizer: Any,
    reading: Reading,
    task: tuple[str, int],
    make: Callable[[Columns, Rows], Tokens],
    *,
    is_blank: Callable[[tuple[Any, ...]], bool] | None = None,
    keep: npt.NDArray[np.bool_] | None = None,
    what: str = "",
    facts: dict[str, object],
) -> TokenRows:
    """Tokenise the rows of a split, or read their tokens from the cache.

    Rows are read once to find blank rows and compute the cache key, and a second time only if their tokens are not in
    the cache. Neither rows nor tokens need to fit into memory: a thousand rows at a time are tokenised and written to
    the cache.

    Args:
        split: the rows.
        columns: all columns that ``make`` reads.
        tokenizer: a transformers tokenizer.
        reading: which rows to leave out, and where to report.
        task: kind of the task, and version of its code.
        make: (cells of some rows, a list for each column; indices of these rows in the split) -> arrays, counts.
        is_blank: returns whether a row is blank; None if no row can be.
        keep: rows to tokenise, shape (N,), whether blank or not.
        what: appended to the name of the rows in messages.
        facts: all other values that the tokens depend on, as JSON data.

    Raises:
        NoRowsError: no row is left.
        ResourceError: the disk has too little space for the tokens.
    """
    table = split.table
    blank, kept, digest = _scan(split, columns, is_blank, keep, drop_blank=reading.drop_blank)
    if not kept.any():
        raise NoRowsError(
            split.source, f"all {len(blank)} rows are blank", fix="Name another column with --text-column"
        )
    key = TokenKey.of(reading.rows(split) + what, digest, tokenizer, task=task, columns=list(columns), **facts)

    def chunks() -> Iterator[Chunk]:
        numbers, done = np.flatnonzero(kept), 0
        for chunk in row_chunks(table, columns, kept):
            count = len(chunk[0])
            yield count, *make(chunk, numbers[done : done + count])
            done += count

    arrays, counts = cached_tokens(key, chunks, reading.tell, num_rows=int(kept.sum()))
    return TokenRows(arrays=arrays, counts=counts, keep=kept, num_blank=int(blank.sum()))


def _scan(
    split: Split,
    columns: Sequence[str],
    is_blank: Callable[[tuple[Any, ...]], bool] | None,
    keep: npt.NDArray[np.bool_] | None,
    *,
    drop_blank: bool,
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_], str]:
    """Return which rows are blank, which are kept (both (N,)), and the digest of the kept rows.

    The same pass hashes the cells, by which duplicates are counted.
    """
    table = split.table
    blank = np.zeros(table.num_rows, dtype=bool)
    kept = np.ones_like(blank) if keep is None else keep

    def chunks() -> Iterator[Columns]:
        start = 0
        for chunk in hashed_chunks(split, columns):
            here = slice(start, start := start + len(chunk[0]))
            if is_blank is not None:
                blank[here] = [is_blank(row) for row in zip(*chunk, strict=True)]
                if keep is None and drop_blank:
                    kept[here] = ~blank[here]
            yield [list(itertools.compress(column, kept[here])) for column in chunk]

    digest = data_digest(chunks(), [str(table.schema.field(name).type) for name in columns])
    return blank, kept, digest


def joined_tokens(made: Sequence[Tokens]) -> Tokens:
    """Join the tokens of several sources, one after the other."""
    if len(made) == 1:  # large arrays stay memory-mapped
        return dict(made[0][0]), made[0][1]
    arrays = {name: np.concatenate([own[name] for own, _ in made]) for name in made[0][0] if name != "offsets"}
    ends = np.cumsum([0, *(own["offsets"][-1] for own, _ in made)])
    offsets = [own["offsets"][:-1] + end for (own, _), end in zip(made, ends, strict=False)]
    counts: Counter[str] = Counter()
    for _, own_counts in made:
        counts.update(own_counts)
    return {**arrays, "offsets": np.concatenate([*offsets, ends[-1:]])}, counts


def encode_texts(
    split: Split,
    columns: Sequence[str],
    targets: Targets | None,
    missing: npt.NDArray[np.bool_],
    tokenizer: Any,
    reading: Reading,
    task: tuple[str, int],
    prefix: str = "",
) -> tuple[TokenExamples, npt.NDArray[np.bool_]]:
    """Encode a split with one text or a pair of texts in each row.

    Args:
        split: the rows.
        columns: one or two columns of text.
        targets: targets of the rows, shape (N, ...), or None.
        missing: whether each row lacks a target, shape (N,).
        tokenizer: a transformers tokenizer.
        reading: maximum length, and which rows to leave out.
        task: the kind of task and the version of its code.
        prefix: prepended to every text of the first column.

    Returns:
        The examples, and whether each row of the split is among them, shape (N,).

    Raises:
        DataError: a column does not hold text.
        NoRowsError: if no row is left.
    """
    max_length = reading.num_tokens
    for column in columns:
        check_text_type(split.table, column, split.source)

    def make(texts: Columns, numbers: Rows) -> Tokens:
        first, *others = ([text or "" for text in column] for column in texts)
        return pieces([[prefix + text for text in first] if prefix else first, *others], tokenizer, max_length)

    facts: dict[str, object] = {"length": max_length} | ({"prefix": prefix} if prefix else {})
    made = tokenise_rows(split, columns, tokenizer, reading, task, make, is_blank=is_blank_text, facts=facts)
    arrays, keep = made.arrays, made.keep
    examples = TokenExamples(
        features=arrays,
        offsets=arrays.pop("offsets"),
        targets=None if targets is None else targets[keep],
        padding=Padding.of(tokenizer),
        max_length=max_length,
        num_truncated=made.counts["num_truncated"],
        num_empty=made.num_blank,
        num_dropped=made.num_dropped,
        num_unlabelled=int(missing[keep].sum()),
        kept=made.kept_rows,
    )
    return examples, keep


def is_blank_text(row: Sequence[Any]) -> bool:
    """Return whether all texts of a row are empty, white space or null; a list never is."""
    return all(not (isinstance(value, list) or str(value or "").strip()) for value in row)


def pieces(texts: list[list[str]], tokenizer: Any, max_length: int) -> Tokens:
    """Tokenise and truncate texts or pairs; return ``input_ids`` (and ``token_type_ids``) and the number truncated."""
    names = [n for n in tokenizer.model_input_names if n in ("input_ids", "token_type_ids")]
    cut = partial(tokenizer, truncation=True, max_length=max_length, verbose=False, return_attention_mask=False)
    if tokenizer.is_fast:
        rows = cut(*texts)
        num_truncated = sum(bool(row.overflowing) for row in rows.encodings)
    else:  # what was cut off is not known, so the long rows are tokenised again
        encoded = tokenizer(*texts, truncation=False, verbose=False, return_attention_mask=False)
        rows = {name: list(encoded[name]) for name in names}
        long = [i for i, ids in enumerate(rows["input_ids"]) if len(ids) > max_length]
        again = cut(*([column[i] for i in long] for column in texts)) if long else {}
        for position, i in enumerate(long):
            for name in names:
                rows[name][i] = again[name][position]
        num_truncated = len(long)
    made = {name: ragged(rows[name]) for name in names}
    arrays = {name: flat for name, (flat, _) in made.items()}
    return {**arrays, "offsets": made["input_ids"][1]}, {"num_truncated": num_truncated}


def resolve_max_length(asked: int | None, tokenizer: Any, config: Any, default: int = 512) -> int:
    """Return the maximum length of a row: ``asked``, or the model's limit but at most ``default``.

    Raises:
        ConfigError: ``asked`` exceeds the model's limit.
    """
    stated = getattr(tokenizer, "model_max_length", None)
    positions = getattr(config, "max_position_embeddings", None)
    # Tokenizers without a limit report a huge number; then the model's position embeddings are the limit.
    limit = stated if isinstance(stated, int) and stated < 1_000_000 else positions
    if asked is None:
        return min(limit or default, default)
    if limit is not None and asked > limit:
        raise ConfigError(
            "data.max_length", f"got {asked}, the model takes at most {limit} tokens", allowed=f"4 to {limit}"
        )
    return asked
