# SPDX-License-Identifier: Apache-2.0
"""Push a run's adapter or a merged model to the Hub."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mirrortune.adapters.files.adapter_file import read_adapter
from mirrortune.adapters.files.find import require_adapter
from mirrortune.errors import VerificationError
from mirrortune.merging.parcel import CARD, Parcel, adapter_parcel, check_files, merged_parcel, read_report
from mirrortune.reports import model_card
from mirrortune.system.console import Reporter
from mirrortune.system.hub import ADAPTER_FILES, Upload, check_repository, upload
from mirrortune.system.paths import local_path
from mirrortune.system.run_directory import run_of

_OLD_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
"""Files of weights that transformers would read beside, or instead of, those of a new model."""
_OLD_ADAPTER = (*ADAPTER_FILES, "adapter_model.bin")
"""Files of an adapter, which transformers or mirrortune would load on top of, or instead of, merged weights."""
_OF_PEFT = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
"""Those of them that transformers loads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PushResult:
    """The ``--json`` object of ``push``.

    Attributes:
        repository: id of the repository.
        url: URL of the commit.
        kind: ``adapter`` or ``merged``.
        files: paths in the repository of the uploaded files.
        kept: files of the repository that were not replaced: a model card that a person has written.
        deleted: files of the repository that were deleted: weights of an earlier model, or an earlier adapter.
    """

    repository: str
    url: str
    kind: str
    files: list[str]
    kept: list[str]
    deleted: list[str]


def push(
    target: str,
    repository: str,
    reporter: Reporter,
    *,
    revision: str | None = None,
    private: bool = False,
    replace_card: bool = False,
) -> PushResult:
    """Upload a run's adapter, an adapter folder or a merged model to a Hub repository, which is created if missing.

    Everything is checked before the first upload. Only regular files of the adapter or the merged model are uploaded,
    and each is listed with its size; local paths are removed from the uploaded copies.

    Args:
        target: run directory, adapter folder, or folder written by ``merge``.
        repository: ``name`` or ``owner/name``.
        reporter: prints notes.
        revision: existing branch to upload to.
        private: create a private repository; an existing public one is refused.
        replace_card: replace a model card in the repository that a person has written or edited.

    Raises:
        ConfigError: ``target`` cannot be pushed, or ``repository`` is not a valid id.
        VerificationError: the adapter is damaged, the merged model was not verified or has been changed since, or a
            file is a symbolic link.
        HubError: the upload failed.
    """
    check_repository(repository)
    folder = local_path(target)
    is_merged = (folder / "merge.json").is_file()
    with tempfile.TemporaryDirectory() as staged:
        if is_merged:
            report = _checked_report(folder)
            notes = check_files(folder, report)
            parcel = merged_parcel(folder, report, Path(staged))
            parcel.notes += notes
        else:
            parcel = pack_adapter(require_adapter(target, "push"), Path(staged), repository)
        _check_card(parcel.files.get(CARD), folder)
        total = sum(path.stat().st_size for path in parcel.files.values())
        where = f"{repository}{' (private)' if private else ''}"
        reporter.note(f"pushing {len(parcel.files)} files ({total:,} bytes) to {where}:")
        for line in parcel.describe():
            reporter.note(line)
        done = upload(
            parcel.files, repository, revision=revision, private=private, keep=cards_kept(replace_card=replace_card),
            is_outdated=lambda name: is_merged and (name in _OLD_ADAPTER or _OLD_WEIGHTS.fullmatch(name) is not None),
        )  # fmt: skip
    for note in kept_notes(done):
        reporter.note(note)
    kind, files = "merged" if is_merged else "adapter", sorted(parcel.files.keys() - set(done.kept))
    return PushResult(
        repository=done.repository, url=done.url, kind=kind, files=files, kept=done.kept, deleted=done.deleted
    )


def cards_kept(*, replace_card: bool) -> dict[str, Callable[[bytes], bool]]:
    """Return the argument ``keep`` of :func:`upload`: a card that a person has written is kept unless replaced on
    request.
    """
    return {CARD: lambda held: not replace_card and not model_card.is_generated(held.decode("utf-8", "replace"))}


def kept_notes(done: Upload) -> list[str]:
    """Return a line for each file of the repository that was kept, and one for those that were deleted.

    Another line names files of an adapter of PEFT that stay beside one of mirrortune. They may be an export of it.
    """
    lines = [
        f"{name} of {done.repository} is kept, as it was written or edited by hand; --replace-card replaces it"
        for name in done.kept
    ]
    if done.deleted:
        lines.append(f"deleted files of an earlier model or adapter there: {', '.join(done.deleted)}")
    if stale := [name for name in done.untouched if PurePosixPath(name).name in _OF_PEFT]:
        lines.append(
            f"{', '.join(stale)} of {done.repository} are not of this adapter and stay; transformers loads them from "
            "there, so delete them unless they belong to it"
        )
    return lines


def pack_adapter(folder: Path, staged: Path, title: str) -> Parcel:
    """Collect and check an adapter's files with the card, recipe, results and curves of its run.

    Files that contain local paths are replaced by copies without them in ``staged``.
    """
    adapter = read_adapter(folder)
    parcel = adapter_parcel(folder, staged, is_of_run=run_of(folder) is not None)
    base = json.loads(parcel.files["adapter.json"].read_text(encoding="utf-8"))["base"]  # without local paths
    if CARD in parcel.files:
        return parcel
    recipe, has_curves = parcel.files.get("recipe.yaml"), "curves.png" in parcel.files
    card = model_card.card_of_run(adapter, title, is_merged=False, base=base, recipe=recipe, has_curves=has_curves)
    parcel.write(CARD, model_card.signed(card or model_card.adapter_card(title, base, adapter.spec.method)))
    return parcel


def _checked_report(folder: Path) -> dict[str, Any]:
    """Read the report of a merged folder, and check that the merge passed its verification.

    Raises:
        VerificationError: it did not.
    """
    report = read_report(folder)
    if report["verification"].get("passed") is not True or not (folder / "config.json").is_file():
        raise VerificationError(str(folder), "its merge did not pass verification", fix="Merge again")
    return report


def _check_card(path: Path | None, folder: Path) -> None:
    """Raise VerificationError for a model card that is missing or that huggingface_hub cannot parse."""
    from huggingface_hub import ModelCard  # noqa: PLC0415

    if path is None:
        raise VerificationError(str(folder / "README.md"), "there is no model card", fix="Merge again")
    try:
        ModelCard.load(path)
    except (ValueError, OSError) as error:
        raise VerificationError(
            str(path), f"not a valid model card ({str(error)[:200]})", fix="Correct its header"
        ) from error
