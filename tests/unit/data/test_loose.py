# SPDX-License-Identifier: Apache-2.0
"""Images and recordings to predict that lie loose in a folder."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from mirrortune.data.files.arrow import refuse_unreadable
from mirrortune.data.loose import read_loose_files, read_stdin
from mirrortune.errors import DataError
from mirrortune.system.paths import DataPlace


def test_what_is_left_out_of_a_folder_is_counted(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for name in ("one.png", "notes.md", ".hidden", "more/two.png"):
        (tmp_path / name).write_bytes(b"")

    found = read_loose_files(DataPlace.parse(str(tmp_path)))

    assert found is not None
    (split,) = found.splits.values()
    assert split.table.column("image").to_pylist() == ["one.png"]
    assert split.remarks == ("1 file left out: no image", "1 folder left out; predict each by itself")


def test_a_column_of_standard_input_is_reported_by_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the temporary file to which the input is copied."""
    monkeypatch.setenv("MIRRORTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"id": 1, "text": "awful"}\n{"id": 2, "text": 5}\n'))
    )

    data, is_bare = read_stdin("utf-8")

    table = data.splits["test"].table
    assert not is_bare
    assert table.column("id").to_pylist() == [1, 2]
    with pytest.raises(DataError, match=r"^standard input:\d: column 'text' "):
        refuse_unreadable(table, ["text"])


@pytest.mark.parametrize("given", [b"", b"\xef\xbb\xbf", None], ids=["nothing", "byte order mark", "closed"])
def test_empty_standard_input_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: bytes | None) -> None:
    monkeypatch.setenv("MIRRORTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", None if given is None else io.TextIOWrapper(io.BytesIO(given)))
    with pytest.raises(DataError, match="it is empty"):
        read_stdin("utf-8")
