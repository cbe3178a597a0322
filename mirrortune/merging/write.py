# SPDX-License-Identifier: Apache-2.0
"""Writes a merged checkpoint as a folder, and believes nothing until it has read back what it wrote.

Tensor by tensor where it can be: the memory of the largest tensor suffices (of the largest layer of experts, where
transformers stacks them), and what no adapter changes is copied byte by byte. Otherwise (GGUF, pickles, a model's own
code, tuners of PEFT on other layers than linear ones) as a model in memory. Either way under a temporary name, renamed
once it is verified.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mirrortune import __version__
from mirrortune.adapters.files.adapter_file import AdapterFile, read_adapter
from mirrortune.adapters.inject import FactorSource
from mirrortune.errors import ConfigError, not_as_meant
from mirrortune.merging.bases import trained_on
from mirrortune.merging.contents import check_contents, check_ties
from mirrortune.merging.in_memory import (
    OutputError,
    Probes,
    Verification,
    compare_models,
    config_fields,
    describe,
    find_base,
    judge,
    load_adapted,
    merged_state,
    open_adapter,
    padding_id,
    verify,
)
from mirrortune.merging.plan import MergePlan, NotTensorByTensor, plan_merge
from mirrortune.merging.verify import FLOATS, Written, compare_lazily, compare_tensors
from mirrortune.models.load import DTYPES, ModelSource, find_model, resolve_dtype, shard_bytes
from mirrortune.models.parts import CannotLoadParts
from mirrortune.models.quantized import is_quantised
from mirrortune.models.skeleton import outline
from mirrortune.system.outputs import MERGED, Write, adapter_inputs, model_inputs, output_folder
from mirrortune.system.tensor_files import shard_like, write_shards
from mirrortune.tasks.base import Task, task_from_dict
from mirrortune.tasks.probes import find_processors, probes

LARGE = 2**30
"""Bytes of weights above which the models that are compared read theirs module by module."""


def _ignore(_: str) -> None:
    """Drop a note."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Merge:
    """What both ways of merging need."""

    adapters: Sequence[AdapterFile]
    source: ModelSource
    base: str | None
    task: Task | None
    processors: Sequence[Any]
    factors: FactorSource
    max_shard_bytes: int | None
    remarks: list[str] | None
    on_note: Callable[[str], None]

    @property
    def packed(self) -> ModelSource | None:
        """Of the quantised model whose weights the adapter turns, where it is merged into full ones."""
        return trained_on(self.adapters[0], self.source, self.base) if len(self.adapters) == 1 else None

    @property
    def into(self) -> ModelSource:
        """Of the weights that the adapters are merged into."""
        return self.source if self.packed is None else replace(self.source, load_in=None)

    @property
    def is_quantised(self) -> bool:
        """Whether an adapter was trained on packed weights."""
        return self.source.is_stored_packed or any(adapter.base.get("quantised") for adapter in self.adapters)

    @property
    def auto_class(self) -> str:
        return str(self.adapters[-1].base["auto_class"])

    def outline(self) -> nn.Module:
        """The merged model without weights."""
        fields = config_fields(self.adapters[-1], self.task)
        return outline(self.source, self.auto_class, fields, padding_id(self.processors))

    def probes(self) -> Probes:
        """Inputs on which the merged model is compared."""
        return probes(self.task, self.processors, self.source, self.auto_class)


def merge_folder(
    adapter_folders: Sequence[Path],
    output_dir: Path,
    *,
    factor_source: FactorSource,
    base: str | None = None,
    extra_files: dict[str, str] | None = None,
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
    remarks: list[str] | None = None,
    trust_remote_code: bool = False,
    on_note: Callable[[str], None] = _ignore,
) -> Verification:
    """Merge adapters into their base and write a complete checkpoint to ``output_dir``.

    Args:
        adapter_folders: what train or save_adapter wrote; several are merged in order (``merge_plan.py``).
        output_dir: a new or empty folder, or any earlier merge with ``overwrite``.
        factor_source: computes or remembers factors.
        base: another place of the (first) adapter's base model; its weights are compared all the same.
        extra_files: texts to put beside the weights, by file name.
        max_shard_bytes: size of the files; as in the base by default.
        overwrite: replace ``output_dir``.
        remarks: what does not fit the base is noted here, and in ``merge.json``; None to refuse it.
        trust_remote_code: run code from the base's repository.
        on_note: called with what the user should know: files that the base lacks, a merge of the whole model in memory.

    Raises:
        ConfigError: ``output_dir`` is not empty, the base cannot be found, or the adapters contradict each other.
        VerificationError: another base or basis, or a result out of tolerance (which is removed).
    """
    adapters = [read_adapter(folder) for folder in adapter_folders]
    inputs = [*adapter_inputs(adapter_folders), *model_inputs(base or adapters[0].base.get("name"))]
    with output_folder(output_dir, inputs, MERGED, overwrite=overwrite) as put:
        return _merge_into(
            output_dir, put, adapters, base, factor_source, extra_files or {}, max_shard_bytes=max_shard_bytes,
            remarks=remarks, on_note=on_note, trust_remote_code=trust_remote_code,
        )  # fmt: skip


