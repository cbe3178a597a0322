# SPDX-License-Identifier: Apache-2.0
"""Cache tokens under a key of everything they depend on.

Tokens are written chunk by chunk, so that neither the rows nor their tokens need to fit into memory.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from mirrortune.data.examples import IntArray
from mirrortune.errors import ConfigError
from mirrortune.system.atomic import alone_with, write_atomically
from mirrortune.system.disk import check_disk
from mirrortune.system.paths import cache_folder, is_safe_entry, json_object_or_none
from mirrortune.system.tensor_files import PlannedTensor, StoredTensor, read_headers, write_file

# Part of every key: increase it when the same rows and tokenizer would give other tokens.
_VERSION = 4
_CODES: dict[str, Any] = {"I32": np.int32, "I64": np.int64}
_IS_USED = ContextVar("is_used", default=True)
_COUNT, _DIGEST = "count.", "sha256"
_UNSAFE = "recreated: the cache entry belongs to another user, and others may write it"
_BLOCK = 1 << 20  # bytes
_MAPPED = 1 << 26  # bytes; larger arrays stay on disk and are paged in as they are used
_PLACE = ("name_or_path", "is_local", "local_files_only", "tokenizer_file")  # settings of where a tokenizer came from
_LONGEST_SHOWN = 24  # characters of a value; digests are longer

Tokens = tuple[dict[str, IntArray], dict[str, int]]
"""Concatenated arrays of some rows (``offsets`` begin at 0 in each chunk), and counts, which are summed."""
Chunk = tuple[int, dict[str, IntArray], dict[str, int]]
"""Number of rows, and their tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenKey:
    """Everything that the tokens of some rows depend on.

    Attributes:
        rows: name of the rows in messages.
        kind: of task.
        parts: values, or digests of long ones, by their names in messages.
    """

    rows: str
    kind: str
    parts: dict[str, str]

    @classmethod
    def of(cls, rows: str, data: str, tokenizer: Any, *, task: tuple[str, int], **others: object) -> TokenKey:
        """Return the key of rows with the digest ``data``; ``task`` is the kind and the version of its code, ``others``
        are JSON data.
        """
        kind, version = task
        if not _IS_USED.get():
            return cls(rows=rows, kind=kind, parts={})
        named = {name.replace("_", " "): json.dumps(value) for name, value in others.items()}
        digests = {"data": data, "tokenizer": _tokenizer_digest(tokenizer)}
        return cls(rows=rows, kind=kind, parts={**digests, **named, "task code": f"{version}.{_VERSION}"})

    @property
    def digest(self) -> str:
        """A digest of all parts."""
        return hashlib.sha256(json.dumps([self.kind, self.parts], sort_keys=True).encode()).hexdigest()

    def why_made(self) -> str:
        """Return why the cache does not hold the tokens: the parts that changed since they were last needed."""
        before = json_object_or_none(self._memory())
        if before is None:
            return "created for the first time"
        names = [n for n in {**before, **self.parts} if before.get(n) != self.parts.get(n)]
        if not names:
            return "recreated: not in the cache"
        return f"recreated: {', '.join(_change(n, before.get(n), self.parts.get(n)) for n in names)} changed"

    def remember(self) -> None:
        """Store the parts for the next :meth:`why_made`."""
        text = json.dumps(self.parts, indent=2)
        path = self._memory()
        if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != text:

            def write(file: Path) -> None:
                file.write_text(text, encoding="utf-8")

            write_atomically(path, write, optional=True)

    def _memory(self) -> Path:
        name = hashlib.sha256(f"{self.rows} {self.kind}".encode()).hexdigest()[:16]
        return cache_folder() / "tokens" / "last" / f"{name}.json"


