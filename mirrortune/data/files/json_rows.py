# SPDX-License-Identifier: Apache-2.0
"""The elements of a JSON array one by one, by the standard library's own scanner, while the text is read.

Not by a library that streams JSON: those refuse NaN and Infinity, which Python itself writes, or give other numbers
than :func:`json.loads`. ``JSONDecoder.raw_decode`` reads one value where it stands; what is here only finds where that
is, and reads on where the text that is held ends within a value.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

_SPACE = " \t\n\r"
# An error so near the end of the text that is held may be a value of which more is to come: "-Infinit", "\ud83d\ude0".
_NEAR_END = 16
_LONGEST = 1 << 28  # characters of a value
_DECODER = json.JSONDecoder()


class JSONArrayError(ValueError):
    """What is wrong, and in which line (from 1)."""

    def __init__(self, problem: str, line: int) -> None:
        super().__init__(problem)
        self.line = line


def array_elements(blocks: Iterator[str]) -> Iterator[tuple[Any, int]]:
    """Every element of the array that a text is, with the number of its characters; as :func:`json.loads` reads it.

    Args:
        blocks: the text in pieces; one that begins with "[".

    Raises:
        JSONArrayError: where the text is no JSON.
    """
    text = _Text(blocks)
    text.skip()
    text.place += 1  # the bracket
    if text.skip() == "]":
        text.place += 1
    else:
        while True:
            begin = text.place
            value = text.value()
            yield value, text.place - begin
            after = text.skip()
            if after not in (",", "]"):
                raise text.error("Expecting ',' delimiter")
            text.place += 1
            if after == "]":
                break
            text.skip()
            text.drop()
    if text.skip():
        raise text.error("Extra data")


class _Text:
    """A text of which only a part is held: what is behind ``place``, as far as it was read."""

    def __init__(self, blocks: Iterator[str]) -> None:
        self.blocks, self.held, self.place, self.lines = blocks, "", 0, 0

    def more(self) -> bool:
        """Hold another block, or more of them: as much again, so that a long value is not begun too often."""
        parts, size = [self.held], 0
        for block in self.blocks:
            parts.append(block)
            size += len(block)
            if size >= len(self.held) - self.place:
                break
        self.held = "".join(parts)
        return size > 0

    def skip(self) -> str:
        """Go on to what is not white space; it, or "" at the end of the text."""
        while True:
            while self.place < len(self.held) and self.held[self.place] in _SPACE:
                self.place += 1
            if self.place < len(self.held):
                return self.held[self.place]
            self.drop()
            if not self.more():
                return ""

    def value(self) -> Any:
        """The value that stands at ``place``, which goes behind it."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.held, self.place)
            except json.JSONDecodeError as error:
                may_go_on = error.pos >= len(self.held) - _NEAR_END or error.msg.startswith("Unterminated string")
                if len(self.held) - self.place > _LONGEST:
                    raise self.error(f"a value of more than {_LONGEST:,} characters") from error
                if may_go_on and self.more():
                    continue
                self.place = error.pos
                raise self.error(error.msg) from error
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
                raise self.error(str(error).splitlines()[0][:160]) from error
            # A number may go on where what is held ends, behind "1" as behind "1.5e+".
            if len(self.held) - end <= 2 and not isinstance(value, str | dict | list) and self.more():
                continue
            self.place = end
            return value

    def drop(self) -> None:
        """Hold no longer what is before ``place``, if it is most of what is held."""
        if self.place * 2 > len(self.held):
            self.lines += self.held.count("\n", 0, self.place)
            self.held, self.place = self.held[self.place :], 0

    def error(self, problem: str) -> JSONArrayError:
        """The error at ``place``."""
        return JSONArrayError(problem, self.lines + self.held.count("\n", 0, self.place) + 1)