def _merge_into(
    output_dir: Path,
    put: Callable[[Write], None],
    adapters: Sequence[AdapterFile],
    base: str | None,
    factor_source: FactorSource,
    extra_files: dict[str, str],
    *,
    max_shard_bytes: int | None,
    remarks: list[str] | None,
    on_note: Callable[[str], None],
    trust_remote_code: bool,
) -> Verification:
    source = find_base(adapters[0], base, trust_remote_code=trust_remote_code)
    task = task_from_dict(adapters[-1].task) if adapters[-1].task else None
    processors, missing = find_processors(task, source, str(adapters[-1].base["auto_class"]))
    if missing:
        kinds = " and no ".join(missing)
        on_note(f"the base has no {kinds}, so none is written; add it to {output_dir} for whoever uses the model")
    merge = _Merge(
        adapters=adapters, source=source, base=base, task=task, processors=processors, factors=factor_source,
        max_shard_bytes=max_shard_bytes, remarks=remarks, on_note=on_note,
    )  # fmt: skip
    found: list[Verification] = []

    def write(folder: Path) -> None:
        report: dict[str, Any] = {"mirrortune_version": __version__, "base": adapters[0].base}
        verdict = _merge(merge, folder, report)
        for name, text in extra_files.items():
            (folder / name).write_text(text, encoding="utf-8")
        found.append(verdict)
        report |= {"verification": asdict(verdict), "remarks": merge.remarks or []}
        made = [p.relative_to(folder).as_posix() for p in folder.rglob("[!.]*") if p.is_file()]
        report["files"] = sorted([*made, "merge.json"])
        (folder / "merge.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        if not verdict.passed:
            raise not_as_meant(output_dir, f"the merged model differs from base + adapter: {describe(verdict)}")

    put(write)
    return found[0]


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
        _empty(folder)
        report["in_memory"] = str(reason)
        merge.on_note(f"merging with the whole model in memory ({_size(merge)}), not tensor by tensor: {reason}")
        return _in_memory(merge, folder, report)


def _empty(folder: Path) -> None:
    """Remove what a way of merging that was given up has written."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _size(merge: _Merge) -> str:
    """What merging in memory takes: the base with the adapter and without it, and the merged model as reopened."""
    numbers = sum(p.numel() for p in merge.outline().parameters())
    stored = resolve_dtype("auto", merge.source.config, torch.device("meta"))
    trained_in = DTYPES[merge.adapters[0].base["dtype"]]
    return f"about {numbers * (2 * stored.itemsize + trained_in.itemsize) / 2**30:,.1f} GiB"


def _in_memory(merge: _Merge, folder: Path, report: dict[str, Any]) -> Verification:
    adapter = merge.adapters[0]
    opened = open_adapter(
        adapter, merge.factors, base=merge.base, trust_remote_code=merge.source.trust_remote_code,
        remarks=merge.remarks,
    )  # fmt: skip
    save: Any = opened.plain.save_pretrained
    size = merge.max_shard_bytes or shard_bytes(merge.source)
    save(folder, state_dict=merged_state(opened.plain, opened.adapted), max_shard_size=size)
    for processor in merge.processors:
        processor.save_pretrained(folder)
    trusted = merge.source.trust_remote_code
    report["contents"] = check_contents(folder, opened.plain, merge.processors, trust_remote_code=trusted)
    report["tensors"] = {}
    return verify(
        folder, opened.plain, opened.adapted, merge.auto_class, merge.probes(), entries=report["tensors"],
        trust_remote_code=trusted,
    )  # fmt: skip


def _by_tensors(merge: _Merge, folder: Path, report: dict[str, Any]) -> Verification:
    if merge.source.trust_remote_code:
        raise NotTensorByTensor("the model's own code says how its weights are loaded")
    if merge.source.gguf_file or (merge.is_quantised and len(merge.adapters) > 1):
        raise NotTensorByTensor("the base is quantised")
    model = merge.outline()
    plan = plan_merge(merge.into, model, merge.adapters, merge.factors, merge.remarks, merge.packed)
    write_shards(folder, shard_like(plan.planned, plan.files, merge.max_shard_bytes), plan.made)
    _save_configuration(folder, model, merge.source, plan)
    for processor in merge.processors:
        processor.save_pretrained(folder)
    report["contents"] = check_contents(folder, model, merge.processors)
    check_ties(outline(find_model(str(folder)), merge.auto_class, {}, None), model)
    written = Written.of(folder, plan)
    tensors, changed = compare_tensors(plan, written)
    report["tensors"] = tensors
    is_large = sum(t.nbytes for t in written.headers.values()) > LARGE or len(merge.adapters) > 1
    outputs = (
        compare_lazily(merge.outline, merge.probes(), plan, written)
        if is_large or merge.is_quantised
        else _compare_loaded(merge, folder)
    )
    epsilon = max((t["weight_tolerance"] for t in tensors.values()), default=torch.finfo(torch.float32).eps)
    beyond = sum(t["rel_weight_error"] > t["weight_tolerance"] for t in tensors.values())
    error = max((t["rel_weight_error"] for t in tensors.values()), default=0.0)
    return judge(outputs, weight_error=error, weight_tolerance=epsilon, changed_tensors=changed + beyond)


def _save_configuration(folder: Path, model: nn.Module, source: ModelSource, plan: MergePlan) -> None:
    """``config.json``, and ``generation_config.json`` for a model that writes, as transformers saves them."""
    from transformers import GenerationConfig  # noqa: PLC0415

    config: Any = model.config
    config.architectures = [type(model).__name__]
    if is_quantised(config):
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


def _compare_loaded(merge: _Merge, folder: Path) -> OutputError:
    import transformers  # noqa: PLC0415

    adapter, pad = merge.adapters[0], padding_id(merge.processors)
    adapted = load_adapted(adapter, merge.source, merge.task, pad, merge.factors, remarks=merge.remarks)
    load: Any = getattr(transformers, merge.auto_class).from_pretrained
    reopened = load(folder, dtype="auto", trust_remote_code=False).eval()
    return compare_models(reopened, adapted, merge.probes())