def cached_tokens(
    key: TokenKey,
    make: Callable[[], Iterator[Chunk]],
    tell: Callable[[str], object],
    *,
    num_rows: int,
    mapped_from: int = _MAPPED,
) -> Tokens:
    """Return the arrays and counts of all chunks, from the cache if it holds them.

    Otherwise one process creates them, and other processes that need them wait.

    Args:
        key: everything that the tokens depend on.
        make: yields the chunks; called again if the cache cannot be written.
        tell: called with a line on where the tokens come from.
        num_rows: total number of rows, used with the size of the first chunk to estimate the disk space needed.
        mapped_from: arrays of at least this number of bytes stay on disk and are memory-mapped.

    Raises:
        ResourceError: if the disk has too little space.
    """
    if not _IS_USED.get():
        return _joined(make())
    path = cache_folder() / "tokens" / key.digest[:2] / f"{key.digest}.safetensors"
    found, said = _read(path, key, mapped_from), "from the cache"
    if found is None:
        with alone_with(path):
            found, said = _read(path, key, mapped_from), "from the cache, where another process has just put them"
            if found is None:
                said = key.why_made() if is_safe_entry(path) else _UNSAFE
                write_atomically(path, lambda file: _write(file, key, _with_room(make(), key, num_rows)), optional=True)
    tell(f"tokens of {key.rows}: {said}")
    key.remember()
    return found or _read(path, key, mapped_from) or _joined(make())


@contextmanager
def uncached() -> Iterator[None]:
    """Disable the cache in this thread, for reading and writing."""
    token = _IS_USED.set(False)
    try:
        yield
    finally:
        _IS_USED.reset(token)


