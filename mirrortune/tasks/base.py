# SPDX-License-Identifier: Apache-2.0
"""Kinds of task. A kind is one file in this folder, named like the kind, with a class ``Task``; a dataset is one YAML
recipe.

The file's name is its registration: ``text_classification.py`` is ``text-classification``. The keyword parameters of
its ``from_rows`` are the settings that it takes from the recipe's ``task`` and ``data`` sections, besides the scores
that every kind has.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from typing import Any, Protocol, get_type_hints

import pyarrow as pa
from torch import Tensor

from mirrortune.config.recipe import task_kinds
from mirrortune.data.dataset import Split
from mirrortune.data.examples import OPTIONAL_ROLE, Batch, Examples, Targets
from mirrortune.data.files.column_problems import refuse_unreadable
from mirrortune.data.tokenize import Reading
from mirrortune.errors import ConfigError, DataError, VerificationError, did_you_mean, unknown_name
from mirrortune.models.load import ModelSource
from mirrortune.registry import option_errors
from mirrortune.tasks.metrics import KINDS_OWN, Scores

_VOCABULARY_CLASSES = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
TARGET_ROLES = ("label", "tag", "answer", "target")
"""Words by which :meth:`Task.columns` calls what is learned."""
_MOST_NAMED = 8  # columns in a note


class Task(Protocol):
    """What the data, the loop, the evaluation and the files require of a kind of task; a frozen dataclass of JSON data,
    made once the columns are known.

    Attributes:
        kind: the kind's name.
        auto_class: name of the transformers class that loads a model for it.
        metric_names: metrics of every evaluation; the first one is not special.
        selection_metric: the metric (one of them) by which the best checkpoint is kept.
    """

    kind: str
    auto_class: str
    metric_names: tuple[str, ...]
    selection_metric: str

    @classmethod
    def from_rows(
        cls, table: pa.Table, source: str, scores: Scores = KINDS_OWN, **settings: Any
    ) -> tuple[Task, list[str]]:
        """The task with its columns and label space read from the training rows, and a note for each column that was
        detected rather than named.

        Raises:
            DataError, ConfigError: if rows or settings do not fit the kind.
        """

    def columns(self) -> list[tuple[str, str]]:
        """(role, column) of every column that is read; the roles are words for messages, but for those that a split may
        lack (:data:`mirrortune.data.examples.OPTIONAL_ROLE`).
        """

    def strata(self, split: Split) -> Targets | None:
        """The groups that cutting the split must keep in proportion, shape (N,), or None; DataError if a row has no
        label.
        """

    def config_fields(self) -> dict[str, Any]:
        """Fields of the transformers config that fix the head's size and labels."""

    def load_processor(self, source: ModelSource) -> Any:
        """What turns rows into the model's inputs: a tokenizer or more. It has ``save_pretrained``."""

    def resolve_length(self, asked: int | None, processor: Any, config: Any) -> int | None:
        """The longest row, in the kind's own unit, or None where all are of one size; ConfigError if ``asked`` does not
        fit.
        """

    def encode(self, split: Split, processor: Any, reading: Reading) -> Examples:
        """The rows as the model takes them; DataError for rows that cannot be used."""

    def loss(self, outputs: Any, targets: Tensor) -> tuple[Tensor, int | Tensor]:
        """Sum of the losses of all items of a batch, and how many items it sums over: a tensor where reading the number
        would wait for the device.
        """

    def judge(self, model: Any, inputs: Batch, outputs: Any, targets: Tensor) -> Sequence[Any]:
        """What predictions need to know of each row of a scored batch, on the CPU."""

    def answers(self, judged: Sequence[Any], examples: Any) -> tuple[Any, Any]:
        """Predictions and references as the kind's metrics compare them, from what was judged of every row, in the
        order of ``examples``.
        """

    def probe(self, processor: Any, config: Any) -> Batch:
        """A few inputs for the model's forward, on which a merged model is compared with base + adapter."""


