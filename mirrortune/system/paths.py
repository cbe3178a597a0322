# SPDX-License-Identifier: Apache-2.0
"""Parse the paths, patterns and Hub ids that users write, locate the cache and packages, and read and hash files."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import re
import shlex
import stat
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mirrortune.errors import ConfigError, ResourceError

PACKAGE_SCHEME = "package:"
HUB_SCHEME = "hf://"
SHIPPED_SCHEME = "shipped:"
_HUB_PLACE = re.compile(r"((?:\w[\w.-]*/)?\w[\w.-]*)(?:@([^:]+))?(?::([\w.][\w./-]*))?")
PLAIN_NAME = "a plain file name: no folder in it, no dot in front, no control characters"
TAGGED_SUFFIXES = (".conll", ".bio", ".iob", ".iob2")
"""Suffixes of files of tagged words, one word per line."""
TABLE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow", ".txt", *TAGGED_SUFFIXES, ".conllu")
# Errors for impossible file names and inaccessible folders. Missing files are reported elsewhere.
_NO_PATH = frozenset((errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES))
_NOT_UTF8 = re.compile("[\ud800-\udfff]")  # surrogates, with which Python represents bytes it cannot decode
# Files that Windows, macOS, NAS systems and Python leave in folders, apart from names that begin with a dot.
_SYSTEM_NAMES = frozenset((
    "$recycle.bin", "#recycle", "@eadir", "__macosx", "__pycache__", "desktop.ini", "ehthumbs.db", "icon\r",
    "lost+found", "system volume information", "thumbs.db",
))  # fmt: skip


def local_path(name: str | Path) -> Path:
    """Convert a name to a path with ``~`` expanded; the path need not exist.

    Raises:
        ConfigError: no file can have this name, the user after ``~`` is unknown, or a parent folder is not accessible.
            Also for what is no name, such as None.
    """
    if not isinstance(name, str | os.PathLike):
        raise ConfigError("path", f"got {name!r:.60}", allowed="a text or a pathlib.Path")
    where = shown_path(str(name)[:200]).replace("\0", "\\0")
    try:
        path = Path(name).expanduser()
        path.lstat()
    except RuntimeError as error:
        named = Path(name).parts[0]
        fix = f"For a file or folder of that name, write ./{named}"
        raise ConfigError(where, f"the home directory that {named} stands for is unknown", fix=fix) from error
    except ValueError as error:  # a NUL
        raise ConfigError(where, "no file can have that name", fix="Give another") from error
    except OSError as error:
        if error.errno in _NO_PATH:
            raise ConfigError(where, f"cannot be used as a path ({error.strerror})", fix="Give another") from error
    return path


def check_working_directory() -> None:
    """Raise a ResourceError if the working directory has been deleted; torch would end there with an error of MKL."""
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise ResourceError(
            "the working directory", "it has been deleted, or replaced by another of its name",
            fix='Change to a folder that exists (cd "$PWD" enters the one that has replaced it)',
        ) from error  # fmt: skip


def cache_folder() -> Path:
    """Return the absolute path of the cache: ``MIRRORTUNE_CACHE``, or else ``mirrortune`` in the user's cache folder
    (``XDG_CACHE_HOME`` or ``~/.cache``).
    """
    chosen = os.environ.get("MIRRORTUNE_CACHE")
    if chosen:
        return local_path(chosen).absolute()
    return local_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").absolute() / "mirrortune"


def shipped_folder() -> Path:
    """Return the folder of the shipped recipes and data: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def is_safe_entry(path: Path) -> bool:
    """Return whether a cache entry is a regular file that this user owns or that only its owner can write.

    In a shared cache, another user could have replaced any other file. A missing entry is safe.
    """
    try:
        found = path.lstat()
    except OSError:
        return True
    user = os.geteuid() if hasattr(os, "geteuid") else found.st_uid
    is_private = found.st_uid == user or not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISREG(found.st_mode) and is_private


