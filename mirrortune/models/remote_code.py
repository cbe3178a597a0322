# SPDX-License-Identifier: Apache-2.0
"""Announce code of model repositories that is about to run, and refuse what would run or be read without asking."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mirrortune.errors import ConfigError
from mirrortune.system.console import announce
from mirrortune.system.hub import hub_errors, resolve_commit
from mirrortune.system.paths import json_object_or_none

# Files in which a repository names its classes, and the file that replaces generate().
_DESCRIPTIONS = (
    "config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip
_GENERATE = "custom_generate/generate.py"
# Settings of tokenizers that may be the path of a vocabulary instead of a vocabulary. Older releases of transformers
# recorded the paths of three other files, which are not read as a vocabulary: two are not opened, and the third must be
# a tokenizer.json.
_NAMES_A_FILE = re.compile(
    r"(?!(special_tokens_map|added_tokens|tokenizer)_file$)((\w+_)?(vocab|merges|file)|init_inputs)"
)


def announce_code(name: str, location: str, commit: str | None) -> str | None:
    """Announce each repository whose code is about to run, with its commit, in one line.

    Args:
        name: name of the model as given by the user.
        location: argument of ``from_pretrained``.
        commit: commit of a Hub repository, or None for a folder.

    Returns:
        The commit of another repository that holds the model's code, to which every ``from_pretrained`` must be pinned;
        None if there is no other repository.

    Raises:
        ConfigError: classes come from several other repositories, of which transformers can pin only one.
    """
    found, code_revision = _code_of(name, location, commit), None
    pinned = [place for place, classes in found.items() if place or (commit and set(classes) != {_GENERATE})]
    if len(pinned) > 1:
        others = ", ".join(place or name for place in pinned)
        raise ConfigError(
            f"model '{name}'", f"its code lies in several repositories, which cannot all be pinned: {others}",
            fix="Download the model and put the code into its folder",
        )  # fmt: skip
    for repository, classes in found.items():
        if repository is not None:
            code_revision = resolve_commit(repository, repository, None, "model", "--model")
            place = f"{repository} at commit {code_revision} (named by {name})"
        else:
            place = f"{name} at commit {commit}" if commit else f"folder {location}, which has no commit"
        announce(f"running code of {place}: {', '.join(dict.fromkeys(classes))}")
    return code_revision


def refuse_kernels(name: str, config: Any) -> None:
    """Check that a configuration does not make transformers download and run compiled kernels of another repository.

    Raises:
        ConfigError: it or a configuration in it does; the error names the repository.
    """
    sections = [config]
    while sections:
        section = sections.pop()
        sections += [value for value in vars(section).values() if hasattr(value, "model_type")]
        for key in ("_attn_implementation", "_experts_implementation"):
            wanted = getattr(section, key, None)
            if isinstance(wanted, str) and "/" in wanted:
                raise ConfigError(
                    f"model '{name}'", f"its configuration asks for code from '{wanted}'",
                    fix="Read that code, then pass --trust-remote-code (it runs with your permissions)",
                )  # fmt: skip


def refuse_foreign_files(name: str, files: Iterable[Path | None]) -> None:
    """Check that the settings of a tokenizer name no file outside of the model's folder. Any text file can be read as a
    vocabulary, which ``merge`` would copy and ``push`` send.

    Args:
        name: name of the model.
        files: JSON files with settings; None for a missing one.

    Raises:
        ConfigError: they do; the error names the setting and the file.
    """
    from huggingface_hub import constants  # noqa: PLC0415

    for path in filter(None, files):
        roots = [Path(os.path.realpath(place)) for place in (path.parent, constants.HF_HUB_CACHE)]
        for key, value in (json_object_or_none(path) or {}).items():
            for text in value if key == "init_inputs" and isinstance(value, list) else (value,):
                is_file = isinstance(text, str) and _NAMES_A_FILE.fullmatch(key) and _is_file(text)
                if is_file and not any(Path(os.path.realpath(text)).is_relative_to(root) for root in roots):
                    raise ConfigError(
                        f"model '{name}'", f"{path.name}: {key} is a file outside of the model's folder: {text}",
                        fix="Remove this setting, or put the file into the folder under its usual name",
                    )  # fmt: skip


def _is_file(text: str) -> bool:
    return os.path.lexists(text) and not Path(text).is_dir()


def _code_of(name: str, location: str, commit: str | None) -> dict[str | None, list[str]]:
    """Return the class names by the repository that holds their code, with None for the model's repository."""
    from transformers.utils.hub import cached_file  # noqa: PLC0415

    def find(file: str) -> Path | None:
        with hub_errors(f"model '{name}'", flag="--model"):
            path = cached_file(location, file, revision=commit, _raise_exceptions_for_missing_entries=False)
        return None if path is None else Path(path)

    found: dict[str | None, list[str]] = {}
    for file in _DESCRIPTIONS:
        path = find(file)
        for reference in _references(path) if path else ():
            repository, _, own = reference.rpartition("--")
            found.setdefault(repository or None, []).append(own)
    if find(_GENERATE):
        found.setdefault(None, []).append(_GENERATE)
    return found


def _references(path: Path) -> list[str]:
    """Return the references in the ``auto_map`` of a file."""
    mapped = (json_object_or_none(path) or {}).get("auto_map")  # transformers rejects a damaged file
    values = mapped.values() if isinstance(mapped, dict) else ()
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return [item for item in flat if isinstance(item, str)]
