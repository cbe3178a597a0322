# SPDX-License-Identifier: Apache-2.0
"""signals: what becomes of the processes of a run when one of them has ended."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from mirrortune.errors import HubError
from mirrortune.system.signals import await_launcher

# A launcher of two processes. The first waits where no signal handler of Python can reach it, as in a collective of
# NCCL; the second lives, or has failed as torchrun ends the first.
LAUNCHER = """
import os, signal, subprocess, sys
waiting = "import threading\\nfrom mirrortune.system.signals import StopSignals\\nwith StopSignals():\\n"
waiting += "    print('ready', flush=True)\\n    lock = threading.Lock()\\n    lock.acquire()\\n    lock.acquire()"
peer = "import time; time.sleep(600)" if sys.argv[1] == "lives" else "raise SystemExit(3)"
os.environ.update(LOCAL_WORLD_SIZE="2", **({"TORCHELASTIC_RUN_ID": "run"} if sys.argv[1] != "not torchrun" else {}))
first = subprocess.Popen([sys.executable, "-c", waiting], stdout=subprocess.PIPE)
second = subprocess.Popen([sys.executable, "-c", peer])
first.stdout.readline()
if sys.argv[1] != "lives":
    second.wait()
first.send_signal(signal.SIGTERM)
try:
    print(first.wait(timeout=60 if sys.argv[1] == "failed" else 3))
except subprocess.TimeoutExpired:
    print("waits")
first.kill()
second.kill()
"""


@pytest.mark.parametrize(("peer", "outcome"), [("lives", "waits"), ("failed", "143"), ("not torchrun", "waits")])
def test_a_process_that_waits_for_one_that_failed_is_ended_by_its_launcher(peer: str, outcome: str) -> None:
    words = [sys.executable, "-c", LAUNCHER, peer]
    found = subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    assert found.stdout.strip() == outcome


@pytest.mark.parametrize(
    ("processes", "error", "waits"),
    [
        ("2", RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:12166."), True),
        ("2", RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        ("1", RuntimeError("Connection reset by peer"), False),
        ("2", HubError("model 'x'", "Connection reset by peer"), False),
    ],
)
def test_only_the_process_that_failed_reports(
    processes: str, error: Exception, *, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setattr(time, "sleep", pauses.append)
    await_launcher(error)
    assert bool(pauses) is waits
