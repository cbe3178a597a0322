# SPDX-License-Identifier: Apache-2.0
"""A table of named things that a decorator fills, and whose keyword-only parameters are its recipe options.

The whole extension mechanism: ``@CORES.register("name")`` above a class or ``@PAIRINGS.register("name")`` above a
function adds it to the recipe's schema, to error messages and to the law tests. Imports nothing heavy.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from types import NoneType, UnionType
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin

from mirrortune.errors import ConfigError, did_you_mean, unknown_name

T = TypeVar("T", bound=Callable[..., Any])


class Registry(Generic[T]):
    """Named callables of one kind.

    Args:
        kind: the word for one of them in messages, such as ``"pairing"``.
        package: the package that registers them, imported when the first one is asked for: one module each, named like
            the item, so that all names are known before. None where users of the registry import what registers.
    """

    def __init__(self, kind: str, package: str | None = None) -> None:
        self.kind = kind
        self.package = package
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds its target under ``name``; a second use of a name is a programming error."""
        if name in self._items:
            raise ValueError(f"{self.kind} '{name}' is registered already")

        def add(item: T) -> T:
            self._items[name] = item
            return item

        return add

    def get(self, name: str, where: str) -> T:
        """The item called ``name``; raises ConfigError at ``where`` with the nearest name otherwise."""
        if self.package:
            importlib.import_module(self.package)
        if name not in self._items:
            raise unknown_name(where, self.kind, name, self._items)
        return self._items[name]

    def names(self) -> list[str]:
        """All names, sorted; imports nothing."""
        spec = importlib.util.find_spec(self.package) if self.package else None
        modules = pkgutil.iter_modules(spec.submodule_search_locations) if spec else ()
        return sorted({*self._items, *(m.name.replace("_", "-") for m in modules if not m.name.startswith("_"))})

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def options(self, name: str) -> dict[str, inspect.Parameter]:
        """The keyword-only parameters of an item: these are its recipe options."""
        parameters = inspect.signature(self.get(name, self.kind), eval_str=True).parameters.values()
        return {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}

    def check_options(self, name: str, given: dict[str, Any], where: str) -> None:
        """Refuse options that the item does not have, naming the nearest that it has, and values of another type."""
        hints = {key: parameter.annotation for key, parameter in self.options(name).items()}
        errors = option_errors(given, hints, owner=f"{self.kind} '{name}'", where=where)
        if errors:
            raise ConfigError.several(errors)


def option_errors(given: Mapping[str, Any], hints: Mapping[str, Any], *, owner: str, where: str) -> list[ConfigError]:
    """What is wrong with the options ``given`` to ``owner``, which has those of ``hints`` (name -> type)."""
    errors = []
    for key, value in given.items():
        if key not in hints:
            problem = f"{owner} has no option '{key}'.{did_you_mean(key, hints)}"
            allowed = ", ".join(sorted(hints)) or "no options"
        elif not _fits(value, hints[key]):
            problem, allowed = f"got {value!r}", _describe(hints[key])
        else:
            continue
        errors.append(ConfigError(f"{where}.{key}", problem, allowed=allowed))
    return errors


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null",
          list: "a list", dict: "a section of settings"}  # fmt: skip


def _fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` is of the type ``hint``; a hint that is neither plain, a union nor a Literal takes anything."""
    if hint is NoneType or hint in (list, dict):
        return isinstance(value, hint)
    if get_origin(hint) in (list, dict):
        return isinstance(value, get_origin(hint))
    if get_origin(hint) is tuple:  # of one kind of thing, as JSON and YAML have it
        return isinstance(value, (list, tuple)) and all(_fits(v, get_args(hint)[0]) for v in value)
    if get_origin(hint) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, choice) for choice in get_args(hint))
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return hint not in _WORDS or type(value) is hint  # True is no whole number here


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_describe, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"a list of {_describe(get_args(hint)[0])}"
    return _WORDS.get(get_origin(hint) or hint, str(hint))
