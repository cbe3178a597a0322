# SPDX-License-Identifier: Apache-2.0
"""Rows -> token ids, once: the result is cached under a key of everything that it depends on.

Sequences are kept unpadded, end to end, with offsets; padding belongs to batches (``batching.py``).
Shapes: N rows, T tokens of all rows together.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mirrortune.atomic import write_atomically
from mirrortune.data import Split
from mirrortune.errors import ConfigError, DataError
from mirrortune.locations import cache_folder
from mirrortune.tasks import Targets, Task

IntArray = npt.NDArray[np.integer[Any]]
# Part of the key: raise it when the same rows and tokenizer would give other tokens.
_TOKENS_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """The features of one split.

    Attributes:
        features: name -> values of all rows end to end, shape (T,), int32 (``input_ids``, and ``token_type_ids`` if
            any).
        offsets: shape (N + 1,), int64; row i is [offsets[i], offsets[i + 1]).
        targets: shape (N,).
        num_truncated: rows cut to the maximum length.
        num_empty: rows whose texts are all blank.
        num_dropped: blank rows that were left out.
    """

    features: dict[str, IntArray]
    offsets: IntArray
    targets: Targets
    num_truncated: int
    num_empty: int
    num_dropped: int

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def lengths(self) -> IntArray:
        """Tokens of each row, shape (N,)."""
        return np.diff(self.offsets)


def encode_split(
    split: Split,
    task: Task,
    tokenizer: Any,
    *,
    max_length: int,
    drop_blank: bool,
    allow_missing_targets: bool = False,
) -> Encoded:
    """Tokens and targets of a split, from the cache if it holds them.

    Args:
        split: the rows.
        task: names the columns and reads the targets.
        tokenizer: a transformers tokenizer.
        max_length: longest sequence, in tokens, special ones included; longer rows are truncated and counted.
        drop_blank: leave out rows whose texts are empty or white space (they are counted in any case).
        allow_missing_targets: keep rows without a label (a test split).

    Raises:
        DataError: a text column that is missing, labels that do not fit, or no row left.
    """
    check_columns(split, task)
    targets = task.targets(split.table, split.source, allow_missing=allow_missing_targets)
    texts = [[t or "" for t in split.table.column(c).to_pylist()] for c in task.text_columns]
    blank = np.array([all(not t.strip() for t in row) for row in zip(*texts, strict=True)], dtype=bool)
    keep = np.flatnonzero(~blank) if drop_blank else np.arange(len(blank))
    if not len(keep):
        raise DataError(split.source, f"all {len(blank)} rows are blank", fix="Name another column with --text-column")
    kept = [[column[i] for i in keep] for column in texts]
    key = _cache_key(kept, task, tokenizer, max_length)
    features, offsets, truncated = _cached_tokens(key, kept, tokenizer, max_length)
    return Encoded(
        features=features,
        offsets=offsets,
        targets=targets[keep],
        num_truncated=truncated,
        num_empty=int(blank.sum()),
        num_dropped=len(blank) - len(keep),
    )


def check_columns(split: Split, task: Task) -> None:
    """Refuse a split that lacks a column of the task; DataError with the columns that it has."""
    for kind, column in [*(("text", c) for c in task.text_columns), ("label", task.label_column)]:
        if column not in split.table.column_names:
            raise DataError(
                split.source, f"it has no {kind} column '{column}'", allowed=", ".join(split.table.column_names)
            )


def resolve_max_length(asked: int | None, tokenizer: Any, config: Any) -> int:
    """The sequence length: what was asked for if the model can take it, else the model's own limit (at most 512).

    Raises:
        ConfigError: if ``asked`` is above what the tokenizer says the model takes.
    """
    stated = getattr(tokenizer, "model_max_length", None)
    positions = getattr(config, "max_position_embeddings", None)
    # Tokenizers without a limit state an astronomical one; the model's table of positions is the next best fact.
    limit = stated if isinstance(stated, int) and stated < 1_000_000 else positions
    if asked is None:
        return min(limit or 512, 512)
    if limit is not None and asked > limit:
        raise ConfigError(
            "data.max_length", f"got {asked}, the model takes at most {limit} tokens", allowed=f"4 to {limit}"
        )
    return asked


def _cached_tokens(
    key: str, texts: list[list[str]], tokenizer: Any, max_length: int
) -> tuple[dict[str, IntArray], IntArray, int]:
    path = cache_folder() / "tokens" / key[:2] / f"{key}.safetensors"
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            truncated = int(file.metadata()["num_truncated"])
        return arrays, arrays.pop("offsets"), truncated
    except (OSError, SafetensorError, KeyError, ValueError):
        pass  # absent or damaged: make it (anew)
    features, offsets, truncated = _tokenise(texts, tokenizer, max_length)
    metadata = {"num_truncated": str(truncated)}

    def write(target: Path) -> None:
        save_file({**features, "offsets": offsets}, target, metadata)

    write_atomically(path, write, optional=True)
    return features, offsets, truncated


def _tokenise(
    texts: list[list[str]], tokenizer: Any, max_length: int, chunk: int = 4096
) -> tuple[dict[str, IntArray], IntArray, int]:
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
    lengths = np.array([len(row) for row in parts["input_ids"]], dtype=np.int64)
    features = {n: np.concatenate([np.asarray(r, dtype=np.int32) for r in rows]) for n, rows in parts.items()}
    return features, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), truncated


def _cache_key(texts: list[list[str]], task: Task, tokenizer: Any, max_length: int) -> str:
    digest = hashlib.sha256()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # its description tells how it was last called, which the next call overrules
        backend.no_truncation()
        backend.no_padding()
    description = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    facts = [_TOKENS_VERSION, task.kind, task.version, max_length, type(tokenizer).__name__]
    facts += [tokenizer.truncation_side, list(tokenizer.model_input_names)]
    digest.update(json.dumps(facts).encode())
    digest.update(description.encode())
    for column in texts:
        array = pa.array(column, pa.large_string())
        for buffer in array.buffers():
            if buffer is not None:
                digest.update(buffer)
        digest.update(str(len(column)).encode())
    return digest.hexdigest()
