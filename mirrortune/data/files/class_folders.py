# SPDX-License-Identifier: Apache-2.0
"""Folders of images or audio files, one for each class, read as tables of paths and labels."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from mirrortune.data.files.arrow import text_array
from mirrortune.errors import DataError, counted, first_of
from mirrortune.system.paths import is_system, shown_path, table_suffix

IMAGE_FORMATS = {
    ".apng": "PNG", ".avif": "AVIF", ".bmp": "BMP", ".bw": "SGI", ".dds": "DDS", ".dib": "DIB", ".gif": "GIF",
    ".icns": "ICNS", ".ico": "ICO", ".j2c": "JPEG2000", ".j2k": "JPEG2000", ".jfif": "JPEG", ".jp2": "JPEG2000",
    ".jpc": "JPEG2000", ".jpe": "JPEG", ".jpeg": "JPEG", ".jpf": "JPEG2000", ".jpg": "JPEG", ".jpx": "JPEG2000",
    ".mpo": "JPEG", ".pbm": "PPM", ".pcx": "PCX", ".pfm": "PPM", ".pgm": "PPM", ".png": "PNG", ".pnm": "PPM",
    ".ppm": "PPM", ".psd": "PSD", ".qoi": "QOI", ".ras": "SUN", ".rgb": "SGI", ".rgba": "SGI", ".sgi": "SGI",
    ".tga": "TGA", ".tif": "TIFF", ".tiff": "TIFF", ".webp": "WEBP",
}  # fmt: skip
"""Suffixes of images, and Pillow's names of their formats: the raster formats that Pillow decodes by itself.

