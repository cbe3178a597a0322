# SPDX-License-Identifier: Apache-2.0
"""Files and folders are whole or not there, and what was there before is safe."""

from __future__ import annotations

import errno
import functools
import os
import resource
import shutil
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mirrortune.errors import ResourceError
from mirrortune.system import atomic
from mirrortune.system.atomic import cannot_write, exchange, restore_missing, write_atomically

write_folder_atomically = functools.partial(atomic.write_folder_atomically, is_ours=lambda below: True)
replace_in_two_steps = functools.partial(atomic.replace_in_two_steps, is_ours=lambda below: True)


class UnforeseenError(Exception):
    """What goes wrong while writing."""


@contextmanager
def files_limited_to(num_bytes: int) -> Iterator[None]:
    """A full disk, as far as the operating system will say: no file of this process grows beyond a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names(folder: Path) -> list[str]:
    """Everything in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


def test_a_file_replaces_the_old_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    for text in ("one", "two"):
        write_atomically(path, lambda p, text=text: p.write_text(text, encoding="utf-8") and None)
        assert path.read_text(encoding="utf-8") == text
    assert names(path.parent) == ["a.txt"]


def test_files_and_folders_have_the_rights_that_the_user_wants(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a", lambda p: p.write_bytes(b"x") and None)
        write_folder_atomically(tmp_path / "b", lambda p: (p / "c").write_bytes(b"x") and None)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o750


def test_files_of_a_folder_can_be_read_by_those_who_may_read_the_folder(tmp_path: Path) -> None:
    """safetensors creates files that only their owner can read, and teammates resume and copy runs."""

    def write(folder: Path) -> None:
        (folder / "below").mkdir()
        for name in ("private.safetensors", "below/private.safetensors"):
            save_file({"a": torch.zeros(1)}, folder / name)
            (folder / name).chmod(0o600)
        (folder / "link").symlink_to(tmp_path / "elsewhere")

    (tmp_path / "elsewhere").write_bytes(b"")
    (tmp_path / "elsewhere").chmod(0o600)
    before = os.umask(0o027)
    try:
        write_folder_atomically(tmp_path / "a", write)
    finally:
        os.umask(before)
    found = [(tmp_path / name).stat().st_mode for name in ("a/private.safetensors", "a/below/private.safetensors")]
    assert list(map(stat.S_IMODE, found)) == [0o640, 0o640]
    assert stat.S_IMODE((tmp_path / "elsewhere").stat().st_mode) == 0o600


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old", encoding="utf-8")

    def write(path: Path) -> None:
        path.write_text("half", encoding="utf-8")
        raise UnforeseenError

    with pytest.raises(UnforeseenError):
        write_atomically(tmp_path / "a", write)
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text(encoding="utf-8") == "old"


def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    write_folder_atomically(tmp_path / "a", lambda p: (p / "old").write_bytes(b"x") and None)

    def write(path: Path) -> None:
        (path / "new").write_bytes(b"half")
        raise UnforeseenError

    with pytest.raises(UnforeseenError):
        write_folder_atomically(tmp_path / "a", write)
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["old"]


def test_a_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    for name in ("old", "new"):
        write_folder_atomically(tmp_path / "a", lambda p, name=name: (p / name).write_bytes(b"x") and None)
        assert names(tmp_path / "a") == [name]
    assert names(tmp_path) == ["a"]


def at_every_line(work: Callable[[], None], look: Callable[[], None]) -> None:
    """Call ``look`` before every line of the module that ``work`` executes."""

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != atomic.__file__:
            return None
        if event == "line":
            look()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)


def write_one(name: str) -> Callable[[Path], None]:
    """Writes a folder with one file of this name."""
    return lambda folder: (folder / name).write_bytes(b"x") and None


def can_exchange(place: Path) -> bool:
    """Whether two folders there can change names."""
    (place / "one").mkdir()
    (place / "other").mkdir()
    found = exchange(place / "one", place / "other")
    shutil.rmtree(place / "one")
    shutil.rmtree(place / "other")
    return found


