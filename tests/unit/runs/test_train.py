# SPDX-License-Identifier: Apache-2.0
"""Remarks on a run whose settings do not agree on its length."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mirrortune.runs.train import _remarks_on_steps
from tests.tiny_runs import SETTINGS


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_steps": 30}, ["train.max_steps=30 is not reached: train.epochs=2 ends after step 12"]),
        ({"max_steps": 12}, []),
        ({"warmup_steps": 12}, ["warning: the warm-up of 12 steps does not end within the 12 steps of the run"]),
        ({"warmup_steps": 11}, []),
    ],
)
def test_steps_that_a_run_does_not_have_are_remarked_on(settings: dict[str, int], says: list[str]) -> None:
    assert list(_remarks_on_steps(replace(SETTINGS, **settings), 12)) == says
