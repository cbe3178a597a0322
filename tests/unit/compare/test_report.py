# SPDX-License-Identifier: Apache-2.0
"""What the report of a comparison says, written from run directories that no training made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mirrortune.compare.figures import comparison_drawings
from mirrortune.compare.grid import Cell, make_grid
from mirrortune.compare.report import write_report
from mirrortune.compare.run import Comparison
from mirrortune.config.recipe import override_layer, resolve
from mirrortune.system.console import Reporter
from mirrortune.tasks.metrics import METRICS

pytestmark = pytest.mark.usefixtures("quick_figures")
RATE = 0.1


def comparison(root: Path, *words: str, seeds: int = 5, methods: str = "mirror,none") -> Comparison:
    """Return a comparison of one task with one learning rate."""
    recipe = resolve([override_layer(list(words))]).recipe
    grid = make_grid({"data": recipe}, methods, seeds=seeds, tune_seeds=1, lr_grid=str(RATE), extensions=0)
    return Comparison(root, grid, {"data": recipe}, Reporter(verbosity=-1))


def finish(
    compared: Comparison, label: str, seed: int, score: float, *splits: str, metric: str = "accuracy",
    arrays: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write what the report reads of a finished run."""
    folder = Cell("data", label, RATE, seed).folder(compared.root)
    folder.mkdir(parents=True)
    sizes = ("trainable_parameters", "head_parameters", "adapter_bytes", "median_step_seconds", "peak_memory_bytes",
             "train_seconds", "pairing_seconds")  # fmt: skip
    metrics = {metric: score, "loss": 1.0}
    found = {"selection_metric": metric, "metrics": metrics, "reported": dict.fromkeys(splits, metrics)}
    (folder / "results.json").write_text(json.dumps({**found, **dict.fromkeys(sizes, 1)}))
    if arrays:
        save_file(arrays, folder / "predictions.safetensors")


def diverge(compared: Comparison, label: str, seed: int) -> None:
    """Write what the report reads of a run that diverged."""
    folder = Cell("data", label, RATE, seed).folder(compared.root)
    folder.mkdir(parents=True)
    (folder / "status.json").write_text(json.dumps({"status": "diverged"}))


def report(compared: Comparison) -> tuple[dict[str, Any], str]:
    """Write the report; return the results of the task, and the table without runs of spaces."""
    return write_report(compared, "")["tasks"]["data"], (compared.root / "table.md").read_text(encoding="utf-8")


def row(table: str, label: str) -> list[str]:
    """Return the cells of a method in the first table."""
    line = next(line for line in table.splitlines() if line.startswith(f"| `{label}`"))
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_the_row_of_a_method_says_how_many_seeds_it_has_and_why(tmp_path: Path) -> None:
    compared = comparison(tmp_path, methods="mirror,none,svft")
    for seed in range(5):
        finish(compared, "mirror", seed, 0.5 + seed / 100, "test")
        (diverge if seed in (1, 4) else finish)(compared, "none", seed, *([] if seed in (1, 4) else [0.5, "test"]))
        diverge(compared, "svft", seed)
    found, table = report(compared)
    assert row(table, "mirror")[2:4] == ["52.0 ± 1.6", "-"]
    assert row(table, "none")[2:4] == ["50.0 ± 0.0 (3 of 5 seeds, 2 diverged)", "not tested"]
    assert found["methods"]["none"]["diverged"] == [1, 4]
    assert "Mean and standard deviation over 5 seeds, times 100; " in table
    assert "Left out: `svft` (0 of 5 seeds, 5 diverged). " in table


def test_the_row_of_an_unfinished_method_says_so(tmp_path: Path) -> None:
    compared = comparison(tmp_path, seeds=3)
    finish(compared, "mirror", 0, 0.5, "test")
    finish(compared, "none", 0, 0.5, "test")
    _, table = report(compared)
    assert row(table, "mirror")[2:4] == ["50.0 (1 of 3 seeds, 2 not finished)", "-"]
    assert row(table, "none")[2:4] == ["50.0 (1 of 3 seeds, 2 not finished)", "not tested"]


def test_the_time_of_measuring_pairs_is_told_beside_the_step_times(tmp_path: Path) -> None:
    compared = comparison(tmp_path, seeds=1, methods="mirror,adaptive")
    for label, seconds in (("mirror", 0.0), ("adaptive", 16.46)):
        finish(compared, label, 0, 0.5, "test")
        file = Cell("data", label, RATE, 0).folder(compared.root) / "results.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "pairing_seconds": seconds}))
    _, table = report(compared)
    assert "Measured on training rows before the first step, besides the step times: `adaptive` 16.5 s. " in table


