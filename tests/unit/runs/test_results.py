# SPDX-License-Identifier: Apache-2.0
"""What a continued run may change: settings on which no number depends, and neither the data nor the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.numpy import load_file

from mirrortune.adapters.fingerprint import sampled_digest
from mirrortune.adapters.methods import method_names
from mirrortune.config.recipe import flatten, override_layer, resolve
from mirrortune.config.schema import Recipe
from mirrortune.errors import ConfigError, VerificationError
from mirrortune.runs import results
from mirrortune.runs.checks import unpack
from mirrortune.runs.results import as_started, check_same_base, check_same_data, check_same_recipe
from mirrortune.system.run_directory import RunDirectory
from mirrortune.tasks.base import task_class
from mirrortune.tasks.metrics import Scores
from mirrortune.training.evaluate import EvalResult
from tests.tiny_models import tiny_bert
from tests.tiny_runs import HEAD

FREE = {
    "output_dir": "elsewhere",
    "model.trust_remote_code": "true",
    "data.test_split": "other",
    "adapter.form": "portable",
    "train.keep": "5",
    "train.save_every_steps": "7",
    "train.log_every_steps": "3",
    "train.track": "tensorboard",
    "train.num_workers": "0",
    "eval.batch_size": "2",
    "eval.before": "true",
    "eval.samples": "5",
    "data.contained": "true",
    "eval.report_splits": "[test]",
    "eval.prediction_labels": "indices",
    "eval.prediction_bounds": "[0, 1]",
    "eval.prediction_files": "{test: x.tsv}",
}
FIXED = {
    "model.name": "other", "model.revision": "v2", "model.dtype": "bfloat16", "model.load_in": "4bit",
    "model.attention": "eager",
    "task.kind": "regression", "task.labels": "[a, b]", "task.metrics": "[f1]", "task.selection_metric": "f1",
    "task.loss_on": "all", "task.format": "text", "task.answer": "gsm8k",
    "data.path": "other.csv", "data.config": "c", "data.revision": "v2", "data.encoding": "latin-1",
    "data.train_split": "other", "data.validation_split": "other", "data.validation_fraction": "0.2",
    "data.validation_path": "other.csv", "data.validation_column_names": "{a: b}",
    "data.text_columns": "[a]", "data.choice_columns": "[a]", "data.label_column": "b", "data.missing_label": "-1",
    "data.stride": "4", "data.image_column": "a", "data.audio_column": "a", "data.max_seconds": "3",
    "data.image_size": "32", "data.augment": "flip", "data.prefix": "x", "data.max_target_length": "9",
    "data.packing": "true", "data.max_length": "9", "data.blank_text": "keep", "data.max_train_rows": "9",
    "data.streaming": "true", "data.shuffle_buffer": "9", "data.max_eval_rows": "9",
    "adapter.method": "lora", "adapter.rank": "3", "adapter.pairing": "random", "adapter.saliency": "rms",
    "adapter.calibration_batches": "2", "adapter.calibration_warmup_steps": "2", "adapter.target_modules": "query",
    "adapter.split": "{a: 2}", "adapter.strategy": "dense", "adapter.options": "{a: 1}",
    "train.lr": "0.5", "train.head_lr": "0.5", "train.batch_size": "3", "train.gradient_accumulation_steps": "2",
    "train.epochs": "9", "train.max_steps": "9", "train.schedule": "cosine", "train.warmup_ratio": "0.5",
    "train.weight_decay": "0.5", "train.max_grad_norm": "2", "train.precision": "bf16", "train.compile": "true",
    "train.gradient_checkpointing": "true", "train.seed": "9", "train.eval_every_steps": "9", "train.patience": "9",
    "train.class_weights": "balanced", "train.label_smoothing": "0.1", "train.balance": "true",
    "eval.protocol": "split-dev", "eval.max_new_tokens": "9", "eval.max_rows": "9",
    "model.dropout": "0.2", "adapter.layers": "[0, last 2]",
    "train.warmup_steps": "3", "train.min_lr_ratio": "0.1", "train.num_cycles": "3", "train.decay_ratio": "0.5",
    "train.optimizer": "sgd", "train.betas": "[0.8, 0.9]", "train.eps": "1e-6", "train.momentum": "0.8",
    "train.neftune_alpha": "5", "data.system": "x", "adapter.also_train": "[norms]", "train.also_train_lr": "0.5",
    "data.add_tokens": "[a]",
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run by the default settings."""
    found = RunDirectory(tmp_path / "run")
    found.create()
    found.write_text("recipe.yaml", Recipe().to_yaml())
    return found


def test_every_setting_is_one_of_both_kinds() -> None:
    assert FREE.keys() | FIXED.keys() == flatten(Recipe()).keys()
    assert not FREE.keys() & FIXED.keys()


