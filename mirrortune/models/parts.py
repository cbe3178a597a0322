# SPDX-License-Identifier: Apache-2.0
"""Load a model part by part with transformers' loader, holding only one part in memory.

Weights that transformers renames, stacks, splits, quantises or dequantises while loading get the same values as if the
model were loaded. A part is the smallest unit of the loader: a tensor, the matrices split from a fused tensor, a layer
of experts, or a quantised layer with its scales. Quantised layers are dequantised.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mirrortune.adapters.kinds import QuantisedLinear
from mirrortune.errors import raised_here
from mirrortune.models.load import ModelSource, task_config
from mirrortune.models.load_errors import quiet
from mirrortune.models.quantized import loading_config
from mirrortune.models.skeleton import outline
from mirrortune.system.tensor_files import (
    DTYPE_CODES,
    PlannedTensor,
    StoredTensor,
    give_back_memory,
    read_headers,
    read_tensor,
)

_QUANTISED = QuantisedLinear()
# Exceptions that internals of transformers and quantisers may raise in unexpected uses or other versions. Only calls
# into these libraries are guarded (see _ask); the same exceptions from mirrortune's lines are bugs.
_FOREIGN = (
    ImportError, AttributeError, TypeError, ValueError, LookupError, RuntimeError, ArithmeticError, AssertionError,
)  # fmt: skip
T = TypeVar("T")
_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


class CannotLoadParts(Exception):  # noqa: N818  (a fallback, not an error)
    """Raised if transformers cannot load a checkpoint in parts; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedTensor:
    """A tensor of the model that its files store in another form; unlike a :class:`StoredTensor`, read by ``load``.

    Attributes:
        code: safetensors' name of the dtype in which the model is loaded.
        shape: shape in the model.
        path: a file that holds part of the tensor.
        load: reads the tensor for a model in a given dtype.
    """

    code: str
    shape: tuple[int, ...]
    path: Path
    load: Callable[[torch.dtype], Tensor]


