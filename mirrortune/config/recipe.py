# SPDX-License-Identifier: Apache-2.0
"""Resolve the recipe of a run from its layers, with the origin of each value.

Layers are merged key by key, in descending priority: flags, ``key=value`` arguments, the recipe, the shipped recipe of
the task, defaults. The result is checked once; all errors are reported together, each with its place. Imports no torch.
"""

from __future__ import annotations

import copy
import json
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mirrortune.config import strict_yaml
from mirrortune.config.data_paths import absolute_paths, anchored_model, anchored_paths, bare_names, walks_far
from mirrortune.config.foreign_names import advice_on, key_of
from mirrortune.config.schema import Recipe, SourceSection
from mirrortune.errors import PREFERENCES, ConfigError, cut_after, did_you_mean, no_preferences, unknown_name
from mirrortune.system.paths import local_path, shipped_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Settings from one origin.

    Attributes:
        values: the settings that were given, nested like a recipe.
        origin: description of the origin: file, ``key=value`` or flag.
        lines: line number of each key, for files.
        flags: flag that set each key, for the command line.
        file: recipe file that was read, or None.
        withheld: data paths in the recipe of a target that are not followed: patterns that search many folders.
    """

    values: dict[str, Any]
    origin: str
    lines: dict[tuple[str, ...], int] = field(default_factory=dict)
    flags: dict[tuple[str, ...], str] = field(default_factory=dict)
    file: Path | None = None
    withheld: dict[str, str] = field(default_factory=dict)

    @property
    def is_typed(self) -> bool:
        """Whether the settings were given on the command line, not in a file."""
        return bool(self.flags)

    def place(self, path: tuple[str, ...]) -> str:
        """Return where ``path`` was set, for messages: ``recipe.yaml:4: train.lr`` or ``--lr``."""
        key = ".".join(part if part.isprintable() else repr(part) for part in path)
        for known, flag in self.flags.items():
            if known[: len(path)] == path:
                return flag
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return f"{self.origin}:{self.lines[path[:end]]}: {key}"
        return f"{self.origin}: {key}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A recipe with the origin of every value that is not a default.

    Attributes:
        recipe: validated recipe.
        origins: origin of each value by dotted key.
        files: recipe files that were read.
        pairs: file of pairs that was read, or None.
    """

    recipe: Recipe
    origins: dict[str, str]
    files: tuple[Path, ...] = ()
    pairs: Path | None = None


def shipped_recipes() -> list[str]:
    """Return the names of the shipped recipes, which are their paths without suffix."""
    root = shipped_folder()
    return sorted(p.relative_to(root).with_suffix("").as_posix() for p in root.rglob("*.yaml"))


