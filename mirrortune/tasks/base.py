# SPDX-License-Identifier: Apache-2.0
"""The interface of a kind of task, and the functions that work on any kind.

A kind is one file in ``tasks/kinds/`` with a class ``Task``; a data set is one YAML recipe. The name of the file
registers the kind: ``text_classification.py`` is ``text-classification``. The keyword-only parameters of ``from_rows``
are the settings that the kind takes from the recipe's ``task`` and ``data`` sections, in addition to the metrics, which
all kinds take.
"""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from torch import Tensor, nn
from typing_extensions import override

from mirrortune.data.columns import check_text_type, check_words_type
from mirrortune.data.dataset import Split
from mirrortune.data.examples import OPTIONAL_ROLE, Batch, Examples, Targets
from mirrortune.data.files.arrow import refuse_unreadable
from mirrortune.data.mixture import SOURCE_COLUMN
from mirrortune.data.tokenize import Reading, resolve_max_length
from mirrortune.errors import ConfigError, DataError, VerificationError, did_you_mean, unknown_name
from mirrortune.models.load import ModelSource, load_tokenizer
from mirrortune.registry import option_errors, task_kinds
from mirrortune.tasks.metrics import KINDS_OWN, Scores
from mirrortune.tasks.predicting import Predictions, PredictOptions, refuse_no_tokens
from mirrortune.tasks.probes import text_probe

_VOCABULARY_CLASSES = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
TARGET_ROLES = ("label", "tag", "answer", "target")
"""Roles of the columns, among those of :meth:`Task.columns`, that hold what the model learns to predict."""
RARE = MappingProxyType({"rare": True})
"""Metadata of a field that is stored only if it differs from its default."""
_MOST_NAMED = 8  # columns in a note


