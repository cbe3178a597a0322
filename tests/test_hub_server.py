# SPDX-License-Identifier: Apache-2.0
"""Tests of the loopback Hub with the real client libraries.

Each use of a library is a subprocess, because the libraries read `HF_ENDPOINT` and the like when
they are imported. A test passes if the library does what it does with huggingface.co, so the tests
also pin down which exceptions the installed versions raise and how long they retry.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.hub_fixtures import client_env, write_glue, write_tiny_roberta
from tests.hub_server import LoopbackHub

Report = dict[str, Any]
Loads = tuple[list[tuple[str, str]], list[Report], list[Report]]

# The start of every client: `report` is how it answers, and `attempt` reports the class of the
# exception and how long the library wants to wait between its retries, without waiting.
PRELUDE = """
import json, sys, time
import huggingface_hub

def report(**values):
    print(json.dumps(values))

def attempt(call, function):
    waits = []
    time.sleep = waits.append
    error = None
    try:
        function()
    except Exception as raised:
        error = f"{type(raised).__module__}.{type(raised).__name__}"
    report(call=call, error=error, waits=waits)
"""

LOAD_MODEL = """
from transformers import AutoModelForSequenceClassification, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("roberta-base")
model = AutoModelForSequenceClassification.from_pretrained("roberta-base", num_labels=2)
encoding = tokenizer("the film is lovely", "the plot is new", return_tensors="pt")
report(
    tokenizer=type(tokenizer).__name__,
    max_length=tokenizer.model_max_length,
    text=tokenizer.decode(encoding["input_ids"][0]),
    logits=list(model(**encoding).logits.shape),
    commit=huggingface_hub.resolve_revision("roberta-base").resolved,
)
"""

LOAD_GLUE = """
import datasets
for name in ("sst2", "stsb", "mnli"):
    loaded = datasets.load_dataset("nyu-mll/glue", name)
    tests = [loaded[split] for split in loaded if "test" in split]
    report(
        rows=loaded.num_rows,
        label=str(loaded["train"].features["label"]),
        test_labels=sorted({label for rows in tests for label in rows["label"]}),
        commit=loaded["train"].cache_files[0]["filename"].split("/")[-2],
    )
"""

CALLS = """
sys.modules["torch"] = None  # Nothing here needs it, and importing it takes half of the time.
import datasets, transformers
model, dataset = sys.argv[1:]
api = huggingface_hub.HfApi()
attempt("dataset_info", lambda: api.dataset_info(dataset))
attempt("hf_hub_download", lambda: api.hf_hub_download(model, "config.json"))
attempt("snapshot_download", lambda: api.snapshot_download(model))
attempt("from_pretrained", lambda: transformers.AutoConfig.from_pretrained(model))
attempt("load_dataset", lambda: datasets.load_dataset(dataset, "sst2"))
"""

IDS = ("roberta-base", "nyu-mll/glue")
NOT_FOUND = "huggingface_hub.errors.RepositoryNotFoundError"
GATED = "huggingface_hub.errors.GatedRepoError"
NOT_CACHED = "huggingface_hub.errors.LocalEntryNotFoundError"
DROPPED = "httpx2.RemoteProtocolError"
NO_DATASET = "datasets.exceptions.DatasetNotFoundError"
AT_ONCE: list[int] = []
FIVE_TIMES = [1, 1, 1, 1, 1]
BACKOFF = [1, 2, 4, 8, 8]


@dataclass(frozen=True)
class Failure:
    """A way to fail, and what comes of it.

    Attributes:
        expected: The exception (or `None`) and the waits between retries of each of `CALLS`.
        ids: The model and the dataset which are asked for.
        hub: The attributes to set on the hub.
        stopped: Whether the hub is stopped before the calls.
        offline: Whether the client is in offline mode.
        token: The client's token.
    """

    expected: dict[str, tuple[str | None, list[int]]]
    ids: tuple[str, str] = IDS
    hub: dict[str, object] = field(default_factory=dict)
    stopped: bool = False
    offline: bool = False
    token: str = ""


REFUSED: dict[str, tuple[str | None, list[int]]] = {
    "dataset_info": (None, AT_ONCE),
    "hf_hub_download": (GATED, AT_ONCE),
    "snapshot_download": (GATED, AT_ONCE),
    "from_pretrained": ("builtins.OSError", AT_ONCE),
    "load_dataset": (NO_DATASET, AT_ONCE),
}
FAILURES = {
    "missing": Failure(
        ids=("no-model", "no/data"),
        expected={
            "dataset_info": (NOT_FOUND, AT_ONCE),
            "hf_hub_download": (NOT_FOUND, AT_ONCE),
            "snapshot_download": (NOT_FOUND, AT_ONCE),
            "from_pretrained": ("builtins.OSError", AT_ONCE),
            "load_dataset": (NO_DATASET, AT_ONCE),
        },
    ),
    "gated without a token": Failure(hub={"gated": set(IDS)}, expected=REFUSED),
    "gated with a token": Failure(hub={"gated": set(IDS)}, token="hf_any", expected=REFUSED),
    "dropped connections": Failure(
        hub={"drop_connections": True},
        expected={
            "dataset_info": (DROPPED, AT_ONCE),
            "hf_hub_download": (DROPPED, FIVE_TIMES),
            "snapshot_download": (DROPPED, AT_ONCE),
            "from_pretrained": ("builtins.OSError", FIVE_TIMES),
            "load_dataset": (DROPPED, FIVE_TIMES),
        },
    ),
    "stopped": Failure(
        stopped=True,
        expected={
            "dataset_info": ("httpx2.ConnectError", AT_ONCE),
            "hf_hub_download": (NOT_CACHED, BACKOFF),
            "snapshot_download": (NOT_CACHED, AT_ONCE),
            "from_pretrained": ("builtins.OSError", BACKOFF),
            "load_dataset": ("builtins.ConnectionError", BACKOFF),
        },
    ),
    "offline": Failure(
        offline=True,
        expected={
            "dataset_info": ("huggingface_hub.errors.OfflineModeIsEnabled", AT_ONCE),
            "hf_hub_download": (NOT_CACHED, AT_ONCE),
            "snapshot_download": (NOT_CACHED, AT_ONCE),
            "from_pretrained": ("builtins.OSError", AT_ONCE),
            "load_dataset": ("builtins.ConnectionError", AT_ONCE),
        },
    ),
}


def run_client(script: str, env: dict[str, str], *args: str) -> list[Report]:
    """Runs a client in a subprocess and returns what it reported."""
    command = [sys.executable, "-c", PRELUDE + script, *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `roberta-base` and `nyu-mll/glue`."""
    folder = tmp_path_factory.mktemp("hub")
    write_tiny_roberta(folder)
    write_glue(folder)
    return folder


