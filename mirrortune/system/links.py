# SPDX-License-Identifier: Apache-2.0
"""Compare places in the file system, whatever names and links lead to them."""

from __future__ import annotations

import functools
import os
from contextlib import suppress
from pathlib import Path

from mirrortune.system.paths import table_suffix


def real(path: Path) -> Path:
    """Return a path without links; unlike ``Path.resolve``, also where links lead in a circle."""
    return Path(os.path.realpath(path))


def is_same(one: Path, other: Path) -> bool:
    """Return whether two paths are the same file or folder."""
    if one == other:
        return True
    try:
        return one.samefile(other)
    except OSError:
        return False


def contains(folder: Path, path: Path) -> bool:
    """Return whether a path is a folder or lies in it."""
    return any(is_same(folder, part) for part in (real(path), *real(path).parents))


def holds_tables(folder: Path) -> bool:
    """Return whether a folder is read as tables: its own files, without its sub-folders."""
    return folder.is_dir() and any(table_suffix(path) is not None for path in folder.iterdir())


def link_into(folder: Path, output: Path, *, only_tables: bool) -> Path | None:
    """Find a link at any depth of a folder that is read which leads to a file or folder, or into it.

    Links to other folders are not followed, and ``output`` itself is not searched. Without an output there is none.

    Args:
        folder: that is read.
        output: file or folder to be replaced.
        only_tables: whether, of a folder that holds tables, other files and sub-folders are not read.
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