class Task(ABC):
    """What data, training, evaluation and adapter files need to know of a kind of task.

    A kind is a frozen dataclass whose fields are JSON data; it is created once the columns are known.

    Attributes:
        kind: name of the kind.
        auto_class: name of the transformers class that loads its models.
        metric_names: metrics that every evaluation computes.
        selection_metric: the one of them that chooses the best checkpoint.
    """

    __slots__ = ()
    kind: str
    auto_class: str
    metric_names: tuple[str, ...]
    selection_metric: str

    @classmethod
    @abstractmethod
    def from_rows(cls, table: pa.Table, source: str, scores: Scores = KINDS_OWN) -> tuple[Task, list[str]]:
        """Create the task from the training rows, which give its columns and labels.

        Returns:
            The task, and a note for each column that was detected rather than named.

        Raises:
            DataError, ConfigError: if rows or settings do not fit the kind.
        """

    @abstractmethod
    def columns(self) -> list[tuple[str, str]]:
        """Return (role, column) for every column that is read. Roles are words for messages, except
        :data:`TARGET_ROLES` and :data:`mirrortune.data.examples.OPTIONAL_ROLE` (a split may lack such a column).
        """

    def strata(self, split: Split) -> Targets | None:
        """Check the labels of a split, and return the groups that must keep their proportions when it is divided.

        Returns:
            A group for each row, shape (N,); None to divide at random.

        Raises:
            DataError: if a row has no label, or one that cannot be read.
        """
        return None

    def for_model(self, source: ModelSource) -> tuple[Task, list[str]]:
        """Return the task completed by what the folder of its model says, and notes for the user.

        Raises:
            ConfigError: if the model does not fit the kind.
        """
        return self, []

    def united(self, others: Sequence[Task]) -> Task | None:
        """Return a task that reads rows of several sources by the columns of each: those of this task, and of others.

        Returns:
            None where the columns of all sources must be called the same.
        """
        return None

    def trim(self, model: nn.Module) -> nn.Module:
        """Remove the modules that no output of the kind depends on, in place; they are neither trained nor run."""
        return model

    def config_fields(self) -> dict[str, Any]:
        """Return the fields of the transformers config that set the size and the labels of the model's head."""
        return {}

    @abstractmethod
    def load_processor(self, source: ModelSource) -> Any:
        """Load what turns rows into model inputs (a tokenizer, an image processor); it has ``save_pretrained``."""

    @abstractmethod
    def resolve_length(self, asked: int | None, processor: Any, config: Any) -> int | None:
        """Return the maximum length of a row in tokens, None for rows that are not text.

        Raises:
            ConfigError: if the model does not support the length ``asked`` for.
        """

    @abstractmethod
    def encode(self, split: Split, processor: Any, reading: Reading) -> Examples:
        """Convert the rows of a split to model inputs; DataError for rows that cannot be used."""

    @abstractmethod
    def loss(self, inputs: Batch, outputs: Any, targets: Tensor) -> tuple[Tensor, int | Tensor]:
        """Return the summed loss of a batch, from the inputs and outputs of the model, and the number of items.

        The number of items summed over is a tensor where an int would make the program wait for the device.
        """

    @abstractmethod
    def judge(self, model: Any, inputs: Batch, outputs: Any, targets: Tensor) -> Iterable[Any]:
        """Reduce the outputs of a batch to what :meth:`answers` needs, an entry for each row, on the CPU."""

    @abstractmethod
    def answers(self, judged: Sequence[Any], examples: Any) -> tuple[Any, Any]:
        """Return predictions and references, as the kind's metrics take them, from the judged rows of ``examples``."""

    def probabilities(self, judged: Sequence[Any]) -> npt.NDArray[np.float64] | None:
        """Return the probability of each class (N, C), which some metrics need; None for kinds without classes."""
        return None

    def target_columns(self) -> list[str]:
        """Return the columns that hold what the model learns to predict, which rows to predict may lack."""
        return [column for role, column in self.columns() if role in TARGET_ROLES]

    def narrowed(self, columns: Collection[str]) -> Task:
        """Return the task for rows to predict that have these columns, where it can do without some of its own."""
        return self

    def prediction_options(self) -> tuple[str, ...]:
        """Return the names of the fields of :class:`PredictOptions` that the task uses, besides ``seed``."""
        return ()

    def encode_to_predict(self, split: Split, processor: Any, reading: Reading, options: PredictOptions) -> Examples:
        """Convert the rows of a split, which may lack the columns of targets, to model inputs without these.

        Raises:
            ConfigError: for options that the task does not use, or out of their ranges.
            DataError: for rows that cannot be used.
        """
        options.check(self.kind, self.prediction_options())
        rows = without_targets(split, self)
        check_columns(rows, self)
        reading = replace(reading, allow_missing=True, drop_blank=False, for_training=False)
        examples = self.encode(rows, processor, reading)
        refuse_no_tokens(examples.lengths, split.places)
        return examples

    @abstractmethod
    def prediction_columns(
        self, judged: Sequence[Any], examples: Any, split: Split, options: PredictOptions
    ) -> Predictions:
        """Return the predictions of the rows of ``split`` as columns, ``prediction`` first.

        Args:
            judged: from :meth:`judge`, in the order of ``examples``.
            examples: from :meth:`encode_to_predict`.
            split: the rows.
            options: those that ``examples`` were made with.

        Raises:
            VerificationError: if the model's output for a row is NaN.
        """

    @abstractmethod
    def probe(self, processor: Any, config: Any) -> Batch:
        """Return a small batch of model inputs, on which a merged model is compared with base + adapter."""

    def compared(self, inputs: Batch, outputs: Any) -> Any:
        """Return what a merged model is compared by: its outputs, or others that follow from them, by name."""
        return outputs


class HasLabels(ABC):
    """A task whose predictions are among named classes or tags.

    Attributes:
        labels: their names, in the order of the model's outputs.
    """

    __slots__ = ()
    labels: tuple[str, ...]


class Generates(ABC):
    """A task that is scored by text that the model generates, token by token.

    Attributes:
        max_target_length: of targets and of generated texts, in tokens.
    """

    __slots__ = ()
    max_target_length: int


class Answers(ABC):
    """A task that can be scored by the answers that the model generates, besides the tokens of the right ones.

    Attributes:
        answer: how answers are written; None to generate none.
        max_new_tokens: longest answer that is generated, in tokens.
    """

    __slots__ = ()
    answer: str | None
    max_new_tokens: int


class WritesText(ABC):
    """A task whose predictions are texts."""

    __slots__ = ()

    @abstractmethod
    def asked(self, split: Split) -> tuple[Split, list[str]]:
        """Return the rows to show what the model writes, and the text that is expected of each."""