def child_environment() -> dict[str, str]:
    """Return environment variables that keep a child Python process from importing from the working directory.

    That directory may hold an untrusted ``torch.py`` beside the data. It stays on the import path only if this process
    imported mirrortune from it.
    """
    home = Path(__file__).resolve().parents[1]
    given = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry not in ("", ".")]
    searched = {Path(entry).resolve() for entry in (sys.path if sys.flags.safe_path else sys.path[1:]) if entry}
    own = [] if home in searched else [str(home)]
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join([*own, *given])}


def looks_like_path(name: str) -> bool:
    """Return whether ``name`` is a path and not a Hub id (``name`` or ``owner/name``)."""
    path = local_path(name)
    is_rooted = name.startswith((".", "/", "~", "\\")) or path.is_absolute() or path.drive != ""
    is_named_so = table_suffix(path) is not None or is_pattern(name)
    return is_rooted or name.count("/") > 1 or "\\" in name or is_named_so or path.exists()


def is_plain_name(name: str) -> bool:
    """Return whether ``name`` is a file name that is valid and visible on every system, without a folder."""
    return bool(name) and not name.startswith(".") and name.isprintable() and not any(sign in name for sign in "/\\:")


def is_inside(name: str) -> bool:
    """Return whether a path stays in its folder: it is not absolute and contains no ``..``."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


class HubPlace(NamedTuple):
    """A parsed ``owner/name@revision:subfolder``; any other name is stored as ``repository`` unchanged."""

    repository: str
    revision: str | None
    subfolder: str | None


def hub_place(name: str) -> HubPlace:
    """Parse ``owner/name@revision:subfolder``; paths and other names are not split."""
    is_here = name.startswith(PACKAGE_SCHEME) or local_path(name).exists()
    found = None if is_here else _HUB_PLACE.fullmatch(name)
    return HubPlace(found[1], found[2], found[3]) if found else HubPlace(name, None, None)


def table_suffix(path: Path) -> str | None:
    """Return the suffix of a table file without a trailing ``.gz``, or None for any other file."""
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    return suffix if suffix in TABLE_SUFFIXES else None


def is_system(name: str) -> bool:
    """Return whether a file or folder of this name is not data: hidden, or left by an operating system or an editor."""
    return name.startswith((".", "~$")) or name.lower() in _SYSTEM_NAMES


def is_debris(below: str) -> bool:
    """Return whether a file manager leaves files or folders of this name, so that they may be deleted.

    The path of a folder ends in ``/``.
    """
    *folders, name = below.lower().split("/")
    return "@eadir" in folders or name.startswith("._") or name in (
        ".ds_store", "desktop.ini", "ehthumbs.db", "thumbs.db"
    )  # fmt: skip


def shown_path(path: str) -> str:
    r"""Return a path as valid UTF-8 text; undecodable bytes are shown as ``\xff``."""
    return _NOT_UTF8.sub(lambda found: f"\\x{ord(found[0]) & 0xFF:02x}", path)


def shell_word(path: str) -> str:
    """Return a path as a word of a shell command that names it, and is no option if it begins with ``-``."""
    return shlex.quote(f"./{path}" if path.startswith("-") else path)


def is_pattern(name: str) -> bool:
    """Return whether ``name`` is a glob pattern, such as ``rows/*.jsonl``."""
    return any(sign in name for sign in "*?[") and not local_path(name).exists()


def split_sample(name: str) -> tuple[str, int | None]:
    """Split ``rows.csv#500`` (500 rows of ``rows.csv``) into the name and the number of rows, or None without one."""
    place, sign, number = name.rpartition("#")
    if not sign or not number.isdecimal() or local_path(name).exists():
        return name, None
    return place, int(number)


@dataclass(frozen=True, slots=True)
class ModelPlace:
    """The location of a model, parsed from its name.

    Attributes:
        name: name as given.
        kind: ``hub``, ``path``, or ``package`` for ``package:MODULE/SUBFOLDER``.
    """

    name: str
    kind: Literal["hub", "path", "package"]

    @classmethod
    def parse(cls, name: str) -> ModelPlace:
        """Parse a name as a Hub id, a path or a package; the name of an existing file or folder is a path."""
        if name.startswith(PACKAGE_SCHEME):
            return cls(name, "package")
        return cls(name, "path" if looks_like_path(name) else "hub")

    @property
    def is_local(self) -> bool:
        """Whether it is not on the Hub."""
        return self.kind != "hub"

    def path(self) -> Path:
        """Return the local path; raises ConfigError for a package that is not installed."""
        return package_folder(self.name) if self.kind == "package" else local_path(self.name)


@dataclass(frozen=True, slots=True)
class DataPlace:
    """The location of a data set, parsed from ``data.path``.

    Attributes:
        text: text as given.
        name: ``text`` without the number of rows; for an address, only the Hub id.
        kind: ``address`` for ``hf://ID:CONFIG:SPLIT``, ``hub`` for a Hub id, ``shipped`` for ``shipped:NAME``,
            ``pattern`` or ``path``.
        rows: number of rows after ``#``, or None.
        config: configuration in an address, or None.
        split: split in an address, or None.
    """

    text: str
    name: str
    kind: Literal["address", "hub", "shipped", "pattern", "path"]
    rows: int | None
    config: str | None = None
    split: str | None = None

    @classmethod
    def parse(cls, text: str) -> DataPlace:
        """Parse a text as a Hub id, address, pattern or path; the name of an existing file or folder is a path.

        Raises:
            ConfigError: ``shipped:NAME`` leads out of the shipped data, or an address is malformed.
        """
        name, rows = split_sample(text)
        if name.startswith(HUB_SCHEME):
            owner_and_name, *parts = name.removeprefix(HUB_SCHEME).removeprefix("datasets/").split(":")
            if len(parts) > 2 or not owner_and_name:
                raise ConfigError("--data", f"got '{name}'", allowed="hf://owner/name, :config and :split behind it")
            config, split = [*parts, "", ""][:2]
            return cls(text, owner_and_name, "address", rows, config or None, split or None)
        is_shipped = name.startswith(SHIPPED_SCHEME)
        if is_shipped and not is_inside(name.removeprefix(SHIPPED_SCHEME)):
            raise ConfigError("data.path", f"'{name}' leads out of the shipped data", fix="Give the path itself")
        place = cls(text, name, "shipped" if is_shipped else "path", rows)
        if not (place.path().exists() or looks_like_path(name)):
            return cls(text, name, "hub", rows)
        return cls(text, name, "pattern", rows) if is_pattern(name) else place

    @property
    def is_local(self) -> bool:
        """Whether it is not on the Hub."""
        return self.kind not in ("address", "hub")

    def path(self) -> Path:
        """Return the local file, folder or pattern."""
        if self.kind == "shipped":
            return shipped_folder() / self.name.removeprefix(SHIPPED_SCHEME)
        return local_path(self.name)


def package_folder(name: str) -> Path:
    """Return the folder of ``package:MODULE/SUBFOLDER`` without running the package's code.

    Raises:
        ConfigError: the package is not installed or has no such folder.
    """
    module, _, subfolder = name.removeprefix(PACKAGE_SCHEME).partition("/")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "model.name",
            f"'{name}' is inside a Python package that is not installed",
            fix=f"pip install {module.replace('_', '-')} (the quickstart's comes with mirrortune[quickstart])",
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / subfolder
    if not folder.is_dir():
        raise ConfigError("model.name", f"package '{module}' has no folder '{subfolder}'")
    return folder


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: Path) -> str:
    """Read a text file that must be a regular file, because reading a pipe could block forever.

    Raises:
        OSError: there is no regular file at ``path``.
        UnicodeDecodeError: the file is not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return path.read_text(encoding="utf-8")


def read_json_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file.

    Raises:
        OSError: there is no regular file at ``path``.
        ValueError: the file is not JSON, or nested too deeply.
        TypeError: it holds something else than an object.
    """
    try:
        found = json.loads(read_text(path))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, dict):
        raise TypeError(f"{path.name} holds {str(found)[:50]}, not an object")
    return found


def json_object_or_none(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, or None if the file is missing or damaged."""
    with suppress(OSError, ValueError, TypeError):
        return read_json_object(path)
    return None
