# SPDX-License-Identifier: Apache-2.0
"""Ends a process in front of any one of its changes to the file system, as ``kill -9`` or a power cut may."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

_CHANGES = frozenset(("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.link"))
_ENDED, _FAILED = 77, 78


def ends_before(work: Callable[[], object], change: int) -> bool:
    """Run ``work`` in a forked process that ends itself in front of its change number ``change``, without flushing a
    file, releasing a lock or leaving a ``with`` block. Changes are counted from 1: making, renaming and removing files
    and folders, opening a file to write it, and the exchange of two names.

    Returns:
        False if ``work`` makes fewer changes, and so came to its end.

    Raises:
        RuntimeError: ``work`` failed.
    """
    child = os.fork()
    if child == 0:
        try:
            sys.addaudithook(_ending_at(change))
            work()
        except BaseException:  # noqa: BLE001  (what it is does not matter to the parent)
            os._exit(_FAILED)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, _ENDED):
        raise RuntimeError(f"the work failed before its change {change} ({code})")
    return code == _ENDED


def count_changes(work: Callable[[], object]) -> int:
    """Return how many changes ``work`` makes, in a forked process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        seen = [0]
        try:
            sys.addaudithook(lambda event, arguments: seen.__setitem__(0, seen[0] + _is_change(event, arguments)))
            work()
            os.write(writer, str(seen[0]).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        found = int(answer.read())
    os.waitpid(child, 0)
    return found


def _ending_at(change: int) -> Callable[[str, tuple[Any, ...]], None]:
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        seen += _is_change(event, arguments)
        if seen >= change:
            os._exit(_ENDED)

    return hook


def _is_change(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "open":
        return isinstance(arguments[2], int) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
    return event in _CHANGES or (event == "ctypes.dlsym" and arguments[1] in ("renameat2", "renamex_np"))
