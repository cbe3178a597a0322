# SPDX-License-Identifier: Apache-2.0
"""Check a recipe and convert it to the typed settings of a run; this happens once, here."""

from __future__ import annotations

import glob
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from mirrortune.adapters.files.adapter_file import no_compact_form
from mirrortune.adapters.files.tensors import Form
from mirrortune.adapters.methods import method_names, preset
from mirrortune.adapters.peft_bridge.options import check_options
from mirrortune.adapters.spec import (
    AdapterSpec,
    as_asked,
    check_asked,
    check_spec,
    needs_saliency,
    unused_layer_settings,
)
from mirrortune.config.recipe import Resolved
from mirrortune.config.schema import Recipe, SourceSection
from mirrortune.data.dataset import Split
from mirrortune.data.mixture import DataSource, mixture_problems
from mirrortune.data.stream import stream_problems
from mirrortune.errors import ConfigError, unknown_name
from mirrortune.models.dropout import with_dropout
from mirrortune.models.load import ModelSource, find_model
from mirrortune.registry import task_kinds
from mirrortune.system.compiler import check_compiler
from mirrortune.system.devices import check_attention, default_device
from mirrortune.system.outputs import Input, model_inputs
from mirrortune.system.paths import DataPlace, ModelPlace, local_path
from mirrortune.tasks.base import Task, WritesText, settings_of, task_class
from mirrortune.tasks.metrics import METRICS, Scores
from mirrortune.tasks.objective import ClassSettings, setting_problems
from mirrortune.training.calibration import CalibrationSettings
from mirrortune.training.optim import OptimizerSettings, optimizer_problems
from mirrortune.training.settings import LoopSettings
from mirrortune.training.tracking import check_tracker

_COLUMNS = ("_column", "_columns")
"""How the names of settings end that name columns of the data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRequest:
    """The base model of a run and how to load it: the recipe's ``model`` section and ``train.precision``."""

    name: str | None
    revision: str | None
    dtype: str
    load_in: str | None
    attention: str | None
    trust_remote_code: bool
    dropout: float | None
    precision: str

    def find(self) -> ModelSource:
        """Find the named model and read its configuration."""
        assert self.name is not None
        found = find_model(
            self.name, revision=self.revision, trust_remote_code=self.trust_remote_code, load_in=self.load_in
        )
        found = replace(found, attention=self.attention)
        return found if self.dropout is None else with_dropout(found, self.dropout)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """The recipe's ``data`` section; ``seed`` determines random subsets and the validation rows set aside.


    ``sources`` is empty where no data set is named.
    """

    sources: tuple[DataSource, ...]
    config: str | None
    revision: str | None
    encoding: str
    train_split: str
    validation_split: str
    test_split: str
    validation_place: DataPlace | None
    validation_column_names: dict[str, str]
    validation_fraction: float
    label_column: str | None
    missing_label: int | float | str | None
    contained: bool
    max_length: int | None
    packing: bool | None
    blank_text: Literal["drop", "keep"]
    max_train_rows: int | None
    streaming: bool
    shuffle_buffer: int
    max_eval_rows: int | None
    add_tokens: tuple[str, ...]
    seed: int

    @property
    def place(self) -> DataPlace | None:
        """The data set, or the first of several; None if none is named."""
        return self.sources[0].place if self.sources else None

    @property
    def is_mixture(self) -> bool:
        """Whether ``data.path`` is a list."""
        return any(source.is_item for source in self.sources)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRequest:
    """The kind of task and its settings.

    Attributes:
        kind: kind of task, or None if the adapter to be evaluated determines it.
        labels: class names in the order of the model's outputs, or None to read them from the data.
        scores: metrics to compute.
        given: settings of all kinds of task by name; None for those that are not set.
    """

    kind: str | None
    labels: tuple[str, ...] | None
    scores: Scores
    given: dict[str, Any]

    @property
    def columns(self) -> dict[str, Any]:
        """Column names that are set, by the names of their settings."""
        return {name: value for name, value in self.given.items() if name.endswith(_COLUMNS)}

    def make(self, rows: Split, **settings: Any) -> tuple[Task, list[str]]:
        """Create the task with its columns and labels; return it with notes on what was detected in ``rows``.

        Args:
            rows: training rows.
            settings: in place of those in ``given``.
        """
        assert self.kind is not None
        own = {name: settings.get(name, self.given[name]) for name in settings_of(self.kind)}
        return task_class(self.kind).from_rows(rows.table, rows.source, self.scores, **own)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSettings:
    """The recipe's ``eval`` section, with ``train.batch_size`` as ``train_rows``."""

    batch_size: int | None
    before: bool | Literal["auto"]
    protocol: Literal["dev-best", "split-dev"]
    report_splits: tuple[str, ...]
    prediction_labels: Literal["names", "indices"]
    prediction_bounds: tuple[float, float] | None
    prediction_files: dict[str, str]
    max_rows: int | None
    samples: int | None
    train_rows: int
    num_workers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """Everything that scoring a model depends on."""

    model: ModelRequest
    data: DataSettings
    task: TaskRequest
    eval: EvalSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings(EvaluationSettings):
    """Everything that a training run depends on.

    Attributes:
        adapter: method, rank, pairing and layers of the adapter.
        form: form of the adapter file.
        calibration: how gradients are measured; None where nothing depends on them.
        loop: settings of the training loop.
        compile: compile the model with torch.compile.
        gradient_checkpointing: recompute activations in the backward pass.
        track: name of the experiment tracker, or None.
        output_dir: run directory, or None for the default.
        classes: treatment of imbalanced classes in training.
        unused: remarks on settings that another one leaves without effect.
    """

    adapter: AdapterSpec
    form: Form
    calibration: CalibrationSettings | None
    loop: LoopSettings
    compile: bool
    gradient_checkpointing: bool
    track: str | None
    output_dir: str | None
    classes: ClassSettings
    unused: tuple[str, ...]


