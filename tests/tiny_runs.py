# SPDX-License-Identifier: Apache-2.0
"""Tiny adapted models and whole training loops on them: a BERT of two layers, sentences that a word decides."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from mirrortune.adapters.files.adapter_file import write_adapter
from mirrortune.adapters.files.load import FingerprintBook
from mirrortune.adapters.inject import FactorSource, attach, spectral_layers
from mirrortune.adapters.spec import AdapterSpec
from mirrortune.data.dataset import Split
from mirrortune.data.examples import Padding, TokenExamples
from mirrortune.data.loader import StreamedExamples
from mirrortune.data.tokenize import Reading
from mirrortune.system.run_directory import RunDirectory
from mirrortune.tasks.kinds.text_classification import Task
from mirrortune.tasks.objective import Objective
from mirrortune.training.settings import LoopSettings
from mirrortune.training.trainer import Trainer
from tests.spectral import train_a_little
from tests.tiny_models import WORDS, tiny_bert, tiny_tokenizer

MIRROR = AdapterSpec()
HEAD = ("classifier.weight", "classifier.bias")
GOOD = ("good", "great", "wonderful", "lovely", "brilliant")
BAD = ("bad", "awful", "terrible", "boring", "dreadful")


@dataclass(frozen=True, slots=True)
class Adapted:
    """An adapted tiny model with the fingerprints of its layers."""

    model: nn.Module
    book: FingerprintBook

    def save(self, folder: Path, **base: Any) -> Path:
        """Write the adapter into ``folder``, which is made."""
        folder.mkdir(parents=True)
        identity = {"name": "tiny", "revision": None, "commit": None, "dtype": "float32"}
        identity["auto_class"] = "AutoModelForSequenceClassification"
        write_adapter(folder, self.model, self.book.entries, base={**identity, **base}, task=None, extra={})
        return folder

    def logits(self) -> Tensor:
        """Outputs for a few fixed inputs."""
        return logits(self.model)


def adapt(
    spec: AdapterSpec = MIRROR,
    *,
    model: nn.Module | None = None,
    trained: int | None = 0,
    source: FactorSource | None = None,
) -> Adapted:
    """A tiny BERT with an adapter.

    Args:
        spec: of the adapter.
        model: in place of the tiny BERT.
        trained: seed of random numbers for the cores and the head; None leaves them untrained.
        source: of factors; None computes them.
    """
    book = FingerprintBook()
    adapted = attach(model or tiny_bert(), spec, new_parameters=HEAD, factor_source=source, on_layer=book)
    if trained is not None:
        for index, layer in enumerate(spectral_layers(adapted).values()):
            train_a_little(layer.core, trained + index)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(trained)
            for parameter in (p for n, p in adapted.named_parameters() if n in HEAD):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return Adapted(adapted.eval(), book)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Outputs of any tiny model for a few fixed inputs, in evaluation mode."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(5, 45, (3, 9), generator=generator)
    return torch.as_tensor(model.eval()(input_ids=ids).logits)


def classification(**fields: Any) -> Task:
    """Two classes, ``bad`` and ``good``."""
    settings: dict[str, Any] = {
        "metric_names": ("accuracy",),
        "selection_metric": "accuracy",
        "labels": ("bad", "good"),
    }
    return Task(text_columns=("text",), label_column="label", **{**settings, **fields})


def sentences(rows: int, seed: int = 0) -> TokenExamples:
    """Sentences of 3 to about 20 tokens with one telling word each, and its class."""
    random = np.random.default_rng(seed)
    plain = [word for word in WORDS if word not in (*GOOD, *BAD, "not")]
    texts, labels = [], []
    for _ in range(rows):
        label = int(random.integers(2))
        words = list(random.choice(plain, size=random.integers(0, 18)))
        words.insert(int(random.integers(len(words) + 1)), str(random.choice(GOOD if label else BAD)))
        texts.append(" ".join(words))
        labels.append(("bad", "good")[label])
    split = Split(table=pa.table({"text": texts, "label": labels}), source="sentences")
    return classification().encode(split, tiny_tokenizer(), Reading(max_length=32))


def as_examples(ids: list[list[int]], types: list[list[int]] | None = None, tokenizer: Any = None) -> TokenExamples:
    """Rows of token ids (and types), to be padded as ``tokenizer`` does; each row's target is its number."""
    columns = {"input_ids": ids} if types is None else {"input_ids": ids, "token_type_ids": types}
    return TokenExamples(
        features={name: np.concatenate([np.array(row, np.int32) for row in rows]) for name, rows in columns.items()},
        offsets=np.concatenate([[0], np.cumsum([len(row) for row in ids])]),
        targets=np.arange(len(ids)),
        padding=Padding.of(tokenizer or tiny_tokenizer()),
        max_length=64,
    )