def read_recipe(name: str, where: str = "RECIPE") -> Layer:
    """Read a shipped recipe (``glue/sst2``) or a YAML file as a layer.

    Raises:
        ConfigError: there is no such recipe or file (the error suggests the nearest name), or its YAML is invalid.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml") and not path.is_file():
        if name not in shipped_recipes():
            raise unknown_name(where, "recipe", name, shipped_recipes())
        path = shipped_folder() / f"{name}.yaml"
    try:
        text = strict_yaml.text_of(path, where, "a recipe")
    except OSError as error:
        raise ConfigError(where, f"cannot read {path} ({error})", fix="Check the path") from error
    data, lines = _mapping(text, str(path))
    _anchor_paths(data, path.parent)
    return Layer(values=data, origin=str(path), lines=lines, file=path)


def _mapping(text: str, source: str) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    data, lines = strict_yaml.load(text, source)
    if not isinstance(data, dict):
        wrong = f"a recipe is a mapping of sections, got {strict_yaml.value_kind(data)}"
        fix = "Write sections such as model, data and train into it; `mirrortune recipes cat quickstart` shows some"
        raise ConfigError(source, "the recipe is empty" if data is None else wrong, fix=fix)
    return data, lines


_MOST_PROBLEMS = 100  # problems reported for a recipe; an untrusted file may have a million
# pydantic's names of types -> words of YAML
_PLAIN_NAMES = {
    "array": "a list, such as [a, b]", "an object": "a section of settings", "string": "text in quotes",
    "boolean": "true or false",
}  # fmt: skip
_SHOWN = 200  # characters shown of an invalid value
_FORMS: dict[tuple[str, ...], str] = {
    ("adapter", "layers"): 'a list of numbers of blocks, from 0 on, and of "last N": [0, 1, last 4]',
    ("data", "path"): "a path or Hub id, or a list of these and of {path: PATH, weight: 2}",
    ("train", "betas"): "a list of two numbers from 0 to below 1, such as [0.9, 0.999]",
    ("train", "class_weights"): "balanced, or {NAME: WEIGHT} with weights above 0, at most 1e6",
}
# Settings that are accepted from the recipe inside a target: which rows are scored, and how. Never the model, its code,
# an output path, or anything else whose effect goes beyond the score.
_OF_TARGET = (
    "data", "task", "train.seed", "train.precision", "eval.batch_size", "eval.prediction_labels",
    "eval.prediction_bounds", "eval.prediction_files",
)  # fmt: skip
_TRUST = ("model", "trust_remote_code")
_DATA_PATHS = ("path", "validation_path")


def read_target_recipe(path: Path) -> tuple[Layer, list[str]]:
    """Read the recipe inside a run, an adapter or a merged folder: return the layer of those settings that are safe if
    untrusted, and the dotted keys of the others.
    """
    whole = read_recipe(str(path))
    kept: dict[str, Any] = {}
    ignored = []
    for name, section in whole.values.items():
        settings = {f"{name}.{key}": value for key, value in section.items()} if isinstance(section, dict) else {}
        if name in _OF_TARGET:
            kept[name] = section
            continue
        own = {key.partition(".")[2]: value for key, value in settings.items() if key in _OF_TARGET}
        if own:
            kept[name] = own
        ignored += [key for key in settings or [name] if key not in _OF_TARGET]
    far = {key: str(path) for key in _DATA_PATHS if walks_far(path := _setting(kept, "data", key))}
    if far:
        kept["data"] = {key: value for key, value in kept["data"].items() if key not in far}
        ignored += [f"data.{key}" for key in far]
    return Layer(values=kept, origin=whole.origin, lines=whole.lines, withheld=far), ignored


def read_saved_recipe(path: Path) -> Recipe:
    """Read the recipe of an earlier run in order to show or compare it, without permitting code or reading other files.

    Raises:
        ConfigError: see :func:`resolve`; also if pairs are given as the name of a file.
    """
    return _saved_recipe(read_recipe(str(path)))


def check_saved_recipe(text: str, source: str) -> dict[str, Any]:
    """Check the recipe of an earlier run and return its values as written, without defaults.

    Raises:
        ConfigError: see :func:`read_saved_recipe`.
    """
    data, lines = _mapping(text, source)
    _saved_recipe(Layer(values=copy.deepcopy(data), origin=source, lines=lines))
    return data


def _saved_recipe(layer: Layer) -> Recipe:
    section, key = _TRUST
    if isinstance(layer.values.get(section), dict):
        layer.values[section].pop(key, None)
    if str(_setting(layer.values, "adapter", "pairing")).endswith(".json"):
        problem = "the recipe of a run lists the pairs, it does not name a file of them"
        raise ConfigError(layer.place(("adapter", "pairing")), problem, fix="Restore the file")
    return resolve([layer]).recipe


def override_layer(assignments: list[str], errors: list[ConfigError] | None = None) -> Layer:
    """Parse ``key.sub=value`` arguments of the command line into a layer; values are parsed as YAML.

    Args:
        assignments: arguments.
        errors: list to which errors are appended; None to raise them.

    Raises:
        ConfigError: a value is empty or invalid YAML, a key is set twice, or a key is both a value and a section; all
            errors are reported together.
    """
    values: dict[str, Any] = {}
    flags: dict[tuple[str, ...], str] = {}
    found = [] if errors is None else errors
    for word in assignments:
        key, _, text = word.partition("=")
        path = tuple(key.replace("-", "_").split("."))
        try:
            if path in flags:
                raise ConfigError(f"'{word}'", f"{flags[path]} sets the same", fix="Keep one of them")
            _set(values, path, strict_yaml.parse_scalar(text, f"'{word}'"), f"'{word}'")
        except ConfigError as error:
            found.append(error)
        flags[path] = f"'{word}'"
    if found and errors is None:
        raise ConfigError.several(found)
    return Layer(values=values, origin="command line", flags=flags)


def flag_layer(given: dict[str, tuple[str, Any]]) -> Layer:
    """Make the layer of the flags that were given, passed as dotted key -> (flag, value)."""
    values: dict[str, Any] = {}
    for key, (flag, value) in given.items():
        _set(values, tuple(key.split(".")), value, flag)
    return Layer(values=values, origin="flags", flags={tuple(k.split(".")): f for k, (f, _) in given.items()})


def task_layer(name: str, kinds: list[str], *, has_model: bool = True) -> Layer:
    """Make the layer of ``--task NAME``: a kind of task, or a shipped recipe, with its model or without it."""
    if name in kinds:
        return Layer(values={"task": {"kind": name}}, origin="--task", flags={("task", "kind"): "--task"})
    if name.lower() in PREFERENCES:
        raise no_preferences("--task", name, allowed=", ".join(kinds))
    if name not in shipped_recipes():
        raise unknown_name("--task", "task", name, [*kinds, *shipped_recipes()])
    layer = read_recipe(name, "--task")
    if not has_model:
        layer.values.get("model", {}).pop("name", None)
    return layer


def resolve(layers: list[Layer], more: Callable[[Recipe], list[ConfigError]] | None = None) -> Resolved:
    """Merge layers, later over earlier ones, and check the result.

    Args:
        layers: layers in order of increasing priority.
        more: function that finds further problems; called only if there are problems, with a recipe in which defaults
            replace the invalid values.

    Raises:
        ConfigError: settings are unknown or invalid; all problems are reported together.
    """
    merged: dict[str, Any] = {}
    owners: dict[tuple[str, ...], Layer] = {}
    for layer in layers:
        _leave_data(merged, owners, layer)
        # In YAML, a section whose settings are all commented out is null.
        _merge(merged, {k: v for k, v in layer.values.items() if v is not None}, (), layer, owners)
    found, pairs = _unpermitted_code(merged, owners), None
    try:
        pairs = _read_pairs(merged, owners)
    except ConfigError as error:
        found.append(error)
    try:
        recipe = Recipe.model_validate_json(json.dumps(merged))
    except ValidationError as error:
        problems = error.errors()
        found += _one_each([_explain(problem, owners, merged) for problem in problems[:_MOST_PROBLEMS]])
        if (more_of_them := len(problems) - _MOST_PROBLEMS) > 0:
            found.append(ConfigError("recipe", f"{more_of_them:,} more problems", fix="Correct these first"))
    if found:
        raise ConfigError.several(found + (more(_valid_part(merged)) if more else []))
    origins = {".".join(path): layer.place(path) for path, layer in owners.items()}
    files = tuple(layer.file for layer in layers if layer.file is not None)
    return Resolved(recipe=recipe, origins=origins, files=files, pairs=pairs)


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Return every setting by its dotted key."""
    sections = recipe.model_dump(mode="json")
    flat = {
        f"{name}.{key}": v
        for name, section in sections.items()
        if isinstance(section, dict)
        for key, v in section.items()
    }
    return flat | {name: value for name, value in sections.items() if not isinstance(value, dict)}


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """Return the recipe with absolute local paths, so that it works from any folder."""
    paths = {key: absolute_paths(getattr(recipe.data, key)) for key in _DATA_PATHS}
    update = {
        "model": recipe.model.model_copy(update={"name": absolute_paths(recipe.model.name)}),
        "data": recipe.data.model_copy(update=paths),
    }
    return recipe.model_copy(update=update)


