# SPDX-License-Identifier: Apache-2.0
"""README.md of a run directory and of a merged folder: the Hub's metadata on top, then what was done and what came
out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mirrortune import __version__
from mirrortune.config import strict_yaml

_LONG_RECIPE = 200  # lines; one that lists pairs may have thousands


# The Hub's names of our kinds of task, where they differ.
_PIPELINES = {"regression": "text-classification", "causal-lm": "text-generation", "seq2seq": "summarization"}


def _front_matter(base: dict[str, Any], tags: list[str], more: dict[str, Any] | None = None) -> str:
    data: dict[str, Any] = {"library_name": "transformers", "tags": ["mirrortune", *tags]}
    name = base.get("name") or ""
    if name and ":" not in name and not name.startswith((".", "/", "~")) and name.count("/") <= 1:
        data["base_model"] = name  # the Hub rejects cards whose base model is a local path
    return f"---\n{strict_yaml.dump({**data, **(more or {})})}---\n"


def run_card(
    title: str, base: dict[str, Any], method: str, task: dict[str, Any], result: dict[str, Any], recipe_yaml: str
) -> str:
    """The card of a run: metrics of the kept checkpoint, sizes, and the recipe that repeats it."""
    recipe = _recipe_block(recipe_yaml)
    metrics = "\n".join(f"| {name} | {value:.4f} |" for name, value in result["metrics"].items())
    return f"""{_front_matter(base, [method, task["kind"]])}
# {title}

An adapter for `{base["name"]}`, trained by mirrortune {__version__} with method `{method}` for {task["kind"]}.

| validation | value |
|---|---|
{metrics}

Trained numbers: {result["trainable_parameters"]:,} in the adapter{_head(" and {:,} in the task head", result)};
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


def adapter_card(title: str, base: dict[str, Any], method: str) -> str:
    """The card of an adapter that was trained in somebody else's loop."""
    more = {"library_name": "mirrortune", "base_model_relation": "adapter"}
    return f"""{_front_matter(base, [method], more)}
# {title}

An adapter of `{base.get("name")}`, made by mirrortune {__version__} with method `{method}`.

{_USE_ADAPTER.format(base=base.get("name"))}"""


def shared_card(
    title: str, base: dict[str, Any], method: str, task: dict[str, Any], run: dict[str, Any], *, is_merged: bool
) -> str:
    """The card of a run's adapter or merged model for the Hub, with everything that the run knows.

    Args:
        title: name of the repository or the run.
        base: see ``adapter.json``.
        method: of the adapter.
        task: see ``adapter.json``.
        run: ``results`` (results.json), ``environment`` (environment.json), ``recipe`` (YAML) and ``curves`` (whether
            curves.png lies beside the card).
        is_merged: whether the card is of plain weights.
    """
    results, environment = run["results"], run["environment"]
    origin, kind = environment.get("data", {}), task["kind"]
    dataset = origin.get("repository") or Path(str(origin.get("path", "data"))).name
    pipeline = _PIPELINES.get(kind, kind)
    described = {"type": str(dataset), "name": str(dataset), "split": "validation"}
    metrics = [{"type": name, "name": name, "value": value} for name, value in results["metrics"].items()]
    more: dict[str, Any] = {
        "library_name": "transformers" if is_merged else "mirrortune",
        "pipeline_tag": pipeline,
        "base_model_relation": "finetune" if is_merged else "adapter",
        "model-index": [
            {"name": title, "results": [{"task": {"type": pipeline}, "dataset": described, "metrics": metrics}]}
        ],
    }
    if origin.get("repository"):
        more["datasets"] = [origin["repository"]]
    lines = "\n".join(f"| {name} | {value:.4f} |" for name, value in results["metrics"].items())
    what = "Plain transformers weights" if is_merged else "An adapter"
    use = _USE_MERGED if is_merged else _USE_ADAPTER.format(base=base.get("name"))
    curves = "\n![curves](curves.png)\n" if run.get("curves") else ""
    return f"""{_front_matter(base, [method, kind], more)}
# {title}

{what} of `{base.get("name")}`, trained by mirrortune {__version__} with method `{method}` for {kind} on `{dataset}`:
{results["trainable_parameters"]:,} trained numbers{_head(" besides a task head of {:,}", results)}.

| validation | value |
|---|---|
{lines}
{curves}
{use}
## Training

```sh
mirrortune train recipe.yaml
```

{_recipe_block(run["recipe"])}
"""


_USE_MERGED = """```python
from transformers import pipeline

pipeline(model="THIS_REPOSITORY")
```

`merge.json` holds the comparison of these files with base + adapter.
"""
_USE_ADAPTER = """```python
import mirrortune

# model = ... {base}, as transformers loads it
mirrortune.load_adapter(model, "THIS_REPOSITORY")
```

`mirrortune merge` writes plain weights. The adapter fits these base weights and no others, and says so.
"""


def _recipe_block(recipe_yaml: str) -> str:
    if recipe_yaml.count("\n") > _LONG_RECIPE:
        return "`recipe.yaml`, which is too long to be shown here."
    return f"```yaml\n{recipe_yaml.rstrip()}\n```"


def _head(words: str, results: dict[str, Any]) -> str:
    """``words`` with the numbers of the task head in them; nothing for a model without one."""
    return words.format(results["head_parameters"]) if results["head_parameters"] else ""