@pytest.mark.parametrize("key", FREE)
def test_what_changes_no_number_may_change(run: RunDirectory, key: str) -> None:
    changed = resolve([override_layer([f"{key}={FREE[key]}"])]).recipe
    assert changed != Recipe()

    check_same_recipe(changed, run)


@pytest.mark.parametrize("key", FIXED)
def test_everything_else_is_refused_by_name(run: RunDirectory, key: str) -> None:
    changed = resolve([override_layer([f"{key}={FIXED[key]}"])]).recipe

    with pytest.raises(ConfigError, match=rf"--resume: {key}: the run was started with .*Use the same settings"):
        check_same_recipe(changed, run)


@pytest.mark.parametrize("method", method_names(with_peft=False))
def test_recorded_defaults_are_those_of_a_run_that_names_none(run: RunDirectory, method: str) -> None:
    given = {"kind": "audio-classification"}, {"name": "base"}, {"path": "rows.csv"}, {"method": method}
    recipe = Recipe.model_validate(dict(zip(("task", "model", "data", "adapter"), given, strict=True)))
    settings, task = unpack(recipe), Mock(metric_names=("accuracy",), selection_metric="accuracy", max_seconds=10.0)
    job = Mock(settings=settings, task=task, dtype=torch.bfloat16, max_length=None)
    run.write_json("environment.json", {"defaults": results._defaults(job, recipe)})

    again = as_started(recipe, run)

    assert unpack(again).adapter.settled() == settings.adapter.settled()
    assert again.train.lr == settings.loop.lr
    assert (again.train.precision, again.model.dtype, again.data.max_seconds) == ("fp32", "bfloat16", 10.0)
    assert (again.task.metrics, again.data.max_length) == (("accuracy",), None)


def test_a_permission_in_a_saved_recipe_permits_nothing_and_is_no_difference(run: RunDirectory) -> None:
    run.write_text("recipe.yaml", "model: {trust_remote_code: true}\n")

    check_same_recipe(Recipe(), run)


DATA: dict[str, Any] = {
    "path": "/a/rows",
    "sha256": {"train.csv": "12", "validation.csv": "34"},
    "validation": {"path": "v", "sha256": "56"},
}


@pytest.mark.parametrize(
    ("now", "says"),
    [
        ({"sha256": {"train.csv": "00", "validation.csv": "34"}}, "train.csv has changed"),
        ({"sha256": {"train.csv": "12"}}, "validation.csv is gone"),
        ({"sha256": {**DATA["sha256"], "new.csv": "78"}}, "new.csv is new"),
        ({"validation": {"path": "v", "sha256": "57"}}, "validation has changed"),
        ({"sources": [{"sha256": {"a.csv": "1"}}]}, "data set 1: a.csv is new"),
        ({"commit": "abc"}, "commit was null, is 'abc'"),
        ({"media": {"sha256": {"train": "91"}}}, "media.train has changed"),
    ],
)
def test_other_data_is_refused_and_the_error_says_what_changed(
    run: RunDirectory, now: dict[str, Any], says: str
) -> None:
    run.write_json("environment.json", {"data": DATA | {"media": {"sha256": {"train": "90"}}}})

    with pytest.raises(ConfigError, match=rf"the data is not that of the run: {says}.*start over with --over"):
        check_same_data(Mock(data_origin=DATA | {"media": {"sha256": {"train": "90"}}} | now), run, Mock())


def test_the_same_data_in_another_place_and_another_version_of_the_program_are_accepted(run: RunDirectory) -> None:
    run.write_json("environment.json", {"mirrortune": "0.0.1", "data": DATA})
    reporter = Mock()

    check_same_data(Mock(data_origin=DATA | {"path": "/b/rows"}), run, reporter)

    assert "was started with mirrortune 0.0.1, this is" in reporter.note.call_args.args[0]


def test_data_that_was_not_recorded_is_not_compared_and_a_note_says_so(run: RunDirectory) -> None:
    reporter = Mock()

    check_same_data(Mock(data_origin=DATA), run, reporter)

    assert "not compared" in reporter.note.call_args.args[0]


@pytest.mark.parametrize("text", ["[1]", "7", "{"])
def test_a_damaged_environment_is_refused_by_name(run: RunDirectory, text: str) -> None:
    run.write_text("environment.json", text)

    for check in (lambda: check_same_data(Mock(data_origin=DATA), run, Mock()), lambda: check_same_base({}, run)):
        with pytest.raises(
            (ConfigError, VerificationError), match=r"environment\.json: damaged .*Restore the run directory"
        ):
            check()
    assert as_started(Recipe(), run) == Recipe()
    run.write_json("environment.json", {"defaults": {"train.lr": "x"}})
    with pytest.raises(VerificationError, match=r"environment\.json: a file of the run is damaged"):
        as_started(Recipe(), run)


