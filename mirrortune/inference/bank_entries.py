# SPDX-License-Identifier: Apache-2.0
"""Check the adapters of a bank against the base model once, and keep little more than their trained parameters.

What adapters have in common (layers, cores, options, and the position of each parameter in the packed tensors) is a
:class:`Structure`. All adapters that were trained in the same way share one such object.
"""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Container, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from mirrortune import __version__
from mirrortune.adapters.files.adapter_file import AdapterFile, checked_tensor
from mirrortune.adapters.files.description import FORMAT_VERSION
from mirrortune.adapters.files.load import check_frozen, factors_dtype, stored_pairs, stored_targets
from mirrortune.adapters.files.tensors import describe_basis, describe_target, pack_tensors, to_bits
from mirrortune.adapters.fingerprint import weight_digest
from mirrortune.adapters.inject import FactorSource
from mirrortune.adapters.kinds import CallableKind
from mirrortune.adapters.layout import Layout
from mirrortune.adapters.plain import modules_of
from mirrortune.adapters.strategies import Strategy, cheapest_strategy, loaded_strategy
from mirrortune.adapters.targets import Target, Targets, kind_of
from mirrortune.errors import ConfigError, VerificationError
from mirrortune.inference.bank_bases import Basis, CoreDesign, LayerBases, encoded

_FIX = "Merge the adapter, or leave this layer out (target_modules) when training"


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Part(CoreDesign):
    """One adapted weight of a structure.

    Attributes:
        layout: how the weight's tensor stores the matrix.
        kind: how the module applies the weight.
        basis: basis of the weight.
        signs: signs (R,) that flip the vectors of the basis to the trained ones; None if they are equal.
        strategy: how the layer computes if all rows have the same adapter.
    """

    layout: Layout
    kind: CallableKind
    basis: Basis
    signs: Tensor | None
    strategy: Strategy


Places = Mapping[str, Mapping[str, tuple[str, int, tuple[int, ...]]]]
"""For each layer and each parameter of its core: name of the packed tensor, offset in it, and shape."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True, weakref_slot=True)
class Structure:
    """What adapters that were trained in the same way have in common.

    Attributes:
        parts: parts by layer, in module order.
        by_module: parts by the module that applies them; a fused layer has several.
        places: positions of each layer's parameters in the packed tensors; one object for all equal ones.
        saved: for each module with parameters that the adapter replaces, the tensor of each parameter.
        description: fields of ``adapter.json`` that all of these adapters share.
        num_labels: number of outputs of the head, or None without a head.
    """

    parts: Mapping[str, Part]
    by_module: Mapping[str, tuple[Part, ...]]
    places: Places
    saved: Mapping[str, Mapping[str, str]]
    description: Mapping[str, Any]
    num_labels: int | None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Entry:
    """One adapter of a bank, checked against the base.

    Attributes:
        structure: structure shared with similar adapters.
        tensors: packed tensors of ``adapter.safetensors``, without factors.
        pairs: encoded pairs of layers whose pairs do not follow from their rank, by layer.
        portable: the adapter's file contains its factors.
        own: fields of ``adapter.json`` that only this adapter has, as JSON text.
    """

    structure: Structure
    tensors: Mapping[str, Tensor]
    pairs: Mapping[str, Tensor]
    portable: bool
    own: str

    def parameters(self, module: str) -> dict[str, Tensor]:
        """Return the parameters of a module that the adapter replaces, such as those of a classifier."""
        return {name: self.tensors[key] for name, key in self.structure.saved.get(module, {}).items()}

    @property
    def nbytes(self) -> int:
        """Memory of the adapter's tensors in bytes, including tensors shared with similar adapters."""
        return sum(t.numel() * t.element_size() for t in (*self.tensors.values(), *self.pairs.values()))


class Stacks:
    """The stacked parameters of several adapters, made once for all layers and kept while some rows are served."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, tuple[Entry, ...]], Tensor] = {}

    def numbers(self, entries: Sequence[Entry], layer: str) -> dict[str, Tensor]:
        """Return the stacked parameters of a layer's cores, all of one design; the first dimension is the adapters."""
        places = entries[0].structure.places
        if all(entry.structure.places is places for entry in entries):
            return {name: self._of(tuple(entries), *place) for name, place in places[layer].items()}
        each = [{n: _taken(e.tensors[p[0]], *p[1:]) for n, p in e.structure.places[layer].items()} for e in entries]
        return {name: torch.stack([own[name] for own in each]) for name in each[0]}

    def _of(self, entries: tuple[Entry, ...], key: str, start: int, shape: tuple[int, ...]) -> Tensor:
        whole = self._made.get((key, entries))
        if whole is None:
            whole = self._made[key, entries] = torch.stack([entry.tensors[key] for entry in entries])
        return _taken(whole, start, shape)


