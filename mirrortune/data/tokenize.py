# SPDX-License-Identifier: Apache-2.0
"""Turns rows into token ids, chunk by chunk, through the cache of :mod:`mirrortune.data.token_cache`; for every kind of
task that reads text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mirrortune.data.dataset import Split
from mirrortune.data.examples import IntArray, Padding, Rows, Targets, TokenExamples
from mirrortune.data.files.row_chunks import Columns, row_chunks
from mirrortune.data.token_cache import Chunk, TokenKey, Tokens, cached_tokens, data_digest, ragged
from mirrortune.errors import ConfigError, NoRowsError


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How the rows of a split are made into examples.

    Attributes:
        max_length: longest row, in the kind's own unit (tokens, special ones included); longer rows are truncated and
            counted. None where all rows are of one size.
        for_training: the rows are learned from.
        drop_blank: leave out rows whose texts are empty or white space (they are counted in any case).
        allow_missing: keep rows without a label (a test split).
        seed: of whatever is drawn while learning from the rows.
        tell: is told whether tokens were in the cache, and if not, why.
    """

    max_length: int | None
    for_training: bool = False
    drop_blank: bool = False
    allow_missing: bool = False
    seed: int = 0
    tell: Callable[[str], object] = str

    def rows(self, split: Split) -> str:
        """What messages call the rows of ``split``."""
        return f"{split.source} ({'training' if self.for_training else 'other'} rows)"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRows:
    """Rows that have become tokens, on disk where they are many.

    Attributes:
        arrays: as they were made, rows end to end.
        counts: as they were made, added up.
        keep: rows of the split that are among them, shape (N,).
        num_blank: rows of the split that are blank.
    """

    arrays: dict[str, IntArray]
    counts: dict[str, int]
    keep: npt.NDArray[np.bool_]
    num_blank: int

    @property
    def num_dropped(self) -> int:
        """Rows that were left out."""
        return int((~self.keep).sum())

    def spread(self, flags: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """What is true of the rows that were kept, as an array of all rows of the split."""
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
    """Tokens of the rows of a split, from the cache if it holds them; the one way in which every kind makes its own.

    Neither the rows nor their tokens need to fit into memory: rows are read and made a thousand at a time, and go
    to the cache as they are made.

    Args:
        split: the rows.
        columns: all that ``make`` reads.
        tokenizer: a transformers tokenizer.
        reading: which rows to leave out, and whom to tell.
        task: the kind of task and the version of its code.
        make: cells of some rows (a list for each column) and their numbers in the split (from 0) -> arrays, counts.
        is_blank: whether a row says nothing; None where no row does.
        keep: rows that are read, shape (N,), in place of what ``is_blank`` says.
        what: more words for messages on these tokens.
        facts: whatever else the tokens depend on, as JSON data.

    Raises:
        NoRowsError: if no row is left.
        ResourceError: if the disk has no room for the tokens.
    """
    table, blank = split.table, np.zeros(split.table.num_rows, dtype=bool)
    if is_blank is not None:
        rows = (row for chunk in row_chunks(table, columns) for row in zip(*chunk, strict=True))
        blank = np.fromiter((is_blank(row) for row in rows), dtype=bool, count=len(blank))
    if keep is None:
        keep = ~blank if reading.drop_blank else np.ones_like(blank)
    if not keep.any():
        raise NoRowsError(
            split.source, f"all {len(blank)} rows are blank", fix="Name another column with --text-column"
        )
    types = [str(table.schema.field(name).type) for name in columns]
    data = data_digest(row_chunks(table, columns, keep), types)
    key = TokenKey.of(reading.rows(split) + what, data, tokenizer, task=task, columns=list(columns), **facts)

    def chunks() -> Iterator[Chunk]:
        numbers, done = np.flatnonzero(keep), 0
        for chunk in row_chunks(table, columns, keep):
            count = len(chunk[0])
            yield count, *make(chunk, numbers[done : done + count])
            done += count

    arrays, counts = cached_tokens(key, chunks, reading.tell, num_rows=int(keep.sum()))
    return TokenRows(arrays=arrays, counts=counts, keep=keep, num_blank=int(blank.sum()))


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
    """Tokens and targets of a split with one text or a pair in each row.

    Args:
        split: the rows.
        columns: one or two columns of text.
        targets: one a row, shape (N, ...), or None.
        missing: which rows have none, shape (N,).
        tokenizer: a transformers tokenizer.
        reading: what to cut and to leave out.
        task: the kind of task and the version of its code.
        prefix: put before every text of the first column.

    Returns:
        The examples, and which rows of the split they are, shape (N,).

    Raises:
        NoRowsError: if no row is left.
    """
    max_length = reading.max_length
    assert max_length is not None

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
    )
    return examples, keep


def is_blank_text(row: Sequence[Any]) -> bool:
    """Whether all texts of a row are empty, or white space, or null; a list is not."""
    return all(not (isinstance(value, list) or str(value or "").strip()) for value in row)


def pieces(texts: list[list[str]], tokenizer: Any, max_length: int) -> Tokens:
    """``input_ids`` (and ``token_type_ids``) of texts, or of pairs of them, cut to a length, and how many were."""
    names = [n for n in tokenizer.model_input_names if n in ("input_ids", "token_type_ids")]
    encoded = tokenizer(*texts, truncation=False, verbose=False, return_attention_mask=False)
    rows = {n: list(encoded[n]) for n in names}
    long = [i for i, ids in enumerate(rows["input_ids"]) if len(ids) > max_length]
    if long:  # only these are tokenised again: most rows are short, and counting needs their whole length
        again = [[column[i] for i in long] for column in texts]
        cut = tokenizer(*again, truncation=True, max_length=max_length, return_attention_mask=False)
        for position, i in enumerate(long):
            for name in names:
                rows[name][i] = cut[name][position]
    made = {name: ragged(values) for name, values in rows.items()}
    arrays = {name: flat for name, (flat, _) in made.items()}
    return {**arrays, "offsets": made["input_ids"][1]}, {"num_truncated": len(long)}


def resolve_max_length(asked: int | None, tokenizer: Any, config: Any, default: int = 512) -> int:
    """The sequence length: what was asked for if the model can take it, else the model's limit (at most ``default``).

    Raises:
        ConfigError: if ``asked`` is above what the tokenizer says the model takes.
    """
    stated = getattr(tokenizer, "model_max_length", None)
    positions = getattr(config, "max_position_embeddings", None)
    # Tokenizers without a limit state an astronomical one; the model's table of positions is the next best fact.
    limit = stated if isinstance(stated, int) and stated < 1_000_000 else positions
    if asked is None:
        return min(limit or default, default)
    if limit is not None and asked > limit:
        raise ConfigError(
            "data.max_length", f"got {asked}, the model takes at most {limit} tokens", allowed=f"4 to {limit}"
        )
    return asked
