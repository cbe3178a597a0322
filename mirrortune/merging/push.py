# SPDX-License-Identifier: Apache-2.0
"""What leaves a run: a merged model with everything that belongs beside it, and either of them on the Hub."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirrortune.adapters.factor_cache import FactorCache
from mirrortune.adapters.files.adapter_file import read_adapter
from mirrortune.adapters.files.find import require_adapter
from mirrortune.errors import ResourceError, VerificationError
from mirrortune.merging import bases
from mirrortune.merging.in_memory import Verification
from mirrortune.merging.parcel import Parcel, adapter_parcel, merged_parcel, read_report
from mirrortune.merging.write import merge_folder
from mirrortune.reports import model_card
from mirrortune.system.console import Reporter
from mirrortune.system.hub import check_repository, upload
from mirrortune.system.paths import local_path
from mirrortune.system.run_directory import record_merge, run_of
from mirrortune.system.tensor_files import read_headers


def merge(
    targets: Sequence[str],
    reporter: Reporter,
    *,
    output_dir: str,
    base: str | None = None,
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
    force_base: bool = False,
    trust_remote_code: bool = False,
) -> Verification:
    """Merge the adapters of runs (or adapter folders) into their base and write a plain, verified checkpoint.

    Args:
        targets: run directories or adapter folders, merged in this order.
        reporter: is told.
        output_dir: folder to make.
        base: another place of the same base.
        max_shard_bytes: size of the files; as in the base by default.
        overwrite: replace an earlier merge there.
        force_base: take a base with other weights.
        trust_remote_code: run code from the base's repository.
    """
    folders = [require_adapter(target) for target in targets]
    adapter = read_adapter(folders[-1])
    into = bases.in_words(read_adapter(folders[0]), base)
    reporter.note(f"merging {', '.join(map(str, folders))} into {into}")
    run = run_of(folders[-1])
    card = _card(folders[-1], Path(output_dir).name, is_merged=True)
    extra = {"README.md": card or model_card.merged_card(adapter.base, adapter.spec.method, adapter.task)}
    if run is not None:
        extra["recipe.yaml"] = run.recipe.read_text(encoding="utf-8")
    remarks: list[str] | None = [] if force_base else None
    verdict = merge_folder(
        folders,
        Path(output_dir),
        factor_source=FactorCache(),
        base=base,
        extra_files=extra,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        remarks=remarks,
        trust_remote_code=trust_remote_code,
        on_note=reporter.note,
    )
    report = json.loads((Path(output_dir) / "merge.json").read_text(encoding="utf-8"))
    for remark in remarks or ():
        reporter.note(f"by force: {remark}")
    for merged in filter(None, map(run_of, folders)):
        try:
            record_merge(merged, output_dir, report)
        except ResourceError as error:  # a run on a disk that may only be read
            reporter.note(f"warning: this merge is not recorded: {error.where} {error.problem}")
    return verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class PushResult:
    """The ``--json`` object of push.

    Attributes:
        repository: its id.
        url: of the commit.
        kind: ``adapter`` or ``merged``.
        files: that were sent.
    """

    repository: str
    url: str
    kind: str
    files: list[str]


def push(
    target: str, repository: str, reporter: Reporter, *, revision: str | None = None, private: bool = False
) -> PushResult:
    """Send a run's adapter, an adapter folder or a merged folder to a repository of the Hub, which is made if need be.

    Everything is read back and checked before anything is sent. What is sent is named with its size: the files of the
    adapter or of the merged model, regular files only, and nothing else that lies beside them. Local paths are cut out
    of copies of them.

    Args:
        target: run directory, adapter folder, or a folder that merge wrote.
        repository: ``name`` or ``owner/name``.
        reporter: is told.
        revision: branch to send to; it must exist.
        private: make a private repository; a public one that is there is refused.

    Raises:
        ConfigError: nothing that can be pushed, or no valid id.
        VerificationError: a damaged adapter, a merged folder whose check has not passed, or a link among the files.
        HubError: whatever the Hub refused.
    """
    check_repository(repository)
    folder = local_path(target)
    is_merged = (folder / "merge.json").is_file()
    with tempfile.TemporaryDirectory() as staged:
        if is_merged:
            parcel = merged_parcel(folder, _checked_report(folder), Path(staged))
        else:
            parcel = pack_adapter(require_adapter(target), Path(staged), repository)
        _check_card(parcel.files.get("README.md"), folder)
        total = sum(path.stat().st_size for path in parcel.files.values())
        where = f"{repository}{' (private)' if private else ''}"
        reporter.note(f"pushing {len(parcel.files)} files ({total:,} bytes) to {where}:")
        for line in parcel.describe():
            reporter.note(line)
        full, url = upload(parcel.files, repository, revision=revision, private=private)
    kind = "merged" if is_merged else "adapter"
    return PushResult(repository=full, url=url, kind=kind, files=sorted(parcel.files))


def pack_adapter(folder: Path, staged: Path, title: str) -> Parcel:
    """The adapter's own files, checked, with the run's card, recipe, results and curves beside them; copies in
    ``staged`` where local paths are cut.
    """
    adapter = read_adapter(folder)
    parcel = adapter_parcel(folder, staged, is_of_run=run_of(folder) is not None)
    card = _card(folder, title, is_merged=False, parcel=parcel)
    if card is None:
        card = model_card.adapter_card(title, _described_base(parcel), adapter.spec.method)
    parcel.write("README.md", card)
    return parcel


def _card(folder: Path, title: str, *, is_merged: bool, parcel: Parcel | None = None) -> str | None:
    """A card with all that the run of an adapter's folder knows, as far as ``parcel`` tells it; None for an adapter
    without a finished run.
    """
    run, adapter = run_of(folder), read_adapter(folder)
    if adapter.task is None or run is None or not run.results.is_file():
        return None
    files, base = ({}, adapter.base) if parcel is None else (parcel.files, _described_base(parcel))
    known = {
        "results": json.loads(run.results.read_text(encoding="utf-8")),
        "environment": json.loads((run.path / "environment.json").read_text(encoding="utf-8")),
        "recipe": files.get("recipe.yaml", run.recipe).read_text(encoding="utf-8"),
        "curves": not is_merged and "curves.png" in files,
    }
    return model_card.shared_card(title, base, adapter.spec.method, adapter.task, known, is_merged=is_merged)


def _described_base(parcel: Parcel) -> dict[str, Any]:
    return dict(json.loads(parcel.files["adapter.json"].read_text(encoding="utf-8"))["base"])


def _checked_report(folder: Path) -> dict[str, Any]:
    """The report of a merged folder whose check has passed."""
    report = read_report(folder)
    if report["verification"].get("passed") is not True or not (folder / "config.json").is_file():
        raise VerificationError(str(folder), "its merge has not passed its check", fix="Merge again")
    read_headers(sorted(folder.glob("*.safetensors")))
    return report


def _check_card(path: Path | None, folder: Path) -> None:
    """Refuse a card that the Hub's own library cannot read back."""
    from huggingface_hub import ModelCard  # noqa: PLC0415

    if path is None:
        raise VerificationError(str(folder / "README.md"), "there is no model card", fix="Merge again")
    try:
        ModelCard.load(path)
    except (ValueError, OSError) as error:
        raise VerificationError(
            str(path), f"no valid model card ({str(error)[:200]})", fix="Mend its header"
        ) from error