Formats that start a program (PostScript) or of which Pillow only reads the header are excluded.
"""
AUDIO_SUFFIXES = (
    ".aif", ".aifc", ".aiff", ".au", ".caf", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".rf64", ".snd", ".sph", ".voc",
    ".w64", ".wav", ".wave",
)  # fmt: skip
"""Suffixes of audio files that libsndfile opens and whose headers give their format."""
_SHOWN = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassFolder:
    """The content of a folder of class folders.

    Attributes:
        table: paths below the folder (column ``image`` or ``audio``) and class names (``label``), sorted; None if no
            subfolder holds an image or audio file.
        remarks: a line for each kind of file or folder that was left out.
    """

    table: pa.Table | None
    remarks: tuple[str, ...] = ()


@dataclass(slots=True)
class _Class:
    """The files of one class: paths below the data set's folder by kind, links to missing files of these kinds, and
    counts of other files by suffix.
    """

    images: list[str] = field(default_factory=list)
    audio: list[str] = field(default_factory=list)
    lost: list[Path] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)


def class_folder(folder: Path) -> ClassFolder:
    """List the images or the audio files, whichever are more numerous, in the subfolders of ``folder``.

    Files and folders that operating systems and notebooks create (:func:`mirrortune.system.paths.is_system`) are
    skipped at every depth; other files that are not listed are counted in the remarks.

    Raises:
        DataError: if none of the files of a class can be read, a link leads to no file, or a file name is not UTF-8.
    """
    classes = {sub.name: _read_class(folder, sub) for sub in _visible(folder) if sub.is_dir()}
    refuse_lost_links(folder, [*folder.iterdir(), *(path for found in classes.values() for path in found.lost)])
    is_audio = sum(len(c.audio) for c in classes.values()) > sum(len(c.images) for c in classes.values())
    chosen = {name: found.audio if is_audio else found.images for name, found in classes.items()}
    for found in classes.values():
        found.others.update(Path(path).suffix.lower() for path in (found.images if is_audio else found.audio))
    what = "recordings" if is_audio else "images"
    rows = [(path, name) for name, paths in chosen.items() for path in paths]
    left = {name: found.others for name, found in classes.items() if found.others}
    if not rows:
        return ClassFolder(table=None, remarks=_left_out(left, what))
    _check_names(folder, [path for path, _ in rows])
    emptied = [name for name in left if not chosen[name]]
    if emptied:
        named = (f"class {name!r} ({_counted(left[name])})" for name in emptied)
        raise DataError(
            str(folder),
            f"no file of {first_of(named, _SHOWN)} can be read",
            allowed=f"{what} that end in {', '.join(AUDIO_SUFFIXES if is_audio else IMAGE_FORMATS)}",
            fix="Convert the files, or move the folder away",
        )
    empty = [name for name, paths in chosen.items() if not paths]
    beside = [p.name for p in _visible(folder) if p.is_file() and (_kind(p) or table_suffix(p))]
    remarks = [*_left_out(left, what)]
    remarks += [f"folders without a file: {first_of(empty, _SHOWN)}"] if empty else []
    remarks += [f"left out, beside the class folders: {first_of(beside, _SHOWN)}"] if beside else []
    paths, labels = zip(*rows, strict=True)
    table = pa.table({"audio" if is_audio else "image": text_array(paths), "label": text_array(labels)})
    return ClassFolder(table=table, remarks=tuple(remarks))


def holds_media(folder: Path) -> bool:
    """Return whether a folder or one below it holds an image or audio file."""
    found = _read_class(folder, folder)
    return bool(found.images or found.audio)


def refuse_lost_links(folder: Path, paths: Iterable[Path]) -> None:
    """Raise a DataError if ``paths``, all below ``folder``, contain links to missing folders, images or audio files."""
    lost = sorted(
        str(path.relative_to(folder))
        for path in paths
        if (_kind(path) or not path.suffix) and not is_system(path.name) and _is_lost(path)
    )
    if lost:
        shown = first_of(map(shown_path, lost), _SHOWN)
        raise DataError(
            str(folder), f"{counted(len(lost), 'link')} to what is not there: {shown}",
            fix="Fetch the files (as with git annex get or dvc pull), or remove the links",
        )  # fmt: skip


def _is_lost(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def _read_class(folder: Path, sub: Path) -> _Class:
    found = _Class()
    for place, folders, files in os.walk(sub):
        links = [name for name in folders if not is_system(name) and Path(place, name).is_symlink()]
        found.others["links to folders"] += len(links)
        folders[:] = sorted(name for name in folders if not is_system(name))
        for name in files:
            path = Path(place, name)
            kind = _kind(path)
            if kind and not is_system(name) and _is_lost(path):
                found.lost.append(path)
            if is_system(name) or not path.is_file():
                continue
            if kind is None:
                found.others[path.suffix.lower() or "files without suffix"] += 1
            else:
                (found.audio if kind == "audio" else found.images).append(str(path.relative_to(folder)))
    found.others += Counter()  # drops zeros
    found.images.sort(key=_parts)
    found.audio.sort(key=_parts)
    return found


def _parts(path: str) -> tuple[str, ...]:
    return Path(path).parts


def _kind(path: Path) -> str | None:
    suffix = path.suffix.lower()
    return "image" if suffix in IMAGE_FORMATS else "audio" if suffix in AUDIO_SUFFIXES else None


def _visible(folder: Path) -> Iterator[Path]:
    return (p for p in sorted(folder.iterdir()) if not is_system(p.name))


def _check_names(folder: Path, paths: Iterable[str]) -> None:
    odd = [path for path in paths if shown_path(path) != path]
    if odd:
        raise DataError(
            str(folder),
            f"{counted(len(odd), 'file name')} not in UTF-8: {first_of(map(shown_path, odd), _SHOWN)}",
            fix="Rename them",
        )


def _left_out(left: Mapping[str, Counter[str]], what: str) -> tuple[str, ...]:
    if not left:
        return ()
    total = sum(left.values(), Counter[str]())
    named = (f"{name} ({_counted(found)})" if len(left) > 1 else name for name, found in left.items())
    return (f"left out, as they are not {what} of a known suffix: {_counted(total)} in {first_of(named, _SHOWN)}",)


def _counted(found: Counter[str]) -> str:
    return first_of((f"{count:,} {suffix}" for suffix, count in found.most_common()), _SHOWN)
