# SPDX-License-Identifier: Apache-2.0
"""Text files of any encoding, packed by gzip or not, line by line or block by block; with the place of a byte that is
wrong.
"""

from __future__ import annotations

import codecs
import gzip
import io
import itertools
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mirrortune.errors import DataError

_BLOCK = 1 << 20  # characters, or bytes


def lines_of(path: Path, encoding: str, newline: str) -> Iterator[str]:
    """The lines of a file with their ends, those of Windows as everybody else's; ``newline`` as for :func:`open`.

    Not by str.splitlines, which also breaks at characters that occur in prose (U+2028, U+0085, form feed).

    Raises:
        DataError: unknown encoding, bytes that it does not have, a broken gzip file.
    """
    with _text(path, encoding, newline) as text:
        for line in text:
            yield line.replace("\r\n", "\n")


def blocks_of(path: Path, encoding: str, size: int = _BLOCK) -> Iterator[str]:
    """The text of a file, ``size`` characters at a time; DataError as of :func:`lines_of`."""
    with _text(path, encoding, "") as text:
        while block := text.read(size):
            yield block


def first_line(error: BaseException) -> str:
    """What an error of a library says, as far as a message can hold it."""
    return str(error).splitlines()[0][:160] if str(error) else type(error).__name__


def is_packed(path: Path) -> bool:
    """Whether a file's name says that gzip packed it."""
    return path.suffix.lower() == ".gz"


def open_bytes(path: Path) -> Any:
    """The file, unpacked while it is read."""
    return gzip.open(path) if is_packed(path) else path.open("rb")


@contextmanager
def unpacking(path: Path) -> Iterator[None]:
    """Whatever goes wrong while a file is read or unpacked as a DataError."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        problem = "not a whole gzip file" if is_packed(path) else "it cannot be read"
        raise DataError(str(path), f"{problem} ({first_line(error)})", fix="Copy or download it again") from error


@contextmanager
def _text(path: Path, encoding: str, newline: str) -> Iterator[IO[str]]:
    codec = "utf-8-sig" if encoding.lower().replace("_", "-") == "utf-8" else encoding
    try:
        with unpacking(path), open_bytes(path) as file, io.TextIOWrapper(file, codec, newline=newline) as text:
            yield text
    except LookupError as error:
        raise DataError(
            "data.encoding", f"unknown encoding '{encoding}'", allowed="a Python codec such as latin-1"
        ) from error
    except UnicodeError as error:
        raise _undecodable(path, encoding, codec) from error


def _undecodable(path: Path, encoding: str, codec: str) -> DataError:
    """The error for a file with bytes that ``codec`` does not know; looks for their place."""
    decoder = codecs.getincrementaldecoder(codec)()
    place, line, found = 0, 1, f"it is not {encoding}"
    with open_bytes(path) as file:
        for block in itertools.chain(iter(lambda: file.read(_BLOCK), b""), [b""]):
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                start = place - (len(error.object) - len(block)) + error.start  # it holds the end of the last block too
                line += error.object.count(b"\n", 0, error.start)
                found = f"byte 0x{error.object[error.start]:02x} at offset {start} is not {encoding}"
                break
            except UnicodeError:
                break
            place, line = place + len(block), line + block.count(b"\n")
    return DataError(
        f"{path}:{line}", found, fix="Save the file as UTF-8, or name its encoding with data.encoding=latin-1"
    )