def load_twice(root: Path, home: Path, script: str) -> Loads:
    """Runs `script` with a hub and then again, offline, when the hub is gone."""
    with LoopbackHub(root) as hub:
        cold = run_client(script, client_env(hub.endpoint, home))
    warm = run_client(script, client_env(hub.endpoint, home, offline=True))
    return hub.requests, cold, warm


def fail(root: Path, home: Path, failure: Failure) -> list[Report]:
    """Makes `CALLS` fail."""
    with LoopbackHub(root) as hub:
        for name, value in failure.hub.items():
            setattr(hub, name, value)
        if failure.stopped:
            hub.stop()
        env = client_env(hub.endpoint, home, offline=failure.offline)
        return run_client(CALLS, env | {"HF_TOKEN": failure.token}, *failure.ids)


@pytest.fixture(scope="module")
def failures(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[list[Report]]]]:
    """What the clients of each of `FAILURES` report, started together because each spends seconds on its imports."""
    homes = tmp_path_factory.mktemp("homes")
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(fail, root, homes / name, FAILURES[name]) for name in FAILURES}


@pytest.mark.slow  # the libraries alone; tests/e2e/test_hub_path.py goes this way with ours
def test_a_model_loads_cold_and_then_offline(root: Path, tmp_path: Path) -> None:
    requests, (cold,), (warm,) = load_twice(root, tmp_path, LOAD_MODEL)

    assert ("GET", f"/roberta-base/resolve/{cold['commit']}/model.safetensors") in requests
    assert not [path for _, path in requests if "xet" in path]
    assert cold["tokenizer"] == "RobertaTokenizer"
    assert cold["max_length"] == 512
    assert cold["text"] == "<s>the film is lovely</s></s>the plot is new</s>"
    assert cold["logits"] == [1, 2]
    assert warm == cold


@pytest.mark.slow
def test_glue_loads_cold_and_then_offline(root: Path, tmp_path: Path) -> None:
    _, cold, warm = load_twice(root, tmp_path, LOAD_GLUE)

    sst2, stsb, mnli = cold
    assert sst2["rows"] == stsb["rows"] == {"train": 120, "validation": 40, "test": 20}
    assert mnli["rows"] == {
        "train": 120,
        "validation_matched": 40,
        "validation_mismatched": 40,
        "test_matched": 20,
        "test_mismatched": 20,
    }
    assert sst2["label"] == "ClassLabel(names=['negative', 'positive'])"
    assert stsb["label"] == "Value('float32')"
    assert [loaded["test_labels"] for loaded in cold] == [[-1]] * 3
    assert warm == cold


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_an_error_after_few_retries(failures: dict[str, Future[list[Report]]], name: str) -> None:
    reports = failures[name].result()
    results = {report["call"]: (report["error"], report["waits"]) for report in reports}
    assert results == FAILURES[name].expected


