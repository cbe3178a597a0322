# SPDX-License-Identifier: Apache-2.0
"""The benches on real data and of short runs, as far as they go without the data: plans, cards, tables, figures."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from mirrortune.compare.grid import parse_contender
from mirrortune.config.recipe import override_layer, read_recipe, resolve
from tests.bench import answers, image_rates, real, real_claims, short_runs
from tests.bench.real_hub import data_folder, publish
from tests.bench.real_report import averages, front, table, write_report
from tests.hub_server import LoopbackHub


def test_a_method_runs_on_every_task_before_the_next_wave_does() -> None:
    planned = list(real.plan())

    assert [name for name, _ in planned] == [*real.TASKS] * len(real.WAVES)
    assert planned[0][1] == real.WAVES[0]
    assert planned[-1][1] == tuple(method for wave in real.WAVES for method in wave)
    assert [name for name, _ in real.plan(["rte"])] == ["trec", "rte"] * len(real.WAVES), "rates are chosen on trec"
    for name, task in real.TASKS.items():
        assert [*real.TASKS].index(task.tuned_on or name) <= [*real.TASKS].index(name)


def test_methods_of_an_earlier_report_are_kept_and_not_run_again(tmp_path: Path) -> None:
    earlier = {
        "trec": {
            "methods": {"svft": {"seeds": [0, 1, 2], "lr": 0.03}, "mirror": {"seeds": [0], "lr": 0.03}},
            "tests": 1,
        },
        "dtd": {"methods": {}},
    }
    (tmp_path / "results.json").write_text(json.dumps(earlier))
    options = real.parse(
        [str(tmp_path), "--kept", str(tmp_path / "results.json"), "--methods", "mirror", "svft", "psoft", "--jobs", "6"]
    )
    assert real.missing("trec", real.ORDER, options) == ["mirror", "psoft"], "one of three seeds is not enough"
    assert real.missing("rte", real.ORDER, options) == ["mirror", "svft", "psoft"]
    words = real.command("rte", ["svft", "psoft"], tmp_path, options)
    assert words[words.index("--methods") + 1] == "svft:lr=0.03,psoft:lr=?", "rates are those of the earlier report"
    assert words[words.index("--jobs") + 1] == "6"

    new = {"psoft": {"seeds": [0, 1, 2]}, "mirror": {"seeds": [0, 1, 2]}, "svft": {"seeds": [0, 1]}}
    found = real.merge(earlier, {"trec": {"methods": new, "tests": 2}, "rte": {"methods": new}})
    assert list(found) == ["trec", "rte", "dtd"]
    seeds = {label: own["seeds"] for label, own in found["trec"]["methods"].items()}
    assert seeds == {"mirror": [0, 1, 2], "svft": [0, 1, 2], "psoft": [0, 1, 2]}
    assert [*seeds] == ["mirror", "svft", "psoft"], "in the order of the plan"
    assert found["trec"]["tests"] == 1


def test_a_rate_on_images_is_chosen_on_the_tasks_that_all_rates_have() -> None:
    methods: image_rates.Scores = {}
    for rate, tasks in {"1e-2": {"flowers": 0.5, "dtd": 0.1}, "3e-2": {"flowers": 0.4}}.items():
        for name, score in tasks.items():
            split = {"values": [score, score]}
            found = {"seeds": [0, 1], "reported": {"held-out half": split, "test": split}}
            image_rates.add(methods, {"tasks": {real.TASKS[name].recipe: {"methods": {f"svft:lr={rate}": found}}}})
    assert image_rates.shared(methods["svft"]) == ["flowers"]
    assert image_rates.choose(methods["svft"]) == 0.01
    assert "| `svft` | 0.01 * | 50.0 | 50.0 ± 0.0 | 10.0 |" in image_rates.table(methods, {"svft": 0.01})


@pytest.mark.parametrize("name", real.TASKS)
def test_the_settings_of_a_task_are_those_of_its_recipe(name: str) -> None:
    task = real.TASKS[name]
    recipe = resolve([read_recipe(task.recipe), override_layer([*task.words, *task.cpu])]).recipe
    for wave in real.WAVES:
        for method in wave:
            assert parse_contender(f"{method}:lr=1e-2", recipe.train.head_lr).lrs == (0.01,)


def test_every_method_tries_the_rate_that_a_kept_comparison_has_chosen(tmp_path: Path) -> None:
    for name in ("rte", "dtd"):
        assert {method for wave in real.WAVES for method in wave} <= set(real.kept_rates(real.TASKS[name]))
    options = real.parse([str(tmp_path), "--device", "cuda"])
    methods = ("mirror", "lora:rank=8")

    words = {name: real.command(name, methods, tmp_path, options) for name in ("trec", "flowers", "rte")}
    tried = {name: own[own.index("--methods") + 1] for name, own in words.items()}

    assert tried["trec"] == "mirror:lr=0.03/0.1,lora:rank=8:lr=0.001/0.003"
    assert tried["flowers"] == "mirror:lr=0.03,lora:rank=8:lr=0.001", "images take those of their model's comparisons"
    assert tried["rte"] == "mirror:lr=?,lora:rank=8:lr=?"
    assert "train.max_steps=160" not in words["trec"], "a GPU takes the recipe's own epochs"
    comparison(
        tmp_path / "trec", "trec", {"mirror:lr=0.03/0.1": {"lr": 0.1}, "lora:rank=8:lr=0.001/0.003": {"lr": None}}
    )
    words["rte"] = real.command("rte", methods, tmp_path, options)
    assert words["rte"][words["rte"].index("--methods") + 1] == "mirror:lr=0.1,lora:rank=8:lr=?"
    words["rte"] = real.command("rte", ("random", "neighbor:unit=angle"), tmp_path, options)
    assert words["rte"][words["rte"].index("--methods") + 1] == "random:lr=0.1,neighbor:unit=angle:lr=?", (
        "of mirror pairs"
    )
    words["cola"] = real.command("cola", ("adaptive", real.ADAPTIVE_SCALE), tmp_path, options)
    assert (
        words["cola"][words["cola"].index("--methods") + 1]
        == f"adaptive:lr=0.01/0.03,{real.ADAPTIVE_SCALE}:lr=0.01/0.02"
    )


def comparison(folder: Path, recipe: str, methods: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Write the results of a comparison."""
    folder.mkdir()
    found = {"metric": "accuracy", "splits": ["held-out half", "test"], "rows": {"test": 500}, "methods": methods,
             "tests": {"test": []}}  # fmt: skip
    results = {"tasks": {recipe: found}, "environment": {"device": "cpu"}, "command": f"mirrortune -o {folder}"}
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return found


