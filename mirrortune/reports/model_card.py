# SPDX-License-Identifier: Apache-2.0
"""Write model cards (``README.md``) with the Hub's metadata, the results and the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mirrortune import __version__
from mirrortune.adapters.files.adapter_file import AdapterFile
from mirrortune.config import strict_yaml
from mirrortune.config.recipe import read_saved_recipe
from mirrortune.reports.finished_run import FinishedRun, damage, is_there, regular_file
from mirrortune.reports.tables import Table
from mirrortune.system.run_directory import RunDirectory, run_of

_LONG_RECIPE = 200  # lines; a recipe that lists pairs may have thousands
_PIPELINES = {"regression": "text-classification", "causal-lm": "text-generation", "seq2seq": "summarization"}
"""The Hub's pipeline tag of a kind of task, where it differs from mirrortune's name."""
_EMBEDDING = "sentence-similarity"
_USE_MERGED = """```python
from transformers import pipeline

pipeline(model="THIS_REPOSITORY")
```

`merge.json` holds the comparison of these files with base + adapter.
"""
_USE_EMBEDDING = """```python
from sentence_transformers import SentenceTransformer

SentenceTransformer("THIS_REPOSITORY").encode(["a text"])
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


def run_card(
    title: str, base: dict[str, Any], method: str, task: dict[str, Any], result: dict[str, Any], recipe_yaml: str
) -> str:
    """Return the card of a run: metrics of the kept checkpoint, sizes, and the recipe that reproduces it."""
    return f"""{_front_matter(base, [method, task["kind"]])}
# {title}

An adapter for `{base["name"]}`, trained by mirrortune {__version__} with method `{method}` for {task["kind"]}.

{_metrics(result)}

Trained numbers: {result["trainable_parameters"]:,} in the adapter{_head(" and {:,} in the task head", result)};
{result["adapter_bytes"]:,} bytes on disk. Training took {result["train_seconds"]:.0f} s.

Score it again with `mirrortune eval`, export plain weights with `mirrortune merge`. The recipe:

{_recipe_block(recipe_yaml)}
"""


def merged_card(base: dict[str, Any], method: str, task: dict[str, Any] | None) -> str:
    """Return the card of a merged checkpoint."""
    kind = task["kind"] if task else "no task of ours"
    return f"""{_front_matter(base, [method, *([task["kind"]] if task else [])])}
# {base.get("name")}, fine-tuned

Plain transformers weights: `{base.get("name")}` with a `{method}` adapter merged into it ({kind}),
by mirrortune {__version__}.
`merge.json` holds the comparison of these files with base + adapter.
"""


def adapter_card(title: str, base: dict[str, Any], method: str) -> str:
    """Return the card of an adapter that was trained outside mirrortune's loop."""
    more = {"library_name": "mirrortune", "base_model_relation": "adapter"}
    return f"""{_front_matter(base, [method], more)}
# {title}

An adapter of `{base.get("name")}`, made by mirrortune {__version__} with method `{method}`.

{_USE_ADAPTER.format(base=base.get("name"))}"""


def card_of_run(
    adapter: AdapterFile,
    title: str,
    *,
    is_merged: bool,
    base: dict[str, Any] | None = None,
    recipe: Path | None = None,
    has_curves: bool = False,
) -> str | None:
    """Return the card of a run's adapter or merged model, or None if the adapter belongs to no finished run.

    Args:
        adapter: adapter from :func:`read_adapter`.
        title: name of the repository or the run.
        is_merged: the card describes merged weights, not an adapter.
        base: description of the base model; that of the adapter by default.
        recipe: recipe file to show; that of the run by default.
        has_curves: ``curves.png`` is stored beside the card and can be shown.

    Raises:
        VerificationError: A file of the run is damaged or a symbolic link.
    """
    directory = run_of(adapter.folder)
    if adapter.task is None or directory is None or not (is_there(directory.results) and is_there(directory.recipe)):
        return None
    text = recipe_text(directory) if recipe is None else recipe.read_text(encoding="utf-8")
    base, method, kind = base or adapter.base, adapter.spec.method, adapter.task["kind"]
    what = "Plain transformers weights" if is_merged else "An adapter"
    merged = _USE_EMBEDDING if kind == _EMBEDDING else _USE_MERGED
    use = merged if is_merged else _USE_ADAPTER.format(base=base.get("name"))
    curves = "\n![curves](curves.png)\n" if has_curves else ""
    with damage(str(directory.path)):
        run = FinishedRun(directory)
        fields, data, metrics = _hub_fields(run, title, kind, is_merged=is_merged), _dataset(run), _metrics(run.results)
        numbers = f"{run.results['trainable_parameters']:,} trained numbers"
        numbers += _head(" besides a task head of {:,}", run.results)
        front = _front_matter(base, [method, kind], fields)
        f"{front}{data}".encode()  # lone surrogates cannot be encoded
    return f"""{front}
# {title}

{what} of `{base.get("name")}`, trained by mirrortune {__version__} with method `{method}` for {kind} on \
`{data}`:
{numbers}.

{metrics}
{curves}
{use}
## Training

```sh
mirrortune train recipe.yaml
```

{_recipe_block(text)}
"""


def recipe_text(run: RunDirectory) -> str:
    """Read the text of a run's recipe and check that it is a valid recipe.

    Raises:
        ConfigError: the file is not a valid recipe.
        VerificationError: the file is missing, a symbolic link, or not UTF-8 text.
    """
    path = regular_file(run.path, run.recipe.name)
    read_saved_recipe(path)
    return path.read_text(encoding="utf-8")  # not rendered from the parsed recipe: comments are kept


def _hub_fields(run: FinishedRun, title: str, kind: str, *, is_merged: bool) -> dict[str, Any]:
    # huggingface_hub's ModelCardData sorts the fields differently; without it, cards stay identical byte for byte.
    pipeline, dataset = _PIPELINES.get(kind, kind), _dataset(run)
    described = {"type": dataset, "name": dataset, "split": "validation"}
    metrics = [{"type": name, "name": name, "value": value} for name, value in run.results["metrics"].items()]
    library = "sentence-transformers" if kind == _EMBEDDING else "transformers"
    fields: dict[str, Any] = {
        "library_name": library if is_merged else "mirrortune",
        "pipeline_tag": pipeline,
        "base_model_relation": "finetune" if is_merged else "adapter",
        "model-index": [
            {"name": title, "results": [{"task": {"type": pipeline}, "dataset": described, "metrics": metrics}]}
        ],
    }
    repositories = [origin["repository"] for origin in _origins(run) if origin.get("repository")]
    return {**fields, "datasets": list(dict.fromkeys(repositories))} if repositories else fields


def _dataset(run: FinishedRun) -> str:
    origins = _origins(run)
    return ", ".join(str(o.get("repository") or Path(str(o.get("path", "data"))).name) for o in origins)


def _origins(run: FinishedRun) -> list[dict[str, Any]]:
    """Return where the data sets of a run came from."""
    origin: dict[str, Any] = run.environment.get("data", {})
    return list(origin.get("sources") or [origin])


def _front_matter(base: dict[str, Any], tags: list[str], more: dict[str, Any] | None = None) -> str:
    data: dict[str, Any] = {"library_name": "transformers", "tags": ["mirrortune", *tags]}
    name = base.get("name") or ""
    if name and ":" not in name and not name.startswith((".", "/", "~")) and name.count("/") <= 1:
        data["base_model"] = name  # the Hub rejects cards whose base model is a local path
    return f"---\n{strict_yaml.dump({**data, **(more or {})})}---\n"


def _metrics(results: dict[str, Any]) -> str:
    rows = [(name, f"{value:.4f}") for name, value in results["metrics"].items()]
    return Table(("validation", "value"), rows).markdown()


def _recipe_block(recipe_yaml: str) -> str:
    if recipe_yaml.count("\n") > _LONG_RECIPE:
        return "`recipe.yaml`, which is too long to be shown here."
    return f"```yaml\n{recipe_yaml.rstrip()}\n```"


def _head(words: str, results: dict[str, Any]) -> str:
    """Format ``words`` with the number of parameters of the task head; empty for a model without a head."""
    return words.format(results["head_parameters"]) if results["head_parameters"] else ""
