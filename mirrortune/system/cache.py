# SPDX-License-Identifier: Apache-2.0
"""Whether disks have room for what is to be written, asked before anything is."""

from __future__ import annotations

import shutil
from pathlib import Path

from mirrortune.errors import ResourceError

_MIB = 2**20
_LEAST_FREE = 2**30


def check_disk(needs: dict[Path, dict[str, int]]) -> None:
    """Refuse to begin what the disks have no room for.

    Args:
        needs: folder (which need not exist) -> bytes by what they are for.

    Raises:
        ResourceError: for the first folder with too little room.
    """
    by_disk: dict[int, tuple[Path, dict[str, int]]] = {}
    for folder, wanted in needs.items():
        place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        by_disk.setdefault(place.stat().st_dev, (place, {}))[1].update(wanted)
    for place, wanted in by_disk.values():
        total, free = sum(wanted.values()), shutil.disk_usage(place).free
        if total > free:
            what = ", ".join(f"{name} {mebibytes(size)} MiB" for name, size in wanted.items() if size)
            raise ResourceError(
                f"disk at {place}", f"{mebibytes(total)} MiB are needed ({what}), {mebibytes(free)} MiB are free",
                fix="Free space, or choose other places with HF_HOME, MIRRORTUNE_CACHE and -o",
            )  # fmt: skip


def leave_room(folder: Path, what: str) -> None:
    """Refuse to fill a disk to the last byte with something whose size nobody knows before, such as what an archive
    unpacks to: a few kilobytes of it may stand for more than any disk holds.

    Raises:
        ResourceError: if less than 5% of the disk, or a GiB, is free.
    """
    found = shutil.disk_usage(folder)
    if found.free < min(_LEAST_FREE, found.total // 20):
        raise ResourceError(
            f"disk at {folder}", f"{mebibytes(found.free)} MiB are left, and {what} would go on to fill it",
            fix="Check how large the unpacked data is, free space, or choose another place with MIRRORTUNE_CACHE",
        )  # fmt: skip


def mebibytes(size: int) -> str:
    """A size in MiB, in words; one digit behind the point below ten."""
    return f"{size / _MIB:,.{1 if 0 < size < 10 * _MIB else 0}f}"
