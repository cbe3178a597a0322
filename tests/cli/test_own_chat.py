# SPDX-License-Identifier: Apache-2.0
"""causal-lm from the command line: conversations, prompts, instructions and texts; packing; merging."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.cli.console import Outcome, mirrortune, write_lines
from tests.tiny_models import write_tiny_causal


def talks(count: int = 40) -> list[dict[str, Any]]:
    """Questions of one letter; the answer is always the same."""
    draw = random.Random(0)
    return [
        {"messages": [{"role": "user", "content": draw.choice("abcdefgh") * draw.randrange(1, 9)},
                      {"role": "assistant", "content": "no no no"}]}
        for _ in range(count)
    ]  # fmt: skip


def train(model: Path, data: object, *words: object, out: str = "run") -> Outcome:
    """A short training."""
    return mirrortune("train", "-m", model, "-t", "causal-lm", "-d", data, "-o", out, "--json", *words)


@pytest.mark.parametrize("packing", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_an_answer_is_learned_and_survives_merging(desk: Path, chatty: Path, packing: str) -> None:
    write_lines(desk / "talks.jsonl", talks())

    flags = ["--epochs", 10, "--batch-size", 4, "--lr", "1e-1", "--max-length", 128, f"data.packing={packing}"]
    outcome = train(chatty, "talks.jsonl", *flags)

    assert outcome.data["metrics"].keys() == {"perplexity", "token_accuracy", "loss"}
    assert outcome.data["metrics"]["token_accuracy"] >= 0.5, "one of 272 by chance"
    assert outcome.data["head_parameters"] == 0
    assert "text column 'messages' (detected" in outcome.stderr
    assert "the loss is on the answers (task.loss_on=all to change)" in outcome.stderr
    assert "tokens learned" in outcome.stderr
    assert ("packed into" in outcome.stderr) == (packing == "true")
    merged = mirrortune("merge", "run", "-o", "merged", "--json").data
    assert merged["verification"]["passed"]
    assert mirrortune("eval", "merged", "--json").data["metrics"] == pytest.approx(outcome.data["metrics"], rel=1e-4)
    generation = json.loads((desk / "merged" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 258
    assert (desk / "merged" / "chat_template.jinja").is_file()
    written = [json.loads(line) for line in (desk / "run" / "samples.jsonl").read_text().splitlines()]
    best = json.loads((desk / "run" / "results.json").read_text())["best_step"]
    written = [sample for sample in written if sample["step"] == best]
    assert len(written) == 3
    for sample in written:
        assert any(row["messages"][0]["content"] in sample["prompt"] for row in talks())
        assert sample["expected"] == "no no no"
        assert sample["answer"].startswith("no")
    assert "What it writes" in (desk / "run" / "report.html").read_text()


def test_every_layout_is_taken(desk: Path, chatty: Path) -> None:
    pairs = [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in talks(20)]
    layouts = {
        "chat": [{"messages": row["messages"]} for row in talks(20)],
        "sharegpt": [{"conversations": [{"from": "human", "value": p}, {"from": "gpt", "value": c}]} for p, c in pairs],
        "prompt": [{"prompt": p, "completion": c} for p, c in pairs],
        "alpaca": [{"instruction": p, "input": "", "output": c} for p, c in pairs],
        "text": [{"text": f"{p} {c}"} for p, c in pairs],
    }
    for name, rows in layouts.items():
        write_lines(desk / f"{name}.jsonl", rows)

    def shown(name: str, *words: str) -> str:
        """All rows as the model would get them: text, ids, mask and labels."""
        flags = ["-m", chatty, "-t", "causal-lm", "-d", f"{name}.jsonl", "--dry-run", "--show", 20, *words]
        outcome = mirrortune("prepare", *flags)
        assert outcome.exit_code == 0, outcome.stderr
        return outcome.stderr[outcome.stderr.index("example 1 of 18") :]

    rows = {name: shown(name) for name in layouts}
    assert rows["chat"] == rows["sharegpt"] == rows["alpaca"], "the same conversations"
    assert len(set(rows.values())) == 3
    assert shown("prompt", "task.format=chat") == rows["chat"]


def test_truncation_is_counted_and_no_answer_is_cut_away_in_silence(desk: Path, plain: Path) -> None:
    rows = [{"prompt": "a" * n, "completion": "no"} for n in (4, 20, 29, 40, 50)] * 4
    write_lines(desk / "rows.jsonl", rows)
    outcome = train(plain, "rows.jsonl", "--max-steps", 1, "--max-length", 32, "data.validation_fraction=0.2")
    assert outcome.exit_code == 0, outcome.stderr
    assert "left out: their answers begin after 32 tokens" in outcome.stderr
    assert "truncated to 32" in outcome.stderr
    write_lines(desk / "long.jsonl", [{"prompt": "a" * 50, "completion": "no"}] * 8)
    refused = train(plain, "long.jsonl", "--max-length", 32, out="long")
    assert refused.exit_code == 3
    assert "no answer begins within 32 tokens. Raise --max-length" in refused.said


def test_rows_without_an_answer_are_refused_by_count(desk: Path, chatty: Path) -> None:
    rows = talks(20)
    for row in rows[3:6]:
        row["messages"] = row["messages"][:1]
    write_lines(desk / "talks.jsonl", rows)
    write_lines(desk / "valid.jsonl", talks(4))
    (desk / "data").mkdir()
    write_lines(desk / "data" / "train.jsonl", rows)
    write_lines(desk / "data" / "validation.jsonl", talks(4))
    outcome = train(chatty, "data")
    assert outcome.exit_code == 3
    assert "3 of 20 rows have no answer to learn in column 'messages' (lines 4, 5, 6)" in outcome.said


@pytest.mark.parametrize(
    ("rows", "words", "exit_code", "says"),
    [
        (talks(8), ["task.loss_on=answers"], 2, "task.loss_on: unknown value 'answers'. Allowed: all, completions"),
        (talks(8), ["task.format=text"], 2, "conversations cannot be written as plain text"),
        (talks(8), ["task.metrics=[accuracy]"], 2, "'accuracy' does not score tokens"),
        (talks(8), ["--method", "none"], 2, "'none' trains nothing on this kind of task, which has no head"),
        ([{"text": "abc"}] * 8, ["task.loss_on=completions"], 2, "plain text in column 'text' has no completions"),
        ([{"n": 1}] * 8, [], 3, "no column looks like text to learn. Allowed: messages; prompt and completion"),
        ([{"messages": [{"role": "user"}]}] * 8, [], 3, "a turn of the conversation is"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    desk: Path, chatty: Path, rows: list[dict[str, Any]], words: list[object], exit_code: int, says: str
) -> None:
    write_lines(desk / "rows.jsonl", rows)
    outcome = train(chatty, "rows.jsonl", *words)
    assert outcome.exit_code == exit_code, outcome.stderr
    assert says in outcome.said


def test_conversations_need_a_template(desk: Path, plain: Path) -> None:
    write_lines(desk / "talks.jsonl", talks(8))
    for model in (plain, write_tiny_causal(desk / "blank", template="\n")):
        outcome = train(model, "talks.jsonl")
        assert outcome.exit_code == 2
        assert "its tokenizer has no chat template" in outcome.said
