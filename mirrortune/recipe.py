# SPDX-License-Identifier: Apache-2.0
"""The recipe: every setting of a run, its type, range and default, and where each value came from.

pydantic stays in this file. Layers are merged by presence (a flag over ``key=value`` over the recipe over the task's
shipped recipe over the defaults), checked once, and all errors are reported together, each with its file and line or
its flag. Imports no torch.
"""

from __future__ import annotations

import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mirrortune import strict_yaml
from mirrortune.errors import ConfigError, did_you_mean, unknown_name
from mirrortune.locations import TABLE_SUFFIXES, shipped_folder


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class ModelSection(_Section):
    """The base model."""

    name: str | None = None
    """Hub id, local folder, or package:MODULE/FOLDER inside an installed Python package."""
    revision: str | None = None
    """Branch, tag or commit of a Hub repository."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the base weights; auto keeps the stored one."""
    trust_remote_code: bool = False
    """Run Python code from the model's repository. Dangerous: it runs with your rights."""


class TaskSection(_Section):
    """What is learned."""

    kind: str | None = None
    """Kind of task, such as text-classification."""
    labels: tuple[str, ...] | None = None
    """Class names in the order of the model's outputs; read from the data by default."""
    metrics: tuple[str, ...] | None = None
    """Metrics of every evaluation; the kind's own by default."""
    selection_metric: str | None = None
    """The metric by which the best checkpoint is kept; the first of metrics by default."""


class DataSection(_Section):
    """Rows to learn from."""

    path: str | None = None
    """File, folder, Hub id, or shipped:NAME for data inside this package."""
    config: str | None = None
    """Configuration of a Hub data set, such as sst2 of nyu-mll/glue."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""
    encoding: str = "utf-8"
    """Encoding of local text files."""
    train_split: str = "train"
    """Name of the split to train on."""
    validation_split: str = "validation"
    """Name of the split that chooses the best checkpoint; set aside from the training rows if there is none."""
    test_split: str = "test"
    """Name of the split that `eval --split test` reads."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the training rows set aside when there is no validation split."""
    text_columns: tuple[str, ...] | None = None
    """One or two columns of text; detected by default."""
    label_column: str | None = None
    """The target's column; detected by default."""
    max_length: int | None = Field(default=None, ge=4)
    """Longest sequence in tokens; longer rows are truncated and counted. The model's own limit, at most 512, by
    default."""
    blank_text: Literal["drop", "keep"] = "drop"
    """Training rows whose text is blank; rows of other splits are always kept, so that every row is scored."""
    max_train_rows: int | None = Field(default=None, gt=0)
    """Train on a seeded random subset of this many rows."""


class AdapterSection(_Section):
    """What is trained."""

    method: str = "mirror"
    """Name of the method; see README."""
    rank: Literal["full"] | typing.Annotated[int, Field(gt=0)] | None = None
    """Leading singular directions kept of each matrix; the method's own (full for rotations) by default."""
    pairing: str | None = None
    """Which directions turn together; the method's own by default."""
    target_modules: str = "all-linear"
    """Regular expression for the names of the layers to adapt, from any dot on; all-linear for all."""
    strategy: Literal["auto", "branch", "factored"] = "auto"
    """How adapted layers compute; auto takes the cheaper."""
    options: dict[str, typing.Any] = Field(default_factory=dict)
    """Options of the method's core, such as scale_top_k."""


class TrainSection(_Section):
    """The loop."""

    lr: float | None = Field(default=None, ge=0)
    """Peak learning rate of the adapter; the method's own by default."""
    head_lr: float = Field(default=1e-3, ge=0)
    """Peak learning rate of the task head."""
    batch_size: int = Field(default=32, gt=0)
    """Rows per device and micro-batch."""
    gradient_accumulation_steps: int = Field(default=1, gt=0)
    """Micro-batches per optimizer step."""
    epochs: float = Field(default=3.0, gt=0)
    """Passes over the training rows."""
    max_steps: int | None = Field(default=None, gt=0)
    """Stop after this many optimizer steps, whatever epochs says."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay of the learning rates after warm-up, to zero at the last step."""
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps over which the learning rates rise from zero."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's decay, on matrices only; angles, scales and biases have none."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the base model; auto is bf16 on GPUs that have it and fp32 elsewhere."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the head, the order of rows, dropout, the validation rows and random pairs."""
    eval_every_steps: int | None = Field(default=None, gt=0)
    """Evaluate every so many optimizer steps; at the end of every epoch by default."""
    save_every_steps: int | None = Field(default=None, gt=0)
    """Checkpoint every so many optimizer steps; at the end of every epoch by default."""
    log_every_steps: int = Field(default=10, gt=0)
    """Optimizer steps between two lines of the log."""
    num_workers: int = Field(default=0, ge=0)
    """Processes that prepare batches beside the main one."""


