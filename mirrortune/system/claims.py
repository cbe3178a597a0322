# SPDX-License-Identifier: Apache-2.0
"""Claim outputs, so that only one process at a time writes a run, a merge, a comparison, figures or predictions.

A claim on ``runs/x`` is an operating-system lock on the file ``runs/.x.claim``. The file lies beside the output so that
machines that share the file system see it and an empty output stays empty. The lock is released when its process ends,
for whatever reason; the file is deleted with the claim, and the file of a killed process is reused. On a file system
without locks the file itself is the claim and records the process that holds it, as in ``filelock.SoftFileLock``.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from mirrortune.errors import ConfigError
from mirrortune.system.atomic import cannot_write

SUFFIX = ".claim"
_SECONDS_BETWEEN_TRIES = 0.05
_TRIES = 1000
_LARGEST = 4096  # bytes of a claim file
_HELD = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK)


@contextmanager
def claimed(output: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the claim on an output while the block runs.

    Missing parent folders are created, and removed again if they stay empty.

    Args:
        output: file or folder; need not exist.
        wait: wait for another process to release its claim instead of raising.

    Raises:
        ConfigError: another process holds the claim.
        ResourceError: the folder of the output cannot be created or is not writable.
    """
    place = place_of_claim(output)
    made: list[Path] = []
    try:
        release = _acquire(place, made)
        while release is None and wait:
            time.sleep(_SECONDS_BETWEEN_TRIES)
            release = _acquire(place, made)
    except OSError as error:
        _remove_empty(made)
        raise cannot_write(output, error) from error
    if release is None:
        fix = "Wait until it ends, or choose another with -o"
        if (soft := _soft_place(place)).exists():  # whether a process of another machine is alive cannot be known here
            fix += f". This file system has no locks: if that process has ended, delete {soft}"
        raise ConfigError(str(output), f"{_holder(place)} is writing there", fix=fix)
    try:
        yield
    finally:
        release()
        _remove_empty(made)


def place_of_claim(output: Path) -> Path:
    """Return the path of the lock file: beside the output, or in it if the output is a mount point, whose parent is on
    another disk and may belong to another user.
    """
    target = Path(os.path.realpath(output))
    name = f".{target.name[:200]}{SUFFIX}"
    return target / name if os.path.ismount(target) else target.with_name(name)


def is_claim(name: str) -> bool:
    """Return whether ``name`` has the form of a claim's file name."""
    return name.startswith(".") and name.endswith(SUFFIX)


def clear_claims(folder: Path) -> None:
    """Delete the claims that killed processes left in a folder; claims that are held stay."""
    for place in folder.glob(f".*{SUFFIX}"):
        with suppress(OSError):
            if release := _lock(place):
                release()


def _acquire(place: Path, made: list[Path]) -> Callable[[], None] | None:
    """Take the lock and append the folders created for it to ``made``; return a function that releases the lock, or
    None if another process holds it.
    """
    for _ in range(_TRIES):
        try:
            _make_folders(place.parent, made)
            return _lock(place)
        except FileNotFoundError:  # another claim has just removed a folder that it had created
            continue
    if place.parent.is_dir():  # such as /proc
        raise PermissionError(errno.EACCES, "no file can be created there", str(place.parent))
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(place.parent))


if sys.platform == "win32":

    def _lock(place: Path) -> Callable[[], None] | None:
        lock = FileLock(place, thread_local=False)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return None
        return lock.release

else:

    def _lock(place: Path) -> Callable[[], None] | None:
        import fcntl  # noqa: PLC0415  (no such module on Windows)

        while True:
            handle = _open(place)
            if not stat.S_ISREG(os.fstat(handle).st_mode):  # reading from a pipe would block
                os.close(handle)
                raise _not_a_claim(place)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                is_ours = _is_claim(handle)
                os.close(handle)
                if error.errno in _HELD:
                    return None
                if not is_ours:
                    raise _not_a_claim(place) from error
                place.unlink(missing_ok=True)  # no locks on this file system, so no process holds it
                return _soft_lock(place)
            if _is_at(handle, place):
                break
            os.close(handle)  # its holder deleted it between our open and lock
        if not _is_claim(handle):
            os.close(handle)
            raise _not_a_claim(place)
        with suppress(OSError):
            os.ftruncate(handle, 0)
            os.write(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())

        def release() -> None:
            place.unlink(missing_ok=True)  # before the lock is released: a process that opened it sees that it is gone
            os.close(handle)

        return release

    def _open(place: Path) -> int:
        common = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            return os.open(place, common | os.O_CREAT | os.O_RDWR, 0o666)
        except PermissionError as error:
            try:  # another user's file, which can still be locked for reading
                return os.open(place, common | os.O_RDONLY)
            except FileNotFoundError:
                if os.access(place.parent, os.W_OK | os.X_OK):  # it was removed in the meantime
                    raise
                raise error from None


def _soft_lock(place: Path) -> Callable[[], None] | None:
    lock = SoftFileLock(_soft_place(place), thread_local=False)
    with warnings.catch_warnings(action="ignore"):
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return None
    return lock.release


def _soft_place(place: Path) -> Path:
    return place.with_name(f"{place.name}.soft")


def _is_at(handle: int, place: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), place.lstat())
    except OSError:
        return False


def _is_claim(handle: int) -> bool:
    """Return whether an open file is a claim: it is empty or has a claim's content, and it has no second hard link."""
    content = os.pread(handle, _LARGEST + 1, 0)
    if len(content) > _LARGEST or os.fstat(handle).st_nlink > 1:
        return False
    try:
        return not content.strip(b"\0") or json.loads(content).keys() == {"pid", "host"}
    except (ValueError, AttributeError):
        return False


def _not_a_claim(place: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, "it is not one of mirrortune's lock files", str(place))


def _holder(place: Path) -> str:
    try:
        with suppress(FileNotFoundError), _soft_place(place).open(encoding="utf-8") as file:
            pid, host, *_ = file.read(_LARGEST).split()
            return f"process {int(pid)} on {host[:64]}"
        with place.open("rb") as file:
            found = json.loads(file.read(_LARGEST))
        return f"process {int(found['pid'])} on {str(found['host'])[:64]}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _make_folders(folder: Path, made: list[Path]) -> None:
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        with suppress(FileExistsError):
            path.mkdir()
            made.append(path)
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))


def _remove_empty(made: list[Path]) -> None:
    for path in reversed(made):
        with suppress(OSError):
            path.rmdir()
