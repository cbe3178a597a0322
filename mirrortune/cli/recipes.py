# SPDX-License-Identifier: Apache-2.0
"""Define the commands ``recipes ls``, ``cat``, ``cp`` and ``schema``, which list, print and copy shipped recipes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from json import loads
from pathlib import Path
from typing import Annotated

import typer

from mirrortune.cli.flags import Debug, Json
from mirrortune.config.recipe import read_recipe, shipped_recipes
from mirrortune.errors import ConfigError, unknown_name
from mirrortune.system.console import Reporter
from mirrortune.system.paths import local_path, shipped_folder

RecipeName = Annotated[
    str, typer.Argument(metavar="NAME", help="A shipped recipe, such as glue/sst2.", show_default=False)
]
_MODELINE = "# yaml-language-server: $schema="


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A shipped recipe in a list: name, kind of task, base model, and the first sentence of its header."""

    name: str
    kind: str
    model: str
    summary: str

    def matches(self, words: list[str]) -> bool:
        """Return whether every word occurs in one of the fields."""
        text = f"{self.name} {self.kind} {self.model} {self.summary}".lower()
        return all(word.lower() in text for word in words)


def ls(
    words: Annotated[list[str] | None, typer.Argument(metavar="[WORD]...", help="List only recipes that contain every word in their name, kind, model or description.", show_default=False)] = None,
    *, json: Json = False, debug: Debug = False,
) -> None:  # fmt: skip
    """List the shipped recipes.

    mirrortune recipes ls image
    """
    found = [recipe for recipe in map(_listed, shipped_recipes()) if recipe.matches(words or [])]
    if not found:
        raise ConfigError(
            f"recipes ls {' '.join(words or [])}", "no recipe holds these words", fix="Give fewer words, or none"
        )
    width, kinds = (max(len(getattr(r, key)) for r in found) for key in ("name", "kind"))
    lines = [f"{r.name:{width}}  {r.kind:{kinds}}  {r.summary}" for r in found]
    Reporter(as_json=json).result({"recipes": [asdict(recipe) for recipe in found]}, lines)


def cat(name: RecipeName, *, json: Json = False, debug: Debug = False) -> None:
    """Print a shipped recipe.

    mirrortune recipes cat glue/sst2
    """
    text = _path(name).read_text(encoding="utf-8")
    Reporter(as_json=json).result({"name": name, "text": text}, text.rstrip("\n").split("\n"))


def cp(
    name: RecipeName,
    target: Annotated[str | None, typer.Argument(metavar="[FILE]", help="File or folder to copy to; its own name here by default.", show_default=False)] = None,
    *, overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    json: Json = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Copy a shipped recipe, to change it.

    mirrortune recipes cp glue/sst2 my.yaml
    """
    source, path = _path(name), local_path(target or ".")
    path = path / source.name if path.is_dir() or str(target).endswith("/") else path
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(str(path), "the copy would not be found as a recipe", allowed="a name that ends in .yaml")
    from mirrortune.system.atomic import write_text_atomically  # noqa: PLC0415
    from mirrortune.system.outputs import Input, check_file  # noqa: PLC0415

    check_file(path, [Input("recipe", source)], "FILE")
    if path.exists() and not overwrite:
        raise ConfigError(str(path), "it already exists", fix="Give another name, or --overwrite")

    # The copy may be moved to another machine, so it refers to a schema beside it or to none.
    has_schema = (path.parent / _schema_file().name).is_file()
    text = _with_modeline(source.read_text(encoding="utf-8"), _schema_file().name if has_schema else None)

    write_text_atomically(path, text)
    lines = [f"{name} copied to {path}", f"run it: mirrortune train {path}"]
    if not has_schema:
        beside = path.parent / _schema_file().name
        lines.append(f"let editors complete it: mirrortune recipes schema > {beside}, then copy it again")
    Reporter(as_json=json).result({"name": name, "path": str(path)}, lines)


def schema(*, json: Json = False, debug: Debug = False) -> None:
    """Print the JSON schema of a recipe, for editors.

    mirrortune recipes schema > recipe.schema.json
    """
    text = _schema_file().read_text(encoding="utf-8")
    Reporter(as_json=json).result(loads(text), text.rstrip("\n").split("\n"))


def _path(name: str) -> Path:
    if name not in shipped_recipes():
        raise unknown_name("NAME", "recipe", name, shipped_recipes())
    return shipped_folder() / f"{name}.yaml"


def _schema_file() -> Path:
    return shipped_folder() / "recipe.schema.json"


def _with_modeline(text: str, schema: str | None) -> str:
    """Return the text of a recipe with ``schema`` for editors in its second line, or without such a line for None."""
    lines = [line for line in text.splitlines() if not line.startswith(_MODELINE)]
    return "\n".join([*lines[:1], *([_MODELINE + schema] if schema else []), *lines[1:]]) + "\n"


def _listed(name: str) -> Listed:
    values = read_recipe(name).values
    return Listed(
        name=name,
        kind=str(values["task"]["kind"]),
        model=str(values["model"]["name"]),
        summary=_summary(_path(name).read_text(encoding="utf-8")),
    )


def _summary(text: str) -> str:
    """Return the first sentence below the command in a recipe's header, on one line."""
    header = [line[1:].strip() for line in text.split("\nmodel:", 1)[0].splitlines() if not line.startswith(_MODELINE)]
    paragraph = " ".join(header).split("  ", 1)[1].split("  ", 1)[0]
    return paragraph.split(". ", 1)[0].rstrip(".")