class EvalSection(_Section):
    """Evaluation."""

    batch_size: int = Field(default=64, gt=0)
    """Rows per device."""


class Recipe(_Section):
    """All settings of a run, resolved and checked."""

    model: ModelSection = ModelSection()
    task: TaskSection = TaskSection()
    data: DataSection = DataSection()
    adapter: AdapterSection = AdapterSection()
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()
    output_dir: str | None = None
    """Run directory; runs/TASK-MODEL-METHOD by default."""

    def to_yaml(self) -> str:
        """The recipe as YAML that loads to an equal recipe; settings that are not set are left out."""
        return strict_yaml.dump(json.loads(self.model_dump_json(exclude_none=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Settings from one place.

    Attributes:
        values: nested like a recipe; only the keys that were given.
        origin: the place: a file, ``key=value`` or a flag.
        lines: line of each key, for files.
        flags: flag of each key, for the command line.
    """

    values: dict[str, Any]
    origin: str
    lines: dict[tuple[str, ...], int] = field(default_factory=dict)
    flags: dict[tuple[str, ...], str] = field(default_factory=dict)

    def place(self, path: tuple[str, ...]) -> str:
        """Where ``path`` was set, for messages: ``recipe.yaml:4: train.lr`` or ``--lr``."""
        key = ".".join(path)
        if path in self.flags:
            return self.flags[path]
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return f"{self.origin}:{self.lines[path[:end]]}: {key}"
        return f"{self.origin}: {key}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A recipe and, for every key that is not a default, where its value came from."""

    recipe: Recipe
    origins: dict[str, str]


def shipped_recipes() -> list[str]:
    """Names of the recipes inside the package: their paths without the ending."""
    root = shipped_folder()
    return sorted(p.relative_to(root).with_suffix("").as_posix() for p in root.rglob("*.yaml"))


def task_kinds() -> list[str]:
    """Names of the kinds of task: the files of the tasks folder, none of them imported."""
    folder = Path(__file__).parent / "tasks"
    return sorted(p.stem.replace("_", "-") for p in folder.glob("[!_]*.py"))


def read_recipe(name: str, where: str = "RECIPE") -> Layer:
    """The layer of a shipped recipe (``glue/sst2``) or a YAML file.

    Raises:
        ConfigError: no such recipe or file (with the nearest name), or not YAML.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml") and not path.is_file():
        if name not in shipped_recipes():
            raise unknown_name(where, "recipe", name, shipped_recipes())
        path = shipped_folder() / f"{name}.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(where, f"cannot read {path} ({error})", fix="Check the path") from error
    data, lines = strict_yaml.load(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError(str(path), f"a recipe is a mapping of sections, got {type(data).__name__}")
    _anchor_data_path(data, path.parent)
    return Layer(values=data, origin=str(path), lines=lines)


def override_layer(assignments: list[str]) -> Layer:
    """The layer of ``key.sub=value`` words from the command line, values read by YAML's rules."""
    values: dict[str, Any] = {}
    flags = {}
    for word in assignments:
        key, _, text = word.partition("=")
        path = tuple(key.replace("-", "_").split("."))
        _set(values, path, strict_yaml.parse_scalar(text, f"'{word}'"), f"'{word}'")
        flags[path] = f"'{word}'"
    return Layer(values=values, origin="command line", flags=flags)


def flag_layer(given: dict[str, tuple[str, Any]]) -> Layer:
    """The layer of the flags that were given: dotted key -> (flag, value)."""
    values: dict[str, Any] = {}
    for key, (flag, value) in given.items():
        _set(values, tuple(key.split(".")), value, flag)
    return Layer(values=values, origin="flags", flags={tuple(k.split(".")): f for k, (f, _) in given.items()})


def task_layer(name: str, kinds: list[str]) -> Layer:
    """What ``--task NAME`` stands for: a shipped recipe without its model, or a kind of task."""
    if name in kinds:
        return Layer(values={"task": {"kind": name}}, origin="--task", flags={("task", "kind"): "--task"})
    if name not in shipped_recipes():
        raise unknown_name("--task", "task", name, [*kinds, *shipped_recipes()])
    return read_recipe(name, "--task")


def resolve(layers: list[Layer]) -> Resolved:
    """Merge layers, the later over the earlier, and check the result.

    Raises:
        ConfigError: all problems at once.
    """
    merged: dict[str, Any] = {}
    owners: dict[tuple[str, ...], Layer] = {}
    for layer in layers:
        _merge(merged, layer.values, (), layer, owners)
    try:
        recipe = Recipe.model_validate_json(json.dumps(merged))
    except ValidationError as error:
        found = [_explain(problem, owners, merged) for problem in error.errors()]
        unique = {e.describe(): e for e in found}
        raise ConfigError.several(list(unique.values())) from None
    origins = {".".join(path): layer.place(path) for path, layer in owners.items()}
    return Resolved(recipe=recipe, origins=origins)


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Every setting by its dotted key."""
    sections = recipe.model_dump(mode="json")
    flat = {
        f"{name}.{key}": v
        for name, section in sections.items()
        if isinstance(section, dict)
        for key, v in section.items()
    }
    return flat | {name: value for name, value in sections.items() if not isinstance(value, dict)}


def _merge(
    target: dict[str, Any], values: dict[str, Any], path: tuple[str, ...], layer: Layer,
    owners: dict[tuple[str, ...], Layer],
) -> None:  # fmt: skip
    for key, value in values.items():
        here = (*path, key)
        if isinstance(value, dict) and isinstance(target.get(key, {}), dict):
            _merge(target.setdefault(key, {}), value, here, layer, owners)
        else:
            target[key] = value
            owners[here] = layer


def _set(values: dict[str, Any], path: tuple[str, ...], value: Any, where: str) -> None:
    for key in path[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ConfigError(where, f"'{key}' is set both as a value and as a section")
    values[path[-1]] = value


def _explain(problem: Any, owners: dict[tuple[str, ...], Layer], merged: dict[str, Any]) -> ConfigError:
    path = _known_path(tuple(str(part) for part in problem["loc"]), merged)
    layer = owners.get(path) or next((o for p, o in owners.items() if p[: len(path)] == path), None)
    where = layer.place(path) if layer else ".".join(path)
    got = repr(problem.get("input"))
    if problem["type"] == "extra_forbidden":
        names = list(_section_fields(path[:-1]))
        return ConfigError(where, f"unknown key '{path[-1]}'.{did_you_mean(path[-1], names)}", allowed=", ".join(names))
    message = problem["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    near = ""
    if problem["type"] == "literal_error" and isinstance(problem.get("input"), str):
        choices = [c.strip("' ") for c in message.replace(" or ", ", ").split(",")]
        near = did_you_mean(problem["input"], choices)
    return ConfigError(where, f"got {got}.{near}" if near else f"got {got}", allowed=message)


def _known_path(loc: tuple[str, ...], merged: dict[str, Any]) -> tuple[str, ...]:
    # pydantic appends the member of a union or a constraint's name to the location; keep what is really in the recipe.
    path: list[str] = []
    current: Any = merged
    for part in loc:
        if isinstance(current, dict) and part in current:
            path.append(part)
            current = current[part]
        else:
            break
    return tuple(path)


def _section_fields(path: tuple[str, ...]) -> dict[str, Any]:
    model: Any = Recipe
    for part in path:
        annotation = model.model_fields[part].annotation
        if isinstance(annotation, types.UnionType) or not hasattr(annotation, "model_fields"):
            return {}
        model = annotation
    return dict(model.model_fields)


def _anchor_data_path(data: dict[str, Any], folder: Path) -> None:
    """A data path in a recipe may be relative to the recipe's folder; make it work from anywhere."""
    section = data.get("data")
    given = section.get("path") if isinstance(section, dict) else None
    if isinstance(given, str) and not given.startswith("shipped:"):
        beside = folder / given
        is_file = Path(given).suffix.lower() in TABLE_SUFFIXES or given.startswith(".")
        if beside.exists() and (is_file or beside.is_dir()) and not Path(given).is_absolute():
            data["data"]["path"] = str(beside.resolve())
