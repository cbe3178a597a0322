# SPDX-License-Identifier: Apache-2.0
"""prepare, train, eval and merge: their --json objects, the files they leave, and what they make of damaged ones."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from mirrortune.adapters.files.description import FORMAT_VERSION
from mirrortune.adapters.inject import attachment
from mirrortune.adapters.methods import PRESETS, method_names, preset
from mirrortune.config import strict_yaml
from mirrortune.merging import write as merge_folder
from mirrortune.runs import recorder
from mirrortune.training import trainer
from mirrortune.training.evaluate import EvalResult, evaluate_split
from mirrortune.training.trainer import Trainer
from tests.cli.console import changed, mirrortune, reviews, write_table
from tests.tiny_models import write_tiny_model

# Enough to learn the reviews by.
SETTINGS = ["--epochs", 4, "--batch-size", 16, "--lr", 0.1, "--head-lr", 1e-2]


class Finished:
    """A finished run of 12 epochs on 240 reviews, for tests that only read it.

    Attributes:
        run: its folder.
        words: the command line that made it.
        result: its --json object.
        cache: our cache, as the run left it.
    """

    def __init__(self, folder: Path, model: Path) -> None:
        rows = reviews(300)
        for name, part in {"train": rows[:240], "validation": rows[240:280], "test": rows[280:]}.items():
            write_table(folder / "data" / f"{name}.csv", part)
        self.run, self.cache, self.data = folder / "run", folder / "cache", folder / "data"
        self.words = ["train", "-m", model, "-t", "text-classification", "-d", self.data, *SETTINGS]
        self.result = mirrortune(*self.words, "-o", self.run, "--json", cache=self.cache).data


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Finished:
    return Finished(tmp_path_factory.mktemp("finished"), tiny_model_dir)


@pytest.fixture(scope="module")
def merged(finished: Finished) -> Path:
    folder = finished.run.parent / "merged"
    assert mirrortune("merge", finished.run, "-o", folder, cache=finished.cache).exit_code == 0
    return folder


@pytest.fixture
def copy(finished: Finished, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    return Path(shutil.copytree(finished.run, tmp_path / "copy"))


def score(target: object, *words: object, cache: Path) -> Any:
    """The --json object of eval."""
    return mirrortune("eval", target, "--json", *words, cache=cache).data


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def events_of(run: Path) -> list[Any]:
    """The log of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_train_tells_what_it_did_and_has_learned_something(finished: Finished) -> None:
    result = finished.result

    assert list(result) == ["run_dir", "metrics", "trainable_parameters", "head_parameters", "adapter_bytes",
                            "train_seconds", "samples_per_second", "tokens_per_second", "metrics_before",
                            "peak_memory_bytes", "peak_reserved_bytes", "padding_share"]  # fmt: skip
    assert result["run_dir"] == str(finished.run)
    assert result["metrics"]["accuracy"] > 0.9
    # Mirror: an angle for each of the 16 pairs of each of the 13 layers; a head of 2 x 32 weights and 2 biases.
    assert (result["trainable_parameters"], result["head_parameters"]) == (13 * (16 + 32), 66)
    assert result["adapter_bytes"] == sum(f.stat().st_size for f in (finished.run / "adapter").iterdir()) < 100_000
    assert result["train_seconds"] > 0
    assert result["samples_per_second"] == pytest.approx(4 * 240 / result["train_seconds"], rel=0.01)
    assert result["peak_memory_bytes"] > 2**20
    assert 0 <= result["padding_share"] < 0.5


