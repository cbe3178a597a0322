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
from mirrortune.errors import ConfigError, DataError, VerificationError, did_you_mean, first_of, unknown_name
from mirrortune.models.load import ModelSource, load_tokenizer
from mirrortune.registry import option_errors, task_kinds
from mirrortune.tasks.metrics import KINDS_OWN, Scores
from mirrortune.tasks.predicting import Predictions, PredictOptions, refuse_no_tokens
from mirrortune.tasks.probes import text_probe

_VOCABULARY_CLASSES = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
TARGET_ROLES = ("label", "tag", "answer", "target")
"""Roles in :meth:`Task.columns` of the columns that hold targets."""
RARE = MappingProxyType({"rare": True})
"""Metadata of a field that is stored only if it differs from its default."""
_MOST_NAMED = 8  # maximum number of columns that a note lists


class Task(ABC):
    """The interface of a kind of task for data, training, evaluation and adapter files.

    A kind is a frozen dataclass whose fields are JSON data; it is created once the columns are known.

    Attributes:
        kind: name of the kind.
        auto_class: name of the transformers class that loads its models.
        metric_names: metrics that every evaluation computes.
        selection_metric: metric among them that selects the best checkpoint.
    """

    __slots__ = ()
    kind: str
    auto_class: str
    metric_names: tuple[str, ...]
    selection_metric: str

    @classmethod
    @abstractmethod
    def from_rows(cls, table: pa.Table, source: str, scores: Scores = KINDS_OWN) -> tuple[Task, list[str]]:
        """Create the task with the columns and labels found in the training rows.

        Returns:
            The task, and a note for each column that was detected rather than named.

        Raises:
            DataError, ConfigError: rows or settings do not fit the kind of task.
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
            DataError: the label of a row is missing or cannot be read.
        """
        return None

    def for_model(self, source: ModelSource) -> tuple[Task, list[str]]:
        """Return the task completed with settings from the folder of its model, and notes for the user.

        Raises:
            ConfigError: the model does not fit the kind of task.
        """
        return self, []

    def united(self, others: Sequence[Task]) -> Task | None:
        """Return a task that reads rows of several sources, each with its own columns: of this task, and of ``others``.

        Returns:
            The task; None if the kind requires the same column names in all sources.
        """
        return None

    def trim(self, model: nn.Module) -> nn.Module:
        """Remove the modules that no output of the task depends on, in place; they are neither trained nor run."""
        return model

    def config_fields(self) -> dict[str, Any]:
        """Return the fields of the transformers configuration that define the size and labels of the head."""
        return {}

    @abstractmethod
    def load_processor(self, source: ModelSource) -> Any:
        """Load the processor of rows (a tokenizer, an image processor, ...), which has ``save_pretrained``."""

    @abstractmethod
    def resolve_length(self, asked: int | None, processor: Any, config: Any) -> int | None:
        """Return the maximum length of a row in tokens; None for rows that are not text.

        Raises:
            ConfigError: the model does not support the requested length ``asked``.
        """

    @abstractmethod
    def encode(self, split: Split, processor: Any, reading: Reading) -> Examples:
        """Convert the rows of a split to model inputs; raise a DataError for invalid rows."""

    @abstractmethod
    def loss(self, inputs: Batch, outputs: Any, targets: Tensor) -> tuple[Tensor, int | Tensor]:
        """Return the summed loss of a batch, and the number of items summed over.

        This number is a tensor if an int would require synchronisation with the device.
        """

    @abstractmethod
    def judge(self, model: Any, inputs: Batch, outputs: Any, targets: Tensor) -> Iterable[Any]:
        """Reduce the outputs of a batch to the data that :meth:`answers` needs, one entry per row, on the CPU."""

    @abstractmethod
    def answers(self, judged: Sequence[Any], examples: Any) -> tuple[Any, Any]:
        """Return predictions and references for the metrics of the task, from the judged rows of ``examples``."""

    def probabilities(self, judged: Sequence[Any]) -> npt.NDArray[np.float64] | None:
        """Return the probability of each class (N, C), which some metrics need; None for kinds without classes."""
        return None

    def target_columns(self) -> list[str]:
        """Return the columns of targets, which may be missing in rows to predict."""
        return [column for role, column in self.columns() if role in TARGET_ROLES]

    def narrowed(self, columns: Collection[str]) -> Task:
        """Return the task for rows to predict that have only ``columns``, if some of its columns are optional then."""
        return self

    def prediction_options(self) -> tuple[str, ...]:
        """Return the names of the fields of :class:`PredictOptions` that the task uses, except ``seed``."""
        return ()

    def encode_to_predict(self, split: Split, processor: Any, reading: Reading, options: PredictOptions) -> Examples:
        """Convert the rows of a split to model inputs without targets; columns of targets may be missing.

        Raises:
            ConfigError: an option is not used by the task, or out of its range.
            DataError: a row is invalid.
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
            judged: results of :meth:`judge`, in the order of ``examples``.
            examples: result of :meth:`encode_to_predict`.
            split: the rows.
            options: options that ``examples`` were encoded with.

        Raises:
            VerificationError: the output of the model for a row is NaN.
        """

    @abstractmethod
    def probe(self, processor: Any, config: Any) -> Batch:
        """Return a small batch of inputs, on which the outputs of a merged model are compared with base + adapter."""

    def compared(self, inputs: Batch, outputs: Any) -> Any:
        """Return the values by which a merged model is compared: its outputs, or values computed from them, by name."""
        return outputs


