# SPDX-License-Identifier: Apache-2.0
"""``mirrortune compare``: a small grid from end to end, what is kept when it goes on, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mirrortune.compare.grid import Cell, make_grid, slug
from mirrortune.compare.run import Comparison
from mirrortune.config.schema import Recipe
from mirrortune.errors import DataError, DivergedError, MirrortuneError
from mirrortune.system.console import Reporter
from mirrortune.system.run_directory import RunDirectory
from mirrortune.system.run_status import recorded_status
from tests.cli.console import Outcome, changed, finish, mirrortune, reviews, start, write_table
from tests.trees import tree

pytestmark = pytest.mark.figures
GRID = ["--seeds", 2, "--lr-grid", "1e-1", "--extensions", 0, "--epochs", 2, "--batch-size", 16, "--jobs", 2]


class Compared:
    """Two methods, two seeds, on reviews with a test split; for tests that only read it.

    Attributes:
        root: the comparison's folder.
        words: the command line.
        outcome: of the command.
    """

    def __init__(self, folder: Path, model: Path) -> None:
        rows = reviews(160)
        for name, part in {"train": rows[:96], "validation": rows[96:128], "test": rows[128:]}.items():
            write_table(folder / "data" / f"{name}.csv", part)
        self.root, self.cache = folder / "out", folder / "cache"
        data = ["-m", model, "-t", "text-classification", "-d", folder / "data", "--head-lr", 1e-2]
        self.words = ["compare", *data, "--methods", "mirror,none", *GRID, "-o", self.root]
        self.outcome = self.run()

    def run(self, *words: object) -> Outcome:
        """The same command again, with more words."""
        return mirrortune(*self.words, *words, cache=self.cache)

    @property
    def results(self) -> dict[str, Any]:
        """What results.json holds."""
        found = json.loads((self.root / "results.json").read_text(encoding="utf-8"))
        assert isinstance(found, dict)
        return found


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Compared:
    return Compared(tmp_path_factory.mktemp("compared"), tiny_model_dir)


def test_it_reports_every_method_on_rows_that_chose_nothing(compared: Compared) -> None:
    assert compared.outcome.exit_code == 0, compared.outcome.stderr
    task = compared.results["tasks"]["data"]
    assert task["splits"] == ["held-out half", "test"]
    assert task["rows"] == {"held-out half": 16, "test": 32}
    assert list(task["methods"]) == ["mirror", "none"]
    for method in task["methods"].values():
        assert method["seeds"] == [0, 1]
        for spread in method["reported"].values():
            assert len(spread["values"]) == 2
            assert spread["mean"] == pytest.approx(sum(spread["values"]) / 2)
    assert task["methods"]["mirror"]["trainable_parameters"] > task["methods"]["none"]["trainable_parameters"] == 0
    assert task["methods"]["none"]["lr_key"] == "train.head_lr"
    assert [t["label"] for t in task["tests"]["test"]] == ["none"]


def test_the_table_says_what_the_results_say(compared: Compared) -> None:
    table = (compared.root / "table.md").read_text(encoding="utf-8")
    assert table in compared.outcome.stdout
    mean = 100 * compared.results["tasks"]["data"]["methods"]["mirror"]["reported"]["test"]["mean"]
    row = next(line for line in table.splitlines() if line.startswith("| `mirror`"))
    assert f"{mean:.1f} ±" in row


def test_the_table_shows_what_chose_the_learning_rates(compared: Compared) -> None:
    table = (compared.root / "table.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in table.splitlines() if line.startswith("| `") and " *" in line}
    for label, method in compared.results["tasks"]["data"]["methods"].items():
        (rate, tried), *_ = method["tuning"].items()
        assert float(rate) == method["lr"]
        assert f"{100 * tried['score']:.1f} ({tried['loss']:.3f}) *" in rows[label]


def test_it_draws_its_figures(compared: Compared) -> None:
    for name in ("score_per_task.png", "score_by_trained_numbers.png", "curves-data.png"):
        assert (compared.root / name).read_bytes().startswith(b"\x89PNG")


def test_methods_share_data_order_and_head(compared: Compared) -> None:
    # Both heads start alike and see the same first batch, so the first loss is the same: no adapter has moved yet.
    first = []
    for label in ("mirror", "none"):
        folder = compared.root / "cells" / "data" / label / "lr-1e-01" / "seed-0"
        events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        recipe = (folder / "recipe.yaml").read_text()
        assert "protocol: split-dev" in recipe
        first.append(events[0]["epoch"])
        assert not (folder / "checkpoints").exists()
    assert first[0] == first[1]


def test_the_page_holds_the_table_and_every_figure(compared: Compared) -> None:
    page = (compared.root / "report.html").read_text(encoding="utf-8")
    table = (compared.root / "table.md").read_text(encoding="utf-8")
    row = next(line for line in table.splitlines() if line.startswith("| `mirror`"))
    assert all(cell.strip(" `") in page for cell in row.strip("| ").split("|"))
    assert page.count("<svg ") == len(list(compared.root.glob("*.png"))) == 3
    assert not re.search(r"""(src|[^:]href)=["']?(https?:|//)""", page)


