# SPDX-License-Identifier: Apache-2.0
"""From Hub ids to a scored, merged model, over a real socket: cold, warm and offline, and every way the Hub can fail.

The libraries read their environment when they are imported, so commands run in processes of their own; those under one
environment share a process (``Client``), which saves the seconds of its imports.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.cli.console import REPOSITORY, Outcome, changed, finish, start
from tests.hub_fixtures import client_env, write_glue, write_tiny_roberta
from tests.hub_server import LoopbackHub

TRAIN = ["train", "--model", "roberta-base", "--task", "glue/sst2"]
RUN = "runs/sst2-roberta-base-mirror-scale"

CLIENT = """
import dataclasses, json, os, sys, time
import datasets, huggingface_hub, transformers  # their logs go to this process's stderr, not to a command's
from tests.cli.console import mirrortune
time.sleep = lambda seconds: None  # the clients wait between their attempts; nobody here does
for line in sys.stdin:
    words, env = json.loads(line)
    os.environ.update(env)
    print(json.dumps(dataclasses.astuple(mirrortune(*words))), flush=True)
    for name in env:
        del os.environ[name]
"""


class Client:
    """A process that runs commands one after the other, in a folder of its own."""

    def __init__(self, env: dict[str, str], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        env = {**env, "MIRRORTUNE_CACHE": str(folder / "cache"), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", CLIENT], env=env, cwd=folder, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def mirrortune(self, *words: object, **env: str) -> Outcome:
        """Run a command, with more environment if it is given."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([[str(word) for word in words], env]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the client died, see its traceback"
        return Outcome(*json.loads(line))

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=60)


@contextmanager
def client(hub: LoopbackHub, folder: Path, *, offline: bool = False) -> Iterator[Client]:
    """A client of ``hub`` whose caches are new."""
    opened = Client(client_env(hub.endpoint, folder / "hf-home", offline=offline), folder)
    try:
        yield opened
    finally:
        opened.close()