class ComparesRows(ABC):
    """A task whose loss compares rows with each other: with those of a micro-batch on all ranks in training, and with
    all rows of a split in evaluation.
    """

    __slots__ = ()

    @classmethod
    @abstractmethod
    def to_predict(
        cls, table: pa.Table, source: str, text_columns: tuple[str, ...] | None = None
    ) -> tuple[Task, list[str]]:
        """Create the task for rows without anything to be compared with, such as a corpus to embed.

        Args:
            table: the rows.
            source: name of the table in messages.
            text_columns: columns of text; None to detect them.

        Returns:
            The task, and notes on what was detected.

        Raises:
            DataError: no column, or several, could be meant.
        """

    @abstractmethod
    def vectors(self, inputs: Batch, outputs: Any) -> Tensor:
        """Return what rows are compared by, shape (B, ...), float32."""

    @abstractmethod
    def loss_of_rows(self, vectors: Tensor, targets: Tensor, is_row: Tensor, own: slice) -> tuple[Tensor, int]:
        """Return the summed loss of some rows among those that they are compared with, and their number.

        Args:
            vectors: from :meth:`vectors`, shape (N, ...).
            targets: shape (N, ...).
            is_row: False for fillers, which are compared with nothing, shape (N,).
            own: the rows that are summed over.
        """

    @abstractmethod
    def loss_of_split(self, judged: Sequence[Any], examples: Any) -> float:
        """Return the mean loss of the judged rows of a split, each compared with all of them."""

    @abstractmethod
    def difficulty(self, predictions: Any, references: Any) -> npt.NDArray[np.float64]:
        """Return how far each row is from where it should be among the others, (N,), from :meth:`Task.answers`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerReader:
    """A tokenizer, as part of the processor of a kind of task that needs more than it.

    Attributes:
        tokenizer: of transformers.
        switches: additional arguments of the model's forward.
    """

    tokenizer: Any
    switches: dict[str, bool] = field(default_factory=dict)

    @property
    def pad_token_id(self) -> int | None:
        """Id of the tokenizer's padding token."""
        found: int | None = self.tokenizer.pad_token_id
        return found

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer's files."""
        self.tokenizer.save_pretrained(folder)


class TextTask(Task):
    """A task whose processor is the model's tokenizer.

    Attributes:
        text_columns: columns of text, in the order in which the model reads them.
        version: of the code that makes the tokens.
    """

    __slots__ = ()
    text_columns: tuple[str, ...]
    version: int

    @property
    def code(self) -> tuple[str, int]:
        """Kind and version, for the key of cached tokens."""
        return self.kind, self.version

    @override
    def load_processor(self, source: ModelSource) -> Any:
        return load_tokenizer(source)

    @override
    def resolve_length(self, asked: int | None, processor: Any, config: Any) -> int:
        return resolve_max_length(asked, processor, config)

    @override
    def probe(self, processor: Any, config: Any) -> Batch:
        return text_probe(processor, config, num_texts=len(self.text_columns))


def scores_vocabulary(task: Task) -> bool:
    """Return whether the task's models output logits over a vocabulary at every position."""
    return task.auto_class in _VOCABULARY_CLASSES


def generated_tokens(task: Task) -> int:
    """Return how many tokens are generated for a row when it is scored, at most."""
    if isinstance(task, Answers) and task.answer is not None:
        return task.max_new_tokens
    return task.max_target_length if isinstance(task, Generates) else 0


def labels_of(task: Task) -> tuple[str, ...]:
    """Return the names of the task's classes or tags; empty if it has none."""
    return task.labels if isinstance(task, HasLabels) else ()


def task_class(kind: str, where: str = "task.kind") -> type[Task]:
    """Return the class of a kind of task; ConfigError with the nearest name if there is none."""
    if kind not in task_kinds():
        raise unknown_name(where, "kind of task", kind, task_kinds())
    module = importlib.import_module(f"mirrortune.tasks.kinds.{kind.replace('-', '_')}")
    return module.Task  # type: ignore[no-any-return]


def settings_of(kind: str) -> list[str]:
    """Return the names of the settings that a kind takes from the recipe."""
    parameters = inspect.signature(task_class(kind).from_rows).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


def task_to_dict(task: Task) -> dict[str, Any]:
    """Return the task as JSON data, enough to evaluate again; without fields of :data:`RARE` that are not set."""
    unset = {f.name for f in fields(task) if f.metadata.get("rare") and getattr(task, f.name) == f.default}  # type: ignore[arg-type]
    found: dict[str, Any] = asdict(task)  # type: ignore[call-overload]
    return {name: value for name, value in found.items() if name not in unset}


