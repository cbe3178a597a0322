# SPDX-License-Identifier: Apache-2.0
"""Remove local paths from the copies of files that are pushed, in settings and in prose.

Each path is replaced by its last component. Hub ids are kept, and the local files are not changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from mirrortune.adapters.files.description import edited_text
from mirrortune.config import strict_yaml
from mirrortune.config.data_paths import with_paths
from mirrortune.config.recipe import check_saved_recipe
from mirrortune.system.paths import HUB_SCHEME, PACKAGE_SCHEME, is_inside, looks_like_path, split_sample

DIGESTS = "sha256"
"""Entry of ``merge.json`` with the hashes of the other files."""
_SHIPPED = "shipped:"
_PLACES = {"_name_or_path", "name_or_path", "base_model_name_or_path", "tokenizer_file", "vocab_file", "merges_file"}
_NAMES_A_PLACE = re.compile(r"(^|_)(path|paths|dir|directory|folder|file|files|filename|root|home)$")
# Class names, templates and vocabulary belong to the model and may legitimately begin with a slash.
_OF_THE_MODEL = {"id2label", "label2id", "labels", "chat_template", "vocab", "merges"}
_LOCAL_ROOTS = re.compile(
    r"(?<![\w/.:<\\~-])(~[\w.-]*/|/(home|Users|root|tmp|var|mnt|media|data|scratch|work|workspace|opt|srv)/)"
    r"|(?<!\w)[A-Za-z]:\\"
)
_COMMAND = re.compile(r"(?<=```sh\n)(mirrortune .*)(?=\n```)")
_REPEAT = "mirrortune train recipe.yaml"
# An absolute POSIX path (or one below ~) or Windows path in prose, but not part of a URL, an id or markup.
_PATHS = re.compile(
    r"(?<![\w/.:<\\~-])(?:~[\w.-]*|\.{1,2})?(?:/[^\s/'\"`,;:()\[\]{}<>|]+){2,}/?"
    r"|(?<![\w])[A-Za-z]:\\[^\s'\"`,;()<>|]+"
)


@dataclass(slots=True)
class Redaction:
    """Removes local paths from texts and records each replacement.

    Attributes:
        cuts: ``(place, before, after)`` of each replacement.
    """

    cuts: list[tuple[str, str, str]] = field(default_factory=list)

    def path(self, value: str, place: str, *, is_known_local: bool = False) -> str:
        """Redact a setting that names a model, data or a file: a local path becomes ``./NAME``, which is no Hub id.

        Args:
            value: value of the setting.
            place: location of the setting, for :attr:`cuts`.
            is_known_local: the value is local even if it looks like a Hub id.
        """
        is_shipped = value.startswith(_SHIPPED) and is_inside(value.removeprefix(_SHIPPED))
        if value.startswith((HUB_SCHEME, PACKAGE_SCHEME)) or is_shipped or not value:
            return value
        is_known_local = is_known_local or value.startswith(_SHIPPED)
        name, number = split_sample(value)
        if not (is_known_local or looks_like_path(name)):
            return value
        found = f"./{_last_name(name)}" + ("" if number is None else f"#{number}")
        return self._cut(place, value, found)

    def prose(self, text: str, place: str) -> str:
        """Replace every absolute path in a text by its last component."""
        return _PATHS.sub(lambda found: self._cut(place, found[0], _last_name(found[0])), text)

    def recipe(self, text: str, place: str) -> str:
        """Redact the local paths and the output folder in a recipe (YAML).

        Raises:
            ConfigError: the text is not a recipe, and is therefore not uploaded.
        """
        data = check_saved_recipe(text, place)
        known = len(self.cuts)
        for section, key in (("model", "name"), ("data", "path"), ("data", "validation_path"), ("adapter", "pairing")):
            found = data.get(section) or {}
            is_pairs = key == "pairing" and not str(found.get(key)).endswith(".json")
            if found.get(key) is not None and not is_pairs:
                found[key] = with_paths(found[key], partial(self.path, place=f"{place}: {section}.{key}"))
        if isinstance(data.get("output_dir"), str):
            self._cut(f"{place}: output_dir", data.pop("output_dir"), "nothing")
        return text if len(self.cuts) == known else str(strict_yaml.dump(data))

    def adapter(self, text: str, place: str, config_sha256: str | None = None) -> str:
        """Redact the path of the base, the only path in ``adapter.json``, and update the file's hash.

        Args:
            text: content of the file.
            place: name of the file.
            config_sha256: hash of the redacted PEFT configuration beside it, or None if there is none.
        """

        def cut(description: dict[str, Any]) -> None:
            self._base(description.get("base"), f"{place}: base")
            if config_sha256 is not None:
                description["config_sha256"] = config_sha256

        return edited_text(text, cut)

    def settings(self, text: str, place: str) -> str:
        """Redact local paths at any depth of a transformers or PEFT configuration (JSON).

        Some versions record the paths from which the model and its parts were loaded. Class names and templates are
        kept.
        """

        def cut(data: dict[str, Any]) -> None:
            left: list[tuple[str, Any, Any, Any]] = [(key, data, key, data[key]) for key in sorted(data)]
            while left:
                name, holder, key, value = left.pop()
                if name.rpartition(".")[2] in _OF_THE_MODEL:
                    continue
                if isinstance(value, dict):
                    left += [(f"{name}.{k}", value, k, v) for k, v in value.items()]
                elif isinstance(value, list):
                    left += [(name, value, i, v) for i, v in enumerate(value)]
                elif isinstance(value, str):
                    holder[key] = self._setting(value, name.rpartition(".")[2], f"{place}: {name}")

        return self._json(text, cut)

    def _setting(self, value: str, key: str, place: str) -> str:
        if key in _PLACES:
            return self.path(value, place)
        is_place = value.startswith(("/", "~", "..")) and _NAMES_A_PLACE.search(key) is not None
        if is_place or ("\n" not in value and _is_here(value)):
            return self.path(value, place, is_known_local=True)
        return self.prose(value, place) if _LOCAL_ROOTS.search(value) else value

    def card(self, text: str, place: str) -> str:
        """Redact a model card: command lines, paths that were replaced in other files, and other absolute paths.

        The second step handles paths with spaces, at which :meth:`prose` would end a path.
        """
        text = _COMMAND.sub(lambda found: self._cut(f"{place}: the command line", found[1], _REPEAT), text)
        for _, before, _ in sorted(self.cuts, key=lambda cut: -len(cut[1])):
            if "/" in before or "\\" in before:
                text = text.replace(before, _last_name(before))
        return self.prose(text, place)

    def merge_report(self, text: str, place: str, digests: Mapping[str, str]) -> str:
        """Redact the paths of the base and the adapters in ``merge.json``.

        Args:
            text: content of the file.
            place: name of the file.
            digests: hashes of the redacted copies of other files, which replace those of the files.
        """

        def cut(data: dict[str, Any]) -> None:
            if isinstance(recorded := data.get(DIGESTS), dict):
                recorded.pop("README.md", None)  # redacted last, with what is cut here
                recorded |= {name: digest for name, digest in digests.items() if name in recorded}
            self._base(data.get("base"), f"{place}: base")
            for adapter in data.get("adapters") or ():
                if isinstance(adapter.get("folder"), str):
                    adapter["folder"] = self.path(adapter["folder"], f"{place}: adapters", is_known_local=True)
            if isinstance(data.get("in_memory"), str):
                data["in_memory"] = self.prose(data["in_memory"], f"{place}: in_memory")
            data["remarks"] = [self.prose(str(remark), f"{place}: remarks") for remark in data.get("remarks") or ()]

        return self._json(text, cut)

    def results(self, text: str, place: str) -> str:
        """Redact the run directory in ``results.json``, and paths in fields that this version does not know."""

        def cut(data: dict[str, Any]) -> None:
            if isinstance(data["run_dir"], str):
                data["run_dir"] = self.path(data["run_dir"], f"{place}: run_dir", is_known_local=True)
            for source in filter(lambda s: isinstance(s, dict), data.get("sources") or ()):
                if isinstance(source.get("path"), str):
                    source["path"] = self.path(source["path"], f"{place}: sources")
            for key in data.keys() - {"run_dir"}:
                data[key] = self._values(data[key], f"{place}: {key}")

        return self._json(text, cut)

    def _values(self, value: Any, place: str) -> Any:
        """Apply :meth:`prose` to every string in a JSON value."""
        if isinstance(value, str):
            return self.prose(value, place)
        if isinstance(value, list):
            return [self._values(item, place) for item in value]
        if isinstance(value, dict):
            return {self.prose(key, place): self._values(item, f"{place}.{key}") for key, item in value.items()}
        return value

    def describe(self) -> list[str]:
        """Return one line for each replacement."""
        return list(dict.fromkeys(f"cut from {place}: '{before}' -> {after}" for place, before, after in self.cuts))

    def _base(self, base: Any, place: str) -> None:
        if isinstance(base, dict) and isinstance(base.get("name"), str):
            base["name"] = self.path(base["name"], f"{place}.name")

    def _json(self, text: str, cut: Callable[[dict[str, Any]], None]) -> str:
        data = json.loads(text)
        if isinstance(data, dict):
            cut(data)
        return text if data == json.loads(text) else json.dumps(data, indent=1, ensure_ascii=False) + "\n"

    def _cut(self, place: str, before: str, after: str) -> str:
        if before != after:
            self.cuts.append((place, before, after))
        return after


def _is_here(value: str) -> bool:
    """Return whether a text is the absolute path of an existing file or folder."""
    try:
        return value.startswith("/") and len(PurePosixPath(value).parts) > 2 and Path(value).exists()
    except (OSError, ValueError):
        return False


def _last_name(path: str) -> str:
    pure = PureWindowsPath(path) if "\\" in path else PurePosixPath(path)
    return pure.name or "folder"
