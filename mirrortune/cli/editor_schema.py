# SPDX-License-Identifier: Apache-2.0
"""Describe recipes as a JSON schema, with which editors complete and check YAML as it is written.

``python -m mirrortune.cli.editor_schema`` writes a copy beside the shipped recipes; a test checks that it is up to
date.
"""

from __future__ import annotations

import json
from typing import Any

from mirrortune.adapters.methods import method_names
from mirrortune.adapters.pairings.rules import PAIRINGS
from mirrortune.config.schema import Recipe
from mirrortune.registry import task_kinds
from mirrortune.system.paths import shipped_folder
from mirrortune.tasks.metrics import METRICS


def editor_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a recipe, with registered names as suggestions."""
    schema = Recipe.model_json_schema()
    schema |= {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "mirrortune recipe"}
    sections = schema["$defs"]
    _suggest(sections["TaskSection"], "kind", task_kinds())
    _suggest(sections["TaskSection"], "selection_metric", sorted(METRICS))
    _suggest(sections["AdapterSection"], "method", method_names())
    _suggest(sections["AdapterSection"], "pairing", [name for name in PAIRINGS if name != "explicit"])
    for choice in sections["TaskSection"]["properties"]["metrics"]["anyOf"]:
        if choice["type"] == "array":
            choice["items"] = {"enum": sorted(METRICS)}
    for name, field in schema["properties"].items():
        if name != "output_dir":  # allow null: the value of a section whose settings are all commented out
            schema["properties"][name] = {"anyOf": [{"$ref": field["$ref"]}, {"type": "null"}]}
    return schema


def _suggest(section: dict[str, Any], key: str, names: list[str]) -> None:
    """Restrict a setting to ``names``, or suggest them if the setting may be more than a name."""
    field = section["properties"][key]
    choices = field.pop("anyOf", None) or [{"type": field.pop("type")}]
    is_name_only = key != "pairing"
    kept = [choice for choice in choices if not (is_name_only and choice == {"type": "string"})]
    field["anyOf"] = [{"enum": names}, *kept]


if __name__ == "__main__":
    text = json.dumps(editor_schema(), indent=1) + "\n"
    (shipped_folder() / "recipe.schema.json").write_text(text, encoding="utf-8")
