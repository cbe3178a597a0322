# SPDX-License-Identifier: Apache-2.0
"""Values of ``data.path``: one path, or a list whose items are paths or mappings with a ``path``; and model paths.

The functions take values as they stand in a recipe file and as they are after it is checked. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mirrortune.system.paths import HUB_SCHEME, SHIPPED_SCHEME, is_pattern, local_path, split_sample, table_suffix

_MOST_NAMED = 2


def named_paths(value: Any) -> list[str]:
    """Return the paths of a value, in order; items of another form, which the schema refuses, are left out."""
    items = value if isinstance(value, (list, tuple)) else [value]
    found = (item.get("path") if isinstance(item, dict) else getattr(item, "path", item) for item in items)
    return [path for path in found if isinstance(path, str)]


def with_paths(value: Any, change: Callable[[str], str]) -> Any:
    """Return the value with every path changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(with_paths(item, change) for item in value)
    if isinstance(value, dict):
        return {**value, "path": change(value["path"])} if isinstance(value.get("path"), str) else value
    return value.model_copy(update={"path": change(value.path)}) if hasattr(value, "path") else value


def is_same_data(first: Any, second: Any) -> bool:
    """Return whether two values name the same files and ids in the same order; False if either names none."""
    one, other = ([os.path.realpath(path) for path in named_paths(value)] for value in (first, second))
    return bool(one) and one == other


def bare_names(value: Any) -> list[str]:
    """Return the paths without numbers of rows and the Hub's scheme: ``owner/name:config:split`` of an address."""
    return [split_sample(path)[0].removeprefix(HUB_SCHEME).removeprefix("datasets/") for path in named_paths(value)]


def short_name(value: Any) -> str:
    """Return a name for the data sets of a value, such as ``reviews`` or ``reviews-and-2-more``; "" for none."""
    stems = [Path(path).stem for path in named_paths(value)]
    more = [f"and-{len(stems) - 1}-more"] if len(stems) > _MOST_NAMED else stems[1:]
    return "-".join([*stems[:1], *more])


def absolute_paths(value: Any) -> Any:
    """Return the value with local paths that exist made absolute."""

    def change(path: str) -> str:
        given, number = split_sample(path)
        if not given or not local_path(given).exists():
            return path
        return _numbered(local_path(given).resolve(), number)

    return with_paths(value, change)


def anchored_paths(value: Any, folder: Path) -> Any:
    """Return the value with paths that are relative to the folder of a recipe made absolute."""

    def change(path: str) -> str:
        if path.startswith(SHIPPED_SCHEME):
            return path
        given, number = split_sample(path)
        beside = folder / given
        is_file = table_suffix(Path(given)) is not None or given.startswith(".")
        is_beside = beside.exists() and (is_file or beside.is_dir()) and not Path(given).is_absolute()
        return _numbered(beside.resolve(), number) if is_beside else path

    return with_paths(value, change)


def anchored_model(name: str, folder: Path) -> str:
    """Return the name of a model, made absolute if it is a path relative to the folder of a recipe.

    A path such as ``../model`` that leads nowhere from that folder may lead somewhere from the working directory.
    """
    if not name or Path(name).is_absolute():
        return name
    beside = local_path(folder / name)
    is_model = (beside / "config.json").is_file() or (beside.suffix == ".gguf" and beside.is_file())
    return str(beside.resolve()) if is_model else name


def walks_far(value: Any) -> bool:
    """Return whether a pattern may search more than the folders of one: ``/**/*.csv`` walks every disk."""
    return any(
        "**" in path or sum(any(sign in part for sign in "*?[") for part in Path(path).parts) > 2
        for path in named_paths(value)
        if is_pattern(path)
    )


def _numbered(path: Path, number: int | None) -> str:
    return str(path) + (f"#{number}" if number is not None else "")
