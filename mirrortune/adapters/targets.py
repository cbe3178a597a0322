# SPDX-License-Identifier: Apache-2.0
"""Find the weights of a model to adapt, the parameters of its task head, and the weights that stay frozen, and why.

The code knows no model families. Inside ``model.base_model``, every matrix of a requested kind is a target. Parameters
outside it, and parameters that the checkpoint lacks, form the task head, which is trained in full. Output embeddings
stay frozen unless a pattern names them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from mirrortune.adapters.kinds import (
    Attention,
    Convolution,
    Embedding,
    Experts,
    Kind,
    Linear,
    Parameter,
    QuantisedLinear,
    TransposedLinear,
    base_prefix,
    is_plain,
    plain_dtype,
)
from mirrortune.adapters.layer_patterns import ALL_LAYERS, ALL_LINEAR, alternatives, in_blocks, layers_named, no_match
from mirrortune.adapters.layout import Layout
from mirrortune.adapters.pairings.listed import check_fit
from mirrortune.adapters.plain import ADD_TOKENS, choose_parameters, chosen_by_method, fit, rows_of_embeddings
from mirrortune.adapters.plain import WHERE as ALSO_TRAIN
from mirrortune.adapters.plain import trained_statistics as find_statistics
from mirrortune.adapters.spec import AdapterSpec
from mirrortune.adapters.svd import Rank, resolve_rank
from mirrortune.errors import ConfigError

KINDS: tuple[Kind, ...] = (
    Linear(),
    TransposedLinear(),
    QuantisedLinear(),
    Convolution(),
    Embedding(),
    Attention(),
    Experts(),
    Parameter(),
)
"""Kinds in order of precedence; a module is of the first kind that recognises it."""


@dataclass(slots=True, kw_only=True)
class Candidate:
    """A weight that could be adapted, with every module that holds it."""

    kind: Kind
    layout: Layout
    places: list[tuple[str, str]]
    is_output: bool
    is_read: bool
    """Whether ``nn.MultiheadAttention`` reads the weight and never calls the layer."""
    whole: str = ""
    """Name of the fused layer of which this is a part; empty if there is none."""

    @property
    def names(self) -> list[str]:
        """Layer names of the whole weight, one for each place."""
        return [_layer_name(*place) for place in self.places]

    @property
    def is_peft(self) -> bool:
        """Whether PEFT's tuners can adapt the layer: it is linear and shares its weight with no other."""
        return isinstance(self.kind, Linear) and len(self.places) == 1 and not self.is_read

    @property
    def is_grouped(self) -> bool:
        """Whether it is a grouped convolution, whose matrices are small, and of rank 1 if it is depthwise."""
        return self.kind.name == "convolution" and self.layout.count > 1


def find_candidates(
    model: nn.Module, prefix: str, new: set[str], output: set[int]
) -> tuple[dict[str, Candidate], dict[str, str]]:
    """Return every weight of a known kind inside the base model by layer name, and for all other weights the reason.

    Args:
        model: model without an adapter.
        prefix: prefix of the names of the base model's parameters.
        new: names of parameters that the checkpoint lacks.
        output: ids of the output embedding's parameters.
    """
    found: dict[int, Candidate] = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        kind, layouts = kind_of(module)
        for parameter, layout in layouts.items():
            weight: object = module if kind.is_quantised else module.get_parameter(parameter)
            full = ".".join(filter(None, (name, parameter)))
            held = module.parameters(recurse=False) if kind.is_quantised else [weight]
            is_output = any(id(tensor) in output for tensor in held)
            if full in new or not (full.startswith(prefix) or is_output or id(weight) in found):
                continue  # the task head
            if id(weight) in found:
                found[id(weight)].places.append((name, parameter))
            else:
                found[id(weight)] = Candidate(
                    kind=kind,
                    layout=layout,
                    places=[(name, parameter)],
                    is_output=is_output,
                    is_read=isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear),
                )
        if not layouts and name.startswith(prefix) and (reason := _opaque(module)):
            skipped[name] = reason
    return {_layer_name(*c.places[0]): c for c in found.values()}, skipped


def kind_of(module: nn.Module) -> tuple[Kind, dict[str, Layout]]:
    """Return the kind of a module, and the layouts of its weights by parameter name; empty if it holds no matrix."""
    for kind in KINDS:
        if layouts := kind.layouts(module):
            return kind, layouts
    return KINDS[-1], {}


