# SPDX-License-Identifier: Apache-2.0
"""Claims: one process at a time, none left by a killed one, nothing left behind."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mirrortune.errors import ConfigError, ResourceError
from mirrortune.system import claims
from mirrortune.system.claims import claimed
from tests.trees import tree

# Claims an output, says so, and waits to be told to end.
HOLD = """
import sys
from pathlib import Path
from mirrortune.system.claims import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
# Waits for the others, then claims and replaces an output as a merge does; says what came of it.
RACE = """
import sys, time
from pathlib import Path
from mirrortune.errors import ConfigError
from mirrortune.system.outputs import MERGED, output_folder

output, name, rounds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for number in range(rounds):
    sys.stdin.readline()
    try:
        with output_folder(output / str(number), [], MERGED) as put:
            def write(folder):
                for part in ("a", "b", "c"):
                    (folder / part).write_text(name)
            put(write)
        print("wrote", flush=True)
    except ConfigError as error:
        print(error, flush=True)
"""


def run(code: str, *words: object) -> subprocess.Popen[str]:
    """Start Python with our package."""
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip


def test_the_claim_of_another_process_is_refused_and_ends_with_it(tmp_path: Path) -> None:
    output = tmp_path / "runs" / "x"
    process = run(HOLD, output)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    said = rf"x: process {process.pid} on .* is writing there\. Wait until it ends"
    with pytest.raises(ConfigError, match=said), claimed(output):
        pass
    with claimed(tmp_path / "runs" / "y"):
        pass  # another output
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [p.name for p in (tmp_path / "runs").iterdir()] == [".x.claim"]
    with claimed(output):
        assert json.loads((tmp_path / "runs" / ".x.claim").read_text())["pid"] == os.getpid()
    assert list((tmp_path / "runs").iterdir()) == []


def test_folders_that_were_made_for_a_claim_do_not_outlive_it(tmp_path: Path) -> None:
    with claimed(tmp_path / "a" / "b" / "c"):
        assert (tmp_path / "a" / "b").is_dir()
        with pytest.raises(ConfigError), claimed(tmp_path / "a" / "." / "b" / "c"):
            pass
    assert list(tmp_path.iterdir()) == []
    with claimed(tmp_path / "a" / "b" / "c"):
        (tmp_path / "a" / "kept").touch()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["kept"]


def test_a_claim_is_waited_for(tmp_path: Path) -> None:
    process = run(HOLD, tmp_path / "x")
    assert process.stdout is not None
    process.stdout.readline()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        time.sleep(0.3)
        os.kill(process.pid, signal.SIGKILL)
        os._exit(0)
    with claimed(tmp_path / "x", wait=True):
        assert time.monotonic() - started > 0.25
    os.waitpid(pid, 0)
    process.communicate()


def test_a_place_that_cannot_be_claimed_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot be written"), claimed(tmp_path / "file" / "run"):
        pass


def test_the_claim_of_another_machine_is_named_where_there_are_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that was stopped on one node of a cluster continues on another, which cannot see whether it has ended."""

    def no_locks(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    left = tmp_path / ".x.claim.soft"
    left.write_text("4242\nnode-7\n")
    said = rf"x: process 4242 on node-7 is writing there\. Wait .* if that process has ended, delete {left}"
    with pytest.raises(ConfigError, match=said), claimed(tmp_path / "x"):
        pass
    left.unlink()
    with claimed(tmp_path / "x"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("has_locks", [True, False])
@pytest.mark.parametrize("kind", ["zeros", "link", "text", "pipe"])
def test_what_is_no_claim_is_left_alone(
    tmp_path: Path, kind: str, has_locks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if not has_locks:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    place = tmp_path / ".x.claim"
    if kind == "zeros":
        place.write_bytes(bytes(8192) + b"years of work")
    elif kind == "link":
        (tmp_path / "placeholder").touch()
        place.hardlink_to(tmp_path / "placeholder")
    elif kind == "text":
        place.write_text("years of work")
    else:
        os.mkfifo(place)
    before = tree(tmp_path)
    with pytest.raises(ResourceError, match="it is not one of mirrortune's lock files"), claimed(tmp_path / "x"):
        pass
    assert tree(tmp_path) == before


def test_without_locks_the_file_is_the_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    for _ in range(2):
        with (
            claimed(tmp_path / "x"),
            pytest.raises(ConfigError, match=rf"process {os.getpid()} on .* is writing there"),
            claimed(tmp_path / "x"),
        ):
            pass
        assert list(tmp_path.iterdir()) == []
    pid = os.fork()
    if pid == 0:
        with claimed(tmp_path / "x"):
            os._exit(0)  # as if it were killed
    os.waitpid(pid, 0)
    assert list(tmp_path.iterdir()) != []
    with claimed(tmp_path / "x", wait=True):
        pass


def test_of_two_that_race_for_one_output_one_writes_it_whole(tmp_path: Path) -> None:
    rounds = 50
    racers = [run(RACE, tmp_path, name, rounds) for name in ("one", "two")]
    said: list[list[str]] = []
    for _ in range(rounds):
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("\n")
            racer.stdin.flush()
        said.append([racer.stdout.readline() for racer in racers if racer.stdout is not None])
    for racer in racers:
        racer.communicate()
    for number, answers in enumerate(said):
        assert sorted(answer == "wrote\n" for answer in answers) == [False, True], answers
        refused = next(answer for answer in answers if answer != "wrote\n")
        assert "is writing there" in refused or "is not empty" in refused
        winner = ("one", "two")[answers.index("wrote\n")]
        files = {p.name: p.read_text() for p in (tmp_path / str(number)).iterdir() if not p.name.startswith(".")}
        assert files == dict.fromkeys("abc", winner)
    assert list(tmp_path.glob(".*")) == []


def test_a_claim_that_is_removed_while_it_is_opened_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, really = [], claims._open

    def open_late(place: Path) -> int:
        handle = really(place)
        opened.append(place)
        if len(opened) == 1:  # its holder lets go between our opening and our locking it
            place.unlink()
        return handle

    monkeypatch.setattr(claims, "_open", open_late)
    with claimed(tmp_path / "out"):
        assert (tmp_path / ".out.claim").is_file()
        with pytest.raises(ConfigError, match="is writing there"), claimed(tmp_path / "out"):
            pass
    assert tree(tmp_path) == {}


def test_a_folder_in_which_no_file_may_be_created_is_reported_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = os.open

    def refusing(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return really(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refusing)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ResourceError, match="Permission denied"), claimed(tmp_path / "x"):
        pass
