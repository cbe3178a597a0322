# SPDX-License-Identifier: Apache-2.0
"""Write files and folders atomically: under a temporary name first, renamed when complete.

Throughout this module, ``is_ours(path)`` says whether mirrortune wrote the file or folder at ``path``, a path relative
to the folder in question that ends in ``/`` for a folder. Only such files are ever deleted.
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
from mirrortune.system.paths import cache_folder

# Suffixes of the hidden temporary names, by which leftovers of a killed process are recognised.
PARTIAL, _REPLACED = ".partial", ".replaced"
MARKER = ".mirrortune.json"
"""Name of the file that marks a folder written by a command and lists the files that mirrortune wrote there."""
_LEFTOVER = re.compile(rf"\.(.+?)(?:\.mt-[a-z0-9_]{{8}}{re.escape(PARTIAL)}|{re.escape(_REPLACED)})")


def temporary_name(name: str) -> tuple[str, str]:
    """Return the suffix and prefix, for :mod:`tempfile`, of a temporary name for ``name``."""
    return PARTIAL, f".{name}.mt-"


def write_atomically(path: Path, write: Callable[[Path], object], *, optional: bool = False) -> None:
    """Call ``write`` with the path of a temporary file beside ``path``, then rename that file to ``path``.

    Args:
        path: file to create or replace; missing parent folders are created.
        write: writes the complete content to the path it is called with.
        optional: ignore a failure to write, as for a cache entry.

    Raises:
        ResourceError: the file cannot be written (disk full, no permission); ``path`` is unchanged.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(*temporary_name(path.name), dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        _sync(temporary)
        temporary.chmod(_mode(path, 0o666))  # mkstemp creates files that only their owner can read
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        if not optional:
            raise cannot_write(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str, *, optional: bool = False) -> None:
    """Write a text file as :func:`write_atomically` does."""
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"), optional=optional)


@contextmanager
def alone_with(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock on the cache entry ``path`` while the block creates it.

    The lock belongs to the operating system, so it is released when its process ends; waiting has no timeout. If the
    file system has no locks or the cache is not writable, the block runs without a lock.

    Args:
        path: cache entry, in one of the subfolders over which the cache distributes its entries.
        wait: wait for a process that holds the lock.

    Yields:
        False if another process holds the lock and ``wait`` is False, else True.
    """
    # A lock file cannot be removed without a race, so entries share 4096 of them by the first three hex digits.
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
    """Write small files into a folder, which is created if missing; other files in it are not touched.

    All files are written under temporary names, then renamed one by one in the order of ``files``.

    Raises:
        ResourceError: a file cannot be written.
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
    """Call ``write`` with a temporary folder beside ``folder``, then give it the name ``folder``.

    If the file system can exchange two names, ``folder`` exists at every moment, either as the old or as the new one.

    Args:
        folder: folder to create or replace.
        write: writes the complete content.
        is_ours: paths below an old ``folder`` that are deleted with it; all others are moved to the new one.

    Raises:
        ResourceError: the folder cannot be written; an old ``folder`` is unchanged.
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
        if temporary is not None:  # may be the old folder, if a signal arrived right after the exchange
            discard(temporary, is_ours=is_ours)


def swap(new: Path, folder: Path, *, is_ours: Callable[[str], bool]) -> None:
    """Rename the complete folder ``new`` to ``folder`` and :func:`discard` the folder that had this name.

    Raises:
        OSError: the new folder cannot be flushed to disk or renamed, or ``folder`` is a symbolic link; ``folder`` is
            unchanged.
    """
    if folder.is_symlink():  # its target may belong to the user
        raise OSError(errno.ELOOP, "it is a symbolic link", str(folder))
    for file in new.rglob("*"):
        if file.is_file():
            _sync(file)
            if not file.is_symlink():  # safetensors creates files that only their owner can read
                file.chmod(_mode(folder / file.relative_to(new), 0o666))
    restore_missing(folder)
    new.chmod(_mode(folder, 0o777))
    if not folder.exists():
        new.rename(folder)
    elif exchange(new, folder):
        _retire(new, folder, is_ours=is_ours)
    else:
        replace_in_two_steps(new, folder, is_ours=is_ours)


def discard(folder: Path, *, is_ours: Callable[[str], bool], into: Path | None = None) -> None:
    """Delete the files that mirrortune wrote in a folder, and the folder itself if that leaves it empty.

    The marker is deleted last: without it, the remaining files could not be told from an unfinished output. Files that
    cannot be deleted stay.

    Args:
        folder: folder to discard. Symbolic links in it are not followed; if it is one itself, nothing happens.
        is_ours: paths that may be deleted.
        into: folder to which all other files are moved, under the same relative paths; it need not exist. A file stays
            if its new path is taken or lies behind a symbolic link.
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
                with suppress(OSError):  # a file in `into` has the name of this folder: the path stays here
                    (into / below).parent.mkdir(parents=True, exist_ok=True)
                    path.rename(into / below)
        for path in (Path(place, name) for name in folders if name not in links):
            below = path.relative_to(folder)
            with suppress(OSError):  # not empty, because something could not be moved
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
    """Discard ``old``, which ``folder`` has replaced. Files that can neither be deleted nor moved to ``folder`` stay
    beside it, under a name that is not taken for a leftover.
    """
    discard(old, is_ours=is_ours, into=folder)
    if not old.is_dir() or old.is_symlink():
        return
    names = (f"{folder.name}.old{number or ''}" for number in itertools.count())
    kept = next(path for path in map(folder.with_name, names) if not os.path.lexists(path))
    with suppress(OSError):
        old.rename(kept)


def _leads_away(folder: Path, below: Path) -> bool:
    """Return whether ``folder / below`` is a symbolic link or is reached through one in ``folder``."""
    return any((folder / part).is_symlink() for part in (below, *below.parents))


def clear_leftovers(folder: Path, is_ours: Callable[[str], bool]) -> None:
    """Clean up after a process that was killed while writing into ``folder``.

    Incomplete files and folders are removed, and a folder that was set aside is restored if its replacement is missing.
    No other process may be writing into ``folder``.

    Args:
        folder: folder to clean up.
        is_ours: names in ``folder`` that mirrortune writes.
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
    """Return the final name of a leftover called ``name``, or None if ``name`` is not that of a leftover."""
    found = _LEFTOVER.fullmatch(name)
    return found[1] if found else None


def cannot_write(path: Path, error: Exception) -> ResourceError:
    """Return the error for a file or folder that could not be written, with advice for outputs or for the cache."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # An exception of safetensors has the error number only in its text.
    is_full = getattr(error, "errno", None) in full or any(f"(os error {n})" in str(error) for n in full)
    is_denied = getattr(error, "errno", None) in (errno.EACCES, errno.EPERM)
    first = "Free space or choose" if is_full else "Permit it or choose" if is_denied else "Choose"
    is_cached = path.absolute().is_relative_to(cache_folder())
    return ResourceError(
        str(path),
        f"cannot be written ({'the disk is full' if is_full else error})",
        fix=f"{first} another place with {'MIRRORTUNE_CACHE' if is_cached else '-o'}",
    )


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders atomically; return False if the system or the file system cannot."""
    if not sys.platform.startswith(("linux", "darwin")):
        return False
    names, library = (os.fsencode(one), os.fsencode(other)), ctypes.CDLL(None)
    try:
        if sys.platform == "darwin":
            return bool(library.renamex_np(*names, ctypes.c_uint(2)) == 0)  # RENAME_SWAP
        here = ctypes.c_int(-100)  # AT_FDCWD: resolve relative names against the working directory
        return bool(library.renameat2(here, names[0], here, names[1], ctypes.c_uint(2)) == 0)  # RENAME_EXCHANGE
    except AttributeError:  # an older C library
        return False


def replace_in_two_steps(new: Path, folder: Path, *, is_ours: Callable[[str], bool]) -> None:
    """Rename ``new`` to ``folder`` where names cannot be exchanged: set the old folder aside, then rename.

    If the second step fails, the old folder is put back; if the process ends between the steps,
    :func:`restore_missing` does so later.
    """
    old = place_of_replaced(folder)
    discard(old, is_ours=is_ours, into=folder)  # left by an earlier replacement that was interrupted
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:  # includes a second Ctrl-C
        restore_missing(folder)
        raise
    _retire(old, folder, is_ours=is_ours)


def place_of_replaced(folder: Path) -> Path:
    """Return the path under which ``folder`` is set aside while it is replaced."""
    return folder.with_name(f".{folder.name}{_REPLACED}")


def restore_missing(folder: Path) -> Path:
    """Restore ``folder`` if a killed process set it aside without replacing it; return ``folder`` in any case."""
    old = place_of_replaced(folder) if folder.name else folder
    if old.is_dir() and not folder.exists():
        with suppress(OSError):  # a read-only place, or another process was faster
            old.rename(folder)
    return folder


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows flushes only writable handles
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _mode(path: Path, default: int) -> int:
    """Return the permissions of a new file or folder: ``default``, or those of the old one if they are stricter.

    Looser permissions are not inherited, because in a shared cache anyone may have created the old file.
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
