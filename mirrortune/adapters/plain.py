# SPDX-License-Identifier: Apache-2.0
"""Parameters of the base model that are trained directly, in addition to the adapter: those chosen by a group name or a
pattern, or only the rows of new tokens; and the running statistics of normalisation layers, which follow them.

Such a parameter is identified by its name in the base model, and rows of it by ``NAME[first:stop]``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from typing_extensions import override

from mirrortune.adapters.kinds import is_plain
from mirrortune.adapters.layer_patterns import fits
from mirrortune.errors import ConfigError, did_you_mean
from mirrortune.system.devices import autocast, wrap_calls

WHERE = "adapter.also_train"
ADD_TOKENS = "data.add_tokens"


def _norms(model: nn.Module) -> set[int]:
    return {id(p) for m in model.modules() if "norm" in type(m).__name__.lower() for p in own(m) if p.ndim == 1}


def _embeddings(model: nn.Module) -> set[int]:
    return {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in own(m)}


def _biases(model: nn.Module) -> set[int]:
    return {id(p) for name, p in model.named_parameters() if name.endswith("bias")}


_WORDS: Mapping[str, Callable[[nn.Module], set[int]]] = {
    "biases": _biases, "embeddings": _embeddings, "norms": _norms,
}  # fmt: skip
"""Names of groups of parameters; every other entry is a pattern for parameter names."""


def own(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a module without those of its submodules."""
    return list(module.parameters(recurse=False))


def choose_parameters(model: nn.Module, wanted: Sequence[str], head: Collection[str]) -> dict[str, str]:
    """Choose parameters of a model to train as they are.

    Args:
        model: not adapted.
        wanted: ``biases``, ``embeddings`` (of every table), ``norms``, or regular expressions for the name of a
            parameter, or of a module that holds it, from any dot on. Not from a file: they are matched as they are.
        head: names of the task head's parameters, which are trained anyway.

    Returns:
        Names, in the model's order, with the entry that chose each; parameters that are tied have one name.

    Raises:
        ConfigError: an entry chooses nothing, the head alone, or a quantised parameter.
    """
    if not wanted:
        return {}
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    places = {place for names in aliases.values() for name in names for place in _with_owners(name)}
    found: dict[str, str] = {}
    for entry in wanted:
        chosen = _WORDS[entry](model) if entry in _WORDS else _matched(entry, aliases, places)
        names = {name: p for name, p in model.named_parameters() if id(p) in chosen}
        if not names:
            raise _nothing(entry, places)
        if names.keys() <= set(head):
            problem = f"'{entry}' is in the task head ({min(names)}), which is trained anyway"
            raise ConfigError(WHERE, problem, fix="Remove it")
        if packed := next((name for name, p in names.items() if not is_plain(p)), None):
            raise ConfigError(WHERE, f"'{entry}' chooses {packed}, which is quantised", fix="Leave it out")
        found |= dict.fromkeys((name for name in names if name not in found and name not in head), entry)
    return {name: found[name] for name, _ in model.named_parameters() if name in found}


def _matched(entry: str, aliases: Mapping[int, list[str]], places: Iterable[str]) -> set[int]:
    """Return the ids of the parameters that a pattern names, or of which it names a module."""
    try:
        re.compile(entry)
        fitting = {place for place in places if fits(rf"(?:.*\.)?(?:{entry})", place, WHERE)}
    except re.error as error:
        allowed = f"{', '.join(_WORDS)}, or a regex"
        raise ConfigError(WHERE, f"not a regular expression: {entry!r} ({error})", allowed=allowed) from error
    return {key for key, names in aliases.items() if not fitting.isdisjoint(p for n in names for p in _with_owners(n))}


def _with_owners(name: str) -> list[str]:
    """Return the name of a parameter and the names of the modules that contain it."""
    parts = name.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


