# SPDX-License-Identifier: Apache-2.0
"""A run's own page: what train writes for it, what it shows, and making it again for one run or several."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cli.console import mirrortune, reviews, write_table
from tests.cli.test_analyze import Reader, assert_axes_are_labelled

pytestmark = pytest.mark.figures
KIND = ["-t", "text-classification"]


class Runs:
    """Two short runs on the same reviews, the first of them merged, and one of a regression."""

    def __init__(self, folder: Path, model: Path) -> None:
        rows = reviews(120)
        data = write_table(folder / "reviews.csv", rows)
        numbers = write_table(folder / "numbers.csv", [(t, len(t) / 10 + (y == "positive")) for t, y in rows])
        self.folder, self.mirror, self.none, self.number = folder, folder / "mirror", folder / "none", folder / "number"
        short = ["--epochs", 2, "--batch-size", 16, "train.log_every_steps=1", "-q"]
        words = ["train", "-m", model, *short]
        cache = folder / "cache"
        for run, more in ((self.mirror, [*KIND, "-d", data, "--track", "tensorboard"]),
                          (self.none, [*KIND, "-d", data, "--method", "none"]),
                          (self.number, ["-t", "regression", "-d", numbers])):  # fmt: skip
            done = mirrortune(*words, *more, "-o", run, cache=cache)
            assert done.exit_code == 0, done.stderr
        merged = mirrortune("merge", self.mirror, "-o", folder / "merged", "-q", cache=cache)
        assert merged.exit_code == 0, merged.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Runs:
    pytest.importorskip("tensorboard")
    return Runs(tmp_path_factory.mktemp("pages"), tiny_model_dir)


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def read(path: Path) -> Any:
    return json.loads(text_of(path))


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in text_of(path).splitlines()]


def test_train_writes_a_page_that_needs_nothing_from_outside(runs: Runs) -> None:
    text = text_of(runs.mirror / "report.html")
    page = Reader(text)

    assert not page.open
    assert not {"script", "img", "iframe"} & set(page.tags)
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert page.tags.count("svg") == 5, "curves, confusion, data, angles, angles over time"
    for words in (
        "The hardest validation rows",
        "train.batch_size",
        "--batch-size",
        "Learning",
        "torch",
        "Validation:",
    ):
        assert words.lower() in text.lower()
    assert re.search(r"<td>train.batch_size</td><td>16</td><td>--batch-size</td>", text)
    assert re.search(r"<td>train.schedule</td><td>linear</td><td>default</td>", text)


def test_the_validation_rows_are_answered_for_by_the_kept_checkpoint(runs: Runs) -> None:
    found, results = read(runs.mirror / "validation.json"), read(runs.mirror / "results.json")
    confusion = found["confusion"]
    rows = sum(map(sum, confusion))

    assert found["labels"] == ["negative", "positive"]
    assert sum(confusion[i][i] for i in range(2)) / rows == pytest.approx(results["metrics"]["accuracy"])
    assert [sum(row) for row in confusion] == found["classes"]["validation"]
    assert rows + sum(found["classes"]["train"]) == 120
    losses = [e["loss"] for e in found["hardest"]]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == min(12, rows)
    wrong = rows - sum(confusion[i][i] for i in range(2))
    assert sum(e["reference"] != e["prediction"] for e in found["hardest"]) == min(wrong, 12)
    known = {text for text, _ in reviews(120)}
    assert all(e["text"] in known for e in found["hardest"])
    assert len(found["angles"]) == 13
    assert sum(found["lengths"]["train"]) == pytest.approx(1)


def test_a_regression_is_scattered(runs: Runs) -> None:
    found, results = read(runs.number / "validation.json"), read(runs.number / "results.json")
    errors = [(p - r) ** 2 for r, p in found["pairs"]]
    assert sum(errors) / len(errors) == pytest.approx(results["metrics"]["loss"], rel=1e-4)
    assert found["hardest"][0]["loss"] == pytest.approx(max(errors))
    assert "predicted value" in text_of(runs.number / "report.html")


def test_speed_and_angles_are_recorded_beside_the_log(runs: Runs) -> None:
    entries, events = lines_of(runs.mirror / "progress.jsonl"), lines_of(runs.mirror / "metrics.jsonl")
    speeds = [e for e in entries if "rows_per_second" in e]
    angles = [e for e in entries if "angle_rms" in e]

    assert [e["step"] for e in speeds] == [e["step"] for e in events if e["event"] == "train"]
    assert all(e["rows_per_second"] > 0 for e in speeds)
    left = [e["seconds_left"] for e in speeds]
    assert left[-1] == 0 < left[0]
    assert [e["step"] for e in angles] == [e["step"] for e in events if e["event"] == "evaluate"]
    assert angles[-1]["angle_rms"].keys() == read(runs.mirror / "validation.json")["angles"].keys()
    assert not any("angle_rms" in e for e in lines_of(runs.none / "progress.jsonl"))


def test_a_merge_is_shown_when_the_page_is_made_again(runs: Runs) -> None:
    before = text_of(runs.mirror / "report.html")
    done = mirrortune("report", runs.mirror, "--json")
    after = text_of(runs.mirror / "report.html")

    assert done.data == {"report": str(runs.mirror / "report.html"), "runs": [str(runs.mirror)]}
    assert "largest difference of an output" not in before
    assert "largest difference of an output" in after
    assert str(runs.folder / "merged") in after


def test_several_runs_go_on_one_page(runs: Runs, tmp_path: Path) -> None:
    path = tmp_path / "both.html"
    done = mirrortune("report", runs.mirror, runs.none, "-o", path)
    text = text_of(path)

    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"page: {path}\n"
    assert re.search(r"<td>adapter.method</td><td>mirror-scale</td><td>none</td>", text)
    assert "train.schedule" not in text, "the same in both"
    assert Reader(text).tags.count("svg") == 1


def test_runs_whose_folders_have_the_same_name_are_told_apart(runs: Runs, tmp_path: Path) -> None:
    first, second = tmp_path / "monday" / "run", tmp_path / "tuesday" / "run"
    shutil.copytree(runs.mirror, first)
    shutil.copytree(runs.number, second)
    done = mirrortune("report", first, second, "-o", tmp_path / "both.html")
    text = text_of(tmp_path / "both.html")

    assert done.exit_code == 0, done.stderr
    assert "monday/run" in text
    assert "tuesday/run" in text
    one, other = (read(run / "results.json")["selection_metric"] for run in (first, second))
    assert f"validation {one} or {other}" in text


def test_every_axis_has_a_label(runs: Runs) -> None:
    from mirrortune.reports.finished_run import FinishedRun
    from mirrortune.reports.run_figures import run_drawings
    from mirrortune.system.run_directory import RunDirectory

    for run in (runs.mirror, runs.number):
        for drawing in run_drawings([FinishedRun(RunDirectory(run))]):
            assert_axes_are_labelled(drawing)


def test_bad_input_is_answered_in_words(runs: Runs, tmp_path: Path) -> None:
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(runs.none / "recipe.yaml", unfinished)
    (tmp_path / "theirs.html").write_text("<p>mine", encoding="utf-8")
    for words, said in (
        ([tmp_path / "nowhere"], "it is not a run directory"),
        ([runs.mirror, f"{runs.mirror}/../{runs.mirror.name}"], "is the same run as one named before. Name each run"),
        ([unfinished], "this run has not finished"),
        ([runs.none, "-o", runs.none / "results.json"], "results.json belongs to the run there"),
        ([runs.none, "-o", tmp_path / "theirs.html"], "was not written by mirrortune and is left alone"),
    ):
        done = mirrortune("report", *words)
        assert (done.exit_code, done.stdout) == (2, "")
        assert said in done.said
    damaged = Path(shutil.copytree(runs.none, tmp_path / "damaged"))
    (damaged / "results.json").write_text("{")
    assert "damaged" in mirrortune("report", damaged).said


def test_only_damaged_runs_are_named(runs: Runs, tmp_path: Path) -> None:
    whole = [Path(shutil.copytree(runs.none, tmp_path / f"whole-{n}")) for n in range(2)]
    for broken in ({"results.json": "{", "recipe.yaml": ""}, {"results.json": '{"metrics": 3}'}):
        damaged = [Path(shutil.copytree(runs.none, tmp_path / name / str(len(broken)))) for name in ("left", "right")]
        for folder in damaged:
            for name, content in broken.items():
                (folder / name).write_text(content, encoding="utf-8")
        said = mirrortune("report", whole[0], damaged[0], whole[1], damaged[1], "-o", tmp_path / "page.html").stderr
        assert all(said.count(str(folder)) == 1 for folder in damaged)
        assert "whole" not in said


def test_a_tracker_is_told_every_number(runs: Runs) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = next(path.parent for path in (runs.mirror / "tensorboard").rglob("events.out*"))
    found = EventAccumulator(str(folder))
    found.Reload()
    events = lines_of(runs.mirror / "metrics.jsonl")
    losses = [(e["step"], e["loss"]) for e in events if e["event"] == "train"]

    assert [s.step for s in found.Scalars("train/loss")] == [s for s, _ in losses]
    assert [s.value for s in found.Scalars("train/loss")] == pytest.approx([v for _, v in losses])
    assert {"train/lr", "train/grad_norm", "validation/accuracy", "validation/loss"} <= set(found.Tags()["scalars"])


def test_a_tracker_that_is_not_there_is_refused_before_anything_else(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else real(name, *a))
    words = ["train", "-m", tiny_model_dir, "-o", tmp_path / "run", *KIND, "-d", "nowhere.csv", "--method", "mirrorr"]
    done = mirrortune(*words, "--track", "wandb")
    assert done.exit_code == 2
    assert "--track: the package of 'wandb' is not installed. pip install wandb" in done.said
    assert "unknown method 'mirrorr'" in done.said, "all problems at once"
    assert "wandb" in mirrortune(*words, "--track", "neptune").said


def test_a_tracker_that_does_not_start_is_named(tmp_path: Path) -> None:
    from mirrortune.errors import ConfigError
    from mirrortune.training.tracking import tracker

    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("no folder")
    with pytest.raises(ConfigError, match="--track: tensorboard does not start: "):
        tracker("tensorboard", tmp_path, {}, is_main=True).__enter__()


@pytest.mark.filterwarnings("ignore")  # those of the trackers' own dependencies
@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_standard_output_is_the_results_alone(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from mirrortune.training.tracking import tracker

    pytest.importorskip(name)
    with tracker(name, tmp_path, {"train.lr": 0.1}, is_main=True) as track:
        assert track is not None
        track({"train/loss": 0.5}, 1)
    assert capsys.readouterr().out == ""


def test_nobody_is_asked_to_log_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mirrortune.training.tracking import _local

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert _local("wandb", tmp_path) == {"WANDB_MODE": "offline"}
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret")
    assert _local("wandb", tmp_path) == {}
    assert "MLFLOW_TRACKING_URI" in _local("mlflow", tmp_path)
    assert os.environ.get("WANDB_MODE") is None
