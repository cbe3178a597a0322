# SPDX-License-Identifier: Apache-2.0
"""Find and load the base model that an adapter is merged into.

This is the base that the adapter names, another copy of it, or, for an adapter trained on a quantised base, the
dequantised or the full-precision weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from mirrortune.adapters.files.adapter_file import AdapterFile, read_adapter
from mirrortune.adapters.files.find import find_adapter
from mirrortune.adapters.files.load import load_into
from mirrortune.adapters.inject import FactorSource
from mirrortune.errors import ConfigError
from mirrortune.merging.verify import Compared, Probes
from mirrortune.models.load import DTYPES, ModelSource, find_model, load_model, pad_token_id, resolve_dtype
from mirrortune.models.quantized import dequantise
from mirrortune.registry import task_kinds
from mirrortune.system.devices import default_device, holds_half, is_slow, widen
from mirrortune.system.outputs import Input, adapter_inputs, model_inputs
from mirrortune.tasks.base import Task, task_from_dict
from mirrortune.tasks.probes import find_processors, probes


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedAdapter:
    """An adapter and its base in memory.

    Attributes:
        adapter: the adapter as read from its file.
        source: source of the base.
        adapted: base with the adapter attached, in the dtype of training and in evaluation mode.
        pad_token_id: id of the base tokenizer's padding token, or None.
        probes: inputs of the forward pass for comparisons, or candidates for them.
    """

    adapter: AdapterFile
    source: ModelSource
    adapted: nn.Module
    pad_token_id: int | None
    probes: Probes

    @property
    def compared(self) -> Compared:
        """Function that selects which of the model's outputs are compared."""
        task = _task_of(self.adapter)
        return None if task is None else task.compared

    def load_plain(self, *, as_trained: bool = False) -> nn.Module:
        """Load the base without the adapter, in its stored dtype or, if ``as_trained``, in the dtype of training."""
        # On the meta device, "auto" always gives the stored dtype; on a slow CPU it would give float32.
        stored = resolve_dtype("auto", self.source.config, torch.device("meta"))
        dtype = DTYPES[self.adapter.base["dtype"]] if as_trained else stored
        fields = config_fields(self.adapter, _task_of(self.adapter))
        return load_plain(self.source, str(self.adapter.base["auto_class"]), fields, dtype, self.pad_token_id)


def open_adapter(
    adapter: AdapterFile,
    factor_source: FactorSource,
    *,
    base: str | None,
    trust_remote_code: bool,
    remarks: list[str] | None = None,
) -> OpenedAdapter:
    """Load an adapter's base with the adapter attached.

    Args:
        adapter: adapter from :func:`read_adapter`.
        factor_source: computes or caches factors.
        base: another location of the same base model.
        trust_remote_code: run code from the base's repository.
        remarks: see :func:`load_adapted`.

    Raises:
        ConfigError: the base cannot be found.
        VerificationError: the base or its singular basis is not the one that the adapter was trained on.
    """
    source = find_base(adapter, base, trust_remote_code=trust_remote_code)
    packed = trained_on(adapter, source, base)
    if packed is not None:
        source = replace(source, load_in=None)
    task = _task_of(adapter)
    auto_class = str(adapter.base["auto_class"])
    processors, _ = find_processors(task, source, auto_class)
    pad = padding_id(processors)
    adapted = load_adapted(adapter, source, task, pad, factor_source, remarks=remarks, is_plain=True, turned=packed)
    found = probes(task, processors, source, auto_class)
    return OpenedAdapter(adapter=adapter, source=source, adapted=adapted, pad_token_id=pad, probes=found)


def load_adapted(
    adapter: AdapterFile,
    source: ModelSource,
    task: Task | None,
    pad_token_id: int | None,
    factor_source: FactorSource,
    *,
    remarks: list[str] | None = None,
    is_plain: bool = False,
    turned: ModelSource | None = None,
) -> nn.Module:
    """Load a base model in the dtype that ``adapter`` was trained in, attach the adapter, and set evaluation mode.

    Args:
        adapter: adapter from :func:`read_adapter`.
        source: source of the base.
        task: task that the adapter was trained for, or None.
        pad_token_id: id of the base tokenizer's padding token, or None.
        factor_source: computes or caches factors.
        remarks: list to which mismatches between adapter and base are appended; None to raise for them.
        is_plain: dequantise a quantised base.
        turned: quantised base that the adapter was trained on, if ``source`` holds the full-precision weights.

    Raises:
        VerificationError: the adapter does not match the base, and ``remarks`` is None.
    """
    model = load_unadapted(adapter, source, task, pad_token_id, is_plain=is_plain)
    widen(model, (*adapter.head, *adapter.plain))
    original = None if turned is None else load_plain(turned, *_arguments(adapter, task, pad_token_id))
    book = load_into(model, adapter, factor_source, force_base=remarks is not None, trained_on=original)
    if remarks is not None:
        remarks += book.remarks
    return model.eval()


def load_unadapted(
    adapter: AdapterFile, source: ModelSource, task: Task | None, pad_token_id: int | None, *, is_plain: bool = False
) -> nn.Module:
    """Load the base model in the form that ``adapter`` was trained on, without attaching the adapter."""
    check_class(adapter)
    arguments = _arguments(adapter, task, pad_token_id)
    model = load_plain(source, *arguments) if is_plain else load_model(source, *arguments).model
    widen(model, adapter.head)
    return model


