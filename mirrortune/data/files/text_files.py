# SPDX-License-Identifier: Apache-2.0
"""Read text files of any encoding, gzipped or not, by lines or blocks; errors name the line of a bad byte."""

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
from shlex import quote
from typing import Any

from mirrortune.errors import DataError, first_line

_BLOCK = 1 << 20  # characters, or bytes
_SAMPLE, _SHOWN = 256, 60  # bytes that show an encoding; characters of a line in a message
# Longer marks first: that of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
# First bytes of files that are no text: what they are, and what to do.
_OTHER_CONTENT = (
    (b"\x1f\x8b", "gzip", "Add .gz to its name"),
    (b"PK\x03\x04", "a zip archive or an Excel workbook", "Unpack it, or export its table as csv"),
    (b"PAR1\x15", "parquet", "Name it .parquet"), (b"ARROW1\x00", "Arrow", "Name it .arrow"),
    (b"BZh91AY&SY", "bzip2", "Unpack it"), (b"\xfd7zXZ\x00", "xz", "Unpack it"),
    (b"\x28\xb5\x2f\xfd", "zstd", "Unpack it"),
    (b"SQLite format 3\x00", "an SQLite database", "Export its table as csv"),
)  # fmt: skip
_LATIN = ("latin-1", "latin1", "iso-8859-1", "iso8859-1", "l1")
_CONTROLS = re.compile("[\x80-\x9f]")
_LONGEST = 1 << 28  # characters of a line


def lines_of(path: Path, encoding: str, newline: str) -> Iterator[str]:
    """Yield the lines of a file with their ends, CRLF as LF; ``newline`` as for :func:`open`.

    ``str.splitlines`` is not used, because it also splits at characters that occur in prose
    (U+2028, U+0085, form feed).

    Raises:
        DataError: if the encoding is unknown, the file is not in it, or it is a damaged gzip file.
    """
    is_latin = encoding.lower().replace("_", "-") in _LATIN
    with _text(path, encoding, newline) as text:
        number = 0
        while line := text.readline(_LONGEST):
            number += 1
            if len(line) == _LONGEST:  # a few kilobytes of gzip may hold a line larger than memory
                raise DataError(f"{path}:{number}", f"a line of more than {_LONGEST:,} characters", fix="Break it up")
            if is_latin:
                _refuse_controls(path, encoding, line, number)
            yield line.replace("\r\n", "\n")


def blocks_of(path: Path, encoding: str) -> Iterator[str]:
    """Yield the text of a file, :data:`_BLOCK` characters at a time; raises as :func:`lines_of`."""
    is_latin, line = encoding.lower().replace("_", "-") in _LATIN, 1
    with _text(path, encoding, "") as text:
        while block := text.read(_BLOCK):
            if is_latin:
                _refuse_controls(path, encoding, block, line)
                line += block.count("\n")
            yield block


def _refuse_controls(path: Path, encoding: str, text: str, line: int) -> None:
    """Raise a DataError for control characters in Latin-1, which are punctuation in cp1252.

    ``line`` is the line at which ``text`` begins.
    """
    control = _CONTROLS.search(text)
    if control is not None:
        raise DataError(
            f"{path}:{line + text.count(chr(10), 0, control.start())}",
            f"byte 0x{ord(control[0]):02x} is a control character in {encoding}",
            fix="Set data.encoding=cp1252, where such bytes are quotation marks and dashes",
        )


def is_gzipped(path: Path) -> bool:
    """Return whether a file is gzipped, by its name."""
    return path.suffix.lower() == ".gz"


def is_unicode(text: str) -> bool:
    """Return whether a text consists of characters: JSON may hold halves of surrogate pairs."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def open_bytes(path: Path) -> Any:
    """Open a file for reading, decompressed if it is gzipped."""
    return gzip.open(path) if is_gzipped(path) else path.open("rb")


@contextmanager
def reading_errors(path: Path) -> Iterator[None]:
    """Raise errors of reading or decompressing a file as a DataError."""
    try:
        yield
    except PermissionError as error:
        raise not_permitted(path) from error
    except (OSError, EOFError, zlib.error) as error:
        problem = "not a whole gzip file" if is_gzipped(path) else "it cannot be read"
        raise DataError(str(path), f"{problem} ({first_line(error)})", fix="Copy or download it again") from error


def not_permitted(path: Path) -> DataError:
    """Return the error for a file that this user may not read."""
    return DataError(
        str(path), "it may not be read (permission denied)", fix=f"Permit it: chmod u+r {quote(str(path))}"
    )


@contextmanager
def _text(path: Path, encoding: str, newline: str) -> Iterator[io.TextIOWrapper]:
    try:
        codecs.lookup(encoding)
    except (LookupError, ValueError) as error:
        raise _unknown(encoding) from error
    _refuse_other_content(path)
    codec = "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding
    if codec == "utf-8-sig":
        _refuse_wide(path, encoding)
    try:
        with reading_errors(path), open_bytes(path) as file, io.TextIOWrapper(file, codec, newline=newline) as text:
            yield text
    except LookupError as error:  # of a codec that is not of texts
        raise _unknown(encoding) from error
    except UnicodeError as error:
        raise _undecodable(path, encoding, codec) from error


def _unknown(encoding: str) -> DataError:
    return DataError("data.encoding", f"unknown encoding '{encoding[:100]}'", allowed="a Python codec such as latin-1")


def _refuse_other_content(path: Path) -> None:
    """Raise a DataError for a file that is no text, whatever its name."""
    with reading_errors(path), open_bytes(path) as file:
        begin = file.read(16)
    for mark, what, fix in _OTHER_CONTENT:
        if begin.startswith(mark):
            raise DataError(str(path), f"its content is not text but {what}", fix=fix)


def _refuse_wide(path: Path, encoding: str) -> None:
    """Raise a DataError for UTF-16 or UTF-32, whose zero bytes are also valid in UTF-8."""
    with reading_errors(path), open_bytes(path) as file:
        wide = _wide_encoding(file.read(_SAMPLE))
    if wide is not None:
        raise DataError(
            f"{path}:1", f"it is not {encoding}", fix=f"Save the file as UTF-8, or set data.encoding={wide}"
        )


def _undecodable(path: Path, encoding: str, codec: str) -> DataError:
    """Return the error for a file that ``codec`` cannot decode, with the line of the first bad byte."""
    decoder = codecs.getincrementaldecoder(codec)()
    place, line, found, text = 0, 1, f"it is not {encoding}", b""
    with open_bytes(path) as file:
        for block in itertools.chain(iter(lambda: file.read(_BLOCK), b""), [b""]):
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                start = place - (len(error.object) - len(block)) + error.start  # from the last block on
                line += error.object.count(b"\n", 0, error.start)
                found = f"byte 0x{error.object[error.start]:02x} at offset {start} is not {encoding}"
                text = error.object[error.object.rfind(b"\n", 0, error.start) + 1 :].split(b"\n", 1)[0]
                break
            except UnicodeError:
                break
            place, line = place + len(block), line + block.count(b"\n")
    return DataError(f"{path}:{line}", found, fix=_encoding_advice(path, codec, text))


def _encoding_advice(path: Path, codec: str, line: bytes) -> str:
    """Return advice for a file that ``codec`` cannot decode, based on its bytes; ``line`` is the first bad one.

    Decoding to wrong characters is worse than an error, so the advice shows the line as the proposed encoding reads it.
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
    """Return the UTF-16 or UTF-32 variant of a file's first bytes, or None if they are in neither encoding.

    It is recognised by a byte order mark, or by the zero bytes of ASCII characters, of which header lines consist.
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