def _nothing(entry: str, places: Iterable[str]) -> ConfigError:
    endings = {place.rpartition(".")[2] for place in places}
    said = [name for name in endings if not name.isdecimal() and name not in ("weight", "bias")]
    return ConfigError(
        WHERE, f"'{entry}' chooses no parameter of this model.{did_you_mean(entry, [*_WORDS, *sorted(said)])}",
        allowed=f"{', '.join(_WORDS)}, or a regex for names of parameters or of modules, such as pooler",
    )  # fmt: skip


def chosen_by_method(
    parameters: Mapping[str, nn.Parameter], kind: Literal["none", "bias", "all"], head: Collection[str]
) -> tuple[str, ...]:
    """Return the names of the parameters that a method trains as they are: none, every bias, or all but the head.

    Raises:
        ConfigError: all are to be trained, and one is quantised.
    """
    ending = {"none": None, "bias": "bias", "all": ""}[kind]
    if kind == "all" and (quantised := next((n for n, p in parameters.items() if not is_plain(p)), None)):
        raise ConfigError("adapter.method", f"'full' trains every weight, and {quantised} is quantised",
                          fix="Load the model in full precision, or choose an adapter")  # fmt: skip
    return tuple(n for n in parameters if ending is not None and n not in head and n.endswith(ending))


