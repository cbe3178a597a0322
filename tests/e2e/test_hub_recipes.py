# SPDX-License-Identifier: Apache-2.0
"""Shipped recipes of images and of language models from Hub id to merged folder, through a Hub on loopback."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.e2e.test_hub_path import client
from tests.hub_rows import described, table
from tests.hub_server import LoopbackHub
from tests.tiny_models import tiny_chat_tokenizer, write_tiny_causal, write_tiny_vision

pytestmark = pytest.mark.slow


def publish(root: Path, repository: str, rows: int = 188) -> None:
    """Put a data set with made-up rows on the Hub, a parquet file for each split."""
    columns = described()[repository]["default"]
    folder = root / "datasets" / repository / "data"
    folder.mkdir(parents=True)
    (folder.parent / "README.md").write_text("Made-up rows.\n", encoding="utf-8")
    for split in columns["splits"]:
        pq.write_table(table(columns["columns"], rows), folder / f"{split}-00000-of-00001.parquet")


@pytest.mark.parametrize(
    ("task", "model", "repository", "words", "metrics"),
    [
        ("vision/dtd", "facebook/dinov2-small", "tanganke/dtd", ["data.augment=flip"], {"accuracy", "loss"}),
        ("llm/sft-alpaca", "HuggingFaceTB/SmolLM2-135M-Instruct", "tatsu-lab/alpaca", ["--max-length", 256],
         {"perplexity", "token_accuracy", "loss"}),
    ],
)  # fmt: skip
def test_a_recipe_from_the_hub_to_a_merged_folder(
    tmp_path: Path, task: str, model: str, repository: str, words: list[object], metrics: set[str]
) -> None:
    root = tmp_path / "hub"
    folder = root / "models" / model
    if task.startswith("vision"):
        write_tiny_vision(folder)
    else:
        write_tiny_causal(folder, max_position_embeddings=512)
        tokenizer = tiny_chat_tokenizer()
        tokenizer.model_max_length = 512
        tokenizer.save_pretrained(folder)
    publish(root, repository)
    with LoopbackHub(root) as hub, client(hub, tmp_path / "client") as ours:
        trained = ours.mirrortune("train", "-m", model, "-t", task, "--max-steps", 2, "-o", "run", "--json", *words)
        scored = ours.mirrortune("eval", "run", "--json")
        merged = ours.mirrortune("merge", "run", "-o", "merged", "--json")
        again = ours.mirrortune("eval", "merged", "--json")

    assert trained.data["metrics"].keys() == metrics
    assert scored.data["metrics"] == pytest.approx(trained.data["metrics"], abs=1e-4)
    assert merged.data["verification"]["passed"]
    assert again.data["metrics"] == pytest.approx(trained.data["metrics"], abs=1e-3)
