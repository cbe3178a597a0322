# SPDX-License-Identifier: Apache-2.0
"""Merge adapters into their base and write a verified checkpoint of plain weights.

If the files of the base allow it, a merge runs tensor by tensor. It then needs only the memory of the largest tensor,
or of the largest layer of experts if transformers stacks them, and copies unchanged tensors byte by byte. Otherwise
(GGUF, pickle files, remote code, PEFT tuners of non-linear layers) the model is merged in memory. In both cases the
folder has a temporary name until it is verified.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mirrortune import __version__
from mirrortune.adapters.factor_cache import FactorCache
from mirrortune.adapters.files.adapter_file import AdapterFile, read_adapter
from mirrortune.adapters.files.find import require_adapter
from mirrortune.adapters.files.load import check_stored
from mirrortune.adapters.inject import FactorSource
from mirrortune.errors import ConfigError, ResourceError, not_as_meant
from mirrortune.merging import in_memory
from mirrortune.merging.bases import (
    config_fields,
    describe_base,
    find_base,
    load_adapted,
    open_adapter,
    padding_id,
    trained_on,
)
from mirrortune.merging.parcel import check_texts
from mirrortune.merging.plan import MergePlan, NotTensorByTensor, plan_merge
from mirrortune.merging.redaction import DIGESTS
from mirrortune.merging.verify import (
    FLOATS,
    Compared,
    OutputError,
    Probes,
    TensorLedger,
    Verification,
    WrittenTensors,
    check_contents,
    check_ties,
    check_written,
    compare_lazily,
    compare_models,
)
from mirrortune.models.load import ModelSource, find_model, resolve_dtype
from mirrortune.models.load_errors import quiet
from mirrortune.models.parts import CannotLoadParts
from mirrortune.models.quantized import is_quantised as has_quantised_weights
from mirrortune.models.skeleton import outline
from mirrortune.models.tensors import shard_bytes
from mirrortune.reports import model_card
from mirrortune.reports.finished_run import is_there
from mirrortune.system.console import Reporter
from mirrortune.system.outputs import MERGED, adapter_inputs, model_inputs, output_folder
from mirrortune.system.paths import sha256_of
from mirrortune.system.run_directory import record_merge, run_of
from mirrortune.system.tensor_files import shard_like, write_shards
from mirrortune.tasks.base import Task, task_from_dict
from mirrortune.tasks.probes import find_processors, probes

LARGE = 2**30
"""Size of the weights in bytes above which outputs are compared with one module in memory at a time."""


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
    """Merge adapters into their base and write the merged model with a model card and the recipe.

    Args:
        targets: run directories or adapter folders, in the order of merging.
        reporter: prints notes.
        output_dir: folder to create.
        base: another location of the same base model.
        max_shard_bytes: maximum size of a weights file; by default, files are split as in the base.
        overwrite: replace an earlier merge in ``output_dir``.
        force_base: accept a base with different weights.
        trust_remote_code: run code from the base's repository.

    Raises:
        ConfigError, VerificationError: see :func:`merge_folder`.
    """
    adapters = [read_adapter(require_adapter(target)) for target in targets]
    folders, last = [adapter.folder for adapter in adapters], adapters[-1]
    reporter.note(f"merging {', '.join(map(str, folders))} into {describe_base(adapters[0], base)}")
    run = run_of(last.folder)
    card = model_card.card_of_run(last, Path(output_dir).name, is_merged=True)
    made = model_card.signed(card or model_card.merged_card(last.base, last.spec.method, last.task))
    extra: dict[str, str | bytes] = {"README.md": made}
    if overwrite and (own := model_card.own_card(Path(output_dir))) is not None:
        extra["README.md"] = own
        reporter.note(f"README.md in {output_dir} is kept, as it was written or edited by hand")
    if run is not None and is_there(run.recipe):
        extra["recipe.yaml"] = model_card.recipe_text(run)
    remarks: list[str] | None = [] if force_base else None
    verdict = merge_folder(
        adapters, Path(output_dir), factor_source=FactorCache(), base=base, extra_files=extra,
        max_shard_bytes=max_shard_bytes, overwrite=overwrite, remarks=remarks, trust_remote_code=trust_remote_code,
        on_note=reporter.note,
    )  # fmt: skip
    report = json.loads((Path(output_dir) / "merge.json").read_text(encoding="utf-8"))
    for remark in remarks or ():
        reporter.note(f"by force: {remark}")
    for merged in filter(None, map(run_of, folders)):
        try:
            record_merge(merged, output_dir, report)
        except ResourceError as error:  # the run is on a read-only disk
            reporter.note(f"warning: this merge is not recorded: {error.where} {error.problem}")
    return verdict


def merge_folder(
    adapters: Sequence[AdapterFile],
    output_dir: Path,
    *,
    factor_source: FactorSource,
    base: str | None = None,
    extra_files: Mapping[str, str | bytes] | None = None,
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
    remarks: list[str] | None = None,
    trust_remote_code: bool = False,
    on_note: Callable[[str], None] = lambda _: None,
) -> Verification:
    """Merge adapters into their base and write a complete checkpoint to ``output_dir``.

    Args:
        adapters: adapters from :func:`read_adapter`, in the order of merging (``plan.py``).
        output_dir: new or empty folder; with ``overwrite`` also an earlier merge.
        factor_source: computes or caches factors.
        base: another location of the first adapter's base model, whose weights are still compared.
        extra_files: files to add, content by file name.
        max_shard_bytes: maximum size of a weights file; by default, files are split as in the base.
        overwrite: replace ``output_dir``.
        remarks: list to which mismatches with the base are appended, also recorded in ``merge.json``; None to raise.
        trust_remote_code: run code from the base's repository.
        on_note: called with notes for the user, such as files that the base lacks or a merge in memory.

    Raises:
        ConfigError: ``output_dir`` is not empty, the base cannot be found, or two adapters change the same parameter.
        VerificationError: the base or its singular basis is not that of training, a file to copy is a link out of the
            base's folder, or the result is out of tolerance (and removed).
    """
    first, last = adapters[0], adapters[-1]
    found: list[Verification] = []
    inputs = [*adapter_inputs([a.folder for a in adapters]), *model_inputs(base or first.base.get("name"))]
    with output_folder(output_dir, inputs, MERGED, overwrite=overwrite) as put:
        source = find_base(first, base, trust_remote_code=trust_remote_code)
        check_texts(Path(source.location))
        task = task_from_dict(last.task) if last.task else None
        processors, missing = find_processors(task, source, str(last.base["auto_class"]))
        if missing:
            kinds = " and no ".join(missing)
            on_note(f"the base has no {kinds}, so none is written; add it to {output_dir} for whoever uses the model")
        merge = _Merge(
            adapters=adapters, source=source, base=base, task=task, processors=processors, factors=factor_source,
            max_shard_bytes=max_shard_bytes, remarks=remarks, on_note=on_note,
        )  # fmt: skip
        put(lambda folder: found.append(_write_merged(folder, output_dir, extra_files or {}, merge)))
    return found[0]


def _write_merged(
    folder: Path, output_dir: Path, extra_files: Mapping[str, str | bytes], merge: _Merge
) -> Verification:
    report: dict[str, Any] = {"mirrortune_version": __version__, "base": merge.adapters[0].base}
    verdict = _merge(merge, folder, report)
    for name, content in extra_files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if merge.remarks is not None:  # weights are read, and remarked on, several times
        merge.remarks[:] = dict.fromkeys(merge.remarks)
    report |= {"verification": asdict(verdict), "remarks": merge.remarks or []}
    made = [p.relative_to(folder).as_posix() for p in folder.rglob("[!.]*") if p.is_file()]
    report["files"] = sorted([*made, "merge.json"])
    report[DIGESTS] = {name: sha256_of(folder / name) for name in sorted(made)}
    (folder / "merge.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if not verdict.passed:
        raise not_as_meant(output_dir, f"the merged model differs from base + adapter: {verdict.describe()}")
    return verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class _Merge:
    """The inputs and options of a merge."""

    adapters: Sequence[AdapterFile]
    source: ModelSource
    base: str | None
    task: Task | None
    processors: Sequence[Any]
    factors: FactorSource
    max_shard_bytes: int | None
    remarks: list[str] | None
    on_note: Callable[[str], None]
    is_trimmed: bool = False
    """The modules that the task does not use are removed from the model."""

    @property
    def auto_class(self) -> str:
        return str(self.adapters[-1].base["auto_class"])

    @property
    def compared(self) -> Compared:
        return None if self.task is None else self.task.compared

    def outline(self) -> nn.Module:
        """Build the merged model without weights."""
        fields = config_fields(self.adapters[-1], self.task)
        model = outline(self.source, self.auto_class, fields, padding_id(self.processors))
        return self.task.trim(model) if self.task is not None and self.is_trimmed else model

    def ledger(self) -> TensorLedger:
        """Return an empty ledger. By force, an adapter may have another effect on another base."""
        return TensorLedger(adapters=self.adapters if self.remarks is None else ())

    def probes(self) -> Probes:
        """Return the inputs on which outputs are compared."""
        return probes(self.task, self.processors, self.source, self.auto_class)


def _merge(merge: _Merge, folder: Path, report: dict[str, Any]) -> Verification:
    report["adapters"] = [
        {"folder": str(a.folder), "method": a.spec.method, "format": "peft" if a.peft_config else a.form}
        for a in merge.adapters
    ]
    try:
        return _by_tensors(merge, folder, report)
    except (NotTensorByTensor, CannotLoadParts) as reason:
        if len(merge.adapters) > 1:
            raise ConfigError("merge", f"several adapters cannot be merged here: {reason}") from reason
        for path in folder.iterdir():  # files from the merge tensor by tensor, which was abandoned
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        report["in_memory"] = str(reason)
        merge.on_note(f"merging with the whole model in memory ({_size(merge)}), not tensor by tensor: {reason}")
        return _in_memory(merge, folder, report)


def _size(merge: _Merge) -> str:
    """Describe the memory of a merge in memory, which holds the base twice and the reopened model."""
    numbers = sum(p.numel() for p in merge.outline().parameters())
    stored = resolve_dtype("auto", merge.source.config, torch.device("meta"))
    trained_in = merge.adapters[0].weights_in.itemsize
    return f"about {numbers * (2 * stored.itemsize + trained_in) / 2**30:,.1f} GiB"


def _in_memory(merge: _Merge, folder: Path, report: dict[str, Any]) -> Verification:
    opened = open_adapter(
        merge.adapters[0], merge.factors, base=merge.base, trust_remote_code=merge.source.trust_remote_code,
        remarks=merge.remarks,
    )  # fmt: skip
    plain, ledger, trusted = opened.load_plain(), merge.ledger(), merge.source.trust_remote_code
    save: Any = plain.save_pretrained
    size = merge.max_shard_bytes or shard_bytes(merge.source)
    save(folder, state_dict=in_memory.merged_state(plain, opened.adapted, ledger), max_shard_size=size)
    for processor in merge.processors:
        processor.save_pretrained(folder)
    report["contents"] = check_contents(folder, plain, merge.processors, trust_remote_code=trusted)
    report["tensors"] = ledger.errors
    return in_memory.verify(
        folder, plain, opened.adapted, merge.auto_class, merge.probes(), ledger, compared=opened.compared,
        trust_remote_code=trusted,
    )  # fmt: skip


def _by_tensors(merge: _Merge, folder: Path, report: dict[str, Any]) -> Verification:
    if merge.source.trust_remote_code:
        raise NotTensorByTensor("the model's own code says how its weights are loaded")
    is_single = len(merge.adapters) == 1
    is_quantised = merge.source.is_stored_packed or any(a.base.get("quantised") for a in merge.adapters)
    if merge.source.gguf_file or (is_quantised and not is_single):
        raise NotTensorByTensor("the base is quantised")
    if len(merge.adapters) > 1 and any(adapter.base.get("new_tokens") for adapter in merge.adapters):
        raise NotTensorByTensor("one of them has new tokens, and with them a vocabulary of its own")
    ledger = merge.ledger()
    packed = trained_on(merge.adapters[0], merge.source, merge.base) if is_single else None
    merge, model, plan = _plan(merge, packed)
    shards = shard_like(plan.planned, plan.files, merge.max_shard_bytes)
    write_shards(folder, shards, lambda planned: plan.made(planned, ledger.round))  # checks the adapted weights
    if plan.turned is None:  # otherwise into other weights than those of training, on purpose
        check_stored(merge.adapters[0], plan.other_values(merge.adapters[0]), merge.remarks)
    _save_configuration(folder, model, merge.source, plan)
    for processor in merge.processors:
        processor.save_pretrained(folder)
    report["contents"] = check_contents(folder, model, merge.processors)
    check_ties(outline(find_model(str(folder)), merge.auto_class, {}, None), model)
    written = WrittenTensors.in_folder(folder, plan)
    check_written(plan, written, ledger)
    report["tensors"] = ledger.errors
    is_large = sum(t.nbytes for t in written.headers.values()) > LARGE
    outputs = (
        compare_lazily(merge.outline, merge.probes(), plan, written, merge.compared)
        if is_large or is_quantised or not is_single
        else _compare_loaded(merge, folder, plan)
    )
    return ledger.verification(outputs)


def _plan(merge: _Merge, packed: ModelSource | None) -> tuple[_Merge, nn.Module, MergePlan]:
    """Plan a merge tensor by tensor; modules that the task does not use are removed if the files lack their tensors.

    Returns:
        The merge as planned, its model, and the plan.
    """
    into = merge.source if packed is None else replace(merge.source, load_in=None)
    model, trimmed = merge.outline(), replace(merge, is_trimmed=True)
    try:
        return merge, model, plan_merge(into, model, merge.adapters, merge.factors, merge.remarks, packed)
    except NotTensorByTensor:
        smaller = trimmed.outline()
        if len(smaller.state_dict()) == len(model.state_dict()):
            raise
    plan = plan_merge(into, smaller, merge.adapters, merge.factors, merge.remarks, packed)
    return trimmed, smaller, plan


def _save_configuration(folder: Path, model: nn.Module, source: ModelSource, plan: MergePlan) -> None:
    """Save ``config.json`` and, for a generative model, ``generation_config.json``, as transformers does."""
    from transformers import GenerationConfig  # noqa: PLC0415

    config: Any = model.config
    config.architectures = [type(model).__name__]
    if has_quantised_weights(config):
        del config.quantization_config
    floats = [t.code for t in plan.planned if t.code in FLOATS]
    config.dtype = FLOATS[max(set(floats), key=floats.count)]
    config.save_pretrained(folder)
    can_generate: Any = getattr(model, "can_generate", lambda: False)
    if can_generate():
        try:
            generation = GenerationConfig.from_pretrained(source.location, **source.arguments())
        except OSError:
            generation = GenerationConfig.from_model_config(config)
        generation.save_pretrained(folder)


def _compare_loaded(merge: _Merge, folder: Path, plan: MergePlan) -> OutputError:
    import transformers  # noqa: PLC0415

    adapter, pad = merge.adapters[0], padding_id(merge.processors)
    adapted = load_adapted(adapter, merge.source, merge.task, pad, merge.factors, remarks=merge.remarks)
    load: Any = getattr(transformers, merge.auto_class).from_pretrained
    with quiet():  # transformers may warn of a pooler that the base lacks as well
        reopened = load(folder, dtype="auto", trust_remote_code=False).eval()
    return compare_models(reopened, adapted, merge.probes(), merge.compared, plan.changed_values)
