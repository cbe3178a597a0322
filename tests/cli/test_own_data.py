# SPDX-License-Identifier: Apache-2.0
"""A user's own file, a model folder and no recipe: every format, detected columns, own labels, numbers to predict."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mirrortune.config.recipe import read_recipe, resolve
from mirrortune.runs.checks import unpack_for_eval
from mirrortune.runs.rows import evaluation_rows, read_data
from mirrortune.tasks.base import task_from_dict
from tests.cli.console import Outcome, mirrortune, reviews, write_lines, write_table

ROWS = reviews(60)


def train(model: Path, data: object, *words: object, task: str = "text-classification", out: str = "run") -> Outcome:
    """Two steps of training."""
    return mirrortune("train", "-m", model, "-t", task, "-d", data, "-o", out, "--max-steps", 2, "--json", *words)


def write(folder: Path, name: str) -> Path:
    """The reviews as a file of the format that its name says."""
    objects = [{"text": text, "label": label} for text, label in ROWS]
    path = folder / name
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(objects), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(objects), encoding="utf-8")
    elif path.suffix == ".jsonl":
        write_lines(path, objects)
    else:
        write_table(path, ROWS)
    return path


def adapter(run: Path) -> Any:
    """What a run's adapter says of itself."""
    return json.loads((run / "adapter" / "adapter.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_every_format_gives_the_same_run_to_the_last_digit(desk: Path, tiny_model_dir: Path) -> None:
    logs = {}
    for suffix in ("csv", "parquet"):  # that all forms are one table is tested where tables are
        outcome = train(tiny_model_dir, write(desk, f"rows.{suffix}"), out=suffix)
        assert outcome.data["metrics"].keys() == {"accuracy", "loss"}
        assert "label column 'label' (detected; --label-column to change)" in outcome.stderr
        assert "text column 'text' (detected; --text-column to change)" in outcome.stderr
        assert "no split 'validation': 6 rows set aside for validation (seed 0, stratified)" in outcome.stderr
        logs[suffix] = (desk / suffix / "metrics.jsonl").read_bytes()

    assert len(set(logs.values())) == 1


@pytest.mark.slow
def test_a_folder_brings_its_own_splits(desk: Path, tiny_model_dir: Path) -> None:
    write_table(desk / "parts" / "train.csv", ROWS[:40])
    write_table(desk / "parts" / "dev.tsv", ROWS[40:55])
    write_table(desk / "parts" / "test.csv", ROWS[55:])

    outcome = train(tiny_model_dir, "parts")

    assert outcome.exit_code == 0, outcome.stderr
    assert "set aside" not in outcome.stderr
    assert "train: 40 rows" in outcome.stderr
    assert "validation: 15 rows" in outcome.stderr
    for split, rows in {"train": 40, "validation": 15, "test": 5}.items():
        assert mirrortune("eval", "run", "--split", split, "--json").data["rows"] == rows


@pytest.mark.slow
def test_the_validation_rows_are_drawn_by_the_seed_and_in_proportion(desk: Path, tiny_model_dir: Path) -> None:
    labels = ["x"] * 60 + ["y"] * 30 + ["z"] * 10
    write_table(desk / "rows.csv", [(f"film {i}", label) for i, label in enumerate(labels)])
    held = {}
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert train(tiny_model_dir, "rows.csv", "--seed", seed, out=out).exit_code == 0
        unpacked = unpack_for_eval(resolve([read_recipe(f"{out}/recipe.yaml")]).recipe)
        settings = unpacked.data
        task = task_from_dict(adapter(desk / out)["task"])
        rows, _ = evaluation_rows(settings, read_data(settings, unpacked.task), "validation", task, is_own_data=True)
        held[out] = rows.table.to_pydict()
        assert Counter(held[out]["label"]) == {"x": 6, "y": 3, "z": 1}

    assert held["a"] == held["b"]
    assert held["a"] != held["c"]


def test_labels_keep_their_names_from_the_file_to_the_merged_model(desk: Path, tiny_model_dir: Path) -> None:
    outcome = train(tiny_model_dir, "reviews.csv")

    assert outcome.exit_code == 0, outcome.stderr
    assert adapter(desk / "run")["task"]["labels"] == ["negative", "positive"]
    assert mirrortune("merge", "run", "-o", "merged").exit_code == 0
    config = json.loads((desk / "merged" / "config.json").read_text(encoding="utf-8"))
    assert config["id2label"] == {"0": "negative", "1": "positive"}
    assert config["label2id"] == {"negative": 0, "positive": 1}


def test_numbers_are_predicted_with_task_regression(desk: Path, tiny_model_dir: Path) -> None:
    write_table(
        desk / "stars.csv", [(t, 1.5 if label == "positive" else -0.5) for t, label in ROWS], ("review", "stars")
    )

    outcome = train(tiny_model_dir, "stars.csv", task="regression")

    assert outcome.data["metrics"].keys() == {"pearson", "spearmanr", "loss"}
    assert "label column 'stars'" in outcome.stderr
    assert "text column 'review'" in outcome.stderr
    assert "(seed 0)" in outcome.stderr
    merged = mirrortune("merge", "run", "-o", "merged", "--json").data
    assert merged["verification"]["passed"]
    scores = [mirrortune("eval", target, "--json").data["metrics"] for target in ("run", "merged")]
    assert scores[0] == pytest.approx(outcome.data["metrics"], abs=1e-5)
    assert scores[1] == pytest.approx(outcome.data["metrics"], abs=1e-4)
    config = json.loads((desk / "merged" / "config.json").read_text(encoding="utf-8"))
    assert config["problem_type"] == "regression"
    assert config["id2label"] == {"0": "stars"}


def test_pairs_of_texts_are_detected_or_named(desk: Path, tiny_model_dir: Path) -> None:
    pairs = [(text, text if i % 2 else "the movie", i % 2) for i, (text, _) in enumerate(ROWS)]
    write_table(desk / "pairs.csv", pairs, ("premise", "hypothesis", "label"))
    write_table(desk / "odd.csv", pairs, ("left", "right", "same"))

    detected = train(tiny_model_dir, "pairs.csv")
    named = train(
        tiny_model_dir,
        "odd.csv",
        "--text-column",
        "left",
        "--text-column",
        "right",
        "--label-column",
        "same",
        out="odd",
    )

    assert "text columns 'premise', 'hypothesis' (detected" in detected.stderr
    assert adapter(desk / "run")["task"]["text_columns"] == ["premise", "hypothesis"]
    assert "detected" not in named.stderr
    assert (desk / "run" / "metrics.jsonl").read_bytes() == (desk / "odd" / "metrics.jsonl").read_bytes()
    assert mirrortune("merge", "run", "-o", "merged", "--json").data["verification"]["passed"]


def test_class_names_and_their_order_can_be_given(desk: Path, tiny_model_dir: Path) -> None:
    assert train(tiny_model_dir, "reviews.csv", "task.labels=[positive, negative]", "task.metrics=[f1, accuracy]").data[
        "metrics"
    ].keys() == {"f1", "accuracy", "loss"}
    assert adapter(desk / "run")["task"]["labels"] == ["positive", "negative"]
    assert adapter(desk / "run")["task"]["selection_metric"] == "f1"


def test_a_run_can_be_scored_from_anywhere(
    desk: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths on the command line were relative to where it was typed."""
    outcome = train(tiny_model_dir, "reviews.csv")
    monkeypatch.chdir(tmp_path)

    assert mirrortune("eval", desk / "run", "--json").data["metrics"] == pytest.approx(
        outcome.data["metrics"], abs=1e-6
    )


def test_a_recipe_beside_its_data_runs_from_anywhere(
    desk: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (desk / "my.yaml").write_text(
        f"model: {{name: {tiny_model_dir}}}\ntask: {{kind: text-classification}}\ndata: {{path: reviews.csv}}\n"
        "train: {max_steps: 1}\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)

    outcome = mirrortune("train", desk / "my.yaml", "--json")

    assert outcome.data["run_dir"].endswith("runs/my-tiny-bert-mirror-scale")
