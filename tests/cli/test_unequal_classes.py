# SPDX-License-Identifier: Apache-2.0
"""Rows of which one class has few: what prepare warns of, how train weighs and draws them, what the page shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.console import mirrortune, write_table

METRICS = "task.metrics=[f1_macro, balanced_accuracy, mcc, roc_auc, log_loss]"


@pytest.fixture
def mail(desk: Path) -> Path:
    """A hundred rows, of which six are spam, and forty of the same kind to choose by."""
    texts = ["the movie was good", "a film about the plot", "this story is great"]
    rows = [
        ("awful and terrible" if n % 16 == 3 else texts[n % 3], "spam" if n % 16 == 3 else "ham") for n in range(140)
    ]
    write_table(desk / "mail" / "train.csv", rows[:100])
    write_table(desk / "mail" / "validation.csv", rows[100:])
    return desk / "mail"


def words(data: Path, model: Path, *more: object) -> list[object]:
    """A command line after the command."""
    return ["-m", model, "-t", "text-classification", "-d", data, *more]


def test_prepare_warns_of_rare_classes_and_of_a_majority(mail: Path, tiny_model_dir: Path) -> None:
    said = mirrortune("prepare", *words(mail, tiny_model_dir), "--dry-run", "--class-weights", "balanced").stderr

    assert "  class weights: spam 7.14, ham 0.538" in said
    assert "warning: classes with under 10 examples in the training rows: spam 7" in said
    assert "warning: always predicting 'ham' gives an accuracy of 0.950 on the validation rows" in said


def test_prepare_says_nothing_of_equal_classes(desk: Path, tiny_model_dir: Path) -> None:
    said = mirrortune("prepare", *words(desk / "reviews.csv", tiny_model_dir), "--dry-run", "train.balance=true").stderr

    assert "  balance: an epoch draws about 27 rows of each class, which have 27 to 27" in said
    assert "warning" not in said


def test_a_weighed_run_is_scored_without_weights(mail: Path, tiny_model_dir: Path, desk: Path) -> None:
    heavy = ["--class-weights", "{ham: 1000}", "--max-steps", 1, "train.log_every_steps=1", METRICS, "-q"]
    done = mirrortune("train", *words(mail, tiny_model_dir, *heavy), "-o", "run")
    assert done.exit_code == 0, done.stderr

    lines = [json.loads(line) for line in (desk / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] > 100 for line in lines if line["event"] == "train"] == [True]
    found = json.loads((desk / "run" / "results.json").read_text())["metrics"]
    assert list(found) == ["f1_macro", "balanced_accuracy", "mcc", "roc_auc", "log_loss", "loss"]
    assert found["log_loss"] == pytest.approx(found["loss"], rel=1e-5)
    each = json.loads((desk / "run" / "validation.json").read_text())["per_class"]
    assert [(s["class"], s["count"]) for s in each] == [("ham", 38), ("spam", 2)]
    page = (desk / "run" / "report.html").read_text()
    assert "Each class" in page
    assert "recall" in page


def test_a_wrong_weight_is_refused_before_weights_are_read(mail: Path, tiny_model_dir: Path) -> None:
    done = mirrortune("train", *words(mail, tiny_model_dir, "--class-weights", "{spamm: 2, '0': 1}"))

    assert done.exit_code == 2
    assert "no class is called 'spamm'. Did you mean 'spam'? Allowed: ham, spam" in done.stderr
    assert "no class is called '0'" in done.stderr