def unpack(recipe: Recipe) -> RunSettings:
    """Check a recipe and return its settings as typed values.

    Raises:
        ConfigError: required settings are missing, names are unknown, or settings contradict each other; all problems
            are reported together.
    """
    spec, section = _adapter_spec(recipe), recipe.train
    _check(recipe, spec)
    scored = unpack_for_eval(recipe)
    lr = preset(spec.method).default_lr(recipe.task.kind) if section.lr is None else section.lr
    return RunSettings(
        **{field.name: getattr(scored, field.name) for field in fields(scored)},
        adapter=spec, form="portable" if spec.basis == "gradient" else recipe.adapter.form,
        calibration=_calibration(recipe, spec), loop=LoopSettings(**{**_common(LoopSettings, section), "lr": lr}),
        compile=section.compile, gradient_checkpointing=section.gradient_checkpointing, track=section.track,
        output_dir=recipe.output_dir, classes=ClassSettings(**_common(ClassSettings, section)),
        unused=_unused_remarks(recipe, spec),
    )  # fmt: skip


def unpack_for_eval(recipe: Recipe) -> EvaluationSettings:
    """Return the settings that ``eval`` reads; none is required, since a target may determine its model and task."""
    train, task = recipe.train, recipe.task
    return EvaluationSettings(
        model=ModelRequest(**_common(ModelRequest, recipe.model), precision=train.precision),
        data=DataSettings(**_common(DataSettings, recipe.data), **data_places(recipe), seed=train.seed),
        task=TaskRequest(
            kind=task.kind, labels=task.labels, given={**dict(recipe.data), **dict(recipe.eval), **dict(task)},
            scores=Scores(metrics=task.metrics, selection_metric=task.selection_metric),
        ),
        eval=EvalSettings(
            **_common(EvalSettings, recipe.eval), train_rows=train.batch_size, num_workers=train.num_workers
        ),
    )  # fmt: skip


def data_places(recipe: Recipe) -> dict[str, Any]:
    """Return ``data.path`` and ``data.validation_path``, parsed, by the fields of :class:`DataSettings`."""
    paths, other = recipe.data.path, recipe.data.validation_path
    items = paths if isinstance(paths, tuple) else [paths] if paths is not None else []
    return {
        "sources": tuple(_source(item, is_item=isinstance(paths, tuple)) for item in items),
        "validation_place": None if other is None else DataPlace.parse(other),
    }


def _source(item: str | SourceSection, *, is_item: bool) -> DataSource:
    if isinstance(item, str):
        return DataSource(place=DataPlace.parse(item), is_item=is_item)
    columns = {name: value for name, value in item if name.endswith(_COLUMNS) and value is not None}
    place = DataPlace.parse(item.path)
    return DataSource(place=place, weight=item.weight, revision=item.revision, columns=columns, is_item=True)