def test_a_second_run_keeps_what_is_finished(compared: Compared) -> None:
    before = {p: p.stat().st_mtime_ns for p in compared.root.rglob("cells/**/results.json")}
    assert len(before) == 4
    again = compared.run("--report-only", "--json")
    assert again.data["tasks"] == compared.results["tasks"]
    assert {p: p.stat().st_mtime_ns for p in compared.root.rglob("cells/**/results.json")} == before


def test_rates_can_be_chosen_by_the_loss(compared: Compared) -> None:
    again = compared.run("--report-only", "--choose-by", "loss", "--json")
    assert again.data["choose_by"] == "loss"
    assert "by the loss on rows that are not reported" in (compared.root / "table.md").read_text(encoding="utf-8")
    assert compared.run("--report-only", "--choose-by", "luck").exit_code == 2


def test_other_settings_do_not_mix_with_what_is_there(compared: Compared) -> None:
    refused = compared.run("--max-length", 16)
    assert refused.exit_code == 2
    assert "it holds a comparison of 'data' with other settings" in refused.said
    assert "data.max_length was " in refused.said
    assert "is 16. " in refused.said
    assert compared.run("--report-only", "train.num_workers=0").exit_code == 0


def test_runs_of_another_method_in_the_same_folder_are_not_taken(compared: Compared, tmp_path: Path) -> None:
    root = shutil.copytree(compared.root, tmp_path / "out")
    (root / "cells" / "data" / "mirror").rename(root / "cells" / "data" / "mirror-rank-8")
    words = [{compared.root: root, "mirror,none": "none,mirror:rank=8"}.get(w, w) for w in compared.words]
    before = tree(root)
    for more in ((), ("--report-only",)):
        refused = mirrortune(*words, *more, cache=compared.cache)
        assert refused.exit_code == 2
        assert "mirror-rank-8 holds runs of another method than 'mirror:rank=8': adapter.rank is None" in refused.said
        assert tree(root) == before


def test_a_method_may_name_its_learning_rate_by_its_key(compared: Compared, tmp_path: Path) -> None:
    root, label = shutil.copytree(compared.root, tmp_path / "out"), "mirror:train.lr=1e-1"
    (root / "cells" / "data" / "mirror").rename(root / "cells" / "data" / slug(label))
    for rate in (0.03, 0.3):  # its neighbours, which --lr-grid does not replace
        neighbour = Cell("data", label, rate, 0).folder(root)
        neighbour.mkdir(parents=True)
        (neighbour / "status.json").write_text('{"status": "diverged"}', encoding="utf-8")
    words = [{compared.root: root, "mirror,none": f"none,{label}"}.get(w, w) for w in compared.words]
    again = mirrortune(*words, "--report-only", cache=compared.cache)
    assert again.exit_code == 0, again.stderr
    results = json.loads((root / "results.json").read_text(encoding="utf-8"))
    assert results["tasks"]["data"]["methods"][label]["seeds"] == [0, 1]