def _unpermitted_code(merged: dict[str, Any], owners: dict[tuple[str, ...], Layer]) -> list[ConfigError]:
    """Return the error for a file that sets ``trust_remote_code``, which only the command line may set."""
    owner, (section, key) = owners.get(_TRUST), _TRUST
    if owner is None or owner.is_typed or merged[section][key] is not True:
        return []
    problem = f"the recipe asks to run Python code from the repository of {merged[section].get('name') or 'the model'}"
    return [
        ConfigError(
            owner.place(_TRUST), problem, allowed="this permission on the command line only",
            fix="Read that code; then pass --trust-remote-code (it runs with your permissions), or remove the line",
        )
    ]  # fmt: skip


def _merge(
    target: dict[str, Any], values: dict[str, Any], path: tuple[str, ...], layer: Layer,
    owners: dict[tuple[str, ...], Layer],
) -> None:  # fmt: skip
    for key, value in values.items():
        here = (*path, key)
        if not path and here in owners and isinstance(value, dict) and not isinstance(target[key], dict):
            raise ConfigError(
                owners[here].place(here),
                f"got {target[key]!r}",
                allowed=f"a section, such as {key}: {{{next(iter(value))}: ...}}",
            )
        if isinstance(value, dict) and isinstance(target.get(key, {}), dict):
            if not value:
                owners[here] = layer
            _merge(target.setdefault(key, {}), value, here, layer, owners)
        else:
            target[key] = value
            owners[here] = layer


