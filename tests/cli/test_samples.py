# SPDX-License-Identifier: Apache-2.0
"""eval.samples and eval.max_rows from the command line: the run's page, and numbers that do not depend on samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.console import mirrortune, reviews, write_lines, write_table
from tests.tiny_models import write_tiny_causal


@pytest.fixture(scope="module")
def dropping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama with dropout, which draws random numbers at every training step."""
    return write_tiny_causal(tmp_path_factory.mktemp("models") / "tiny-llama", attention_dropout=0.2)


def test_samples_show_what_is_learned_and_change_no_number(desk: Path, dropping: Path) -> None:
    rows = [{"prompt": f"say {word}", "completion": "no no"} for word in "abcdefgh" * 3]
    write_lines(desk / "rows.jsonl", rows)
    words = ["train", "-m", dropping, "-t", "causal-lm", "-d", "rows.jsonl", "--max-steps", 4, "--batch-size", 4,
             "train.eval_every_steps=2", "train.log_every_steps=1", "eval.before=true", "--lr", 0.1]  # fmt: skip
    told = mirrortune(*words, "-o", "told")
    silent = mirrortune(*words, "-o", "silent", "eval.samples=0")

    assert (told.exit_code, silent.exit_code) == (0, 0), told.stderr + silent.stderr
    for name in ("metrics.jsonl", "adapter/adapter.safetensors"):
        assert (desk / "told" / name).read_bytes() == (desk / "silent" / name).read_bytes()
    entries = [json.loads(line) for line in (desk / "told" / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(e["step"], e["row"]) for e in entries] == [(step, row) for step in (0, 2, 4) for row in (1, 2)]
    assert {e["expected"] for e in entries} == {"no no"}
    assert all(e["prompt"].startswith("say ") for e in entries)
    page = (desk / "told" / "report.html").read_text(encoding="utf-8")
    for text in ("What it writes", "before training", "step 4", "validation row 2"):
        assert text in page
    assert not (desk / "silent" / "samples.jsonl").exists()
    assert "What it writes" not in (desk / "silent" / "report.html").read_text(encoding="utf-8")


def test_fewer_validation_rows_are_scored_and_said(desk: Path, tiny_model_dir: Path) -> None:
    write_table(desk / "many.csv", reviews(100))
    words = ["prepare", "-m", tiny_model_dir, "-t", "text-classification", "-d", "many.csv", "--dry-run", "--json"]
    outcome = mirrortune(*words, "eval.max_rows=4")

    assert outcome.data["rows"]["validation"] == 4
    assert "validation: 4 of 10 rows (eval.max_rows)" in outcome.stderr
    assert mirrortune(*words).data["rows"]["validation"] == 10
    refused = mirrortune(*words, "eval.samples=2", "eval.max_rows=0")
    assert refused.exit_code == 2
    assert "eval.samples: text-classification does not generate text, got 2. Remove it" in refused.said
    assert "eval.max_rows" in refused.said
