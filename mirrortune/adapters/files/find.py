# SPDX-License-Identifier: Apache-2.0
"""Find the adapter of a target: a folder, a run directory, or a repository on the Hub."""

from __future__ import annotations

from pathlib import Path

from mirrortune.errors import ConfigError
from mirrortune.system.hub import holds_adapter, local_adapter
from mirrortune.system.outputs import COMPARISON, LORA, read_marker, restore
from mirrortune.system.paths import ModelPlace, hub_place, local_path


def find_adapter(target: str) -> Path | None:
    """Return the adapter folder of ``target``, a run directory or the folder itself, or None for anything else.

    Raises:
        ConfigError: ``target`` is a run directory whose training has not finished.
    """
    path = restore(local_path(target))
    if (path / "adapter.json").is_file():
        return path
    if restore(path / "adapter").is_dir():
        return path / "adapter"
    if (path / "checkpoints").is_dir():
        raise ConfigError(
            target,
            "this run has not finished, it has no adapter yet",
            fix="Wait until it ends, or continue it: train ... --resume",
        )
    return None


def require_adapter(target: str, command: str = "merge") -> Path:
    """Return the folder of an adapter that is local (:func:`find_adapter`) or on the Hub.

    On the Hub, ``target`` is ``owner/name@revision:subfolder`` with optional revision and subfolder.

    Args:
        target: folder or repository.
        command: command that needs the adapter, for the error.

    Raises:
        ConfigError: there is no adapter.
    """
    folder = find_adapter(target)
    if folder is None and _is_on_hub(target):
        return local_adapter(target)
    if folder is None:
        _refuse_other_formats(target)
        problem, fix = f"'{target}' is neither a run directory nor an adapter folder", "Give what train wrote"
        marker = read_marker(local_path(target))
        if marker is not None and marker.kind == COMPARISON.name:
            runs = sorted(local_path(target).glob("cells/*/*/*/*/results.json"))
            problem = f"'{target}' is a comparison of many runs"
            fix = f"Give one of them, such as {runs[0].parent}" if runs else "Give one of its runs, in cells"
        raise ConfigError(command, problem, fix=fix)
    return folder


def adapter_to_score(target: str) -> Path | None:
    """Return the adapter folder of ``target`` as :func:`require_adapter` does, or None if it may be a model."""
    folder = find_adapter(target)
    if folder is None:
        _refuse_other_formats(target)
    if folder is not None or not _is_on_hub(target):
        return folder
    if holds_adapter(target):
        return local_adapter(target)
    if hub_place(target).subfolder is not None:
        raise ConfigError(target, "no adapter is there", allowed="an adapter, or the id of a model without subfolder")
    return None


def _refuse_other_formats(target: str) -> None:
    """Raise ConfigError for an exported LoRA, or for an adapter that PEFT saved without mirrortune's, and no model."""
    path = local_path(target)
    marker = read_marker(path)
    if marker is not None and marker.kind == LORA.name:
        raise ConfigError(
            target, "a LoRA that merge --format exported, for other programs",
            fix="Give the run or adapter that it was made from; hf upload sends the folder to the Hub as it is",
        )  # fmt: skip
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise ConfigError(
            target, "a PEFT adapter without mirrortune's adapter.json",
            fix="Merge it with PEFT (merge_and_unload, then save_pretrained), and give the merged folder where a model "
            "is taken; mirrortune analyze reads it as it is",
        )  # fmt: skip


def _is_on_hub(target: str) -> bool:
    """Return whether ``target`` is an ``owner/name`` id of a repository and not a local path."""
    repository = hub_place(target).repository
    owner, _, name = repository.partition("/")
    return bool(name) and not ModelPlace.parse(repository).is_local and not Path(owner).exists()