def _leave_data(merged: dict[str, Any], owners: dict[tuple[str, ...], Layer], layer: Layer) -> None:
    """If ``layer`` names another data set, remove settings from files that describe the previous one.

    These are the configuration and revision on the Hub, and the validation rows in another place.
    """
    before, now = (_setting(values, "data", "path") for values in (merged, layer.values))
    names = [bare_names(value) for value in (before, now)]
    if not all(names):
        return
    before, now = ([name.split(":")[0] for name in own] for own in names)
    is_same = before == now  # the configuration may differ
    kept = {
        "config": names[0] == names[1],
        "revision": is_same,
        "validation_path": is_same,
        "validation_column_names": is_same,
    }
    for key in (key for key, is_kept in kept.items() if not is_kept and key in merged["data"]):
        own = [path for path in owners if path[:2] == ("data", key)]
        if not any(owners[path].flags for path in own):
            del merged["data"][key]
            for path in own:
                del owners[path]


def _set(values: dict[str, Any], path: tuple[str, ...], value: Any, where: str) -> None:
    for key in path[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ConfigError(where, f"'{key}' is set both as a value and as a section")
    if isinstance(values.get(path[-1]), dict) and not isinstance(value, dict):
        raise ConfigError(where, f"'{path[-1]}' is set both as a value and as a section")
    values[path[-1]] = value


def _explain(problem: Any, owners: dict[tuple[str, ...], Layer], merged: dict[str, Any]) -> ConfigError:
    path = _known_path(tuple(str(part) for part in problem["loc"]), merged)
    layer = owners.get(path) or next((o for p, o in owners.items() if p[: len(path)] == path), None)
    if path[:2] in _FORMS:  # a union: pydantic's errors about each member are no help
        return _explain_form(path[:2], problem["loc"], layer, merged[path[0]][path[1]])
    where = layer.place(path) if layer else ".".join(path)
    got = shown_value(problem.get("input"))
    if problem["type"] == "extra_forbidden":
        name, names = path[-1], list(_section_fields(path[:-1]))
        if len(path) < 3 and (fix := advice_on(name) or ((key := key_of(name)) and f"It is {key} here")):
            return ConfigError(where, f"unknown key '{name}'", fix=fix)
        return ConfigError(where, f"unknown key '{name}'.{did_you_mean(name, names)}", allowed=", ".join(names))
    message = problem["msg"].removeprefix("Input should be ").removeprefix("a valid ").removeprefix("Value error, ")
    message = _PLAIN_NAMES.get(message, message)
    near = ""
    if problem["type"] == "literal_error" and isinstance(problem.get("input"), str):
        choices = [c.strip("' ") for c in message.replace(" or ", ", ").split(",")]
        near = did_you_mean(problem["input"], choices)
    return ConfigError(where, f"got {got}.{near}" if near else f"got {got}", allowed=message)


def _explain_form(path: tuple[str, ...], loc: tuple[Any, ...], layer: Layer | None, value: Any) -> ConfigError:
    """Return the error for a value of several types, or for the item of a list that is wrong."""
    item = next((part for part in loc if isinstance(part, int)), None)
    if item is not None and isinstance(value, list) and any(isinstance(part, dict) for part in value):
        path, value = (*path, str(item)), value[item]
    where = layer.place(path) if layer else ".".join(path)
    known = list(SourceSection.model_fields)
    if unknown := [key for key in value if key not in known] if isinstance(value, dict) and item is not None else []:
        problem = f"unknown key '{unknown[0]}'.{did_you_mean(unknown[0], known)}"
        return ConfigError(where, problem, allowed=", ".join(known))
    return ConfigError(where, f"got {shown_value(value)}", allowed=_FORMS[path[:2]])


def shown_value(value: Any) -> str:
    """Format a setting for a message; there may be thousands of pairs."""
    return cut_after("null" if value is None else repr(value), _SHOWN)


def _valid_part(merged: dict[str, Any]) -> Recipe:
    """Return the recipe with defaults in place of invalid values."""
    rest = copy.deepcopy(merged)
    while True:
        try:
            return Recipe.model_validate_json(json.dumps(rest))
        except ValidationError as error:
            paths = {_known_path(tuple(str(part) for part in problem["loc"]), rest) for problem in error.errors()}
        for path in paths:
            section: Any = rest
            for key in path[:-1]:
                section = section.get(key, {})
            section.pop(path[-1], None) if path else rest.clear()


def _one_each(errors: list[ConfigError]) -> list[ConfigError]:
    found: dict[tuple[str, str], list[ConfigError]] = {}  # pydantic reports an error for every member of a union
    for error in errors:
        found.setdefault((error.where, error.problem), []).append(error)
    allowed = {key: " or ".join(dict.fromkeys(one.allowed or "" for one in own)) for key, own in found.items()}
    return [ConfigError(*key, allowed=allowed[key], fix=own[0].fix) for key, own in found.items()]


def _known_path(loc: tuple[str, ...], merged: dict[str, Any]) -> tuple[str, ...]:
    # pydantic appends the union member or the name of the constraint to the location; keep only keys of the recipe.
    path: list[str] = []
    current: Any = merged
    for part in loc:
        if isinstance(current, dict) and part in current:
            path.append(part)
            current = current[part]
        else:
            break
    return tuple(path)


def _section_fields(path: tuple[str, ...]) -> dict[str, Any]:
    model: Any = Recipe
    for part in path:
        annotation = model.model_fields[part].annotation
        if isinstance(annotation, types.UnionType) or not hasattr(annotation, "model_fields"):
            return {}
        model = annotation
    return dict(model.model_fields)


def _anchor_paths(data: dict[str, Any], folder: Path) -> None:
    """Make paths of the model, data and pairs absolute; relative ones refer to the folder of the recipe."""
    if isinstance(name := _setting(data, "model", "name"), str):
        data["model"]["name"] = anchored_model(name, folder)
    for key in _DATA_PATHS:
        if _setting(data, "data", key) is not None:
            data["data"][key] = anchored_paths(data["data"][key], folder)
    pairs = _setting(data, "adapter", "pairing")
    if isinstance(pairs, str) and pairs.endswith(".json") and (folder / pairs).is_file():
        data["adapter"]["pairing"] = str((folder / pairs).resolve())


def _setting(data: dict[str, Any], section: str, key: str) -> Any:
    found = data.get(section)
    return found.get(key) if isinstance(found, dict) else None


def _read_pairs(merged: dict[str, Any], owners: dict[tuple[str, ...], Layer]) -> Path | None:
    """Replace the name of a .json file of pairs by its content, so that the recipe reproduces the run without the file.

    Returns:
        The file, or None.
    """
    given = _setting(merged, "adapter", "pairing")
    if not isinstance(given, str) or not given.endswith(".json"):
        return None
    path = ("adapter", "pairing")
    where = owners[path].place(path)

    def once(items: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in items]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"key '{twice}' appears twice")
        return dict(items)

    try:
        found = json.loads(strict_yaml.text_of(local_path(given), where, "a file of pairs"), object_pairs_hook=once)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(where, f"cannot read {given} ({error})", fix="Check the path and the file") from error
    if not isinstance(found, list | dict):
        problem = f"{given} holds {strict_yaml.value_kind(found)}"
        raise ConfigError(where, problem, allowed="a list of pairs, or an object of such lists by layer name")
    merged["adapter"]["pairing"] = found
    return local_path(given)