@dataclass(frozen=True, slots=True)
class RowRange:
    """Rows of a matrix of the base model of which only these rows are trained.

    Attributes:
        weight: name of the matrix; the first name of a tied matrix.
        first, stop: the rows are ``weight[first:stop]``.
    """

    weight: str
    first: int
    stop: int

    @classmethod
    def parse(cls, name: str) -> RowRange | None:
        """Parse ``NAME[first:stop]``; return None for the name of a parameter."""
        found = _ROWS.fullmatch(name)
        return None if found is None else cls(found[1], int(found[2]), int(found[3]))

    def __str__(self) -> str:
        return f"{self.weight}[{self.first}:{self.stop}]"

    def fit(self, weight: Tensor) -> bool:
        """Return whether a matrix has these rows."""
        return weight.ndim == 2 and 0 <= self.first < self.stop <= weight.shape[0]

    def put(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Return ``weight`` with ``rows`` (stop - first, D) inserted, in the dtype of ``weight``."""
        return torch.cat([weight[: self.first], rows.to(weight), weight[self.stop :]])


_ROWS = re.compile(r"([^\[\]]+)\[(\d{1,9}):(\d{1,9})\]")


def fit(name: str, parameters: Mapping[str, Tensor]) -> bool:
    """Return whether ``parameters`` has a parameter of a name, or the rows that the name stands for."""
    rows = RowRange.parse(name)
    return name in parameters if rows is None else rows.weight in parameters and rows.fit(parameters[rows.weight])


class NewRows(nn.Module):
    """Puts trained rows into a frozen matrix wherever it is read, as a parametrisation of ``torch.nn.utils``.

    Args:
        weight: the matrix (V, D), whose own rows are the first values.
        where: the rows.
    """

    def __init__(self, weight: Tensor, where: RowRange) -> None:
        super().__init__()
        self.where = where
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.rows = nn.Parameter(weight.detach()[where.first : where.stop].to(dtype).clone())
        self._made: tuple[object, Tensor] | None = None

    @override
    def forward(self, weight: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._made = None
            return self.where.put(self.rows, weight)
        # Text is generated token by token, and the matrix is large.
        state = (self.rows._version, self.rows.device, weight.device, weight.dtype)  # noqa: SLF001
        if self._made is None or self._made[0] != state:
            self._made = state, self.where.put(self.rows, weight)
        return self._made[1]

    @override
    def extra_repr(self) -> str:
        return f"rows={self.where.first}:{self.where.stop}"


def rows_of_embeddings(
    model: nn.Module, span: tuple[int, int] | None, whole: Collection[str]
) -> tuple[RowRange, ...]:  # fmt: skip
    """Return the rows of new tokens in the input embeddings of a model, and in its output embeddings.

    Args:
        model: not adapted, with room for the tokens.
        span: the first and last id of the tokens, and one more; None without new tokens.
        whole: names of the parameters that are trained as a whole, of which no rows are returned.

    Raises:
        ConfigError: the model has no input embeddings, or quantised ones.
    """
    if span is None:
        return ()
    parameters = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, RowRange] = {}
    for table in embedding_tables(model):
        name = parameters[id(table)]
        if not is_plain(table):
            raise ConfigError(ADD_TOKENS, f"{name} is quantised", fix="Load the model in full precision")
        if name not in whole:
            found[name] = RowRange(name, *span)
    return tuple(found.values())


def embedding_tables(model: nn.Module) -> list[nn.Parameter]:
    """Return the matrices of the input embeddings and, if there are any of as many rows, of the output embeddings.

    Raises:
        ConfigError: the model has no input embeddings.
    """
    getters = [getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings")]
    modules = [cast(object, getter()) if callable(getter) else None for getter in getters]
    weights = [getattr(module, "weight", None) for module in modules]
    tables = [weight for weight in weights if isinstance(weight, nn.Parameter) and weight.ndim == 2]
    if not isinstance(modules[0], nn.Embedding) or not tables:
        problem = f"{type(model).__name__} has no embeddings of tokens"
        raise ConfigError(ADD_TOKENS, problem, fix="Remove it")
    return [table for table in tables if table.shape[0] == tables[0].shape[0]]


def attach_rows(model: nn.Module, names: Iterable[str]) -> None:
    """Make the rows among ``names`` parameters of their own, in place, for every module that holds their matrix."""
    for where in filter(None, map(RowRange.parse, names)):
        weight = model.get_parameter(where.weight)
        new = NewRows(weight, where)
        for module in modules_of(model, [where.weight]).values():
            if not parametrize.is_parametrized(module):
                held = next(name for name, p in module.named_parameters(recurse=False) if p is weight)
                parametrize.register_parametrization(module, held, new, unsafe=True)


def call_in_autocast(model: nn.Module) -> None:
    """Call a 16-bit model under autocast from now on, where its caller does not: some of its own layers are in float32,
    and the next one takes 16 bits.
    """
    wrap_calls(model, _in_autocast)


def _in_autocast(model: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with autocast(model):
        return call(*args, **kwargs)


def keep_biases(model: nn.Module, names: Collection[str]) -> None:
    """Call the quantised layers whose bias is among the named parameters without it from now on, and add it afterwards:
    bitsandbytes converts a bias to the dtype that it computes in, in place, which rounds a trained one to 16 bits.
    """
    for module in modules_of(model, names).values():
        if getattr(module, "bias", None) is not None and not all(map(is_plain, own(module))):
            wrap_calls(module, _with_bias_aside)


def _with_bias_aside(module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    bias = module.get_parameter("bias")
    module.register_parameter("bias", None)
    try:
        output: Tensor = call(*args, **kwargs)
    finally:
        module.register_parameter("bias", bias)
    return (output + bias).to(output.dtype)


def held_in(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a model, adapted or not, by the names that they have without an adapter."""
    found = dict(model.named_parameters())
    rows = {str(m.where): m.rows for m in model.modules() if isinstance(m, NewRows)}
    return {name.replace(".base_layer.", "."): parameter for name, parameter in found.items()} | found | rows


def modules_of(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Return the modules that hold any of the named parameters themselves, tied ones under each of their names."""
    parameters = held_in(model)
    wanted = {id(parameters[name]) for name in names}
    return {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if any(id(parameter) in wanted for parameter in own(module))
    }


def own_statistics(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that a module itself updates in training mode, by their names in it: the running statistics of
    a batch or instance normalisation, the singular vectors of a spectral normalisation.
    """
    own = module._buffers  # noqa: SLF001  (of this module alone)
    is_normalised = isinstance(module, _SpectralNorm) or any(
        isinstance(hook, SpectralNorm)
        for hook in module._forward_pre_hooks.values()  # noqa: SLF001
    )
    if own.get("running_mean") is None and own.get("running_var") is None and not is_normalised:
        return {}
    left_out = module._non_persistent_buffers_set  # noqa: SLF001
    return {name: tensor for name, tensor in own.items() if tensor is not None and name not in left_out}


def trained_statistics(model: nn.Module, trained: Collection[str]) -> tuple[str, ...]:
    """Return the names of the running statistics that belong to trained parameters, in the model's order.

    A layer's statistics are trained if any of its own parameters is. Those of a layer without parameters are trained if
    all parameters of the nearest module around it are.

    Args:
        model: not adapted.
        trained: names of the parameters that are trained as they are.
    """
    return tuple(
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if (own := own_statistics(module)) and _is_trained(model, path, set(trained))
        for name in own
    )


def _is_trained(model: nn.Module, path: str, trained: set[str]) -> bool:
    start = f"{path}." if path else ""
    if names := [start + name for name, _ in model.get_submodule(path).named_parameters(recurse=False)]:
        return not trained.isdisjoint(names)
    while path:
        path = path.rpartition(".")[0]
        start = f"{path}." if path else ""
        if names := [start + name for name, _ in model.get_submodule(path).named_parameters()]:
            return trained.issuperset(names)
    return False


def hold_statistics(model: nn.Module, trained: Collection[str]) -> None:
    """Keep every layer with running statistics in evaluation mode, except those whose statistics are ``trained``; these
    are in evaluation mode for a batch with one value per channel, which has no variance.

    A layer is switched whenever it is called, because any training loop calls ``model.train()``.
    """
    held = []
    for path, module in model.named_modules():
        own = own_statistics(module)
        hooks = module._forward_pre_hooks  # noqa: SLF001
        for key in [k for k, hook in hooks.items() if hook in _HOOKS or isinstance(hook, _Replacements)]:
            del hooks[key]  # of an adapter that failed to attach
        if own and any((f"{path}.{name}" if path else name) in trained for name in own):
            if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
                module.register_forward_pre_hook(_evaluate_alone)
                module.register_forward_hook(_train_again, always_call=True)
        elif own:
            module.register_forward_pre_hook(_evaluate, prepend=True)
            around, _, name = path.rpartition(".")
            held += [(model.get_submodule(around), name, module)] if path else []
    if held:
        model.register_forward_pre_hook(_Replacements(held), prepend=True)


def _evaluate(module: nn.Module, _: object) -> None:
    if module.training:
        module.training = False


_ALONE = "_mirrortune_alone"  # attribute of a layer that is called with one value per channel


def _evaluate_alone(module: nn.Module, given: tuple[Tensor, ...]) -> None:
    x = given[0] if given else None
    if module.training and isinstance(x, Tensor) and x.ndim > 1 and x.numel() == x.shape[1]:
        module.training = False
        vars(module)[_ALONE] = True


def _train_again(module: nn.Module, *_: object) -> None:
    if vars(module).pop(_ALONE, False):
        module.training = True


_HOOKS = (_evaluate, _evaluate_alone)


class _Replacements:
    """Holds the statistics of layers that take the place of held ones, such as those that
    ``nn.SyncBatchNorm.convert_sync_batchnorm`` makes; a forward pre-hook of the model.

    Args:
        held: (module around a layer, name of the layer in it, the layer).
    """

    def __init__(self, held: list[tuple[nn.Module, str, nn.Module]]) -> None:
        self._held = held

    def __call__(self, model: nn.Module, _: object) -> None:
        if torch.compiler.is_compiling():
            return
        for place, (around, name, layer) in enumerate(self._held):
            now = around._modules.get(name)  # noqa: SLF001
            if now is not layer and now is not None:
                now.register_forward_pre_hook(_evaluate, prepend=True)
                self._held[place] = around, name, now
