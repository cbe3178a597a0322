# SPDX-License-Identifier: Apache-2.0
"""What the commands say of a run's size, of the form of its adapter, and of a head that there is not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.cli.console import mirrortune, write_lines
from tests.cli.test_own_chat import talks
from tests.tiny_models import write_tiny_causal, write_tiny_model


@pytest.mark.slow
def test_a_model_without_a_head_is_not_said_to_have_one(desk: Path) -> None:
    write_lines(desk / "talks.jsonl", talks(12))
    model = write_tiny_causal(desk / "llama")
    words = ["-m", model, "-t", "causal-lm", "-d", "talks.jsonl", "--max-steps", 2, "--batch-size", 4, "-o", "run"]

    outcome = mirrortune("train", *words, "--max-length", 64, "train.log_every_steps=1")

    assert outcome.exit_code == 0, outcome.stderr
    events = [json.loads(line) for line in (desk / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"lr"} <= {key for event in events for key in event}
    assert not any("head_lr" in event for event in events)
    said = outcome.stdout + outcome.stderr + (desk / "run" / "README.md").read_text()
    assert "step 2/2" in said
    said += mirrortune("prepare", *words[:-2], "--max-length", 64, "--dry-run").stdout
    assert not re.search(r"task head|a head of|of the head|the head's|head_lr \d", said)
    assert "(compact form) in run/adapter, with" in outcome.stdout


def test_the_form_of_the_adapter_is_said_where_it_is_chosen(desk: Path) -> None:
    model = write_tiny_model(desk / "bert")
    words = ["-m", model, "-t", "text-classification", "-d", "reviews.csv", "--rank", 4]

    usual = mirrortune("prepare", *words, "--dry-run")
    trained = mirrortune("train", *words, "adapter.form=portable", "--max-steps", 1, "-o", "run")

    assert re.search(r"adapter file: about \d+ kB, compact form \(adapter.form=portable, with its bases:", usual.stderr)
    assert re.search(r"adapter file: about \d+ kB, portable form \(adapter.form=compact, without", trained.stderr)
    assert "(portable form, with its bases: adapter.form=compact leaves them out) in run/adapter" in trained.stdout


def test_a_plan_remarks_on_steps_that_the_run_will_not_have(desk: Path) -> None:
    rows = [{"text": f"a film {number}", "label": ("negative", "positive")[number % 2]} for number in range(48)]
    write_lines(desk / "rows.jsonl", rows)
    words = ["-m", write_tiny_model(desk / "bert"), "-t", "text-classification", "-d", "rows.jsonl", "--epochs", 2,
             "--batch-size", 4, "data.validation_path=reviews.csv", "train.eval_every_steps=25"]  # fmt: skip

    planned = [mirrortune(*command, *words).said for command in (("train", "--dry-run"), ("prepare", "--dry-run"))]
    shared = mirrortune("train", "--dry-run", "--num-processes", 2, *words).said
    streamed = mirrortune("train", "--dry-run", *words, "data.streaming=true", "--max-steps", 9, "--patience", 1).said

    assert all("eval_every_steps=25 is not reached: only the last step, 24, is scored" in said for said in planned)
    assert "eval_every_steps=25 is not reached: only the last step, 12, is scored" in shared
    assert "train.patience=1 cannot end a run of 1 evaluation early" in streamed


def test_settings_without_effect_are_noted_and_refuse_no_run(desk: Path) -> None:
    words = ["-m", write_tiny_model(desk / "bert"), "-t", "text-classification", "-d", "reviews.csv", "--dry-run"]
    unused = ["data.shuffle_buffer=9", "train.also_train_lr=0.5", "train.warmup_ratio=0.5", "train.warmup_steps=3"]

    noted = mirrortune("prepare", *words, *unused)
    used = mirrortune(
        "prepare", *words, "adapter.also_train=[norms]", "train.also_train_lr=0.5", "train.warmup_ratio=0.5"
    )

    assert (noted.exit_code, used.exit_code) == (0, 0), noted.said + used.said
    for remark in (
        "data.shuffle_buffer is not used: rows are not streamed",
        "train.also_train_lr is not used: adapter.also_train is empty",
        "train.warmup_ratio is not used: train.warmup_steps is set",
    ):
        assert remark in noted.stderr
    assert "is not used" not in used.stderr


def test_partial_folders_are_not_listed_as_files(desk: Path) -> None:
    (desk / ".merged.abc.partial").mkdir()
    model = write_tiny_model(desk / "bert")
    words = ["prepare", "--dry-run", "-m", model, "-t", "text-classification", "-d"]
    missing = mirrortune(*words, "review.csv")
    assert missing.exit_code == 3
    assert "files beside it: bert, reviews.csv." in missing.said
    (desk / "empty" / ".run.abc.partial").mkdir(parents=True)
    assert "it holds nothing" in mirrortune(*words, "empty").said