def scored(label: str, numbers: int, *values: float) -> dict[str, Any]:
    """A method's part of the results."""
    mean = sum(values) / len(values)
    return {"lr": 0.01, "seeds": list(range(len(values))), "trainable_parameters": numbers,
            "reported": {"test": {"mean": mean, "std": 0.01, "values": list(values)}}}  # fmt: skip


def test_the_table_and_the_figures_are_of_the_runs_that_have_finished(tmp_path: Path) -> None:
    methods = {"mirror": scored("mirror", 10, 0.8, 0.9), "lora:rank=8": scored("lora:rank=8", 100, 0.8)}
    comparison(tmp_path / "trec", "trec", methods)
    comparison(tmp_path / "rte", "glue/rte", {"mirror:lr=0.01": scored("mirror", 10, 0.5, 0.6)})

    found = real.read({name: tmp_path / name / "results.json" for name in real.TASKS})
    write_report(found, tmp_path, tmp_path / "report")

    lines = (tmp_path / "report" / "table.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "| method | trainable parameters | trec, accuracy | rte, accuracy | mean, text |"
    assert lines[2] == "| `mirror` | 10 | 85.0 ± 1.0 (2) | 55.0 ± 1.0 (2) | 85.0 |"
    assert lines[3] == "| `lora:rank=8` | 100 | 80.0 (1) |  | 80.0 |", "its mean leaves out the task without it"
    assert "Mean, text: over trec." in lines
    assert (tmp_path / "report" / "summary.md").read_text(encoding="utf-8").splitlines() == [
        "| method | trainable parameters | trec, accuracy |",
        "|---|---|---|",
        "| `mirror` | 10 | 85.0 ± 1.0 (2) |",
        "| `lora:rank=8` | 100 | 80.0 (1) |",
    ]
    assert str(tmp_path) not in table(found)
    assert averages(found, "text") == {"mirror": (10, pytest.approx(0.85)), "lora:rank=8": (100, pytest.approx(0.8))}
    figures = {path.name for path in (tmp_path / "report").glob("*.svg")}
    assert {"score-by-task-light.svg", "score-by-task-dark.svg", "score-by-size-text-light.svg"} <= figures


def test_contrasts_pair_the_runs_of_equal_task_and_seed() -> None:
    methods = {"mirror": scored("mirror", 10, 0.8, 0.9, 0.85), "svft": scored("svft", 20, 0.85, 0.92, 0.885)}
    task = {"splits": ["test"], "methods": methods}
    alone = {"splits": ["test"], "methods": {"mirror": methods["mirror"]}}

    assert real_claims.gaps(task, "mirror", "svft") == pytest.approx([-5, -2, -3.5])
    assert real_claims.gaps(alone, "mirror", "svft") == []
    ahead = {"splits": ["test"], "methods": {**methods, "svft": scored("svft", 20, 0.78, 0.88, 0.83)}}
    short = {"splits": ["test"], "methods": {**methods, "svft": scored("svft", 20, 0.1)}}
    said = real_claims.contrasts({"one": task, "two": ahead, "three": alone, "four": task, "five": short})
    # Over tasks, not over seeds: means -3.5, +2 and -3.5; t = -1.667 / (3.175 / sqrt(3)), 2 degrees of freedom.
    assert (
        "| `mirror` - `svft` | -3.5 (3) | +2.0 (3) |  | -3.5 (3) | +70.0 (1) | 1 of 3 | -1.7 [-9.6, +6.2] | 0.46 |"
        in said
    )
    assert "neighbor" not in said, "no task has it"
    assert "| 0 of 2 | -3.5 |  |" in real_claims.contrasts({"one": task, "two": task}), "two tasks are too few"


def test_spectra_are_those_of_a_first_run_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "trec" / "cells" / "trec" / "mirror-lr-0.01" / "lr-1e-02" / "seed-0"
    run.mkdir(parents=True)
    overall = {"relative": 0.5, "shares": {"amplification": 0.25, "reorientation": 0.75, "new": 0.0},
               "value_change": {"top": 0.02, "tail": -0.01}, "turned": 7.0}  # fmt: skip
    asked = []

    def analyze(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(words[-2])
        return subprocess.CompletedProcess(words, 0, json.dumps({"overall": overall, "claims": [{"agreeing": 0.4}]}))

    monkeypatch.setattr(subprocess, "run", analyze)
    found = {"trec": {"methods": {"mirror": {**scored("mirror", 10, 0.8), "label": "mirror:lr=0.01"},
                                  "none": {**scored("none", 0, 0.7), "label": "none:lr=0.3"}}}}  # fmt: skip

    said = [real_claims.spectra(found, tmp_path, "trec") for _ in range(2)]

    assert asked == [str(run)]
    assert "| `mirror` | 50.0% | 25.0% | 75.0% | 0.0% | +2.00% | -1.00% | 7.0° | 40% |" in said[0]
    assert said[0] == said[1]


def test_runs_of_a_comparison_that_has_not_ended_are_reported(tmp_path: Path) -> None:
    words = real.command("trec", ("mirror", "svft"), tmp_path, real.parse([str(tmp_path), "--seeds", "2"]))
    root = tmp_path / "trec"
    real.refresh(root, "trec", words)
    assert not root.exists(), "nothing has run"
    (root / "recipes").mkdir(parents=True)
    (root / "recipes" / "trec.yaml").write_text(resolve([read_recipe("trec")]).recipe.to_yaml(), encoding="utf-8")
    cells = [root / "cells" / "trec" / "mirror-lr-0.03-0.1" / f"lr-{lr}" / "seed-0" for lr in ("3e-02", "1e-01")]
    sizes = ("trainable_parameters", "head_parameters", "adapter_bytes", "median_step_seconds", "peak_memory_bytes",
             "train_seconds", "pairing_seconds")  # fmt: skip
    metrics = {"accuracy": 0.9, "loss": 0.4}
    done = {
        **dict.fromkeys(sizes, 10),
        "selection_metric": "accuracy",
        "metrics": metrics,
        "reported": {"test": metrics},
    }
    for cell in cells:
        cell.mkdir(parents=True)
        (cell / "results.json").write_text(json.dumps(done), encoding="utf-8")

    real.refresh(root, "trec", words)

    found = real.read({"trec": root / "results.json"})
    assert "| `mirror` | 10 | 90.0 (1) | 90.0 |" in table(found)
    assert "svft" not in found["trec"]["methods"]


def test_the_front_is_what_so_few_numbers_reach() -> None:
    assert front([(10, 0.5), (20, 0.4), (20, 0.7), (30, 0.7), (5, 0.1)]) == [(5, 0.1), (10, 0.5), (20, 0.7)]


def test_data_sets_are_served_under_their_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in ("owner__one/rte/train-0.parquet", "owner__one/rte/test-0.parquet", "owner__one/cola/train-0.parquet",
                 "owner__two/data/train-0.parquet", "notes/readme.parquet"):  # fmt: skip
        (tmp_path / "rows" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "rows" / file).write_bytes(b"rows")
    monkeypatch.setenv("MIRRORTUNE_REALDATA", str(tmp_path / "rows"))
    source = data_folder()
    assert source is not None
    assert data_folder(tmp_path / "nothing") is None

    assert publish(source, tmp_path / "hub") == ["owner/one", "owner/two"]

    found = LoopbackHub(tmp_path / "hub").find("datasets", "owner/one", "main")
    assert found.files["rte/train-0.parquet"] == b"rows"
    configs = yaml.safe_load(found.files["README.md"].decode().split("---")[1])["configs"]
    assert [config["config_name"] for config in configs] == ["cola", "rte"]
    assert configs[1]["data_files"] == [
        {"split": "train", "path": "rte/train-*"}, {"split": "test", "path": "rte/test-*"},
    ]  # fmt: skip
    (two,) = yaml.safe_load((tmp_path / "hub/datasets/owner/two/README.md").read_text().split("---")[1])["configs"]
    assert two["config_name"] == "default"


def test_short_runs_come_by_columns_and_are_timed_by_their_differences(tmp_path: Path) -> None:
    planned = list(short_runs.cells(2))
    assert len(set(planned)) == len(planned)
    assert {cell.steps for cell in planned[: 2 * len(short_runs.METHODS)]} == {short_runs.STEPS[0]}
    for steps, seconds in ((40, 30.0), (80, 50.0)):
        file = short_runs.Cell("mirror", steps, 0).file(tmp_path)
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"accuracy": 0.75, "loss": 0.5, "trained_numbers": 10, "cpu_seconds": seconds}))

    methods = short_runs.read(tmp_path, 1)
    said = short_runs.table({"seeds": 1, "methods": methods, "hardware": "x", "versions": {}})

    assert said.startswith("| method | trainable parameters | 40 steps | 80 steps | step |")
    assert "| mirror | 10 | 75.0 | 75.0 | 500 ms |" in said


