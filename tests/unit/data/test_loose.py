# SPDX-License-Identifier: Apache-2.0
"""Images and recordings to predict that lie loose in a folder."""

from __future__ import annotations

from pathlib import Path

from mirrortune.data.loose import read_loose_files
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