def _opaque(module: nn.Module) -> str | None:
    """Return the reason why a module with a weight is of no kind, or None for a module without a weight."""
    if parametrize.is_parametrized(module):
        return "its weight is computed from other parameters"
    weight = module._parameters.get("weight")  # noqa: SLF001  (getattr would compute a parametrised one)
    if weight is None or weight.ndim < 2:
        return None
    numbers = str(weight.dtype).removeprefix("torch.")
    if numbers.startswith("float8"):
        return f"{type(module).__name__} of {numbers} numbers, whose scales are elsewhere; load the model dequantised"
    return f"{type(module).__name__} of {numbers} numbers {tuple(weight.shape)}, a layer of unknown kind"


def _layer_name(module: str, parameter: str) -> str:
    return module if parameter == "weight" else ".".join(filter(None, (module, parameter)))


_WHERE = "adapter.target_modules"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A weight to adapt, with all modules that hold it.

    Attributes:
        kind: kind of the module that holds the weight.
        layout: how the weight stores one matrix (O, I), or several.
        rank: number of singular directions used of each matrix.
        places: (module name, parameter name) of every place of the weight. There are several if modules share the
            weight, or if a module has several parents.
    """

    kind: Kind
    layout: Layout
    rank: int
    places: tuple[tuple[str, str], ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of each matrix, (O, I)."""
        return self.layout.matrix_shape

    @property
    def count(self) -> int:
        """Number of matrices in the weight."""
        return self.layout.count

    @property
    def tensors(self) -> tuple[str, ...]:
        """All names of the weight in the model's state dict."""
        return tuple(".".join(filter(None, place)) for place in self.places)

    def weight(self, model: nn.Module) -> nn.Parameter:
        """Return the base weight in ``model``."""
        path, parameter = self.places[0]
        module = model.get_submodule(path)
        if parametrize.is_parametrized(module, parameter):  # another part of the same weight has been adapted
            module = module.get_submodule(f"parametrizations.{parameter}")
            parameter = "original"
        return module.get_parameter(parameter)

    def read(self, model: nn.Module) -> Tensor:
        """Return the matrix or stack to factorise; a quantised weight is dequantised to the model's dtype."""
        if not self.kind.is_quantised:
            return self.matrix(self.weight(model).detach())
        found = self.kind.read(model.get_submodule(self.places[0][0]), self.places[0][1])
        return self.matrix(found.to(plain_dtype(model)))

    def matrix(self, weight: Tensor) -> Tensor:
        """Return ``weight`` (or its gradient) as the matrix or stack to factorise."""
        return self.layout.matrix(weight).contiguous()


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """The weights and parameters of a model that an adapter trains, as names and shapes.

    Since no values are needed, they can be found on the meta device.

    Attributes:
        layers: adapted weights by layer name, in module order.
        head: names of the task head's parameters, which are trained in full.
        plain: names of base parameters that are trained directly (``bitfit``, ``full``, ``also_train``), and of rows of
            them.
        skipped: reason for each weight that stays frozen, by layer name.
        clipped: layers whose min(O, I) is below the requested rank, and which use all of their directions.
        statistics: names of the running statistics that move in training and are saved; all others are frozen.
    """

    layers: dict[str, Target]
    head: tuple[str, ...]
    plain: tuple[str, ...]
    skipped: dict[str, str]
    clipped: tuple[str, ...] = ()
    statistics: tuple[str, ...] = ()


