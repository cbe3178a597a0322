# SPDX-License-Identifier: Apache-2.0
"""What a recipe says, checked and as plain values: the one place that unpacks a Recipe's sections for others."""

from __future__ import annotations

import glob
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from mirrortune.adapters.methods import preset
from mirrortune.adapters.peft_bridge.options import check_options
from mirrortune.adapters.spec import AdapterSpec, as_asked, check_asked, check_spec
from mirrortune.config.recipe import Resolved, task_kinds
from mirrortune.config.schema import Recipe
from mirrortune.data.dataset import DataSet, Split, load_data
from mirrortune.data.labels import as_name, without_labels
from mirrortune.data.stream import stream_data, stream_problems
from mirrortune.errors import ConfigError, unknown_name
from mirrortune.models.load import check_attention
from mirrortune.system.compiler import check_compiler
from mirrortune.system.devices import default_device
from mirrortune.system.outputs import Input, model_inputs
from mirrortune.system.paths import HUB_SCHEME, is_local, is_pattern, local_path, split_sample
from mirrortune.tasks.base import Task, settings_of, task_class
from mirrortune.tasks.metrics import METRICS, Scores
from mirrortune.training.settings import LoopSettings
from mirrortune.training.tracking import check_tracker


def check_recipe(recipe: Recipe, spec: AdapterSpec) -> None:
    """What the recipe's types cannot say: required settings and names in registries; all problems at once."""
    errors = []
    required = {
        "model.name": (recipe.model.name, "Give --model"),
        "task.kind": (recipe.task.kind, "Give --task"),
        "data.path": (recipe.data.path, "Give --data"),
    }
    for key, (value, fix) in required.items():
        if value is None:
            errors.append(ConfigError(key, "it is not set", fix=fix))
    errors += stream_problems(
        is_streamed=recipe.data.streaming, max_steps=recipe.train.max_steps,
        max_train_rows=recipe.data.max_train_rows, max_eval_rows=recipe.data.max_eval_rows,
    )  # fmt: skip
    if recipe.data.missing_label is not None and recipe.data.label_column is None:
        errors.append(ConfigError("data.missing_label", "no label column is named", fix="Give --label-column"))
    errors += problems_of_names(recipe, spec)
    metrics = recipe.task.metrics
    if recipe.model.revision is not None and recipe.model.name is not None and is_local(recipe.model.name):
        errors.append(ConfigError("model.revision", f"{recipe.model.name} is local and has none", fix="Remove it"))
    if metrics is not None and recipe.task.selection_metric not in (None, *metrics):
        errors.append(
            ConfigError(
                "task.selection_metric", f"'{recipe.task.selection_metric}' is not computed", allowed=", ".join(metrics)
            )
        )
    if errors:
        raise ConfigError.several(errors)


def problems_of_names(recipe: Recipe, spec: AdapterSpec | None = None) -> list[ConfigError]:
    """Names in registries, and settings that what they name does not have. These problems stay whatever else is wrong,
    so that they are found in what is left of a recipe without its invalid values, too.
    """
    spec = spec or adapter_spec(recipe)
    errors = []
    kind = recipe.task.kind
    checks: list[Callable[[], object]] = [
        lambda: check_spec(spec),
        lambda: check_asked(spec),
        lambda: check_options(spec),
        lambda: check_tracker(recipe.train.track),
        lambda: check_compiler(default_device()) if recipe.train.compile else None,
        lambda: check_attention(recipe.model.attention, default_device()),
        lambda: kind and task_class(kind),
    ]
    for check in checks:
        try:
            check()
        except ConfigError as error:
            errors.append(error)
    if kind in task_kinds():
        errors += _unused_settings(recipe)
    metrics = recipe.task.metrics
    errors += [unknown_name("task.metrics", "metric", n, METRICS) for n in metrics or () if n not in METRICS]
    return errors


