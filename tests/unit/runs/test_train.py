# SPDX-License-Identifier: Apache-2.0
"""Remarks on a run whose settings do not agree on its length."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest

from mirrortune.runs.prepare import remarks_on_steps
from mirrortune.runs.train import _remarks_on_batches
from mirrortune.tasks.base import task_class
from tests.tiny_runs import SETTINGS


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_steps": 30}, ["train.max_steps=30 is not reached: train.epochs=2 ends after step 12"]),
        ({"max_steps": 12}, []),
        ({"warmup_steps": 12}, ["warning: the warm-up of 12 steps does not end within the 12 steps of the run"]),
        ({"warmup_steps": 11}, []),
        (
            {"schedule": "cosine-restarts", "num_cycles": 12},
            ["warning: train.num_cycles=12 is not below the 12 steps of the run: nothing decays"],
        ),
        ({"schedule": "cosine-restarts", "num_cycles": 11}, []),
        (
            {"eval_every_steps": 13},
            ["train.eval_every_steps=13 is not reached: only the last step, 12, is scored"],
        ),
        ({"eval_every_steps": 12, "save_every_steps": 12}, []),
        (
            {"save_every_steps": 13},
            ["train.save_every_steps=13 is not reached: the best and the last step are saved"],
        ),
        (
            {"patience": 1},
            ["warning: train.patience=1 cannot end a run of 2 evaluations early: evaluate more often"],
        ),
        ({"patience": 1, "eval_every_steps": 4}, []),
        (
            {"patience": 2, "eval_every_steps": 5},
            ["warning: train.patience=2 cannot end a run of 3 evaluations early: evaluate more often"],
        ),
    ],
)
def test_steps_that_a_run_does_not_have_are_remarked_on(settings: dict[str, Any], says: list[str]) -> None:
    assert list(remarks_on_steps(replace(SETTINGS, **settings), 12, 6)) == says


@pytest.mark.parametrize(
    ("columns", "rows", "is_warned"),
    [
        (("sentence1", "sentence2"), 1, True),
        (("sentence1", "sentence2"), 2, False),
        (("sentence1", "sentence2", "score"), 1, True),
        (("anchor", "positive", "negative"), 1, False),
    ],
)
def test_a_batch_without_anything_to_compare_is_warned_of(columns: tuple[str, ...], rows: int, is_warned: bool) -> None:
    cells = {name: [1.0, 2.0] if name == "score" else [f"{name} a", f"{name} b"] for name in columns}
    task, _ = task_class("sentence-similarity").from_rows(pa.table(cells), "rows")

    assert any("nothing is learned" in text for text in _remarks_on_batches(task, rows)) is is_warned
