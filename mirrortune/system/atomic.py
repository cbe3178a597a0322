# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are there whole or not at all: written under a temporary name, renamed last; and made by one
process, while others that want them wait.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import re
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from mirrortune.errors import ResourceError

# What a killed process leaves behind is hidden and ends like this, so that it can be told from anything else.
PARTIAL, _REPLACED = ".partial", ".replaced"
MARKER = ".mirrortune.json"
"""Lies in every folder that a command writes, and says which files are ours."""
_LEFTOVER = re.compile(rf"\.(.+?)(?:\.mt-[a-z0-9_]{{8}}{re.escape(PARTIAL)}|{re.escape(_REPLACED)})")


def temporary_name(name: str) -> tuple[str, str]:
    """Return the end and the beginning, as tempfile takes them, of a name by which a leftover is known."""
    return PARTIAL, f".{name}.mt-"


def write_atomically(path: Path, write: Callable[[Path], object], *, optional: bool = False) -> None:
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
        handle, name = tempfile.mkstemp(*temporary_name(path.name), dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        _sync(temporary)
        temporary.chmod(_mode(path, 0o666))  # mkstemp makes files that only the owner reads
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
    Where a file system has no locks, or the cache cannot be written, no process is kept out.

    Args:
        path: of the entry; its folder is one of those into which a cache spreads its entries.
        wait: for a process that is making the entry.

    Yields:
        False if another process is making the entry and this one did not wait for it.
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


def write_files_atomically(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write small files into a folder, which is made, and leave everything else in it alone.

    All are written under temporary names first and then renamed one after the other, in order.

    Raises:
        ResourceError: if one cannot be written.
    """
    temporary: dict[str, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            handle, made = tempfile.mkstemp(*temporary_name(name), dir=folder)
            temporary[name] = Path(made)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(handle)
            temporary[name].chmod(_mode(folder / name, 0o666))
        for name, path in temporary.items():
            path.replace(folder / name)
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def write_folder_atomically(folder: Path, write: Callable[[Path], None], *, is_ours: Callable[[str], bool]) -> None:
    """Call ``write`` with a temporary folder beside ``folder`` and rename it to ``folder``, replacing one that is
    there: at every moment the name stands for the old one or the new one, where the file system can exchange names.

    Args:
        folder: the folder to make or replace.
        write: writes the whole content.
        is_ours: whether a path below ``folder`` (a folder's ends in ``/``) may be deleted with an old ``folder``; what
            may not is moved to the new one.

    Raises:
        ResourceError: if it cannot be written; an old ``folder`` is as it was.
    """
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(*temporary_name(folder.name), dir=folder.parent))
        temporary.chmod(_mode(folder, 0o777))
        write(temporary)
        swap(temporary, folder, is_ours=is_ours)
        temporary = None
    except (OSError, SafetensorError) as error:
        raise cannot_write(folder, error) from error
    finally:
        if temporary is not None:  # the old folder, perhaps, if a signal came just after the exchange
            discard(temporary, is_ours=is_ours)


def swap(new: Path, folder: Path, *, is_ours: Callable[[str], bool]) -> None:
    """Give a whole new folder the name ``folder``, and remove what was there by :func:`discard`.

    Raises:
        OSError: the new folder cannot be stored or renamed, or ``folder`` is a link; ``folder`` is as it was.
    """
    if folder.is_symlink():  # what it leads to may belong to the user
        raise OSError(errno.ELOOP, "it is a symbolic link", str(folder))
    for file in new.rglob("*"):
        if file.is_file():
            _sync(file)
    restore_missing(folder)
    new.chmod(_mode(folder, 0o777))
    if not folder.exists():
        new.rename(folder)
    elif exchange(new, folder):
        _retire(new, folder, is_ours=is_ours)
    else:
        replace_in_two_steps(new, folder, is_ours=is_ours)


def discard(folder: Path, *, is_ours: Callable[[str], bool], into: Path | None = None) -> None:
    """Delete the files of a folder that are ours, and the folder if nothing else is in it. Its marker goes last:
    without one, what is left could not be told from what was being written. What cannot be deleted stays.

    Args:
        folder: is not followed where it holds links, and left alone where it is one.
        is_ours: told a path below it, with ``/`` at the end of a folder's.
        into: where anything else is moved, to the same place below it, unless something is there already or a link
            leads elsewhere; not yet a folder, perhaps.
    """
    if folder.is_symlink():
        return
    for place, folders, files in os.walk(folder, topdown=False):
        links = [name for name in folders if Path(place, name).is_symlink()]
        for path in (Path(place, name) for name in [*files, *links]):
            below = path.relative_to(folder)
            if below.as_posix() == MARKER:
                continue
            if is_ours(below.as_posix()):
                with suppress(OSError):
                    path.unlink()
            elif into is not None and not os.path.lexists(into / below) and not _leads_away(into, below):
                with suppress(OSError):  # one of our files has the name of its folder: it stays here
                    (into / below).parent.mkdir(parents=True, exist_ok=True)
                    path.rename(into / below)
        for path in (Path(place, name) for name in folders if name not in links):
            below = path.relative_to(folder)
            with suppress(OSError):  # what could not be moved is still in it
                if is_ours(f"{below.as_posix()}/"):
                    path.rmdir()
                elif into is not None and not _leads_away(into, below):
                    (into / below).mkdir(parents=True, exist_ok=True)
                    path.rmdir()
    with suppress(OSError):
        if is_ours(MARKER) and [path.name for path in folder.iterdir()] == [MARKER]:
            (folder / MARKER).unlink()
        folder.rmdir()


def _retire(old: Path, folder: Path, *, is_ours: Callable[[str], bool]) -> None:
    """Discard a folder whose successor has the name ``folder``. What can neither be deleted nor moved there stays
    beside it, under a name that is not one of a leftover.
    """
    discard(old, is_ours=is_ours, into=folder)
    if not old.is_dir() or old.is_symlink():
        return
    names = (f"{folder.name}.old{number or ''}" for number in itertools.count())
    kept = next(path for path in map(folder.with_name, names) if not os.path.lexists(path))
    with suppress(OSError):
        old.rename(kept)


def _leads_away(folder: Path, below: Path) -> bool:
    """Whether a link lies on the way from a folder to a path below it."""
    return any((folder / part).is_symlink() for part in (below, *below.parents))


def clear_leftovers(folder: Path, is_ours: Callable[[str], bool]) -> None:
    """Put right what a process that was killed while writing into ``folder`` left: half-written files and folders are
    removed, and a folder that was set aside for its successor is put back if that one never came.

    Only for a place that no other process writes into.

    Args:
        folder: where to look.
        is_ours: whether we write a file or folder (whose name ends in ``/``) of that name there.
    """
    found = {path: name for path in folder.glob(".*") if (name := leftover_of(path.name)) is not None}
    for path, name in found.items():

        def is_within(below: str, name: str = name) -> bool:
            return is_ours(f"{name}/{below}")

        is_folder = path.is_dir() and not path.is_symlink()
        if not is_ours(f"{name}/" if is_folder else name):
            continue
        if path.name.endswith(_REPLACED):
            if is_folder and any(is_within(inner.name) for inner in path.iterdir()):
                restore_missing(folder / name)
                _retire(path, folder / name, is_ours=is_within)
        elif is_folder:
            discard(path, is_ours=is_within)
        elif path.is_file() and not path.is_symlink():
            path.unlink()


def leftover_of(name: str) -> str | None:
    """The name that was being written when a file or folder called ``name`` was left behind; None for any other."""
    found = _LEFTOVER.fullmatch(name)
    return found[1] if found else None


def cannot_write(path: Path, error: Exception) -> ResourceError:
    """The error for a file that could not be written; says so when the disk is full."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # safetensors keeps the number in its text only.
    is_full = getattr(error, "errno", None) in full or any(f"(os error {n})" in str(error) for n in full)
    return ResourceError(
        str(path),
        f"cannot be written ({'the disk is full' if is_full else error})",
        fix="Free space or choose another place with -o",
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


def replace_in_two_steps(new: Path, folder: Path, *, is_ours: Callable[[str], bool]) -> None:
    """Rename ``new`` to ``folder``, where no file system renames one folder onto another: the old one is set aside, and
    put back if the second step fails, by :func:`restore_missing` if the process ends between them.
    """
    old = place_of_replaced(folder)
    discard(old, is_ours=is_ours, into=folder)  # of an earlier replacement that was cut short
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:  # also when a second Ctrl-C ends the process just here
        restore_missing(folder)
        raise
    _retire(old, folder, is_ours=is_ours)


def place_of_replaced(folder: Path) -> Path:
    """Where a folder waits while its successor takes its name."""
    return folder.with_name(f".{folder.name}{_REPLACED}")


def restore_missing(folder: Path) -> Path:
    """Put a folder back that a killed process had set aside and not replaced; returns ``folder``, there or not."""
    old = place_of_replaced(folder) if folder.name else folder
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


def _mode(path: Path, default: int) -> int:
    """Permissions of a new file or folder: what it replaces may be more private, and what is more public is not kept,
    since in a shared cache anybody may have put it there.
    """
    allowed = default & ~_umask()
    try:
        found = path.lstat().st_mode
    except OSError:
        return allowed
    return allowed if stat.S_ISLNK(found) else allowed & found | stat.S_IWUSR


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
