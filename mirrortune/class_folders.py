# SPDX-License-Identifier: Apache-2.0
"""Folders of images or recordings, one for each class, as tables of paths and labels."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from mirrortune.arrow_arrays import text_array

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
AUDIO_SUFFIXES = (".aif", ".aiff", ".flac", ".mp3", ".ogg", ".opus", ".wav")


def class_folder(folder: Path) -> pa.Table | None:
    """Paths (below ``folder``, column ``image`` or ``audio``) and class names (``label``) of the files in its
    sub-folders, in order; None if there are none.
    """
    rows: list[tuple[str, str]] = []
    for sub in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        rows += [(str(p.relative_to(folder)), sub.name) for p in sorted(sub.rglob("*")) if _suffix(p)]
    if not rows:
        return None
    is_audio = Path(rows[0][0]).suffix.lower() in AUDIO_SUFFIXES
    paths, labels = zip(*rows, strict=True)
    return pa.table({"audio" if is_audio else "image": text_array(paths), "label": text_array(labels)})


def _suffix(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES + AUDIO_SUFFIXES and path.is_file()