def find_targets(
    model: nn.Module,
    spec: AdapterSpec,
    new_parameters: Iterable[str] = (),
    stored: Mapping[str, Layout] | None = None,
    stored_plain: Collection[str] = (),
) -> Targets:
    """Find the weights of ``model`` that an adapter with ``spec`` changes, and the parameters of the task head.

    Args:
        model: any module; in a transformers model, the part under ``base_model_prefix`` is adapted.
        spec: method, rank and target pattern.
        new_parameters: names of parameters that the checkpoint lacks; they belong to the head.
        stored: layouts from an adapter file by layer name. Exactly these layers are selected, except those that the
            model lacks, and no pattern is matched.
        stored_plain: names of the parameters that the adapter of the file trains directly, and of the running
            statistics that it holds; as for ``stored``.

    Raises:
        ConfigError: ``target_modules`` or one of its alternatives matches no layer (the nearest names are suggested),
            the rank is above min(O, I) of every layer, or a list of pairs does not fit.
    """
    new = set(new_parameters)
    prefix = base_prefix(model)
    output = _output_embedding_ids(model)
    parameters = dict(model.named_parameters())
    head = tuple(
        name for name, p in parameters.items() if (name in new or not name.startswith(prefix)) and id(p) not in output
    )
    plain, beside = _trained_as_they_are(model, spec, head, None if stored is None else stored_plain)
    moving = find_statistics(model, {*head, *plain})
    statistics = tuple(name for name in moving if stored is None or name in stored_plain)
    if not spec.preset.is_adapter:
        return Targets(layers={}, head=head, plain=plain, skipped={}, statistics=statistics)
    candidates, skipped = find_candidates(model, prefix, new, output)
    candidates = _split(candidates, spec.split) if stored is None else _stored_parts(candidates, stored)
    if spec.preset.peft is not None:
        skipped |= {
            n: f"{c.kind.name}, not adapted by PEFT's tuners here" for n, c in candidates.items() if not c.is_peft
        }
        candidates = {name: c for name, c in candidates.items() if c.is_peft}
    if stored is None:
        wanted = _without_plain(_wanted(model, spec, candidates, skipped), spec, candidates, skipped, beside)
    else:
        wanted = {name for name in stored if name in candidates}
    ranks, clipped = _ranks(spec, {n: candidates[n].layout.matrix_shape for n in candidates if n in wanted})
    quantised = [name for name in ranks if candidates[name].kind.is_quantised]
    if quantised and spec.strategy not in (None, "branch"):
        raise ConfigError(
            "adapter.strategy", f"{quantised[0]} is quantised, got {spec.strategy}", allowed="auto, branch"
        )
    if spec.pair_lists is not None:
        check_fit(spec.pair_lists, ranks)
    layers = {
        name: Target(kind=c.kind, layout=c.layout, rank=ranks[name], places=tuple(c.places))
        for name, c in candidates.items()
        if name in wanted
    }
    skipped |= {name: _why_not(c) for name, c in candidates.items() if name not in wanted and not _is_default(c)}
    return Targets(layers=layers, head=head, plain=plain, skipped=skipped, clipped=clipped, statistics=statistics)