def _taken(tensor: Tensor, start: int, shape: tuple[int, ...]) -> Tensor:
    """Return a view of part of the last dimension, reshaped to ``shape``."""
    return tensor[..., start : start + math.prod(shape)].reshape(*tensor.shape[:-1], *shape)


class Admission:
    """Checks adapters against a base model and turns them into entries.

    Args:
        model: base model.
        source: computes or caches factors.
        without_rows: names of modules for which the first dimension of the input is not the batch.
    """

    def __init__(self, model: nn.Module, source: FactorSource, without_rows: Container[str] = ()) -> None:
        self.model, self.source, self.without_rows = model, source, without_rows
        self.layers: dict[str, LayerBases] = {}
        self._modules = dict(model.named_modules(remove_duplicate=False))
        # Determined now, while modules still have their original classes.
        self._plain = {name for name, module in self._modules.items() if _is_plain(module)}
        self._structures: WeakValueDictionary[Hashable, Structure] = WeakValueDictionary()
        self._targets: dict[str, Targets] = {}
        self._places: dict[str, Places] = {}
        self._shared: WeakValueDictionary[str, Tensor] = WeakValueDictionary()
        self._lock = threading.Lock()

    def admit(self, adapter: AdapterFile) -> Entry:
        """Check ``adapter`` as ``load_adapter`` does and return it as an entry.

        Raises:
            ConfigError: the adapter or one of its layers cannot be mixed with others in a batch.
            VerificationError: the adapter belongs to another base, a file is damaged, or tensors do not fit.
        """
        _check_method(adapter)
        targets = self._targets_of(adapter)
        _check_tensors(self.model, adapter, targets)
        pairs = {n: encoded(p, adapter.fingerprints[n].rank) for n, p in stored_pairs(adapter).items()}
        found = targets.layers
        parts = {name: self._part(adapter, name, found[name], pairs.get(name)) for name in adapter.layouts}
        packed, holds = _packed(adapter)
        structure = self._structure(adapter, targets, parts, holds, pairs)
        tensors = {key: self._interned(tensor) if key == "signs" else tensor for key, tensor in packed.items()}
        own = json.dumps({"base": adapter.base, "task": adapter.task, **adapter.extra}, sort_keys=True)
        return Entry(
            structure=structure,
            tensors=tensors,
            pairs={name: self._interned(tensor) for name, tensor in pairs.items()},
            portable=adapter.form == "portable",
            own=sys.intern(own),
        )

    def _targets_of(self, adapter: AdapterFile) -> Targets:
        layouts = {name: asdict(layout) for name, layout in adapter.layouts.items()}
        own = [adapter.head, adapter.plain, adapter.tied, adapter.frozen]
        key = json.dumps([asdict(adapter.spec), layouts, *own], sort_keys=True)
        found = self._targets.get(key)
        if found is None:
            found = stored_targets(self.model, adapter)
            check_frozen(adapter, self.model, found)
            for name, target in found.layers.items():
                self._check_layer(name, target)
            for name in (*found.head, *found.plain):
                if (module := name.rpartition(".")[0]) in self.without_rows:
                    problem = f"the input of '{module}' does not begin with the rows of the batch"
                    raise ConfigError(name, f"{problem}, so rows cannot have their own", fix="Merge the adapter")
            self._check_plain(found)
            self._targets[key] = found
        return found

    def _check_plain(self, targets: Targets) -> None:
        """Refuse parameters trained as they are that belong to adapted layers, or to several modules."""
        adapted = {path for target in targets.layers.values() for path, _ in target.places}
        for name in targets.plain:
            holders = modules_of(self.model, [name])
            problem = "its layer is adapted" if adapted & holders.keys() else None
            if len({id(module) for module in holders.values()}) > 1:
                problem = f"{' and '.join(holders)} share it"
            if problem is not None:
                problem = f"it is trained whole, and {problem}, so rows of a batch cannot have their own"
                raise ConfigError(name, problem, fix="Merge the adapter")

    def _check_layer(self, name: str, target: Target) -> None:
        """Raise ConfigError for a weight that is not applied row by row by exactly one module."""
        kind, problem = target.kind, None
        for path, parameter in target.places:
            module = self._modules[path]
            if not isinstance(kind, CallableKind) or target.layout.count > 1:
                problem = f"it is a weight ({kind.name}) that a module reads, and not a layer that is called"
            elif isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
                problem = "nn.MultiheadAttention reads its weight and never calls it"
            elif path not in self._plain or parameter != "weight":
                problem = f"its class {type(module).__name__} has a forward of its own"
            elif not path:
                problem = "it is the model itself"
            elif path in self.without_rows:
                problem = "its input does not begin with the rows of the batch"
            if problem is not None:
                raise ConfigError(name, f"{problem}, so rows of a batch cannot have their own", fix=_FIX)

    def _part(self, adapter: AdapterFile, name: str, target: Target, pairs: Tensor | None) -> Part:
        rank, spec = adapter.fingerprints[name].rank, adapter.spec
        if rank != target.rank:
            raise VerificationError(name, f"the adapter holds a basis of rank {rank}, got {target.rank}")
        with self._lock:
            bases = self.layers.setdefault(name, LayerBases(self.model, target))
        kind = target.kind
        assert isinstance(kind, CallableKind)
        pairing = spec.resolved_pairing if pairs is None else None
        said: list[Any] = [spec.preset.core, spec.options, rank, target.shape, pairing]
        own: dict[str, Any] = {"spec": spec, "layer": name, "shape": target.shape, "rank": rank}
        own["design"] = json.dumps(said, sort_keys=True)
        basis, signs = bases.match(adapter, CoreDesign(**own), pairs, self.source)
        U = basis.held.factors.U
        asked = loaded_strategy(spec.strategy, factors_dtype(adapter, name, U), U.dtype)
        strategy = _strategy(asked, target, U.dtype)
        return Part(**own, layout=target.layout, kind=kind, basis=basis, signs=signs, strategy=strategy)

    def _structure(
        self,
        adapter: AdapterFile,
        targets: Targets,
        parts: dict[str, Part],
        holds: dict[str, dict[str, list[int]]],
        pairs: Mapping[str, Tensor],
    ) -> Structure:
        """Return the structure of an adapter, the same object for all adapters with an equal structure."""
        description = _description(adapter, targets, holds)
        shapes = sorted((key, list(t.shape)) for key, t in adapter.tensors.items() if key.startswith("param."))
        placed = [(id(p.basis), p.signs is not None and p.signs.numpy().tobytes()) for p in parts.values()]
        key = (json.dumps([description, shapes]), tuple(placed))
        with self._lock:
            found = self._structures.get(key)
            if found is None:
                by_module: dict[str, tuple[Part, ...]] = {}
                for name, target in targets.layers.items():
                    for path in dict.fromkeys(path for path, _ in target.places):
                        by_module[path] = (*by_module.get(path, ()), parts[name])
                places = self._places.setdefault(json.dumps(holds), _places(holds))
                _check_cores(adapter, parts, places, pairs)
                found = self._structures[key] = Structure(
                    parts=parts,
                    by_module=self._once_a_module(by_module),
                    places=places,
                    saved=_saved(adapter),
                    description=description,
                    num_labels=_num_labels(adapter),
                )
            return found

    def _once_a_module(self, by_module: dict[str, tuple[Part, ...]]) -> dict[str, tuple[Part, ...]]:
        """Keep one name of each module that has several."""
        first = {id(self._modules[path]): path for path in reversed(by_module)}
        return {path: parts for path, parts in by_module.items() if first[id(self._modules[path])] == path}

    def _interned(self, tensor: Tensor) -> Tensor:
        """Return the same tensor object for all equal tensors."""
        key = weight_digest(tensor)
        with self._lock:
            return self._shared.setdefault(key, tensor)