def scores_vocabulary(task: Task) -> bool:
    """Whether the task's models give logits over a whole vocabulary at every position of every row."""
    return task.auto_class in _VOCABULARY_CLASSES


def task_class(kind: str, where: str = "task.kind") -> type[Task]:
    """The class of a kind; ConfigError with the nearest name otherwise."""
    if kind not in task_kinds():
        raise unknown_name(where, "kind of task", kind, task_kinds())
    module = importlib.import_module(f"mirrortune.tasks.kinds.{kind.replace('-', '_')}")
    return module.Task  # type: ignore[no-any-return]


def settings_of(kind: str) -> list[str]:
    """Names of the settings that a kind takes from the recipe."""
    parameters = inspect.signature(task_class(kind).from_rows).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


def task_to_dict(task: Task) -> dict[str, Any]:
    """Everything needed to evaluate again, as JSON data."""
    return asdict(task)  # type: ignore[call-overload, no-any-return]


def task_from_dict(data: dict[str, Any]) -> Task:
    """The task that :func:`task_to_dict` described; VerificationError for fields that no such task has."""
    found, where = task_class(data["kind"], "adapter.json: task"), "adapter.json: task"
    known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    errors = option_errors(known, get_type_hints(found), owner=f"task '{data['kind']}'", where=where)
    if errors:
        raise VerificationError(where, "; ".join(map(str, errors)), fix="Restore the adapter folder")
    try:
        task = found(**known)
    except (TypeError, ValueError) as error:
        raise VerificationError(where, f"damaged ({error})", fix="Restore the adapter folder") from error
    constants = {f.name: f.default for f in fields(found) if f.name in ("kind", "auto_class")}  # type: ignore[arg-type]
    if odd := [key for key, value in constants.items() if getattr(task, key) != value]:
        raise VerificationError(where, f"{odd[0]} is {getattr(task, odd[0])!r}", allowed=str(constants[odd[0]]))
    return task


def with_columns(task: Task, named: dict[str, Any]) -> Task:
    """The task on other data: ``named`` holds settings that name columns (None where they stay).

    Raises:
        ConfigError: a column that the kind does not read, or another number of them.
    """
    given = {key: value for key, value in named.items() if value is not None}
    for key, value in given.items():
        flag, now = "--" + key.replace("_", "-").removesuffix("s"), getattr(task, key, None)
        if now is None:
            raise ConfigError(flag, f"{task.kind} has none")
        if isinstance(now, tuple) and len(now) != len(value):
            raise ConfigError(flag, f"the run reads {len(now)} {key.split('_')[0]}s, got {len(value)}")
    return replace(task, **given)  # type: ignore[type-var]


def with_label_columns(split: Split, task: Task) -> Split:
    """The split with a column of nulls for each of the task's columns of targets that it lacks: rows to be answered
    often come without one.
    """
    table = split.table
    for role, column in task.columns():
        if role in TARGET_ROLES and column not in table.column_names:
            table = table.append_column(column, pa.nulls(table.num_rows))
    return replace(split, table=table)


def unused_columns(table: pa.Table, task: Task) -> str:
    """A note on the columns that a task does not read; "" if it reads all."""
    read = {column for _, column in task.columns()}
    names = [name for name in table.column_names if name not in read]
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    plural = "s" if len(names) > 1 else ""
    return f"column{plural} not used: {', '.join(names[:_MOST_NAMED])}{more}" if names else ""


def check_columns(split: Split, task: Task) -> None:
    """Refuse a split that lacks a column of the task, or where one cannot be read; DataError with those it has."""
    for role, column in task.columns():
        if column not in split.table.column_names and role != OPTIONAL_ROLE:
            raise DataError(
                split.source, f"it has no {role} column '{column}'.{did_you_mean(column, split.table.column_names)}",
                allowed=", ".join(split.table.column_names),
            )  # fmt: skip
    refuse_unreadable(split.table, [column for _, column in task.columns()])
