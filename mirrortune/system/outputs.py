# SPDX-License-Identifier: Apache-2.0
"""Decide whether an output may be written or replaced, and replace it.

This is the only module that deletes files of an earlier command. Every folder that a command writes holds a marker,
``.mirrortune.json``, with the kind of the folder and a list of its files. A folder without a marker is never replaced;
in a folder with one, only listed files are ever deleted. While a run replaces another, the old run is kept beside it
(``.NAME.replaced``) until the first checkpoint of the new run is saved. All other folders are written under a temporary
name (``.NAME.mt-XXXXXXXX.partial``) and exchanged with the old folder when they are complete.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from safetensors import SafetensorError

from mirrortune.errors import ConfigError, MirrortuneError, ResourceError, first_of
from mirrortune.system.atomic import (
    MARKER,
    PARTIAL,
    cannot_write,
    discard,
    leftover_of,
    place_of_replaced,
    restore_missing,
    swap,
    temporary_name,
    write_files_atomically,
)
from mirrortune.system.claims import claimed, clear_claims, is_claim, place_of_claim
from mirrortune.system.links import contains, holds_tables, is_same, link_into, real
from mirrortune.system.paths import ModelPlace, cache_folder, is_debris, local_path, read_json_object

_VERSION = 1
_SHOWN = 5
Write = Callable[[Path], None]
"""Function that writes the complete content of the folder it is called with."""
What = Literal["model", "data", "recipe", "adapter", "run", "pairs"]


@dataclass(frozen=True, slots=True)
class Input:
    """A file or folder that a command reads."""

    what: What
    path: Path


@dataclass(frozen=True, slots=True)
class OutputKind:
    """A kind of folder that mirrortune writes.

    Attributes:
        name: name of the kind in the marker.
        ways_out: advice for the user if the output is not empty.
        reserved: regular expression for relative paths that belong to mirrortune without being listed in the marker; a
            folder's path ends in ``/``.
        is_exchanged: the folder is written under a temporary name and exchanged, not written in place.
        preface: names of files that are written first; a folder without others is one that was not begun.
    """

    name: str
    ways_out: str = "Choose another with -o, or replace it with --overwrite"
    reserved: str = r"(?!)"
    is_exchanged: bool = False
    preface: frozenset[str] = frozenset()

    def reserves(self, below: str) -> bool:
        """Return whether the relative path ``below`` is reserved for this kind of folder."""
        return re.fullmatch(self.reserved, _named(below)) is not None


def _named(below: str) -> str:
    """Replace the parts of a path that are temporary names by the final names they stand for."""
    parts = below.split("/")
    for place, part in enumerate(parts):
        is_folder = place < len(parts) - 1
        if is_folder or part.endswith(PARTIAL):  # only folders are set aside
            parts[place] = leftover_of(part) or part
    return "/".join(parts)


_ADAPTER = r"(adapter\.(json|safetensors)|adapter_(config\.json|model\.safetensors))"
_TENSORBOARD = r"tensorboard/(mirrortune/(\d+(\.\d+)?/)?(hparams\.yml|events\.out\.tfevents\.[^/]+)?)?"
_WANDB = (  # a folder that holds a marker was written by another command
    r"wandb/((offline-)?run-\d{8}_\d{6}-[^/]+/((files|logs|tmp)/(?!(.*/)?\.mirrortune\.json$).*|run-[^/]+\.wandb[^/]*)?"
    r"|latest-run|settings|debug(-[a-z-]+)?\.log)?"
)
RUN = OutputKind(
    "run",
    "Continue it with --resume, choose another with -o, or replace it with --overwrite",
    rf"recipe\.yaml|(environment|results|status|trainer_state|validation)\.json|(metrics|progress|samples)\.jsonl|README\.md"
    rf"|curves\.png|report\.html|predictions\.safetensors|reports/(merge\.json)?|adapter/{_ADAPTER}?"
    rf"|checkpoints/(step-\d+/({_ADAPTER}|training\.safetensors|state\.json|SHA256SUMS)?)?"
    rf"|mlflow\.db(-(journal|wal|shm))?|{_TENSORBOARD}|{_WANDB}",
    preface=frozenset({"environment.json"}),  # without recipe.yaml, a run cannot be resumed
)
MERGED = OutputKind("merged model", is_exchanged=True)
LORA = OutputKind("LoRA export", is_exchanged=True)
COMPARISON = OutputKind(
    "comparison",
    "Choose another with -o",
    r"results\.json|table\.md|report\.html|score_per_task\.png|score_by_trained_numbers\.png|curves-[^/]+\.png"
    r"|recipes/([^/]+\.yaml)?|cells/.*",
)
FIGURES = OutputKind("figures", "Choose another folder with --figures")
PARTS = OutputKind("unfinished predictions", reserved=r"state\.json|rows-\d+-\d+\.arrow")
_KINDS = {kind.name: kind for kind in (RUN, MERGED, LORA, COMPARISON, FIGURES, PARTS)}
_SCRATCH = "unfinished"


@dataclass(frozen=True, slots=True)
class Marker:
    """The content of a folder's marker.

    Attributes:
        kind: name of the folder's :class:`OutputKind`.
        files: paths of its files, relative to the folder and with ``/`` as separator.
        is_pending: the folder that it replaces is still kept beside it.
    """

    kind: str
    files: frozenset[str]
    is_pending: bool = False

    def owns(self, below: str) -> bool:
        """Return whether mirrortune may delete the relative path ``below``, which ends in ``/`` for a folder.

        It may delete its own files, and the files that file managers leave in any folder.
        """
        if is_debris(below):
            return True
        name, kind = _named(below), _KINDS.get(self.kind)
        is_listed = name == MARKER or name in self.files
        is_above = name.endswith("/") and any(file.startswith(name) for file in self.files)
        return is_listed or is_above or (kind is not None and kind.reserves(below))


_NOTHING = Marker("", frozenset())


def read_marker(folder: Path) -> Marker | None:
    """Read the marker of a folder, or return None if mirrortune did not write the folder."""
    path = folder / MARKER
    with suppress(OSError, ValueError, TypeError, KeyError):
        if not path.is_symlink():
            found = read_json_object(path)
            files = frozenset(map(str, found["files"]))
            return Marker(kind=str(found["kind"]), files=files, is_pending=found.get("pending") is True)
    return None


def write_marker(folder: Path, marker: Marker) -> None:
    """Write the marker of a folder.

    Raises:
        ResourceError: the marker cannot be written.
    """
    data: dict[str, Any] = {"version": _VERSION, "kind": marker.kind, "files": sorted(marker.files)}
    data |= {"pending": True} if marker.is_pending else {}
    write_files_atomically(folder, {MARKER: (json.dumps(data, indent=1) + "\n").encode()})


def may_replace(output: Path, inputs: Iterable[Input], kind: OutputKind, *, overwrite: bool = False) -> None:
    """Check that an output folder may be written, or replaced with ``overwrite``. Nothing is changed.

    Args:
        output: folder to create.
        inputs: all files and folders that the command reads.
        kind: kind of the output.
        overwrite: replace a folder of the same kind.

    Raises:
        ConfigError: the path can never be an output (:func:`check_place`), the folder is not empty and ``overwrite``
            was not given, or it holds files that mirrortune did not write.
    """
    check_place(output, inputs, kind)
    if os.path.lexists(old := place_of_replaced(output)):  # not mirrortune's: `settle` would have handled it
        raise ConfigError(str(output), f"{old} is in the way", fix="Move it elsewhere, or choose another with -o")
    marker = read_marker(output)
    if holds_nothing(output, kind):
        return
    if not overwrite:
        raise ConfigError(str(output), "the output directory is not empty", fix=kind.ways_out)
    if os.path.ismount(output):
        raise _is_mount_point(output)
    if marker is None or marker.kind != kind.name:
        found = "no folder that mirrortune wrote" if marker is None else f"a {marker.kind}, not a {kind.name},"
        raise ConfigError("--overwrite", f"{output} is {found} and is left alone", fix="Choose another with -o")
    if others := strangers(output, marker):
        problem = f"{output} also contains files or folders that are not part of the {marker.kind}"
        shown = f"{problem}: {first_of(others, _SHOWN)}"
        raise ConfigError("--overwrite", shown, fix="Move it elsewhere, or choose another with -o")


def _is_mount_point(output: Path) -> ConfigError:
    problem = "it is a mount point, whose name cannot be given to another folder"
    return ConfigError(str(output), problem, fix=f"Name a folder in it, such as {output / 'NAME'}")


def check_place(output: Path, inputs: Iterable[Input], kind: OutputKind | None = None) -> None:
    """Check that a path can be an output folder, regardless of its content.

    Args:
        output: folder to create.
        inputs: all files and folders that the command reads.
        kind: kind of the output; a folder that is exchanged cannot be a mount point.

    Raises:
        ConfigError: the path is the working directory, the home directory, the cache or a parent of one of them; it is
            a symbolic link or a file; or it is, contains or lies in an input.
    """
    where, fix = str(output), "Choose another with -o"
    local_path(output)
    if output.is_symlink():
        raise ConfigError(where, f"it is a symbolic link to {output.readlink()}", fix="Give the folder itself with -o")
    target = real(output)
    kept = {"the working directory": Path.cwd(), "the cache (MIRRORTUNE_CACHE)": cache_folder()}
    with suppress(RuntimeError):  # the user has no home directory
        kept["your home directory"] = Path.home()
    for what, place in kept.items():
        if contains(target, place):
            how = f"it is {what}" if is_same(target, real(place)) else f"{what} lies in it"
            raise ConfigError(where, how, fix=f"Name a folder of its own, such as {output / 'NAME'}")
    check_names(target, where)
    if output.name == "..":
        raise ConfigError(where, "its name is '..'", fix=f"Name the folder itself: {target}")
    if kind is not None and kind.is_exchanged and os.path.ismount(target):
        raise _is_mount_point(output)
    if output.exists() and not output.is_dir():
        raise ConfigError(where, "it is a file", fix=fix)
    check_apart(output, inputs)
    if above := next((p for p in target.parents if p.exists() and not p.is_dir()), None):
        raise ConfigError(where, f"{above} is a file", fix=fix)


def check_names(path: Path, where: str) -> None:
    """Check that no part of a path has the form of a temporary name, which a later command could take for a leftover.

    Raises:
        ConfigError: a part of ``path`` has this form.
    """
    for name in (path.name, *(above.name for above in real(path).parents)):
        if leftover_of(name) is not None or is_claim(name):
            raise ConfigError(where, f"{path}: {name} is a name for temporary files", fix="Choose another name")


def check_apart(output: Path, inputs: Iterable[Input], where: str | None = None, *, is_file: bool = False) -> None:
    """Check that an output is not an input, does not contain one, and does not lie in one.

    There are two exceptions: a new file or folder may lie in a run directory, beside the run's own files; and a new
    folder may lie in a folder of tables, whose subfolders are not read.

    Args:
        output: file or folder to write.
        inputs: all files and folders that the command reads.
        where: flag or path to name in the error; ``output`` by default.
        is_file: the output is a file.

    Raises:
        ConfigError: the output overlaps with an input, which the error names.
    """
    target = real(output)
    for given in inputs:
        read = real(given.path)
        if not read.exists():
            continue
        if is_same(target, read):
            how = f"it is the {given.what} that is read"
        elif contains(target, read):
            how = f"the {given.what} that is read lies in it: {given.path}"
        elif contains(read, target) and not _is_beside_content(target, read, given.what, is_file=is_file):
            how = f"it lies in the {given.what} that is read: {given.path}"
        elif given.what != "run" and (link := link_into(read, target, only_tables=given.what == "data")):
            how = f"a link in the {given.what} that is read leads there: {link}"
        else:
            continue
        raise ConfigError(
            where or str(output), how if where is None else f"{output}: {how}", fix="Choose another place"
        )


def check_file(path: Path, inputs: Iterable[Input], where: str) -> None:
    """Check that a path can be an output file. Whether an existing file may be replaced is left to the caller.

    Raises:
        ConfigError: the path is a folder, a symbolic link or another non-regular file, or it is an input.
    """
    fix = "Give another name"
    local_path(path)
    check_names(path, where)
    if path.is_symlink():
        raise ConfigError(where, f"{path} is a symbolic link to {path.readlink()}", fix=fix)
    if path.is_dir():
        raise ConfigError(where, f"{path} is a folder", fix=f"Name a file, such as {path / 'NAME'}")
    if path.exists() and not path.is_file():
        raise ConfigError(where, f"{path} is not a regular file", fix=fix)
    check_apart(path, inputs, where, is_file=True)
    if above := next((p for p in real(path).parents if p.exists() and not p.is_dir()), None):
        raise ConfigError(where, f"{path}: {above} is a file", fix=fix)
    if path.name == MARKER:
        raise ConfigError(where, f"{MARKER} is the name of our own records", fix=fix)
    marker = read_marker(path.parent)
    if marker is not None and marker.owns(path.name) and not path.name.endswith(".html"):
        raise ConfigError(where, f"{path} belongs to the {marker.kind} there", fix=fix)


def model_inputs(name: str | None) -> list[Input]:
    """Return the folder or file of a local model; empty for a model that is not local."""
    place = None if name is None else ModelPlace.parse(name)
    return [Input("model", place.path())] if place is not None and place.is_local else []


def adapter_inputs(folders: Iterable[Path]) -> list[Input]:
    """Return adapter folders and the run directories they belong to."""
    found = []
    for folder in folders:
        found.append(Input("adapter", folder))
        marker = read_marker(folder.parent) if folder.name == "adapter" else None
        if marker is not None and marker.kind == RUN.name:
            found.append(Input("run", folder.parent))
    return found


def strangers(folder: Path, marker: Marker) -> list[str]:
    """Return the sorted paths below a folder that mirrortune did not write.

    Empty subfolders are included; symbolic links are not followed.
    """
    found = []
    for place, folders, files in os.walk(folder):
        names = [*files, *(name for name in folders if Path(place, name).is_symlink())]
        found += [Path(place, name).relative_to(folder).as_posix() for name in names]
        if not folders and not files and Path(place) != folder:
            found.append(f"{Path(place).relative_to(folder).as_posix()}/")
    claim = place_of_claim(folder).name if os.path.ismount(folder) else None
    return sorted(name for name in found if name != claim and not marker.owns(name))


def holds_nothing(folder: Path, kind: OutputKind) -> bool:
    """Return whether a folder is missing or empty, or holds only what a process that ended too early wrote first."""
    if not folder.is_dir():
        return not folder.exists()
    if _is_unbegun(folder):
        return True
    marker = read_marker(folder)
    if marker is None or marker.kind != kind.name or marker.files:
        return False
    kept = {f for *_, files in os.walk(folder) for f in files} - {MARKER, place_of_claim(folder).name, *kind.preface}
    return all(map(leftover_of, kept)) and not strangers(folder, marker)


@contextmanager
def output_folder(
    output: Path, inputs: Sequence[Input], kind: OutputKind, *, overwrite: bool = False
) -> Iterator[Callable[[Write], None]]:
    """Claim an output folder, check that it may be written, and yield the function that writes it.

    Args:
        output: folder to create.
        inputs: all files and folders that the command reads.
        kind: kind of the output.
        overwrite: replace a folder of the same kind.

    Yields:
        A function that calls its argument with a temporary folder, repeats the checks, and renames that folder to
        ``output``.

    Raises:
        ConfigError: the output may not be written (:func:`may_replace`), or another process writes it.
        ResourceError: the output cannot be written; an old folder is unchanged.
    """

    def replace(write: Write) -> None:
        _replace(output, kind, write, lambda: may_replace(output, inputs, kind, overwrite=overwrite))

    check_place(output, inputs, kind)
    with claimed(output):
        settle(output)
        may_replace(output, inputs, kind, overwrite=overwrite)
        yield replace


def settle(output: Path) -> None:
    """Clean up after a process that was killed while writing ``output``, whose claim the caller holds.

    An old folder whose replacement was not completed is restored; temporary folders and claims are removed.
    """
    old = place_of_replaced(output)
    replaced = None if old.is_symlink() else read_marker(old)
    if replaced is not None or (old / "adapter.json").is_file():  # the adapter folder of a run has no marker
        restore_missing(output)
    marker = read_marker(output)
    if replaced is None and not old.is_symlink() and _is_unbegun(old):
        discard(old, is_ours=_NOTHING.owns)
    if replaced is not None and old.is_dir():
        if (marker is not None and marker.is_pending) or _is_unbegun(output):
            put_back(output)
        elif marker is not None:
            discard(old, is_ours=replaced.owns, into=output)
    for scratch in output.parent.glob(f".{glob.escape(output.name)}.*{PARTIAL}"):
        found = read_marker(scratch)
        if leftover_of(scratch.name) != output.name or scratch.is_symlink() or not scratch.is_dir():
            continue
        if found is not None and found.kind == _SCRATCH:
            _drop_scratch(scratch, output)
        elif _is_unbegun(scratch):
            discard(scratch, is_ours=_NOTHING.owns)
    if not output.is_symlink():
        clear_claims(output)


def put_back(output: Path) -> None:
    """Restore an output that was set aside, if there is one, in place of a replacement that was not completed."""
    old = place_of_replaced(output)
    if not old.is_dir() or old.is_symlink():
        return
    discard(output, is_ours=(read_marker(output) or _NOTHING).owns, into=old)
    with suppress(OSError):
        old.rename(output)


def restore(folder: Path) -> Path:
    """Restore ``folder`` if a killed process set it aside without replacing it; return ``folder`` in any case."""
    if folder.name and place_of_replaced(folder).is_dir():
        # Nothing to do if the place is read-only, or if another process is writing there: that process cleans up.
        with suppress(MirrortuneError, OSError), claimed(folder):
            settle(folder)
    return folder


def _is_unbegun(folder: Path) -> bool:
    """Return whether a folder is empty, apart from an unfinished marker and, in a mount point, the claim on it."""
    if not folder.is_dir():
        return False
    names = {f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir()}
    return all(leftover_of(name) == MARKER or is_debris(name) for name in names - {place_of_claim(folder).name})


def _replace(output: Path, kind: OutputKind, write: Write, ask: Callable[[], None]) -> None:
    scratch = None
    try:
        scratch = Path(tempfile.mkdtemp(*temporary_name(output.name), dir=output.parent))
        write_marker(scratch, Marker(_SCRATCH, frozenset()))
        content = scratch / output.name
        content.mkdir()
        write(content)
        files = frozenset(f.relative_to(content).as_posix() for f in content.rglob("*") if not f.is_dir())
        write_marker(content, Marker(kind.name, files))
        ask()
        old = read_marker(output)
        swap(content, output, is_ours=old.owns if old else lambda _: False)
    except ResourceError as error:
        hidden = scratch is not None and Path(error.where).is_relative_to(scratch)
        raise ResourceError(str(output) if hidden else error.where, error.problem, fix=error.fix) from error
    except (OSError, SafetensorError) as error:
        raise cannot_write(output, error) from error
    finally:
        if scratch is not None:
            _drop_scratch(scratch, output)


def _drop_scratch(scratch: Path, output: Path) -> None:
    """Delete a temporary folder.

    After an exchange this is the old folder, which has a marker: only its listed files are deleted, and all others are
    moved to the new folder.
    """
    content = scratch / output.name
    marker = read_marker(content)
    if marker is None:
        shutil.rmtree(scratch, ignore_errors=True)
        return
    into = output if output.is_dir() and not output.is_symlink() else None
    discard(content, is_ours=marker.owns, into=into)
    if not content.exists():
        shutil.rmtree(scratch, ignore_errors=True)


def _is_beside_content(target: Path, read: Path, what: What, *, is_file: bool) -> bool:
    """Return whether a new output at ``target`` in the input folder ``read`` would not become part of the input."""
    parts = [part for part in (target, *target.parents) if not is_same(part, read) and contains(read, part)]
    below = PurePosixPath(*(part.name for part in reversed(parts)))
    if what == "run":
        return not RUN.reserves(f"{below.parts[0]}/") and (is_file or not RUN.reserves(below.as_posix()))
    return what == "data" and not is_file and holds_tables(read)
