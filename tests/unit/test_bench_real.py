# SPDX-License-Identifier: Apache-2.0
"""The benches on real data and of short runs, as far as they go without the data: plans, cards, tables, figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mirrortune.compare.grid import parse_contender
from mirrortune.config.recipe import override_layer, read_recipe, resolve
from tests.bench import real, short_runs
from tests.bench.real_hub import data_folder, publish
from tests.bench.real_report import averages, front, table, write_report
from tests.hub_server import LoopbackHub


def test_a_method_runs_on_every_task_before_the_next_wave_does() -> None:
    planned = list(real.plan())

    assert [name for name, _ in planned] == [*real.TASKS] * len(real.WAVES)
    assert planned[0][1] == real.WAVES[0]
    assert planned[-1][1] == tuple(method for wave in real.WAVES for method in wave)
    assert [name for name, _ in real.plan(["rte"])] == ["rte"] * len(real.WAVES)


@pytest.mark.parametrize("name", real.TASKS)
def test_the_settings_of_a_task_are_those_of_its_recipe(name: str) -> None:
    task = real.TASKS[name]
    recipe = resolve([read_recipe(task.recipe), override_layer([*task.words, *task.cpu])]).recipe
    for wave in real.WAVES:
        for method in wave:
            assert parse_contender(f"{method}:lr=1e-2", recipe.train.head_lr).lrs == (0.01,)


def test_every_method_has_a_rate_that_a_kept_comparison_has_chosen(tmp_path: Path) -> None:
    options = real.parse([str(tmp_path), "--device", "cuda"])

    rates = {name: real.kept_rates(real.TASKS[name]) for name in ("rte", "dtd")}
    words = real.command("rte", ("mirror", "lora:rank=8"), tmp_path, options)

    for kept in rates.values():
        assert {method for wave in real.WAVES for method in wave} <= set(kept)
    assert (rates["rte"]["lora:rank=8"], rates["dtd"]["lora:rank=8"]) == (0.001, 0.003), "each model has its own"
    assert words[words.index("--methods") + 1] == "mirror:lr=0.03,lora:rank=8:lr=0.001"
    assert "train.max_steps=160" not in words, "a GPU takes the recipe's own epochs"


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
    assert lines[0] == "| method | trec, accuracy | rte, accuracy | mean, text |"
    assert lines[2] == "| `mirror` | 85.0 ± 1.0 | 55.0 ± 1.0 | 70.0 |"
    assert lines[3] == "| `lora:rank=8` | 80.0 ± 1.0 (1) |  |  |", "it has no mean: a task is missing"
    assert str(tmp_path) not in table(found)
    assert averages(found, "text") == {"mirror": (10, pytest.approx(0.7))}
    figures = {path.name for path in (tmp_path / "report").glob("*.svg")}
    assert {"score-by-task-light.svg", "score-by-task-dark.svg", "score-by-size-text-light.svg"} <= figures


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

    assert said.startswith("| method | trained numbers | 40 steps | 80 steps | step |")
    assert "| mirror | 10 | 75.0 | 75.0 | 500 ms |" in said