def task_from_dict(data: dict[str, Any]) -> Task:
    """Return the task that :func:`task_to_dict` described; VerificationError for unknown or damaged fields."""
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


def with_columns(task: Task, named: dict[str, Any], *, to_predict: bool = False) -> Task:
    """Return the task with other columns.

    Args:
        task: as trained.
        named: new values of settings that name columns; None leaves one unchanged.
        to_predict: accept fewer texts where the task can do without some, as for a corpus to embed.

    Raises:
        ConfigError: if the kind does not read such a column, or reads another number of them.
    """
    given = {key: value for key, value in named.items() if value is not None}
    for key, value in given.items():
        flag, now = "--" + key.replace("_", "-").removesuffix("s"), getattr(task, key, None)
        if now is None:
            raise ConfigError(flag, f"{task.kind} has none")
        can_be_fewer = to_predict and isinstance(task, ComparesRows)
        if isinstance(now, tuple) and len(now) != len(value) and not (can_be_fewer and len(value) < len(now)):
            raise ConfigError(flag, f"the run reads {len(now)} {key.split('_')[0]}s, got {len(value)}")
    return replace(task, **given)  # type: ignore[type-var]


_READING = (
    "text_columns", "choice_columns", "label_column", "image_column", "audio_column", "added_columns", "layout",
    "loss_on", "is_spaced", "formats",
)  # fmt: skip


def reading_like(task: Task, other: Task) -> Task:
    """Return the task with the columns of another task of its kind, and what it says of how these are written."""
    return replace(task, **{name: getattr(other, name) for name in _READING if hasattr(other, name)})  # type: ignore[type-var]


def with_label_columns(split: Split, task: Task) -> Split:
    """Return the split with a column of nulls for each target column that it lacks: rows to predict often come without
    one.
    """
    return split.with_columns(column for role, column in task.columns() if role in TARGET_ROLES)


def without_targets(split: Split, task: Task) -> Split:
    """Return the split with nulls in each target column, whether it is there or not."""
    targets = task.target_columns()
    kept = [column for column in split.table.column_names if column not in targets]
    return replace(split, table=split.table.select(kept)).with_columns(targets)


def check_alike(tasks: Sequence[Task], names: Sequence[str]) -> None:
    """Refuse sources of rows, called ``names``, that have other columns than the first.

    Raises:
        DataError: names two such sources.
    """
    described = [_roles(task) for task in tasks]
    for found, name in zip(described, names, strict=True):
        if [role for role, _ in found] != [role for role, _ in described[0]]:
            listed = [", ".join(f"{role} '{column}'" for role, column in own) for own in (described[0], found)]
            raise DataError(
                f"{names[0]} and {name}", f"their rows differ: one has {listed[0]}, the other {listed[1]}",
                allowed="data sets of one kind, with as many columns of each role",
                fix="Name the columns of each: data.path=[{path: ..., text_columns: [...]}, ...]",
            )  # fmt: skip


def _roles(task: Task) -> list[tuple[str, str]]:
    roles = [(role, column) for role, column in task.columns() if role != OPTIONAL_ROLE]
    return [(f"several {role}s" if role == "label" and getattr(task, "multi_label", False) else role, column)
            for role, column in roles]  # fmt: skip


def unused_columns(table: pa.Table, task: Task) -> str:
    """Return a note on the columns that a task does not read; "" if it reads all."""
    read = {SOURCE_COLUMN, *(column for _, column in task.columns())}
    names = [name for name in table.column_names if name not in read]
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    plural = "s" if len(names) > 1 else ""
    return f"column{plural} not used: {', '.join(names[:_MOST_NAMED])}{more}" if names else ""


def check_columns(split: Split, task: Task) -> None:
    """Check that a split has all columns of the task, and that they can be read as such; DataError otherwise."""
    for role, column in task.columns():
        if column not in split.table.column_names and role != OPTIONAL_ROLE:
            raise DataError(
                split.source, f"it has no {role} column '{column}'.{did_you_mean(column, split.table.column_names)}",
                allowed=", ".join(split.table.column_names),
            )  # fmt: skip
    refuse_unreadable(split.table, [column for _, column in task.columns()])
    # Rows of a language model, which may be conversations, are read one by one.
    for column in task.text_columns if isinstance(task, TextTask) and not isinstance(task, Answers) else ():
        check = check_words_type if ("word", column) in task.columns() else check_text_type
        check(split.table, column, split.source)