def test_the_name_always_stands_for_the_old_folder_or_the_new_one(tmp_path: Path) -> None:
    if not can_exchange(tmp_path):
        pytest.skip("no exchange of names on this file system")
    write_folder_atomically(tmp_path / "a", write_one("old"))
    seen: list[list[str]] = []
    at_every_line(
        lambda: write_folder_atomically(tmp_path / "a", write_one("new")), lambda: seen.append(names(tmp_path / "a"))
    )
    assert [found for place, found in enumerate(seen) if place == 0 or found != seen[place - 1]] == [["old"], ["new"]]
    assert names(tmp_path) == ["a"]


def test_a_folder_that_a_kill_between_two_renames_has_set_aside_is_found_again(tmp_path: Path) -> None:
    old, new = tmp_path / "a", tmp_path / "b"

    def kill_without_a_name() -> None:
        if not old.exists():
            os.kill(os.getpid(), signal.SIGKILL)

    for folder in (old, new):
        write_folder_atomically(folder, write_one(folder.name))
    child = os.fork()
    if child == 0:
        at_every_line(lambda: replace_in_two_steps(new, old), kill_without_a_name)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert names(tmp_path) == [".a.replaced", "b"]
    assert names(restore_missing(old)) == ["a"]
    replace_in_two_steps(new, old)
    assert (names(tmp_path), names(old)) == (["a"], ["b"])


@pytest.mark.parametrize("writer", ["python", "safetensors"])
def test_a_full_disk_is_a_resource_error_and_loses_nothing(tmp_path: Path, writer: str) -> None:
    (tmp_path / "a").write_text("old", encoding="utf-8")

    def write(path: Path) -> None:
        if writer == "python":
            path.write_bytes(bytes(10_000))
        else:
            save_file({"x": torch.zeros(10_000)}, path)

    with files_limited_to(4096), pytest.raises(ResourceError) as caught:
        write_atomically(tmp_path / "a", write)
    assert caught.value.exit_code == 4
    assert "cannot be written (the disk is full)" in str(caught.value)
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text(encoding="utf-8") == "old"


def test_a_cache_entry_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    with files_limited_to(4096):
        write_atomically(tmp_path / "a", lambda p: p.write_bytes(bytes(10_000)) and None, optional=True)
    assert names(tmp_path) == []


def test_a_place_that_cannot_be_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")

    for write in (write_atomically, write_folder_atomically):
        with pytest.raises(ResourceError, match="cannot be written"):
            write(tmp_path / "file" / "inside", lambda p: None)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_every_way_to_say_full_is_understood(number: int) -> None:
    error = cannot_write(Path("a"), OSError(number, os.strerror(number)))

    assert str(error) == "a: cannot be written (the disk is full). Free space or choose another place with -o."


def test_a_cache_that_cannot_be_written_is_moved_by_its_own_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIRRORTUNE_CACHE", str(tmp_path))
    for path in (tmp_path, tmp_path / "tokens" / "a"):
        error = cannot_write(path, PermissionError(errno.EACCES, "Permission denied"))
        assert str(error).endswith("Permit it or choose another place with MIRRORTUNE_CACHE.")


def test_advice_fits_the_reason() -> None:
    error = cannot_write(Path("a"), OSError(errno.EIO, os.strerror(errno.EIO)))
    assert str(error) == "a: cannot be written ([Errno 5] Input/output error). Choose another place with -o."


def test_what_is_replaced_may_be_private_and_makes_nothing_public(tmp_path: Path) -> None:
    """An entry of a shared cache that everybody may write is no model for the one that replaces it."""
    place, usual = tmp_path / "file", tmp_path / "usual"
    usual.touch()
    for before, after in ((0o600, 0o600), (0o400, 0o600), (0o666, usual.stat().st_mode & 0o777)):
        place.touch()
        place.chmod(before)
        atomic.write_atomically(place, lambda path: None)
        assert place.stat().st_mode & 0o777 == after
