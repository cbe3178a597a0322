# SPDX-License-Identifier: Apache-2.0
"""evaluation: every row once, in the split's order, and nothing left changed."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mirrortune.data.examples import TokenExamples
from mirrortune.errors import DataError
from mirrortune.tasks.base import Task
from mirrortune.tasks.kinds import regression
from mirrortune.training.evaluate import EvalResult, evaluate_split
from tests.tiny_runs import as_examples, classification


@dataclass
class Output:
    """What transformers models return."""

    logits: Tensor


class Reader(nn.Module):
    """A model whose logits are (first token, sum of the real tokens): which row it saw, and whether padding counted."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []
        self.was_training: set[bool] = set()
        self.grad_enabled: set[bool] = set()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Output:
        self.batches.append(len(input_ids))
        self.was_training.add(self.training)
        self.grad_enabled.add(torch.is_grad_enabled())
        return Output(torch.stack([input_ids[:, 0], (input_ids * attention_mask).sum(dim=1)], dim=1).float())


# Row i begins with i + 1; lengths 3, 1, 4, 2, 3.
ROWS = [[1, 9, 9], [2], [3, 9, 9, 9], [4, 9], [5, 9, 9]]
SPLIT = replace(as_examples(ROWS), targets=np.array([0, 1, 0, 1, 0]))


def run(model: nn.Module, split: TokenExamples = SPLIT, task: Task | None = None, **options: Any) -> EvalResult:
    """Evaluate the rows."""
    settings = {"batch_size": 2, "source": "rows.csv", **options}
    return evaluate_split(model, task or classification(), split, Accelerator(cpu=True), **settings)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 100])
def test_every_row_is_scored_once_and_in_order(batch_size: int) -> None:
    model, told = Reader(), []
    result = run(model, batch_size=batch_size, on_batch=told.append)
    assert result.rows == 5
    assert np.stack(result.judged).tolist() == [[row[0], sum(row)] for row in ROWS]
    assert sum(model.batches) == sum(told) == 5
    assert model.batches == told
    assert max(told) <= batch_size


def test_metrics_and_loss_are_those_of_the_rows() -> None:
    result = run(Reader())
    logits, targets = torch.from_numpy(np.stack(result.judged)), torch.from_numpy(SPLIT.targets)
    assert result.metrics.keys() == {"accuracy", "loss"}
    assert result.metrics["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, targets)), rel=1e-6)
    assert result.metrics["accuracy"] == pytest.approx(float((logits.argmax(dim=1) == targets).float().mean()))


def test_regression_is_scored_too() -> None:
    class Number(Reader):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Output:
            return Output(super().forward(input_ids, attention_mask).logits[:, :1])

    task = regression.Task(
        text_columns=("text",), label_column="label", metric_names=("mse", "pearson"), selection_metric="mse"
    )
    targets = np.array([1, 2, 3, 4, 7], dtype=np.float32)
    result = run(Number(), replace(SPLIT, targets=targets), task)
    assert result.metrics["mse"] == result.metrics["loss"] == pytest.approx(4 / 5)
    assert result.metrics["pearson"] == pytest.approx(float(np.corrcoef(targets, [1, 2, 3, 4, 5])[0, 1]))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_its_mode(training: bool) -> None:
    model = Reader().train(training)
    run(model)
    assert model.training == training
    assert model.was_training == {False}
    assert model.grad_enabled == {False}


def test_the_longest_rows_come_first() -> None:
    """So that a batch that does not fit into memory is the first one."""

    class Widths(Reader):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Output:
            widths.append(input_ids.shape[1])
            return super().forward(input_ids, attention_mask)

    widths: list[int] = []
    run(Widths())
    assert widths == [4, 3, 1]


def test_rows_without_a_target_are_refused() -> None:
    split = replace(SPLIT, num_unlabelled=2)
    with pytest.raises(DataError, match=r"^rows\.csv: 2 of 5 rows have no label") as caught:
        run(Reader(), split)
    assert caught.value.exit_code == 3


def test_a_batch_holds_no_more_positions_than_it_may() -> None:
    """Longest first: rows of 4, 3, 3, 2, 1 with at most 6 positions a batch and 3 rows."""
    model, whole = Reader(), run(Reader(), batch_size=5)
    result = run(model, batch_size=3, max_positions=6)
    assert model.batches == [1, 2, 2]
    assert np.stack(result.judged).tolist() == np.stack(whole.judged).tolist()
    assert result.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-6)
    few = Reader()
    run(few, batch_size=3, max_positions=1)
    assert few.batches == [1] * 5, "a row that is too long is scored alone"


@pytest.mark.parametrize("limits", [{"batch_size": 2}, {"batch_size": 3, "max_positions": 4}])
def test_ranks_score_every_row_once_in_equally_many_batches(
    limits: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mirrortune.system.distributed.sync.gather_lists", lambda accelerator, own: collected.extend(own) or []
    )
    counts, rows = [], []
    for rank in range(2):
        collected: list[Any] = []
        model = Reader()
        alone: Any = SimpleNamespace(
            num_processes=2, process_index=rank, device=torch.device("cpu"), autocast=contextlib.nullcontext, state=None
        )
        with pytest.raises(AssertionError):  # this rank alone has not all rows
            evaluate_split(model, classification(), SPLIT, alone, source="rows", **limits)  # type: ignore[arg-type]
        counts.append(len(model.batches))
        rows += [int(row) for part in collected for row in part[0]]
    assert counts[0] == counts[1]
    assert sorted(rows) == [0, 1, 2, 3, 4]
