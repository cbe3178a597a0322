# SPDX-License-Identifier: Apache-2.0
"""kill -9 in the middle of saving and merging: what is left loads and is right, or is not there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.cli.console import Outcome, mirrortune, reviews, write_table
from tests.kills import count_changes, ends_before
from tests.tiny_models import write_tiny_model
from tests.trees import tree

pytestmark = pytest.mark.slow
KILLS = 20


def left_after(what: str, folder: Path) -> dict[str, int]:
    """What ``KILLS`` kills at random lines leave."""
    env = {**os.environ, "MIRRORTUNE_CACHE": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "tests.e2e.kill_points", what, str(folder), "--kills", str(KILLS)]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, env=env | {"PYTHONPATH": str(root)}, cwd=root, capture_output=True, text=True, check=True
    )
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_killed_save_leaves_the_earlier_adapter_the_new_one_or_one_that_is_refused(tmp_path: Path) -> None:
    found = left_after("save", tmp_path)
    assert found["killed"] == KILLS
    assert found.keys() <= {"killed", "old", "new", "refused"}
    assert found.get("refused", 0) < KILLS / 2, "only between the renames of two files"
    assert found["old"] > 0


def test_a_killed_merge_leaves_a_whole_model_or_none(tmp_path: Path) -> None:
    found = left_after("merge", tmp_path)
    assert found["killed"] == KILLS
    assert found.keys() <= {"killed", "new", "nothing", "partial, refused", "partial, whole"}
    assert found["nothing"] > 0


TRAIN = "train -m model -t text-classification -d reviews.csv --max-steps 2 --batch-size 4"
COMMANDS = {
    "train": (f"{TRAIN} -o a --overwrite --seed 5", "eval a -d reviews.csv"),
    "merge": ("merge run -o a --overwrite", "eval a -d reviews.csv -t text-classification"),
    "lora": ("merge run --format lora --rank 4 -o a --overwrite", None),  # which PEFT loads, and eval does not
    "compare": (
        "compare -m model -t text-classification -d reviews.csv --methods mirror,ia3 --max-steps 2 --batch-size 4 -o a",
        None,
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_leaves_the_old_or_the_new(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands themselves, at changes spread over the whole command and at its last ones."""
    words, reads = COMMANDS[name]
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "reviews.csv", reviews(40))
    write_tiny_model(tmp_path / "model")
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / ".b.replaced").mkdir()
    (tmp_path / ".b.replaced" / "mine.txt").write_text("mine")
    assert mirrortune(*f"{TRAIN} -o run".split()).exit_code == 0

    def work() -> None:
        outcome = mirrortune(*words.split())
        if outcome.exit_code:
            raise RuntimeError(outcome.stderr)

    work()
    before = {p: w for p, w in tree(tmp_path).items() if Path(p).relative_to(tmp_path).parts[0] not in ("a", "run")}
    changes = count_changes(work)
    points = sorted({*range(1, changes, max(1, changes // 8)), *range(max(1, changes - 6), changes + 1)})
    for change in points:
        # How often a comparison writes its log depends on how fast its runs are.
        assert ends_before(work, change) or (name == "compare" and change > changes // 2), change
        if reads is not None:
            outcome = mirrortune(*reads.split())
            if "this run has not finished" in outcome.stderr:  # the new one, which has a checkpoint already
                assert mirrortune("train", "a/recipe.yaml", "--resume").exit_code == 0
                outcome = mirrortune(*reads.split())
            assert outcome.exit_code == 0, (change, outcome.stderr)
        work()
        if name == "lora":
            assert load_file("a/adapter_model.safetensors")
        left = {p: w for p, w in tree(tmp_path).items() if Path(p).relative_to(tmp_path).parts[0] not in ("a", "run")}
        assert left == before, change


@pytest.mark.parametrize("is_resumed", [False, True])
def test_a_killed_run_goes_on_as_its_error_says(
    is_resumed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every fifth change, and at every one up to the recipe: the same command goes on, or the one that it names."""
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "reviews.csv", reviews(40))
    write_tiny_model(tmp_path / "model")
    words = f"{TRAIN} --keep 5 train.save_every_steps=1".split()
    assert mirrortune(*words, "-o", "whole").exit_code == 0
    run, whole = tmp_path / "run", tmp_path / "whole"
    log, names = (whole / "metrics.jsonl").read_bytes(), {path.name for path in whole.rglob("*")}

    def prepare() -> None:
        shutil.rmtree(run, ignore_errors=True)
        if is_resumed:  # it was stopped after its first step
            shutil.copytree(whole, run)
            shutil.rmtree(run / "checkpoints" / "step-000002")
            shutil.rmtree(run / "adapter")

    def work() -> Outcome:
        return mirrortune(*words, "-o", "run", *(["--resume"] if is_resumed else []))

    prepare()
    assert work().exit_code == 0  # the first one imports modules
    prepare()
    changes = count_changes(work)
    for change in sorted({*range(1, changes, 5), *(() if is_resumed else range(1, 30))}):
        prepare()
        assert ends_before(work, change), change
        outcome = work()
        if outcome.exit_code:
            assert "Continue it with --resume" in outcome.stderr, (change, outcome.stderr)
            outcome = mirrortune(*words, "-o", "run", "--resume")
        assert outcome.exit_code == 0, (change, outcome.stderr)
        assert (run / "metrics.jsonl").read_bytes() == log, change
        assert {path.name for path in run.rglob("*")} == names, change