def adapter_spec(recipe: Recipe) -> AdapterSpec:
    """The recipe's adapter section as plain values."""
    section = recipe.adapter
    spec = AdapterSpec(
        method=section.method,
        rank=section.rank,
        pairing=section.pairing,
        target_modules=section.target_modules,
        seed=recipe.train.seed,
        strategy=None if section.strategy == "auto" or section.strategy == "measured" else section.strategy,  # noqa: PLR1714
        options=dict(section.options),
        split=section.model_dump(mode="json")["split"],
    )
    return as_asked(spec)


def read_data(recipe: Recipe) -> DataSet:
    """The recipe's data set, its rows without labels with nulls for them."""
    found, section = _read(recipe), recipe.data
    if section.contained:
        found = replace(found, splits={n: replace(split, is_contained=True) for n, split in found.splits.items()})
    missing = None if section.missing_label is None else as_name(section.missing_label)
    if missing is None or section.label_column is None:
        return found
    column = section.label_column

    def cleared(split: Split) -> Split:
        stream = split.stream
        if stream is not None:
            flatten = stream.flatten
            stream = replace(stream, flatten=lambda table: without_labels(flatten(table), column, missing))
        return replace(split, table=without_labels(split.table, column, missing), stream=stream)

    return replace(found, splits={name: cleared(split) for name, split in found.splits.items()})


def _read(recipe: Recipe) -> DataSet:
    section = recipe.data
    assert section.path is not None
    if section.streaming:
        return stream_data(
            section.path, config=section.config, revision=section.revision, encoding=section.encoding,
            train_split=section.train_split, max_eval_rows=section.max_eval_rows,
        )  # fmt: skip
    return load_data(section.path, config=section.config, revision=section.revision, encoding=section.encoding)


def make_task(recipe: Recipe, rows: Split) -> tuple[Task, list[str]]:
    """The task with its columns and labels, and notes on what was detected."""
    assert recipe.task.kind is not None
    scores = Scores(metrics=recipe.task.metrics, selection_metric=recipe.task.selection_metric)
    return task_class(recipe.task.kind).from_rows(rows.table, rows.source, scores, **task_settings(recipe))


def task_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings of the recipe that its kind of task takes, None where they are not set."""
    assert recipe.task.kind is not None
    given = {**dict(recipe.data), **dict(recipe.task)}
    return {name: given[name] for name in settings_of(recipe.task.kind)}


def _unused_settings(recipe: Recipe) -> list[ConfigError]:
    """Errors for settings of other kinds of task, which would change nothing."""
    assert recipe.task.kind is not None
    of_kinds = {name for kind in task_kinds() for name in settings_of(kind)}
    taken = set(settings_of(recipe.task.kind))
    return [
        ConfigError(f"{section}.{name}", f"{recipe.task.kind} has none, got {value!r}", fix="Remove it")
        for section, values in (("data", recipe.data), ("task", recipe.task))
        for name, value in values
        if name in of_kinds - taken and value is not None
    ]


def inputs_of(resolved: Resolved) -> list[Input]:
    """Every local file and folder that a run by this recipe reads: model, data, recipes and pairs."""
    recipe = resolved.recipe
    found = [Input("recipe", file) for file in resolved.files]
    found += [Input("pairs", resolved.pairs)] if resolved.pairs else []
    found += model_inputs(recipe.model.name)
    if recipe.data.path is not None and not recipe.data.path.startswith((HUB_SCHEME, "shipped:")):
        name = split_sample(recipe.data.path)[0]
        files = glob.glob(str(local_path(name)), recursive=True) if is_pattern(name) else [name]  # noqa: PTH207
        found += [Input("data", local_path(file)) for file in files]
    return found


def loop_settings(recipe: Recipe, **known: Any) -> LoopSettings:
    """The recipe's train section as plain values, the method's learning rate filled in; ``known`` are those fields that
    depend on the data and the model.
    """
    section, own = recipe.train, {field.name for field in fields(LoopSettings)}
    given = {name: value for name, value in section if name in own}
    lr = preset(recipe.adapter.method).lr if section.lr is None else section.lr
    return LoopSettings(**{**given, "lr": lr, **known})