class HasLabels(ABC):
    """A task that predicts named classes or tags.

    Attributes:
        labels: names of the classes or tags, in the order of the model's outputs.
    """

    __slots__ = ()
    labels: tuple[str, ...]


class Generates(ABC):
    """A task that is scored by generated text.

    Attributes:
        max_target_length: maximum length of targets and of generated texts, in tokens.
    """

    __slots__ = ()
    max_target_length: int


class Answers(ABC):
    """A task that can be scored by generated answers, in addition to the tokens of the right answers.

    Attributes:
        answer: format of answers; None to generate none.
        max_new_tokens: maximum length of a generated answer, in tokens.
    """

    __slots__ = ()
    answer: str | None
    max_new_tokens: int


class WritesText(ABC):
    """A task whose predictions are texts."""

    __slots__ = ()

    @abstractmethod
    def asked(self, split: Split) -> tuple[Split, list[str]]:
        """Return rows as prompts for samples of generated text, and the expected text of each."""


class ComparesRows(ABC):
    """A task whose loss compares each row with other rows: in training with those of the micro-batch on all ranks, in
    evaluation with all rows of the split.
    """

    __slots__ = ()

    @classmethod
    @abstractmethod
    def to_predict(
        cls, table: pa.Table, source: str, text_columns: tuple[str, ...] | None = None
    ) -> tuple[Task, list[str]]:
        """Create the task for rows that are not compared, such as a corpus to embed.

        Args:
            table: the rows.
            source: name of the table in messages.
            text_columns: columns of text; None to detect them.

        Returns:
            The task, and notes on what was detected.

        Raises:
            DataError: there is no candidate for the text column, or several.
        """

    @abstractmethod
    def vectors(self, inputs: Batch, outputs: Any) -> Tensor:
        """Return the vectors by which rows are compared, shape (B, ...), float32."""

    @abstractmethod
    def loss_of_rows(self, vectors: Tensor, targets: Tensor, is_row: Tensor, own: slice) -> tuple[Tensor, int]:
        """Return the loss summed over the rows ``own``, each compared with all rows, and the number of these rows.

        Args:
            vectors: vectors of all rows, from :meth:`vectors`, shape (N, ...).
            targets: targets of all rows, shape (N, ...).
            is_row: False for placeholders, which are not compared, shape (N,).
            own: slice of the rows to sum over.
        """

    @abstractmethod
    def loss_of_split(self, judged: Sequence[Any], examples: Any) -> float:
        """Return the mean loss of the judged rows of a split, each compared with all rows."""

    @abstractmethod
    def difficulty(self, predictions: Any, references: Any) -> npt.NDArray[np.float64]:
        """Return the distance of each row from its right rank, (N,), given the results of :meth:`Task.answers`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerReader:
    """A processor that consists of a tokenizer and further settings.

    Attributes:
        tokenizer: a transformers tokenizer.
        switches: additional arguments of the model's ``forward``.
    """

    tokenizer: Any
    switches: dict[str, bool] = field(default_factory=dict)

    @property
    def pad_token_id(self) -> int | None:
        """Id of the padding token."""
        found: int | None = self.tokenizer.pad_token_id
        return found

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the tokenizer."""
        self.tokenizer.save_pretrained(folder)


class TextTask(Task):
    """A task whose processor is the model's tokenizer.

    Attributes:
        text_columns: columns of text, in the order in which the model reads them.
        version: version of the code that tokenises rows.
    """

    __slots__ = ()
    text_columns: tuple[str, ...]
    version: int

    @property
    def code(self) -> tuple[str, int]:
        """Kind and version, for the cache key of tokens."""
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
    """Return whether the models of the task output logits over a vocabulary at each position."""
    return task.auto_class in _VOCABULARY_CLASSES