def _trained_as_they_are(
    model: nn.Module, spec: AdapterSpec, head: tuple[str, ...], stored: Iterable[str] | None
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the names of the base's parameters, or of rows of them, to train as they are; and by what settings the
    user has chosen them, by the name of the whole parameter.
    """
    parameters = dict(model.named_parameters())
    if stored is not None:
        return tuple(name for name in stored if fit(name, parameters)), {}
    beside = choose_parameters(model, spec.also_train, head)
    plain = (*chosen_by_method(parameters, spec.preset.plain, set(head)), *beside)
    rows = rows_of_embeddings(model, spec.new_rows, plain)
    return (*plain, *map(str, rows)), beside | {found.weight: ADD_TOKENS for found in rows}


def _wanted(model: nn.Module, spec: AdapterSpec, candidates: dict[str, Candidate], skipped: dict[str, str]) -> set[str]:
    """Return the names of the layers that the settings select; add layers of other blocks to ``skipped``."""
    wanted = _choose(candidates, spec.target_modules)
    if not wanted:
        raise _nothing(spec.target_modules, candidates, skipped)
    if spec.layers is None:
        return wanted
    lists = nn.ModuleList | nn.Sequential
    blocks = {name: len(module) for name, module in model.named_modules() if isinstance(module, lists)}
    chosen = wanted & in_blocks(list(candidates), blocks, spec.layers)
    if not chosen:
        problem = f"no layer of '{spec.target_modules}' lies in blocks {list(spec.layers)}"
        raise ConfigError("adapter.layers", problem, fix="Choose other blocks, or leave it out")
    skipped |= dict.fromkeys((name for name in candidates if name in wanted - chosen), "outside adapter.layers")
    return chosen


def _without_plain(
    wanted: set[str],
    spec: AdapterSpec,
    candidates: Mapping[str, Candidate],
    skipped: dict[str, str],
    beside: Mapping[str, str],
) -> set[str]:
    """Return ``wanted`` without the layers whose weight is trained as it is, which are added to ``skipped``.

    Raises:
        ConfigError: the user has named such a layer among those to adapt, or none is left.
    """
    taken = {}
    for name in wanted:
        for path, parameter in candidates[name].places:
            if entry := beside.get(f"{path}.{parameter}"):
                taken[name] = entry
    if spec.preset.peft is not None and (
        inside := [n for n in beside if n.rpartition(".")[0] in wanted - taken.keys()]
    ):
        problem = f"'{beside[inside[0]]}' chooses {inside[0]}, inside a layer that '{spec.method}' adapts"
        raise ConfigError(ALSO_TRAIN, problem, fix="Leave it out, or use one of mirrortune's own methods")
    if taken and spec.target_modules not in (ALL_LINEAR, ALL_LAYERS):
        name = min(taken)
        where = ADD_TOKENS if taken[name] == ADD_TOKENS else ALSO_TRAIN
        problem = f"'{taken[name]}' chooses {name}, which adapter.target_modules adapts"
        raise ConfigError(where, problem, fix="Leave it out of one of them")
    if taken.keys() == wanted:
        fix = "Choose fewer parameters, or --method none with them"
        raise ConfigError(ALSO_TRAIN, "it leaves no layer to adapt", fix=fix)
    skipped |= dict.fromkeys(taken, f"trained whole by {ALSO_TRAIN}")
    return wanted - taken.keys()


def complete_targets(targets: Targets, model: nn.Module, spec: AdapterSpec, new_parameters: Iterable[str]) -> Targets:
    """Return the targets of a loaded model, given those of the same model without weights.

    They are searched again only if loading has changed them: if the checkpoint lacks a parameter, which then belongs to
    the head, or if quantised layers have replaced plain ones.

    Args:
        targets: targets of the model without weights.
        model: loaded model.
        spec: spec for which ``targets`` were found.
        new_parameters: see :func:`find_targets`.
    """
    modules, parameters = dict(model.named_modules(remove_duplicate=False)), dict(model.named_parameters())
    is_unchanged = (
        set(new_parameters) <= set(targets.head)
        and all(name in parameters and is_plain(parameters[name]) for name in (*targets.head, *targets.plain))
        and all(
            path in modules and kind_of(modules[path])[0] is target.kind
            for target in targets.layers.values()
            for path, _ in target.places
        )
    )
    return targets if is_unchanged else find_targets(model, spec, new_parameters)


def _output_embedding_ids(model: nn.Module) -> set[int]:
    getter = getattr(model, "get_output_embeddings", None)
    module: object = getter() if callable(getter) else None
    return {id(p) for p in module.parameters()} if isinstance(module, nn.Module) else set()


def _is_default(candidate: Candidate) -> bool:
    return candidate.kind.is_default and not candidate.is_output


def _is_layer(candidate: Candidate) -> bool:
    is_convolution = candidate.kind.name == "convolution" and not candidate.is_grouped
    return _is_default(candidate) or (is_convolution and not candidate.is_output)


def _why_not(candidate: Candidate) -> str:
    if candidate.is_output:
        return "the output embedding"
    groups = f" in {candidate.layout.count} groups" if candidate.is_grouped else ""
    return f"{candidate.kind.name}{groups}, adapted on request only"


def _choose(candidates: dict[str, Candidate], pattern: str) -> set[str]:
    """Return the names of the layers that ``pattern`` matches."""
    if pattern in (ALL_LINEAR, ALL_LAYERS):
        layers = {name: c for name, c in candidates.items() if _is_layer(c)}
        linear = {name: c for name, c in layers.items() if _is_default(c)}
        # In a model with most of its parameters in convolutions, these are adapted as well.
        is_convolutional = 2 * sum(map(_size, linear.values())) < sum(map(_size, layers.values()))
        return set(layers if pattern == ALL_LAYERS or is_convolutional else linear)
    chosen = set()
    for alternative in alternatives(pattern):
        found = layers_named({name: c.names for name, c in candidates.items()}, alternative, _WHERE)
        if not found:
            raise no_match(_WHERE, alternative, _usual(candidates), candidates, of=pattern)
        chosen |= found
    return chosen


def _size(candidate: Candidate) -> int:
    return math.prod(candidate.layout.shape)


def _nothing(pattern: str, candidates: dict[str, Candidate], skipped: dict[str, str]) -> ConfigError:
    found = [f"{name} ({_why_not(c)})" for name, c in candidates.items()]
    found += [f"{name} ({reason})" for name, reason in skipped.items()]
    seen = f"; what it holds: {', '.join(found[:3])}{', ...' if len(found) > 3 else ''}" if found else ""
    return ConfigError(
        _WHERE, f"'{pattern}' finds no layer in this model{seen}",
        allowed="a regex for a layer that can be adapted on request" if candidates else None,
    )  # fmt: skip


def _usual(candidates: dict[str, Candidate]) -> list[str]:
    """Return the layer names that a user most likely meant: those adapted by default, if there are any."""
    return [name for name, c in candidates.items() if _is_default(c)] or list(candidates)


def _split(candidates: dict[str, Candidate], patterns: Mapping[str, Any]) -> dict[str, Candidate]:
    """Replace each fused layer that a pattern matches by its parts, ``<layer>.0`` and so on."""
    chosen: dict[str, str] = {}
    for pattern in patterns:
        if not (named := layers_named({name: c.names for name, c in candidates.items()}, pattern, "adapter.split")):
            raise no_match("adapter.split", pattern, _usual(candidates), candidates)
        chosen |= dict.fromkeys(named, pattern)
    found = {}
    for name, whole in candidates.items():
        if name not in chosen:
            found[name] = whole
            continue
        if whole.kind.is_quantised:
            raise ConfigError(f"adapter.split.{chosen[name]}", f"{name} is quantised and stays whole", fix="Remove it")
        sizes, repeat = _parts(patterns[chosen[name]])
        try:
            layouts = whole.layout.split(sizes, repeat)
        except ValueError as error:
            raise ConfigError(f"adapter.split.{chosen[name]}", f"{name}: {error}") from error
        parts = {f"{name}.{i}": replace(whole, layout=layout, whole=name) for i, layout in enumerate(layouts)}
        found |= parts
    return found


def _stored_parts(candidates: dict[str, Candidate], stored: Mapping[str, Layout]) -> dict[str, Candidate]:
    """Replace each fused layer whose parts are in an adapter file by these parts, ``<layer>.0`` and so on.

    Parts that do not fit the model's layer are left out.
    """
    parts: dict[str, dict[str, Candidate]] = {}
    for name, layout in stored.items():
        whole, _, index = name.rpartition(".")
        candidate = candidates.get(whole)
        if layout.rows is None or not index.isdecimal() or candidate is None or candidate.kind.is_quantised:
            continue
        if layout == replace(candidate.layout, rows=layout.rows, out_features=layout.rows.count) and (
            layout.rows.total == candidate.layout.out_features
        ):
            parts.setdefault(whole, {})[name] = replace(candidate, layout=layout, whole=whole)
    found: dict[str, Candidate] = {}
    for name, candidate in candidates.items():
        own = parts.get(name, {name: candidate})
        found |= {part: own[part] for part in sorted(own, key=lambda part: (len(part), part))}
    return found


def _parts(given: Any) -> tuple[list[int], int]:
    """Return the relative sizes and the number of repeats of ``3``, ``[4, 1, 1]`` or ``{parts: 3, repeat: 12}``."""
    repeat = given.get("repeat", 1) if isinstance(given, Mapping) else 1
    parts = given.get("parts") if isinstance(given, Mapping) else given
    return ([1] * parts if isinstance(parts, int) else list(parts or ())), repeat


def _ranks(spec: AdapterSpec, shapes: dict[str, tuple[int, int]]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the rank of each layer, and the layers that are too small for the requested rank."""
    asked: Rank = "full" if spec.preset.core is None else spec.resolved_rank
    if isinstance(asked, str):
        return {name: resolve_rank(asked, shape, name) for name, shape in shapes.items()}, ()
    clipped = tuple(name for name, shape in shapes.items() if asked > min(shape))
    if spec.rank is not None and len(clipped) == len(shapes) > 0:
        largest = max(shapes, key=lambda name: min(shapes[name]))
        resolve_rank(asked, shapes[largest], largest)
    return {name: min(asked, *shape) for name, shape in shapes.items()}, clipped
