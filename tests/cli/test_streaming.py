# SPDX-License-Identifier: Apache-2.0
"""``data.streaming=true``: training on rows that are read while they are learned from, stopped and continued."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest

from tests.cli.console import finish, mirrortune, reviews, start, write_lines
from tests.laws.test_training_laws import differences
from tests.tiny_models import write_tiny_causal, write_tiny_model

STREAM = ["data.streaming=true", "data.shuffle_buffer=16", "train.log_every_steps=1", "--json"]
SENTENCES = ["-t", "text-classification", "--batch-size", 4, "--gradient-accumulation-steps", 2, "--max-steps", 14]


def shards(folder: Path, pieces: int = 4, rows: int = 15) -> Path:
    """Files of sentences to learn from, and one to score."""
    folder.mkdir()
    names = [*(f"train-{i:05d}" for i in range(pieces)), "validation"]
    for seed, name in enumerate(names):
        lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in reviews(rows, seed)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def cut(run: Path, whole: Path, step: int) -> Path:
    """A copy of a whole run as it was when it was killed after the checkpoint of ``step``."""
    shutil.copytree(whole, run)
    for folder in (run / "checkpoints").iterdir():
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    shutil.rmtree(run / "adapter")
    (run / "results.json").unlink()
    return run


@pytest.mark.slow
def test_a_streamed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """60 rows are seen almost twice; step 4 ends within a block, step 12 in the next pass."""
    data, model = shards(tmp_path / "data"), write_tiny_model(tmp_path / "model", dropout=0.2)
    words = ["train", "-m", model, "-d", data, *SENTENCES, *STREAM, "train.save_every_steps=4", "--keep", 9]
    outcome = mirrortune(*words, "-o", tmp_path / "whole")
    assert outcome.data["metrics"]["accuracy"] >= 0
    assert "streamed; of its first 60 rows:" in outcome.stderr
    places = json.loads((tmp_path / "whole/checkpoints/step-000012/state.json").read_text())["places"]
    assert places[0]["epoch"] == 1
    for step in (4, 12):
        run = cut(tmp_path / f"cut-{step}", tmp_path / "whole", step)
        again = mirrortune(*words, "-o", run, "--resume")
        assert again.data["metrics"] == outcome.data["metrics"]
        assert differences(tmp_path / "whole", run) == []
    assert mirrortune("eval", tmp_path / "whole", "--json").data["rows"] == 15


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [4, 3])  # pieces of its own for each process; every other row of all
def test_two_processes_stream_their_shares_and_go_on_bit_for_bit(tmp_path: Path, pieces: int) -> None:
    data, model = shards(tmp_path / "data", pieces), write_tiny_model(tmp_path / "model", dropout=0.2)
    env = {**os.environ, "MIRRORTUNE_CACHE": str(tmp_path / "cache")}
    words = ["train", "-m", model, "-d", data, *SENTENCES, *STREAM, "train.save_every_steps=4", "--keep", 9]
    words += ["--num-processes", 2]
    outcome = finish(start(*words, "-o", tmp_path / "whole", env=env))
    places = json.loads((tmp_path / "whole/checkpoints/step-000008/state.json").read_text())["places"]
    assert len(places) == 2
    run = cut(tmp_path / "cut", tmp_path / "whole", 4)
    again = finish(start(*words, "-o", run, "--resume", env=env))
    assert again.data["metrics"] == outcome.data["metrics"]
    assert differences(tmp_path / "whole", run) == []


@pytest.mark.slow
def test_streamed_conversations_are_packed_block_by_block(tmp_path: Path) -> None:
    draw, data = random.Random(0), tmp_path / "data"
    data.mkdir()
    for name, count in (("train-0", 40), ("train-1", 30), ("validation", 6)):
        rows = [{"prompt": draw.choice("abcdefgh") * draw.randrange(1, 9), "completion": "no no"} for _ in range(count)]
        write_lines(data / f"{name}.jsonl", rows)
    model = write_tiny_causal(tmp_path / "model")
    words = ["train", "-m", model, "-t", "causal-lm", "-d", data, *STREAM, "data.packing=true", "--max-length", 64]
    words += ["--batch-size", 2, "--max-steps", 12, "train.save_every_steps=5", "--keep", 9]
    outcome = mirrortune(*words, "-o", tmp_path / "whole")
    run = cut(tmp_path / "cut", tmp_path / "whole", 5)
    assert mirrortune(*words, "-o", run, "--resume").data["metrics"] == outcome.data["metrics"]
    assert differences(tmp_path / "whole", run) == []


def test_only_the_validation_rows_that_are_asked_for_are_read(tmp_path: Path, tiny_model_dir: Path) -> None:
    words = ["prepare", "-m", tiny_model_dir, "-t", "text-classification", "-d", shards(tmp_path / "data"), "--dry-run"]
    found = mirrortune(*words, *STREAM, "--max-steps", 2, "data.max_eval_rows=7").data
    assert found["rows"] == {"validation": 7}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "train.max_steps: it is not set, and a stream has no known end. Give it."),
        (["--max-steps", 2, "data.max_train_rows=5"], "a random subset of a stream is not known before its end"),
        (["--max-steps", 2, "data.streaming=false", "data.max_eval_rows=5"], "data.max_eval_rows: all rows are scored"),
    ],
)
def test_settings_that_a_stream_cannot_have(
    tmp_path: Path, tiny_model_dir: Path, words: list[object], said: str
) -> None:
    stream = [] if "data.streaming=false" in words else STREAM
    given = ["train", "-m", tiny_model_dir, "-t", "text-classification", "-d", shards(tmp_path / "data"), *stream]
    outcome = mirrortune(*given, *words)
    assert outcome.exit_code == 2
    assert said in outcome.said


def test_what_a_stream_lacks_is_said(tmp_path: Path, tiny_model_dir: Path) -> None:
    data = shards(tmp_path / "data")
    (data / "validation.jsonl").unlink()
    words = ["train", "-m", tiny_model_dir, "-t", "text-classification", "-d", data, *STREAM, "--max-steps", 50]
    words += ["-o", tmp_path / "run"]
    outcome = mirrortune(*words)
    assert outcome.exit_code == 3
    assert "there is no split 'validation', and a stream sets no rows aside. Put validation rows into" in outcome.said

    shutil.copy(data / "train-00000.jsonl", data / "validation.jsonl")
    broken = "".join(json.dumps({"text": "a film", "label": "mixed"}) + "\n" for _ in range(2000))
    (data / "train-00003.jsonl").write_text((data / "train-00002.jsonl").read_text() * 80 + broken, encoding="utf-8")
    outcome = mirrortune(*words, "--batch-size", 64)
    assert outcome.exit_code == 3
    assert "'mixed'" in outcome.said
    assert re.search(r"Step \d+ is saved in .*run/checkpoints/step-0000\d\d\.", outcome.said)
