# SPDX-License-Identifier: Apache-2.0
"""A folder to run commands in, with data of the user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.console import reviews, write_table
from tests.tiny_models import write_tiny_causal


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


@pytest.fixture(scope="session")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama with a chat template; read only."""
    return write_tiny_causal(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a template; read only."""
    return write_tiny_causal(tmp_path_factory.mktemp("models") / "tiny-llama-base", template=None)