def run_script(hub: LoopbackHub, folder: Path, *words: object, offline: bool = False) -> Outcome:
    """Run a command as users do, in a folder of its own, with the caches in it."""
    env = client_env(hub.endpoint, folder / "hf-home", offline=offline)
    process = start(
        *words, launcher=["-c", "import os, runpy, sys; os.chdir(sys.argv.pop(1)); runpy.run_module(sys.argv.pop(1), "
                          "run_name='__main__', alter_sys=True)", str(folder)],
        env={**env, "MIRRORTUNE_CACHE": str(folder / "cache"), "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    return finish(process)


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def downloads(hub: LoopbackHub) -> list[str]:
    """Files that were fetched."""
    return [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repositories of the Hub."""
    folder = tmp_path_factory.mktemp("hub")
    write_tiny_roberta(folder)
    write_glue(folder)
    return folder


@pytest.fixture(scope="module")
def hub(root: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(root) as opened:
        yield opened


@dataclass
class Trained:
    """A client, and a run that it made from a cold cache."""

    client: Client
    cold: Outcome
    fetched: list[str] = field(default_factory=list)

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.client.folder / RUN


@pytest.fixture(scope="module")
def trained(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    with client(hub, tmp_path_factory.mktemp("client")) as opened:
        hub.requests.clear()
        cold = opened.mirrortune(*TRAIN, "--json")
        yield Trained(opened, cold, downloads(hub))


def test_a_model_and_a_task_are_all_it_takes(hub: LoopbackHub, trained: Trained) -> None:
    result = trained.cold.data

    assert result["run_dir"] == RUN
    assert result["metrics"].keys() == {"accuracy", "loss"}
    model, data = hub.find("models", "roberta-base", "main"), hub.find("datasets", "nyu-mll/glue", "main")
    environment = read(trained.run / "environment.json")
    assert set(environment["model"].pop("weights")) == {"sampled", "adapted"}
    assert environment["model"] == {"name": "roberta-base", "revision": None, "commit": model.commit}
    assert (
        environment["data"].items() >= {"repository": "nyu-mll/glue", "config": "sst2", "commit": data.commit}.items()
    )
    adapter = read(trained.run / "adapter" / "adapter.json")
    assert adapter["base"]["commit"] == model.commit
    assert adapter["task"]["labels"] == ["negative", "positive"]
    assert f"/roberta-base/resolve/{model.commit}/model.safetensors" in trained.fetched
    assert [path for path in trained.fetched if "sst2/train" in path]
    assert not [path for path in trained.fetched if "stsb" in path]
    assert "data: nyu-mll/glue train, 120 rows" in trained.cold.stderr
    assert "base_model: roberta-base" in (trained.run / "README.md").read_text(encoding="utf-8")


def test_the_second_run_fetches_nothing_and_is_the_same(hub: LoopbackHub, trained: Trained) -> None:
    hub.requests.clear()

    warm = trained.client.mirrortune(*TRAIN, "-o", "warm", "--json")

    assert warm.data["metrics"] == trained.cold.data["metrics"]
    assert downloads(hub) == []
    log = (trained.client.folder / "warm" / "metrics.jsonl").read_bytes()
    assert log == (trained.run / "metrics.jsonl").read_bytes()


def test_rows_are_streamed_from_the_hub(hub: LoopbackHub, trained: Trained) -> None:
    words = [word for word in TRAIN if word not in (RUN, "-o")]
    outcome = trained.client.mirrortune(*words, "-o", "streamed", "--max-steps", 3, "data.streaming=true", "--json")

    assert outcome.data["metrics"].keys() == {"accuracy", "loss"}
    assert "data: nyu-mll/glue train, streamed; of its first 120 rows:" in outcome.stderr
    adapter = read(trained.client.folder / "streamed" / "adapter" / "adapter.json")
    assert adapter["task"]["labels"] == ["negative", "positive"]
    environment = read(trained.client.folder / "streamed" / "environment.json")
    data = hub.find("datasets", "nyu-mll/glue", "main")
    assert environment["data"].items() >= {"commit": data.commit, "streamed": True}.items()


@pytest.mark.slow
def test_prepare_is_all_that_needs_the_network(root: Path, trained: Trained, tmp_path: Path) -> None:
    with LoopbackHub(root) as hub:
        prepared = run_script(hub, tmp_path, "prepare", *TRAIN[1:], "--json")
    hub.requests.clear()

    offline = run_script(hub, tmp_path, *TRAIN, "--json", offline=True)

    assert prepared.is_plain
    assert offline.is_plain
    assert prepared.data["rows"] == {"train": 120, "validation": 40}
    assert offline.data["metrics"] == trained.cold.data["metrics"]
    assert hub.requests == []
    assert (tmp_path / RUN / "metrics.jsonl").read_bytes() == (trained.run / "metrics.jsonl").read_bytes()
    commits = [read(folder / RUN / "environment.json") for folder in (tmp_path, trained.client.folder)]
    for part in ("model", "data"):
        assert commits[0][part]["commit"] == commits[1][part]["commit"]


def test_a_run_is_scored_and_merged_and_the_merged_model_is_published(root: Path, trained: Trained) -> None:
    ours, expected = trained.client, trained.cold.data["metrics"]

    scores = [ours.mirrortune("eval", RUN, "--json").data]
    verification = ours.mirrortune("merge", RUN, "-o", "merged", "--json").data["verification"]
    scores.append(ours.mirrortune("eval", "merged", "--json").data)
    (root / "models" / "me").mkdir(exist_ok=True)
    published = root / "models" / "me" / "sst2"
    (ours.folder / "merged").rename(published)
    scores.append(ours.mirrortune("eval", "me/sst2", "--task", "glue/sst2", "--json").data)
    rows = ["-d", "nyu-mll/glue", "data.config=sst2", "--split", "validation", "--format", "jsonl"]
    answered = ours.mirrortune("predict", "me/sst2", "-t", "text-classification", *rows)
    answers = [json.loads(line) for line in answered.stdout.splitlines()]
    shutil.copytree(trained.run / "adapter", root / "models" / "me" / "adapter")
    adapted = ours.mirrortune("predict", "me/adapter", *rows)
    spectra = [ours.mirrortune("analyze", "roberta-base", tuned, "--json").data for tuned in (RUN, "me/sst2")]

    assert verification["passed"]
    assert spectra[0]["overall"]["changed"] == spectra[1]["overall"]["changed"] > 0
    assert spectra[0]["overall"]["shares"] == pytest.approx(spectra[1]["overall"]["shares"], abs=1e-4)
    assert len(answers) == 40
    by_adapter = [json.loads(line) for line in adapted.stdout.splitlines()]
    assert [row["prediction"] for row in by_adapter] == [row["prediction"] for row in answers]
    right = [["negative", "positive"][row["label"]] == row["prediction"] for row in answers]
    assert sum(right) / 40 == pytest.approx(expected["accuracy"])
    for score in scores:
        assert score["rows"] == 40
        assert score["metrics"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "metrics", "splits"),
    [
        ("glue/stsb", {"pearson", "spearmanr"}, ["validation"]),
        ("glue/mnli", {"accuracy"}, ["validation", "validation_matched", "validation_mismatched"]),
    ],
)
def test_other_tasks_of_glue(trained: Trained, task: str, metrics: set[str], splits: list[str]) -> None:
    words = ["train", "-m", "roberta-base", "-t", task, "--max-steps", 2, "-o", task, "--json"]

    outcome = trained.client.mirrortune(*words)

    assert outcome.data["metrics"].keys() == metrics | {"loss"}
    where = ["-d", "hf://nyu-mll/glue:stsb"] if task == "glue/stsb" else []
    for split in splits:
        score = trained.client.mirrortune("eval", task, "--split", split, "--json", *where).data
        assert score["metrics"].keys() == metrics | {"loss"}
        assert score["rows"] == 40
    unlabelled = trained.client.mirrortune("eval", task, "--split", "test")
    assert unlabelled.exit_code == 3
    assert "20 of 20 rows have no label, so there is nothing to score. Name a labelled split" in unlabelled.said
    if task == "glue/mnli":
        assert read(trained.client.folder / task / "adapter" / "adapter.json")["task"]["labels"] == [
            "entailment", "neutral", "contradiction",
        ]  # fmt: skip
    asked: dict[str, list[object]] = {"STS-B.tsv": ["--split", "test"]}
    if task == "glue/mnli":
        asked = {"MNLI-m.tsv": ["--split", "test"], "MNLI-mm.tsv": ["--split", "test_mismatched"],
                 "AX.tsv": ["-d", "hf://nyu-mll/glue:ax", "--split", "test"]}  # fmt: skip
    (trained.client.folder / "submission").mkdir(exist_ok=True)
    for name, words in asked.items():  # the files of GLUE's server
        answered = trained.client.mirrortune("eval", task, *words, "--predictions", "submission")
        assert answered.exit_code == 0, answered.stderr
        assert "no labels, nothing scored" in answered.stdout
        assert "20 of 20 rows have no label: nothing is scored" in answered.stderr
        lines = (trained.client.folder / "submission" / name).read_text(encoding="utf-8").splitlines()
        cells = [line.split("\t") for line in lines]
        assert cells[0] == ["index", "prediction"]
        assert [index for index, _ in cells[1:]] == [str(i) for i in range(20)]
        said = [answer for _, answer in cells[1:]]
        if task == "glue/mnli":
            assert set(said) <= {"entailment", "neutral", "contradiction"}
        else:
            assert all(re.fullmatch(r"[0-5]\.\d{3}", answer) and float(answer) <= 5 for answer in said)


@pytest.mark.slow
def test_a_repository_that_moved_on_does_not_change_an_old_run(root: Path, trained: Trained) -> None:
    before = read(trained.run / "environment.json")["model"]["commit"]
    readme = root / "models" / "roberta-base" / "README.md"
    readme.write_text("A new commit.\n", encoding="utf-8")
    try:
        score = trained.client.mirrortune("eval", RUN, "--json")
        new = trained.client.mirrortune(*TRAIN, "-o", "moved", "--max-steps", 1, "--json")
        pinned = trained.client.mirrortune(*TRAIN, "-o", "pinned", "--max-steps", 1, "--revision", before, "--json")
    finally:
        readme.unlink()

    assert score.data["metrics"] == pytest.approx(trained.cold.data["metrics"], abs=1e-6)
    assert new.exit_code == pinned.exit_code == 0
    assert read(trained.client.folder / "moved" / "environment.json")["model"]["commit"] != before
    assert read(trained.client.folder / "pinned" / "environment.json")["model"]["commit"] == before


@dataclass(frozen=True)
class Failure:
    """A way in which the Hub fails.

    Attributes:
        says: parts of the message.
        words: more of the command line.
        hub: attributes of the hub.
        env: more of the client's environment.
        code: the exit code.
    """

    says: tuple[str, ...]
    words: str = ""
    hub: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    code: int = 6


MODEL, DATA = {"gated": {"roberta-base"}}, {"gated": {"nyu-mll/glue"}}
TOKEN = {"HF_TOKEN": "hf_of_nobody"}
FAILURES = {
    "no such model": Failure(
        ("model 'roberta-bse': no such repository on the Hub, or it is private", "Check the spelling of --model"),
        "--model roberta-bse",
    ),
    "no such data": Failure(
        ("data set 'nyu-mll/gleu': no such", "on the Hub, or it is private", "Check the spelling of --data"),
        "-d nyu-mll/gleu",
    ),
    "no such revision": Failure(("model 'roberta-base': no such revision. Check --revision",), "--revision v9"),
    "no such configuration": Failure(("nyu-mll/glue", "sst3", "data.config"), "data.config=sst3", code=3),
    "no such split": Failure(("data.train_split: there is no split 'trian'. Did you mean 'train'?",),
                             "data.train_split=trian", code=3),
    "a data set for a model": Failure(("model 'nyu-mll/glue': no such repository",), "--model nyu-mll/glue"),
    "a gated model": Failure(("model 'roberta-base': the repository is gated", "set HF_TOKEN"), hub=MODEL),
    "a gated model, with a token": Failure(("model 'roberta-base': the repository is gated and this account",
                                            "Ask for access"), hub=MODEL, env=TOKEN),
    "gated data": Failure(("data set 'nyu-mll/glue': ", "gated", "set HF_TOKEN"), hub=DATA),
    "gated data, with a token": Failure(("data set 'nyu-mll/glue': ", "gated"), hub=DATA, env=TOKEN),
    "connections that break": Failure(("the connection failed", "Check the network and HF_ENDPOINT"),
                                      hub={"drop_connections": True}),
    "no answer at all": Failure(("Check the network and HF_ENDPOINT",),
                                hub={"drop_connections": True, "drop_methods": {"GET", "HEAD", "POST"}}),
}  # fmt: skip


@pytest.fixture(scope="module")
def empty_handed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LoopbackHub, Client]]:
    """A hub to be broken, and a client of it with nothing in its caches."""
    with LoopbackHub(root) as hub, client(hub, tmp_path_factory.mktemp("empty-handed")) as opened:
        yield hub, opened


@pytest.mark.parametrize("name", FAILURES)
def test_what_the_hub_refuses_is_said_plainly(
    empty_handed: tuple[LoopbackHub, Client], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    hub, ours = empty_handed
    shutil.rmtree(ours.folder / "hf-home", ignore_errors=True)
    failure = FAILURES[name]
    for attribute, value in failure.hub.items():
        monkeypatch.setattr(hub, attribute, value)

    outcome = ours.mirrortune(*changed(TRAIN, *failure.words.split()), **failure.env)

    refused(outcome, failure.says, failure.code)
    assert not (ours.folder / "runs").exists()


def refused(outcome: Outcome, says: tuple[str, ...], code: int = 6) -> None:
    """The command failed with that code and that message."""
    assert outcome.exit_code == code, outcome.stderr
    for part in says:
        assert part in outcome.said
    assert "Traceback" not in outcome.stderr
    assert outcome.stdout == ""


def test_the_same_command_again_is_the_way_on(
    empty_handed: tuple[LoopbackHub, Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, ours = empty_handed
    shutil.rmtree(ours.folder / "hf-home", ignore_errors=True)
    words = ["prepare", *TRAIN[1:], "--json"]
    monkeypatch.setattr(hub, "drop_connections", True)
    refused(ours.mirrortune(*words), ("then run the same command again: finished files are kept",))
    monkeypatch.setattr(hub, "drop_connections", False)

    assert ours.mirrortune(*words).data["targets"] == 12


def test_offline_what_is_not_cached_is_an_error(root: Path, tmp_path: Path) -> None:
    with LoopbackHub(root) as hub, client(hub, tmp_path, offline=True) as ours:
        refused(
            ours.mirrortune(*TRAIN),
            (
                "data set 'nyu-mll/glue': not in the local cache, and HF_HUB_OFFLINE forbids the network",
                "Run prepare online",
            ),
        )
        (tmp_path / "rows.csv").write_text("text,label\na,x\nb,y\n", encoding="utf-8")
        words = ["train", "-m", "roberta-base", "-t", "text-classification", "-d", tmp_path / "rows.csv"]
        refused(ours.mirrortune(*words), ("model 'roberta-base': not in the local cache, and HF_HUB_OFFLINE forbids",))
        assert hub.requests == []
    assert os.environ["HF_HUB_OFFLINE"] == "1", "the tests' own process never asks the real Hub"


def test_without_the_hub_the_cache_must_do(root: Path, tmp_path: Path) -> None:
    with LoopbackHub(root) as hub, client(hub, tmp_path) as ours:  # its own: tests of one module run in any order
        assert ours.mirrortune("prepare", *TRAIN[1:]).exit_code == 0
        hub.stop()

        assert ours.mirrortune(*TRAIN, "--max-steps", 1).exit_code == 0
        advice = "Check the network and HF_ENDPOINT"
        for words, says in (
            (("--model", "roberta-large"), "model 'roberta-large'"), (("-d", "owner/rows"), "data set 'owner/rows'")
        ):  # fmt: skip
            refused(ours.mirrortune(*changed(TRAIN, *words, "-o", "other")), (says, advice))
