# SPDX-License-Identifier: Apache-2.0
"""Texts -> token ids, chunk by chunk, through the cache of :mod:`mirrortune.token_cache`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mirrortune.data import Split
from mirrortune.errors import ConfigError, NoRowsError
from mirrortune.examples import Padding, Targets, TokenExamples
from mirrortune.token_cache import Chunk, TokenKey, cached_tokens, data_digest, ragged

_ROWS = 4096  # of a chunk


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


def encode_texts(
    split: Split,
    columns: Sequence[str],
    targets: Targets,
    missing: npt.NDArray[np.bool_],
    tokenizer: Any,
    reading: Reading,
    task: tuple[str, int],
) -> TokenExamples:
    """Tokens and targets of a split with one text or a pair in each row, from the cache if it holds them.

    Args:
        split: the rows.
        columns: one or two columns of text.
        targets: one a row, shape (N, ...).
        missing: which rows have none, shape (N,).
        tokenizer: a transformers tokenizer.
        reading: what to cut and to leave out.
        task: the kind of task and the version of its code.

    Raises:
        NoRowsError: if no row is left.
    """
    max_length = reading.max_length
    assert max_length is not None
    blank = np.array([r for c in text_chunks(split.table, columns) for r in _blank(c)], dtype=bool)
    keep = ~blank if reading.drop_blank else np.ones_like(blank)
    if not keep.any():
        raise NoRowsError(
            split.source, f"all {len(blank)} rows are blank", fix="Name another column with --text-column"
        )

    def kept() -> Iterator[list[list[str]]]:
        return select_rows(text_chunks(split.table, columns), keep)

    def make() -> Iterator[Chunk]:
        return (_tokens(chunk, tokenizer, max_length) for chunk in kept())

    key = TokenKey.of(
        reading.rows(split), data_digest(kept()), tokenizer, task=task, columns=list(columns), length=max_length
    )
    arrays, counts = cached_tokens(key, make, reading.tell)
    return TokenExamples(
        features=arrays,
        offsets=arrays.pop("offsets"),
        targets=targets[keep],
        padding=Padding.of(tokenizer),
        max_length=max_length,
        num_truncated=counts["num_truncated"],
        num_empty=int(blank.sum()),
        num_dropped=int((~keep).sum()),
        num_unlabelled=int(missing[keep].sum()),
    )


def encode_pairs(
    first: list[str], second: list[str], tokenizer: Any, reading: Reading, rows: str, task: tuple[str, int]
) -> TokenExamples:
    """Tokens of pairs of texts without targets, from the cache if it holds them; ``rows`` is for messages."""
    max_length = reading.max_length
    assert max_length is not None
    key = TokenKey.of(rows, data_digest([[first, second]]), tokenizer, task=task, length=max_length)

    def chunks() -> Iterator[Chunk]:
        for start in range(0, len(first), _ROWS):
            yield _tokens([first[start : start + _ROWS], second[start : start + _ROWS]], tokenizer, max_length)

    arrays, counts = cached_tokens(key, chunks, reading.tell)
    return TokenExamples(
        features=arrays, offsets=arrays.pop("offsets"), targets=None, padding=Padding.of(tokenizer),
        max_length=max_length, num_truncated=counts["num_truncated"],
    )  # fmt: skip


def text_chunks(table: pa.Table, columns: Sequence[str]) -> Iterator[list[list[str]]]:
    """Columns of text, a few thousand rows at a time; "" where a cell is null."""
    for batch in table.select(list(columns)).to_batches(max_chunksize=_ROWS):
        yield [[t or "" for t in batch.column(i).to_pylist()] for i in range(len(columns))]


def select_rows(chunks: Iterator[list[list[Any]]], keep: npt.NDArray[np.bool_]) -> Iterator[list[list[Any]]]:
    """The rows of columns in chunks for which ``keep`` (N,) is true; chunks of which none is left are left out."""
    start = 0
    for chunk in chunks:
        flags = keep[start : start + len(chunk[0])]
        start += len(flags)
        if flags.all():
            yield chunk
        elif flags.any():
            yield [[value for value, use in zip(column, flags, strict=True) if use] for column in chunk]


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


def _blank(chunk: list[list[str]]) -> list[bool]:
    return [all(not text.strip() for text in row) for row in zip(*chunk, strict=True)]


def _tokens(texts: list[list[str]], tokenizer: Any, max_length: int) -> Chunk:
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
