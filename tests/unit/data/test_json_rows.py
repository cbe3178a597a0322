# SPDX-License-Identifier: Apache-2.0
"""An array that is read element by element is the one that json.loads reads, wherever the text is cut into blocks."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mirrortune.data.files.json_rows import JSONArrayError, array_elements
from mirrortune.data.files.readers import read_table

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
# What may follow a value or stand in one, by which a change of a text most often makes it no JSON.
MARKS = st.sampled_from([*list(',:[]{}"\\ \n\t0123456789.eE+-'), "NaN", "-Infinity", "true", "nul", "\\ud83d", "é"])


def blocks(text: str, size: int) -> Iterator[str]:
    """The text in pieces of so many characters."""
    return (text[i : i + size] for i in range(0, len(text), size))


def outcome(read: Any) -> str:
    """The values (NaN is not equal to itself, its writing is), or the line of what is wrong."""
    try:
        return repr(read())
    except JSONArrayError as error:
        return f"{error} in line {error.line}"
    except json.JSONDecodeError as error:
        return f"{error.msg} in line {error.lineno}"


@given(st.lists(VALUES, max_size=6), st.integers(1, 40), st.sampled_from([None, 1]), st.booleans())
@example([1.5e30, float("nan"), float("-inf"), 10**20, "\ud83d\ude00"], 1, None, True)
def test_elements_are_those_of_the_library(rows: list[Any], size: int, indent: int | None, is_ascii: bool) -> None:
    text = json.dumps(rows, indent=indent, ensure_ascii=is_ascii)

    assert outcome(lambda: [value for value, _ in array_elements(blocks(text, size))]) == repr(json.loads(text))


@given(st.lists(VALUES, max_size=4), st.data(), st.integers(1, 40))
@example([1], None, 3)
def test_what_is_wrong_is_what_the_library_says(rows: list[Any], data: Any, size: int) -> None:
    text = json.dumps(rows, indent=1) + " \n"
    if data is not None:
        place = data.draw(st.integers(1, len(text)))
        text = text[:place] + data.draw(MARKS) + text[place + data.draw(st.integers(0, 2)) :]

    assert outcome(lambda: [value for value, _ in array_elements(blocks(text, size))]) == outcome(
        lambda: json.loads(text)
    )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_an_array_is_read_whatever_its_bytes(tmp_path: Path, encoding: str, is_packed: bool) -> None:
    text = '\r\n [\r\n {"text": "café", "n": NaN},{"text": null, "n": 1e999}\n]\n'
    path = tmp_path / ("rows.json.gz" if is_packed else "rows.json")
    data = text.encode(encoding)
    path.write_bytes(gzip.compress(data) if is_packed else data)

    rows = read_table(path, encoding.removesuffix("-sig")).to_pylist()

    assert [row["text"] for row in rows] == ["café", None]
    assert str([row["n"] for row in rows]) == "[nan, inf]"


def test_an_array_is_never_held_whole(tmp_path: Path) -> None:
    row = json.dumps({"text": "x" * 2_000_000})
    path = tmp_path / "rows.json"
    path.write_text(f"[{', '.join([row] * 40)}]")
    tracemalloc.start()

    with path.open(encoding="utf-8") as file:
        total = sum(size for _, size in array_elements(iter(lambda: file.read(1 << 20), "")))

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 40 * len(row)
    assert peak < 16e6, f"{peak / 1e6:.0f} MB of {total / 1e6:.0f}"
