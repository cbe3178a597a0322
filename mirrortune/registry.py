# SPDX-License-Identifier: Apache-2.0
"""Register callables by name; their keyword-only parameters become options of the recipe.

This is the extension mechanism: decorating a class with ``@CORES.register("name")`` or a function with
``@PAIRINGS.register("name")`` adds it to the schema of the recipe, to error messages and to the law tests. Imports
nothing heavy.
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

from mirrortune.config.foreign_names import advice_on, key_of
from mirrortune.config.schema import AdapterSection
from mirrortune.errors import ConfigError, did_you_mean, unknown_name

T = TypeVar("T", bound=Callable[..., Any])


def task_kinds() -> list[str]:
    """Return the names of the kinds of task, which are the modules of ``tasks/kinds``, without importing them."""
    return _module_names("mirrortune.tasks.kinds")


def _module_names(package: str) -> list[str]:
    """Return the sorted names of a package's public modules, with hyphens as in recipes, without importing them."""
    spec = importlib.util.find_spec(package)
    modules = pkgutil.iter_modules(spec.submodule_search_locations) if spec else ()
    return sorted(m.name.replace("_", "-") for m in modules if not m.name.startswith("_"))


class Registry(Generic[T]):
    """A registry of callables of one kind.

    Args:
        kind: word for an item in messages, such as ``"pairing"``.
        package: package whose import registers the items, done at the first :meth:`get`. It has one module per item
            with the name of the item, so that names are known without importing. None if callers import the items.
    """

    def __init__(self, kind: str, package: str | None = None) -> None:
        self.kind = kind
        self.package = package
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers its target under ``name``, which must not be registered yet."""
        if name in self._items:
            raise ValueError(f"{self.kind} '{name}' is registered already")

        def add(item: T) -> T:
            self._items[name] = item
            return item

        return add

    def get(self, name: str, where: str) -> T:
        """Return the item called ``name``; raise ConfigError at ``where`` with the nearest name if there is none."""
        if self.package:
            importlib.import_module(self.package)
        if name not in self._items:
            raise unknown_name(where, self.kind, name, self._items)
        return self._items[name]

    def names(self) -> list[str]:
        """Return all names, sorted, without importing the items."""
        return sorted({*self._items, *(_module_names(self.package) if self.package else ())})

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def options(self, name: str) -> dict[str, inspect.Parameter]:
        """Return the keyword-only parameters of an item, which are its options in a recipe."""
        parameters = inspect.signature(self.get(name, self.kind), eval_str=True).parameters.values()
        return {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}

    def check_options(self, name: str, given: dict[str, Any], where: str) -> None:
        """Check the names and types of options of an item.

        Raises:
            ConfigError: options are unknown (the nearest name is suggested) or values have another type; all problems
                are reported together.
        """
        hints = {key: parameter.annotation for key, parameter in self.options(name).items()}
        errors = option_errors(given, hints, owner=f"{self.kind} '{name}'", where=where)
        if errors:
            raise ConfigError.several(errors)


def option_errors(given: Mapping[str, Any], hints: Mapping[str, Any], *, owner: str, where: str) -> list[ConfigError]:
    """Return errors for the options ``given`` to ``owner``, whose options and types are ``hints``."""
    errors = []
    section, is_nested, _ = where.partition(".options")
    settings = [name for name in AdapterSection.model_fields if name not in hints] if is_nested else []
    for key, value in given.items():
        if key not in hints and (known := _known_elsewhere(key, where)):
            errors.append(ConfigError(f"{where}.{key}", f"{owner} has no option '{key}'", fix=known))
            continue
        if key not in hints:
            near = did_you_mean(key, hints)
            elsewhere = did_you_mean(key, settings, cutoff=0.8)  # most of these are far from an option
            for name in settings:
                elsewhere = elsewhere.replace(f"'{name}'", f"{section}.{name}")
            near = elsewhere or near
            problem = f"{owner} has no option '{key}'.{near}"
            allowed = ", ".join(sorted(hints)) or "no options"
        elif not _fits(value, hints[key]):
            problem, allowed = f"got {value!r}", _describe(hints[key])
        else:
            continue
        errors.append(ConfigError(f"{where}.{key}", problem, allowed=allowed))
    return errors


def _known_elsewhere(option: str, where: str) -> str | None:
    """Return what to do about an option that is a setting, here or in another tool, of the section of ``where``."""
    section, key = where.split(".", maxsplit=1)[0], key_of(option)
    is_other = key is not None and key.startswith(f"{section}.") and key != f"{where}.{option}"
    return advice_on(option) or (f"It is {key} here" if is_other else None)


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null",
          list: "a list", dict: "a section of settings"}  # fmt: skip


def _fits(value: Any, hint: Any) -> bool:
    """Return whether ``value`` is of the type ``hint``; hints other than plain types, unions and Literal fit all."""
    if hint is NoneType or hint in (list, dict):
        return isinstance(value, hint)
    if get_origin(hint) in (list, dict):
        return isinstance(value, get_origin(hint))
    if get_origin(hint) is tuple:  # a homogeneous tuple, which is a list in JSON and YAML
        return isinstance(value, (list, tuple)) and all(_fits(v, get_args(hint)[0]) for v in value)
    if get_origin(hint) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, choice) for choice in get_args(hint))
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return hint not in _WORDS or type(value) is hint  # exact type, because True is an int


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_describe, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"a list of {_describe(get_args(hint)[0])}"
    return _WORDS.get(get_origin(hint) or hint, str(hint))