def _check_method(adapter: AdapterFile) -> None:
    where, spec = str(adapter.folder), adapter.spec
    if spec.preset.peft is not None:
        raise ConfigError(
            where, f"'{spec.method}' is a method of PEFT, which a bank does not mix", allowed="methods of mirrortune",
            fix="Load it with load_adapter into a model of its own, or merge it",
        )  # fmt: skip
    if adapter.base.get("new_tokens"):
        problem = "it has new tokens, and with them a vocabulary of its own"
        raise ConfigError(where, problem, fix="Merge it, and load the merged model")
    if spec.preset.plain == "all":
        raise ConfigError(
            where, f"method '{spec.method}' trains every weight: it shares no base with others",
            fix="Merge it, and load the merged model",
        )  # fmt: skip
    if adapter.statistics:
        problem = f"it has running statistics of its own ({adapter.statistics[0]}), which rows of a batch cannot have"
        raise ConfigError(where, problem, fix="Merge it, and load the merged model")


def _is_plain(module: nn.Module) -> bool:
    """Return whether a module does nothing but apply its weight."""
    kind, layouts = kind_of(module)
    return bool(layouts) and isinstance(kind, CallableKind) and kind.is_callable(module)


def _check_tensors(model: nn.Module, adapter: AdapterFile, targets: Targets) -> None:
    """Check that each tensor belongs to a parameter of the model and has its shape; only heads may differ in width."""
    where = str(adapter.folder)
    stored = {key.removeprefix("param.") for key in adapter.tensors if key.startswith("param.")}
    wanted = {*targets.head, *targets.plain}
    if stored != wanted:
        odd = sorted(stored ^ wanted)[0]
        place = "only in the adapter" if odd in stored else "missing from the adapter"
        raise VerificationError(where, f"tensor 'param.{odd}' is {place}", fix="Use the class of model it was made for")
    for name in stored:
        own, (module, _, parameter) = model.get_parameter(name), name.rpartition(".")
        found = adapter.tensors[f"param.{name}"]
        is_output = name in targets.head and found.dim() == own.dim() and parameter in ("weight", "bias")
        checked_tensor(adapter, f"param.{name}", (found.shape[0], *own.shape[1:]) if is_output else own.shape)
        if not module:
            raise ConfigError(name, "the model itself holds this trained parameter, and no layer that is called",
                              fix="Merge the adapter")  # fmt: skip