def test_runs_that_were_scored_in_different_ways_are_not_compared(compared: Compared, tmp_path: Path) -> None:
    root = shutil.copytree(compared.root, tmp_path / "out")
    words = [*(w if w != compared.root else root for w in compared.words), "--report-only"]
    table = (root / "table.md").read_text(encoding="utf-8")
    (run,) = root.glob("cells/data/none/lr-*/seed-1")

    predictions, results = run / "predictions.safetensors", run / "results.json"
    kept = predictions.read_bytes()
    arrays = load_file(predictions)
    save_file({name: array[:3].clone() for name, array in arrays.items()}, predictions)
    refused = mirrortune(*words, cache=compared.cache)
    assert refused.exit_code == 2
    assert "'none' cannot be tested against 'mirror': run 2 was scored on 3 rows, not 16" in refused.said
    predictions.write_bytes(kept)

    found = json.loads(results.read_text(encoding="utf-8"))
    del found["reported"]["test"]
    results.write_text(json.dumps(found), encoding="utf-8")
    refused = mirrortune(*words, cache=compared.cache)
    assert refused.exit_code == 2
    assert "seed 1 was scored by accuracy on held-out half, seed 0 by accuracy on held-out half, test" in refused.said
    assert (root / "table.md").read_text(encoding="utf-8") == table