def value_of(tensor: StoredTensor | LoadedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """Read a tensor of the model; a converted tensor as if the model were loaded in ``dtype`` (its own by default)."""
    if isinstance(tensor, StoredTensor):
        return read_tensor(tensor)
    return tensor.load(dtype or _DTYPES[tensor.code])


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPart:
    """The smallest unit of loading.

    Attributes:
        keys: names of its tensors in the files.
        names: names of its tensors in the model.
        converter: transformers' weight converter, or None for a tensor that is only renamed.
    """

    keys: tuple[str, ...]
    names: tuple[str, ...]
    converter: Any = None


class PartLoader:
    """Loads the parts of a checkpoint.

    Args:
        source: source of the model.
        auto_class: name of an Auto class, or of a model class.
        config_fields: see :func:`mirrortune.models.load.task_config`.
        dtype: dtype in which the model would be loaded.
        files: safetensors files of the model.

    Raises:
        CannotLoadParts: transformers cannot load such a checkpoint in parts, or its loader has another version.
    """

    def __init__(
        self, source: ModelSource, auto_class: str, config_fields: dict[str, Any], dtype: torch.dtype, files: list[Path]
    ) -> None:
        self._made_of = source, auto_class, config_fields
        self._files, self._dtype = files, dtype
        self._headers = read_headers(files)
        self._plain = outline(source, auto_class, config_fields, None)
        _check_loader()
        with quiet():
            self._model, self._quantizer = _ask(_skeleton, source, auto_class, config_fields, dtype, files)
            self._parts = _ask(self._find_parts)
        self._part_of = {name: part for part in self._parts for name in part.names}
        self._recent: dict[tuple[str, ...], dict[str, Tensor]] = {}
        self._in_dtypes: dict[torch.dtype, PartLoader] = {}
        self._lock = threading.Lock()  # all reads fill and empty the same skeleton

    @property
    def is_plain(self) -> bool:
        """Whether every tensor is stored unconverted, under its name in the model except for a prefix."""
        prefix: Any = self._model.base_model_prefix

        def is_same(key: str, name: str) -> bool:
            return name in (key, f"{prefix}.{key}") or key == f"{prefix}.{name}"

        return self._quantizer is None and all(
            part.converter is None and is_same(part.keys[0], part.names[0]) for part in self._parts
        )

    @property
    def parts(self) -> list[CheckpointPart]:
        """All parts; empty for a quantised model, which is written as a plain one."""
        return [] if self._quantizer is not None else self._parts

    def tensors(self) -> dict[str, StoredTensor | LoadedTensor]:
        """Return all tensors of the (dequantised) model that the files hold, by name."""
        found: dict[str, StoredTensor | LoadedTensor] = {}
        for name, tensor in self._plain.state_dict().items():
            part = self._part_of.get(name)
            if part is None:
                continue
            header = self._headers[part.keys[0]]
            if part.converter is None and not self._is_quantised(name) and header.shape == tuple(tensor.shape):
                found[name] = header
                continue
            code = DTYPE_CODES[self._dtype if tensor.is_floating_point() else tensor.dtype]
            load = functools.partial(self._load, name)
            found[name] = LoadedTensor(code=code, shape=tuple(tensor.shape), path=header.path, load=load)
        return found

    def _load(self, name: str, dtype: torch.dtype) -> Tensor:
        return self.read(name) if dtype == self._dtype else self._in_dtype(dtype).read(name)

    def _in_dtype(self, dtype: torch.dtype) -> PartLoader:
        with self._lock:
            if dtype not in self._in_dtypes:
                source, auto_class, fields = self._made_of
                self._in_dtypes[dtype] = PartLoader(source, auto_class, fields, dtype, self._files)
            return self._in_dtypes[dtype]

    def read(self, name: str) -> Tensor:
        """Read a tensor of the model, dequantised, in the dtype in which the model would be loaded.

        Threads may call it at the same time, but they read one after another.
        """
        with self._lock, torch.no_grad():
            return self._read(name)

    def _read(self, name: str) -> Tensor:
        path, _, last = name.rpartition(".")
        if not self._is_quantised(name):
            module, parts = None, [self._part_of[name]]
        else:
            module = self._model.get_submodule(path)
            parts = [p for p in self._parts if any(n.rpartition(".")[0] == path for n in p.names)]
            self._model.set_submodule(path, _twin(module))
        before = {n: _owner(self._model, n)[n.rpartition(".")[2]] for p in parts for n in p.names}
        try:
            _ask(self._fill, parts)
            if module is not None and last == "weight":
                held = self._model.get_submodule(path)
                found = _ask(_QUANTISED.read, held, last) if _QUANTISED.layouts(held) else held.get_parameter(last)
                return found.detach().to(self._dtype)
            return torch.as_tensor(_owner(self._model, name)[last]).detach()
        finally:
            if module is not None:
                self._model.set_submodule(path, module)
            else:
                for own, tensor in before.items():
                    _owner(self._model, own)[own.rpartition(".")[2]] = tensor
            give_back_memory()

    def _fill(self, parts: list[CheckpointPart]) -> None:
        """Load ``parts`` into the skeleton with transformers."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model  # noqa: PLC0415
        from transformers.modeling_utils import LoadStateDictConfig  # noqa: PLC0415

        model: Any = self._model
        config = LoadStateDictConfig(
            dtype=self._dtype, dtype_plan=model._get_dtype_plan(self._dtype),  # noqa: SLF001
            hf_quantizer=self._quantizer, weight_mapping=self._mapping, device_map={"": "cpu"},
        )  # fmt: skip
        state = {key: read_tensor(self._headers[key]) for part in parts for key in part.keys}
        with quiet():
            info, _ = convert_and_load_state_dict_in_model(model, state, config)
        if info.conversion_errors or info.error_msgs:
            raise CannotLoadParts(str(info.conversion_errors or info.error_msgs)[:200])

    def as_stored(self, planned: Sequence[PlannedTensor], changed: Container[str]) -> list[PlannedTensor]:
        """Plan to write the tensors of a model under the names and in the shapes of the files.

        Args:
            planned: tensors with their names in the model.
            changed: names of tensors whose values differ from the files.
        """
        left = {tensor.name: tensor for tensor in planned}
        found = []
        for part in self.parts:
            own = [left.pop(name) for name in part.names if name in left]
            if len(own) == len(part.names) == 1 and part.converter is None:
                found.append(replace(own[0], name=part.keys[0], stands_for=part.names))
            elif own:
                is_made = any(tensor.name in changed for tensor in own)
                found += [self._planned(key, part.names if is_made else ()) for key in part.keys]
        return [*found, *left.values()]

    def _planned(self, key: str, stands_for: tuple[str, ...]) -> PlannedTensor:
        stored = self._headers[key]
        source = None if stands_for else stored
        return PlannedTensor(
            name=key, code=stored.code, shape=stored.shape, source=source, place=stored.path, stands_for=stands_for
        )

    def made(self, planned: PlannedTensor, read: Callable[[str], Tensor]) -> Tensor:
        """Compute a tensor of :meth:`as_stored`; ``read`` returns the tensors of the model by name."""
        if len(planned.stands_for) == 1 and self._part_of[planned.stands_for[0]].converter is None:
            return read(planned.stands_for[0])
        names = planned.stands_for
        if names not in self._recent:
            while len(self._recent) > 1:  # two, because files interleave the matrices of two such parts
                del self._recent[next(iter(self._recent))]
            self._recent[names] = self._stored(self._part_of[names[0]], {name: read(name) for name in names})
        return self._recent[names][planned.name]

    def _stored(self, part: CheckpointPart, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert the ``values`` of a part in the model back to the tensors of the files.

        Raises:
            CannotLoadParts: transformers cannot reverse the conversion, or returns different tensors.
        """
        made = _ask(self._converted_back, part, values)
        flat = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        found = {}
        for key in part.keys:
            own = _renamed(key, self._renamings)
            same = [n for n in flat if n == own or n.endswith(f".{own}") or own.endswith(f".{n}")]
            if len(same) != 1 or tuple(flat[same[0]].shape) != self._headers[key].shape:
                raise CannotLoadParts(f"'{key}' is not made again out of {', '.join(values)}")
            found[key] = flat[same[0]]
        return found

    def _converted_back(self, part: CheckpointPart, values: Mapping[str, Tensor]) -> dict[str, Any]:
        back = part.converter.reverse_transform()
        first = None
        for name, value in values.items():
            renamed, pattern = back.rename_source_key(name)
            first = first or renamed
            back.add_tensor(renamed, name, pattern, value)
        return dict(back.convert(first, model=self._model, config=self._plain.config))

    def _is_quantised(self, name: str) -> bool:
        """Return whether a name belongs to a quantised layer."""
        path = name.rpartition(".")[0]
        return self._quantizer is not None and type(self._model.get_submodule(path)) is not type(
            self._plain.get_submodule(path)
        )

    def _find_parts(self) -> list[CheckpointPart]:
        from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: PLC0415
        from transformers.core_model_loading import (  # noqa: PLC0415
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        model: Any = self._model
        self._mapping: Any = get_model_conversion_mapping(model, None, self._quantizer)
        self._renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        state, prefix = model.state_dict(), model.base_model_prefix
        groups: dict[str, list[tuple[str, str | None]]] = {}
        for key in sorted(self._headers, key=dot_natural_key):
            name, pattern = rename_source_key(key, self._renamings, converters, prefix, state)
            if name not in state and key in state:  # the stored name is that of the model already
                name, pattern = rename_source_key(key, [], [], prefix, state)
            if name in state:
                groups.setdefault(name, []).append((key, pattern))
        parts = []
        for name, members in groups.items():
            converter = by_pattern[members[0][1]] if members[0][1] is not None else None
            names = (name,) if converter is None else self._made_by(converter, name, members)
            keys = tuple(key for key, _ in members)
            parts.append(CheckpointPart(keys=keys, names=names, converter=copy.deepcopy(converter)))
        return parts

    def _made_by(self, converter: Any, name: str, members: list[tuple[str, str | None]]) -> tuple[str, ...]:
        """Return the model's names of the tensors that a converter makes from stored ones, tried on the meta device."""
        if self._quantizer is not None:
            return (name,)
        trial = copy.deepcopy(converter)
        for key, pattern in members:
            header = self._headers[key]
            trial.add_tensor(name, key, pattern, torch.empty(header.shape, dtype=_DTYPES[header.code], device="meta"))
        return tuple(trial.convert(name, model=self._model, config=self._plain.config))


@functools.cache
def _check_loader() -> None:
    """Check that the non-public functions of transformers that are used here exist and take the expected arguments.

    Raises:
        CannotLoadParts: they do not.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: PLC0415
        from transformers.core_model_loading import (  # noqa: PLC0415
            convert_and_load_state_dict_in_model,
            rename_source_key,
        )
        from transformers.modeling_utils import LoadStateDictConfig  # noqa: PLC0415
        from transformers.quantizers.auto import get_hf_quantizer  # noqa: PLC0415

        settings = ("dtype", "dtype_plan", "hf_quantizer", "weight_mapping", "device_map")
        uses: tuple[tuple[Callable[..., Any], int, tuple[str, ...]], ...] = (
            (get_model_conversion_mapping, 3, ()), (convert_and_load_state_dict_in_model, 3, ()),
            (rename_source_key, 5, ()), (get_hf_quantizer, 5, ()), (LoadStateDictConfig, 0, settings),
        )  # fmt: skip
        for function, count, names in uses:
            inspect.signature(function).bind(*[None] * count, **dict.fromkeys(names))
    except (ImportError, TypeError) as error:
        raise CannotLoadParts(f"this version of transformers loads models in another way ({error})") from error


def _ask(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function that uses internals of transformers.

    Raises:
        CannotLoadParts: another library raised an exception, or lacks an attribute in this version. Exceptions from
            mirrortune's own lines are passed on.
    """
    try:
        return function(*arguments)
    except _FOREIGN as error:
        lacks = isinstance(error, AttributeError) and not _is_ours(getattr(error, "obj", None))
        if raised_here(error) and not (lacks or isinstance(error, ImportError)):
            raise
        raise CannotLoadParts(f"{type(error).__name__} in transformers' loader: {str(error)[:200]}") from error


def _is_ours(value: object) -> bool:
    """Return whether an object or its class is defined in this package."""
    kind = value if isinstance(value, type) else type(value)
    return kind.__module__.split(".")[0] == "mirrortune"


def _twin(module: nn.Module) -> nn.Module:
    """Copy a module for temporary use, sharing its meta tensors, some of which cannot be copied."""
    twin: Any = copy.copy(module)
    twin._parameters, twin._buffers = dict(module._parameters), dict(module._buffers)  # noqa: SLF001
    return twin  # type: ignore[no-any-return]


def _renamed(key: str, renamings: list[Any]) -> str:
    from transformers.core_model_loading import apply_renamings  # noqa: PLC0415

    return str(apply_renamings(key, renamings))


def _owner(model: nn.Module, name: str) -> dict[str, Any]:
    """Return the dictionary in which a module stores the parameter or buffer of this name."""
    path, _, last = name.rpartition(".")
    module: Any = model.get_submodule(path)
    return module._parameters if last in module._parameters else module._buffers  # type: ignore[no-any-return]  # noqa: SLF001


def _skeleton(
    source: ModelSource, auto_class: str, config_fields: dict[str, Any], dtype: torch.dtype, files: list[Path]
) -> tuple[nn.Module, Any]:
    """Build the model on the meta device as transformers does before loading weights; return it and its quantiser."""
    import transformers  # noqa: PLC0415
    from transformers.quantizers.auto import get_hf_quantizer  # noqa: PLC0415

    config: Any = task_config(source, config_fields, None)
    packing = loading_config(source.load_in, dtype) if source.load_in else None
    quantizer, config, device_map = get_hf_quantizer(config, packing, {"": "cpu"}, True, {})  # type: ignore[no-untyped-call]  # noqa: FBT003
    model_class: Any = getattr(transformers, auto_class)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            is_auto = hasattr(model_class, "from_config")
            model: Any = model_class.from_config(config, trust_remote_code=False) if is_auto else model_class(config)
            if quantizer is not None:
                quantizer.preprocess_model(
                    model=model, dtype=dtype, device_map=device_map, checkpoint_files=[str(f) for f in files]
                )
    finally:
        torch.set_default_dtype(before)
    return model.eval(), quantizer
