# SPDX-License-Identifier: Apache-2.0
"""What lies below a folder, to compare before and after."""

from __future__ import annotations

import hashlib
from pathlib import Path


def tree(*folders: Path) -> dict[str, str]:
    """Return every path below some folders with what it is: the hash of a file, the target of a link, ``folder`` or
    ``other``. Links are not followed.
    """
    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_symlink():
                found[str(path)] = f"link {path.readlink()}"
            elif path.is_file():
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                found[str(path)] = "folder" if path.is_dir() else "other"
    return found
