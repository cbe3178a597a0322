# SPDX-License-Identifier: Apache-2.0
"""Models with batch normalisation: a run reports scores that its adapter and its merged model have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from tests.cli.console import mirrortune
from tests.tiny_models import write_tiny_levit

FLAGS = ("--epochs", 3, "--batch-size", 4, "--lr", "1e-2", "--head-lr", "1e-2", "--json")


@pytest.fixture(scope="module")
def levit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny LeViT."""
    return write_tiny_levit(tmp_path_factory.mktemp("models") / "tiny-levit")


def write_images(folder: Path, rows: int = 10) -> None:
    """Class folders of noise that is brighter in one class."""
    random = np.random.default_rng(0)
    for label, level in (("dark", 0), ("light", 90)):
        (folder / label).mkdir(parents=True)
        for row in range(rows):
            pixels = level + random.integers(0, 160, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / label / f"{row}.png")


@pytest.mark.parametrize("method", ["mirror-scale", "full"])
def test_the_scores_of_a_run_are_those_of_its_adapter_and_of_its_merged_model(
    desk: Path, levit: Path, method: str
) -> None:
    write_images(desk / "img")
    words = ("-m", levit, "-t", "image-classification", "-d", "img", "--method", method, "-o", "run")
    trained = mirrortune("train", *words, *FLAGS).data["metrics"]
    assert mirrortune("eval", "run", "--json").data["metrics"] == trained

    verification = mirrortune("merge", "run", "-o", "merged", "--json").data["verification"]
    assert verification["passed"]
    assert verification["changed_tensors"] == 0
    merged = mirrortune("eval", "merged", "--json").data["metrics"]
    assert merged["loss"] == pytest.approx(trained["loss"], rel=1e-5)
    # The statistics of frozen layers are those of the base, and those of the new head have moved.
    before, after = load_file(levit / "model.safetensors"), load_file(desk / "merged" / "model.safetensors")
    own = "patch_embeddings.embedding_layer_1.batch_norm.num_batches_tracked"
    steps = int(after["classifier.batch_norm.num_batches_tracked"])
    assert steps > 0
    assert int(after[f"levit.{own}"]) == int(before[own]) + (steps if method == "full" else 0)


def test_an_epoch_may_end_with_a_batch_of_one_row(desk: Path, levit: Path) -> None:
    write_images(desk / "img")
    words = ("-m", levit, "-t", "image-classification", "-d", "img", "-o", "run", "--epochs", 1, "--batch-size", 4)
    trained = mirrortune("train", *words, "data.max_train_rows=5", "--json")
    assert trained.exit_code == 0, trained.stderr
    assert mirrortune("eval", "run", "--json").data["metrics"] == trained.data["metrics"]
