# SPDX-License-Identifier: Apache-2.0
"""Fills the generated parts of README.md and docs/: settings, options, recipes, methods and tables of results.

    python -m tests.generated_docs

A generated part stands between ``<!-- generated: NAME ARGUMENTS -->`` and ``<!-- end -->``; ``test_docs.py`` fails when
a page differs from what this module makes of it. The README's figure is drawn anew as well.
"""

from __future__ import annotations

import html
import inspect
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer
from matplotlib.figure import Figure
from pydantic import BaseModel

from mirrortune.adapters.methods import CORES, PRESETS, method_names, preset
from mirrortune.cli.app import app
from mirrortune.compare.figures import comparison_drawings
from mirrortune.config.schema import Recipe
from tests.cli.console import mirrortune

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "tests" / "bench" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_LONG_COMMAND = re.compile(r" ?`(mirrortune [^`]{200,})`")
_PART = re.compile(r"(<!-- generated: (\S+)(.*?) -->\n)(.*?)(<!-- end -->)", flags=re.DOTALL)


def render(page: str) -> str:
    """The text of a page with every generated part made anew."""

    def replace(found: re.Match[str]) -> str:
        return f"{found[1]}\n{GENERATORS[found[2]](*found[3].split())}\n\n{found[5]}"

    return _PART.sub(replace, page)


def settings(section: str) -> str:
    """Settings of one section of a recipe, from ``mirrortune/config/schema.py``."""
    model = Recipe.model_fields[section].annotation
    assert isinstance(model, type)
    assert issubclass(model, BaseModel)
    properties = model.model_json_schema()["properties"]
    rows = (
        (f"`{section}.{name}`", _type(properties[name]), _default(field.default), field.description or "")
        for name, field in model.model_fields.items()
    )
    return table(("setting", "value", "default", "meaning"), rows)


def options(*command: str) -> str:
    """Arguments and options of one command, from its own parser."""
    rows = []
    for parameter in find_command(*command).params:
        if parameter.param_type_name == "argument":
            rows.append((f"`{parameter.metavar}`", parameter.help or ""))
        elif parameter.name != "help":
            names = ", ".join(f"`{name}`" for name in sorted(parameter.opts, key=len, reverse=True))
            default = parameter.default if parameter.show_default and not parameter.is_flag else None
            rows.append((names, f"{parameter.help}{f' Default: {default}.' if default not in (None, []) else ''}"))
    return table(("argument or option", "meaning"), rows)


def json_fields() -> str:
    """Fields of the ``--json`` objects, from the dataclasses that commands return."""
    from mirrortune.analyze.analyze import Analysis
    from mirrortune.inference.predict import PredictResult
    from mirrortune.merging import push, verify
    from mirrortune.runs import evaluate, prepare, results

    found = {
        "prepare": ([f.name for f in fields(prepare.PrepareResult)], "{}"),
        "train": (results.RunResult.SUMMARY, "{}"),
        "eval": ([f.name for f in fields(evaluate.EvaluateResult)], "{}"),
        "merge": ([f.name for f in fields(verify.Verification)], "`output_dir`, `format`, `verification` with {}"),
        "predict": ([f.name for f in fields(PredictResult)], "{}"),
        "push": ([f.name for f in fields(push.PushResult)], "{}"),
        "analyze": ([*(f.name for f in fields(Analysis)), "report", "figures"], "{}"),
    }
    rows = (
        (f"`{name}`", form.format(", ".join(f"`{field}`" for field in names))) for name, (names, form) in found.items()
    )
    return table(("command", "fields"), rows)


def recipes() -> str:
    """The shipped recipes, as ``mirrortune recipes ls`` describes them."""
    found = mirrortune("recipes", "ls", "--json").data["recipes"]
    rows = ((f"`{r['name']}`", r["kind"], f"`{r['model']}`", r["summary"]) for r in found)
    return table(("recipe", "kind of task", "model", "data and protocol"), rows)


def methods(which: str) -> str:
    """Defaults of our own methods, or of PEFT's tuners."""
    rows = []
    for name in method_names():
        found = preset(name)
        if (found.peft is not None) == (which == "peft"):
            has_rank = found.core is not None or (found.peft is not None and found.peft.rank is not None)
            rank = str(found.rank) if has_rank else ""
            if found.rank_option is not None:  # the option that --rank sets
                rank = str(inspect.signature(CORES.get(name, "docs")).parameters[found.rank_option].default)
            images = "" if found.image_lr is None else f"; {found.image_lr:g} for images"
            rows.append((f"`{name}`", rank, f"{found.lr:g}{images}", found.summary.replace("``", "`")))
    return table(("`--method`", "default rank", "default `--lr`", "what is trained"), rows)


