# SPDX-License-Identifier: Apache-2.0
"""README.md of a run directory and of a merged folder: the Hub's metadata on top, then what was done and what came
out.
"""

from __future__ import annotations

from typing import Any

from mirrortune import __version__, strict_yaml

_LONG_RECIPE = 200  # lines; one that lists pairs may have thousands


def _front_matter(base: dict[str, Any], tags: list[str]) -> str:
    data: dict[str, Any] = {"library_name": "transformers", "tags": ["mirrortune", *tags]}
    name = base.get("name") or ""
    if name and ":" not in name and not name.startswith((".", "/", "~")) and name.count("/") <= 1:
        data["base_model"] = name  # the Hub rejects cards whose base model is a local path
    return f"---\n{strict_yaml.dump(data)}---\n"


def run_card(
    title: str, base: dict[str, Any], method: str, task: dict[str, Any], result: dict[str, Any], recipe_yaml: str
) -> str:
    """The card of a run: metrics of the kept checkpoint, sizes, and the recipe that repeats it."""
    recipe = f"```yaml\n{recipe_yaml.rstrip()}\n```"
    if recipe_yaml.count("\n") > _LONG_RECIPE:
        recipe = "`recipe.yaml`, which is too long to be shown here."
    metrics = "\n".join(f"| {name} | {value:.4f} |" for name, value in result["metrics"].items())
    return f"""{_front_matter(base, [method, task["kind"]])}
# {title}

An adapter for `{base["name"]}`, trained by mirrortune {__version__} with method `{method}` for {task["kind"]}.

| validation | value |
|---|---|
{metrics}

Trained numbers: {result["trainable_parameters"]:,} in the adapter and {result["head_parameters"]:,} in the task head;
{result["adapter_bytes"]:,} bytes on disk. Training took {result["train_seconds"]:.0f} s.

Score it again with `mirrortune eval`, export plain weights with `mirrortune merge`. The recipe:

{recipe}
"""


def merged_card(base: dict[str, Any], method: str, task: dict[str, Any] | None) -> str:
    """The card of a merged checkpoint."""
    kind = task["kind"] if task else "no task of ours"
    return f"""{_front_matter(base, [method, *([task["kind"]] if task else [])])}
# {base.get("name")}, fine-tuned

Plain transformers weights: `{base.get("name")}` with a `{method}` adapter merged into it ({kind}),
by mirrortune {__version__}.
`merge.json` holds the comparison of these files with base + adapter.
"""