def generated_tokens(task: Task) -> int:
    """Return the maximum number of tokens that are generated to score a row; 0 if none are."""
    if isinstance(task, Answers) and task.answer is not None:
        return task.max_new_tokens
    return task.max_target_length if isinstance(task, Generates) else 0


def labels_of(task: Task) -> tuple[str, ...]:
    """Return the names of the classes or tags of a task; empty if it has none."""
    return task.labels if isinstance(task, HasLabels) else ()


def task_class(kind: str, where: str = "task.kind") -> type[Task]:
    """Return the class of a kind of task; raise a ConfigError with the nearest name if the kind is unknown."""
    if kind not in task_kinds():
        raise unknown_name(where, "kind of task", kind, task_kinds())
    module = importlib.import_module(f"mirrortune.tasks.kinds.{kind.replace('-', '_')}")
    return module.Task  # type: ignore[no-any-return]


def settings_of(kind: str) -> list[str]:
    """Return the names of the recipe settings of a kind of task."""
    parameters = inspect.signature(task_class(kind).from_rows).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


def task_to_dict(task: Task) -> dict[str, Any]:
    """Return the task as JSON data, without :data:`RARE` fields that have their default; see :func:`task_from_dict`."""
    unset = {f.name for f in fields(task) if f.metadata.get("rare") and getattr(task, f.name) == f.default}  # type: ignore[arg-type]
    found: dict[str, Any] = asdict(task)  # type: ignore[call-overload]
    return {name: value for name, value in found.items() if name not in unset}


def task_from_dict(data: dict[str, Any]) -> Task:
    """Restore the task from the result of :func:`task_to_dict`; raise a VerificationError for invalid fields."""
    found, where = task_class(data["kind"], "adapter.json: task"), "adapter.json: task"
    known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    errors = option_errors(known, get_type_hints(found), owner=f"task '{data['kind']}'", where=where)
    if errors:
        raise VerificationError(where, "; ".join(map(str, errors)), fix="Restore the adapter folder")
    known.pop("version", None)  # rows are tokenised by the present code, whichever wrote the file
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
        task: trained task.
        named: new values of the settings that name columns; None to keep a value.
        to_predict: allow fewer text columns if the task supports it, as for a corpus to embed.

    Raises:
        ConfigError: the kind of task has no such column, or needs a different number of them.
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
    """Return the task with the columns, and the settings on how they are written, of another task of its kind."""
    return replace(task, **{name: getattr(other, name) for name in _READING if hasattr(other, name)})  # type: ignore[type-var]


def with_label_columns(split: Split, task: Task) -> Split:
    """Return the split with a column of nulls for each missing target column, because rows to predict may have none."""
    return split.with_columns(column for role, column in task.columns() if role in TARGET_ROLES)


def without_targets(split: Split, task: Task) -> Split:
    """Return the split with nulls in all target columns, including missing ones."""
    targets = task.target_columns()
    kept = [column for column in split.table.column_names if column not in targets]
    return replace(split, table=split.table.select(kept)).with_columns(targets)


def check_alike(tasks: Sequence[Task], names: Sequence[str]) -> None:
    """Check that the tasks of several sources, called ``names``, have the same columns.

    Raises:
        DataError: two sources differ; the error names them.
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
    """Return a note on the columns that a task does not use; "" if it uses all."""
    read = {SOURCE_COLUMN, *(column for _, column in task.columns())}
    names = [name for name in table.column_names if name not in read]
    return f"column{'s' * (len(names) > 1)} not used: {first_of(names, _MOST_NAMED)}" if names else ""


def check_columns(split: Split, task: Task) -> None:
    """Check that a split has all columns of the task, with suitable types; raise a DataError if not."""
    for role, column in task.columns():
        if column not in split.table.column_names and role != OPTIONAL_ROLE:
            raise DataError(
                split.source, f"it has no {role} column '{column}'.{did_you_mean(column, split.table.column_names)}",
                allowed=first_of(split.table.column_names),
            )  # fmt: skip
    refuse_unreadable(split.table, [column for _, column in task.columns()])
    # Rows of a language model, which may be conversations, are checked one by one when they are read.
    for column in task.text_columns if isinstance(task, TextTask) and not isinstance(task, Answers) else ():
        check = check_words_type if ("word", column) in task.columns() else check_text_type
        check(split.table, column, split.source)