def test_prepare_tells_what_train_would_do_and_fills_its_caches(finished: Finished, tmp_path: Path) -> None:
    words, cache = ["prepare", *finished.words[1:], "--json"], tmp_path / "cache"

    dry = mirrortune(*words, "--dry-run", cache=cache).data
    first = mirrortune(*words, cache=cache).data
    again = mirrortune(*words, cache=cache).data

    assert list(first) == ["targets", "trainable_parameters", "head_parameters", "svd_seconds", "svd_cache", "rows",
                           "truncated_rows", "duplicated_rows", "estimated_memory_bytes", "memory"]  # fmt: skip
    assert (first["targets"], first["trainable_parameters"], first["head_parameters"]) == (13, 13 * (16 + 32), 66)
    assert first["rows"] == {"train": 240, "validation": 40, "test": 20}
    assert first["truncated_rows"] == {"train": 0, "validation": 0}
    assert first["estimated_memory_bytes"] > 0
    assert dry["svd_cache"] == {"hits": 0, "misses": 0}
    assert first["svd_cache"] == {"hits": 0, "misses": 13}
    assert again["svd_cache"] == {"hits": 13, "misses": 0}
    files = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    assert mirrortune(*finished.words, "-o", tmp_path / "run", cache=cache).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()} == files
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (finished.run / "metrics.jsonl").read_bytes()


def test_eval_gives_the_runs_own_numbers_wherever_it_is_pointed(
    finished: Finished, merged: Path, tmp_path: Path
) -> None:
    plain = Path(shutil.copytree(merged, tmp_path / "plain"))
    for ours in ("recipe.yaml", "merge.json", "README.md"):
        (plain / ours).unlink()

    found = [score(target, cache=finished.cache) for target in (finished.run, finished.run / "adapter", merged)]
    found.append(score(plain, "-t", "text-classification", "-d", finished.data, cache=finished.cache))

    for each in found:
        assert list(each) == ["metrics", "split", "rows"]
        assert (each["split"], each["rows"]) == ("validation", 40)
        assert each["metrics"] == pytest.approx(finished.result["metrics"], abs=1e-4)


def test_eval_scores_any_split(finished: Finished) -> None:
    for split, rows in {"train": 240, "test": 20}.items():
        found = score(finished.run, "--split", split, cache=finished.cache)
        assert (found["split"], found["rows"]) == (split, rows)
        assert found["metrics"]["accuracy"] > 0.8
    outcome = mirrortune("eval", finished.run, "--split", "trial", cache=finished.cache)
    assert outcome.exit_code == 3
    assert "--split: there is no split 'trial'. Did you mean 'train'? Allowed: test, train, validation" in outcome.said


@pytest.mark.parametrize(
    ("content", "words", "code", "says"),
    [
        ("text\na film\n", "--split train", 3, "it has no label column 'label'. Allowed: text."),
        ("text\na film\nx\n", "", 3, "it has no label column 'label'. Allowed: text."),
        ("text,label\na film,\nx,\n", "--split train", 3, "2 of 2 rows have no label, so there is nothing to score"),
        (
            "text,label\na film,great\nx,bad\n",
            "--split train",
            3,
            "label 'great' is not among the classes. Allowed: negative",
        ),
    ],
)
def test_eval_on_rows_that_cannot_be_scored(
    finished: Finished, tmp_path: Path, content: str, words: str, code: int, says: str
) -> None:
    (tmp_path / "other.csv").write_text(content, encoding="utf-8")

    outcome = mirrortune("eval", finished.run, "-d", tmp_path / "other.csv", *words.split(), cache=finished.cache)

    assert outcome.exit_code == code
    assert says in outcome.said
    assert outcome.stdout == ""


def test_a_model_with_other_outputs_is_not_scored(finished: Finished, merged: Path, tmp_path: Path) -> None:
    write_table(tmp_path / "three.csv", [("x", label) for label in "abcabc"])

    outcome = mirrortune("eval", merged, "-d", tmp_path / "three.csv", cache=finished.cache)

    assert outcome.exit_code == 2
    assert "the model has 2 outputs, the task has 3" in outcome.said