def _check_cores(
    adapter: AdapterFile,
    parts: Mapping[str, Part],
    places: Places,
    pairs: Mapping[str, Tensor],
) -> None:
    """Check that all trained parameters belong to a core."""
    for name, part in parts.items():
        core = part.basis.held.core(part, pairs.get(name))
        known = {key for key, parameter in core.named_parameters() if parameter.numel()}
        if strange := sorted(places[name].keys() - known):
            problem = f"tensor 'core.{name}.{strange[0]}' is only in the adapter"
            raise VerificationError(str(adapter.folder), problem, fix="Use the model that the adapter was made for")


def _strategy(asked: Strategy | None, target: Target, dtype: torch.dtype) -> Strategy:
    """Return how a layer computes if all rows have this adapter; ``branch`` replaces ``dense``."""
    is_whole = target.layout.rows is None and len(target.places) == 1 and target.rank >= min(target.shape)
    if not is_whole or asked == "dense":
        return "branch"
    return asked or cheapest_strategy(*target.shape, target.rank, dtype, target.kind)


def _packed(adapter: AdapterFile) -> tuple[dict[str, Tensor], dict[str, dict[str, list[int]]]]:
    """Return the packed tensors of an adapter without factors and pairs, and the entries of each layer in them.

    See :func:`mirrortune.adapters.files.tensors.pack_tensors`.
    """
    # In float32, as cores are, whatever a model was cast to before it was saved.
    own = {
        key: tensor.float() if key.startswith("core.") else tensor for key, tensor in adapter.tensors.items()
        if key.partition(".")[0] in ("core", "clusters", "sketch", "param")
    }  # fmt: skip
    tensors, holds = pack_tensors(own, list(adapter.layouts))
    signs = [to_bits(stored.sketch) for stored in adapter.fingerprints.values() if not stored.has_sizes]
    if signs:
        tensors["signs"] = torch.cat(signs)
        tensors["effects"] = torch.cat(list(adapter.effects.values())).float()
    compact = {key: tensor.clone() if key.startswith("param.") else tensor for key, tensor in tensors.items()}
    return compact, holds


def _description(adapter: AdapterFile, targets: Targets, holds: dict[str, dict[str, list[int]]]) -> dict[str, Any]:
    """Return the fields of ``adapter.json`` that all adapters of a structure share."""
    layers = {
        name: {
            **describe_target(name, targets.layers[name]),
            **describe_basis(adapter.fingerprints[name]),
            "dtype": adapter.dtypes[name],
            "holds": holds[name],
        }
        for name in adapter.layouts  # in the order of the packed tensors
    }
    return {
        "format_version": FORMAT_VERSION,
        "mirrortune_version": __version__,
        "form": adapter.form,
        "adapter": adapter.spec.to_dict(),
        "layers": layers,
        "head": list(adapter.head),
        "plain": sorted({key.removeprefix("param.") for key in adapter.tensors if key.startswith("param.")}
                        - set(adapter.head)),
        "skipped": {},
        **({"tied": adapter.tied} if adapter.tied else {}),
        "frozen": adapter.frozen,
    }  # fmt: skip


def _places(holds: Mapping[str, Mapping[str, list[int]]]) -> Places:
    used: dict[str, int] = {}
    found: dict[str, dict[str, tuple[str, int, tuple[int, ...]]]] = {}
    for layer, held in holds.items():
        found[layer] = {}
        for key, shape in held.items():
            kind, _, parameter = key.partition(".")
            if kind == "core":
                found[layer][parameter] = key, used.get(key, 0), tuple(shape)
            used[key] = used.get(key, 0) + math.prod(shape)
    return found


def _saved(adapter: AdapterFile) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for key in adapter.tensors:
        if key.startswith("param."):
            module, _, parameter = key.removeprefix("param.").rpartition(".")
            found.setdefault(module, {})[parameter] = key
    return found


def _num_labels(adapter: AdapterFile) -> int | None:
    """Return the number of outputs of the last matrix of the head."""
    matrices = [t for name in adapter.head if (t := adapter.tensors[f"param.{name}"]).dim() >= 2]
    return matrices[-1].shape[0] if matrices else None