def _common(settings: type[Any], section: Any) -> dict[str, Any]:
    """Return the values of a recipe section that are fields of the dataclass ``settings``."""
    own = {field.name for field in fields(settings)}
    return {name: value for name, value in section if name in own}


def _adapter_spec(recipe: Recipe) -> AdapterSpec:
    section = recipe.adapter
    spec = AdapterSpec(
        method=section.method,
        rank=section.rank,
        pairing=section.pairing,
        target_modules=section.target_modules,
        seed=recipe.train.seed,
        strategy=None if section.strategy == "auto" else section.strategy,
        options=dict(section.options),
        split=section.model_dump(mode="json")["split"],
        layers=section.layers,
        also_train=section.also_train,
    )
    return as_asked(spec)


def _calibration(recipe: Recipe, spec: AdapterSpec) -> CalibrationSettings | None:
    if not needs_saliency(spec) and spec.basis != "gradient":
        return None
    section, options = recipe.adapter, spec.settled().options
    return CalibrationSettings(
        saliency=section.saliency, num_batches=section.calibration_batches,
        warmup_steps=section.calibration_warmup_steps, batch_size=recipe.train.batch_size, head_lr=recipe.train.head_lr,
        side=options.get("side"), unit=options.get("unit"), seed=spec.seed,
    )  # fmt: skip


def _check(recipe: Recipe, spec: AdapterSpec) -> None:
    """Check what the types of the recipe cannot express, and raise all problems together."""
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
    train = recipe.train
    errors += mixture_problems(
        data_places(recipe)["sources"],
        of_hub={"data.config": recipe.data.config, "data.revision": recipe.data.revision},
        of_classes={"train.class_weights": train.class_weights == "balanced", "train.balance": train.balance},
    )  # fmt: skip
    if recipe.data.missing_label is not None and recipe.data.label_column is None:
        errors.append(ConfigError("data.missing_label", "no label column is named", fix="Give --label-column"))
    if recipe.data.validation_column_names and recipe.data.validation_path is None:
        fix = "Set data.validation_path, or remove it"
        errors.append(ConfigError("data.validation_column_names", "no other data set has the validation rows", fix=fix))
    errors += problems_of_names(recipe, spec)
    if recipe.adapter.form == "compact" and spec.method in method_names() and spec.basis == "gradient":
        errors.append(no_compact_form(spec.method))
    metrics, name = recipe.task.metrics, recipe.model.name
    if recipe.model.revision is not None and name is not None and ModelPlace.parse(name).is_local:
        errors.append(ConfigError("model.revision", f"{name} is local and has none", fix="Remove it"))
    if metrics is not None and recipe.task.selection_metric not in (None, *metrics):
        errors.append(
            ConfigError(
                "task.selection_metric", f"'{recipe.task.selection_metric}' is not computed", allowed=", ".join(metrics)
            )
        )
    if errors:
        raise ConfigError.several(errors)