def test_a_method_whose_rate_is_not_chosen_yet_is_named(tmp_path: Path) -> None:
    compared = comparison(tmp_path, seeds=1, methods="mirror:lr=0.1/0.3,none,svft")
    finish(compared, "mirror:lr=0.1/0.3", 0, 0.5, "test")
    found, table = report(compared)
    assert found["metric"] == "accuracy"
    missing = "`mirror:lr=0.1/0.3`, `none`, `svft`"
    assert f"Left out until their learning rates are chosen, which takes more runs: {missing}.\n" in table
    assert "| `mirror:lr=0.1/0.3` | 50.0 (1.000) |" in table
    assert "Left out until" in (tmp_path / "report.html").read_text(encoding="utf-8")

    finish(compared, "none", 0, 0.75, "test")
    _, table = report(compared)
    assert row(table, "none")[2:4] == ["75.0", "not tested"]
    assert "takes more runs: `mirror:lr=0.1/0.3`, `svft`. " in table


def test_a_comparison_of_which_every_run_diverged_says_so(tmp_path: Path) -> None:
    compared = comparison(tmp_path, seeds=1)
    diverge(compared, "mirror", 0)
    diverge(compared, "none", 0)
    _, table = report(compared)
    assert "Left out: `mirror` (0 of 1 seed, 1 diverged), `none` (0 of 1 seed, 1 diverged)." in table
    assert "| `mirror` | diverged |" in table


def test_nothing_is_tested_against_a_method_that_lacks_seeds(tmp_path: Path) -> None:
    compared = comparison(tmp_path, seeds=2)
    diverge(compared, "mirror", 1)
    for label, seed in (("mirror", 0), ("none", 0), ("none", 1)):
        finish(compared, label, seed, 0.5, "test")
    _, table = report(compared)
    assert row(table, "none")[3] == "not tested"
    assert "No method is tested against `mirror`, which lacks results of some seeds. " in table


@pytest.mark.parametrize(("metric", "order"), [("accuracy", ["mirror", "none"]), ("log_loss", ["none", "mirror"])])
def test_the_best_method_is_on_top_of_the_figure(tmp_path: Path, metric: str, order: list[str]) -> None:
    from matplotlib.figure import Figure

    compared = comparison(tmp_path, seeds=1)
    finish(compared, "mirror", 0, 0.25, "test", metric=metric)
    finish(compared, "none", 0, 0.75, "test", metric=metric)
    results = write_report(compared, "")
    figure = Figure()
    comparison_drawings(results, {})[0].draw(figure)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == order


def test_curves_end_where_patience_has_ended_a_seed(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    compared = comparison(tmp_path, seeds=2)
    results = write_report(compared, "")
    results["tasks"]["data"]["metric"] = "accuracy"
    seeds = [
        [{"event": "evaluate", "epoch": float(epoch), "accuracy": score} for epoch, score in enumerate(scores, start=1)]
        for scores in ([0.5, 0.75, 1.0], [0.0, 0.25])
    ]
    figure = Figure()
    comparison_drawings(results, {"data": {"mirror": seeds}})[0].draw(figure)
    assert figure.axes[1].lines[0].get_xydata().tolist() == [[1.0, 0.25], [2.0, 0.5]]


def test_curves_of_seeds_whose_epochs_have_different_lengths_are_averaged(tmp_path: Path) -> None:
    """The rows that are set aside, and so the number of packed rows, depend on the seed."""
    from matplotlib.figure import Figure

    results = write_report(comparison(tmp_path, seeds=2), "")
    seeds = [
        [{"event": "train", "epoch": step / length, "loss": loss} for step, loss in ((10, 2.0), (20, 1.0))]
        for length in (40, 80)
    ]
    figure = Figure()
    comparison_drawings(results, {"data": {"mirror": seeds}})[0].draw(figure)
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[0.1875, 2.0], [0.375, 1.0]]


@pytest.mark.parametrize("count", [1, 2, 60])
def test_smoothed_losses_do_not_lag_behind(tmp_path: Path, count: int) -> None:
    from matplotlib.figure import Figure

    results = write_report(comparison(tmp_path, seeds=1), "")
    losses = [100.0 - step for step in range(count)]
    run = [{"event": "train", "epoch": float(step), "loss": loss} for step, loss in enumerate(losses)]
    figure = Figure()
    comparison_drawings(results, {"data": {"mirror": [run]}})[0].draw(figure)
    assert figure.axes[0].lines[0].get_ydata().tolist() == pytest.approx(losses)


