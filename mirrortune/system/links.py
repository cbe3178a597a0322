# SPDX-License-Identifier: Apache-2.0
"""Compare locations in the file system, independent of the names and symbolic links by which they are reached."""

from __future__ import annotations

import functools
import os
from contextlib import suppress
from pathlib import Path

from mirrortune.system.paths import table_suffix


def real(path: Path) -> Path:
    """Resolve all symbolic links in a path; unlike ``Path.resolve``, never fail on a cycle of links."""
    return Path(os.path.realpath(path))


def is_same(one: Path, other: Path) -> bool:
    """Return whether two paths lead to the same file or folder."""
    if one == other:
        return True
    try:
        return one.samefile(other)
    except OSError:
        return False


def contains(folder: Path, path: Path) -> bool:
    """Return whether ``path`` is ``folder`` or lies in it."""
    return any(is_same(folder, part) for part in (real(path), *real(path).parents))


def holds_tables(folder: Path) -> bool:
    """Return whether a folder directly holds table files, so that only these are read and its subfolders are not."""
    return folder.is_dir() and any(table_suffix(path) is not None for path in folder.iterdir())


def link_into(folder: Path, output: Path, *, only_tables: bool) -> Path | None:
    """Find a symbolic link, at any depth of an input folder, that leads to or into an output.

    Links to other folders are not followed, and ``output`` itself is not searched. If it does not exist, the result is
    None.

    Args:
        folder: input folder.
        output: file or folder to be replaced.
        only_tables: if a folder holds tables, search only these and not its other files and subfolders.
    """
    if not output.exists() or not folder.is_dir():
        return None
    target, is_within = real(output), functools.cache(functools.partial(contains, output))
    only_tables = only_tables and holds_tables(folder)
    waiting = [folder]
    while waiting:
        with suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                path = Path(entry.path)
                if only_tables and table_suffix(path) is None:
                    continue
                if entry.is_symlink():
                    led = real(path)
                    if led == target or is_within(led.parent):
                        return path
                elif entry.is_dir() and not is_same(path, output):
                    waiting.append(path)
    return None
