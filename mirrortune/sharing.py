# SPDX-License-Identifier: Apache-2.0
"""What leaves a run: a merged model with everything that belongs beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mirrortune import model_card, packed_bases
from mirrortune.adapter_file import read_adapter
from mirrortune.checkpoint import RunDirectory
from mirrortune.factor_cache import FactorCache
from mirrortune.loading import require_adapter
from mirrortune.merge_folder import merge_folder
from mirrortune.merging import Verification
from mirrortune.report import Reporter
from mirrortune.run_recording import record_merge


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
    into = packed_bases.in_words(read_adapter(folders[0]), base)
    reporter.note(f"merging {', '.join(map(str, folders))} into {into}")
    recipe_file = folders[-1].parent / "recipe.yaml"
    extra = {"README.md": model_card.merged_card(adapter.base, adapter.spec.method, adapter.task)}
    if recipe_file.is_file():
        extra["recipe.yaml"] = recipe_file.read_text(encoding="utf-8")
    verdict = merge_folder(
        folders,
        Path(output_dir),
        factor_source=FactorCache(),
        base=base,
        extra_files=extra,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        force_base=force_base,
        trust_remote_code=trust_remote_code,
    )
    report = json.loads((Path(output_dir) / "merge.json").read_text(encoding="utf-8"))
    for remark in report["remarks"]:
        reporter.note(f"by force: {remark}")
    for folder in folders:
        record_merge(RunDirectory(folder.parent), output_dir, report)
    return verdict