def test_one_seed_has_no_deviation(tmp_path: Path) -> None:
    compared = comparison(tmp_path, seeds=1)
    finish(compared, "mirror", 0, 0.5, "test")
    finish(compared, "none", 0, 0.75, "test")
    found, table = report(compared)
    assert "±" not in table
    assert row(table, "none")[2:4] == ["75.0", "+25.0 not tested"]
    assert found["methods"]["none"]["reported"]["test"] == {"mean": 0.75, "std": None, "values": [0.75]}
    assert "Score of one seed, times 100; learning rates chosen with 1 seed on rows that are not reported. " in table
    assert "Difference from `mirror`, not tested: that takes more than one seed. " in table


@pytest.mark.parametrize(
    ("words", "splits", "says"),
    [
        ([], ["test"], "on rows that are not reported. "),
        ([], [], "on rows that are also reported (validation). "),
        (["eval.report_splits=[dev]"], ["dev"], "on rows that are also reported (dev). "),
        (["data.validation_split=test", "eval.report_splits=[test]"], ["test"], "that are also reported (test). "),
    ],
)
def test_the_caption_says_whether_the_reported_rows_chose(
    tmp_path: Path, words: list[str], splits: list[str], says: str
) -> None:
    compared = comparison(tmp_path, *words, seeds=1)
    finish(compared, "mirror", 0, 0.5, *splits)
    finish(compared, "none", 0, 0.5, *splits)
    _, table = report(compared)
    assert says in table
    assert "0 rows" not in table


@pytest.mark.parametrize("metric", ["roc_auc", "log_loss"])
def test_scores_of_probabilities_are_tested_over_seeds_and_rows(tmp_path: Path, metric: str) -> None:
    compared, random = comparison(tmp_path, seeds=2), np.random.default_rng(0)
    references = random.integers(2, size=40)
    truth = np.stack([1 - references, references], axis=1)
    for label, skill in (("mirror", 0.0), ("none", 0.9)):
        odds = skill * truth + (1 - skill) * random.dirichlet([1, 1], size=40)
        arrays = {"test.predictions": references, "test.references": references, "test.probabilities": odds}
        score = METRICS[metric].compute(odds, references)
        for seed in range(2):
            finish(compared, label, seed, score, "test", metric=metric, arrays=arrays)
    found, table = report(compared)
    (test,) = found["tests"]["test"]
    assert test["low"] < test["difference"] < test["high"]
    assert test["verdict"] == "better"
    assert "with its 95% interval over seeds and rows" in table


def test_scores_of_texts_are_tested_over_seeds_and_rows(tmp_path: Path) -> None:
    compared, references = comparison(tmp_path, seeds=2), np.arange(60)
    for label, share in (("mirror", 0.5), ("none", 0.9)):
        scores = (references % 10 < 10 * share).astype(float)
        for seed in range(2):
            arrays = {"test.scores": scores, "test.references": references}
            finish(compared, label, seed, float(scores.mean()), "test", metric="squad_f1", arrays=arrays)
    found, table = report(compared)
    (test,) = found["tests"]["test"]
    assert test["low"] < test["difference"] < test["high"]
    assert (found["rows"], test["verdict"]) == ({"test": 60}, "better")
    assert "with its 95% interval over seeds and rows" in table


def test_runs_without_predictions_are_tested_over_seeds_alone(tmp_path: Path) -> None:
    compared = comparison(tmp_path, seeds=2)
    for seed in range(2):
        finish(compared, "mirror", seed, 0.5, "test")
        finish(compared, "none", seed, 0.75, "test")
    _, table = report(compared)
    assert "scored on" not in table
    assert "between rows, which are not resampled because these runs keep no predictions; `not" in table


def test_a_bar_in_the_name_of_a_method_adds_no_cell(tmp_path: Path) -> None:
    label = "mirror:target_modules=query|value"
    compared = comparison(tmp_path, seeds=1, methods=f"{label},none")
    finish(compared, label, 0, 0.5, "test")
    finish(compared, "none", 0, 0.5, "test")
    _, table = report(compared)
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert r"| `mirror:target_modules=query\|value` |" in table
    assert len({line.replace(r"\|", "").count("|") for line in lines[:4]}) == 1