def method_options() -> str:
    """Options of our own cores, from the signatures of their classes."""
    rows = []
    for core in CORES.names():
        users = [name for name in method_names() if (name == core or (name in PRESETS and PRESETS[name].core == core))]
        for parameter in inspect.signature(CORES.get(core, "docs")).parameters.values():
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                kind = re.sub(r"Literal\[(.*)\]", r"\1", str(parameter.annotation)).replace("'", "")
                key = f"`adapter.options.{parameter.name}`"
                others = {u: PRESETS[u].options[parameter.name] for u in users
                          if u in PRESETS and parameter.name in PRESETS[u].options}  # fmt: skip
                default = ", ".join([f"`{parameter.default}`", *(f"`{own}` for `{u}`" for u, own in others.items())])
                rows.append((key, ", ".join(f"`{user}`" for user in users), kind, default))
    return table(("option", "methods", "value", "default"), rows)


def results(name: str, table: str = "") -> str:
    """What a bench or a comparison wrote, without its headings; long commands are folded away at the end.

    Args:
        name: folder or file of the results.
        table: number of one table, from 0; all by default.
    """
    path = RESULTS / name
    text = (path / "table.md" if path.is_dir() else path).read_text(encoding="utf-8")
    text = "\n".join(line for line in text.splitlines() if not line.startswith("#")).strip()
    if table:
        starts = [found.start() for found in re.finditer(r"(?<!\|\n)^\|", text, flags=re.MULTILINE)]
        text = text[starts[int(table)] : [*starts, len(text)][int(table) + 1]].strip()
    commands = _LONG_COMMAND.findall(text)
    if not commands:
        return text
    text = re.sub(r"\n{3,}", "\n\n", _LONG_COMMAND.sub("", text)).strip()
    return f"{text}\n\n{folded('Commands' if len(commands) > 1 else 'Command', commands)}"


def folded(summary: str, commands: Sequence[str]) -> str:
    """Commands that a page shows on a click."""
    lines = "\n".join(commands)
    return f"<details>\n<summary>{summary}</summary>\n\n```sh\n{lines}\n```\n\n</details>"


def figures(name: str) -> str:
    """The figures of a bench, for light and dark pages, with their captions."""
    made = []
    for light in sorted((RESULTS / name).glob("*-light.svg")):
        folder = f"../{light.parent.relative_to(ROOT).as_posix()}"
        caption = html.unescape(re.search('aria-label="(.*?)"', light.read_text(encoding="utf-8"))[1])  # type: ignore[index]
        dark = light.name.replace("-light", "-dark")
        made.append(
            f'<picture><source media="(prefers-color-scheme: dark)" srcset="{folder}/{dark}">'
            f'<img alt="{html.escape(caption)}" src="{folder}/{light.name}"></picture>\n\n*{caption}*'
        )
    return "\n\n".join(made)


def find_command(*names: str) -> Any:
    """The click command that ``mirrortune NAMES`` runs."""
    found: Any = typer.main.get_command(app)
    for name in names:
        found = found.commands[name]
    return found


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; line breaks and bars in cells are made harmless."""
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in rows:
        cells = (" ".join(cell.split()).replace("|", "\\|") for cell in row)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _type(field: dict[str, Any]) -> str:
    """The values that a JSON schema allows, in words."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(choice) for choice in field["anyOf"] if choice != {"type": "null"}))
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "$ref" in field:
        return "mapping"
    names = {"string": "text", "boolean": "`true` or `false`", "array": "list", "object": "mapping"}
    name = names.get(field.get("type", ""), field.get("type", "any"))
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    limits = [f"{words} {field[key]:g}" for key, words in bounds.items() if key in field]
    return ", ".join([name, *limits])


def _default(value: Any) -> str:
    if value is None or value == ():
        return ""
    if isinstance(value, bool | str | float | int):
        return f"`{json.dumps(value)}`".replace('"', "")
    return ""


GENERATORS: dict[str, Callable[..., str]] = {
    "settings": settings,
    "options": options,
    "json-fields": json_fields,
    "recipes": recipes,
    "methods": methods,
    "method-options": method_options,
    "results": results,
    "figures": figures,
}


def draw_figure() -> None:
    """The README's figure: score against trainable parameters, from a kept comparison."""
    found = json.loads((RESULTS / "movie-sentences" / "results.json").read_text(encoding="utf-8"))
    (task,) = found["tasks"].values()
    task["methods"] = {name.partition(":lr=")[0]: method for name, method in task["methods"].items()}
    (drawing,) = (d for d in comparison_drawings(found, {}) if d.name == "score_by_trained_numbers")
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    drawing.draw(figure)
    figure.axes[0].set(title="MiniLM-L6 on movie sentences, five seeds")
    figure.savefig(ROOT / "docs" / "images" / "accuracy-against-size.png", dpi=110)


if __name__ == "__main__":
    draw_figure()
    for path in PAGES:
        path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")
