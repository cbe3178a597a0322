# SPDX-License-Identifier: Apache-2.0
"""A folder to run commands in, with data of the user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.console import reviews, write_table


@pytest.fixture(scope="module", autouse=True)
def undrawn(request: pytest.FixtureRequest) -> None:
    """Leave figures undrawn, but in modules that are marked ``figures``."""
    if request.node.get_closest_marker("figures") is None:
        request.getfixturevalue("quick_figures")


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of the test: it holds ``reviews.csv``, 60 rows, and nothing else."""
    folder = tmp_path / "desk"
    write_table(folder / "reviews.csv", reviews(60))
    monkeypatch.chdir(folder)
    return folder