def test_the_run_directory_is_as_it_was_promised(finished: Finished) -> None:
    run = finished.run
    scores = {e["step"]: e["accuracy"] for e in events_of(run) if e["event"] == "evaluate"}
    assert scores.pop(0) == read(run / "results.json")["metrics_before"]["accuracy"], "before the first step"
    best = max(scores, key=lambda step: scores[step])

    assert {p.name for p in run.iterdir()} - {"reports"} == {  # which is there once it has been merged
        "recipe.yaml", "environment.json", "metrics.jsonl", "trainer_state.json", "results.json", "README.md",
        "curves.png", "adapter", "checkpoints", "progress.jsonl", "validation.json", "report.html", "status.json",
        ".mirrortune.json",
    }  # fmt: skip
    assert sorted(scores) == [15, 30, 45, 60], "one evaluation at the end of every epoch"
    assert {p.name for p in (run / "checkpoints").iterdir()} == {f"step-{best:06d}", "step-000060"}
    for folder in (run / "checkpoints").iterdir():
        assert {p.name for p in folder.iterdir()} == {
            "adapter.json", "adapter.safetensors", "state.json", "training.safetensors", "SHA256SUMS",
        }  # fmt: skip
    for name in ("adapter.json", "adapter.safetensors"):
        kept = run / "checkpoints" / f"step-{best:06d}" / name
        assert (run / "adapter" / name).read_bytes() == kept.read_bytes()
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not [p for p in run.rglob("*") if p.suffix in (".pt", ".bin", ".pkl", ".pth")]
    assert [p.name for p in run.rglob(".*")] == [".mirrortune.json"]
    assert not (run / "adapter" / "adapter_config.json").exists()


def test_a_run_says_in_a_file_how_it_ended(finished: Finished, tiny_model_dir: Path, tmp_path: Path) -> None:
    assert read(finished.run / "status.json") == {"status": "finished", "step": None, "message": None, "exit_code": 0}
    write_table(tmp_path / "reviews.csv", reviews(40))
    words = ["-m", tiny_model_dir, "-t", "text-classification", "-d", tmp_path / "reviews.csv", "--head-lr", 1e29]

    outcome = mirrortune("train", *words, "--lr", 0, "--batch-size", 4, "--epochs", 2, "-o", tmp_path / "run", "-q")

    assert outcome.exit_code == 2
    status = read(tmp_path / "run" / "status.json")
    assert (status["status"], status["exit_code"]) == ("diverged", 2)
    assert f"step {status['step']}: the training loss is" in status["message"]
    assert status["message"] in outcome.said
    refused = mirrortune("report", tmp_path / "run")
    assert refused.exit_code == 2
    assert f"this run has not finished: it diverged at step {status['step']}" in refused.said


