# SPDX-License-Identifier: Apache-2.0
"""Text files of any encoding, packed by gzip or not, line by line or block by block; with the place of a byte that is
wrong.
"""

from __future__ import annotations

import codecs
import gzip
import io
import itertools
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mirrortune.errors import DataError

_BLOCK = 1 << 20  # characters, or bytes
_SAMPLE, _SHOWN = 256, 60  # bytes that show an encoding; characters of a line in a message
# The longer mark first: that of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
_LATIN = ("latin-1", "latin1", "iso-8859-1", "iso8859-1", "l1")
_CONTROLS = re.compile("[\x80-\x9f]")
_LONGEST = 1 << 28  # characters of a line


def lines_of(path: Path, encoding: str, newline: str) -> Iterator[str]:
    """The lines of a file with their ends, those of Windows as everybody else's; ``newline`` as for :func:`open`.

    Not by str.splitlines, which also breaks at characters that occur in prose (U+2028, U+0085, form feed).

    Raises:
        DataError: unknown encoding, bytes that it does not have, a broken gzip file.
    """
    is_latin = encoding.lower().replace("_", "-") in _LATIN
    with _text(path, encoding, newline) as text:
        number = 0
        while line := text.readline(_LONGEST):
            number += 1
            if len(line) == _LONGEST:  # an archive of a few kilobytes may hold a line that no memory does
                raise DataError(f"{path}:{number}", f"a line of more than {_LONGEST:,} characters", fix="Break it up")
            if is_latin:
                _refuse_controls(path, encoding, line, number)
            yield line.replace("\r\n", "\n")


def blocks_of(path: Path, encoding: str, size: int = _BLOCK) -> Iterator[str]:
    """The text of a file, ``size`` characters at a time; DataError as of :func:`lines_of`."""
    is_latin, line = encoding.lower().replace("_", "-") in _LATIN, 1
    with _text(path, encoding, "") as text:
        while block := text.read(size):
            if is_latin:
                _refuse_controls(path, encoding, block, line)
                line += block.count("\n")
            yield block


def _refuse_controls(path: Path, encoding: str, text: str, line: int) -> None:
    """Refuse control characters in Latin-1, which are punctuation in the encoding that is meant; ``text`` begins in
    ``line``.
    """
    control = _CONTROLS.search(text)
    if control is not None:
        raise DataError(
            f"{path}:{line + text.count(chr(10), 0, control.start())}",
            f"byte 0x{ord(control[0]):02x} is a control character in {encoding}",
            fix="Set data.encoding=cp1252, where such bytes are quotation marks and dashes",
        )


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
def _text(path: Path, encoding: str, newline: str) -> Iterator[io.TextIOWrapper]:
    codec = "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding
    if codec == "utf-8-sig":
        _refuse_wide(path, encoding)
    try:
        with unpacking(path), open_bytes(path) as file, io.TextIOWrapper(file, codec, newline=newline) as text:
            yield text
    except LookupError as error:
        raise DataError(
            "data.encoding", f"unknown encoding '{encoding}'", allowed="a Python codec such as latin-1"
        ) from error
    except UnicodeError as error:
        raise _undecodable(path, encoding, codec) from error


def _refuse_wide(path: Path, encoding: str) -> None:
    """Refuse a file of two or four bytes a character: the zero bytes of its letters are characters in UTF-8 too."""
    with unpacking(path), open_bytes(path) as file:
        wide = _wide_encoding(file.read(_SAMPLE))
    if wide is not None:
        raise DataError(
            f"{path}:1", f"it is not {encoding}", fix=f"Save the file as UTF-8, or set data.encoding={wide}"
        )


def _undecodable(path: Path, encoding: str, codec: str) -> DataError:
    """The error for a file with bytes that ``codec`` does not know; looks for their place."""
    decoder = codecs.getincrementaldecoder(codec)()
    place, line, found, text = 0, 1, f"it is not {encoding}", b""
    with open_bytes(path) as file:
        for block in itertools.chain(iter(lambda: file.read(_BLOCK), b""), [b""]):
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                start = place - (len(error.object) - len(block)) + error.start  # it holds the end of the last block too
                line += error.object.count(b"\n", 0, error.start)
                found = f"byte 0x{error.object[error.start]:02x} at offset {start} is not {encoding}"
                text = error.object[error.object.rfind(b"\n", 0, error.start) + 1 :].split(b"\n", 1)[0]
                break
            except UnicodeError:
                break
            place, line = place + len(block), line + block.count(b"\n")
    return DataError(f"{path}:{line}", found, fix=_encoding_advice(path, codec, text))


def _encoding_advice(path: Path, codec: str, line: bytes) -> str:
    """What to do about a file that is not in ``codec``, judged by its bytes; ``line`` is the first one that shows it.

    Advice that decodes but gives other characters than the author's is worse than none, so that the line is shown as it
    would be read.
    """
    with open_bytes(path) as file:
        begin = file.read(_BLOCK)
    if (wide := _wide_encoding(begin)) is not None:
        return f"Save the file as UTF-8, or set data.encoding={wide}"
    decoded = begin.decode("utf-8", errors="replace")
    broken = decoded.count("\ufffd")
    if codec == "utf-8-sig" and sum(character > "\x7f" for character in decoded) > 2 * broken:
        return "Most of the file is UTF-8: correct this line in it"
    try:
        shown = line.decode("cp1252").strip()
        begin.decode("cp1252")
    except UnicodeDecodeError:
        return "Save the file as UTF-8, or name its own encoding with data.encoding, such as cp1251, shift_jis, gb18030"
    if len(shown) > _SHOWN:
        bad = max(0, next((i for i, character in enumerate(shown) if ord(character) > 127), 0) - _SHOWN // 2)
        shown = f"...{shown[bad : bad + _SHOWN]}..."
    return (
        f"Save the file as UTF-8, or, if the line should read {shown!r}, set data.encoding=cp1252; "
        "other encodings have other names, such as cp1251 or shift_jis"
    )


def _wide_encoding(begin: bytes) -> str | None:
    """The encoding of two or four bytes a character that the first bytes of a file show, by their mark or by the zero
    bytes of the first characters (which are of ASCII in every header line).
    """
    for mark, name in _MARKS:
        if begin.startswith(mark):
            return name
    sample = begin[:_SAMPLE]
    if len(sample) < 8 or 3 * sample.count(0) < len(sample):
        return None
    zeros = [sum(byte == 0 for byte in sample[first::4]) > len(sample) // 8 for first in range(4)]
    known = {
        (False, True, True, True): "utf-32-le", (True, True, True, False): "utf-32-be",
        (False, True, False, True): "utf-16-le", (True, False, True, False): "utf-16-be",
    }  # fmt: skip
    return known.get((zeros[0], zeros[1], zeros[2], zeros[3]))