def problems_of_names(recipe: Recipe, spec: AdapterSpec | None = None) -> list[ConfigError]:
    """Find names that are in no registry, and settings of other kinds of task.

    These problems do not depend on other settings, so they can also be found in a recipe whose invalid values were
    removed.
    """
    spec = spec or _adapter_spec(recipe)
    errors = []
    kind = recipe.task.kind
    checks: list[Callable[[], object]] = [
        lambda: check_spec(spec),
        lambda: check_asked(spec),
        lambda: check_options(spec),
        lambda: check_tracker(recipe.train.track),
        lambda: check_compiler(default_device()) if recipe.train.compile else None,
        lambda: check_noise(recipe),
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
        count = recipe.eval.samples
        if count and not issubclass(task_class(kind), WritesText):
            errors.append(ConfigError("eval.samples", f"{kind} does not generate text, got {count}", fix="Remove it"))
        errors += _token_problems(recipe, spec)
    classes = ClassSettings(**_common(ClassSettings, recipe.train))
    errors += setting_problems(classes, kind, is_streamed=recipe.data.streaming)
    train = recipe.train
    chosen = OptimizerSettings(name=train.optimizer, betas=train.betas, eps=train.eps, momentum=train.momentum)
    errors += optimizer_problems(chosen, schedule=train.schedule, min_lr_ratio=train.min_lr_ratio)
    for key, owner in (("num_cycles", "cosine-restarts"), ("decay_ratio", "wsd")):
        if train.schedule != owner and getattr(train, key) != type(train).model_fields[key].default:
            problem = f"{train.schedule} has none, got {getattr(train, key)}"
            errors.append(ConfigError(f"train.{key}", problem, fix=f"Remove it, or set train.schedule={owner}"))
    metrics = recipe.task.metrics
    errors += [unknown_name("task.metrics", "metric", n, METRICS) for n in metrics or () if n not in METRICS]
    return errors


def _unused_remarks(recipe: Recipe, spec: AdapterSpec) -> tuple[str, ...]:
    """Return remarks on settings that another setting, or the method, leaves without effect.

    They are no errors, because ``compare`` trains methods that do not use them.
    """
    data, adapter, train = recipe.data, recipe.adapter, recipe.train
    unused = [
        ("data", data, "shuffle_buffer", not data.streaming, "rows are not streamed"),
        ("train", train, "also_train_lr", not adapter.also_train, "adapter.also_train is empty"),
        ("train", train, "warmup_ratio", train.warmup_steps is not None, "train.warmup_steps is set"),
    ]
    found = [
        f"{name}.{key} is not used: {why}"
        for name, section, key, is_unused, why in unused
        if is_unused and getattr(section, key) != type(section).model_fields[key].default
    ]
    return tuple(filter(None, (*found, unused_layer_settings(spec))))


def check_noise(recipe: Recipe) -> None:
    """Check that noise can be added to the embeddings of this kind of model and task.

    Raises:
        ConfigError: the task is not one of language models, or ``train.compile`` is set, which is untested.
    """
    kind, alpha = recipe.task.kind, recipe.train.neftune_alpha
    if alpha is None:
        return
    if kind in task_kinds() and "packing" not in settings_of(kind):
        raise ConfigError("train.neftune_alpha", f"it is for language models, got {kind}", fix="Remove it")
    if recipe.train.compile:
        raise ConfigError("train.neftune_alpha", "it is untested with --compile", fix="Leave one of them out")


def _token_problems(recipe: Recipe, spec: AdapterSpec) -> list[ConfigError]:
    """Errors for new tokens where there are no texts, and where they could not be stored."""
    tokens, where = recipe.data.add_tokens, "data.add_tokens"
    if not tokens:
        return []
    errors = []
    if {"image_column", "audio_column"}.intersection(settings_of(str(recipe.task.kind))):
        errors.append(ConfigError(where, f"{recipe.task.kind} reads no text", fix="Remove it"))
    if twice := next((token for token in tokens if tokens.count(token) > 1), None):
        errors.append(ConfigError(where, f"'{twice}' is given twice", fix="Name each token once"))
    tuner = spec.preset.peft if spec.method in method_names() else None
    if tuner is not None and tuner.kind != "LORA":
        problem = f"PEFT's files of method '{spec.method}' have no place for them"
        errors.append(ConfigError(where, problem, allowed="lora, or a method of mirrortune's own"))
    return errors


def _unused_settings(recipe: Recipe) -> list[ConfigError]:
    """Return errors for settings of other kinds of task, which would have no effect."""
    assert recipe.task.kind is not None
    of_kinds = {name for kind in task_kinds() for name in settings_of(kind)}
    taken = set(settings_of(recipe.task.kind))
    return [
        ConfigError(f"{section}.{name}", f"{recipe.task.kind} has none, got {value!r}", fix="Remove it")
        for section, values in (("data", recipe.data), ("task", recipe.task), ("eval", recipe.eval))
        for name, value in values
        if name in of_kinds - taken and value is not None
    ]


def inputs_of(resolved: Resolved) -> list[Input]:
    """List the local files and folders that a run reads: model, data, recipes and pairs."""
    recipe = resolved.recipe
    found = [Input("recipe", file) for file in resolved.files]
    found += [Input("pairs", resolved.pairs)] if resolved.pairs else []
    found += model_inputs(recipe.model.name)
    places = data_places(recipe)
    for data in [source.place for source in places["sources"]] + [places["validation_place"]]:
        if data is None or data.kind in ("address", "shipped"):
            continue
        # Hub ids are included: a local folder of that name would later be read in its place.
        files = glob.glob(str(data.path()), recursive=True) if data.kind == "pattern" else [data.name]  # noqa: PTH207
        found += [Input("data", local_path(file)) for file in files]
    return found
