# SPDX-License-Identifier: Apache-2.0
"""Parse recipes as strict YAML: YAML 1.2 scalars, no duplicate keys, and the line number of every key.

PyYAML follows YAML 1.1, in which ``lr: 2e-4`` is a string, ``no`` is False and ``12:30`` is 750, and of two equal keys
it silently keeps the last. Each of these can ruin a training run.
"""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.constructor import SafeConstructor
from yaml.resolver import Resolver

from mirrortune.errors import ConfigError

KeyPath = tuple[str, ...]


_MOST_NODES = 3_000_000  # values and keys; pairs for every layer of a large model come close to this


class _Limits(Composer):
    """A composer that rejects anchors, aliases and excessively large documents."""

    source = "text"
    num_nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node; reject aliases, with which ten lines can expand to gigabytes, and too many nodes."""
        self.num_nodes += 1
        if self.num_nodes > _MOST_NODES:
            raise ConfigError(self.source, f"more than {_MOST_NODES:,} values", fix="Shorten the file")
        events: Any = self  # a composer is mixed into a parser, which has the events
        event = events.peek_event()
        anchor = getattr(event, "anchor", None)
        if anchor is not None:
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            raise ConfigError(
                f"{self.source}:{event.start_mark.line + 1}", f"'{sign}{anchor}' is a YAML anchor or alias",
                allowed="plain YAML values", fix="Write the value out where it is used, or quote it if it is text",
            )  # fmt: skip
        found: yaml.Node | None = super().compose_node(parent, index)
        return found


class _StrictLoader(_Limits, yaml.SafeLoader):
    """A SafeLoader with YAML 1.2 core scalars, and without anchors, aliases and tags of other than plain data types."""


_StrictLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("int", r"^[-+]?[0-9]+$", "-+0123456789"),
    (
        "float",
        r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$",
        "-+0123456789.",
    ),
):
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


_PATTERNS: dict[str, list[re.Pattern[str]]] = {}
for _found in _StrictLoader.yaml_implicit_resolvers.values():
    for _name, _form in _found:
        _PATTERNS.setdefault(_name, []).append(_form)
# PyYAML's own constructor reads 010 as octal.
_StrictLoader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))

_LARGEST_FILE = 16 * 2**20  # bytes; pairs for every layer of a large model take half of that
_LONG = 2**16  # characters; hand-written files are shorter and are parsed by PyYAML, whose messages are better
_FastLoader: Any = _StrictLoader
if yaml.__with_libyaml__:
    from yaml._yaml import CParser

    class _CLoader(_Limits, SafeConstructor, Resolver, CParser):
        """The same rules on top of libyaml, which reads long lists of pairs several times faster."""

        yaml_implicit_resolvers = _StrictLoader.yaml_implicit_resolvers
        yaml_constructors = _StrictLoader.yaml_constructors

        def __init__(self, text: str) -> None:
            CParser.__init__(self, text)
            Composer.__init__(self)
            SafeConstructor.__init__(self)
            Resolver.__init__(self)

    _FastLoader = _CLoader


def load(text: str, source: str) -> tuple[Any, dict[KeyPath, int]]:
    """Parse one YAML document.

    Args:
        text: text of the document.
        source: name of the document in errors, usually the path of the file.

    Returns:
        The data, and the 1-based line number of every mapping key by its path.

    Raises:
        ConfigError: the document has a syntax error, an anchor or alias, a duplicate key, or a key that is not a
            string; the error names the line.
    """
    lines: dict[KeyPath, int] = {}
    loader = None
    try:
        loader = (_FastLoader if len(text) > _LONG else _StrictLoader)(text)
        loader.source = source
        node = loader.get_single_node()
        if node is None:
            return None, lines
        _collect_lines(node, (), lines, source)
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}" if mark else source
        raise ConfigError(place, f"not valid YAML: {error.problem or error.context}", fix="Correct the line") from error
    except yaml.reader.ReaderError as error:
        place = f"{source}:{text.count(chr(10), 0, error.position) + 1}"
        raise ConfigError(place, f"not valid YAML: character {error.character!r}", fix="Remove it") from error
    except RecursionError as error:
        raise ConfigError(source, "not valid YAML: nested without end", fix="Correct the file") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number with thousands of digits
        raise ConfigError(source, f"not valid YAML: {error}", fix="Correct the file") from error
    finally:
        if loader is not None:
            loader.dispose()


def text_of(path: Path, where: str, what: str) -> str:
    """Return the text of a settings file.

    Raises:
        ConfigError: it is too large, not a regular file or not UTF-8.
        OSError: it cannot be read.
    """
    if path.exists() and not path.is_dir() and not path.is_file():  # a pipe or a device, whose content may never end
        raise ConfigError(where, f"{path} is a pipe" if path.is_fifo() else f"{path} is a device", allowed="a file")
    if (size := path.stat().st_size) > _LARGEST_FILE:
        raise ConfigError(str(path), f"{what} of {size:,} bytes", allowed=f"{_LARGEST_FILE:,}")
    content = path.read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        is_wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        form = "UTF-16" if is_wide else f"not UTF-8 (byte 0x{content[error.start]:02x})"
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}", f"{what} cannot be read: it is {form}", fix="Save it as UTF-8") from error


def parse_scalar(text: str, source: str) -> Any:
    """Parse a value as in a recipe: ``2e-4`` is a number, ``no`` a string, ``[a, b]`` a list.

    Raises:
        ConfigError: it is empty, such as an unset variable of a shell, or not valid YAML.
    """
    if not text.strip():
        fix = "Give one (null stands for none, and '\"\"' for an empty text), or leave it out"
        raise ConfigError(source, "it has no value", fix=fix)
    return load(text, source)[0]


def dump(data: Any) -> str:
    """Return YAML that :func:`load` reads back as equal data, with keys in the same order."""
    return yaml.dump(data, Dumper=_StrictDumper, sort_keys=False, allow_unicode=True, width=120)


class _StrictDumper(yaml.SafeDumper):
    """A SafeDumper that quotes as the loader requires, so that values are read back unchanged."""

    def ignore_aliases(self, data: Any) -> bool:
        """Return True, so that a list that occurs twice is written twice."""
        return True


_StrictDumper.yaml_implicit_resolvers = _StrictLoader.yaml_implicit_resolvers


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    # repr is the shortest text that parses to the same double; PyYAML would write 2e-05 as 2.0e-05.
    special = {float("inf"): ".inf", float("-inf"): "-.inf"}
    text = ".nan" if value != value else special.get(value, repr(value))  # noqa: PLR0124  (NaN is the one value unlike itself)
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


def _represent_list(dumper: yaml.SafeDumper, value: list[Any]) -> yaml.SequenceNode:
    # One line per pair of directions, since there may be thousands.
    is_short = len(value) <= 4 and all(type(item) is int for item in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True if is_short else None)


_StrictDumper.add_representer(float, _represent_float)
_StrictDumper.add_representer(list, _represent_list)


def _collect_lines(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], source: str) -> None:
    _check_tag(node, source)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _collect_lines(item, (*path, str(index)), lines, source)
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        place = f"{source}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
            raise ConfigError(place, f"a key must be text, got {key_node.value!r}", fix=f'Quote it: "{key_node.value}"')
        key_path = (*path, key_node.value)
        if key_path in lines:
            raise ConfigError(
                place,
                f"key '{'.'.join(key_path)}' appears twice (first on line {lines[key_path]})",
                fix="Remove one of the two",
            )
        lines[key_path] = key_node.start_mark.line + 1
        _collect_lines(value_node, key_path, lines, source)


def _check_tag(node: yaml.Node, source: str) -> None:
    """Raise an error for ``!!tags`` of types that JSON does not have, and for scalars that do not match their tag."""
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    is_plain = kind in ("map", "seq", "str") or any(p.match(node.value) for p in _PATTERNS.get(node.tag, ()))
    if not is_plain:
        place = f"{source}:{node.start_mark.line + 1}"
        raise ConfigError(place, f"'{node.value}' tagged as {kind}", allowed="plain YAML values", fix="Remove the tag")


def value_kind(value: Any) -> str:
    """Return a name for the kind of a value that was read from a file: ``a list``, ``a text``."""
    names: dict[type, str] = {list: "a list", dict: "a mapping", str: "a text", bool: "true or false"}
    return "nothing" if value is None else names.get(type(value), "a number")