def data_digest(chunks: Iterable[Sequence[Sequence[Any]]], types: Sequence[str] = ()) -> str:
    """Return a digest of columns of cells (text, or JSON data) of the given types, independent of how they are cut into
    chunks of rows.
    """
    is_used, columns = _IS_USED.get(), dict[int, tuple[Any, Any]]()
    for chunk in chunks:
        for number, column in enumerate(chunk if is_used else ()):
            ends, content = columns.setdefault(number, (hashlib.sha256(), hashlib.sha256()))
            texts = [None if cell is None else _as_text(cell).encode() for cell in column]
            # null is not the empty text
            ends.update(np.fromiter((-1 if text is None else len(text) for text in texts), np.int64, len(texts)))
            content.update(b"".join(text for text in texts if text))
    parts = [*(part.digest() for pair in columns.values() for part in pair), json.dumps(list(types)).encode()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def ragged(rows: Sequence[Sequence[int]]) -> tuple[IntArray, IntArray]:
    """Return rows concatenated as int32, shape (T,), and their offsets, shape (N + 1,)."""
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(np.fromiter(map(len, rows), np.int64, len(rows)), out=offsets[1:])
    return np.fromiter(itertools.chain.from_iterable(rows), np.int32, int(offsets[-1])), offsets


def _as_text(cell: Any) -> str:
    return cell if isinstance(cell, str) else json.dumps(cell, ensure_ascii=False, default=str)


def _tokenizer_digest(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # its description includes the settings of the last call, which do not matter
        backend.no_truncation()
        backend.no_padding()
    description = backend.to_str() if backend is not None else _slow_description(tokenizer)
    known = [type(tokenizer).__name__, tokenizer.truncation_side, list(tokenizer.model_input_names)]
    return hashlib.sha256((json.dumps(known) + description).encode()).hexdigest()


def _slow_description(tokenizer: Any) -> str:
    """Return what the tokens of a tokenizer written in Python depend on: its vocabulary, files and settings."""
    settings = {name: value for name, value in tokenizer.init_kwargs.items() if name not in _PLACE}
    files = {}
    for name in tokenizer.vocab_files_names:
        path = settings.pop(name, None) or getattr(tokenizer, name, None)
        if isinstance(path, str) and Path(path).is_file():
            files[name] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return json.dumps([tokenizer.get_vocab(), files, settings], sort_keys=True, default=str)


def _change(name: str, before: str | None, now: str | None) -> str:
    values = [value if value is not None else "none" for value in (before, now)]
    is_short = all(len(value) <= _LONGEST_SHOWN for value in values)
    return f"{name} ({values[0]} before, {values[1]} now)" if is_short else name


def _with_room(chunks: Iterator[Chunk], key: TokenKey, num_rows: int) -> Iterator[Chunk]:
    """Yield the chunks, after checking with the first one that the disk has space for all of them."""
    for number, chunk in enumerate(chunks):
        if not number:
            size = sum(array.nbytes for array in chunk[1].values()) * num_rows // max(1, chunk[0])
            # They are written twice: each array to its own file until its size is known, then all to one file.
            check_disk({cache_folder(): {f"tokens of {key.rows}": 2 * size}})
        yield chunk


def _shifted(chunks: Iterator[Chunk], counts: Counter[str]) -> Iterator[dict[str, IntArray]]:
    """Yield the arrays of each chunk with cumulative offsets; counts are added to ``counts``."""
    end = 0
    for number, (_, arrays, more) in enumerate(chunks):
        counts.update(more)
        offsets = arrays["offsets"] + end
        end = int(offsets[-1])
        yield {**arrays, "offsets": offsets[1:] if number else offsets}


def _write(path: Path, key: TokenKey, chunks: Iterator[Chunk]) -> None:
    """Write all chunks to one safetensors file; each array goes to a file of its own until its size is known."""
    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
        place = Path(stack.enter_context(folder))
        files: dict[str, IO[bytes]] = {}
        codes: dict[str, str] = {}
        for arrays in _shifted(chunks, counts):
            for name, values in arrays.items():
                if name not in files:
                    files[name] = stack.enter_context((place / name).open("wb"))
                    codes[name] = next(code for code, kind in _CODES.items() if values.dtype == kind)
                files[name].write(np.ascontiguousarray(values, dtype=_CODES[codes[name]]).data)
        for file in files.values():
            file.flush()
        planned = [_copied(name, codes[name], place / name) for name in files]
        digest = _digest(key, {tensor.name: tensor.source for tensor in planned if tensor.source}, counts)
        planned += [PlannedTensor(name=f"{_COUNT}{name}", code="I64", shape=(1,)) for name in counts]
        planned.append(PlannedTensor(name=_DIGEST, code="U8", shape=(len(digest),)))
        made = {f"{_COUNT}{name}": torch.tensor([count]) for name, count in counts.items()}
        made[_DIGEST] = torch.tensor(list(digest), dtype=torch.uint8)
        write_file(path, planned, lambda tensor: made[tensor.name])


def _digest(key: TokenKey, arrays: Mapping[str, StoredTensor], counts: Mapping[str, int]) -> bytes:
    """Return the SHA-256 of the whole content of an entry and of its key; reads the arrays."""
    found = []
    for name, stored in sorted(arrays.items()):
        content, left = hashlib.sha256(), stored.nbytes
        with stored.path.open("rb") as file:
            file.seek(stored.start)
            while left > 0 and (block := file.read(min(left, _BLOCK))):
                content.update(block)
                left -= len(block)
        found.append([name, stored.code, list(stored.shape), content.hexdigest()])
    return hashlib.sha256(json.dumps([key.digest, found, sorted(counts.items())]).encode()).digest()


def _copied(name: str, code: str, file: Path) -> PlannedTensor:
    """Return the array that a whole file holds."""
    size = file.stat().st_size
    shape = (size // np.dtype(_CODES[code]).itemsize,)
    source = StoredTensor(code=code, shape=shape, path=file, start=0, nbytes=size)
    return PlannedTensor(name=name, code=code, shape=shape, source=source)


def _read(path: Path, key: TokenKey, mapped_from: int) -> Tokens | None:
    """Return the entry of the cache, or None if it is absent, damaged, of another key, or not safe to read."""
    if not is_safe_entry(path):
        return None
    try:
        headers = read_headers([path])
        digest = np.fromfile(path, np.uint8, headers[_DIGEST].nbytes, offset=headers.pop(_DIGEST).start).tobytes()
        counted = {name: headers.pop(name) for name in list(headers) if name.startswith(_COUNT)}
        counts = {name.removeprefix(_COUNT): int(_array(stored, _MAPPED)[0]) for name, stored in counted.items()}
        if digest != _digest(key, headers, counts):
            return None
        arrays = {name: _array(stored, mapped_from) for name, stored in headers.items()}
    except (ConfigError, OSError, KeyError, ValueError, IndexError):
        return None
    return (arrays, counts) if "offsets" in arrays else None


def _array(stored: StoredTensor, mapped_from: int) -> IntArray:
    kind = _CODES[stored.code]
    if stored.nbytes < max(1, mapped_from):  # an empty array cannot be mapped
        found: IntArray = np.fromfile(stored.path, kind, stored.shape[0], offset=stored.start)
        return found
    return np.memmap(stored.path, kind, "r", stored.start, stored.shape).view(np.ndarray)


def _joined(chunks: Iterator[Chunk]) -> Tokens:
    counts: Counter[str] = Counter()
    parts = list(_shifted(chunks, counts))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, dict(counts)