@pytest.mark.parametrize("name", ["bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.output.dense.bias"])
def test_a_base_with_another_weight_is_refused(run: RunDirectory, name: str) -> None:
    model = tiny_bert()
    run.write_json("environment.json", {"model": {"name": "tiny", "weights": {"sampled": sampled_digest(model, HEAD)}}})
    with torch.no_grad():
        model.get_parameter(HEAD[0]).add_(1)  # drawn anew, and restored from the checkpoint
    check_same_base({"sampled": sampled_digest(model.to(torch.float64), HEAD)}, run)
    with torch.no_grad():
        model.get_parameter(name).mul_(1.5).add_(0.1)

    with pytest.raises(ConfigError, match=r"--resume: the weights of 'tiny' are not those .*--overwrite"):
        check_same_base({"sampled": sampled_digest(model, HEAD)}, run)


@pytest.mark.parametrize("metric", ["roc_auc", "accuracy"])
def test_probabilities_are_kept_where_the_metric_scores_them(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, metric: str
) -> None:
    rows = pa.table({"text": ["a", "b", "c"], "label": ["x", "y", "x"]})
    task = task_class("text-classification").from_rows(rows, "rows", Scores(metrics=(metric,)))[0]
    logits = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]], dtype=np.float32)
    outcome = EvalResult(metrics={metric: 0.5}, rows=3, judged=[*logits], predictions=logits.argmax(axis=1),
                         references=np.array([0, 1, 0]))  # fmt: skip
    monkeypatch.setattr(results, "evaluate_split", lambda *_, **__: outcome)
    results.score_reported(Mock(task=task, reported={"test": Mock()}), Mock(), run, Mock(), Mock())
    kept = load_file(run.path / "predictions.safetensors")
    assert kept.pop("test.predictions").tolist() == [1, 0, 0]
    assert kept.pop("test.references").tolist() == [0, 1, 0]
    odds = kept.pop("test.probabilities", None)
    assert not kept
    assert (odds is None) == (metric == "accuracy")
    assert odds is None or odds[:, 1] == pytest.approx([1 / (1 + np.exp(-1)), 1 / (1 + np.e), 0.5], abs=1e-12)


def test_numbers_of_rows_are_kept_of_texts(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    right = [["Rome"], ["Paris", "paris"], ["Rome"]]
    outcome = EvalResult(metrics={}, rows=3, judged=[], predictions=["Rome", "x", "Rome now"], references=right)
    monkeypatch.setattr(results, "evaluate_split", lambda *_, **__: outcome)
    job = Mock(task=Mock(selection_metric="squad_f1"), reported={"test": Mock()})
    results.score_reported(job, Mock(), run, Mock(), Mock())
    kept = load_file(run.path / "predictions.safetensors")
    assert kept["test.scores"].tolist() == pytest.approx([1, 0, 2 / 3])
    first, second, third = kept["test.references"].tolist()
    assert first == third != second


def test_a_split_with_outputs_that_are_no_numbers_is_not_scored(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An argmax takes NaN for the first class."""
    rows = pa.table({"text": ["a", "b"], "label": ["x", "y"]})
    task = task_class("text-classification").from_rows(rows, "rows", Scores(metrics=("accuracy",)))[0]
    logits = np.array([[0.0, 1.0], [np.nan, 0.0]], dtype=np.float32)
    outcome = EvalResult(metrics={"accuracy": 1.0, "loss": np.nan}, rows=2, judged=[*logits],
                         predictions=logits.argmax(axis=1), references=np.array([1, 0]))  # fmt: skip
    monkeypatch.setattr(results, "evaluate_split", lambda *_, **__: outcome)
    reporter = Mock()
    found = results.score_reported(Mock(task=task, reported={"test": Mock()}), Mock(), run, Mock(), reporter)
    assert found["test"] == pytest.approx({"accuracy": np.nan, "loss": np.nan}, nan_ok=True)
    said = "warning: test: the model's output is not a number (NaN) for 1 of 2 rows, so it is not scored"
    assert said in reporter.note.call_args.args[0]
    assert not load_file(run.path / "predictions.safetensors")


def test_a_run_set_aside_by_one_that_was_killed_too_early_is_continued_with_its_own_defaults(
    run: RunDirectory,
) -> None:
    run.write_json("environment.json", {"defaults": {"train.lr": 0.02}})
    run.create(overwrite=True)
    run.write_json("environment.json", {"defaults": {"train.lr": 0.5}})

    assert as_started(Recipe(), run).train.lr == 0.02
    run.take_place()
    assert as_started(Recipe(), run).train.lr == 0.5
