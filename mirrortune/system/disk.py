# SPDX-License-Identifier: Apache-2.0
"""Check that disks have room before anything is written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mirrortune.errors import ResourceError

_MIB = 2**20
_LEAST_FREE = 2**30


def check_disk(needs: dict[Path, dict[str, int]]) -> None:
    """Check the free space of disks.

    Args:
        needs: for each folder, which need not exist, the bytes needed by purpose.

    Raises:
        ResourceError: a disk has too little free space; the first one is reported.
    """
    by_disk: dict[int, tuple[Path, dict[str, int]]] = {}
    for folder, wanted in needs.items():
        # os.path, because pathlib raises an error for a folder that may not be looked into.
        place = next(p for p in (folder.absolute(), *folder.absolute().parents) if os.path.exists(p))  # noqa: PTH110
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
    """Check that a disk stays usable while data of unknown size is written, such as an archive that is unpacked.

    Raises:
        ResourceError: less than 1 GiB is free, or less than 5% on a disk of under 20 GiB.
    """
    found = shutil.disk_usage(folder)
    if found.free < min(_LEAST_FREE, found.total // 20):
        raise ResourceError(
            f"disk at {folder}", f"{mebibytes(found.free)} MiB are left, and {what} would go on to fill it",
            fix="Check how large the unpacked data is, free space, or choose another place with MIRRORTUNE_CACHE",
        )  # fmt: skip


def mebibytes(size: int) -> str:
    """Format a number of bytes in MiB, with one decimal below ten."""
    return f"{size / _MIB:,.{1 if 0 < size < 10 * _MIB else 0}f}"