def test_answers_are_tabled_beside_those_before_training(tmp_path: Path) -> None:
    options = answers.parse([str(tmp_path), "--model", "weights", "--rows", "100"])
    words = answers.command("gsm8k", tmp_path, options)
    label, *others = words[words.index("--methods") + 1].split(",")
    assert "eval.before=true" in label
    assert all("eval.before=false" in other for other in others)
    run = {"metrics": {"exact_match": 0.04, "perplexity": 3.0}, "metrics_before": {"exact_match": 0, "perplexity": 9.0},
           "trainable_parameters": 1200, "adapter_bytes": 5000, "train_seconds": 90.0}  # fmt: skip
    cell = answers.Cell("llm/gsm8k", label, 0.01, answers.SEED).folder(tmp_path / "gsm8k")
    cell.mkdir(parents=True)
    (cell / "results.json").write_text(json.dumps(run), encoding="utf-8")
    tasks = {"llm/gsm8k": {"methods": {label: {"lr": 0.01, "seeds": [0]}, "svft:lr=1e-1": {"lr": None, "seeds": []}}}}
    results = {"tasks": tasks, "environment": {"device": "cpu"}, "command": f"mirrortune {' '.join(words)}"}
    (tmp_path / "gsm8k" / "results.json").write_text(json.dumps(results), encoding="utf-8")

    said = answers.table(answers.read(tmp_path))

    assert "| gsm8k | before training |  |  |  | 9.00 | 0.0 ± 0.5 |  |" in said
    assert "| gsm8k | `mirror-scale` | 0.01 | 1,200 | 5 kB | 3.00 | 4.0 ± 2.0 | 1.5 min |" in said
    assert "16 steps of 8 rows, 100 rows answered" in said
    assert str(tmp_path) not in said
