# SPDX-License-Identifier: Apache-2.0
"""Language models are scored by the answers that they generate: ``task.answer`` and ``exact_match``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mirrortune.adapters.layers import Spectral
from tests.cli.console import Outcome, mirrortune, write_lines
from tests.tiny_models import write_tiny_causal

FLAGS = ("--epochs", 25, "--batch-size", 4, "--lr", "1e-1", "--max-length", 64, "eval.max_new_tokens=6")


@pytest.fixture
def problems(desk: Path) -> Path:
    """Problems whose answers are all the same; a model, and 40 rows."""
    write_tiny_causal(desk / "model")
    rows = [{"question": f"what is {number}", "answer": "#### 7"} for number in range(40)]
    return write_lines(desk / "problems.jsonl", rows)


def train(data: Path, *words: object) -> Outcome:
    """A short training into ``run``."""
    base = ("-m", "model", "-t", "causal-lm", "-d", data, "-o", "run", "--json")
    return mirrortune("train", *base, *FLAGS, *words)


def test_generated_answers_are_scored_while_training_and_after(problems: Path) -> None:
    outcome = train(problems, "task.answer=gsm8k", "task.format=text")

    assert outcome.exit_code == 0, outcome.stderr
    metrics = outcome.data["metrics"]
    assert metrics.keys() == {"exact_match", "perplexity", "token_accuracy", "loss"}
    assert metrics["exact_match"] == 1.0
    log = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    scores = [row["exact_match"] for row in log if row["event"] == "evaluate"]
    assert scores[0] < 1.0, "a random model answers none, or few"
    assert max(scores) == 1.0
    assert mirrortune("eval", "run", "--json").data["metrics"] == pytest.approx(metrics)
    refused = mirrortune("eval", "run", "--predictions", "answers.tsv")
    assert refused.exit_code == 2
    assert "the answers of causal-lm are texts, which eval does not write. Write them with mirrortune" in refused.said


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["task.answer=gms8k"], 2, "Did you mean 'gsm8k'?"),
        (["task.answer=gsm8k", "task.loss_on=all"], 2, "prompts and answers are not distinguished"),
        (["task.answer=regex:("], 2, "is not a regular expression"),
        (["task.answer=letter"], 3, "rows have no answer in the format 'letter' in column 'answer'"),
        (["task.metrics=[exact_match]"], 2, "Allowed: perplexity, token_accuracy. Set task.answer."),
        (["task.answer=gsm8k", "task.metrics=[f1]"], 2, "exact_match"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_training(
    problems: Path, words: list[str], code: int, message: str
) -> None:
    outcome = train(problems, *words)

    assert outcome.exit_code == code
    assert message in outcome.said
    assert not Path("run").exists()


def test_other_kinds_have_no_answers(desk: Path, tiny_model_dir: Path) -> None:
    words = ["-m", tiny_model_dir, "-t", "text-classification", "-d", "rows.csv", "--dry-run"]
    (desk / "rows.csv").write_text("text,label\na,b\nc,d\n" * 10, encoding="utf-8")
    for setting in ("task.answer=gsm8k", "eval.max_new_tokens=4"):
        outcome = mirrortune("train", *words, setting)
        assert outcome.exit_code == 2
        assert f"{setting.partition('=')[0]}: text-classification has none" in outcome.said


def test_weights_of_dense_layers_are_computed_once_for_a_batch_of_answers(
    problems: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("task.answer=gsm8k", "task.format=text", "adapter.strategy=dense", "eval.before=false")
    assert train(problems, *words, "--max-steps", 1).exit_code == 0
    adapt, calls = Spectral.adapt, []
    monkeypatch.setattr(Spectral, "adapt", lambda own, *given: calls.append(own) or adapt(own, *given))

    assert mirrortune("eval", "run").exit_code == 0

    assert len(calls) == len(set(calls)) > 0