def test_the_run_directory_says_what_was_run(finished: Finished, tiny_model_dir: Path) -> None:
    environment = read(finished.run / "environment.json")
    results, state = read(finished.run / "results.json"), read(finished.run / "trainer_state.json")

    assert {"torch", "transformers", "accelerate", "safetensors"} <= environment["packages"].keys()
    assert environment["seed"] == 0
    assert environment["num_processes"] == 1
    assert environment["model"]["name"] == str(tiny_model_dir)
    train = hashlib.sha256((finished.data / "train.csv").read_bytes()).hexdigest()
    assert environment["data"]["sha256"]["train.csv"] == train
    assert environment["argv"]
    assert environment["origins"]["train.lr"] == "--lr"
    assert results.items() >= finished.result.items()
    # The names of transformers' Trainer, for which "loss" is always that of training rows.
    events, logs = events_of(finished.run), state["log_history"]
    kinds = {
        "train": {"loss": "loss", "lr": "learning_rate"},
        "evaluate": {"loss": "eval_loss", "accuracy": "eval_accuracy"},
    }
    for log, event in zip(logs, events, strict=True):
        found = kinds[event["event"]]
        assert log.items() >= {theirs: event[own] for own, theirs in found.items()}.items()
        assert not log.keys() & ({"loss"} if event["event"] == "evaluate" else {"lr"})
    card = (finished.run / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert f"accuracy | {finished.result['metrics']['accuracy']:.4f}" in card
    adapter = read(finished.run / "adapter" / "adapter.json")
    assert (adapter["format_version"], adapter["adapter"]["method"]) == (FORMAT_VERSION, "mirror-scale")
    assert adapter["task"]["labels"] == ["negative", "positive"]
    assert len(adapter["layers"]) == 13


def test_the_saved_recipe_repeats_the_run(finished: Finished, tmp_path: Path) -> None:
    outcome = mirrortune("train", finished.run / "recipe.yaml", "-o", tmp_path / "again", cache=finished.cache)

    assert outcome.exit_code == 0, outcome.stderr
    assert (tmp_path / "again" / "metrics.jsonl").read_bytes() == (finished.run / "metrics.jsonl").read_bytes()
    saved = strict_yaml.load((finished.run / "recipe.yaml").read_text(encoding="utf-8"), "saved")[0]
    assert saved["train"]["lr"] == 0.1
    assert saved["adapter"]["target_modules"] == "all-linear"


def test_rates_are_logged_as_they_were(finished: Finished, tmp_path: Path) -> None:
    """Each parameter group has its own peak; one of them may be zero."""
    words = [*finished.words[:7], "--lr", 0, "--head-lr", 1e-2, "--max-steps", 4, "train.log_every_steps=1"]
    outcome = mirrortune(*words, "-o", tmp_path / "run", "train.warmup_ratio=0", cache=finished.cache)

    assert outcome.exit_code == 0, outcome.stderr
    rates = [(e["lr"], e["head_lr"]) for e in events_of(tmp_path / "run") if e["event"] == "train"]
    assert rates == [(0, pytest.approx(1e-2 * share)) for share in (1, 0.75, 0.5, 0.25)]


MERGE_KEYS = {"max_abs_logit_error", "max_rel_weight_error", "tolerance", "passed"}
PLAIN = """
import json, sys
sys.modules["mirrortune"] = None
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, texts = sys.argv[1], json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
with torch.no_grad():
    logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
json.dump([model.config.id2label[i] for i in logits.argmax(-1).tolist()], sys.stdout)
"""


def test_a_merged_model_needs_nothing_of_ours(finished: Finished, merged: Path) -> None:
    texts, labels = zip(*reviews(300)[240:280], strict=True)

    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(merged)], input=json.dumps(texts), capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    right = sum(a == b for a, b in zip(found, labels, strict=True))
    assert right / len(labels) == pytest.approx(finished.result["metrics"]["accuracy"], abs=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_merge_is_verified_and_keeps_the_stored_precision(tmp_path: Path, dtype: str) -> None:
    base = write_tiny_model(tmp_path / "base", dtype=getattr(torch, dtype))
    write_table(tmp_path / "rows.csv", reviews(40))
    words = ["-m", base, "-t", "text-classification", "-d", tmp_path / "rows.csv", "--epochs", 2, "--lr", 0.1]
    assert mirrortune("train", *words, "-o", tmp_path / "run").exit_code == 0

    found = mirrortune("merge", tmp_path / "run", "-o", tmp_path / "merged", "--json").data

    assert list(found) == ["output_dir", "format", "verification"]
    assert (found["output_dir"], found["format"]) == (str(tmp_path / "merged"), "hf")
    verification = found["verification"]
    assert verification.keys() >= MERGE_KEYS
    assert verification["passed"] is True
    assert 0 <= verification["max_abs_logit_error"] <= verification["tolerance"]
    assert read(tmp_path / "merged" / "merge.json")["verification"] == verification
    written, before = load_file(tmp_path / "merged" / "model.safetensors"), load_file(base / "model.safetensors")
    assert {str(t.dtype) for t in written.values()} == {f"torch.{dtype}"}
    changed = {n for n, t in before.items() if not torch.equal(t, written[f"bert.{n}"])}
    assert changed
    assert all(n.endswith("weight") and "LayerNorm" not in n and "embeddings" not in n for n in changed)


@pytest.mark.parametrize("name", ["query.weight", "LayerNorm.weight", "classifier.bias"])
def test_a_merge_that_was_not_written_right_is_not_kept(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The disk changes one number of one tensor."""
    write = merge_folder.write_shards

    def write_and_corrupt(folder: Path, shards: Any, make: Any) -> None:
        write(folder, shards, make)
        path = folder / "model.safetensors"
        tensors = load_file(path)
        tensors[next(n for n in tensors if n.endswith(name))].view(-1)[0] += 0.01
        save_file(tensors, path, {"format": "pt"})

    monkeypatch.setattr(merge_folder, "write_shards", write_and_corrupt)

    outcome = mirrortune("merge", finished.run, "-o", tmp_path / "out" / "merged", cache=finished.cache)

    assert outcome.exit_code == 5
    assert "the merged model differs from base + adapter: outputs differ by at most" in outcome.said
    assert "It was not written" in outcome.said
    assert outcome.stdout == ""
    assert not (tmp_path / "out").exists(), "made for the merge alone"


def test_an_earlier_merge_survives_one_that_fails(
    finished: Finished, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Path(shutil.copytree(merged, tmp_path / "merged"))
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    monkeypatch.setattr(merge_folder, "write_shards", lambda folder, shards, make: None)

    outcome = mirrortune("merge", finished.run, "-o", target, "--overwrite", cache=finished.cache)

    assert outcome.exit_code == 5
    assert "other tensors are missing" in outcome.said

    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir() if "merged" in p.name] == ["merged"]


def test_a_merge_replaces_only_a_merge(finished: Finished, merged: Path, tmp_path: Path) -> None:
    target = Path(shutil.copytree(merged, tmp_path / "merged"))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("years of work", encoding="utf-8")

    def merge(*words: object) -> tuple[int, str]:
        outcome = mirrortune("merge", finished.run, "-o", *words, cache=finished.cache)
        return outcome.exit_code, outcome.said

    assert merge(target)[0] == 2
    assert "not empty. Choose another with -o, or replace it with --overwrite" in merge(target)[1]
    assert merge(target, "--overwrite")[0] == 0
    assert merge(tmp_path / "theirs", "--overwrite")[0] == 2
    assert "is no folder that mirrortune wrote and is left alone" in merge(tmp_path / "theirs", "--overwrite")[1]
    assert (tmp_path / "theirs" / "thesis.tex").read_text(encoding="utf-8") == "years of work"


def edit(name: str, change: Callable[[Any], object]) -> Callable[[Path], object]:
    """Change an adapter's description."""

    def damage(adapter: Path) -> None:
        described = read(adapter / name)
        change(described)
        (adapter / name).write_text(json.dumps(described), encoding="utf-8")

    return damage


def flip(adapter: Path) -> None:
    """Flip a bit of an adapter's last number."""
    path = adapter / "adapter.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (flip, "damaged: its hash differs from the one in adapter.json. Restore the adapter folder"),
    "no tensors": (lambda a: (a / "adapter.safetensors").unlink(), "adapter.safetensors: missing or unreadable"),
    "no description": (lambda a: (a / "adapter.json").unlink(), "adapter.json: missing or damaged"),
    "half a description": (lambda a: (a / "adapter.json").write_text("{"), "adapter.json: missing or damaged"),
    "a newer format": (
        edit("adapter.json", lambda d: d.update(format_version=99)),
        f"format version 99. Allowed: {FORMAT_VERSION}. Upgrade mirrortune",
    ),
    "an edited description": (
        edit("adapter.json", lambda d: d["layers"].popitem()),
        "adapter.json: damaged or edited: its content does not match its own hash. Restore the adapter folder",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("command", ["eval", "merge"])
def test_a_damaged_adapter_is_refused(finished: Finished, copy: Path, command: str, name: str) -> None:
    damage, says = DAMAGE[name]
    damage(copy / "adapter")

    words = ["-o", copy.parent / "merged"] if command == "merge" else []
    outcome = mirrortune(command, copy, *words, cache=finished.cache)

    assert outcome.exit_code == 5, outcome.stderr
    assert says in outcome.said
    assert outcome.stdout == ""
    assert not (copy.parent / "merged").exists()


@pytest.mark.parametrize("command", ["eval", "merge"])
def test_an_adapter_of_another_base_is_refused(finished: Finished, tmp_path: Path, command: str) -> None:
    other = write_tiny_model(tmp_path / "other", seed=1)

    words = ["-o", tmp_path / "merged"] if command == "merge" else []
    outcome = mirrortune(command, finished.run, "-m", other, *words, cache=finished.cache)

    assert outcome.exit_code == 5
    assert "the base weight is not the one that the adapter was trained on" in outcome.said
    assert not (tmp_path / "merged").exists()


def test_a_run_is_continued_only_with_its_own_settings(finished: Finished, copy: Path) -> None:
    log = (copy / "metrics.jsonl").read_bytes()
    words = changed(finished.words, "--lr", 0.2, "--seed", 1, "--patience", 3)

    outcome = mirrortune(*words, "-o", copy, "--resume", cache=finished.cache)

    assert outcome.exit_code == 2
    assert "--resume: train.lr: the run was started with 0.1, got 0.2. Use the same settings." in outcome.said
    assert "--resume: train.seed: the run was started with 0, got 1." in outcome.said
    assert "--resume: train.patience: the run was started with null, got 3." in outcome.said
    assert (copy / "metrics.jsonl").read_bytes() == log


def test_a_run_is_continued_only_on_its_own_data_and_base(desk: Path, tiny_model_dir: Path) -> None:
    base = Path(shutil.copytree(tiny_model_dir, desk / "base"))
    words = ["train", "-m", "base", "-t", "text-classification", "-d", "reviews.csv", "--max-steps", 1, "-o", "run"]
    assert mirrortune(*words).exit_code == 0
    log, rows = (desk / "run" / "metrics.jsonl").read_bytes(), (desk / "reviews.csv").read_bytes()
    write_table(desk / "reviews.csv", reviews(59))
    other_data = mirrortune(*words, "--resume")
    (desk / "reviews.csv").write_bytes(rows)
    weights = load_file(base / "model.safetensors")
    save_file({name: weight * 3 for name, weight in weights.items()}, base / "model.safetensors", {"format": "pt"})
    other_base = mirrortune(*words, "--resume")

    assert (other_data.exit_code, other_base.exit_code) == (2, 2)
    assert "the data is not that of the run: reviews.csv has changed. Restore the data, or start" in other_data.said
    assert f"the weights of '{base}' are not those that the run was started with" in other_base.said
    assert (desk / "run" / "metrics.jsonl").read_bytes() == log


def test_a_run_is_continued_with_the_defaults_that_it_was_started_with(
    desk: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", "-m", tiny_model_dir, "-t", "text-classification", "-d", "reviews.csv", "--max-steps", 1]
    fitted = Mock(side_effect=Trainer)
    monkeypatch.setattr("mirrortune.runs.train.Trainer", fitted)
    mirrortune(*words, "-o", "run")
    later = replace(PRESETS["mirror-scale"], lr=0.5, options={"scale_top_k": "all", "unit": "angle"})
    monkeypatch.setitem(PRESETS, "mirror-scale", later)
    monkeypatch.setattr("mirrortune.data.tokenize.resolve_max_length.__defaults__", (16,))

    again = mirrortune(*words, "-o", "run", "--resume")
    new = mirrortune("train", "run/recipe.yaml", "-o", "new")
    lora = mirrortune("train", "run/recipe.yaml", "--method", "lora", "-o", "lora")
    named = mirrortune("train", "run/recipe.yaml", "--lr", 0.02, "--resume")
    other = mirrortune(*words, "-o", "run", "--lr", 0.5, "--resume")
    method = mirrortune(*words, "-o", "run", "--method", "lora", "--resume")

    assert (again.exit_code, named.exit_code) == (0, 0), again.said + named.said
    assert "--resume: train.lr: the run was started with 0.02, got 0.5. Use the same settings." in other.said
    assert "--resume: adapter.method: the run was started with 'mirror-scale', got 'lora'." in method.said
    calls = fitted.call_args_list
    assert [call.kwargs["settings"].lr for call in calls] == [0.02, 0.02, 0.5, PRESETS["lora"].lr, 0.02]
    specs = [attachment(call.args[0]).spec.resolved_options["unit"] for call in (calls[1], calls[2], calls[4])]
    assert specs == ["weight", "angle", "weight"]
    assert [call.kwargs["train"].max_length for call in calls] == [64, 64, 16, 16, 64]
    said = "run/recipe.yaml was run with other defaults than there are here; to repeat that run, add"
    assert f"{said} adapter.options.unit=weight data.max_length=64 train.lr=0.02" in new.said
    assert said not in again.said + named.said + lora.said


def test_a_finished_run_that_is_continued_stays_as_it_is(finished: Finished, copy: Path) -> None:
    outcome = mirrortune(*finished.words, "-o", copy, "--resume", "--json", cache=finished.cache)

    assert outcome.data["metrics"] == finished.result["metrics"]
    assert (copy / "metrics.jsonl").read_bytes() == (finished.run / "metrics.jsonl").read_bytes()


def test_the_kept_answers_are_those_that_the_kept_checkpoint_gives_again(finished: Finished, tmp_path: Path) -> None:
    scores = iter((0.5, 0.9, 0.8, 0.7, 0.6))  # the first is of before training

    def worse_and_worse(*args: Any, **kwargs: Any) -> EvalResult:
        """The answers as they are, with scores by which the first epoch is the best and the last is not."""
        found = evaluate_split(*args, **kwargs)
        return replace(found, metrics=found.metrics | {"accuracy": next(scores)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "evaluate_split", worse_and_worse)
        mirrortune(*finished.words, "-o", tmp_path / "run", cache=finished.cache)
    assert next(scores, None) is None
    kept = (tmp_path / "run" / "validation.json").read_bytes()
    (tmp_path / "run" / "validation.json").unlink()

    mirrortune(*finished.words, "-o", tmp_path / "run", "--resume", cache=finished.cache)

    assert (tmp_path / "run" / "validation.json").read_bytes() == kept, "nothing was trained: they were scored again"


def test_a_run_scores_its_validation_rows_no_more_than_its_log_says(finished: Finished, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        again, scored = Mock(side_effect=recorder.evaluate_split), Mock(side_effect=trainer.evaluate_split)
        patch.setattr(recorder, "evaluate_split", again)
        patch.setattr(trainer, "evaluate_split", scored)
        mirrortune(*finished.words, "-o", tmp_path / "run", cache=finished.cache)

    log = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    assert (again.call_count, scored.call_count) == (0, log.count('"evaluate"'))


@pytest.mark.parametrize("name", ["training.safetensors", "adapter.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_not_continued_from(finished: Finished, copy: Path, name: str) -> None:
    last = copy / "checkpoints" / "step-000060"
    (last / name).write_bytes((last / name).read_bytes()[:-20])

    outcome = mirrortune(*finished.words, "-o", copy, "--resume", cache=finished.cache)

    assert outcome.exit_code == 5
    assert "step-000060" in outcome.said
    assert "damaged" in outcome.said
    assert outcome.stdout == ""


# Of PEFT's tuners one: tests/unit/adapters/test_tuners.py has them all. Every run has one method of each sort: a core
# with pairs and one without, measured pairs, a tuner, plain parameters, the head alone. Measured bases are in
# test_measured_bases.py.
_OF_EACH_SORT = ("mirror", "psoft", "adaptive", "lora", "full", "none")
_METHODS = [*method_names(with_peft=False), "lora"]


@pytest.mark.parametrize(
    "method", [m if m in _OF_EACH_SORT else pytest.param(m, marks=pytest.mark.slow) for m in _METHODS]
)
def test_every_method_goes_the_whole_way(desk: Path, tiny_model_dir: Path, method: str) -> None:
    words = ["-m", tiny_model_dir, "-t", "text-classification", "-d", "reviews.csv", "--method", method]
    words += ["--rank", 8] if isinstance(preset(method).rank, int) else []  # the papers' ranks are for larger matrices

    planned = mirrortune("prepare", *words, "--json").data
    trained = mirrortune("train", *words, "-o", "run", "--max-steps", 3, "--json").data
    scored = mirrortune("eval", "run", "--json").data
    verification = mirrortune("merge", "run", "-o", "merged", "--json").data["verification"]
    merged = mirrortune("eval", "merged", "--json").data

    for count in ("trainable_parameters", "head_parameters"):
        assert planned[count] == trained[count]
    assert (trained["trainable_parameters"] == 0) is (method == "none")
    assert verification["passed"]
    assert scored["metrics"] == pytest.approx(trained["metrics"], abs=1e-5)
    assert merged["metrics"] == pytest.approx(trained["metrics"], abs=1e-4)
