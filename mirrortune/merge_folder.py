# SPDX-License-Identifier: Apache-2.0
"""Writes a merged checkpoint as a folder, and believes nothing until it has read back what it wrote.

Tensor by tensor where the base's files hold the model's own tensors: the memory of the largest tensor suffices, and
what no adapter changes is copied byte by byte. Otherwise (tuners of PEFT whose layers share numbers, quantised bases,
weights that transformers converts when it loads them) as a model in memory. Either way under a temporary name, renamed
once it is verified.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from mirrortune import __version__
from mirrortune.adapter_file import AdapterFile, read_adapter
from mirrortune.adapters.inject import FactorSource
from mirrortune.adapting import stored_core
from mirrortune.atomic import write_folder_atomically
from mirrortune.errors import ConfigError, VerificationError, not_as_meant
from mirrortune.examples import Batch
from mirrortune.lazy_model import outline, read_lazily
from mirrortune.merge_contents import aliases, check_contents, check_ties, tensor_entry
from mirrortune.merge_plan import MergePlan, NotTensorByTensor, plan_merge
from mirrortune.merging import (
    LogitError,
    Verification,
    check_output,
    compare_logits,
    config_fields,
    describe,
    find_base,
    judge,
    load_adapted,
    logit_error,
    merged_state,
    open_adapter,
    probe_logits,
    verify,
)
from mirrortune.model import ModelSource, find_model, pad_token_id, shard_bytes
from mirrortune.probes import any_probe, any_processor
from mirrortune.shards import StoredTensor, read_headers, read_tensor, same_bytes, shard_like, write_shards
from mirrortune.tasks import Task, task_from_dict

LARGE = 2**30
"""Bytes of weights above which the models that are compared read theirs module by module."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Merge:
    """What both ways of merging need."""

    adapters: Sequence[AdapterFile]
    source: ModelSource
    base: str | None
    task: Task | None
    processor: Any
    probe: Batch
    factors: FactorSource
    max_shard_bytes: int | None
    remarks: list[str] | None

    @property
    def auto_class(self) -> str:
        return str(self.adapters[-1].base["auto_class"])

    def outline(self) -> nn.Module:
        """The merged model without weights."""
        fields = config_fields(self.adapters[-1], self.task)
        return outline(self.source, self.auto_class, fields, pad_token_id(self.processor))


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

    Raises:
        ConfigError: ``output_dir`` is not empty, the base cannot be found, or the adapters contradict each other.
        VerificationError: another base or basis, or a result out of tolerance (which is removed).
    """
    adapters = [read_adapter(folder) for folder in adapter_folders]
    check_output(output_dir, overwrite=overwrite)
    source = find_base(adapters[0], base, trust_remote_code=trust_remote_code)
    task = task_from_dict(adapters[-1].task) if adapters[-1].task else None
    processor = task.load_processor(source) if task else any_processor(source, adapters[-1].base["auto_class"])
    probe = task.probe(processor, source.config) if task else any_probe(processor, source.config)
    merge = _Merge(
        adapters=adapters, source=source, base=base, task=task, processor=processor, probe=probe, factors=factor_source,
        max_shard_bytes=max_shard_bytes, remarks=remarks,
    )  # fmt: skip
    found: list[Verification] = []

    def write(folder: Path) -> None:
        report: dict[str, Any] = {"mirrortune_version": __version__, "base": adapters[0].base}
        verdict = _merge(merge, folder, report)
        for name, text in (extra_files or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
        found.append(verdict)
        report |= {"verification": asdict(verdict), "remarks": merge.remarks or []}
        (folder / "merge.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        if not verdict.passed:
            raise not_as_meant(output_dir, f"the merged model differs from base + adapter: {describe(verdict)}")

    write_folder_atomically(output_dir, write)
    return found[0]


def _merge(merge: _Merge, folder: Path, report: dict[str, Any]) -> Verification:
    report["adapters"] = [
        {"folder": str(a.folder), "method": a.spec.method, "format": "peft" if a.peft_config else a.form}
        for a in merge.adapters
    ]
    try:
        return _by_tensors(merge, folder, report)
    except NotTensorByTensor as reason:
        if len(merge.adapters) > 1:
            raise ConfigError("merge", f"several adapters cannot be merged here: {reason}") from reason
        for half_done in folder.iterdir():
            half_done.unlink()
        report["in_memory"] = str(reason)
        return _in_memory(merge, folder, report)


def _in_memory(merge: _Merge, folder: Path, report: dict[str, Any]) -> Verification:
    adapter = merge.adapters[0]
    opened = open_adapter(
        adapter, merge.factors, base=merge.base, trust_remote_code=merge.source.trust_remote_code,
        remarks=merge.remarks,
    )  # fmt: skip
    save: Any = opened.plain.save_pretrained
    size = merge.max_shard_bytes or shard_bytes(merge.source)
    save(folder, state_dict=merged_state(opened.plain, opened.adapted), max_shard_size=size)
    merge.processor.save_pretrained(folder)
    trusted = merge.source.trust_remote_code
    report["contents"] = check_contents(folder, opened.plain, merge.processor, trust_remote_code=trusted)
    report["tensors"] = {}
    return verify(
        folder, opened.plain, opened.adapted, merge.auto_class, merge.probe, entries=report["tensors"],
        trust_remote_code=trusted,
    )  # fmt: skip


def _by_tensors(merge: _Merge, folder: Path, report: dict[str, Any]) -> Verification:
    if merge.source.trust_remote_code:
        raise NotTensorByTensor("the model's own code says how its weights are loaded")
    if merge.source.is_stored_packed or any(adapter.base.get("quantised") for adapter in merge.adapters):
        raise NotTensorByTensor("the base is quantised")
    model = merge.outline()
    plan = plan_merge(merge.source, model, merge.adapters, merge.factors, merge.remarks)
    write_shards(folder, shard_like(plan.planned, plan.files, merge.max_shard_bytes), plan.made)
    _save_configuration(folder, model, merge.source, plan)
    merge.processor.save_pretrained(folder)
    report["contents"] = check_contents(folder, model, merge.processor)
    check_ties(outline(find_model(str(folder)), merge.auto_class, {}, None), model)
    written = read_headers(sorted(folder.glob("*.safetensors")))
    tensors, changed = _compare_tensors(plan, written)
    report["tensors"] = tensors
    is_large = sum(t.nbytes for t in written.values()) > LARGE or len(merge.adapters) > 1
    logits = _compare_lazily(merge, plan, written) if is_large else _compare_loaded(merge, folder)
    epsilon = max((t["weight_tolerance"] for t in tensors.values()), default=torch.finfo(torch.float32).eps)
    beyond = sum(t["rel_weight_error"] > t["weight_tolerance"] for t in tensors.values())
    error = max((t["rel_weight_error"] for t in tensors.values()), default=0.0)
    return judge(logits, weight_error=error, weight_tolerance=epsilon, changed_tensors=changed + beyond)


def _save_configuration(folder: Path, model: nn.Module, source: ModelSource, plan: MergePlan) -> None:
    """``config.json``, and ``generation_config.json`` for a model that writes, as transformers saves them."""
    from transformers import GenerationConfig  # noqa: PLC0415

    config: Any = model.config
    config.architectures = [type(model).__name__]
    floats = [t.code for t in plan.planned if t.code in _FLOATS]
    config.dtype = _FLOATS[max(set(floats), key=floats.count)]
    config.save_pretrained(folder)
    can_generate: Any = getattr(model, "can_generate", lambda: False)
    if can_generate():
        try:
            generation = GenerationConfig.from_pretrained(source.location, **source.arguments())
        except OSError:
            generation = GenerationConfig.from_model_config(config)
        generation.save_pretrained(folder)


_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@torch.no_grad()
def _compare_tensors(plan: MergePlan, written: dict[str, StoredTensor]) -> tuple[dict[str, dict[str, float]], int]:
    """Errors of every adapted tensor against its float64 reference, and how many others are not what they should be."""
    found: dict[str, dict[str, float]] = {}
    if odd := written.keys() ^ {tensor.name for tensor in plan.planned}:
        raise VerificationError(
            "merge", f"'{min(odd)}' and {len(odd) - 1} other tensors are missing, or new, as written"
        )
    changed = 0
    for planned in plan.planned:
        own = written[planned.name]
        if planned.source is not None:
            changed += not same_bytes(own, planned.source)
        elif planned.name in plan.trained:
            changed += not torch.equal(read_tensor(own), plan.made(planned))
        else:
            found[planned.name] = _tensor_error(plan, planned.name, own)
    return found, changed


def _tensor_error(plan: MergePlan, name: str, own: StoredTensor) -> dict[str, float]:
    return tensor_entry(read_tensor(own), plan.reference(name), lambda: read_tensor(plan.stored[name]))


def _compare_loaded(merge: _Merge, folder: Path) -> LogitError:
    import transformers  # noqa: PLC0415

    adapter, pad = merge.adapters[0], pad_token_id(merge.processor)
    adapted = load_adapted(adapter, merge.source, merge.task, pad, merge.factors, remarks=merge.remarks)
    reopened = getattr(transformers, merge.auto_class).from_pretrained(folder, dtype="auto").eval()
    return compare_logits(reopened, adapted, merge.probe)


def _compare_lazily(merge: _Merge, plan: MergePlan, written: dict[str, StoredTensor]) -> LogitError:
    """Both models read their weights module by module; the adapter runs beside its layers, as it was trained."""
    model = merge.outline()
    names = aliases(model)
    stored_in = max((_FLOATS[t.code] for t in written.values() if t.code in _FLOATS), key=lambda d: torch.finfo(d).eps)
    trained_in = getattr(torch, str(merge.adapters[-1].base["dtype"]))
    # Not every layer computes in float16 on a CPU, and 16-bit arithmetic is no error of the weights.
    computed_in = (
        torch.float32 if torch.float16 in (stored_in, trained_in) or trained_in == torch.float32 else stored_in
    )

    def read_merged(name: str) -> Tensor:
        found = read_tensor(next(written[twin] for twin in names[name] if twin in written))
        return found.to(computed_in) if found.is_floating_point() else found

    found = probe_logits(read_lazily(model, read_merged), merge.probe, dtype=computed_in)
    expected = probe_logits(_base_with_adapters(merge, plan, trained_in), merge.probe, dtype=trained_in)
    epsilon = max(torch.finfo(dtype).eps for dtype in (stored_in, trained_in))
    return logit_error(found, expected, epsilon)


def _base_with_adapters(merge: _Merge, plan: MergePlan, dtype: torch.dtype) -> nn.Module:
    model = merge.outline()
    names = aliases(model)
    beside: set[str] = set()
    for name, changes in plan.adapted.items():
        module = model.get_submodule(name.rpartition(".")[0])
        (adapter, layers), *others = changes
        if adapter.peft_config is not None:
            beside.add(name)
            if name.endswith("weight"):
                module.register_forward_hook(_tuned(plan, name, adapter, layers[0]))
            continue
        if others or len(layers) > 1 or type(module) is not nn.Linear or adapter.layouts[layers[0]].rows:
            continue  # read as it is merged
        beside.add(name)
        module.register_forward_hook(_branch(plan, name, adapter, layers[0]))

    def read(name: str) -> Tensor:
        if name in plan.trained:
            return plan.trained[name].to(dtype if name in plan.stored else torch.float32)
        own = next(twin for twin in names[name] if twin in plan.stored)
        is_adapted = own in plan.adapted and own not in beside
        found = plan.reference(own) if is_adapted else read_tensor(plan.stored[own])
        return found.to(dtype) if found.is_floating_point() else found

    return read_lazily(model, read)


def _tuned(plan: MergePlan, name: str, adapter: AdapterFile, layer: str) -> Any:
    """A hook by which PEFT's layer answers in the place of a linear layer."""

    def answer(_: nn.Module, given: tuple[Tensor, ...], __: Tensor) -> Any:
        return plan.tuned_layer(name, adapter, layer)[0].module(*given)

    return answer


def _branch(plan: MergePlan, name: str, adapter: AdapterFile, layer: str) -> Any:
    """A hook that adds U (K - diag(S)) Vh x to a linear layer's output, in float32."""

    def add(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            factors = plan.factors(read_tensor(plan.stored[name]), adapter, layer)
            core, x = stored_core(adapter, layer, factors.S), given[0].float()
            z = F.linear(x, factors.Vh.float())
            product = F.linear(core.mix(z, *core.coefficients(delta=True)), factors.U.float())
            beside = core.beside(lambda matrix: F.linear(x, matrix.float()))
            return output + (product if beside is None else product + beside).to(output.dtype)

    return add
