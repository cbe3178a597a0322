# SPDX-License-Identifier: Apache-2.0
"""Language models on several data sets in different formats, and the system turn of conversations without one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.console import mirrortune
from tests.cli.test_mixtures import write_lines
from tests.tiny_models import write_tiny_causal

TALK = [{"role": "user", "content": "good film ?"}, {"role": "assistant", "content": "yes"}]


@pytest.mark.slow
def test_formats_of_language_models_are_read_side_by_side(tmp_path: Path) -> None:
    model = write_tiny_causal(tmp_path / "model")
    chats = write_lines(tmp_path / "chats.jsonl", [{"messages": TALK, "tools": [{"name": "clock"}]}] * 12)
    pairs = write_lines(tmp_path / "pairs.jsonl", [{"prompt": f"a {i}", "completion": "no no"} for i in range(12)])
    texts = write_lines(tmp_path / "texts.jsonl", [{"text": "the good old film was great"}] * 12)
    words = ["-m", model, "-t", "causal-lm", "-d", chats, "-d", pairs, "-d", texts, "--max-length", 64]
    shown = mirrortune("prepare", *words, "--show", 33, "--dry-run")
    assert shown.exit_code == 0, shown.stderr
    run = tmp_path / "run"
    trained = mirrortune("train", *words, "-o", run, "--max-steps", 2, "--json")
    assert trained.exit_code == 0, trained.stderr
    task = json.loads((run / "adapter/adapter.json").read_text(encoding="utf-8"))["task"]
    assert [own["layout"] for own in task["formats"]] == ["messages", "prompt", "text"]
    scored = mirrortune("eval", run, "--json")
    assert scored.data["metrics"] == pytest.approx(trained.data["metrics"])
    alone = mirrortune("eval", run, "-d", pairs, "--json")
    assert alone.data["rows"] == 12
    answered = mirrortune("predict", run, "--split", "validation", "--max-new-tokens", 2, "--format", "jsonl")
    assert len(answered.stdout.splitlines()) == scored.data["rows"], answered.stderr
    assert mirrortune("predict", run, "-d", texts, "--max-new-tokens", 2).exit_code == 0
    packed = mirrortune("prepare", *words, "data.packing=true", "--dry-run", "--json")
    assert [source["used"] for source in packed.data["sources"]] == [11, 11, 11]


def test_a_system_turn_is_given_to_conversations_without_one(tmp_path: Path) -> None:
    model = write_tiny_causal(tmp_path / "model")
    own = [{"role": "system", "content": "bad film"}, *TALK]
    chats = write_lines(tmp_path / "chats.jsonl", [{"messages": TALK}, {"messages": own}] * 6)
    words = ["prepare", "-m", model, "-t", "causal-lm", "-d", chats, "--show", 12, "--dry-run"]
    shown = mirrortune(*words, "data.system=great film")
    assert shown.exit_code == 0, shown.stderr
    counts = [shown.stderr.count(f"text: <|im_start|>system\n{text}") for text in ("great film", "bad film")]
    assert sum(counts) == 11
    assert all(counts)
    plain = write_lines(tmp_path / "texts.jsonl", [{"text": "the good old film"}] * 6)
    refused = mirrortune("prepare", "-m", model, "-t", "causal-lm", "-d", plain, "--dry-run", "data.system=x")
    assert (refused.exit_code, "data.system: no rows are conversations" in refused.said) == (2, True)