def as_computed_here(model: nn.Module, adapter: AdapterFile, source: ModelSource) -> tuple[nn.Module, tuple[str, ...]]:
    """Convert the loaded base of an adapter to float32 if this machine is slow in 16 bits; return it with notes."""
    dtype = DTYPES[adapter.base["dtype"]]
    if source.is_quantised or dtype == torch.float32:
        return model, ()
    if not holds_half(model):
        size = f"twice the memory of the base in {adapter.base['dtype']}; a merge writes the dtype of the base"
        return model, (f"weights: in float32, in which '{adapter.spec.method}' trained them, {size}",)
    if is_slow(dtype, default_device()):
        return model.float(), ("computing in float32: the run was trained in 16 bits, in which this CPU is slow",)
    return model, ()


def _arguments(adapter: AdapterFile, task: Task | None, pad_token_id: int | None) -> tuple[Any, ...]:
    return adapter.base["auto_class"], config_fields(adapter, task), DTYPES[adapter.base["dtype"]], pad_token_id


def load_plain(source: ModelSource, *arguments: Any) -> nn.Module:
    """Load a model with :func:`mirrortune.models.load.load_model` and dequantise it."""
    model = load_model(source, *arguments).model
    # A model that was dequantised while loading has plain weights, but is still marked as quantised.
    return dequantise(model) if source.is_stored_packed else model


def find_base(adapter: AdapterFile, base: str | None, *, trust_remote_code: bool) -> ModelSource:
    """Find the base model at ``base``, or else where ``adapter`` says it is."""
    if adapter.base.get("name") is None and base is None:
        raise ConfigError("merge", "the adapter does not say what its base model is", fix="Name it with --model")
    check_class(adapter)
    return find_model(
        base or adapter.base["name"],
        revision=None if base else adapter.base.get("commit") or adapter.base.get("revision"),
        trust_remote_code=trust_remote_code,
        load_in=adapter.base.get("load_in"),
        new_tokens=adapter.base.get("new_tokens", ()),
    )


def trained_on(adapter: AdapterFile, source: ModelSource, base: str | None) -> ModelSource | None:
    """Find the quantised base that an adapter was trained on, if it is merged into full-precision weights; else None.

    Args:
        adapter: adapter to merge.
        source: source of the weights to merge into.
        base: location of these weights as named by the user, or None.
    """
    if base is None or source.load_in is not None:
        return None if base is None else source
    recorded = adapter.base.get("name")
    if recorded in (None, base) or source.is_stored_packed or not adapter.base.get("quantised"):
        return None
    revision = adapter.base.get("commit") or adapter.base.get("revision")
    return find_model(str(recorded), revision=revision, trust_remote_code=source.trust_remote_code)


def describe_base(adapter: AdapterFile, base: str | None) -> str:
    """Describe the base that an adapter is merged into, and what happens to it if it is quantised."""
    name = base or str(adapter.base.get("name"))
    if base is not None or not adapter.base.get("quantised") or name.endswith(".gguf"):
        return name
    return f"{name}, dequantised (--base merges into full-precision weights instead)"


def inputs_of_targets(*targets: str | None) -> list[Input]:
    """List the local files and folders that belong to models, runs, adapters, and the adapters' base models."""
    found: list[Input] = []
    for target in targets:
        place = model_inputs(target)
        adapter = find_adapter(str(place[0].path)) if place else None
        if adapter is None:
            found += place
        else:
            found += [*adapter_inputs([adapter]), *model_inputs(read_adapter(adapter).base.get("name"))]
    return found


def padding_id(processors: Sequence[Any]) -> int | None:
    """Return the id of the padding token of the first processor that has one."""
    return next((found for one in processors if (found := pad_token_id(one)) is not None), None)


def config_fields(adapter: AdapterFile, task: Task | None) -> dict[str, Any]:
    """Return the fields of the model's configuration that the adapter's task, or its recorded labels, determine."""
    if task is not None:
        return task.config_fields()
    labels = {int(index): name for index, name in (adapter.base.get("id2label") or {}).items()}
    return {"id2label": labels, "label2id": {name: index for index, name in labels.items()}} if labels else {}


def class_fields(adapter: AdapterFile) -> dict[str, Any]:
    """Return the fields of a configuration that name the classes of an adapter's head; empty if it names none.

    Raises:
        VerificationError: the adapter's task is damaged.
    """
    if not adapter.head:
        return {}
    kind = (adapter.task or {}).get("kind")
    fields = config_fields(adapter, _task_of(adapter) if kind in task_kinds() else None)
    if adapter.task is None and all(name.startswith("LABEL_") for name in fields.get("id2label", {}).values()):
        return {}  # names that transformers gives to classes without one
    return {name: fields[name] for name in ("id2label", "label2id", "problem_type") if name in fields}


def check_class(adapter: AdapterFile) -> None:
    """Raise ConfigError for an adapter whose base is no transformers model, or in a dtype that is not loaded here."""
    name, dtype = str(adapter.base.get("auto_class")), adapter.base.get("dtype")
    where, fix = str(adapter.folder), "Use it in Python, with load_adapter"
    if not is_model_class(name):
        raise ConfigError(where, f"its base is a '{name}', which transformers cannot load here", fix=fix)
    if dtype not in DTYPES:
        raise ConfigError(where, f"its base was loaded in {dtype}", allowed=", ".join(DTYPES), fix=fix)


def is_model_class(name: str) -> bool:
    """Return whether transformers has a model class or Auto class of this name."""
    import transformers  # noqa: PLC0415

    found = getattr(transformers, name, None)
    return isinstance(found, type) and (name.startswith("AutoModel") or issubclass(found, transformers.PreTrainedModel))


def _task_of(adapter: AdapterFile) -> Task | None:
    return task_from_dict(adapter.task) if adapter.task else None