SETTINGS = LoopSettings(
    lr=3e-2,
    head_lr=1e-2,
    batch_size=8,
    gradient_accumulation_steps=1,
    epochs=2,
    max_steps=None,
    schedule="linear",
    warmup_ratio=0.1,
    weight_decay=0.01,
    max_grad_norm=1.0,
    seed=0,
    eval_every_steps=None,
    save_every_steps=None,
    log_every_steps=1,
    keep=1,
    patience=None,
    num_workers=1,
    eval_batch_size=16,
    eval_max_positions=None,
    eval_before=False,
)


class Watcher:
    """A progress that remembers what it was told and may act after a step, or when rows were scored."""

    def __init__(
        self, after_step: Callable[[int], None] | None = None, after_rows: Callable[[int], None] | None = None
    ) -> None:
        self.started: list[tuple[int, int]] = []
        self.losses: list[float] = []
        self.rows: list[int] = []
        self.tokens: list[int | None] = []
        self.shown: list[int] = []
        self.signals: list[int] = []
        self.events: list[dict[str, Any]] = []
        self.evaluated = 0
        self._after_step, self._after_rows = after_step, after_rows

    def on_start(self, total_steps: int, done_steps: int) -> None:
        self.started.append((total_steps, done_steps))

    def on_step(self, step: int, rows: int, tokens: int | None) -> None:
        self.rows.append(rows)
        self.tokens.append(tokens)
        if self._after_step:
            self._after_step(step)

    def on_show(self, step: int, epoch: float, loss: float) -> None:
        self.shown.append(step)

    def on_signal(self, number: int) -> None:
        self.signals.append(number)

    def on_log(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        if event["event"] == "train":
            self.losses.append(event["loss"])

    def on_evaluate(self, rows: int) -> None:
        self.evaluated += rows
        if self._after_rows:
            self._after_rows(self.evaluated)


def terminate_after(step: int) -> Watcher:
    """A progress that sends this process SIGTERM after ``step``, as a scheduler would."""
    return Watcher(lambda done: signal.raise_signal(signal.SIGTERM) if done == step else None)


def terminate_after_rows(rows: int) -> Watcher:
    """A progress that sends this process SIGTERM while it evaluates, once ``rows`` rows were scored in all."""
    return Watcher(after_rows=lambda done: signal.raise_signal(signal.SIGTERM) if done == rows else None)


def make_accelerator() -> Any:
    """accelerate's object for one process on the CPU."""
    from accelerate import Accelerator

    return Accelerator(cpu=True)


def make_trainer(
    folder: Path,
    *,
    adapted: Adapted | None = None,
    train: TokenExamples | StreamedExamples | None = None,
    validation: TokenExamples | None = None,
    progress: Watcher | None = None,
    fresh: bool = True,
    objective: Objective | None = None,
    **settings: Any,
) -> Trainer:
    """A loop over 30 sentences, in a new run directory unless ``fresh`` is false.

    Args:
        folder: the run directory.
        adapted: model; an untrained adapter in the tiny BERT by default.
        train, validation: splits in place of the sentences.
        progress: is told.
        fresh: whether to make the run directory.
        objective: training loss.
        **settings: fields of ``LoopSettings`` that differ from ``SETTINGS``.
    """
    found = adapted or adapt(trained=None)
    run = RunDirectory(folder)
    if fresh:
        run.create()

    def write(target: Path) -> int:
        return write_adapter(target, found.model, found.book.entries, base={"name": "tiny"}, task=None, extra={})

    return Trainer(
        found.model,
        classification(),
        train=train or sentences(30),
        validation=validation or sentences(20, seed=1),
        settings=replace(SETTINGS, **settings),
        run=run,
        write_adapter_files=write,
        accelerator=make_accelerator(),
        progress=progress or Watcher(),
        objective=objective,
    )
