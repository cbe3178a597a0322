# SPDX-License-Identifier: Apache-2.0
"""Texts -> token ids, once: what was made is cached under a key of everything that it depends on.

Shapes: N rows, T tokens of all rows together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mirrortune.atomic import alone_with, write_atomically
from mirrortune.data import Split
from mirrortune.errors import ConfigError, NoRowsError
from mirrortune.examples import IntArray, Padding, Targets, TokenExamples
from mirrortune.locations import cache_folder

# Part of the key: raise it when the same rows and tokenizer would give other tokens.
_TOKENS_VERSION = 1
_IS_CACHED = ContextVar("is_cached", default=True)


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
    """

    max_length: int | None
    for_training: bool = False
    drop_blank: bool = False
    allow_missing: bool = False
    seed: int = 0


def encode_texts(
    split: Split,
    columns: Sequence[str],
    targets: Targets,
    missing: npt.NDArray[np.bool_],
    tokenizer: Any,
    reading: Reading,
    facts: Sequence[object],
) -> TokenExamples:
    """Tokens and targets of a split with one text or a pair in each row, from the cache if it holds them.

    Args:
        split: the rows.
        columns: one or two columns of text.
        targets: one a row, shape (N, ...).
        missing: which rows have none, shape (N,).
        tokenizer: a transformers tokenizer.
        reading: what to cut and to leave out.
        facts: what else the tokens depend on: the kind of task and its version.

    Raises:
        NoRowsError: if no row is left.
    """
    assert reading.max_length is not None
    texts = [[t or "" for t in split.table.column(c).to_pylist()] for c in columns]
    blank = np.array([all(not t.strip() for t in row) for row in zip(*texts, strict=True)], dtype=bool)
    keep = np.flatnonzero(~blank) if reading.drop_blank else np.arange(len(blank))
    if not len(keep):
        raise NoRowsError(
            split.source, f"all {len(blank)} rows are blank", fix="Name another column with --text-column"
        )
    kept = [[column[i] for i in keep] for column in texts]
    max_length = reading.max_length
    key = cache_key(kept, tokenizer, [*facts, max_length])
    arrays, counts = cached_arrays(key, lambda: _tokenise(kept, tokenizer, max_length))
    return TokenExamples(
        features=arrays,
        offsets=arrays.pop("offsets"),
        targets=targets[keep],
        padding=Padding.of(tokenizer),
        max_length=max_length,
        num_truncated=counts["num_truncated"],
        num_empty=int(blank.sum()),
        num_dropped=len(blank) - len(keep),
        num_unlabelled=int(missing[keep].sum()),
    )


def encode_pairs(
    first: list[str], second: list[str], tokenizer: Any, reading: Reading, facts: Sequence[object]
) -> TokenExamples:
    """Tokens of pairs of texts without targets, from the cache if it holds them."""
    max_length = reading.max_length
    assert max_length is not None
    key = cache_key([first, second], tokenizer, [*facts, max_length])
    arrays, counts = cached_arrays(key, lambda: _tokenise([first, second], tokenizer, max_length))
    return TokenExamples(
        features=arrays, offsets=arrays.pop("offsets"), targets=None, padding=Padding.of(tokenizer),
        max_length=max_length, num_truncated=counts["num_truncated"],
    )  # fmt: skip


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


def cached_arrays(
    key: str, make: Callable[[], tuple[dict[str, IntArray], dict[str, int]]]
) -> tuple[dict[str, IntArray], dict[str, int]]:
    """The arrays and counts that ``make`` returns, from the cache if it holds them whole under ``key``."""
    if not _IS_CACHED.get():
        return make()
    path = cache_folder() / "tokens" / key[:2] / f"{key}.safetensors"
    found = _read_arrays(path)
    if found is not None:
        return found
    with alone_with(path):  # the processes of a run want the same rows: one makes them
        found = _read_arrays(path)
        if found is not None:
            return found
        arrays, counts = make()

        def write(target: Path) -> None:
            save_file(arrays, target, {name: str(count) for name, count in counts.items()})

        write_atomically(path, write, optional=True)
    return arrays, counts


def _read_arrays(path: Path) -> tuple[dict[str, IntArray], dict[str, int]] | None:
    """What the cache holds, or None when it is absent or damaged."""
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return arrays, {name: int(count) for name, count in file.metadata().items()}
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def cache_key(texts: Sequence[Sequence[str]], tokenizer: Any, facts: Sequence[object]) -> str:
    """A digest of columns of texts, of how ``tokenizer`` reads them, and of ``facts`` (JSON data)."""
    if not _IS_CACHED.get():
        return ""
    digest = hashlib.sha256()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # its description tells how it was last called, which the next call overrules
        backend.no_truncation()
        backend.no_padding()
    description = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    known = [_TOKENS_VERSION, *facts, type(tokenizer).__name__]
    known += [tokenizer.truncation_side, list(tokenizer.model_input_names)]
    digest.update(json.dumps(known).encode())
    digest.update(description.encode())
    for column in texts:
        array = pa.array(column, pa.large_string())
        for buffer in array.buffers():
            if buffer is not None:
                digest.update(buffer)
        digest.update(str(len(column)).encode())
    return digest.hexdigest()


@contextmanager
def uncached() -> Iterator[None]:
    """Within, in this thread: nothing is looked up in the cache or put there."""
    token = _IS_CACHED.set(False)
    try:
        yield
    finally:
        _IS_CACHED.reset(token)


def ragged(rows: Sequence[Sequence[int]]) -> tuple[IntArray, IntArray]:
    """Rows end to end as int32, shape (T,), and their offsets, shape (N + 1,)."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    flat = np.concatenate([np.asarray(row, dtype=np.int32) for row in rows])
    return flat, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _tokenise(
    texts: list[list[str]], tokenizer: Any, max_length: int, chunk: int = 4096
) -> tuple[dict[str, IntArray], dict[str, int]]:
    names = [n for n in tokenizer.model_input_names if n in ("input_ids", "token_type_ids")]
    parts: dict[str, list[list[int]]] = {n: [] for n in names}
    truncated = 0
    for start in range(0, len(texts[0]), chunk):
        batch = [column[start : start + chunk] for column in texts]
        encoded = tokenizer(*batch, truncation=False, verbose=False, return_attention_mask=False)
        rows = {n: list(encoded[n]) for n in names}
        long = [i for i, ids in enumerate(rows["input_ids"]) if len(ids) > max_length]
        if long:  # only these are tokenised again: most rows are short, and counting needs their whole length
            again = [[column[i] for i in long] for column in batch]
            cut = tokenizer(*again, truncation=True, max_length=max_length, return_attention_mask=False)
            for position, i in enumerate(long):
                for name in names:
                    rows[name][i] = cut[name][position]
        truncated += len(long)
        for name in names:
            parts[name] += rows[name]
    arrays = {name: ragged(rows)[0] for name, rows in parts.items()}
    return {**arrays, "offsets": ragged(parts["input_ids"])[1]}, {"num_truncated": truncated}