def download(request: str | urllib.request.Request) -> tuple[Any, bytes]:
    """The headers and the body of an answer, its connection closed."""
    with urllib.request.urlopen(request) as answer:
        return answer.headers, answer.read()


def test_a_commit_stays_available_after_an_edit(tmp_path: Path) -> None:
    readme = write_glue(tmp_path) / "README.md"
    with LoopbackHub(tmp_path) as hub:
        url = f"{hub.endpoint}/datasets/nyu-mll/glue/resolve/{{}}/README.md"
        before, before_text = download(url.format("main"))
        readme.write_text("edited", encoding="utf-8")
        after, after_text = download(url.format("main"))
        pinned, pinned_text = download(url.format(before["X-Repo-Commit"]))

        assert after["X-Repo-Commit"] != before["X-Repo-Commit"]
        assert after_text == b"edited"
        assert pinned_text == before_text
        assert pinned["ETag"] == before["ETag"]


def test_a_range_of_a_file_is_partial_content(root: Path) -> None:
    with LoopbackHub(root) as hub:
        url = f"{hub.endpoint}/roberta-base/resolve/main/config.json"
        request = urllib.request.Request(url, headers={"Range": "bytes=2-5"})
        headers, part = download(request)
        content = (root / "models/roberta-base/config.json").read_bytes()

        assert headers["Content-Range"] == f"bytes 2-5/{len(content)}"
        assert part == content[2:6]


@pytest.mark.parametrize(
    ("path", "token", "status", "code"),
    [
        ("/none/resolve/main/config.json", "", 404, "RepoNotFound"),
        ("/api/datasets/nyu-mll", "", 404, "RepoNotFound"),
        ("/roberta-base/resolve/none/config.json", "", 404, "RevisionNotFound"),
        ("/roberta-base/resolve/main/none.json", "", 404, "EntryNotFound"),
        ("/datasets/nyu-mll/glue/resolve/main/README.md", "", 401, "GatedRepo"),
        ("/datasets/nyu-mll/glue/resolve/main/README.md", "Bearer any", 403, "GatedRepo"),
    ],
)
def test_an_error_has_the_status_and_the_code_of_the_hub(
    root: Path, path: str, token: str, status: int, code: str
) -> None:
    with LoopbackHub(root) as hub:
        hub.gated = {"nyu-mll/glue"}
        request = urllib.request.Request(hub.endpoint + path, headers={"Authorization": token})
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request)
        caught.value.close()

    assert (caught.value.code, caught.value.headers["X-Error-Code"]) == (status, code)


def test_paths_and_files_are_described(root: Path, tmp_path: Path) -> None:
    script = """
api = huggingface_hub.HfApi()
paths = api.get_paths_info("nyu-mll/glue", ["sst2", "README.md", "none"], repo_type="dataset")
report(
    paths=[(type(path).__name__, path.path) for path in paths],
    sizes={file.rfilename: file.size for file in api.model_info(
        "roberta-base", files_metadata=True).siblings},
    user=api.whoami(token="hf_any")["name"],
)
"""
    with LoopbackHub(root) as hub:
        (found,) = run_client(script, client_env(hub.endpoint, tmp_path))

    model = root / "models" / "roberta-base"
    assert found["paths"] == [["RepoFolder", "sst2"], ["RepoFile", "README.md"]]
    assert found["sizes"] == {path.name: path.stat().st_size for path in model.iterdir()}
    assert found["user"] == "loopback"


DOWNLOAD = """
attempt("hf_hub_download", lambda: huggingface_hub.hf_hub_download("roberta-base", "vocab.json"))
"""


def test_a_number_of_dropped_connections_is_survived(root: Path, tmp_path: Path) -> None:
    with LoopbackHub(root) as hub:
        hub.drop_connections = 2
        (result,) = run_client(DOWNLOAD, client_env(hub.endpoint, tmp_path))

    assert result == {"call": "hf_hub_download", "error": None, "waits": [1, 1]}
    assert hub.drop_connections == 0


def test_a_dropped_head_request_is_not_retried(root: Path, tmp_path: Path) -> None:
    with LoopbackHub(root) as hub:
        hub.drop_connections = 1
        hub.drop_methods = {"HEAD"}
        (result,) = run_client(DOWNLOAD, client_env(hub.endpoint, tmp_path))

    assert result == {"call": "hf_hub_download", "error": DROPPED, "waits": []}
