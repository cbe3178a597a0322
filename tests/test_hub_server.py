# SPDX-License-Identifier: Apache-2.0
"""Tests of the loopback Hub: its answers, and what the real client makes of them.

The client is a subprocess, because it reads `HF_ENDPOINT` and the like when it is imported. How the libraries load
models and data from this Hub, and fail to, is tested through ours in tests/e2e/test_hub_path.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.hub_fixtures import client_env, write_glue, write_tiny_roberta
from tests.hub_server import LoopbackHub

Report = dict[str, Any]

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

DROPPED = "httpx2.RemoteProtocolError"


def run_client(script: str, env: dict[str, str]) -> list[Report]:
    """Runs a client in a subprocess and returns what it reported."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `roberta-base` and `nyu-mll/glue`."""
    folder = tmp_path_factory.mktemp("hub")
    write_tiny_roberta(folder)
    write_glue(folder)
    return folder


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
