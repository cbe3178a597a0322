# SPDX-License-Identifier: Apache-2.0
"""Read files of tagged words in the form of the CoNLL tasks: one word per line, blank lines between sentences.

The cells of a line are separated by tabs or spaces: the word first, its tag last, and other tags between them. Those of
CoNLL-U, the format of Universal Dependencies, are ten: number, word, lemma, two tags, and the syntax.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from mirrortune.data.files.tables import Part, line_numbers, parts_of
from mirrortune.data.files.text_files import lines_of
from mirrortune.errors import DataError, counted

_WORDS, _TAGS = "tokens", "tags"
_DOCUMENT = "-DOCSTART-"
_FACTS = re.compile(r"#\s+(id|sent_id|text|newdoc|newpar)\b")  # of the sentence below; other comments have other cells
_TAG = re.compile(r"O|[BIESLU]-\S+")
# Columns of CoNLL-U after the number of the word, as the data sets on the Hub call them; two more are not read.
_OF_TREES = ("tokens", "lemmas", "upos", "xpos", "feats", "head", "deprel")
_WIDTH = 10
_NUMBER = re.compile(r"[0-9]+([-.][0-9]+)?")
_Line = tuple[int, str]


def read_tagged_words(path: Path, encoding: str) -> Iterator[Part]:
    """Yield sentences part by part: columns ``tokens``, ``column 2`` and so on, and ``tags``, with lists of texts.

    Marks of documents (``-DOCSTART-``) and comments above a sentence (``# id ...``) are left out.

    Raises:
        DataError: a line has another number of cells than the first sentence, or an empty one; or tags precede words.
    """
    for part in parts_of(_sentences(path, encoding)):
        columns = list(zip(*(columns for _, columns in part), strict=True))
        names = _names(len(columns))
        _refuse_tags_first(path, columns)
        arrays = [pa.array(cells, type=pa.list_(pa.string())) for cells in columns]
        yield pa.table(arrays, names=names), line_numbers(part)


def read_treebank(path: Path, encoding: str) -> Iterator[Part]:
    """Yield the sentences of a CoNLL-U file part by part: columns ``tokens``, ``upos``, ``xpos`` and others, with lists
    of texts.

    Comments, lines of several words written as one (``1-2``) and empty nodes (``8.1``) are left out, and so are columns
    without annotation (``_``); ``upos`` is null for sentences without it, and elsewhere ``_`` is a value.

    Raises:
        DataError: a line has not ten cells separated by tabs, or the file holds no words.
    """
    for part in parts_of(_trees(path, encoding)):
        found = dict(zip(_OF_TREES, zip(*(columns for _, columns in part), strict=True), strict=False))
        known = {name: [None if {*row} == {"_"} else row for row in rows] for name, rows in found.items()}
        if part and not any(known[_WORDS]):
            raise DataError(
                str(path), "its words are left out ('_' in the column FORM), as in treebanks of texts with a licence",
                fix="Fill them in with the script of the treebank",
            )  # fmt: skip
        columns = {name: rows if name == "upos" else found[name] for name, rows in known.items() if any(rows)}
        arrays = [pa.array(rows, type=pa.list_(pa.string())) for rows in columns.values()]
        yield pa.table(arrays, names=list(columns)), line_numbers(part)


def _trees(path: Path, encoding: str) -> Iterator[tuple[tuple[int, list[list[str]]], int]]:
    """Yield the line, the columns and the size in characters of each sentence."""
    for block in _blocks(path, encoding):
        rows = []
        for number, line in block:
            if line.startswith("#"):
                continue
            cells = line.split("\t")
            if len(cells) != _WIDTH or not all(cells) or not _NUMBER.fullmatch(cells[0]):
                raise DataError(
                    f"{path}:{number}", f"it is not a line of CoNLL-U: {line[:60]!r}",
                    allowed=f"{_WIDTH} cells separated by tabs: the number of the word, the word, its lemma, UPOS, "
                    "XPOS and so on, with _ for what is missing",
                    fix="Correct the line, or name a file of other columns .conll",
                )  # fmt: skip
            if cells[0].isdecimal():
                rows.append((number, cells[1 : len(_OF_TREES) + 1]))
        if rows:
            columns = [list(column) for column in zip(*(cells for _, cells in rows), strict=True)]
            size = sum(len(line) for _, line in block)
            yield (rows[0][0], columns), size


def _refuse_tags_first(path: Path, columns: list[tuple[list[str], ...]]) -> None:
    """Raise a DataError for a file with the tag before the word, whose words would be its classes."""
    if len(columns) == 2 and _are_tags(columns[0]) and not _are_tags(columns[1]):
        raise DataError(
            str(path), "its tags are before the words", allowed="the word first and its tag last",
            fix=f"Swap the columns: awk 'NF {{print $2 \"\\t\" $1; next}} 1' {shlex.quote(path.name)}",
        )  # fmt: skip


def _are_tags(column: tuple[list[str], ...]) -> bool:
    return all(_TAG.fullmatch(cell) for cells in column for cell in cells)


def _names(width: int) -> list[str]:
    others = [f"column {place}" for place in range(2, width)]
    return [_WORDS, *others, _TAGS][:width] if width > 1 else [_WORDS][:width]


def _sentences(path: Path, encoding: str) -> Iterator[tuple[tuple[int, list[list[str]]], int]]:
    """Yield the line and the columns of each sentence, and its size in characters."""
    width, is_tabbed = 0, False
    for block in _blocks(path, encoding):
        if not width and _has_words(block):
            is_tabbed = "\t" in block[-1][1]
            width = len(_cells(block[-1][1], is_tabbed=is_tabbed))
        rows = _rows(path, block, width, is_tabbed=is_tabbed)
        if rows:
            size = sum(len(line) for _, line in block)
            yield (rows[0][0], [list(column) for column in zip(*(cells for _, cells in rows), strict=True)]), size


def _has_words(block: list[_Line]) -> bool:
    """Return whether a block holds more than the mark of a document, whose cells are others, and comments."""
    return not block[-1][1].startswith(_DOCUMENT) and not all(line.startswith("# ") for _, line in block)


def _cells(line: str, *, is_tabbed: bool) -> list[str]:
    # Not split at other white space: words may contain no-break spaces, or be one.
    if is_tabbed:
        return [cell.strip(" ") for cell in line.split("\t")]
    return [cell for cell in line.replace("\t", " ").split(" ") if cell]


def _blocks(path: Path, encoding: str) -> Iterator[list[_Line]]:
    """Yield the lines of each sentence, with their numbers."""
    block: list[_Line] = []
    for number, line in enumerate(lines_of(path, encoding, "\n"), start=1):
        if line.strip():
            block.append((number, line.strip("\r\n")))
        elif block:
            yield block
            block = []
    if block:
        yield block


def _rows(path: Path, block: list[_Line], width: int, *, is_tabbed: bool) -> list[tuple[int, list[str]]]:
    """Return the line and the cells of each word of a sentence."""
    rows: list[tuple[int, list[str]]] = []
    for number, line in block:
        cells = _cells(line, is_tabbed=is_tabbed)
        if line.startswith("#") and not rows and (_FACTS.match(line) or len(cells) != width):
            continue
        if cells[0] == _DOCUMENT:
            continue
        if len(cells) != width or not all(cells):
            found = "an empty cell" if len(cells) == width else f"{counted(len(cells), 'cell')} in place of {width}"
            raise DataError(
                f"{path}:{number}", f"{found} in a line of tagged words: {line[:60]!r}",
                allowed="a word and its tag, separated by a tab or by spaces as in the first sentence; blank lines "
                "between sentences", fix="Correct the line",
            )  # fmt: skip
        rows.append((number, cells))
    return rows
