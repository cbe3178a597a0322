# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are there whole or not at all: written under a temporary name, renamed last; and made by one
process, while others that want them wait.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from mirrortune.errors import ResourceError

# What a killed process leaves behind is hidden and ends like this, so that it can be told from anything else.
_PARTIAL, _REPLACED = ".partial", ".replaced"


def write_atomically(path: Path, write: Callable[[Path], None], *, optional: bool = False) -> None:
    """Call ``write`` with a temporary file's path beside ``path`` and rename it to ``path``.

    Args:
        path: the file to make or replace; its folder is made.
        write: writes the whole content.
        optional: a cache entry: when it cannot be written, go on without it.

    Raises:
        ResourceError: if it cannot be written (disk full, no permission); ``path`` is as it was.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_PARTIAL)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        _sync(temporary)
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes files that only the owner reads
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        if not optional:
            raise cannot_write(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def alone_with(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Keep other processes, of this run or of any other, from making the cache entry ``path`` at the same time.

    The lock is the operating system's: it ends with the process that holds it, and waiting for it has no deadline.
    Where a file system has no locks, or the cache cannot be written, nobody is kept away.

    Args:
        path: of the entry; its folder is one of those into which a cache spreads its entries.
        wait: for a process that is making the entry.

    Yields:
        False if another process is making the entry and nobody waited for it.
    """
    # A lock file cannot be removed without a race, so entries share 4096 of them, by the first digits of their names.
    place = path.parent.parent / ".locks" / f"{path.name[:3]}.lock"
    with ExitStack() as held:
        is_ours = True
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(place).acquire(blocking=wait))
        except Timeout:
            is_ours = False
        except (OSError, NotImplementedError):
            pass
        yield is_ours


def write_folder_atomically(folder: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` with a temporary folder beside ``folder`` and rename it to ``folder``, replacing one that is
    there: at every moment the name stands for the old one or the new one, where the file system can exchange names.

    Raises:
        ResourceError: if it cannot be written; an old ``folder`` is as it was.
    """
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=_PARTIAL))
        temporary.chmod(0o777 & ~_umask())
        write(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        restore(folder)
        if not (folder.exists() and exchange(temporary, folder)):
            replace_in_two_steps(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise cannot_write(folder, error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def clear_leftovers(folder: Path) -> None:
    """Put right what a process that was killed while writing into ``folder`` left: half-written files and folders are
    removed, and a folder that was set aside for its successor is put back if that one never came.

    Only for a place that nobody else is writing into.
    """
    for path in folder.glob(f".*{_REPLACED}"):
        restore(path.with_name(path.name[1:].removesuffix(_REPLACED)))
    for pattern in (_PARTIAL, _REPLACED):
        for path in folder.glob(f".*{pattern}"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    """Whether :func:`clear_leftovers` would take this file or folder for one of its own."""
    return path.name.startswith(".") and path.name.endswith((_PARTIAL, _REPLACED))


def cannot_write(path: Path, error: Exception) -> ResourceError:
    """The error for a file that could not be written; says so when the disk is full."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # safetensors keeps the number in its text only.
    is_full = getattr(error, "errno", None) in full or any(f"(os error {n})" in str(error) for n in full)
    return ResourceError(
        str(path),
        f"cannot be written ({'the disk is full' if is_full else error})",
        fix="Free space or choose another place with -o; what was saved before is intact",
    )


def exchange(one: Path, other: Path) -> bool:
    """Swap the names of two folders at one stroke; False where the system or the file system cannot."""
    if not sys.platform.startswith(("linux", "darwin")):
        return False
    names, library = (os.fsencode(one), os.fsencode(other)), ctypes.CDLL(None)
    try:
        if sys.platform == "darwin":
            return bool(library.renamex_np(*names, ctypes.c_uint(2)) == 0)  # RENAME_SWAP
        here = ctypes.c_int(-100)  # AT_FDCWD: relative names are of the working directory
        return bool(library.renameat2(here, names[0], here, names[1], ctypes.c_uint(2)) == 0)  # RENAME_EXCHANGE
    except AttributeError:  # an older C library
        return False


def replace_in_two_steps(temporary: Path, folder: Path) -> None:
    """Rename ``temporary`` to ``folder``, where no file system renames one folder onto another: the old one is set
    aside, and put back if the second step fails, by :func:`restore` if the process ends between them.
    """
    old = set_aside(folder)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        temporary.rename(folder)
    except BaseException:  # also when a second Ctrl-C ends the process just here
        restore(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def set_aside(folder: Path) -> Path:
    """Where a folder waits while its successor takes its name."""
    return folder.with_name(f".{folder.name}{_REPLACED}")


def restore(folder: Path) -> Path:
    """Put a folder back that a killed process had set aside and not replaced; returns ``folder``, there or not."""
    old = set_aside(folder) if folder.name else folder
    if old.is_dir() and not folder.exists():
        with suppress(OSError):  # a place that may only be read, or another process was faster
            old.rename(folder)
    return folder


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows flushes what it may write alone
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