def test_runs_on_other_data_or_another_base_are_not_mixed_with_new_ones(compared: Compared, tmp_path: Path) -> None:
    root, data, model = (tmp_path / name for name in ("out", "data", "model"))
    shutil.copytree(compared.root, root)
    shutil.copytree(compared.root.parent / "data", data)
    words = [{compared.root.parent / "data": data, compared.root: root}.get(w, w) for w in compared.words]
    model = Path(shutil.copytree(compared.words[2], model))
    words[2] = model
    for file in root.rglob("*.yaml"):  # the same rows and weights in another place
        text = file.read_text(encoding="utf-8").replace(str(compared.root.parent / "data"), str(data))
        file.write_text(text.replace(str(compared.words[2]), str(model)), encoding="utf-8")
    kept = tree(root / "cells")
    assert mirrortune(*words, cache=compared.cache).exit_code == 0
    assert tree(root / "cells") == kept

    rows, swapped = (data / "train.csv").read_bytes(), {b"positive": b"negative", b"negative": b"positive"}
    (data / "train.csv").write_bytes(re.sub(b"positive|negative", lambda found: swapped[found[0]], rows))
    refused = mirrortune(*words, cache=compared.cache)
    assert refused.exit_code == 2
    assert ": the data is not that of the run: train.csv has changed. Restore the data, or choose" in refused.said
    assert mirrortune(*words, "--report-only", cache=compared.cache).exit_code == 0
    (data / "train.csv").write_bytes(rows)

    weights = load_file(model / "model.safetensors")
    weights = {name: 2 * tensor for name, tensor in weights.items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    refused = mirrortune(*words, cache=compared.cache)
    assert refused.exit_code == 2
    assert "are not those that the run was started with. Restore the model, or choose another folder" in refused.said
    assert tree(root / "cells") == kept


def test_all_methods_are_checked_before_any_is_trained(compared: Compared, tmp_path: Path) -> None:
    words = [w if w != compared.root else tmp_path / "new" for w in compared.words]
    words[words.index("mirror,none")] = "mirror:pairing=miror,svft:bandz=2,none:rank=3"
    refused = mirrortune(*words, cache=compared.cache)
    assert refused.exit_code == 2
    for part in ("Did you mean 'mirror'", "bandz", "method 'none' has no rank"):
        assert part in refused.said
    assert not (tmp_path / "new").exists()


def test_a_folder_of_something_else_is_left_alone(compared: Compared, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    words = [w if w != compared.root else tmp_path for w in compared.words]
    refused = mirrortune(*words, cache=compared.cache)
    assert refused.exit_code == 2
    assert "holds no comparison" in refused.said
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_what_linked_recipes_lead_to_is_kept(
    compared: Compared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shutil.copytree(compared.root, tmp_path / "out")
    words = [w if w != compared.root else root for w in compared.words]
    (cell,) = root.glob("cells/data/mirror/lr-*/seed-0")
    shutil.rmtree(cell)
    cell.with_name("seed-0.yaml").unlink()
    mine = {name: tmp_path / name for name in ("recipe.yaml", "linked.yaml", "thesis.txt")}
    (root / "recipes" / "data.yaml").rename(mine["recipe.yaml"])
    mine["recipe.yaml"].write_text(mine["recipe.yaml"].read_text(encoding="utf-8") + "# my comment\n")
    mine["thesis.txt"].write_text("years of work")
    cell.with_name("seed-0.yaml").symlink_to(mine["thesis.txt"])
    monkeypatch.setattr(Comparison, "_command", lambda *given: (1, "error: no training here"))
    for link in (Path.hardlink_to, Path.symlink_to):
        (root / "recipes" / "data.yaml").unlink(missing_ok=True)
        link(root / "recipes" / "data.yaml", mine["recipe.yaml"])
        outcome = mirrortune(*words, cache=compared.cache)
        assert "no training here" in outcome.said
        assert "# my comment" not in (root / "recipes" / "data.yaml").read_text(encoding="utf-8")
        assert mine["recipe.yaml"].read_text(encoding="utf-8").endswith("# my comment\n")
        assert mine["thesis.txt"].read_text() == "years of work"
    assert not cell.with_name("seed-0.yaml").is_symlink()


def test_linked_folders_of_a_comparison_are_refused(compared: Compared, tmp_path: Path) -> None:
    root = shutil.copytree(compared.root, tmp_path / "out")
    words = [w if w != compared.root else root for w in compared.words]
    (seed,) = root.glob("cells/data/mirror/lr-*/seed-1")
    for folder in (root / "recipes", seed, *seed.parents[:4]):
        kept = folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(kept)
        before = tree(tmp_path)
        refused = mirrortune(*words, cache=compared.cache)
        assert refused.exit_code == 2
        assert f"{folder.relative_to(root)} is a symbolic link to " in refused.said
        assert tree(tmp_path) == before
        folder.unlink()
        kept.rename(folder)


def test_a_cell_that_fails_stops_it_with_its_own_message(compared: Compared, tmp_path: Path) -> None:
    words = [w if w != compared.root else tmp_path / "new" for w in compared.words]
    words[words.index("mirror,none")] = "psoft:rank=4000"
    refused = mirrortune(*changed(words, "--jobs", 1), cache=compared.cache)
    assert refused.exit_code == 2
    assert "4000" in refused.said


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on(compared: Compared, tmp_path: Path) -> None:
    words = [str(w) if w != compared.root else str(tmp_path / "new") for w in compared.words]
    env = {**os.environ, "MIRRORTUNE_CACHE": str(compared.cache)}
    process = start(*words, env=env)
    until = time.monotonic() + 90
    while not list(tmp_path.rglob("cells/**/results.json")) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    stopped = finish(process)
    assert stopped.exit_code == 130, stopped.stderr
    assert "finished runs are kept" in stopped.said
    done = finish(start(*words, "--json", env=env)).data
    method = done["tasks"]["data"]["methods"]["mirror"]
    assert method["reported"] == compared.results["tasks"]["data"]["methods"]["mirror"]["reported"]


@pytest.mark.parametrize("warning", ["", "Warning: You are sending unauthenticated requests to the HF Hub.\n"])
def test_a_cell_that_diverges_loses_whatever_else_it_says(
    compared: Compared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warning: str
) -> None:
    grid = make_grid({"data": Recipe()}, "mirror,none", seeds=1, tune_seeds=1, lr_grid="1e-1", extensions=0)
    found = Comparison(tmp_path, grid, {"data": Recipe()}, Reporter())
    cell = Cell("data", "mirror", 0.1, 0)

    def command(self: Comparison, words: list[str], slot: int, jobs: int) -> tuple[int, str]:
        run = RunDirectory(Path(words[words.index("-o") + 1]))
        run.create()
        with pytest.raises(type(error)), recorded_status(run, is_main=True):
            raise error
        return error.exit_code, f"{warning}error: {error}"

    monkeypatch.setattr(Comparison, "_command", command)
    error: MirrortuneError = DivergedError(3, "the training loss is nan", fix="Lower --lr")
    found._run_cell(cell, 0, 1)
    assert found.score(cell) == (-math.inf, -math.inf)

    error = DataError("reviews.csv", "no rows")
    other = Cell("data", "none", 0.1, 0)
    with pytest.raises(MirrortuneError, match=r"seed 0: reviews\.csv: no rows\.$") as caught:
        found._run_cell(other, 0, 1)
    assert caught.value.exit_code == 3
    assert found.score(other) is None
